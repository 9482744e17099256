"""Composition root: builds the cores of a cluster from a split model and a configuration."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowspec.config import DecodeConfig, EngineConfig, NumericsConfig, override
from flowspec.head.admission import Admission
from flowspec.head.head import Head
from flowspec.model.architecture import ModelConfig, warn_once
from flowspec.model.stage_model import StageModel
from flowspec.request import Request, check_token_ids
from flowspec.speculation.drafters import DraftSource, find_drafter
from flowspec.speculation.drafters.base import Drafter, NoDrafter
from flowspec.speculation.strategies import StrategySpec, check_runs_for_real, find_strategy
from flowspec.stage.stage import Stage
from flowspec.tokenizer import PromptError, TextStream, load_tokenizer, render_chat
from flowspec.weights.load import load_head_part, load_stage
from flowspec.weights.manifest import Manifest, read_manifest

log = logging.getLogger(__name__)


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
    vocab_size: int = 0  # rows of the target's embedding; 0: not known

    def prompt_of(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A conversation as tokens that the model has, ready for the assistant's turn.

        Raises PromptError, whatever the chat template or the tokenizer raises.
        """
        ids = render_chat(self.tokenizer, messages)
        if self.vocab_size:
            try:
                check_token_ids(ids, self.vocab_size, text_of=self.text_of)
            except ValueError as error:
                raise PromptError(str(error)) from error
        return ids

    def text_of(self, token: int) -> str:
        """The text of one token, for messages; "" where the tokenizer does not know it."""
        try:
            return str(self.tokenizer.decode([token], skip_special_tokens=False))
        except Exception:  # whatever a tokenizer raises for an id that it does not have
            return ""

    def new_text(self, request: Request) -> TextStream:
        """A detokenizer for one request."""
        return TextStream(self.tokenizer, request.stop)


def decode_config(config: EngineConfig) -> tuple[StrategySpec, DecodeConfig]:
    """The strategy and its defaults with the run's overrides."""
    spec = find_strategy(config.strategy)
    return spec, override(spec.defaults, config.decode, where="decode")


def check_run(config: EngineConfig) -> None:
    """Raise ValueError for what can be said before anything is loaded."""
    spec, _ = decode_config(config)
    check_runs_for_real(config.strategy)
    find_drafter(config.drafter)
    if spec.drafts and config.drafter == "none":
        raise ValueError(f"strategy {config.strategy} needs a drafter; --strategy ar needs none")
    try:
        device = torch.device(config.local.device)
    except RuntimeError:
        raise ValueError(
            f"device {config.local.device!r} is not one torch knows; cpu or cuda"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {config.local.device} was asked for, torch finds no CUDA here")


def max_context(asked: int, model: ModelConfig) -> int:
    """Most tokens of a request: as asked for, which may be more, or what the model was made for."""
    made_for = model.context_length
    if asked > made_for:
        warn_once(
            f"--context {asked} is more than the {made_for} tokens that the model was made for; "
            "what it says beyond them may make no sense"
        )
    return asked or made_for


def load_head_parts(config: EngineConfig, split_folder: Path) -> HeadParts:
    """Tokenizer and drafter. Raises ValueError naming what is missing or does not fit."""
    check_run(config)
    part = load_head_part(split_folder, device=config.local.device, dtype=config.numerics.dtype)
    drafter: Drafter = NoDrafter()
    if find_strategy(config.strategy).drafts:
        spec = find_drafter(config.drafter)
        source = DraftSource(
            folder=Path(config.draft or spec.bundled),
            target=part,
            target_folder=split_folder / "head",
            device=config.local.device,
            dtype=config.numerics.dtype,
        )
        drafter = spec.load(source)
    return HeadParts(
        folder=split_folder,
        manifest=read_manifest(split_folder),
        tokenizer=load_tokenizer(split_folder / "head"),
        drafter=drafter,
        max_context=max_context(config.context, part.config),
        eos_token_ids=_known_ends(part.config.eos_token_ids, part.config.vocab_size),
        vocab_size=part.config.vocab_size,
    )


def _known_ends(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The end tokens that the model can choose; others are told, and can be left out."""
    for token in ids:
        if not 0 <= token < vocab_size:
            log.warning(
                "the end token with id %d is ignored: the model's vocabulary has %d tokens, so it "
                "never comes",
                token,
                vocab_size,
            )
    return tuple(token for token in ids if 0 <= token < vocab_size)


def build_head(config: EngineConfig, parts: HeadParts) -> Head:
    """The head's core."""
    spec, decode = decode_config(config)
    return Head(
        len(parts.manifest.layers),
        spec,
        decode,
        parts.drafter,
        admission=Admission(
            max_context=parts.max_context,
            max_active=config.max_num_seqs,
            max_kept=config.kept_prefixes,
            vocab_size=parts.vocab_size,
            text_of=parts.text_of,
        ),
        new_text=parts.new_text,
    )


def build_stage(
    split_folder: Path,
    rank: int,
    *,
    device: str = "cpu",
    numerics: NumericsConfig | None = None,
) -> tuple[Stage, str]:
    """A stage's core and the model hash of the split it belongs to."""
    numerics = numerics or NumericsConfig()
    manifest = read_manifest(split_folder)
    model = load_stage(split_folder, rank, device=device, dtype=numerics.dtype)
    stage = new_stage(rank, len(manifest.layers), model, numerics)
    return stage, manifest.model_hash


def new_stage(rank: int, num_stages: int, model: StageModel, numerics: NumericsConfig) -> Stage:
    """A stage's core for loaded layers, however its process was started."""
    return Stage(rank, num_stages, model, batch_invariant=numerics.batch_invariant)
