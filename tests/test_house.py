"""The house rules: imports, forbidden content, names, and the length of functions."""

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowspec"
MAX_BODY_LINES = 60  # of a function; the arguments of a command are its help, and not counted
MAX_WRAPPER_LINES = 25

# Landmarks and families by height; a module imports lower levels and its own family only.
LEVELS: dict[str, int] = {
    "flowspec": 0,  # __init__: the version
    "flowspec.system": 1,
    "flowspec.request": 1,
    "flowspec.config": 2,
    "flowspec.tokenizer": 2,
    "flowspec.protocol": 3,
    "flowspec.transport": 4,
    "flowspec.runtime": 5,
    "flowspec.model": 5,
    "flowspec.cost_model": 6,
    "flowspec.weights": 6,
    "flowspec.tracing": 6,
    "flowspec.speculation": 7,
    "flowspec.head.calibration": 8,  # what a strategy sees of its request lies below it
    "flowspec.head.losses": 8,
    "flowspec.head.pipeline": 8,
    "flowspec.head.request_state": 9,
    "flowspec.speculation.strategies": 10,
    "flowspec.head": 11,
    "flowspec.stage": 11,
    "flowspec.simulator": 12,
    "flowspec.engine.build": 13,  # puts head and stage together, also for a cluster's
    "flowspec.cluster": 14,
    "flowspec.engine": 15,
    "flowspec.cluster.controller": 16,  # a server for clients: a client of the engine itself
    "flowspec.llm": 16,
    "flowspec.bench": 16,
    "flowspec.training": 17,
    "flowspec.cli": 18,
    "flowspec.__main__": 19,
}
CORE_FAMILIES = (
    "flowspec.speculation.strategies",
    "flowspec.speculation.drafters",
    "flowspec.speculation.acceptance",
    "flowspec.speculation.processors",
)
CORES = (
    "flowspec.head.head",
    "flowspec.stage.stage",
    "flowspec.stage.stage_request_state",
    "flowspec.stage.executor",
    "flowspec.stage.sampler",
    "flowspec.stage.verifier",
    "flowspec.head.request_state",
    "flowspec.head.pipeline",
    "flowspec.head.scheduler",
    "flowspec.head.prefix_cache",
    "flowspec.head.losses",
    "flowspec.head.calibration",
    "flowspec.head.drafting",
    "flowspec.speculation.strategy",
    "flowspec.speculation.tree",
    "flowspec.protocol.messages",
    "flowspec.protocol.codec",
    "flowspec.runtime.core",
    "flowspec.runtime.failures",
    "flowspec.protocol.sequencing",
    "flowspec.model.backend",
    "flowspec.model.kv_cache",
    "flowspec.model.linear",
    "flowspec.model.stage_model",
    "flowspec.model.attention_metadata",
    "flowspec.model.llama",
    "flowspec.model.rope",
    "flowspec.speculation.drafters.eagle.network",
    "flowspec.speculation.drafters.eagle3.network",
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
    """Return every Python file below these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Return a path's module: flowspec/model/rope.py -> flowspec.model.rope."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


DATA = PACKAGE / "data"  # files that come with the package; what is Python there is read, not run
MODULES = {
    module_name(path): path for path in python_files("flowspec") if not path.is_relative_to(DATA)
}


@cache
def syntax(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text(), str(path))


@cache
def imports(module: str) -> frozenset[str]:
    """Return the dotted names that a module imports, anywhere in it; for flowspec, of modules.

    Imports for type checkers alone do not happen and are left out.
    """
    found: set[str] = set()
    tree = syntax(MODULES[module])
    unreal = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for branch in node.body
        for inner in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in unreal:
            continue
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
    """Return `module` and all flowspec modules that it imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(used for used in imports(name) if used in MODULES)
    return seen


def family(module: str) -> str:
    """Return the longest entry of LEVELS that holds the module."""
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
    """Yield every call in a file with the dotted name that it is written with."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def core_modules() -> list[str]:
    """Return the state machines and all modules that they compute with."""
    families = {m for m in MODULES if any(is_within(m, f) for f in CORE_FAMILIES)}
    # the drafters' table, and what it loads them with, read files
    loads = re.compile(r"flowspec\.speculation\.drafters(\.checkpoint.*|\.eagle3?\.load)?")
    return sorted(m for m in {*CORES, *families} if not loads.fullmatch(m))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    """The layers are the architecture; an import upwards would undo them."""
    own = family(module)
    for used in imports(module):
        if used in MODULES and (other := family(used)) != own:
            assert LEVELS[other] < LEVELS[own], f"{module} must not import {used}"


def test_imports_have_no_cycle() -> None:
    """Even within a family, a module can be read after those that it imports."""
    for module in MODULES:
        for used in imports(module):
            if used in MODULES and used != module:
                assert module not in reaches(used), f"{module} and {used} import one another"


@pytest.mark.parametrize("module", core_modules())
def test_cores_do_no_input_or_output(module: str) -> None:
    """A core and its imports have no socket, thread, sleep, wall clock or random source."""
    for reached in reaches(module):
        for used in imports(reached):
            assert not any(is_within(used, bad) for bad in NOT_IN_CORES), (
                f"{module} reaches {reached}, which imports {used}"
            )


def test_simulator_knows_cores_by_their_interface() -> None:
    """The scheduler of the cores must not know what they are; two modules put them together."""
    together = {"flowspec.engine.simulated", "flowspec.simulator.ablated"}
    known = ("protocol", "request", "runtime", "system.bundled", "transport.link_occupancy")
    for module in MODULES:
        if is_within(module, "flowspec.simulator") and module not in together:
            own = {used for used in imports(module) if used in MODULES}
            others = {used for used in own if not is_within(used, "flowspec.simulator")}
            bad = {
                used for used in others if not any(is_within(used, f"flowspec.{k}") for k in known)
            }
            assert not bad, f"{module} imports {sorted(bad)}"


def test_transformers_stay_out_of_the_pure_modules() -> None:
    """tree, messages, request and acceptance run where transformers is not installed."""
    pure = [m for m in MODULES if is_within(m, "flowspec.speculation.acceptance")]
    for module in [
        *pure,
        "flowspec.speculation.tree",
        "flowspec.protocol.messages",
        "flowspec.request",
    ]:
        for reached in reaches(module):
            assert not any(is_within(used, "transformers") for used in imports(reached)), module


def test_stage_knows_its_layers_by_the_seam() -> None:
    """What computes them is behind flowspec.model.backend; the table alone loads a backend."""
    for module in MODULES:
        if is_within(module, "flowspec.stage") and module != "flowspec.stage.backends":
            used = {name for name in imports(module) if is_within(name, "flowspec.model")}
            assert used <= {"flowspec.model.backend"}, f"{module} imports {sorted(used)}"
            assert "flowspec.stage.backends" not in imports(module), module


# the module of a seam's table, the table, and the contract test that runs over its rows
SEAMS = (
    ("flowspec.model.linear", "QUANTIZATIONS", "test_linear_method"),
    ("flowspec.stage.backends", "BACKENDS", "test_stage_backend"),
    ("flowspec.speculation.processors", "PROCESSORS", "test_logits_processor"),
    ("flowspec.speculation.acceptance", "RULES", "test_acceptance_rule"),
    ("flowspec.weights.formats", "FORMATS", "test_checkpoint_format"),
)


@pytest.mark.parametrize(("module", "table", "contract"), SEAMS)
def test_a_table_has_its_contract(module: str, table: str, contract: str) -> None:
    """A new row is tested by being one; the table is typed by the seam's protocol."""
    found = meanings(ROOT / "tests" / "contracts" / f"{contract}.py")
    assert found.get(table) == f"{module}.{table}", f"{contract} does not run over {table}"
    assert f"`{contract}.py`" in (ROOT / "docs" / "architecture.md").read_text()
    names = [n.target for n in syntax(MODULES[module]).body if isinstance(n, ast.AnnAssign)]
    assert table in [ast.unparse(name) for name in names], f"{module}.{table} has no type"


def test_stage_knows_no_head() -> None:
    """A stage is a filter: it imports no tree, strategy or drafter, even indirectly."""
    for reached in reaches("flowspec.stage.stage"):
        for bad in ("speculation.tree", "speculation.strategies", "speculation.drafters", "head"):
            assert not is_within(reached, f"flowspec.{bad}"), f"stage reaches {reached}"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("zmq", "flowspec.transport"),
        ("torch.distributed", "flowspec.transport"),
        ("bitsandbytes", "flowspec.model.quantize"),
        ("typer", "flowspec.cli"),
        ("rich", "flowspec.cli"),
        ("gguf", "flowspec.weights.formats.gguf"),
    ],
)
def test_package_is_imported_at_home_alone(package: str, home: str) -> None:
    """A package that can be swapped is imported in one place."""
    for module in MODULES:
        if not is_within(module, home):
            assert not any(is_within(used, package) for used in imports(module)), module


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cli_prints(module: str) -> None:
    """Only the command line talks to a person; other modules log or return."""
    if not is_within(module, "flowspec.cli"):
        assert "print" not in {name for name, _ in calls(MODULES[module])}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_executes_data(module: str) -> None:
    """No pickle, eval, exec or shell is used; torch.load reads only weights."""
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


