"""Code that the benchmark commands share: it makes a plan from options and runs it."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from flowspec.bench.datasets import DATASETS, check_datasets, load_dataset, parse_range
from flowspec.bench.experiment import Case, Plan
from flowspec.bench.prompts import Prompt
from flowspec.bench.provenance import code_hash, folder_hash, revision
from flowspec.bench.records import SampleFile
from flowspec.bench.runner import Bench, RunOutcome, RunProgress, run_plan
from flowspec.cli.common import count_stages, draft_folder, split_folder
from flowspec.cli.ui.progress import shown
from flowspec.config import EngineConfig, new_name, tell_renamed
from flowspec.cost_model.emulation import Emulation
from flowspec.cost_model.profiles import is_profile
from flowspec.engine.build import max_context
from flowspec.engine.local import check_files_for
from flowspec.model.architecture import read_config
from flowspec.request import ClusterError, SamplingParams
from flowspec.system import signals
from flowspec.tokenizer import PromptError
from flowspec.weights.manifest import HEAD_FOLDER, read_manifest

LOCAL = "local"  # name of the cluster of real processes on this machine


def assemble(
    cases: Sequence[Case],
    emulations: Mapping[str, Emulation],
    *,
    datasets: Mapping[str, Sequence[Prompt]],
    temperatures: tuple[float, ...],
    seeds: tuple[int, ...],
    max_tokens: int,
    table: str,
    stages: int | None,
    target: str | None,
    draft: Sequence[str],
    context: int = 0,
) -> Plan:
    """Make a plan; split the model if that has not been done yet.

    Without `emulations` the plan is for real processes. `target` and `draft` are the values of
    `--model` and `--draft` of `flowspec bench`.
    """
    config = EngineConfig(model=target or EngineConfig().model, stages=stages, context=context)
    drafts = _draft_folders(config, cases, draft)
    if not emulations:
        check_files_for(count_stages(config))
    folder = split_folder(config)
    manifest = read_manifest(folder)
    max_context(
        context, read_config(folder / HEAD_FOLDER)
    )  # warns here, because the jobs are silent
    emulation = emulations.get("none")
    return Plan(
        cluster=emulation.cluster.name if emulation else LOCAL,
        model=emulation.model.name if emulation else manifest.model_id,
        table=table,
        stages=len(manifest.layers),
        cases=tuple(cases),
        datasets=datasets,
        temperatures=temperatures,
        seeds=seeds,
        max_tokens=max_tokens,
        context=context,
        target=folder,
        drafts=drafts,
        emulations=emulations,
        real=emulation is None,
        sources={
            "code": code_hash(),
            "target": manifest.model_hash,
            "revision": revision(),
            **{name: folder_hash(Path(where)) for name, where in drafts.items() if where},
        },
    )


def models_of(model: str | None, emulated: str | None) -> tuple[str | None, str | None]:
    """Return the model that computes and the emulated one, which `--model` named in the past."""
    if model and not emulated and not Path(model).is_dir() and is_profile("models", model):
        tell_renamed(f"--model {model}, of an emulated model,", "--emulated-model")
        return None, model
    return model, emulated


def names_in(text: str, option: str) -> tuple[str, ...]:
    """Parse distinct names with commas between them. Raises ValueError."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{option} takes different names with commas, not {text!r}")
    return names


def strategies_in(text: str) -> tuple[str, ...]:
    """Parse `--strategies`; old names become the new ones. Raises ValueError."""
    return tuple(map(new_name, names_in(text, "--strategies")))


def numbers_in(text: str, kind: type, option: str) -> tuple:  # type: ignore[type-arg]
    """Parse distinct numbers with commas between them. Raises ValueError."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas, not {text!r}") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} names a number twice: {text}")
    return numbers


def check_sampling(temperatures: Sequence[float], seeds: Sequence[int]) -> None:
    """Raise ValueError for a temperature or a seed that is out of range."""
    for temperature in temperatures:
        SamplingParams(temperature=temperature)
    for seed in seeds:
        SamplingParams(seed=seed)


def load_sets(
    datasets: str,
    data_dir: Path | None,
    questions: str,
    limit: int | None,
    *,
    few: int | None = None,
) -> Mapping[str, Sequence[Prompt]]:
    """Return the questions by set; without a range or a limit, `few` of each known set.

    Raises ValueError for a set that does not exist, before anything is downloaded.
    """
    names = DATASETS if datasets == "all" else names_in(datasets, "--datasets")
    chosen = parse_range(questions)
    check_datasets(names, data_dir=data_dir)
    loaded: dict[str, Sequence[Prompt]] = {}
    for name in names:
        most = few if name in DATASETS and not (questions or limit) else limit
        prompts = load_dataset(name, data_dir=data_dir, chosen=chosen, limit=most)
        source = prompts[0].source
        if source in loaded:
            raise ValueError(f"--datasets: two sets are called {source}; rename a file")
        loaded[source] = prompts
    return loaded


def _draft_folders(
    config: EngineConfig, cases: Sequence[Case], given: Sequence[str]
) -> dict[str, str]:
    """Return the folder of each drafter's model, as given or as bundled."""
    names = sorted({case.drafter_name for case in cases} - {"none"})
    folders = dict.fromkeys(names, "")
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals and len(folders) <= 1:
            folders |= dict.fromkeys(names, text)  # empty if only ar runs, which needs none
        elif equals and name in folders:
            folders[name] = folder
        else:
            raise ValueError(f"--draft {text!r}: give DRAFTER=FOLDER, of {', '.join(folders)}")
    return {
        name: draft_folder(config.changed(drafter=name, draft=folder))
        for name, folder in folders.items()
    }


def run_shown(
    plan: Plan, out: Path, jobs: int | None, *, what: str = "", bench: Bench | None = None
) -> RunOutcome:
    """Run what is missing in folder `out` and show the progress with the label `what`.

    If the run ends early, a line on stderr says how many samples are kept.
    """
    with SampleFile(out) as file:

        def kept() -> str:
            goes_on = f"{len(file)} samples are in {out}; the same command runs what is missing"
            return goes_on if len(file) else ""

        try:
            console = Console(stderr=True)
            with signals.farewell(kept), shown(console, "samples", what=what) as tell:

                def step(now: RunProgress) -> None:
                    tell(now.done, now.total, now.now)

                jobs = jobs or len(os.sched_getaffinity(0))
                return run_plan(plan, file, jobs=jobs, tell=step, bench=bench)
        except (ClusterError, PromptError, signals.EndedBySignal):
            if text := kept():
                print(text, file=sys.stderr, flush=True)
            raise
