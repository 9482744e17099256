"""Admission by memory: which requests may begin, which wait, what is kept for a next turn.

Every stage keeps a KV cache of fixed capacity per request, known before the request begins. The
budget is what the tightest stage can hold, in rows of all requests together.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix

from flowspec.config import DecodeConfig
from flowspec.head.session import Session
from flowspec.request import DecodeStats, Request, check_token_ids
from flowspec.runtime.failures import Failures
from flowspec.tokenizer import TextStream

MAX_QUEUED = 64  # requests waiting for their turn


class TooLargeError(ValueError):
    """A request that the stages' memory can never hold."""


MAX_IN_A_ROW = 2  # losses with hardly a verdict between
MAX_RECENT, MIN_ALONE = 4, 2  # losses of which none lies long before the next


@dataclass(slots=True)
class Losses:
    """Stages that were lost while a request was served, and may have been by its doing."""

    in_a_row: int = 0  # with hardly a verdict between
    early: int = 0  # of these, that came with hardly a verdict since it began
    recent: int = 0  # without a minute of service between
    alone: int = 0  # of these, while no other request was served
    last_was_alone: bool = False

    def add(self, *, alone: bool, early: bool) -> None:
        """One more."""
        self.in_a_row += 1
        self.early += early
        self.recent += 1
        self.alone += alone
        self.last_was_alone = alone

    def clear(self) -> None:
        """Some verdicts have come: it did not kill the stages at once."""
        self.in_a_row = self.early = 0

    def forget(self) -> None:
        """It has been served for long, or another request was the cause."""
        self.recent, self.alone = min(self.in_a_row, 1), 0

    @property
    def needs_trial(self) -> bool:
        """Whether it must be served alone, so that the next loss tells more."""
        return self.in_a_row > 0 or self.recent >= MAX_IN_A_ROW

    @property
    def condemns(self) -> int:
        """By how many losses the request is taken for their cause; 0: by none.

        A request may kill its device at once, or a little later each time. The latter looks like
        an unlucky one, so more losses are wanted, and some of them with no other suspect. Who has
        been served well before, and then is lost twice, may have had such a one beside it.
        """
        if self.early >= MAX_IN_A_ROW:
            return self.in_a_row
        if not self.last_was_alone:
            return 0
        if self.in_a_row >= MAX_IN_A_ROW:
            return self.in_a_row
        return self.recent if self.recent >= MAX_RECENT and self.alone >= MIN_ALONE else 0


