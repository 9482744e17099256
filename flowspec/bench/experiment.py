"""Plan of a benchmark: strategies with their parameters, the questions, and the samples' keys.

Parameters come from a table of config/eval.yaml: in `main`, all strategies have the same head and
published baselines draft as published; in `all`, each strategy uses everything that it can. A
sample's key covers whatever could change its figures, so that a resumed run never mixes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from flowspec.bench.prompts import Prompt
from flowspec.bench.records import hash_of
from flowspec.config import EngineConfig, new_name, override, read_yaml, with_new_names
from flowspec.cost_model.emulation import Emulation
from flowspec.request import Decoding
from flowspec.speculation.drafters import current_drafter, parse_drafter
from flowspec.speculation.strategies import (
    ABLATIONS,
    STRATEGIES,
    check_parameter,
    find_strategy,
    strategy_config,
)
from flowspec.system.bundled import find_bundled

FIGURES = 2  # increase when a figure of the records changes its meaning
HASH_CHARS = 16  # length of the hashes in a sample
EVERY = "every"  # the table's entry for all strategies


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison."""

    strategy: str
    drafter: str  # as parse_drafter takes it; none for ar
    parameters: Mapping[str, Any]  # all of the strategy's, with their values

    @property
    def drafter_name(self) -> str:
        """Return the drafter without its switches."""
        return parse_drafter(self.drafter)[0]

    @property
    def decoding(self) -> Decoding:
        """What a request asks for to be decoded so."""
        drafter = "" if self.drafter_name == "none" else self.drafter_name
        return Decoding(strategy=self.strategy, parameters=self.parameters, drafter=drafter)

    def config(self, base: EngineConfig) -> EngineConfig:
        """`base` with this strategy."""
        values = {"strategy": self.strategy, "drafter": self.drafter_name}
        return override(base, {**values, "decode": dict(self.parameters)}, where="bench")


@dataclass(frozen=True, slots=True)
class Group:
    """Questions that one cluster answers in order, at one temperature and seed."""

    dataset: str
    prompts: tuple[Prompt, ...]
    temperature: float
    seed: int
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A benchmark, on the emulated cluster's virtual clock unless `real`.

    A `real` one runs on processes here, or on a cluster of devices that `remote` describes.
    """

    cluster: str
    model: str
    table: str
    stages: int
    cases: tuple[Case, ...]
    datasets: Mapping[str, Sequence[Prompt]]
    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]
    max_tokens: int
    context: int = 0  # most tokens of a prompt and its answer; 0: the model's own limit
    # split folder of the model that computes; None: compare with a remote cluster's plain decoding
    target: Path | None
    drafts: Mapping[str, str] = field(default_factory=dict)  # folder of the draft model, by drafter
    # by drafter; empty for real runs
    emulations: Mapping[str, Emulation] = field(default_factory=dict)
    real: bool = False
    remote: Mapping[str, Any] | None = None  # what a cluster of devices' figures depend on
    num_kv_tokens: int = 0  # that the tightest device of these holds; 0: not known
    warm: bool = False
    repeats: int = 1  # of everything; more than one is useful only for real runs
    sources: Mapping[str, str] = field(default_factory=dict)  # hashes of code and models

    def groups(self) -> Iterator[Group]:
        """Yield all groups; at temperature 0, the seed has no effect, so one is enough."""
        for temperature in self.temperatures:
            for seed in self.seeds if temperature > 0 else self.seeds[:1]:
                for dataset, prompts in self.datasets.items():
                    sets = [tuple(prompts)] if self.warm else [(prompt,) for prompt in prompts]
                    for together, repeat in product(sets, range(self.repeats)):
                        yield Group(dataset, together, temperature, seed, repeat)

    def hashes(self, case: Case) -> dict[str, str]:
        """Return the hashes of the code, models and figures behind a sample."""
        emulation = self.emulations.get(case.drafter_name)
        whole = {
            "code": self.sources.get("code", ""),
            "target": self.sources.get("target", ""),
            "draft": self.sources.get(case.drafter_name, ""),
            "emulation": _hash(replace(emulation, drafter="none")) if emulation else "",
            **({"emulation": hash_of(self.remote)} if self.remote else {}),
        }
        return {name: value[:HASH_CHARS] for name, value in whole.items()}

    def keys(self, case: Case, group: Group) -> dict[tuple[str, int], str]:
        """Return the key of each turn of the group's questions."""
        emulation = self.emulations.get(case.drafter_name)
        common = {
            "figures": FIGURES,
            "cluster": self.cluster,
            "model": self.model,
            "emulation": _hash(emulation) if emulation is not None else None,
            "drafter": case.drafter,
            "strategy": case.strategy,
            "parameters": case.parameters,
            "table": self.table,
            "stages": self.stages,
            "dataset": group.dataset,
            "temperature": group.temperature,
            "seed": group.seed,
            "max_tokens": self.max_tokens,
            "sources": {
                name: value
                for name, value in self.sources.items()
                if name in ("code", "target", case.drafter_name)
            },
        }
        if self.remote is not None:
            common["remote"] = self.remote
        if group.repeat:  # the first repeat has the key of a run without repeats
            common["repeat"] = group.repeat
        before = sha256()  # everything that the cluster has been asked so far
        found = {}
        for prompt in group.prompts:
            before.update(repr((prompt.id, prompt.turns)).encode())
            asked = before.hexdigest() if self.warm else repr((prompt.id, prompt.turns))
            for turn in range(len(prompt.turns)):
                definition = {**common, "asked": asked, "warm": self.warm, "turn": turn}
                found[prompt.id, turn] = hash_of(definition)
        return found

    def question_keys(self, group: Group) -> dict[str, str]:
        """Return a key per question, of all that the target's own answers depend on.

        It also covers what decides whether a cluster of devices can hold the question.
        """
        common: dict[str, Any] = {
            "dataset": group.dataset,
            "temperature": group.temperature,
            "seed": group.seed,
            "max_tokens": self.max_tokens,
            "sources": {name: self.sources.get(name, "") for name in ("code", "target")},
        }
        if self.context:
            common["context"] = self.context
        if self.remote is not None:  # whose memory may be too small for a question
            sizes = [case.parameters.get("num_draft_tokens", 0) for case in self.cases]
            common["memory"] = [self.num_kv_tokens, max(sizes, default=0)]
        return {
            prompt.id: hash_of({**common, "question": prompt.id, "turns": prompt.turns})
            for prompt in group.prompts
        }


