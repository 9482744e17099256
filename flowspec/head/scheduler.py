"""Scheduler: which requests run, which wait, and what goes into the next batch.

Every stage keeps a KV cache of fixed capacity per request, which is known before the request
begins. The budget is what the smallest stage can hold, in tokens of all requests together.

A batch costs t(n), the time of the slowest stage for n rows. It is nearly flat up to a knee, so
rows of other requests add little. The scheduler maximises expected accepted tokens per time. The
time includes the link to the next stage, since a slow link delays every verdict. Roots come first,
since they are certain to be on the true path: a request whose verdict has come is in the very next
batch. So no request waits longer for its next token than one batch takes through the pipeline.
Prompts advance by a chunk in every batch, the oldest request first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp

from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.head.prefix_cache import PrefixCache
from flowspec.head.request_state import RequestState, RequestStatus, max_tree_tokens
from flowspec.protocol.messages import Segment
from flowspec.request import Request, check_token_ids
from flowspec.runtime.failures import Failures
from flowspec.speculation.strategy import Outgoing, StrategyConfig
from flowspec.speculation.tree import Node

MAX_QUEUED = 64  # requests that wait to run
MAX_SHARED_ROWS = 128  # best-first rows of a batch that several requests share


class TooLargeError(ValueError):
    """A request that the stages' memory can never hold."""


@dataclass(slots=True)
class Start:
    """A waiting request that may run now, reusing `num_cached_tokens` of a finished one."""

    request: RequestState
    reuse: RequestState | None = None
    num_cached_tokens: int = 0
    evicted: list[int] = field(default_factory=list)  # cached requests to free before it starts
    succeeded: list[int] = field(default_factory=list)  # and after it has started


