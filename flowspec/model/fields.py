"""Reading single values of a `config.json`, with one message for each way they can be wrong."""

from collections.abc import Mapping
from typing import Any


def whole_number(
    hf: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1
) -> int:
    """The int under `key`, `default` where it is missing or null; ValueError names the key."""
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"config.json: {key} is {value!r}, needed: a whole number from {least} on")
    return value


def positive_number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number under `key`, `default` where it is missing or null; ValueError names the key."""
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"config.json: {key} is {value!r}, needed: a number above 0")
    return float(value)


def flag(hf: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """The bool under `key`, `default` where it is missing or null; ValueError names the key."""
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}, needed: true or false")
    return default if value is None else value


def token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One token id or a list of them; ValueError names the key."""
    value = hf.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ValueError(f"{key} is {value!r}, needed: a token id or a list of them")
    return tuple(ids)
