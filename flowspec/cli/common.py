"""Code that several commands share: effective configuration, split model, records."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowspec.bench.records import Sample, as_text, read_samples
from flowspec.bench.settings import drafts
from flowspec.config import EngineConfig, override, read_engine_config
from flowspec.engine import prepare
from flowspec.engine.prepare import bundled, count_stages, draft_folder, is_bundled
from flowspec.speculation.strategies import strategy_config
from flowspec.system import signals
from flowspec.system.bundled import DEMO

__all__ = ["bundled", "count_stages", "draft_folder", "is_bundled"]
CONTEXT_HELP = "Most tokens of a request, prompt and answer. [default: the model's limit]"
RECORD_KEYS = (  # of --only
    *("cluster", "model", "drafter", "strategy", "dataset", "question", "turn", "temperature"),
    *("seed", "stages", "table", "max_tokens", "warm", "emulated", "finish", "mismatch", "host"),
    *("code", "target", "draft", "emulation", "repeat"),
)
RECORD_FIGURES = ("repeated", "prompt_tokens", "tokens")  # --only takes them as LOW..HIGH
BUNDLED = DEMO
ENGINE_SETTINGS = ("chunked_prefill_size",)  # once settings of a strategy


def effective_config(file: Path | None, flags: Mapping[str, Any]) -> EngineConfig:
    """Return the defaults, overridden by the YAML file, overridden by the given flags."""
    config = EngineConfig() if file is None else read_engine_config(file)
    given = {name: value for name, value in flags.items() if value is not None}
    config = with_engine_settings(
        override(config, given, where="options"), where=f"decode in {file}"
    )
    strategy_config(config.strategy, config.decode, where=f"decode in {file}")
    return config


def with_engine_settings(config: EngineConfig, *, where: str) -> EngineConfig:
    """Move settings of the engine out of the strategy's settings, where they once were."""
    own = {name: config.decode[name] for name in ENGINE_SETTINGS if name in config.decode}
    if not own:
        return config
    decode = {name: value for name, value in config.decode.items() if name not in own}
    return override(config, {**own, "decode": decode}, where=where)


def split_folder(config: EngineConfig) -> Path:
    """Return the split model that `config` names; make it if needed, with a line on stderr."""
    return prepare.split_folder(config, say=say_on_stderr)


def layerwise_folder(config: EngineConfig, *, offline: bool = False) -> Path:
    """Return the model split into single layers; make it if needed, with a line on stderr."""
    return prepare.layerwise_folder(config, offline=offline, say=say_on_stderr)


def say_on_stderr(text: str) -> None:
    """Print a line on stderr; rich keeps print from writing into a progress bar."""
    print(text, file=sys.stderr, flush=True)


def check_file(option: str, path: Path) -> None:
    """Raise ValueError, before anything has run, if a file of this name cannot be written."""
    if path.is_dir():
        raise ValueError(f"{option} {path} cannot be written: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {path.parent} is no folder")


def write_whole(path: Path, text: str) -> None:
    """Write a file that a signal does not leave half written."""
    with signals.undoing():
        path.write_text(text)


def read_records(paths: Sequence[Path], only: Sequence[str]) -> list[Sample]:
    """Return the samples of these files that match every `key=value[,value]` of `only`.

    RECORD_FIGURES take `key=LOW..HIGH`, with both ends included. Of two samples with one key the
    later one counts. Strategies without a drafter match every drafter, so that plain decoding stays
    the baseline. Raises ValueError for a file without records, an unknown key, or no match.
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
    """Return the samples whose figure is within `LOW..HIGH`. Raises ValueError."""
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
