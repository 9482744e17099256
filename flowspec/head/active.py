"""Active: a request being served, from its opening on the stages to its end."""

from dataclasses import dataclass, field

from flowspec.config import DecodeConfig
from flowspec.head.admission import Before, Losses, Turn
from flowspec.head.calibration import Calibration, Forecasts
from flowspec.head.pipeline import Pipeline
from flowspec.head.session import Session, new_segment
from flowspec.protocol.messages import AddRequest, Segment
from flowspec.request import DecodeStats, NodeId
from flowspec.speculation.drafters.base import Drafter, Opening
from flowspec.speculation.strategies.base import Strategy
from flowspec.tokenizer import TextStream

MIN_ROWS_ALIVE = 256
CLEARED_AFTER = 2  # verdicts since it began: the loss of a stage before was not its doing
FORGOTTEN_AFTER_S = 60.0  # of service without a loss: nor were those before


@dataclass(slots=True)
class Active:
    """A request being served."""

    session: Session
    strategy: Strategy
    text: TextStream
    lost_at: float | None = None  # when its stages were lost, until its next token
    losses: Losses = field(default_factory=Losses)  # of stages, while it was served
    num_verdicts: int = 0  # since it began, or began again
    served_since: float = 0.0  # when the first of them came

    def count_verdict(self, now: float) -> None:
        """A verdict has come: with the second, stages have also computed rows of its tree."""
        self.num_verdicts += 1
        if self.num_verdicts == 1:
            self.served_since = now
        if self.num_verdicts >= CLEARED_AFTER:
            self.losses.clear()
        if now - self.served_since >= FORGOTTEN_AFTER_S:
            self.losses.forget()

    def count_loss(self, *, alone: bool) -> None:
        """A stage is lost, and may be by its doing."""
        self.losses.add(alone=alone, early=self.num_verdicts < CLEARED_AFTER)

    def end_outage(self, now: float) -> None:
        """A token has come, or the request is over."""
        if self.lost_at is not None:
            count_outage(self.session.stats, now - self.lost_at)
        self.lost_at = None

    def put_aside(self, now: float) -> Before:
        """Its stages are lost; what it had reached is not."""
        lost_at = now if self.lost_at is None else self.lost_at
        return Before(self.session.stats, self.text, lost_at, self.losses)


def count_outage(stats: DecodeStats, elapsed: float) -> None:
    """Before the first token it is a part of the time to it."""
    if stats.num_tokens:
        stats.resume_s += elapsed


def max_rows_alive(config: DecodeConfig) -> int:
    """Most tree rows of one request that a stage's cache must hold at once."""
    return max(MIN_ROWS_ALIVE, config.tree_size + 1)


def room(session: Session) -> int:
    """How many more tree rows of the request the stages' caches can hold."""
    return max_rows_alive(session.config) - session.tree.num_sent


def open_session(
    turn: Turn,
    config: DecodeConfig,
    pipe: Pipeline,
    drafter: Drafter,
    calibration: Calibration,
    *,
    vocab_size: int = 0,
) -> Session:
    """A request's session as it begins, or begins again: then its statistics go on."""
    request, before, num_cached_tokens = (
        turn.waiting.request,
        turn.waiting.before,
        turn.num_cached_tokens,
    )
    if before is not None:
        stats = before.stats
        stats.num_resumes += 1
    else:
        stats = DecodeStats(
            submitted_at=turn.waiting.submitted_at, num_prompt_reused=num_cached_tokens
        )
    session = Session(
        request=request,
        config=config,
        pipe=pipe,
        stats=stats,
        drafter=drafter.open(
            Opening(
                request=request,
                topk=config.topk,
                coupled=config.coupled_drafting,
                reuse=turn.kept.session.drafter if turn.kept is not None else None,
                num_cached_tokens=num_cached_tokens,
            )
        ),
        source=drafter.name,
        num_aux_hidden_state_layers=len(drafter.aux_hidden_state_layers),
        num_prompt_sent=num_cached_tokens,
        context=len(request.prompt) + request.max_new_tokens,
        vocab_size=vocab_size,
    )
    if config.calibrate:
        sampled = request.sampling.temperature > 0.0
        session.forecasts = Forecasts(calibration, drafter.name, sampled=sampled)
    session.begin(num_cached_tokens)
    return session


def open_message(
    turn: Turn, session: Session, aux_hidden_state_layers: tuple[int, ...]
) -> AddRequest:
    """What makes room for the request on the stages."""
    return AddRequest(
        epoch=session.pipe.epoch,
        request=session.request.id,
        capacity=turn.waiting.num_rows,
        context=session.context,
        sampling=session.request.sampling,
        aux_hidden_state_layers=aux_hidden_state_layers,
        reuse=turn.kept.session.request.id if turn.kept is not None else 0,
        num_cached_tokens=turn.num_cached_tokens,
        # what was generated before a stage was lost is part of this session's prompt
        num_prompt_tokens=len(session.request.prompt) - session.stats.num_tokens,
    )


def next_prompt_piece(session: Session, most: int) -> Segment | None:
    """Up to `most` tokens of the prompt; stages work on different pieces at the same time."""
    prompt, start = session.request.prompt, session.num_prompt_sent
    end = min(start + most, len(prompt))
    if start == end:
        return None
    session.num_prompt_sent = end
    return new_segment(
        session,
        nodes=tuple(NodeId(i) for i in range(start, end)),
        parents=tuple(NodeId(i - 1) for i in range(start, end)),
        tokens=prompt[start:end],
        prefix=True,
        verify=end == len(prompt),
    )
