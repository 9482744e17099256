"""Drafting for every request being served: what the next drafter forward works on."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from flowspec.head.batching import Served
from flowspec.head.pipeline import Pipeline
from flowspec.head.session import Session
from flowspec.runtime.core import Send, Work
from flowspec.runtime.failures import Failures, attempt
from flowspec.speculation.drafters.base import Draft, Drafter, DraftJob, Proposed

Share = tuple[Session, DraftJob, int]  # and how many rows it will compute


def next_drafts(requests: Iterable[Served], failures: Failures) -> list[Share]:
    """Each request's share of the next forward: true rows, and what its strategy wants."""
    jobs = []
    for served in requests:
        session = served.session
        with failures.of(session.request.id):
            absorbs = session.drafter.num_rows_ready > 0
            nodes = served.strategy.next_draft(session) if session.decoding else ()
            if absorbs or nodes:
                job = DraftJob(session.drafter, session.tree, nodes, absorbs)
                jobs.append((session, job, job.num_rows))
    return jobs


def draft_work(
    drafter: Drafter,
    pipe: Pipeline,
    shares: Sequence[Share],
    failures: Failures,
    after: Callable[[float], Sequence[Send]],
) -> Work | None:
    """One drafter forward for all of `shares`; messages are served while it runs.

    A drafter says which job an exception belongs to (see Draft.finish); one that raises fails all
    of them. `after` gives what follows once failures are noted. None where it could not begin.
    """
    everybody = [session.request.id for session, _, _ in shares]
    begun = attempt(partial(drafter.begin, [job for _, job, _ in shares]))
    if isinstance(begun, Exception):
        failures.add(begun, *everybody)
        return None
    draft = begun
    num_rows = sum(rows for _, _, rows in shares)
    decoding = [session for session, _, _ in shares if session.decoding]
    pipe.draft_began_at = pipe.now
    ran: list[Exception | None] = []

    def finish(now: float, elapsed: float) -> Sequence[Send]:
        pipe.draft_began_at = None
        if num_rows:  # else all was known, and nothing ran
            pipe.count_draft(elapsed)
            for session in decoding:
                session.stats.draft_s += elapsed
        proposed = _proposed(draft, ran, len(shares))
        for (session, job, rows), own in zip(shares, proposed, strict=True):
            session.stats.num_draft_forwards += rows > 0
            if isinstance(own, Exception):
                failures.add(own, session.request.id)
            elif not session.over:
                with failures.of(session.request.id):
                    session.take_proposals(own, expanded={node.id for node in job.nodes})
        return after(now)

    context = max(len(s.request.prompt) + len(s.tokens) for s, _, _ in shares)
    about: dict[str, object] = {"requests": everybody}
    if len(shares) == 1:  # ids of nodes mean something within one request alone
        about["nodes"] = [node.id for node in shares[0][1].nodes]
    return Work(
        kind="draft",
        rows=num_rows,
        context=context,
        run=lambda: ran.append(attempt(draft.run)),
        finish=finish,
        about=about,
        beside=True,
        done=draft.looked_up,
    )


def _proposed(draft: Draft, ran: Sequence[Exception | None], count: int) -> Sequence[Proposed]:
    """What each of `count` jobs has come to; the same exception for all where nobody knows whose
    it was.
    """
    failed = next((error for error in ran if error is not None), None)
    proposed = attempt(draft.finish) if failed is None else failed
    return [proposed] * count if isinstance(proposed, Exception) else proposed
