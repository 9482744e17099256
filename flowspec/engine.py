"""Composition root: builds the cores of a cluster from a split model and a configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowspec.admission import Admission
from flowspec.config import DecodeConfig, RunConfig, override
from flowspec.drafters import DraftSource, find_drafter
from flowspec.drafters.base import Drafter, NoDrafter
from flowspec.head import Head
from flowspec.model.config import ModelConfig, warn_once
from flowspec.model.load import load_head_part, load_stage
from flowspec.model.manifest import Manifest, read_manifest
from flowspec.request import Request
from flowspec.stage import Stage
from flowspec.strategies import StrategySpec, check_runs_for_real, find_strategy
from flowspec.text import TextStream
from flowspec.tokenizer import load_tokenizer


@dataclass(slots=True)
class HeadParts:
    """What the head holds in memory besides its core."""

    folder: Path
    manifest: Manifest
    tokenizer: Any
    drafter: Drafter
    max_context: int
    eos_token_ids: tuple[int, ...]
    draft_hash: str = ""  # of the draft model's files, where somebody asks for it
    code_hash: str = ""  # of the package's sources, likewise

    def new_text(self, request: Request) -> TextStream:
        """A detokenizer for one request."""
        return TextStream(self.tokenizer, request.stop)


def decode_config(config: RunConfig) -> tuple[StrategySpec, DecodeConfig]:
    """The strategy and its defaults with the run's overrides."""
    spec = find_strategy(config.strategy)
    return spec, override(spec.defaults, config.decode, where="decode")


def check_run(config: RunConfig) -> None:
    """Raise ValueError for what can be said before anything is loaded."""
    spec, _ = decode_config(config)
    check_runs_for_real(config.strategy)
    find_drafter(config.drafter)
    if spec.drafts and config.drafter == "none":
        raise ValueError(f"strategy {config.strategy} needs a drafter; --strategy ar needs none")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ValueError(f"device {config.device!r} is not one torch knows; cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {config.device} was asked for, torch finds no CUDA here")


def max_context(asked: int, model: ModelConfig) -> int:
    """Most tokens of a request: as asked for, which may be more, or what the model was made for."""
    made_for = model.context_length
    if asked > made_for:
        warn_once(
            f"--context {asked} is more than the {made_for} tokens that the model was made for; "
            "what it says beyond them may make no sense"
        )
    return asked or made_for


def load_head_parts(config: RunConfig, split_folder: Path) -> HeadParts:
    """Tokenizer and drafter. Raises ValueError naming what is missing or does not fit."""
    check_run(config)
    part = load_head_part(split_folder, device=config.device, dtype=config.dtype)
    drafter: Drafter = NoDrafter()
    if find_strategy(config.strategy).drafts:
        spec = find_drafter(config.drafter)
        source = DraftSource(
            folder=Path(config.draft or spec.bundled),
            target=part,
            target_folder=split_folder / "head",
            device=config.device,
            dtype=config.dtype,
        )
        drafter = spec.load(source)
    return HeadParts(
        folder=split_folder,
        manifest=read_manifest(split_folder),
        tokenizer=load_tokenizer(split_folder / "head"),
        drafter=drafter,
        max_context=max_context(config.context, part.config),
        eos_token_ids=part.config.eos_token_ids,
    )


def build_head(config: RunConfig, parts: HeadParts) -> Head:
    """The head's core."""
    spec, decode = decode_config(config)
    return Head(
        len(parts.manifest.layers),
        spec,
        decode,
        parts.drafter,
        admission=Admission(
            max_context=parts.max_context,
            max_active=config.max_requests,
            max_kept=config.kept_prefixes,
        ),
        new_text=parts.new_text,
    )


def build_stage(
    split_folder: Path,
    rank: int,
    *,
    device: str,
    dtype: str,
    shape_stable: bool,
) -> tuple[Stage, str]:
    """A stage's core and the model hash of the split it belongs to."""
    manifest = read_manifest(split_folder)
    model = load_stage(split_folder, rank, device=device, dtype=dtype)
    return Stage(rank, len(manifest.layers), model, shape_stable=shape_stable), manifest.model_hash
