"""Builds head and stages from a split model and a configuration."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from flowspec.config import EngineConfig, NumericsConfig
from flowspec.head.head import Head
from flowspec.head.pipeline import Pipeline
from flowspec.head.scheduler import Scheduler
from flowspec.model.architecture import ModelConfig, warn_once
from flowspec.model.backend import StageBackend
from flowspec.request import ChatMessage, Decoding, Request, check_token_ids
from flowspec.speculation.drafters import DraftSource, find_drafter
from flowspec.speculation.drafters.base import Drafter
from flowspec.speculation.strategies import check_runs_for_real, find_strategy, strategy_config
from flowspec.stage.backends import StageSource, find_backend
from flowspec.stage.stage import Stage
from flowspec.tokenizer import PromptError, TextStream, load_tokenizer, render_chat
from flowspec.weights.load import load_head_part
from flowspec.weights.manifest import Manifest, read_manifest

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeadParts:
    """The parts of a head in memory besides its core."""

    folder: Path
    manifest: Manifest
    tokenizer: Any
    drafters: Mapping[str, Drafter]  # by name; the first one is the default
    max_context: int
    eos_token_ids: tuple[int, ...]
    draft_hash: str = ""  # of the draft model's files, if needed
    code_hash: str = ""  # of the package's sources, if needed
    vocab_size: int = 0  # rows of the target's embedding; 0: not known
    # Rendering has its own lock: fast tokenizers fail if two threads encode at once.
    _renders: Lock = field(default_factory=Lock)

    def render(self, request: Request) -> Request:
        """Return the request with its prompt as tokens and, unless it has its own, the end tokens.

        Raises PromptError if the prompt cannot be made into tokens.
        """
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = self.prompt_of([{"role": "user", "content": prompt}])
        elif not isinstance(prompt, tuple) or not isinstance(prompt[0], int):
            prompt = self.prompt_of(prompt)  # type: ignore[arg-type]
        ends = request.eos_token_ids
        return replace(
            request, prompt=prompt, eos_token_ids=self.eos_token_ids if ends is None else ends
        )

    def prompt_of(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return a conversation as tokens that the model has, ready for the assistant's turn.

        Raises PromptError, whatever the chat template or the tokenizer raises.
        """
        with self._renders:
            ids = render_chat(self.tokenizer, messages)
        if self.vocab_size:
            try:
                check_token_ids(ids, self.vocab_size, text_of=self.text_of)
            except ValueError as error:
                raise PromptError(str(error)) from error
        return ids

    def text_of(self, token: int) -> str:
        """Return the text of one token for messages; "" if the tokenizer does not know it."""
        try:
            return str(self.tokenizer.decode([token], skip_special_tokens=False))
        except Exception:  # a tokenizer may raise anything for an id that it does not have
            return ""

    def new_text(self, request: Request) -> TextStream:
        """Return a detokenizer for one request."""
        return TextStream(self.tokenizer, request.stop)


def decoding_of(config: EngineConfig) -> Decoding:
    """Return the decoding of requests that name none. Raises ValueError if it is invalid."""
    strategy_config(config.strategy, config.decode, where="decode")
    drafter = config.drafter if find_strategy(config.strategy).drafts else ""
    return Decoding(strategy=config.strategy, parameters=config.decode, drafter=drafter)


def check_run(config: EngineConfig) -> None:
    """Raise ValueError for errors that are known before anything is loaded."""
    drafts = find_strategy(config.strategy).drafts
    decoding_of(config)
    check_runs_for_real(config.strategy)
    find_drafter(config.drafter)
    if drafts and config.drafter == "none":
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
    """Return the most tokens of a request: as asked for, or what the model was made for."""
    made_for = model.context_length
    if asked > made_for:
        warn_once(
            f"--context {asked} is more than the {made_for} tokens that the model was made for; "
            "what it says beyond them may make no sense"
        )
    return asked or made_for


def load_head_parts(config: EngineConfig, split_folder: Path) -> HeadParts:
    """Load tokenizer and drafters. Raises ValueError naming what is missing or does not fit."""
    check_run(config)
    part = load_head_part(split_folder, device=config.local.device, dtype=config.numerics.dtype)
    drafters: dict[str, Drafter] = {}
    if find_strategy(config.strategy).drafts:
        spec = find_drafter(config.drafter)
        source = DraftSource(
            folder=Path(config.draft or spec.bundled),
            target=part,
            target_folder=split_folder / "head",
            device=config.local.device,
            dtype=config.numerics.dtype,
        )
        drafters[config.drafter] = spec.load(source)
    return HeadParts(
        folder=split_folder,
        manifest=read_manifest(split_folder),
        tokenizer=load_tokenizer(split_folder / "head"),
        drafters=drafters,
        max_context=max_context(config.context, part.config),
        eos_token_ids=_known_ends(part.config.eos_token_ids, part.config.vocab_size),
        vocab_size=part.config.vocab_size,
    )


def _known_ends(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Return the end tokens that the model has; others are logged and left out."""
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
    """Return the head's core."""
    scheduler = Scheduler(
        pipe=Pipeline(len(parts.manifest.layers)),
        max_context=parts.max_context,
        max_num_seqs=config.max_num_seqs,
        max_cached=config.kept_prefixes,
        chunked_prefill_size=config.chunked_prefill_size,
        vocab_size=parts.vocab_size,
        text_of=parts.text_of,
    )
    return Head(scheduler, decoding_of(config), parts.drafters, new_text=parts.new_text)


def build_stage(
    split_folder: Path,
    rank: int,
    *,
    device: str = "cpu",
    numerics: NumericsConfig | None = None,
) -> tuple[Stage, str]:
    """Return a stage's core and the model hash of the split it belongs to."""
    numerics = numerics or NumericsConfig()
    manifest = read_manifest(split_folder)
    first, last = manifest.layer_range(rank)
    source = StageSource(
        folder=split_folder,
        first_layer=first,
        last_layer=last,
        device=device,
        dtype=numerics.dtype,
        quantization=numerics.quantization,
    )
    model = find_backend(numerics.backend).load(source)
    stage = new_stage(rank, len(manifest.layers), model, numerics)
    return stage, manifest.model_hash


def new_stage(
    rank: int, num_stages: int, model: StageBackend[Any], numerics: NumericsConfig
) -> Stage:
    """Return a stage's core for loaded layers; all ways to start a stage use it."""
    return Stage(rank, num_stages, model, batch_invariant=numerics.batch_invariant)
