"""A client's request while the head serves it, and what the client is told at its end."""

import logging
from dataclasses import dataclass, field, replace

from flowspec.admission import TooLargeError
from flowspec.cluster.measured import figures_of
from flowspec.cluster.messages import Done
from flowspec.cluster.stage_watch import StageWatch
from flowspec.request import ClusterError, Completion, Request, cause_of, error_of, rank_name
from flowspec.text import PromptError

log = logging.getLogger(__name__)
MAX_ERROR = 4000  # characters that a client is told


@dataclass(slots=True)
class OpenRequest:
    """One that is being served."""

    ticket: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    num_resumed: int = 0
    first_epoch: int = 0  # in which it came; 0: between two
    watch: StageWatch | None = None  # of one that is measured
    is_fresh: bool = False  # the first one under a strategy just put in force


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured request that is over; its figures wait for the stages' last word, not for long."""

    entry: OpenRequest
    completion: Completion
    watch: StageWatch
    until: float

    def is_settled(self, now: float) -> bool:
        """Whether nothing more is waited for."""
        return self.watch.is_settled or now >= self.until

    def done(self, epoch: int, *, live: bool) -> Done:
        """Its end with figures; the stages' own only where they are there."""
        stats, watch = self.completion.stats, self.watch
        figures = figures_of(
            replace(stats, num_resumes=max(stats.num_resumes, int(watch.was_late))),
            epoch=epoch,
            first_epoch=self.entry.first_epoch,
            alone=watch.alone,
            fresh=self.entry.is_fresh,
            stages=watch.figures() if live else None,
        )
        return done_of(self.entry, self.completion).model_copy(update={"figures": figures})


def done_of(entry: OpenRequest, completion: Completion) -> Done:
    """The end of a request; `id` is left to whoever knows the client."""
    stats = completion.stats
    return Done(
        id=0,
        reason=completion.reason.value,
        error=plain(completion.error),
        refused=bool(completion.error) and not isinstance(error_of(completion.error), ClusterError),
        num_tokens=len(completion.tokens),
        tokens_per_s=stats.tokens_per_s,
        time_to_first_token_s=stats.time_to_first_token_s,
        tau=stats.mean_accepted_length,
        resumed=entry.num_resumed,
        prompt_tokens=len(entry.request.prompt),
    )


def refused(error: Exception, num_prompt: int) -> Done:
    """The end of a request that could not begin: a ValueError says what is wrong with it."""
    if not isinstance(error, ValueError):
        log.warning("a request cannot begin: %s", cause_of(error), exc_info=error)
        return failed(error, num_prompt)
    return Done(
        id=0,
        reason="error",
        error=plain(str(error)),
        prompt_tokens=num_prompt,
        too_large=isinstance(error, TooLargeError),
        refused=True,
        bad_prompt=isinstance(error, PromptError),
    )


def failed(error: Exception, num_prompt: int = 0) -> Done:
    """The end of a request at which the head itself has failed."""
    text = plain(f"{rank_name(0)}: {cause_of(error)}")
    return Done(id=0, reason="error", error=text, prompt_tokens=num_prompt)


def plain(text: str) -> str:
    """As a control message may hold it."""
    return text[:MAX_ERROR].encode(errors="replace").decode()
