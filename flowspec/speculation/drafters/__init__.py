"""The table of drafters. A new drafter takes one file here and one row in the table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flowspec.config import new_name
from flowspec.speculation.drafters.base import Drafter, NoDrafter
from flowspec.speculation.drafters.checkpoint.kind import refuse_head
from flowspec.speculation.drafters.draft_model import DraftModelDrafter, check_vocabulary
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from flowspec.speculation.drafters.eagle.load import load_eagle
from flowspec.speculation.drafters.eagle3.drafter import Eagle3Drafter
from flowspec.speculation.drafters.eagle3.load import load_eagle3
from flowspec.speculation.drafters.ngram.drafter import NgramDrafter
from flowspec.tokenizer import load_tokenizer
from flowspec.weights.load import HeadPart, load_whole

Net = TypeVar("Net")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """The files that a drafter is loaded from."""

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


def _load_head(load: Callable[..., Net], source: DraftSource) -> Net:
    return load(
        source.folder,
        target_config=source.target.config,
        embedding=source.target.embed_tokens,
        device=source.device,
        dtype=source.dtype,
    )


def _load_eagle(source: DraftSource) -> Drafter:
    return EagleDrafter(_load_head(load_eagle, source), source.target.lm_head)


def _load_eagle3(source: DraftSource) -> Drafter:
    return Eagle3Drafter(_load_head(load_eagle3, source))


def _load_draft_model(source: DraftSource) -> Drafter:
    refuse_head(source.folder)
    target, draft = (load_tokenizer(f).get_vocab() for f in (source.target_folder, source.folder))
    model = load_whole(source.folder, device=source.device, dtype=source.dtype)
    check_vocabulary(target, draft, model.config)
    return DraftModelDrafter(model, vocab_size=source.target.config.vocab_size)


SWITCHES = ("merge", "calibrate")  # decoding settings that any drafter's name may carry
DRAFTERS: dict[str, DrafterSpec] = {
    "ngram": DrafterSpec(lambda source: NgramDrafter(), "", "the text so far, no model"),
    "eagle": DrafterSpec(_load_eagle, "models/demo/eagle", "EAGLE-1/2 head"),
    "eagle3": DrafterSpec(_load_eagle3, "models/demo/eagle3", "EAGLE-3 head"),
    "draft_model": DrafterSpec(
        _load_draft_model, "models/demo/draft", "a small language model with the same tokenizer"
    ),
    "none": DrafterSpec(lambda source: NoDrafter(), "", "drafts nothing, for ar"),
}


def find_drafter(name: str) -> DrafterSpec:
    """Return a row of the table. Raises ValueError listing the known names."""
    if name not in DRAFTERS:
        raise ValueError(f"unknown drafter {name!a}; known: {', '.join(DRAFTERS)}")
    return DRAFTERS[name]


def current_drafter(text: str) -> str:
    """Return `text`, as `parse_drafter` takes it, with the present names of its switches."""
    name, *switches = text.split("+")
    return "+".join((name, *map(new_name, switches)))


def parse_drafter(text: str) -> tuple[str, dict[str, bool]]:
    """Split `eagle+merge` into "eagle" and {"merge": True, "calibrate": False}.

    Raises ValueError listing the known names.
    """
    name, *switches = current_drafter(text).split("+")
    find_drafter(name)
    if unknown := sorted(set(switches) - set(SWITCHES)):
        raise ValueError(f"{text}: unknown switch {unknown[0]!a}; known: {', '.join(SWITCHES)}")
    return name, {switch: switch in switches for switch in SWITCHES}
