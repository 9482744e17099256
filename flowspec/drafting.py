"""Drafting for every request being served: what the next drafter forward works on."""

from collections.abc import Iterable, Sequence

from flowspec.batching import Served
from flowspec.drafters.base import Drafter, DraftJob
from flowspec.effects import Send, Work
from flowspec.pipe import Pipe
from flowspec.session import Session

Share = tuple[Session, DraftJob]


def next_drafts(requests: Iterable[Served]) -> list[Share]:
    """Each request's share of the next forward: true rows, and what its strategy wants."""
    jobs = []
    for served in requests:
        session = served.session
        absorbs = session.drafter.num_rows_ready > 0
        nodes = served.strategy.next_draft(session) if session.decoding else ()
        if absorbs or nodes:
            jobs.append((session, DraftJob(session.drafter, session.tree, nodes, absorbs)))
    return jobs


def draft_work(drafter: Drafter, pipe: Pipe, shares: Sequence[Share]) -> Work:
    """One drafter forward for all of `shares`; messages are served while it runs."""
    num_rows = [job.num_rows for _, job in shares]
    begun = drafter.begin([job for _, job in shares])
    decoding = [session for session, _ in shares if session.decoding]
    pipe.draft_began_at = pipe.now

    def finish(now: float, elapsed: float) -> Sequence[Send]:
        del now
        pipe.draft_began_at = None
        proposed = begun.finish()
        if sum(num_rows):  # else all was known, and nothing ran
            pipe.count_draft(elapsed)
            for session in decoding:
                session.stats.draft_s += elapsed
        for (session, job), proposals, rows in zip(shares, proposed, num_rows, strict=True):
            session.stats.num_draft_forwards += rows > 0
            if not session.over:
                session.take_proposals(proposals, expanded={node.id for node in job.nodes})
        return ()

    context = max(len(s.request.prompt) + len(s.tokens) for s, _ in shares)
    about: dict[str, object] = {"requests": [session.request.id for session, _ in shares]}
    if len(shares) == 1:  # ids of nodes mean something within one request alone
        about["nodes"] = [node.id for node in shares[0][1].nodes]
    return Work(
        kind="draft",
        rows=sum(num_rows),
        context=context,
        run=begun.run,
        finish=finish,
        about=about,
        beside=True,
        done=begun.looked_up,
    )
