"""FlowSpec: pipeline-parallel speculative decoding for clusters of weak machines, lossless."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Decoding", "RequestOutput", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from flowspec.llm import LLM
    from flowspec.request import Decoding, RequestOutput, SamplingParams

_HOMES = {
    "LLM": "flowspec.llm",
    "Decoding": "flowspec.request",
    "RequestOutput": "flowspec.request",
    "SamplingParams": "flowspec.request",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and few need it all."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
