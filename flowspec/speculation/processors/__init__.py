"""The table of logits processors, in the order in which they apply.

A new processor takes one file here, one row in the table, and a field of SamplingParams.
"""

from collections.abc import Sequence

from torch import Tensor

from flowspec.request import SamplingParams
from flowspec.speculation.processors.base import LogitsFilter, PathProcessor, PathState, StateChain
from flowspec.speculation.processors.filters import MIN_P, TEMPERATURE, TOP_K, TOP_P

PROCESSORS: dict[str, LogitsFilter | PathProcessor] = {
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "top_p": TOP_P,
    "min_p": MIN_P,
}


def begin_path(
    sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int] = ()
) -> PathState | None:
    """Return the state after prompt and answer; None if no processor needs one."""
    states = [
        row.begin(sampling, prompt)
        for row in PROCESSORS.values()
        if isinstance(row, PathProcessor) and row.applies(sampling)
    ]
    if not states:
        return None
    state: PathState = states[0] if len(states) == 1 else StateChain(tuple(states))
    for token in answer:
        state = state.fork(token)
    return state


def warp(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Divide logits [n, V] by the temperature and set filtered tokens to -inf.

    The filters apply in the order of the table. The temperature must be above 0, since greedy
    decoding needs no distribution. Returns logits [n, V].
    """
    assert sampling.temperature > 0.0, "greedy decoding takes the arg-max of the raw logits"
    for row in PROCESSORS.values():
        if isinstance(row, LogitsFilter) and row.applies(sampling):
            logits = row.apply(logits, sampling)
    return logits