def meanings(path: Path) -> dict[str, str]:
    """Return the names that a file binds by imports, functions and classes, with their origin."""
    found = {}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in syntax(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = f"{module_name(path)}.{node.name}"
    return found


def origin(called: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name of what is called."""
    first, dot, rest = ast.unparse(called).partition(".")
    known = names.get(first) or (f"builtins.{first}" if hasattr(builtins, first) else first)
    return f"{known}{dot}{rest}"


# What an assert may call: these compute and change nothing. `python -O` leaves asserts out.
PURE = {
    *("builtins.isinstance", "builtins.len", "builtins.min", "builtins.all", "builtins.set"),
    *("builtins.id", "dataclasses.fields", "torch.equal"),
    "flowspec.training.eagle3_from_eagle.doubled",
    "flowspec.training.fast_eagle3.vocabulary",
    "flowspec.transport.link_occupancy.Egress.next_end",
}


@pytest.mark.parametrize(
    "path", python_files("flowspec", "scripts"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_assert_has_an_effect(path: Path) -> None:
    """The program does the same without asserts."""
    effects = ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom
    names = meanings(path)
    classes = [node for node in ast.walk(syntax(path)) if isinstance(node, ast.ClassDef)]
    owners = {id(inner): names.get(one.name, "") for one in classes for inner in ast.walk(one)}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Assert):
            for part in ast.walk(node):
                assert not isinstance(part, effects), f"line {node.lineno}: an effect in an assert"
                if isinstance(part, ast.Call):
                    name = origin(part.func, {**names, "self": owners.get(id(part), "self")})
                    assert name in PURE, f"line {node.lineno}: {name} may have an effect"


@pytest.mark.parametrize(
    "path", python_files("flowspec", "scripts"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_docstrings_may_be_missing(path: Path) -> None:
    """`python -OO` has no docstrings, so programs must not depend on them."""
    guarded = {
        id(node.values[0])
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)
    }
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("__doc__"):
            assert id(node.value) in guarded, f"line {node.lineno}: {ast.unparse(node)}"


def pickle_uses(module: str) -> set[str]:
    """Return everything that a module takes from pickle."""
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


# Families whose docstrings have been rewritten as plain sentences.
PLAIN = (
    *("system", "runtime", "transport", "weights", "tracing", "cost_model", "simulator"),
    *("training", "bench", "cli", "cluster.membership", "cluster.device"),
    *("cluster.doctor", "cluster.discovery", "cluster.hosts", "cluster.network"),
    *("head", "stage", "model", "speculation", "protocol", "engine", "cluster.controller"),
    *("request", "config", "tokenizer", "llm"),
)
NOT_PLAIN = (  # modules of these families that are still to be rewritten
    "bench.statistics",
    *("cluster.device.power", "cluster.device.memory", "transport.secure.door"),
)


def first_lines(module: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and first line of every docstring in a module."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(syntax(MODULES[module])):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text.splitlines()[0]


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if any(is_within(module, f"flowspec.{name}") for name in PLAIN)
        and not any(is_within(module, f"flowspec.{name}") for name in NOT_PLAIN)
    ],
)
def test_docstrings_begin_with_a_sentence(module: str) -> None:
    """The first sentence stands alone on the first line, and is no reference or fragment."""
    for line, text in first_lines(module):
        assert text.endswith((".", "?", ":")), f"line {line}: the first line is no sentence: {text}"
        fragment = re.match(r"(See|Of|As|By|From|Until|Also|And|But|Where) ", text)
        assert not fragment, f"line {line}: write a plain sentence: {text}"


def test_class_names_are_unique() -> None:
    """A class name, private ones included, means one thing in the whole package."""
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{module} line {node.lineno}")
    repeated = {name: found for name, found in places.items() if len(found) > 1}
    assert not repeated, f"rename one of each: {repeated}"


@pytest.mark.parametrize(
    "name",
    [
        "split_and_save_models.py",
        "run_pipe.sh",
        "run_eval.sh",
        "run_pipe_eval.sh",
        "run_jetson.sh",
        "scripts/run_eval.sh",
    ],
)
def test_wrappers_are_thin(name: str) -> None:
    """The entry points of the paper's repository are kept; their code is in the package."""
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= MAX_WRAPPER_LINES
    assert not re.search(r"^\s*class\s", text, re.MULTILINE)


@pytest.mark.parametrize("folder", ["benchmarks", "config", "scripts", "tp"])
def test_no_package_outside_the_package(folder: str) -> None:
    """These folders hold data and wrappers; library code is in flowspec."""
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_no_absolute_home_paths() -> None:
    """The files work on any machine."""
    pattern = re.compile(r"/(?:home|Users)/[A-Za-z]|/roo[t]/|/wor[k]/(?:main|shared)|C:\\Users")
    kinds = {".py", ".sh", ".yaml", ".yml", ".md", ".toml", ".txt", ".json", ".cfg"}
    folders = ("flowspec", "benchmarks", "scripts", "tests", "config", "tp", "docs", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    for path in files:
        if path.suffix in kinds:
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)} holds {found}"