@lru_cache
def _hash(emulation: Emulation) -> str:
    return hash_of(asdict(emulation))


def read_table(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return overrides by strategy from table `name` of an evaluation file, with `every` merged in.

    Raises ValueError that names an unknown table, strategy or parameter.
    """
    path = find_bundled(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold tables by name")
    if name not in data:
        raise ValueError(f"{path} has no table {name!r}; it has: {', '.join(map(str, data))}")
    table = data[name] or {}
    table = with_new_names(table) if isinstance(table, dict) else table
    where = f"{path}: {name}"
    if not isinstance(table, dict) or not all(
        isinstance(values, dict) or values is None for values in table.values()
    ):
        raise ValueError(f"{where} must map strategies to parameters")
    specs = STRATEGIES | ABLATIONS
    if unknown := sorted(str(key) for key in table if key not in (*specs, EVERY)):
        known = ", ".join((EVERY, *STRATEGIES))
        raise ValueError(f"{where}: unknown strategy {unknown[0]!r}; known: {known}")
    every = table.get(EVERY) or {}
    every = with_new_names(every)
    found = {
        strategy: {
            **{name: value for name, value in every.items() if name in spec.parameters},
            **_own_parameters(strategy, table.get(strategy) or {}),
        }
        for strategy, spec in specs.items()
    }
    for strategy, values in found.items():
        strategy_config(strategy, values, where=f"{where}: {strategy}")
    return found


def _own_parameters(strategy: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's values for a strategy, under the names that they have now.

    A switch that is off and that the strategy does not have is left out; old tables have such.
    """
    known = {name for spec in STRATEGIES.values() for name in spec.parameters}
    own = find_strategy(strategy).parameters
    return {
        name: value
        for name, value in with_new_names(values).items()
        if name in own or name not in known or value is not False
    }


def parse_settings(settings: Sequence[str], strategies: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parse `streaming.segment_size=48`, or `segment_size=48` for all strategies that take it.

    Raises ValueError for a text of another form, a strategy that is not run, or a setting without
    effect.
    """
    found: dict[str, dict[str, str]] = {strategy: {} for strategy in strategies}
    for setting in settings:
        name, equals, value = setting.partition("=")
        strategy, dot, key = name.rpartition(".")
        key = new_name(key)
        if not equals or not key or (dot and strategy not in found):
            raise ValueError(
                f"--set {setting!a}: give strategy.key=value, of {', '.join(strategies)}, or "
                "key=value for all of them"
            )
        if dot or len(strategies) == 1:
            check_parameter(strategy or strategies[0], key, where=f"--set {setting!a}")
        takers = [one for one in strategies if key in find_strategy(one).parameters]
        if not takers:
            raise ValueError(f"--set {setting!a}: {key} is no parameter of {', '.join(strategies)}")
        for one in (strategy,) if dot else takers:
            found[one][key] = value
    return found


def make_cases(
    strategies: Sequence[str],
    drafters: Sequence[str],
    table: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    options: str = "--set",
) -> tuple[Case, ...]:
    """Every strategy with every drafter (`eagle+merge` switches merging on); ar needs none.

    `options` names the flag of the settings. Raises ValueError that names what is unknown, before
    anything is loaded.
    """
    cases = []
    for strategy in strategies:
        for drafter in drafters if find_strategy(strategy).drafts else ("none",):
            name, switches = parse_drafter(drafter)
            if name == "none" and find_strategy(strategy).drafts:
                raise ValueError(f"strategy {strategy} needs a drafter; only ar needs none")
            on = {switch: True for switch, is_on in switches.items() if is_on}
            values = {**table.get(strategy, {}), **on, **settings.get(strategy, {})}
            where = f"strategy {strategy}"
            if settings.get(strategy):
                where = f"{options}, {where}"  # the table by itself has been checked
            effective = strategy_config(strategy, values, where=where)
            cases.append(Case(strategy, current_drafter(drafter), effective.model_dump()))
    return tuple(cases)
