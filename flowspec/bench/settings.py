"""Settings: what comparable samples have in common; samples that must not be compared are refused.

A title shows most of a setting. Code, models and emulated figures are known by hashes, which no
title shows: records that differ only in these are not repeats of each other and are refused.
"""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from flowspec.bench.datasets import DATASETS
from flowspec.bench.records import Sample, as_text
from flowspec.speculation.strategies import STRATEGIES

HASHED = {  # field -> what it is a hash of
    "code": "the sources they ran",
    "target": "the model that computed",
    "draft": "the draft model that computed",
    "emulation": "the emulated cluster's and model's figures, or of the devices of a real one",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What comparable samples have in common: everything but strategy and prompt."""

    emulated: bool
    cluster: str
    model: str
    stages: int
    drafter: str
    table: str
    max_tokens: int
    temperature: float
    warm: bool
    code: str  # a hash, as are the next three
    target: str
    draft: str
    emulation: str

    @classmethod
    def of(cls, sample: Sample) -> "Setting":
        """Return a sample's setting."""
        return cls(**{f.name: getattr(sample, f.name) for f in fields(cls)})

    @property
    def order(self) -> tuple[object, ...]:
        """Sort by name, the main table first."""
        whole = (self.emulated, self.cluster, self.model, self.stages, self.drafter)
        table = (self.table != "main", self.table, self.max_tokens)
        hashes = (self.code, self.target, self.draft, self.emulation)
        return (*whole, *table, self.temperature, self.warm, *hashes)


def by_setting(samples: Iterable[Sample]) -> dict[Setting, list[Sample]]:
    """Group samples by setting; those without a draft belong to every drafter's and table's.

    Where a strategy ran with several parameters, its name says which: "streaming draft_topk=4".
    Raises ValueError where settings differ in what no title shows.
    """
    found: dict[Setting, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[Setting.of(sample)].append(sample)
    _check_titles(found)
    _share_undrafted(found)
    ordered = sorted(found.items(), key=lambda item: item[0].order)
    return {setting: _named_apart(own) for setting, own in ordered}


def _check_titles(found: Mapping[Setting, Sequence[Sample]]) -> None:
    """Check that settings of one title are equal; those without draft fit every drafter."""
    newest = sorted(found, key=lambda at: max(s.started_at for s in found[at]), reverse=True)
    by_title: dict[Setting, list[Setting]] = defaultdict(list)
    whatever_drafts: dict[Setting, list[Setting]] = defaultdict(list)
    for setting in newest:
        title = replace(setting, code="", target="", draft="", emulation="")
        by_title[title].append(setting)
        whatever_drafts[_undrafted(title)].append(setting)
    for alike in whatever_drafts.values():
        for name in ("code", "target", "emulation"):
            _check_field(name, alike)
    for alike in by_title.values():
        _check_field("draft", alike)


def check_one(settings: Iterable[Setting], where: str = "", *, free: Sequence[str] = ()) -> None:
    """Raise ValueError that names the differences, except in the fields in `free`."""
    listed = list(settings)
    for field in fields(Setting):
        if field.name not in free:
            ordered = sorted(listed, key=lambda at: as_text(getattr(at, field.name)))  # noqa: B023
            _check_field(field.name, ordered, where)


def _check_field(name: str, settings: Iterable[Setting], where: str = "") -> None:
    """Raise ValueError for different values, with the first one as the suggestion."""
    there = list(dict.fromkeys(as_text(getattr(setting, name)) for setting in settings))
    if len(there) < 2:
        return
    about = f" (a hash of {HASHED[name]})" if name in HASHED else ""
    and_none = "," if name == "draft" else ""  # strategies without draft have none
    choice = shlex.quote(f"{name}={there[0]}{and_none}")  # ready to be pasted
    raise ValueError(
        f"the records differ {where}in {name}{about}: "
        f"{', '.join(text or 'none kept' for text in there)}; choose with --only {choice}"
    )


def _share_undrafted(found: dict[Setting, list[Sample]]) -> None:
    """Add samples of settings without any draft to all settings that differ only in the draft."""
    drafting = [at for at, own in found.items() if any(drafts(s.strategy) for s in own)]
    for setting in [at for at in found if at not in drafting]:
        takers = [at for at in drafting if _undrafted(at) == _undrafted(setting)]
        for taker in takers:
            there = {sample.strategy for sample in found[taker]}
            found[taker] += [s for s in found[setting] if s.strategy not in there]
        if takers:
            del found[setting]


def _undrafted(setting: Setting) -> Setting:
    return replace(setting, drafter="", table="", draft="")


def _named_apart(samples: Sequence[Sample]) -> list[Sample]:
    by_name: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.strategy].append(sample)
    named = []
    for name, own in by_name.items():
        keys = sorted({key for sample in own for key in sample.parameters}) if drafts(name) else []
        varied = [key for key in keys if len({str(s.parameters.get(key)) for s in own}) > 1]
        for sample in own:
            words = [f"{key}={sample.parameters.get(key)}" for key in varied]
            named.append(replace(sample, strategy=" ".join([name, *words])))
    return named


def sets_of(samples: Iterable[Sample]) -> list[str]:
    """Return their sets: the known ones in the papers' order, then others by name."""
    return sorted({s.dataset for s in samples}, key=lambda name: (_place(name, DATASETS), name))


def strategies_of(samples: Iterable[Sample]) -> list[str]:
    """Return their strategies, in the order of the strategy table, then others by name."""
    known = tuple(STRATEGIES)
    names = {sample.strategy for sample in samples}
    return sorted(names, key=lambda name: (_place(name.split(" ")[0], known), name))


def _place(name: str, known: Sequence[str]) -> int:
    return known.index(name) if name in known else len(known)


def drafts(strategy: str) -> bool:
    """Whether a strategy, or one of its variants from `by_setting`, drafts a tree."""
    name = strategy.split(" ")[0]
    return name not in STRATEGIES or STRATEGIES[name].drafts
