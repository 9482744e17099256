"""`--run-config FILE`: options of a command from a file of plain assignments.

The names are those of `config/run_config.py` in FlowSpec's published repository.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flowspec.config import Config, EngineConfig, NumericsConfig, override
from flowspec.system.assignments import read_assignments
from flowspec.system.bundled import find_bundled

FLAG = "--run-config"
METHODS = {  # names of the published code -> strategies here
    "continuous": "flowspec",
    "naive": "naive_pp",
    "pruned": "pruned_pp",
    "serial": "serial_pp",
}
QUANT = "fp4"  # what `quant` is in the published code


class RunFile(Config):
    """The names to which such a file may assign values."""

    base_model_dir: str = EngineConfig().model  # HF id, or folder of a model or of a split model
    EAGLE_model_path: str = ""  # folder of the draft head
    pipeline_type: str = EngineConfig().strategy  # of run
    pipeline_types: tuple[str, ...] = (EngineConfig().strategy,)  # of bench
    quant: bool = False
    temperature: float = 0.0  # of run
    temperatures: tuple[float, ...] = (0.0,)  # of bench
    max_new_tokens: int = EngineConfig().max_new_tokens
    your_message: str = ""  # what run asks
    dataset_names: tuple[str, ...] = ()  # of bench
    question_begin: int | None = None
    question_end: int | None = None
    num_stage: int | None = None  # processes, with the head
    device: str = EngineConfig().local.device  # of run


def read_run_file(path: Path) -> RunFile:
    """Read and check the file. Raises ValueError that names the file, and the line or name."""
    path = find_bundled(path)
    found = override(RunFile(), read_assignments(path), where=str(path))
    quantization = QUANT if found.quant else "none"
    override(NumericsConfig(), {"quantization": quantization}, where=f"{path}: quant")
    if found.num_stage is not None and found.num_stage < 2:
        raise ValueError(f"{path}: num_stage counts the head too: 2 or more, not {found.num_stage}")
    return found


def options_of(command: str, file: RunFile) -> dict[str, str]:
    """Return the options of `run` or of `bench` that the file stands for."""
    found = {"--model": file.base_model_dir, "--draft": file.EAGLE_model_path}
    found["--stages"] = "" if file.num_stage is None else str(file.num_stage - 1)
    if command == "bench":
        found["--strategies"] = ",".join(METHODS.get(one, one) for one in file.pipeline_types)
        found["--temperatures"] = ",".join(f"{one:g}" for one in file.temperatures)
        found["--max-tokens"] = str(file.max_new_tokens)
        found["--datasets"] = ",".join(file.dataset_names)
        if file.question_begin is not None or file.question_end is not None:
            first, last = file.question_begin or 0, file.question_end
            found["--questions"] = f"{first}:{'' if last is None else last}"
    else:
        found["--strategy"] = METHODS.get(file.pipeline_type, file.pipeline_type)
        found["--temperature"] = f"{file.temperature:g}"
        found["--max-new-tokens"] = str(file.max_new_tokens)
        found["--prompt"] = file.your_message
        found["--device"] = file.device
    return {flag: value for flag, value in found.items() if value}


def expanded(command: str, words: Sequence[str], same: Mapping[str, str]) -> list[str]:
    """Return a command line with the options of its `--run-config`; given options win.

    `same` maps every flag of an option to one of them, so that short and long forms are the same.
    """
    words = list(words)
    flags = [word.partition("=")[0] for word in words]
    if FLAG not in flags:
        return words
    at = flags.index(FLAG)
    _, equals, name = words[at].partition("=")
    if not equals and at + 1 == len(words):
        return words  # the command says that a value is missing
    rest = words[:at] + words[at + (1 if equals else 2) :]
    given = {same.get(flag, flag) for flag in flags}
    options = options_of(command, read_run_file(Path(name if equals else words[at + 1])))
    file = [
        f"{flag}={value}" for flag, value in options.items() if same.get(flag, flag) not in given
    ]
    return [*file, *rest]
