"""Pipelines without one of their mechanisms, to show what it is worth; for benchmarks only.

Here and not in the stages: a real one has no such choice to make. What is taken away is really
gone, and what takes its place is really computed, sent and charged, by the same cores in another
arrangement.
"""

from collections.abc import Sequence
from dataclasses import replace

from flowspec.effects import Core
from flowspec.head import Head
from flowspec.model.kv_cache import TreeKVCache
from flowspec.stage import MAX_TREE_ROWS, Stage
from flowspec.stage_forward import Part
from flowspec.stage_request import StageRequest
from flowspec.strategies import Without
from flowspec.wire import Open, Segment


def arrange(head: Head, stages: Sequence[Stage]) -> tuple[Core, list[Stage]]:
    """What takes the head's and the stages' places under the head's strategy."""
    if head.spec.without is Without.PRUNING:
        return head, [_unpruned(stage) for stage in stages]
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

    def _new_cache(self, message: Open, before: StageRequest | None) -> TreeKVCache:
        """With room for the dead, whom the head does not count."""
        return super()._new_cache(
            replace(message, capacity=message.capacity + MAX_TREE_ROWS), before
        )


def _unpruned(stage: Stage) -> Stage:
    return UnprunedStage(stage.rank, stage.num_stages, stage.model, shape_stable=stage.shape_stable)
