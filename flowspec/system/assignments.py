"""Reading a Python file of plain assignments without executing it."""

import ast
from pathlib import Path
from typing import Any

from flowspec.system.config_file import read_config_text

ALLOWED = "plain assignments alone: NAME = a number, text, True, False, None, or a list of these"


def read_assignments(path: Path) -> dict[str, Any]:
    """The values that a file gives to names. Nothing in it is run, annotations are left unread.

    Raises ValueError naming file and line for anything else than an assignment of a literal.
    """
    found: dict[str, Any] = {}
    for node in _parse(path).body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring, or nothing that counts
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target: ast.expr = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        else:
            raise ValueError(f"{where}: {_kind(node)} is not allowed; {ALLOWED}")
        if not isinstance(target, ast.Name) or node.value is None:
            raise ValueError(f"{where}: this is no value for one name; {ALLOWED}")
        if target.id in found:
            raise ValueError(f"{where}: {target.id} has a value already; give it one")
        found[target.id] = _value(node.value, f"{where}: {target.id}")
    return found


def _parse(path: Path) -> ast.Module:
    text = read_config_text(path)
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}; {ALLOWED}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {str(error) or 'nested too deep'}") from None


def _value(node: ast.expr, where: str) -> Any:
    """A literal; a sum or a set is none, though Python's own reader of literals takes some."""
    plain = (ast.Constant, ast.List, ast.Tuple, ast.UnaryOp, ast.UAdd, ast.USub, ast.Load)
    parts = list(ast.walk(node))
    if all(isinstance(part, plain) for part in parts):
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError, MemoryError):
            pass
        else:
            kinds = (str, int, float, bool, type(None))
            constants = [part.value for part in parts if isinstance(part, ast.Constant)]
            if all(isinstance(one, kinds) for one in constants):
                return value
    raise ValueError(f"{where} must be written out; {ALLOWED}")


def _kind(node: ast.stmt) -> str:
    names = {"ImportFrom": "an import", "Import": "an import", "ClassDef": "a class"}
    names |= {"FunctionDef": "a function", "If": "an if", "For": "a loop", "Expr": "an expression"}
    return names.get(type(node).__name__, f"a statement ({type(node).__name__})")
