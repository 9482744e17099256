"""Drafting: one drafter forward for all running requests of a drafter."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from flowspec.head.pipeline import Pipeline
from flowspec.head.request_state import RequestState
from flowspec.runtime.core import Send, Work
from flowspec.runtime.failures import Failures, attempt
from flowspec.speculation.drafters.base import Draft, Drafter, DraftJob, Proposed
from flowspec.speculation.strategy import ResolvedDecoding


@dataclass(frozen=True, slots=True)
class DraftShare:
    """One request's share of a drafter forward, with the number of rows that it computes."""

    request: RequestState
    job: DraftJob
    num_rows: int

    @property
    def is_current(self) -> bool:
        """Whether the request still runs as it did when the forward began."""
        return self.request.is_running and self.request.drafter is self.job.session


def next_shares(requests: Iterable[RequestState], failures: Failures) -> list[DraftShare]:
    """Return each request's share of its drafter's next forward: true rows and nodes to expand."""
    shares = []
    for request in requests:
        with failures.of(request.id):
            assert request.strategy is not None, "a running request has a strategy"
            prefills = request.drafter.num_rows_ready > 0
            nodes = request.strategy.next_draft(request) if request.is_decoding else ()
            if prefills or nodes:
                job = DraftJob(request.drafter, request.tree, nodes, prefills)
                shares.append(DraftShare(request, job, job.num_rows))
    return shares


def of_one_drafter(shares: Sequence[DraftShare], last: str) -> list[DraftShare]:
    """Return the shares that one forward can compute, of another drafter than `last` if possible.

    So drafters take turns if several have something to draft.
    """

    def key(decoding: ResolvedDecoding) -> tuple[str, bool]:
        return decoding.drafter, decoding.merges

    others = [share for share in shares if share.request.decoding.drafter != last]
    first = (others or list(shares))[0].request.decoding
    return [share for share in shares if key(share.request.decoding) == key(first)]


def draft_work(
    drafter: Drafter,
    pipe: Pipeline,
    shares: Sequence[DraftShare],
    failures: Failures,
    after: Callable[[float], Sequence[Send]],
) -> Work | None:
    """Run one forward of `drafter` for all `shares`; messages are served meanwhile.

    The drafter says which job an exception belongs to (`Draft.finish`); an exception of the drafter
    itself fails all of them. `after` gives what follows once failures are noted. Returns None if
    the forward could not begin.
    """
    ids = [share.request.id for share in shares]
    begun = attempt(partial(drafter.begin, [share.job for share in shares]))
    if isinstance(begun, Exception):
        failures.add(begun, *ids)
        return None
    draft = begun
    num_rows = sum(share.num_rows for share in shares)
    decoding = [share.request for share in shares if share.request.is_decoding]
    pipe.begin_draft(shares[0].request.decoding.drafter)
    ran: list[Exception | None] = []

    def finish(now: float, elapsed: float) -> Sequence[Send]:
        pipe.end_draft()
        if num_rows:  # otherwise everything was known, and nothing ran
            pipe.count_draft(elapsed)
            for request in decoding:
                request.stats.draft_s += elapsed
        proposed = _proposed(draft, ran, len(shares))
        for share, own in zip(shares, proposed, strict=True):
            request = share.request
            request.stats.num_draft_forwards += share.num_rows > 0
            if isinstance(own, Exception):
                failures.add(own, request.id)
            elif share.is_current:
                with failures.of(request.id):
                    expanded = {node.id for node in share.job.nodes}
                    request.take_proposals(own, expanded=expanded)
        return after(now)

    about: dict[str, object] = {"requests": ids}
    if len(shares) == 1:  # node ids have a meaning within one request only
        about["nodes"] = [node.id for node in shares[0].job.nodes]
    return Work(
        kind="draft",
        rows=num_rows,
        context=max(len(share.request.all_tokens) for share in shares),
        run=lambda: ran.append(attempt(draft.run)),
        finish=finish,
        about=about,
        beside=True,
        done=draft.looked_up,
    )


def _proposed(draft: Draft, ran: Sequence[Exception | None], count: int) -> Sequence[Proposed]:
    """Return the result of each of `count` jobs.

    All jobs get the same exception if it cannot be attributed to one of them.
    """
    failed = next((error for error in ran if error is not None), None)
    proposed = attempt(draft.finish) if failed is None else failed
    return [proposed] * count if isinstance(proposed, Exception) else proposed
