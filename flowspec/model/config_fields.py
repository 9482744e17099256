"""Reads single values of a `config.json`, with one message for each way they can be wrong."""

from collections.abc import Mapping
from typing import Any

# Upper limits of sizes, so that shapes do not overflow and layers can be listed.
_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
}
_LARGEST_OTHER = (1 << 31) - 1


def without_empty(hf: Mapping[str, Any], *, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a copy without the keys whose value is null or empty, which count as absent.

    `keep` names keys whose null has a meaning of its own.
    """
    empty: tuple[Any, ...] = (None, "", [], {})
    return {key: value for key, value in hf.items() if key in keep or value not in empty}


def whole_number(
    hf: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1
) -> int:
    """Return the int at `key`, or `default` if missing or null. Raises ValueError naming it."""
    value = hf.get(key)
    value = default if value is None else value
    most = _LARGEST.get(key, _LARGEST_OTHER)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"config.json: {key} is {value!r}, needed: a whole number from {least} to {most}"
        )
    return value


def positive_number(
    hf: Mapping[str, Any], key: str, default: float | None = None, *, block: str = ""
) -> float:
    """Return the number at `key`, or `default` if it is missing or null.

    Raises ValueError naming the key and `block`, the key of the object that holds it.
    """
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        name = f"{block}.{key}" if block else key
        raise ValueError(f"config.json: {name} is {value!r}, needed: a number above 0")
    return float(value)


def flag(hf: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """Return the bool at `key`, or `default` if missing or null. Raises ValueError naming it."""
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}, needed: true or false")
    return default if value is None else value


def token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return one token id or a list of them as a tuple. Raises ValueError naming the key."""
    value = hf.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 31 for i in ids):
        raise ValueError(f"{key} is {value!r}, needed: a token id or a list of them")
    return tuple(ids)
