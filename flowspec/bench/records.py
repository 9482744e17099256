"""Records of a benchmark: a JSON line per sample, appended when it is finished, read to resume.

A sample is one turn of one question under one strategy. Its key is a hash of all that defines it
(the question, the parameters, the code, the models, the emulated devices); a sample whose key is in
the file is not run again. Shares are of the decode time: from the first token to the last.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from flowspec.config import RENAMED

FILE_NAME = "samples.jsonl"
LEFT_OUT_NAME = "left_out.jsonl"
MAX_LINE_CHARS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """Figures of one run of one request; times in seconds by the event loop's clock, no prefill."""

    prompt_tokens: int
    tokens: int  # generated, EOS included, nothing after it
    token_hash: str  # equal for equal tokens; made by `hash_tokens`
    mismatch: bool  # the tokens differ from those of the target alone
    finish: str  # stop or length
    ttft_s: float
    decode_s: float  # from the first token to the last, without outages
    decode_tokens_per_s: float  # tokens after the first, by decode_s; 0 with one token
    end_to_end_tokens_per_s: float
    inter_token_ms: Mapping[str, float]  # p50, p95, p99; tokens that come together are 0 apart
    tau: float
    runs: tuple[int, ...]  # lengths of accepted runs; last, the one cut off by the end
    alpha: tuple[float, ...]  # per depth
    mu: float  # share of tokens after the first that were in no branch in flight
    mu_not_drafted: float
    mu_not_in_flight: float  # drafted, but not sent yet
    rows_sent: int
    rows_pruned: int | None  # dropped in flight, before some stage ran them; None: unknown
    rows_wasted: int | None  # run by the last stage, but not accepted; None: unknown
    segments: int
    draft_forwards: int
    drafter_busy: float | None  # share; None: unknown
    # the next three are empty if unknown
    stage_busy: tuple[float, ...]  # shares of stages 1 to N
    stage_idle: tuple[Mapping[str, float], ...]  # cause -> share; host overhead is one of them
    link_bytes: Mapping[str, float]  # "from-to" -> bytes sent while decoding
    tree_size: float  # mean number of living nodes when a verdict came
    repeated: float | None = None  # made by `repeated_share`; None in old records
    resumes: int = 0  # times that stages were lost and the answer continued
    outage_s: float = 0.0  # from such losses to the next tokens; not part of decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(RunFigures):
    """One line of the file."""

    key: str
    cluster: str
    model: str  # name of the emulated model
    drafter: str
    strategy: str
    dataset: str
    question: str
    turn: int  # from 0
    temperature: float
    seed: int
    stages: int
    table: str  # main or all
    parameters: Mapping[str, Any]  # the effective DecodeConfig
    max_tokens: int
    warm: bool  # the cluster had answered the set's earlier questions
    emulated: bool
    bound_tokens_per_s: float | None  # emulated: upper bound of the decode speed (bound.py)
    bound_share: float | None  # share of the bound that was reached, at most 1
    versions: Mapping[str, str]
    revision: str  # of the source tree, if it is under git
    host: str
    started_at: str  # ISO 8601, UTC
    code: str = ""  # hash of the sources; empty in old records
    target: str = ""  # hash of the model that computed, and of its cuts
    draft: str = ""  # hash of the draft model that computed; empty if none
    repeat: int = 0  # repeat of a run on real processes, from 0
    # hash of the emulated cluster's and model's figures, without the drafter; or, of a cluster of
    # devices, of these, their layers and the dtype
    emulation: str = ""
    devices: tuple[str, ...] = ()  # of a cluster of devices: their layers, in order
    alone: bool = True  # no other request was served meanwhile; False only in old records
    # it waited for devices or for other requests; the time to the first token includes the wait
    rebuilt: bool = False
    # other requests were served since the answer before: costs and scores may be learnt from them
    relearnt: bool = False


@dataclass(frozen=True, slots=True)
class TooLong:
    """A turn that is left out, with those after it: its prompt and answer exceed the context.

    With `reason`, they exceed the memory of a cluster of devices, or the chat template refuses it.
    """

    key: str  # key of its question, from Plan.question_keys
    dataset: str
    question: str
    turn: int
    num_turns: int  # turns left out with it
    prompt_tokens: int
    reason: str = ""


