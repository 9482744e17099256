"""The drafters by name. Adding one: one file here, one row in the table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowspec.drafters.base import Drafter, NoDrafter
from flowspec.drafters.eagle import EagleDrafter
from flowspec.drafters.ngram import NgramDrafter
from flowspec.model.load import HeadPart
from flowspec.model.load_eagle import load_eagle


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """What a drafter is loaded from."""

    folder: Path  # of the draft model
    target: HeadPart
    target_folder: Path  # with the target's tokenizer
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """How a drafter is loaded; `bundled` is the project's own draft model, "" if it needs none."""

    load: Callable[[DraftSource], Drafter]
    bundled: str
    about: str


def _load_eagle(source: DraftSource) -> Drafter:
    net = load_eagle(
        source.folder,
        target_config=source.target.config,
        embedding=source.target.embed_tokens,
        device=source.device,
        dtype=source.dtype,
    )
    return EagleDrafter(net, source.target.lm_head)


DRAFTERS: dict[str, DrafterSpec] = {
    "ngram": DrafterSpec(lambda source: NgramDrafter(), "", "the text so far, no model"),
    "eagle": DrafterSpec(_load_eagle, "models/demo/eagle", "EAGLE-1/2 head"),
    "none": DrafterSpec(lambda source: NoDrafter(), "", "drafts nothing, for ar"),
}


def find_drafter(name: str) -> DrafterSpec:
    """The row of the table. Raises ValueError listing the known names."""
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!r}; known: {', '.join(DRAFTERS)}")
    return DRAFTERS[name]
