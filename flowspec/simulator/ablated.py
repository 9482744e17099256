"""Pipelines that lack one mechanism, to measure its worth; for benchmarks only.

This code is kept out of the stages, because a real stage never has this choice. The mechanism is
really removed; its replacement is really computed, sent and charged, by the same cores in another
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
from flowspec.speculation.strategies import Without, find_strategy
from flowspec.stage.executor import Part
from flowspec.stage.stage import MAX_TREE_ROWS, Stage
from flowspec.stage.stage_request_state import StageRequestState


def arrange(head: Head, stages: Sequence[Stage]) -> tuple[Core, list[Stage]]:
    """What takes the head's and the stages' places under the head's strategy."""
    without = find_strategy(head.decoding.strategy).without
    if without is Without.PRUNING:
        return head, [_like(stage, UnprunedStage, stage.model) for stage in stages]
    if without is Without.LAST_STAGE_VERDICT:
        *first, last = stages
        assert isinstance(last.model, StageModel), "only the torch backend can be taken apart"
        layers, end = _apart(last.model)
        # a last stage without layers, at the head's rank
        decider = Stage(HEAD, HEAD, end, batch_invariant=last.batch_invariant)
        return DecidingHead(head, decider), [*first, _like(last, LayersAlone, layers)]
    return head, list(stages)


class UnprunedStage(Stage):
    """Computes and sends on every row that it is given, including dead ones.

    A dead row stays beside the living ones until the next verdict clears the cache. If its parent
    is gone, it sees the committed path instead: nobody uses its output.
    """

    def _admit(self, segment: Segment) -> Part:
        """Admit all rows, unless the request has ended and its cache is gone."""
        state = self.requests.get(segment.request)
        return Part(state, segment) if state is not None else super()._admit(segment)

    def _new_cache(self, message: AddRequest, before: StageRequestState | None) -> StageCache:
        """Make a cache with room for the dead rows, which the head does not count."""
        return super()._new_cache(
            replace(message, capacity=message.capacity + MAX_TREE_ROWS), before
        )


class LayersAlone(Stage):
    """A last stage without the decision: it sends the hidden states of its rows to the head."""

    @property
    def is_last(self) -> bool:
        """False: this stage makes no verdicts."""
        return False

    @property
    def next_rank(self) -> int:
        """Return the head's rank."""
        return HEAD


class DecidingHead:
    """A head that makes the verdicts: `end` has the final norm, lm_head and sampler.

    Its device does one thing at a time. A message from the last stage waits for a running drafter
    forward and is served before the next one; while the lm_head runs, the head does nothing else.
    Messages between head and `end` cost nothing and do not appear in traces.
    """

    rank = HEAD

    def __init__(self, head: Head, end: Stage) -> None:
        self.head = head
        self.end = end

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Pass data messages to the end of the model, all others to the head."""
        core = self.end if isinstance(message, DATA) else self.head
        return self._outward(core.handle(message, now), now)

    def poll(self, now: float) -> Step | None:
        """Return the next step: verdicts first, once the device is free."""
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
        """Return the sends that leave this device; deliver those between its halves here."""
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
    return kind(stage.rank, stage.num_stages, model, batch_invariant=stage.batch_invariant)


def _apart(model: StageModel) -> tuple[StageModel, StageModel]:
    """Split a last stage into its layers and its final norm with the lm_head, sharing weights."""
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