def hash_tokens(tokens: Sequence[int]) -> str:
    """Return the SHA-256 of the token ids as i32, least significant byte first."""
    return sha256(np.array(tokens, "<i4").tobytes()).hexdigest()


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that came before in the text; above about 0.3, it loops."""
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def as_text(value: Any) -> str:
    """Return a sample's value in the form that `--only` takes."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def hash_of(definition: Mapping[str, Any]) -> str:
    """Return a hash that does not depend on the order of the keys."""
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()[:24]


_READER = TypeAdapter(Sample)
_LEFT_OUT_READER = TypeAdapter(TooLong)
_NAMES = {field.name for field in fields(Sample)}


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a file or folder; of two with one key, the later one.

    A last line that an interrupted run left incomplete is left out. Raises ValueError that names
    file and line for anything else that is not a sample.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = list(StringIO(file.read_text(encoding="utf-8-sig")))  # split at "\n" only
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; `flowspec bench` writes it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if lines and lines[0].startswith("{") and '"traceEvents"' in lines[0]:
        raise ValueError(
            f"{file} is a trace; `flowspec plot timeline` and `flowspec trace summary` take it"
        )
    if lines and lines[0].startswith("["):
        raise ValueError(
            f"{file} is a list, as `flowspec bench --json` writes its rows; records are in the "
            f"folder of --out, in {FILE_NAME}"
        )
    found: dict[str, Sample] = {}
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            sample = _parse(line, f"{file}:{number}")
        except ValueError as error:
            asked = "if `flowspec bench` or `simulate` wrote this file, " if number == 1 else ""
            raise ValueError(
                f"{error}; {asked}delete the line: the same command runs again what it held"
            ) from None
        found.pop(sample.key, None)
        found[sample.key] = sample
    return list(found.values())


def _parse(line: str, where: str) -> Sample:
    if len(line) > MAX_LINE_CHARS:
        raise ValueError(f"{where} is longer than {MAX_LINE_CHARS} characters: not a sample")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, not {type(record).__name__}")
    if unknown := sorted(set(record) - _NAMES):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; another version's record?")
    try:
        return _READER.validate_python(_renamed(record))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where} is not a sample: {name}: {first['msg']}") from None


def _renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of an older version, with the names that strategies and settings have now."""
    now = dict(record)
    if isinstance(parameters := now.get("parameters"), dict):
        now["parameters"] = {RENAMED.get(key, key): value for key, value in parameters.items()}
    if isinstance(strategy := now.get("strategy"), str):
        now["strategy"] = RENAMED.get(strategy, strategy)
    if isinstance(drafter := now.get("drafter"), str):
        now["drafter"] = "+".join(RENAMED.get(part, part) for part in drafter.split("+"))
    return now


class SampleFile:
    """The samples of a folder, open for adding; one process at a time. Use it with `with`.

    A second file holds the turns that were left out, because no sample records them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            why = "it is a file" if folder.is_file() else error.strerror
            raise ValueError(f"--out {folder}: this folder cannot be written: {why}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{self.path} is being written by another bench") from None
        try:
            self._cut_half_line()
            self.left_out = _read_left_out(folder / LEFT_OUT_NAME)
            self._samples = {sample.key: sample for sample in read_samples(self.path)}
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: str) -> Sample:
        return self._samples[key]

    def add(self, sample: Sample) -> None:
        """Append a line; the operating system has it when this returns."""
        line = json.dumps(asdict(sample), separators=(",", ":"), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._samples[sample.key] = sample

    def leave_out(self, one: TooLong) -> None:
        """Record a left-out turn by its question's key; of two turns, the earlier one."""
        before = self.left_out.get(one.key)
        if before is None or one.turn < before.turn:
            self.left_out[one.key] = one
            lines = "".join(json.dumps(asdict(each)) + "\n" for each in self.left_out.values())
            self.path.with_name(LEFT_OUT_NAME).write_text(lines)

    def select(self, keys: Iterable[str]) -> Iterator[Sample]:
        """Yield the samples of `keys` that are here, in that order."""
        return (self._samples[key] for key in keys if key in self._samples)

    def _cut_half_line(self) -> None:
        """Remove an incomplete last line of an interrupted run."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                end += len(line)
        self._file.truncate(end)
        self._file.seek(0, 2)


def _read_left_out(file: Path) -> dict[str, TooLong]:
    """Return the turns by key; ignore invalid lines, whose questions are only asked again."""
    found = {}
    for line in file.read_text().split("\n") if file.exists() else ():
        try:
            one = _LEFT_OUT_READER.validate_json(line)
        except ValidationError:
            continue
        found[one.key] = one
    return found
