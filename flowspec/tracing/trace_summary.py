"""Sums up where the time of a traced run went, from its Chrome trace. Times are in seconds."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowspec.request import rank_name
from flowspec.tracing.chrome_trace import FORMAT


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """One process: seconds by kind of work (including host overhead) and by cause of idle time."""

    rank: int
    name: str
    busy_s: Mapping[str, float]
    idle_s: Mapping[str, float]
    num_works: int

    @property
    def wall_s(self) -> float:
        """Everything."""
        return sum(self.busy_s.values()) + sum(self.idle_s.values())


@dataclass(frozen=True, slots=True)
class LinkShare:
    """Messages from one process to another; times only of those whose receiver was waiting."""

    name: str
    num_messages: int
    num_bytes: int
    num_timed: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """All that `flowspec trace summary` prints."""

    wall_s: float
    clock_error_s: float | None  # None: some process's clock is unknown
    num_dropped: int
    cut_off: Sequence[str]  # processes that ended without closing their records
    processes: Sequence[ProcessShare]
    links: Sequence[LinkShare]  # the last one is the sum of all
    totals: Mapping[str, int]
    slowest_stage: str
    slowest_stage_ms: float  # per forward, on average
    critical_path: Sequence[
        tuple[str, str, float]
    ]  # process or links, kind, seconds; longest first

    @property
    def critical_resource(self) -> tuple[str, float]:
        """Return the process (or the links) with most of the critical path, and its seconds."""
        shares: dict[str, float] = defaultdict(float)
        for where, _, seconds in self.critical_path:
            shares[where] += seconds
        return max(shares.items(), key=lambda item: item[1], default=("nothing", 0.0))


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace that `flowspec run --trace` wrote. Raises ValueError for anything else."""
    text = ""
    try:
        text = path.read_text()
        data = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"trace {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; name the file that --trace wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _refuse_records(path, text)
        raise ValueError(f"{path} is not a trace: {error}") from None
    about = data.get("otherData") if isinstance(data, dict) else None
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT or not isinstance(data.get("traceEvents"), list):
        _refuse_records(path, text)
        raise ValueError(
            f"{path} is not a trace of `flowspec run --trace` (format {found!r}, needed {FORMAT!r})"
        )
    return dict(data)


def _refuse_records(path: Path, text: str) -> None:
    """Raise ValueError when the file holds a benchmark's records."""
    first = text.partition("\n")[0]
    if first.startswith("{") and '"strategy"' in first and '"tau"' in first:
        raise ValueError(
            f"{path} holds benchmark records, not a trace; `flowspec report` and the other plots "
            "take it"
        )


def summarize(path: Path) -> Summary:
    """Add up a trace. Raises ValueError when the file is not one."""
    data = read_trace(path)
    about, events = data["otherData"], data["traceEvents"]
    shares = [_share(process, events) for process in about["processes"]]
    stages = [share for share in shares if share.rank > 0 and share.num_works]
    slowest = max(stages, key=_compute_s, default=None)
    errors = [process["clock_error_s"] for process in about["processes"]]
    path_s = [(item["where"], item["what"], item["seconds"]) for item in about["critical_path"]]
    dropped = {process["name"]: process["records_dropped"] for process in about["processes"]}
    return Summary(
        wall_s=about["wall_s"],
        clock_error_s=None if None in errors else max(errors),
        num_dropped=sum(number or 0 for number in dropped.values()),
        cut_off=[name for name, number in dropped.items() if number is None],
        processes=shares,
        links=_links(events),
        totals=about["totals"],
        slowest_stage=slowest.name if slowest else "none",
        slowest_stage_ms=_compute_s(slowest) * 1e3 / slowest.num_works if slowest else 0.0,
        critical_path=sorted(path_s, key=lambda item: -item[2]),
    )


def _compute_s(share: ProcessShare) -> float:
    return sum(share.busy_s.get(kind, 0.0) for kind in ("forward", "verify"))


def _share(process: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> ProcessShare:
    spans = [
        event
        for event in events
        if event["ph"] == "X" and event["pid"] == process["rank"] and event["cat"] != "message"
    ]
    busy: dict[str, float] = defaultdict(float)
    idle: dict[str, float] = defaultdict(float)
    for span in spans:
        (idle if span["cat"] == "idle" else busy)[span["name"]] += span["dur"] / 1e6
    num_works = sum(span["cat"] == "work" for span in spans)
    return ProcessShare(process["rank"], process["name"], dict(busy), dict(idle), num_works)


def _links(events: Sequence[Mapping[str, Any]]) -> list[LinkShare]:
    hops: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "b" and event["cat"] == "link":
            hops[event["args"]["source"], event["args"]["to"]].append(event["args"])
    links = [
        _link(f"{rank_name(source)} > {rank_name(to)}", found)
        for (source, to), found in sorted(hops.items())
    ]
    return [*links, _link("all", [hop for found in hops.values() for hop in found])]


def _link(name: str, hops: Sequence[Mapping[str, Any]]) -> LinkShare:
    timed = sorted(hop["ms"] for hop in hops if not hop["queued"])
    return LinkShare(
        name=name,
        num_messages=len(hops),
        num_bytes=sum(hop["bytes"] for hop in hops),
        num_timed=len(timed),
        median_ms=statistics.median(timed) if timed else 0.0,
        p95_ms=float(np.percentile(timed, 95)) if timed else 0.0,
    )
