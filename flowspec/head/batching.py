"""What goes into the next slot: rows of one or several requests that share a forward.

A slot costs t(n), the time of the slowest stage for n rows, which is nearly flat up to a knee: rows
of other requests ride along for little. What is chosen maximises expected accepted tokens per time,
that on the line to the next stage included: a slow one makes every verdict later by as much.
Roots come first, since they are certain to be on the true path: a request whose verdict has come is
in the very next slot. So none waits longer for its next token than a trip through the pipe, and
prompts advance by a chunk in every slot, oldest request first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Protocol

from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.head.session import Session, tree_segment
from flowspec.protocol.messages import Segment
from flowspec.runtime.failures import Failures
from flowspec.speculation.strategies.base import Outgoing, Strategy
from flowspec.speculation.tree import Node

MAX_SHARED_ROWS = 128  # of best-first rows, where several requests share a slot


class Served(Protocol):
    """A request being served."""

    session: Session
    strategy: Strategy


@dataclass(slots=True)
class _Offer:
    """Rows of one request that could go now."""

    session: Session
    outgoing: Outgoing
    nodes: Sequence[Node]  # as far as the stages' caches have room


class Slots:
    """Composes slots; turns who is asked first. A request that fails is left out, and noted."""

    def __init__(
        self,
        pipe: Pipeline,
        next_prompt_piece: Callable[[Session, int], Segment | None],
        failures: Failures,
    ) -> None:
        self.pipe = pipe
        self.next_prompt_piece = next_prompt_piece
        self.failures = failures
        self._turn = 0

    def next_slot(
        self, requests: Sequence[Served], room: Callable[[Session], int]
    ) -> list[Segment]:
        """The segments to send together now; none: wait. `requests` oldest first.

        `room` says how many tree rows of a request the stages can still hold.
        """
        if self.pipe.is_full or (len(requests) > 1 and self.pipe.num_waiting):
            return []
        offers = self._offers([r for r in requests if r.session.decoding], room)
        if any(offer.outgoing.early for offer in offers):
            return []
        segments = self._prompt_pieces(requests)
        counts = best_counts(
            self.pipe.cost,
            offers_of(offers),
            num_fixed=sum(len(s.nodes) for s in segments),
            row_ms=self.pipe.link_row_ms,
            least_rate=0.5 / (self.pipe.num_stages * self.pipe.cost.milliseconds(1)),
        )
        for offer, count in zip(offers, counts, strict=True):
            if count:
                nodes = offer.nodes[:count]
                with self.failures.of(offer.session.request.id):
                    segments.append(tree_segment(offer.session, nodes, offer.outgoing.verify))
        if segments:
            self._turn += 1
        return segments

    def _prompt_pieces(self, requests: Sequence[Served]) -> list[Segment]:
        """A chunk of prompt for the slot, oldest request first; short prompts share it."""
        pieces: list[Segment] = []
        left = requests[0].session.config.chunked_prefill_size if requests else 0
        for served in requests:
            with self.failures.of(served.session.request.id):
                piece = self.next_prompt_piece(served.session, left)
                if piece is not None:
                    pieces.append(piece)
                    left -= len(piece.nodes)
        return pieces

    def _offers(self, requests: Sequence[Served], room: Callable[[Session], int]) -> list[_Offer]:
        """What each request would send; whole segments while one more would pay."""
        offers: list[_Offer] = []
        whole: list[int] = []  # rows of each segment that may not be cut
        for place in range(len(requests)):
            served = requests[(self._turn + place) % len(requests)]
            if not pays(self.pipe.cost, whole) or (left := room(served.session)) <= 0:
                continue
            with self.failures.of(served.session.request.id):
                outgoing = served.strategy.next_segment(served.session)
                if outgoing is None:
                    continue
                if not outgoing.best_first:
                    whole.append(len(outgoing.nodes))
                offers.append(_Offer(served.session, outgoing, outgoing.nodes[:left]))
        return offers


def offers_of(offers: Sequence[_Offer]) -> list[tuple[list[float], bool]]:
    """(probability of being true per row, may be cut) of each offer."""
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
    """How many rows of each offer to send: most gain per time, sum(p) / (t(rows) + rows row_ms).

    An offer is its rows' probabilities, falling, and whether it may be cut. `num_fixed` rows go
    along in any case (a piece of prompt: worth one token). `row_ms`: a row's time on the line.

    `least_rate`: guesses that bring less, in tokens per millisecond, do not go. A token that
    becomes known while they are computed comes in the middle of that on average, and waits for the
    rest; without them a trip brings one token. So they must bring half a token per trip's time.
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
    # by rank among equals: parents stay first, and roots come before guesses as sure as they
    loose = [(-p, place) for p, _, place in sorted(ranked)]
    if sum(can_cut for _, can_cut in offers) > 1:
        del loose[MAX_SHARED_ROWS:]
    best, best_rate = 0, gain / milliseconds(num_rows) if num_rows else least_rate
    for taken, (p, _) in enumerate(loose, start=1):
        gain += p
        rate = gain / milliseconds(num_rows + taken)
        if rate > best_rate:
            best, best_rate = taken, rate
    # what is certain goes in any case, or a request could wait for ever beside a large one
    certain = sum(p >= 1.0 for p, _ in loose)
    for _, place in loose[: max(best, certain)]:
        counts[place] += 1
    return counts


def pays(cost: SegmentCost, whole: Sequence[int]) -> bool:
    """Whether one more segment like the last would raise the gain per time of a slot of these."""
    if not whole:
        return True
    num_rows, count = sum(whole), len(whole)
    together = cost.milliseconds(num_rows + whole[-1])
    return together * count < cost.milliseconds(num_rows) * (count + 1)
