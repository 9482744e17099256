"""YAML as configuration needs it: plain values in shallow mappings and lists.

Aliases let a file of a few lines stand for gigabytes, or hold itself; nesting exhausts the stack;
tags ask for types that no setting has. All three are refused while the file is read.
"""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 65536
MAX_DEPTH = 8


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, if it is plain."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # an alias names its anchor too
            raise yaml.YAMLError("anchors and aliases are not supported; write the value out")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"the tag {event.tag} is not supported; write a plain value")
        if self._depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


def parse_yaml(text: str, *, where: str) -> Any:
    """The value in `text`. Raises ValueError naming `where`."""
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # dates that do not exist and numbers too long to be read are plain ValueErrors
        raise ValueError(f"{where} is not YAML: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    """PyYAML's errors are spread over many, with the text between them."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = getattr(error, "problem", "") or "cannot be read"
    context = getattr(error, "context", "") or ""
    begun = getattr(error, "context_mark", None)
    if context and begun is not None:
        context = f", {context} that begins in line {begun.line + 1}, column {begun.column + 1}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{context}"


def read_yaml(path: Path) -> Any:
    """The value in a file. Raises ValueError naming it: missing, too large or damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; is it a configuration?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    return parse_yaml(text, where=str(path))
