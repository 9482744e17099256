"""What a strategy is: its configuration, the segment it offers, the decisions it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowspec.speculation.tree import Node

MAX_ROWS = 1024  # of a segment, a tree, a drafter forward

Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]


class StrategyConfig(BaseModel):
    """The parameters of a strategy. This base has none: `ar` takes no parameter."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DraftingConfig(StrategyConfig):
    """What every strategy with a draft tree takes; none of it changes the text."""

    num_draft_tokens: Rows = 60  # nodes below the root, kept or drafted per round
    draft_topk: Rows = 10  # children proposed per node; nodes of a round's beam
    coupled_drafting: bool = False  # rank drafts by the target's own noise
    refresh: bool = True  # score the root's children again when its true hidden state arrives
    merge: bool = False  # add n-gram branches from the text so far to the drafter's tree
    min_score: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.002  # least path probability of a row
    calibrate: bool = False  # correct path scores by the outcomes of earlier verdicts


class RoundConfig(DraftingConfig):
    """A strategy that drafts a tree level by level, round by round, takes its depth as well."""

    num_draft_steps: Rows = 6  # levels below the root that one draft grows

    @model_validator(mode="after")
    def _check_beam(self) -> "RoundConfig":
        if self.draft_topk * self.num_draft_steps > MAX_ROWS:
            raise ValueError(
                f"draft_topk x num_draft_steps is {self.draft_topk * self.num_draft_steps}, at "
                f"most {MAX_ROWS}"
            )
        return self


class SegmentedRoundConfig(RoundConfig):
    """A strategy that cuts the round's tree into segments takes their least size as well."""

    segment_size: Rows = 16  # least number of tree rows in a segment


@dataclass(frozen=True, slots=True)
class ResolvedDecoding:
    """How one request is decoded: a strategy by name with its parameters, a drafter by name.

    Requests with equal ones learn together and may reuse one another's work.
    """

    strategy: str
    config: StrategyConfig
    drafter: str  # "none" where the strategy drafts nothing

    @property
    def merges(self) -> bool:
        """Whether n-gram branches are merged into the drafter's tree."""
        return isinstance(self.config, DraftingConfig) and self.config.merge

    @property
    def drafting(self) -> DraftingConfig:
        """The parameters of a strategy that drafts."""
        assert isinstance(self.config, DraftingConfig), f"{self.strategy} drafts nothing"
        return self.config


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Nodes to send as one segment, parents first; without `verify` the verdict waits."""

    nodes: Sequence[Node]
    verify: bool = True
    best_first: bool = False  # the scheduler may send only the first of them and ask again
    early: bool = False  # best first, and drafting on before the slot comes would choose better


State_contra = TypeVar("State_contra", contravariant=True)


class Strategy(Protocol[State_contra]):
    """One per request. Both decisions are asked for whenever something has changed."""

    def next_segment(self, request: State_contra) -> Outgoing | None:
        """What to send now, or nothing yet."""

    def next_draft(self, request: State_contra) -> Sequence[Node]:
        """Nodes to expand in one drafter forward now, or none.

        True rows that are due run in the same forward; a strategy that wants to know them first
        waits.
        """

    def on_verdict(self, request: State_contra) -> None:
        """The tree has a new root; `request.last_was_hit`: its token was in the tree."""