@dataclass(slots=True)
class _Offer:
    """Rows of one request that could be sent now."""

    request: RequestState
    outgoing: Outgoing
    nodes: Sequence[Node]  # as far as the stages' caches have room


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """Runs up to `max_num_seqs` requests at once, in `max_kv_tokens` in all (0: no limit known).

    `max_cached` finished requests stay on the stages, for prompts with the same first tokens.
    """

    pipe: Pipeline
    max_context: int
    max_num_seqs: int = 8
    max_cached: int = 0
    max_kv_tokens: int = 0
    chunked_prefill_size: int = 64  # prompt tokens per batch
    vocab_size: int = 0  # rows of the target's embedding; 0: not known
    text_of: Callable[[int], str] = lambda token: ""  # a token's text, for messages
    failures: Failures = field(default_factory=Failures)  # of the head
    waiting: deque[RequestState] = field(default_factory=deque)
    running: dict[int, RequestState] = field(default_factory=dict)  # oldest first
    cache: PrefixCache = field(init=False)
    _turn: int = 0  # the index of the request that is asked first

    def __post_init__(self) -> None:
        self.cache = PrefixCache(self.max_cached, failures=self.failures)

    # Admission -----------------------------------------------------------------------------------

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that running requests take on every stage."""
        return sum(request.num_kv_tokens for request in self.running.values())

    def limit_kv_tokens(self, num_kv_tokens: int) -> None:
        """Lower the budget to what a stage can hold, in tokens (0: the stage has no limit)."""
        known = [count for count in (self.max_kv_tokens, num_kv_tokens) if count]
        self.max_kv_tokens = min(known, default=0)

    def check(self, request: Request, config: StrategyConfig) -> int:
        """Return how many new tokens the request may have, as far as the context has room.

        Raises ValueError, with what is needed and what there is, if it can never run or if the
        queue is full. No memory is taken for a request that does not fit the context.
        """
        prompt = request.prompt_tokens
        if self.vocab_size:
            ends = request.eos_token_ids or ()
            for ids, of in ((prompt, "the prompt"), (ends, "the end")):
                check_token_ids(ids, self.vocab_size, of=of, text_of=self.text_of)
        room = self.max_context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.max_context}; "
                "shorten the prompt, or raise --context (of `serve`, where a cluster answers)"
            )
        max_new_tokens = min(request.max_new_tokens, room)
        needed = len(prompt) + max_new_tokens + max_tree_tokens(config)
        if self.max_kv_tokens and needed > self.max_kv_tokens:
            raise TooLargeError(
                f"the request needs {needed} tokens of KV cache on every stage, the tightest stage "
                f"holds {self.max_kv_tokens}; shorten prompt or answer, raise kv_memory_mb or add "
                "stages"
            )
        if len(self.waiting) >= MAX_QUEUED:
            raise ValueError(f"{MAX_QUEUED} requests are waiting already")
        return max_new_tokens

    def add(self, request: RequestState) -> None:
        """Queue a request that has passed `check`."""
        self.waiting.append(request)

    def withdraw(self, request: int) -> RequestState | None:
        """Remove a request from the queue and return it; None if it was not there."""
        found = next((one for one in self.waiting if one.id == request), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def next_to_start(self) -> RequestState | None:
        """Return the oldest waiting request if it can run now beside the others.

        Later ones wait for it even if they would fit, or a large one might never start. An
        exclusive request waits until no other runs, and the others wait until it is over. The
        prefix cache may have to make room first.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        if any(request.losses.needs_trial for request in self.running.values()):
            return None
        request = self.waiting[0]
        alone = [request, *self.running.values()]
        if self.running and any(one.request.exclusive for one in alone):
            return None
        needed = request.num_kv_tokens + self.num_kv_tokens
        return None if self.max_kv_tokens and needed > self.max_kv_tokens else request

    def start(self, request: RequestState) -> Start:
        """Move the oldest waiting request to the running ones."""
        oldest = self.waiting.popleft()
        assert oldest is request, "another one waits longer"
        reuse, num_cached_tokens = self.cache.find(request)
        start = Start(request, evicted=self._make_room(request.num_kv_tokens, reuse))
        if reuse is not None and reuse.id not in start.evicted:
            start.reuse, start.num_cached_tokens = reuse, num_cached_tokens
            if self.cache.is_next_turn(reuse, num_cached_tokens):
                start.succeeded.append(reuse.id)
                self.cache.remove(reuse.id)
        self.running[request.id] = request
        return start

    def _make_room(self, num_kv_tokens: int, spare: RequestState | None) -> list[int]:
        """Evict the oldest from the prefix cache, `spare` last, until `num_kv_tokens` fit."""
        evicted: list[int] = []
        order = [*(one for one in self.cache if one is not spare), *([spare] if spare else [])]
        for one in order:
            used = self.num_kv_tokens + self.cache.num_kv_tokens
            if not self.max_kv_tokens or used + num_kv_tokens <= self.max_kv_tokens:
                break
            evicted.append(one.id)
            self.cache.remove(one.id)
        return evicted

    def preempt_all(self, now: float, ended: Sequence[RequestState]) -> None:
        """Make all running requests wait again, first in the queue: their stages are lost.

        Those in `ended` do not wait again. Requests with most losses come first, so that they are
        tried alone.
        """
        again = [one for one in self.running.values() if one not in ended]
        for request in again:
            request.preempt(now)
        again.sort(key=lambda one: -one.losses.recent)
        self.waiting.extendleft(reversed(again))
        self.running.clear()
        self.cache.clear()

    def forgive(self) -> None:
        """Forget the losses of preempted requests: their cause is found."""
        for request in self.waiting:
            if request.status is RequestStatus.PREEMPTED:
                request.losses.forget()

    def take_too_large(self) -> list[RequestState]:
        """Remove requests from the queue that the present stages could never hold."""
        limit = self.max_kv_tokens
        too_large = [one for one in self.waiting if limit and one.num_kv_tokens > limit]
        for request in too_large:
            self.waiting.remove(request)
        return too_large

    # Batching ------------------------------------------------------------------------------------

    def next_batch(self) -> list[Segment]:
        """Return the segments to send together now, or none. A request that fails is left out."""
        requests = list(self.running.values())
        if self.pipe.is_full or (len(requests) > 1 and self.pipe.num_waiting):
            return []
        offers = self._offers([request for request in requests if request.is_decoding])
        # A strategy does not offer a whole segment twice, so early rows of others must not hold it
        # back.
        must_go = any(not o.outgoing.best_first and not o.outgoing.early for o in offers)
        if not must_go and any(offer.outgoing.early for offer in offers):
            return []
        segments = self._prefix_segments(requests)
        counts = best_counts(
            self.pipe.cost,
            offers_of(offers),
            num_fixed=sum(len(segment.nodes) for segment in segments),
            row_ms=self.pipe.link_row_ms,
            least_rate=0.5 / (self.pipe.num_stages * self.pipe.cost.milliseconds(1)),
        )
        for offer, count in zip(offers, counts, strict=True):
            if count:
                with self.failures.of(offer.request.id):
                    nodes, verify = offer.nodes[:count], offer.outgoing.verify
                    segments.append(offer.request.tree_segment(nodes, verify=verify))
        if segments:
            self._turn += 1
            self.pipe.depart(
                sum(len(segment.nodes) for segment in segments),
                tuple((segment.request, segment.seq_no) for segment in segments),
                prompt=all(segment.prefix for segment in segments),
            )
        return segments

    def _prefix_segments(self, requests: Sequence[RequestState]) -> list[Segment]:
        """Return a chunk of prompt for the batch, oldest request first; short prompts share it."""
        segments: list[Segment] = []
        left = self.chunked_prefill_size
        for request in requests:
            with self.failures.of(request.id):
                segment = request.prefix_segment(left)
                if segment is not None:
                    segments.append(segment)
                    left -= len(segment.nodes)
        return segments

    def _offers(self, requests: Sequence[RequestState]) -> list[_Offer]:
        """Return the rows that each request offers; whole segments only while one more pays."""
        offers: list[_Offer] = []
        whole: list[int] = []  # rows of each segment that may not be cut
        for place in range(len(requests)):
            request = requests[(self._turn + place) % len(requests)]
            left = request.num_tree_tokens_free
            if not pays(self.pipe.cost, whole) or left <= 0:
                continue
            with self.failures.of(request.id):
                assert request.strategy is not None, "a running request has a strategy"
                outgoing = request.strategy.next_segment(request)
                if outgoing is None:
                    continue
                if not outgoing.best_first:
                    whole.append(len(outgoing.nodes))
                offers.append(_Offer(request, outgoing, outgoing.nodes[:left]))
        return offers


