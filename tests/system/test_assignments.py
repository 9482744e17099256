"""A file of plain assignments is read, never executed; all else is refused by its line."""

from pathlib import Path

import pytest

from flowspec.system.assignments import read_assignments
from flowspec.system.config_file import MAX_BYTES


def read(tmp_path: Path, text: str | bytes) -> dict[str, object]:
    """Of a file with this content."""
    path = tmp_path / "some.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_assignments(path)


def test_literals_are_read(tmp_path: Path) -> None:
    """With annotations, which nobody evaluates, and comments."""
    text = (
        '"""What it is."""\n'
        "a = 'text'  # of it\n"
        "b: launch_missiles() = [1, -2.5, True, None, ('x',)]\n"
        "c = (\n    1,\n    2,\n)\n"
    )
    assert read(tmp_path, text) == {"a": "text", "b": [1, -2.5, True, None, ("x",)], "c": (1, 2)}
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nimport os", "line 2: an import is not allowed; plain assignments alone"),
        ("from os import path", "line 1: an import is not allowed"),
        ("a = 1\n\nclass Config:\n    b = 2", "line 3: a class is not allowed"),
        ("if True:\n    a = 1", "line 1: an if is not allowed"),
        ("def f(): pass", "line 1: a function is not allowed"),
        ("print(1)", "line 1: an expression is not allowed"),
        ("a += 1", "AugAssign"),
        ("a = b = 1", "line 1"),
        ("a, b = 1, 2", "line 1: this is no value for one name"),
        ("a.b = 1", "line 1: this is no value for one name"),
        ("a: int", "line 1: this is no value for one name"),
        ("a = 1\na = 2", "line 2: a has a value already"),
        ("a = open('x')", "line 1: a must be written out"),
        ("a = 1 + 2", "line 1: a must be written out"),
        ("a = 9 ** 9 ** 9", "line 1: a must be written out"),
        ("a = f'{1}'", "line 1: a must be written out"),
        ("a = {1: 2}", "line 1: a must be written out"),
        ("a = b'bytes'", "line 1: a must be written out"),
        ("a = 1j", "line 1: a must be written out"),
        ("a = -'x'", "line 1: a must be written out"),
        ("a = [x for x in 'ab']", "line 1: a must be written out"),
        ("a = 1\nb = (", "line 2: .*plain assignments alone"),
        ("a = " + "9" * 5000, "some.py"),
        ("a = " + "(" * 300 + ")" * 300, "some.py"),
        ("a = " + "-" * 20000 + "1", "some.py"),
        ("#" * (MAX_BYTES + 1), "larger than"),
        ("a = '\0'", "some.py"),
        (b"a = '\xff'", "some.py"),
    ],
)
def test_all_else_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    """In one line that says what is allowed."""
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, text)
    assert "some.py" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """And a folder is no file."""
    with pytest.raises(ValueError, match=r"none\.py does not exist"):
        read_assignments(tmp_path / "none.py")
    with pytest.raises(ValueError, match="cannot be read"):
        read_assignments(tmp_path)
