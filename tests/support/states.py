"""Requests as the head has them while they run, without a head."""

from flowspec.head.pipeline import Pipeline
from flowspec.head.request_state import RequestState, RequestStatus
from flowspec.request import NodeId, Request
from flowspec.speculation.drafters.base import DraftSession, NoDraftSession
from flowspec.speculation.strategy import ResolvedDecoding, StrategyConfig
from flowspec.tokenizer import TextStream


def running_state(
    request: Request,
    config: StrategyConfig,
    pipe: Pipeline,
    *,
    drafter: DraftSession | None = None,
    max_new_tokens: int | None = None,
    vocab_size: int = 0,
) -> RequestState:
    """A request whose prefix is sent; its tree has no root yet."""
    state = RequestState(
        request=request,
        decoding=ResolvedDecoding("streaming", config, "scripted"),
        text=TextStream(None),
        pipe=pipe,
        max_new_tokens=max_new_tokens or request.max_new_tokens,
        vocab_size=vocab_size,
    )
    state.drafter = drafter or NoDraftSession()
    state.prefix = request.prompt_tokens
    state.status = RequestStatus.RUNNING
    return state


def decoding_state(
    config: StrategyConfig, *, context: int = 1000, num_stages: int = 3
) -> RequestState:
    """A request that has just planted its root at position 5."""
    asked = Request(id=1, prompt=(1, 2, 3, 4, 5), max_new_tokens=context - 5)
    state = running_state(asked, config, Pipeline(num_stages))
    state.tree.plant(NodeId(-1), 7, 5)
    return state