def offers_of(offers: Sequence[_Offer]) -> list[tuple[list[float], bool]]:
    """Return (probability of being true per row, whether it may be cut) of each offer."""
    return [
        ([exp(node.score) for node in offer.nodes], offer.outgoing.best_first) for offer in offers
    ]


def best_counts(
    cost: SegmentCost,
    offers: Sequence[tuple[list[float], bool]],
    *,
    num_fixed: int = 0,
    row_ms: float = 0.0,
    least_rate: float = 0.0,
) -> list[int]:
    """Return how many rows of each offer to send, for the most gain per time.

    The gain per time is sum(p) / (t(rows) + rows row_ms). An offer has the falling probabilities of
    its rows, and whether it may be cut. `num_fixed` rows go along in any case (a piece of prompt,
    worth one token). `row_ms` is a row's time on the link.

    Guesses that bring less than `least_rate` tokens per millisecond are not sent. A token that
    becomes known while guesses are computed arrives halfway through on average and waits for the
    rest. Without guesses one batch through the pipeline brings one token. So guesses must bring
    half a token in that time.
    """

    def milliseconds(rows: int) -> float:
        return cost.milliseconds(rows) + rows * row_ms

    counts = [0 if can_cut else len(gains) for gains, can_cut in offers]
    num_rows = num_fixed + sum(counts)
    gain = sum(sum(gains) for gains, can_cut in offers if not can_cut) + (num_fixed > 0)
    ranked = [
        (-p, rank, place)
        for place, (gains, can_cut) in enumerate(offers)
        if can_cut
        for rank, p in enumerate(gains)
    ]
    # Equal rows are ordered by rank: parents stay first, and roots precede guesses that are as
    # sure.
    loose = [(-p, place) for p, _, place in sorted(ranked)]
    if sum(can_cut for _, can_cut in offers) > 1:
        del loose[MAX_SHARED_ROWS:]
    best, best_rate = 0, gain / milliseconds(num_rows) if num_rows else least_rate
    for taken, (p, _) in enumerate(loose, start=1):
        gain += p
        rate = gain / milliseconds(num_rows + taken)
        if rate > best_rate:
            best, best_rate = taken, rate
    # Certain rows go in any case, or a request could wait for ever beside a large one.
    certain = sum(p >= 1.0 for p, _ in loose)
    for _, place in loose[: max(best, certain)]:
        counts[place] += 1
    return counts


def pays(cost: SegmentCost, whole: Sequence[int]) -> bool:
    """Return whether one more segment like the last would raise the gain per time."""
    if not whole:
        return True
    num_rows, count = sum(whole), len(whole)
    together = cost.milliseconds(num_rows + whole[-1])
    return together * count < cost.milliseconds(num_rows) * (count + 1)
