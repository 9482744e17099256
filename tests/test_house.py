"""The house: who may import whom, what no file may contain, how long a function may be."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowspec"
MAX_BODY_LINES = 85  # of a function; the arguments of a command are its help, and not counted
MAX_WRAPPER_LINES = 25

# Landmarks and families by height; a module imports lower levels and its own family only.
LEVELS: dict[str, int] = {
    "flowspec": 0,  # __init__: the version
    "flowspec.signals": 0,  # of the process: the standard library alone
    "flowspec.latencies": 0,
    "flowspec.bundled": 1,
    "flowspec.files": 1,
    "flowspec.request": 1,
    "flowspec.wire": 2,
    "flowspec.failures": 2,
    "flowspec.codec": 3,
    "flowspec.plain_yaml": 1,
    "flowspec.config": 2,
    "flowspec.effects": 3,
    "flowspec.ports": 3,
    "flowspec.lanes": 4,
    "flowspec.trace": 4,
    "flowspec.tree": 4,
    "flowspec.verifier": 4,
    "flowspec.text": 4,
    "flowspec.tokenizer": 4,
    "flowspec.model": 4,
    "flowspec.transport": 4,
    "flowspec.acceptance": 5,
    "flowspec.calibration": 5,
    "flowspec.drafters": 6,
    "flowspec.targets": 6,
    "flowspec.stage": 7,
    "flowspec.stage_request": 5,
    "flowspec.stage_forward": 6,
    "flowspec.driver": 6,
    "flowspec.simulate": 6,
    "flowspec.pipe": 6,
    "flowspec.session": 7,
    "flowspec.admission": 8,
    "flowspec.strategies": 8,
    "flowspec.batching": 9,
    "flowspec.active": 9,
    "flowspec.drafting": 10,
    "flowspec.head": 11,
    "flowspec.answers": 12,
    "flowspec.engine": 12,
    "flowspec.simulate.ablated": 12,
    "flowspec.simulate.cluster": 13,
    "flowspec.cluster": 13,
    "flowspec.eval": 14,
    "flowspec.server": 14,
    "flowspec.cli": 15,
    "flowspec.__main__": 16,
}
CORE_FAMILIES = ("flowspec.strategies", "flowspec.drafters", "flowspec.acceptance")
CORES = (
    "flowspec.head",
    "flowspec.stage",
    "flowspec.stage_request",
    "flowspec.stage_forward",
    "flowspec.verifier",
    "flowspec.session",
    "flowspec.pipe",
    "flowspec.admission",
    "flowspec.active",
    "flowspec.batching",
    "flowspec.drafting",
    "flowspec.tree",
    "flowspec.wire",
    "flowspec.codec",
    "flowspec.effects",
    "flowspec.failures",
    "flowspec.lanes",
    "flowspec.model.kv_cache",
    "flowspec.model.stage_model",
    "flowspec.model.rows",
    "flowspec.model.llama",
    "flowspec.model.rope",
    "flowspec.model.eagle_net",
    "flowspec.model.eagle3_net",
)
NOT_IN_CORES = (
    "zmq",
    "socket",
    "threading",
    "asyncio",
    "time",
    "datetime",
    "subprocess",
    "random",
    "secrets",
    "multiprocessing",
    "concurrent",
    "queue",
    "torch.distributed",
    "torch.multiprocessing",
)


def python_files(*folders: str) -> list[Path]:
    """Every Python file below these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """flowspec/model/rows.py -> flowspec.model.rows."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files("flowspec")}


@cache
def syntax(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), str(path))


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names of all that a module imports, anywhere in it; for flowspec, of the modules."""
    found: set[str] = set()
    for node in ast.walk(syntax(MODULES[module])):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                outside = not node.module.startswith("flowspec")
                found.add(full if outside or full in MODULES else node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in NOT_IN_CORES:
            found.add(ast.unparse(node))  # torch.distributed needs no import of its own
    return frozenset(found)


def reaches(module: str) -> set[str]:
    """`module` and all flowspec modules it imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(used for used in imports(name) if used in MODULES)
    return seen


def family(module: str) -> str:
    """The longest entry of LEVELS that holds the module."""
    holders = [
        name
        for name in LEVELS
        if module == name or (name != "flowspec" and module.startswith(f"{name}."))
    ]
    assert holders, f"{module} has no place in LEVELS; decide on its layer and add it"
    return max(holders, key=len)


def is_within(name: str, package: str) -> bool:
    """Whether dotted `name` is `package` or in it."""
    return name == package or name.startswith(f"{package}.")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file by the dotted name it is written with."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def core_modules() -> list[str]:
    """The state machines and all that they compute with."""
    families = {m for m in MODULES if any(is_within(m, f) for f in CORE_FAMILIES)}
    # the drafters' table reads files: it loads them
    return sorted({*CORES, *families} - {"flowspec.drafters"})


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    """The layers are the architecture; an import upwards would undo them."""
    own = family(module)
    for used in imports(module):
        if used in MODULES and (other := family(used)) != own:
            assert LEVELS[other] < LEVELS[own], f"{module} must not import {used}"


def test_imports_have_no_cycle() -> None:
    """Within a family too, a module can be read after those it imports."""
    for module in MODULES:
        for used in imports(module):
            if used in MODULES and used != module:
                assert module not in reaches(used), f"{module} and {used} import one another"


@pytest.mark.parametrize("module", core_modules())
def test_cores_do_no_input_or_output(module: str) -> None:
    """No socket, thread, sleep, wall clock or chance in a core, nor in anything it imports."""
    for reached in reaches(module):
        for used in imports(reached):
            assert not any(is_within(used, bad) for bad in NOT_IN_CORES), (
                f"{module} reaches {reached}, which imports {used}"
            )


def test_simulator_knows_cores_by_their_interface() -> None:
    """What schedules the cores must not know what they are; two modules put them together."""
    together = {"flowspec.simulate.cluster", "flowspec.simulate.ablated"}
    known = ("bundled", "effects", "lanes", "wire", "request", "trace", "ports", "plain_yaml")
    allowed = {"flowspec", *(f"flowspec.{name}" for name in known)}
    for module in MODULES:
        if is_within(module, "flowspec.simulate") and module not in together:
            own = {used for used in imports(module) if used in MODULES}
            others = {used for used in own if not is_within(used, "flowspec.simulate")}
            assert others <= allowed, f"{module} imports {sorted(others - allowed)}"


def test_transformers_stay_out_of_the_pure_modules() -> None:
    """tree, wire, request and acceptance run where transformers is not installed."""
    pure = [m for m in MODULES if is_within(m, "flowspec.acceptance")]
    for module in [*pure, "flowspec.tree", "flowspec.wire", "flowspec.request"]:
        for reached in reaches(module):
            assert not any(is_within(used, "transformers") for used in imports(reached)), module


def test_stage_knows_no_head() -> None:
    """A stage is a filter: no tree of the head, no strategy, no drafter, however indirectly."""
    for reached in reaches("flowspec.stage"):
        for bad in ("tree", "strategies", "drafters", "session", "head"):
            assert not is_within(reached, f"flowspec.{bad}"), f"stage reaches {reached}"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("zmq", "flowspec.transport"),
        ("torch.distributed", "flowspec.transport"),
        ("bitsandbytes", "flowspec.model.quantize"),
        ("typer", "flowspec.cli"),
        ("rich", "flowspec.cli"),
    ],
)
def test_package_is_imported_at_home_alone(package: str, home: str) -> None:
    """What can be swapped is known in one place."""
    for module in MODULES:
        if not is_within(module, home):
            assert not any(is_within(used, package) for used in imports(module)), module


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cli_prints(module: str) -> None:
    """Output belongs to whoever talks to a person; the others log or return."""
    if not is_within(module, "flowspec.cli"):
        assert "print" not in {name for name, _ in calls(MODULES[module])}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_executes_data(module: str) -> None:
    """No pickle, eval, exec or shell anywhere; torch.load reads weights and nothing else."""
    for used in imports(module):
        # the error that torch.load(weights_only=True) raises is defined in pickle
        harmless = used == "pickle" and pickle_uses(module) <= {"pickle.UnpicklingError"}
        bad = any(is_within(used, name) for name in ("pickle", "marshal", "shelve", "dill"))
        assert harmless or not bad, f"{module} imports {used}"
    for name, call in calls(MODULES[module]):
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen"), name
        keywords = {kw.arg: ast.unparse(kw.value) for kw in call.keywords}
        assert keywords.get("shell", "False") == "False", f"line {call.lineno}: shell"
        if name.endswith("torch.load"):
            assert keywords.get("weights_only") == "True", f"line {call.lineno}: torch.load"


# What an assert may call: these compute and change nothing. `python -O` leaves asserts out.
PURE = {"isinstance", "len", "min", "all", "set", "id", "bytes", "fields", "self.next_end"}
PURE |= {"encode", "decode", "read_manifest", "part_shapes", "doubled", "vocabulary", "torch.equal"}


@pytest.mark.parametrize(
    "path", python_files("flowspec", "scripts"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_assert_has_an_effect(path: Path) -> None:
    """The same happens without asserts."""
    effects = ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Assert):
            for part in ast.walk(node):
                assert not isinstance(part, effects), f"line {node.lineno}: an effect in an assert"
                if isinstance(part, ast.Call):
                    name = ast.unparse(part.func)
                    assert name in PURE, f"line {node.lineno}: {name} may have an effect"


@pytest.mark.parametrize(
    "path", python_files("flowspec", "scripts"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_docstrings_may_be_missing(path: Path) -> None:
    """`python -OO` has none, so what a program says of itself is not taken from there blindly."""
    guarded = {
        id(node.values[0])
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)
    }
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("__doc__"):
            assert id(node.value) in guarded, f"line {node.lineno}: {ast.unparse(node)}"


def pickle_uses(module: str) -> set[str]:
    """All that a module takes from pickle."""
    names = {ast.unparse(n) for n in ast.walk(syntax(MODULES[module])) if type(n) is ast.Attribute}
    return {name for name in names if name.startswith("pickle.")}


@pytest.mark.parametrize(
    "path",
    python_files("flowspec", "benchmarks", "scripts", "tests"),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_functions_stay_short(path: Path) -> None:
    """A function does one job. A file may be as long as its concept needs."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            assert lines <= MAX_BODY_LINES, f"{node.name}, line {node.lineno}: {lines} lines"


@pytest.mark.parametrize(
    "name", ["split_and_save_models.py", "run_pipe.sh", "run_jetson.sh", "scripts/run_eval.sh"]
)
def test_wrappers_are_thin(name: str) -> None:
    """The entry points of the paper's repository are kept; what they do lives in the package."""
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= MAX_WRAPPER_LINES
    assert not re.search(r"^\s*class\s", text, re.MULTILINE)


@pytest.mark.parametrize("folder", ["benchmarks", "config", "scripts", "tp"])
def test_no_package_outside_the_package(folder: str) -> None:
    """These hold data and wrappers; code with a home is in flowspec."""
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_no_absolute_home_paths() -> None:
    """What runs here runs on any machine."""
    pattern = re.compile(r"/(?:home|Users)/[A-Za-z]|/roo[t]/|/wor[k]/(?:main|shared)|C:\\Users")
    kinds = {".py", ".sh", ".yaml", ".yml", ".md", ".toml", ".txt", ".json", ".cfg"}
    folders = ("flowspec", "benchmarks", "scripts", "tests", "config", "tp", "docs", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    for path in files:
        if path.suffix in kinds:
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)} holds {found}"
