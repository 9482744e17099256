"""Pipelines without one of their mechanisms, to show what it is worth; for benchmarks only.

Here and not in the stages: a real one has no such choice to make. What is taken away is really
gone, and what takes its place is really computed, sent and charged, by the same cores in another
arrangement.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flowspec.head.head import Head
from flowspec.model.backend import StageBackend, StageCache
from flowspec.model.stage_model import StageModel
from flowspec.protocol.messages import DATA, EVERY_STAGE, HEAD, AddRequest, Message, Segment
from flowspec.runtime.core import Core, Send, Step
from flowspec.speculation.strategies import Without
from flowspec.stage.executor import Part
from flowspec.stage.stage import MAX_TREE_ROWS, Stage
from flowspec.stage.stage_request_state import StageRequestState


def arrange(head: Head, stages: Sequence[Stage]) -> tuple[Core, list[Stage]]:
    """What takes the head's and the stages' places under the head's strategy."""
    if head.spec.without is Without.PRUNING:
        return head, [_like(stage, UnprunedStage, stage.model) for stage in stages]
    if head.spec.without is Without.LAST_STAGE_VERDICT:
        *first, last = stages
        assert isinstance(last.model, StageModel), "only the torch backend can be taken apart"
        layers, end = _apart(last.model)
        # a last stage without layers, at the head's rank
        decider = Stage(HEAD, HEAD, end, shape_stable=last.shape_stable)
        return DecidingHead(head, decider), [*first, _like(last, LayersAlone, layers)]
    return head, list(stages)


class UnprunedStage(Stage):
    """Computes and hands on every row it is given, also those it knows to be dead.

    A dead row stands beside the living ones until the next verdict clears the cache. Where its
    parent is gone it sees the committed path in that one's stead: what it says is never asked for.
    """

    def _admit(self, segment: Segment) -> Part:
        """All rows, unless the request is over and with it the cache to compute them in."""
        state = self.requests.get(segment.request)
        return Part(state, segment) if state is not None else super()._admit(segment)

    def _new_cache(self, message: AddRequest, before: StageRequestState | None) -> StageCache:
        """With room for the dead, whom the head does not count."""
        return super()._new_cache(
            replace(message, capacity=message.capacity + MAX_TREE_ROWS), before
        )


class LayersAlone(Stage):
    """A last stage that decides nothing: the hidden states of its rows go to the head."""

    @property
    def is_last(self) -> bool:
        """No verdicts here."""
        return False

    @property
    def next_rank(self) -> int:
        """See Stage."""
        return HEAD


class DecidingHead:
    """A head that makes the verdicts: `end` has the final norm, lm_head and sampler.

    Its device does one thing at a time. What came from the last stage waits for a drafter forward
    that runs and goes before the next one; while the lm_head runs, the head does nothing else. Head
    and `end` hand over to one another at no cost, and where no trace sees it.
    """

    rank = HEAD

    def __init__(self, head: Head, end: Stage) -> None:
        self.head = head
        self.end = end

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """What comes down the pipe is for the end of the model, the rest for the head."""
        core = self.end if isinstance(message, DATA) else self.head
        return self._outward(core.handle(message, now), now)

    def poll(self, now: float) -> Step | None:
        """Verdicts first, once the device is free."""
        step = None
        if self.head.pipe.draft_began_at is None:
            step = self.end.poll(now)
        step = step or self.head.poll(now)
        if step is None:
            return None
        work = step.work
        if work is not None:
            finish = work.finish
            work = replace(
                work, finish=lambda now, elapsed: self._outward(finish(now, elapsed), now)
            )
        return Step(sends=self._outward(step.sends, now), work=work)

    def _outward(self, sends: Sequence[Send], now: float) -> list[Send]:
        """What leaves this device; what is for one of its halves is handed over here."""
        out: list[Send] = []
        for send in sends:
            if send.to == HEAD:
                out += self._outward(self.head.handle(send.message, now), now)
                continue
            out.append(send)
            if send.to == EVERY_STAGE:
                out += self._outward(self.end.handle(send.message, now), now)
        return out


def _like(stage: Stage, kind: type[Stage], model: StageBackend[Any]) -> Stage:
    return kind(stage.rank, stage.num_stages, model, shape_stable=stage.shape_stable)


def _apart(model: StageModel) -> tuple[StageModel, StageModel]:
    """A last stage's layers, and its final norm with the lm_head, over the same weights."""
    config, first, last = model.config, model.first_layer, model.last_layer
    with torch.device("meta"):
        layers = StageModel(
            config, first_layer=first, last_layer=last, with_embedding=first == 0, with_head=False
        )
        end = StageModel(
            config, first_layer=last, last_layer=last, with_embedding=False, with_head=True
        )
    weights = model.state_dict()
    for part in (layers, end):
        part.load_state_dict({name: weights[name] for name in part.state_dict()}, assign=True)
        part.requires_grad_(False)
    return layers, end