@dataclass(slots=True)
class Before:
    """What a request had reached when its stages were lost."""

    stats: DecodeStats
    text: TextStream
    lost_at: float  # seconds of the driver's clock
    losses: Losses = field(default_factory=Losses)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has not begun, or whose stages were lost: it begins again, prefix first."""

    request: Request
    submitted_at: float
    num_rows: int  # its caches' capacity
    before: Before | None = None


@dataclass(slots=True)
class Kept:
    """A finished request whose committed rows are still on the stages."""

    session: Session
    num_rows: int

    def num_cached_tokens(self, prompt: Sequence[int]) -> int:
        """Leading positions of `prompt` that need not be computed again.

        One less than the tokens in common, as an Opening wants it, and at most what the stages
        have committed and the drafter has complete.
        """
        session = self.session
        in_common = len(commonprefix([tuple(prompt), session.all_tokens]))
        return max(0, min(in_common - 1, session.num_committed, session.drafter.num_reusable))


@dataclass(slots=True)
class Turn:
    """A waiting request that begins."""

    waiting: Waiting
    kept: Kept | None = None  # its first num_cached_tokens rows are taken over
    num_cached_tokens: int = 0
    gone: list[int] = field(default_factory=list)  # kept requests given up before it
    gone_after: list[int] = field(default_factory=list)  # and once it has begun


@dataclass(slots=True)
class Admission:
    """Books of rows: `max_rows` in all (0: no limit known), `max_active` requests at once.

    `max_kept` finished requests stay on the stages, for prompts that begin with the same tokens.
    `vocab_size` is the number of rows of the target's embedding (0: not known), `text_of` gives a
    token's text.
    """

    max_context: int
    max_active: int = 8
    max_kept: int = 0
    max_rows: int = 0
    waiting: deque[Waiting] = field(default_factory=deque)
    rows: dict[int, int] = field(default_factory=dict)  # of requests being served
    kept: dict[int, Kept] = field(default_factory=dict)  # oldest first
    vocab_size: int = 0
    text_of: Callable[[int], str] = lambda token: ""
    failures: Failures = field(default_factory=Failures)  # of the head

    @property
    def num_rows_used(self) -> int:
        """By requests being served and by kept ones."""
        return sum(self.rows.values()) + sum(kept.num_rows for kept in self.kept.values())

    def limit_rows(self, num_kv_tokens: int) -> None:
        """A stage can hold this many rows of KV cache (0: it does not know)."""
        known = [rows for rows in (self.max_rows, num_kv_tokens) if rows]
        self.max_rows = min(known, default=0)

    def submit(self, request: Request, now: float, *, num_tree_rows: int) -> None:
        """Queue a request; its caches hold prompt, answer and `num_tree_rows`.

        What does not fit the context is never asked for, and no memory is taken for it. Raises
        ValueError with both numbers where it can never begin, or where the queue is full.
        """
        if self.vocab_size:
            for ids, of in ((request.prompt, "the prompt"), (request.eos_token_ids, "the end")):
                check_token_ids(ids, self.vocab_size, of=of, text_of=self.text_of)
        room = self.max_context - len(request.prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, the context holds "
                f"{self.max_context}; shorten the prompt, or raise --context (of `serve`, where a "
                "cluster answers)"
            )
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        num_rows = self.rows_of(request, num_tree_rows)
        if len(self.waiting) >= MAX_QUEUED:
            raise ValueError(f"{MAX_QUEUED} requests are waiting already")
        self.waiting.append(Waiting(request, now, num_rows))

    def rows_of(self, request: Request, num_tree_rows: int) -> int:
        """Capacity of its caches. Raises TooLargeError where the tightest stage never has it."""
        num_rows = len(request.prompt) + request.max_new_tokens + num_tree_rows
        if self.max_rows and num_rows > self.max_rows:
            raise TooLargeError(
                f"the request needs {num_rows} rows of KV cache on every stage, the tightest stage "
                f"holds {self.max_rows}; shorten prompt or answer, raise kv_memory_mb or add stages"
            )
        return num_rows

    def withdraw(self, request: int) -> Waiting | None:
        """Take a request out of the queue; None: it was not there."""
        found = next((w for w in self.waiting if w.request.id == request), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def drop(self, request: int) -> None:
        """A request whose turn had come could not begin."""
        self.withdraw(request)
        self.rows.pop(request, None)

    def begin_again(self, served: Sequence[tuple[Session, Before]]) -> None:
        """The stages are lost, and all rows with them: requests being served wait again, first."""
        again = [self.waiting_again(session, before) for session, before in served]
        self.waiting.extendleft(reversed(again))
        self.rows.clear()
        self.kept.clear()

    def forget_losses(self) -> None:
        """Of the requests that wait again; each still has to get over its beginning by itself."""
        for waiting in self.waiting:
            if waiting.before is not None:
                waiting.before.losses.forget()

    def waiting_again(self, session: Session, before: Before) -> Waiting:
        """A request being served, as it waits once its stages are lost."""
        num_rows = self.rows[session.request.id]
        return Waiting(continued(session), session.stats.submitted_at, num_rows, before)

    def take_too_large(self) -> list[Waiting]:
        """Take out of the queue what the stages that are there now could never hold."""
        if not self.max_rows:
            return []
        too_large = [w for w in self.waiting if w.num_rows > self.max_rows]
        self.waiting = deque(w for w in self.waiting if w.num_rows <= self.max_rows)
        return too_large

    def next_to_begin(self) -> Waiting | None:
        """The oldest waiting request, if it can be served now besides the others.

        Later ones wait for it even where they would fit, or a large one might never begin. Room
        may need `make_room` first.
        """
        if not self.waiting or len(self.rows) >= self.max_active:
            return None
        needed = self.waiting[0].num_rows + sum(self.rows.values())
        return None if self.max_rows and needed > self.max_rows else self.waiting[0]

    def begin(self, waiting: Waiting, config: DecodeConfig, source: str) -> Turn:
        """The oldest waiting request has its turn, with what a kept one has in common with it."""
        oldest = self.waiting.popleft()
        assert oldest is waiting, "another one waits longer"
        kept, num_cached_tokens = self.find_cached_prefix(waiting.request.prompt, config, source)
        turn = Turn(waiting, gone=self.make_room(waiting.num_rows, kept))
        if kept is not None and (number := kept.session.request.id) not in turn.gone:
            turn.kept, turn.num_cached_tokens = kept, num_cached_tokens
            if self.is_succeeded(kept, num_cached_tokens):
                turn.gone_after.append(number)
                del self.kept[number]
        self.rows[waiting.request.id] = waiting.num_rows
        return turn

    def find_cached_prefix(
        self, prompt: Sequence[int], config: DecodeConfig, source: str
    ) -> tuple[Kept | None, int]:
        """The kept request with the longest beginning in common with `prompt`, and its length.

        Only of those served under this very `config` with drafter `source`, whose session it needs.
        """
        best: Kept | None = None
        longest = 0
        for kept in self.kept.values():
            if kept.session.config is not config or kept.session.source != source:
                continue
            with self.failures.of(kept.session.request.id):
                length = kept.num_cached_tokens(prompt)
                if length > longest:
                    best, longest = kept, length
        return best, longest

    def is_succeeded(self, kept: Kept, num_cached_tokens: int) -> bool:
        """Whether a request that reuses `num_cached_tokens` of `kept` is its next turn.

        Else they only begin alike, as all prompts of one chat template do, and it stays.
        """
        return 2 * num_cached_tokens >= kept.session.num_committed

    def make_room(self, num_rows: int, spare: Kept | None) -> list[int]:
        """Give up kept requests, the oldest first and `spare` last, until `num_rows` fit.

        Returns their ids.
        """
        gone: list[int] = []
        order = [*(k for k in self.kept.values() if k is not spare), *([spare] if spare else [])]
        for kept in order:
            if not self.max_rows or self.num_rows_used + num_rows <= self.max_rows:
                break
            gone.append(kept.session.request.id)
            del self.kept[gone[-1]]
        return gone

    def keep(self, session: Session) -> list[int]:
        """A request is over and stays; returns the ids of those given up for it."""
        request = session.request.id
        self.kept[request] = Kept(session, self.rows.pop(request))
        gone = list(self.kept)[: max(0, len(self.kept) - self.max_kept)]
        for old in gone:
            del self.kept[old]
        return gone


def continued(session: Session) -> Request:
    """The rest of a request: what was generated is part of its prompt now.

    Sampling noise is keyed by absolute position, so the rest is what it would have been.
    """
    request = session.request
    return replace(
        request,
        prompt=session.all_tokens,
        max_new_tokens=request.max_new_tokens - len(session.tokens),
    )
