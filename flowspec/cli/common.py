"""What several commands share: the effective configuration and the split model it names."""

import filecmp
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowspec.bench.records import Sample, as_text, read_samples
from flowspec.bench.settings import drafts
from flowspec.config import EngineConfig, override, read_engine_config
from flowspec.speculation.drafters import find_drafter
from flowspec.speculation.strategies import find_strategy, strategy_config
from flowspec.system import signals
from flowspec.system.bundled import DEMO, find_bundled
from flowspec.tokenizer import load_tokenizer
from flowspec.weights.checkpoint import check_model, open_checkpoint, resolve_model
from flowspec.weights.manifest import MANIFEST_NAME, read_manifest
from flowspec.weights.split import is_split_of, run_split
from flowspec.weights.split_plan import even_layers, parse_layers, plan_split

DEFAULT_STAGES = 4
CONTEXT_HELP = "Most tokens of a request, prompt and answer [what the model was made for]."
RECORD_KEYS = (  # that --only takes
    *("cluster", "model", "drafter", "strategy", "dataset", "question", "turn", "temperature"),
    *("seed", "stages", "table", "max_tokens", "warm", "emulated", "finish", "mismatch", "host"),
    *("code", "target", "draft", "emulation", "repeat"),
)
RECORD_FIGURES = ("repeated", "prompt_tokens", "tokens")  # that it takes as LOW..HIGH
BUNDLED = DEMO
ENGINE_SETTINGS = ("chunked_prefill_size",)  # that were settings of a strategy once


def effective_config(file: Path | None, flags: Mapping[str, Any]) -> EngineConfig:
    """Defaults, then the YAML file, then the flags that were given; bundled models by name."""
    config = EngineConfig() if file is None else read_engine_config(file)
    given = {name: value for name, value in flags.items() if value is not None}
    config = with_engine_settings(
        override(config, given, where="options"), where=f"decode in {file}"
    )
    strategy_config(config.strategy, config.decode, where=f"decode in {file}")
    return config


def with_engine_settings(config: EngineConfig, *, where: str) -> EngineConfig:
    """Settings of the engine that were given among those of the strategy take their own place."""
    own = {name: config.decode[name] for name in ENGINE_SETTINGS if name in config.decode}
    if not own:
        return config
    decode = {name: value for name, value in config.decode.items() if name not in own}
    return override(config, {**own, "decode": decode}, where=where)


def bundled(name: str) -> str:
    """`name`, or where the package's own copy of it lies if it does not exist here."""
    found = find_bundled(name)
    return name if found == Path(name) else str(found)


def draft_folder(config: EngineConfig, *, offline: bool = False) -> str:
    """Where the draft model lies: as configured, else the drafter's own for the bundled model.

    Raises ValueError where a model of one's own comes without its draft model.
    """
    spec = find_drafter(config.drafter)
    if not spec.bundled or not find_strategy(config.strategy).drafts:
        return config.draft
    if not config.draft and not is_bundled(config.model):
        check_model(config.model, offline=offline)  # what is not there needs no draft model
        raise ValueError(
            f"drafter {config.drafter} needs --draft with a model of your own: the folder of a "
            "draft model made for it; --drafter ngram needs none"
        )
    return bundled(config.draft or spec.bundled)


def is_bundled(model: str) -> bool:
    """Whether `model` is the package's own, by name, as a copy of it or as a split of it."""
    own, folder = BUNDLED / "target", find_bundled(model)
    if not folder.is_dir() or not own.is_dir():
        return False
    if (folder / MANIFEST_NAME).exists():
        return is_split_of(read_manifest(folder), open_checkpoint(own))
    names = ("config.json", "model.safetensors")
    same, _, _ = filecmp.cmpfiles(folder, own, names, shallow=False)
    return len(same) == len(names)


def count_stages(config: EngineConfig) -> int:
    """How many stages `split_folder` will find or make; nothing is loaded or split for it.

    A model that has yet to be downloaded is taken for one that is not split.
    """
    if config.layers:
        return len(parse_layers(config.layers))
    folder = Path(bundled(config.model))
    if (folder / MANIFEST_NAME).exists():
        return len(read_manifest(folder).layers)
    return config.stages or DEFAULT_STAGES


