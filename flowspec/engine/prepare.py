"""Prepares the models of an engine: the target, cut into stages, and its draft model.

A missing split is made in the folder `out`. `say` is told, since that may take a while.
"""

import filecmp
import logging
from collections.abc import Callable
from pathlib import Path

from flowspec.config import EngineConfig
from flowspec.speculation.drafters import find_drafter
from flowspec.speculation.strategies import find_strategy
from flowspec.system import signals
from flowspec.system.bundled import DEMO, find_bundled
from flowspec.weights.checkpoint import (
    check_model,
    open_checkpoint,
    read_model_config,
    resolve_model,
    resolve_tokenizer,
)
from flowspec.weights.manifest import MANIFEST_NAME, read_manifest
from flowspec.weights.split import is_split_of, run_split
from flowspec.weights.split_plan import even_layers, parse_layers, plan_split

DEFAULT_STAGES = 4
Say = Callable[[str], None]
log = logging.getLogger(__name__)


def bundled(name: str) -> str:
    """Return `name`, or the path of the package's own copy if it does not exist here."""
    found = find_bundled(name)
    return name if found == Path(name) else str(found)


def draft_folder(config: EngineConfig, *, offline: bool = False) -> str:
    """Return the folder of the draft model: the configured one, or the bundled model's own.

    Raises ValueError if a model of the user's own comes without its draft model.
    """
    spec = find_drafter(config.drafter)
    if not spec.bundled or not find_strategy(config.strategy).drafts:
        return config.draft
    if not config.draft and not is_bundled(config.model):
        check_model(config.model, offline=offline)  # a missing model needs no draft model
        raise ValueError(
            f"drafter {config.drafter} needs --draft with a model of your own: the folder of a "
            "draft model made for it; --drafter ngram needs none"
        )
    return bundled(config.draft or spec.bundled)


def is_bundled(model: str) -> bool:
    """Return whether `model` is the package's own, by name, as a copy or as a split of it."""
    own, folder = DEMO / "target", find_bundled(model)
    if not folder.is_dir() or not own.is_dir():
        return False
    if (folder / MANIFEST_NAME).exists():
        return is_split_of(read_manifest(folder), open_checkpoint(own))
    names = ("config.json", "model.safetensors")
    same, _, _ = filecmp.cmpfiles(folder, own, names, shallow=False)
    return len(same) == len(names)


def count_stages(config: EngineConfig) -> int:
    """Return the number of stages that `split_folder` will find or make.

    Nothing is loaded or split. A model that is not downloaded yet counts as one that is not split.
    """
    if config.layers:
        return len(parse_layers(config.layers))
    folder = Path(bundled(config.model))
    if (folder / MANIFEST_NAME).exists():
        return len(read_manifest(folder).layers)
    return config.stages or DEFAULT_STAGES


def split_folder(config: EngineConfig, *, say: Say = log.info) -> Path:
    """Return the split model that `config` names; it is made now if it is missing."""
    folder = resolve_model(bundled(config.model))
    if (folder / MANIFEST_NAME).exists():
        have = read_manifest(folder).layers
        wanted = parse_layers(config.layers) if config.layers else have
        if wanted != have or config.stages not in (None, len(have)):
            raise ValueError(
                f"{folder} is split into {len(have)} stages of {have} layers, not as asked; "
                "name the unsplit model instead, or split it again with `flowspec split`"
            )
        if config.tokenizer:
            raise ValueError(
                f"{folder} is split, and has its tokenizer; give --tokenizer where the model is "
                "split, or name the unsplit model"
            )
        return folder
    checkpoint = open_checkpoint(folder, tokenizer=resolve_tokenizer(config.tokenizer))
    if config.layers:
        layers = parse_layers(config.layers)
    else:
        layers = even_layers(checkpoint.config.num_layers, config.stages or DEFAULT_STAGES)
    name = checkpoint.name
    cut = "+".join(str(count) for count in layers)
    # Values that are computed anyway are computed in the dtype of the run.
    dtype = config.numerics.dtype if checkpoint.computes_values else None
    kind = f"-{dtype}" if dtype else ""
    out = Path("out") / f"{name}-{cut}-{checkpoint.fingerprint()[:8]}{kind}"
    if not (out / MANIFEST_NAME).exists():
        checkpoint.check_tokenizer()  # or say what it lacks by the model's name, before the split
        stages = "1 stage" if len(layers) == 1 else f"{len(layers)} stages"
        say(f"splitting {name} into {stages} of {cut} layers: {out}")
    plan = plan_split(checkpoint, layers=layers, dtype=dtype)
    with signals.undoing():
        run_split(
            plan,
            out,
            model_id=name,
            on_bytes=lambda count: signals.check(),
            on_wait=say,
        )
    return out


def layerwise_folder(config: EngineConfig, *, offline: bool = False, say: Say = log.info) -> Path:
    """Return the model split into single layers, made now if it is missing.

    Raises ValueError if it is already cut in another way.
    """
    folder = resolve_model(bundled(config.model), offline=offline)
    is_split = (folder / MANIFEST_NAME).exists()
    layers = read_manifest(folder).layers if is_split else ()
    if is_split and set(layers) != {1}:
        raise ValueError(
            f"{folder} is split into stages of {'+'.join(map(str, layers))} layers; name the "
            "unsplit model, or one split with every layer by itself"
        )
    num_layers = len(layers) or read_model_config(folder).num_layers
    tokenizer = resolve_tokenizer(config.tokenizer, offline=offline) or ""
    cut = "+".join(["1"] * num_layers)
    return split_folder(config.changed(layers=cut, tokenizer=str(tokenizer)), say=say)
