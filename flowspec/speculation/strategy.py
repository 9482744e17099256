"""The seam of a strategy: its configuration, the segments it offers and the decisions it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowspec.speculation.tree import Node

MAX_ROWS = 1024  # limit of a segment, a tree and a drafter forward

Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]


class StrategyConfig(BaseModel):
    """The parameters of a strategy. This base has none, for `ar`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DraftingConfig(StrategyConfig):
    """The parameters of every strategy with a draft tree; none of them changes the text."""

    num_draft_tokens: Rows = 60  # nodes below the root, kept or drafted per round
    draft_topk: Rows = 10  # children proposed per node; nodes of a round's beam
    coupled_drafting: bool = False  # rank drafts by the target's own noise
    refresh: bool = True  # score the root's children again when its true hidden state arrives
    merge: bool = False  # add n-gram branches from the text so far to the drafter's tree
    min_score: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.002  # least path probability of a row
    calibrate: bool = False  # correct path scores by the outcomes of earlier verdicts


class RoundConfig(DraftingConfig):
    """Adds the depth, for strategies that draft a tree level by level, round by round."""

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
    """Adds the least segment size, for strategies that cut a round's tree into segments."""

    segment_size: Rows = 16  # least number of tree rows in a segment


@dataclass(frozen=True, slots=True)
class ResolvedDecoding:
    """The decoding of one request: a strategy with its parameters and a drafter, by name.

    Requests with equal decoding learn together and may reuse one another's work.
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
    best_first: bool = False  # the scheduler may send only the first ones and ask again
    early: bool = False  # best first, but a choice closer to the slot would be better


State_contra = TypeVar("State_contra", contravariant=True)


class Strategy(Protocol[State_contra]):
    """Decides for one request. Both decisions are asked for whenever something has changed."""

    def next_segment(self, request: State_contra) -> Outgoing | None:
        """Return the nodes to send now, or None."""

    def next_draft(self, request: State_contra) -> Sequence[Node]:
        """Return the nodes to expand in one drafter forward now, or none.

        True rows that are due run in the same forward; a strategy that needs their results first
        waits.
        """

    def on_verdict(self, request: State_contra) -> None:
        """Note that the tree has a new root; `request.last_was_hit`: its token was in the tree."""