def split_folder(config: EngineConfig) -> Path:
    """The split model that `config` names, made now where it is not there yet, which is told."""
    folder = resolve_model(bundled(config.model))
    if (folder / MANIFEST_NAME).exists():
        have = read_manifest(folder).layers
        wanted = parse_layers(config.layers) if config.layers else have
        if wanted != have or config.stages not in (None, len(have)):
            raise ValueError(
                f"{folder} is split into {len(have)} stages of {have} layers, not as asked; "
                "name the unsplit model instead, or split it again with `flowspec split`"
            )
        return folder
    checkpoint = open_checkpoint(folder)
    if config.layers:
        layers = parse_layers(config.layers)
    else:
        layers = even_layers(checkpoint.config.num_layers, config.stages or DEFAULT_STAGES)
    name = folder.resolve().name
    cut = "+".join(str(count) for count in layers)
    out = Path("out") / f"{name}-{cut}-{checkpoint.fingerprint()[:8]}"
    if not (out / MANIFEST_NAME).exists():
        load_tokenizer(folder)  # or say what it lacks by the model's own name, before it is split
        stages = "1 stage" if len(layers) == 1 else f"{len(layers)} stages"
        say_on_stderr(f"splitting {name} into {stages} of {cut} layers: {out}")
    plan = plan_split(checkpoint, layers=layers, dtype=None)
    with signals.undoing():
        run_split(
            plan,
            out,
            model_id=name,
            on_bytes=lambda count: signals.check(),
            on_wait=say_on_stderr,
        )
    return out


def say_on_stderr(text: str) -> None:
    """By print, which does not write across a bar that is on the screen."""
    print(text, file=sys.stderr, flush=True)


def layerwise_folder(config: EngineConfig, *, offline: bool = False) -> Path:
    """The model split with every layer by itself, made now where it is not there yet.

    Raises ValueError where it is cut already, but not so.
    """
    folder = resolve_model(bundled(config.model), offline=offline)
    is_split = (folder / MANIFEST_NAME).exists()
    layers = read_manifest(folder).layers if is_split else ()
    if is_split and set(layers) != {1}:
        raise ValueError(
            f"{folder} is split into stages of {'+'.join(map(str, layers))} layers; name the "
            "unsplit model, or one split with every layer by itself"
        )
    num_layers = len(layers) or open_checkpoint(folder).config.num_layers
    return split_folder(config.changed(layers="+".join(["1"] * num_layers)))


def check_file(option: str, path: Path) -> None:
    """Raise ValueError where a file of this name cannot be written, before anything has run."""
    if path.is_dir():
        raise ValueError(f"{option} {path} cannot be written: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {path.parent} is no folder")


def write_whole(path: Path, text: str) -> None:
    """Write a file that a signal does not leave half written."""
    with signals.undoing():
        path.write_text(text)


def read_records(paths: Sequence[Path], only: Sequence[str]) -> list[Sample]:
    """Samples of these files that have every `key=value[,value]` of `only`; one of a key.

    Of RECORD_FIGURES `key=LOW..HIGH`, both ends included.

    What drafts nothing has every drafter, so that plain decoding stays the others' baseline.

    Raises ValueError for a file that is no record, an unknown key, and where none is left.
    """
    found = {sample.key: sample for path in paths for sample in read_samples(path)}
    samples = list(found.values())
    if not samples:
        raise ValueError(f"{', '.join(map(str, paths))}: no records yet")
    for pair in only:
        key, equals, values = pair.partition("=")
        if not equals:
            raise ValueError(f"--only {pair!r} must be key=value; keys: {', '.join(RECORD_KEYS)}")
        if key in RECORD_FIGURES:
            samples = _between(samples, key, values)
            continue
        if key not in RECORD_KEYS:
            known = ", ".join((*RECORD_KEYS, *RECORD_FIGURES))
            raise ValueError(f"--only {pair}: unknown key {key!r}; known: {known}")
        there = sorted({as_text(getattr(sample, key)) for sample in samples})
        wanted = set(values.lower().split(","))
        if not wanted & set(there):
            raise ValueError(f"--only {pair}: no record has it; there are: {', '.join(there)}")
        samples = [
            sample
            for sample in samples
            if as_text(getattr(sample, key)) in wanted
            or (key == "drafter" and not drafts(sample.strategy))
        ]
    return samples


def _between(samples: Sequence[Sample], key: str, values: str) -> list[Sample]:
    """Those whose figure is within `LOW..HIGH`. Raises ValueError."""
    low, _, high = values.partition("..")
    try:
        least, most = float(low), float(high)
    except ValueError:
        raise ValueError(f"--only {key}={values}: give numbers, {key}=LOW..HIGH") from None
    figures = [getattr(sample, key) for sample in samples]
    if None in figures:
        raise ValueError(f"--only {key}={values}: there are records of before {key} was kept")
    found = [one for one, figure in zip(samples, figures, strict=True) if least <= figure <= most]
    if not found:
        raise ValueError(
            f"--only {key}={values}: no record has it; there are {min(figures):g} to "
            f"{max(figures):g}"
        )
    return found
