"""RoPE scaling: the ways in which a model extends its rotary positions beyond its training.

Each type has its parameters and its formula over the base frequencies [d/2] (d head dimension).
`attention_factor` multiplies rotated queries and keys. `context_length` is the number of positions
that the scaled model was made for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowspec.model.config_fields import flag, positive_number, whole_number, without_empty

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Type `linear`: positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def context_length(self, max_positions: int) -> int:
        """Return the scaled length; `max_position_embeddings` is the length before scaling."""
        return int(max_positions * self.factor)

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies [d/2]."""
        del theta
        return frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Type `llama3` (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def context_length(self, max_positions: int) -> int:
        """Return `max_positions`: `max_position_embeddings` is that of the scaled model."""
        return max_positions

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Divide low frequencies by `factor`, keep high ones, and blend those between."""
        del theta
        turns = self.original_max_position_embeddings * frequencies / (2 * torch.pi)
        span = self.high_freq_factor - self.low_freq_factor
        if span > 0:
            keep = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
        else:  # there is nothing to blend between equal borders
            keep = (turns >= self.low_freq_factor).to(frequencies.dtype)
        return keep * frequencies + (1.0 - keep) * frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """Type `yarn` (arXiv 2309.00071): stretched by dimension, between two numbers of turns."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def context_length(self, max_positions: int) -> int:
        """Return the scaled length from the parameters; `max_positions` is not used."""
        del max_positions
        return int(self.original_max_position_embeddings * self.factor)

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Keep dimensions that turn over `beta_fast` times; scale those below `beta_slow` turns."""
        dim = 2 * len(frequencies)
        low = self._dimension(self.beta_fast, dim, theta)
        high = self._dimension(self.beta_slow, dim, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # The published code widens an empty span so; the border dimensions depend on it.
        span = (high - low) or 0.001
        index = torch.arange(len(frequencies), device=frequencies.device).float()
        stretch = ((index - low) / span).clamp(0.0, 1.0)
        return (1.0 - stretch) * frequencies + stretch * frequencies / self.factor

    def _dimension(self, turns: float, dim: int, theta: float) -> float:
        """Return the dimension that turns `turns` times over the original context."""
        waves = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(waves) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorsRopeScaling:
    """Type `factors`: each base frequency is divided by a number of its own.

    GGUF files store the result of `llama3` so; no config.json of transformers has this type.
    """

    factors: tuple[float, ...]  # [d/2]
    attention_factor: ClassVar[float] = 1.0

    def context_length(self, max_positions: int) -> int:
        """`max_position_embeddings` is that of the stretched model."""
        return max_positions

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies [d/2] -> [d/2]."""
        del theta
        return frequencies / torch.tensor(self.factors, device=frequencies.device)


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling | FactorsRopeScaling
Warn = Callable[[str], None]

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", _ORIGINAL),  # the second changes nothing there
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", _ORIGINAL, "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
        "finetuned",  # says how the model came about
    ),
    "factors": ("factors",),
}
_NEEDED = {  # keys without a default, and what to write
    "factor": "a number from 1: the stretched context over the one before, such as 4.0",
    "low_freq_factor": "a number above 0, such as 1.0 of Llama 3.1",
    "high_freq_factor": "a number above low_freq_factor, such as 4.0 of Llama 3.1",
}


def read_rope(
    hf: Mapping[str, Any], *, max_positions: int, warn: Warn
) -> tuple[float, RopeScaling | None]:
    """Return base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (before).

    `max_positions` is the config's `max_position_embeddings`. If transformers goes on with a
    warning, so does this with transformers' result, and `warn` is told. Raises ValueError naming a
    type or key that is unknown, missing or out of range.
    """
    block, rope = _parameters(hf, warn)
    theta = positive_number({"rope_theta": hf.get("rope_theta"), **rope}, "rope_theta", 10000.0)
    rope.pop("rope_theta", None)
    kind = _type(rope, warn)
    for key in sorted(rope.keys() - set(_KEYS[kind])):
        warn(f"the RoPE block: {_unused(key, kind)}")
        del rope[key]
    if kind in ("default", "factors"):
        return theta, _read_factors(rope, block) if rope else None
    if kind != "linear":
        _settle_original(rope, hf, max_positions, warn)
        ratio = max_positions / whole_number(rope, _ORIGINAL)
        if kind == "yarn" and "factor" not in rope and ratio != 1:
            rope["factor"] = ratio
            warn(f"the RoPE block has no factor; {ratio:g}, max_position_embeddings over "
                 f"{_ORIGINAL}, is taken")  # fmt: skip
    for key in _KEYS[kind]:
        if key in _NEEDED and key not in rope:
            raise ValueError(
                f"config.json: {block}.{key} is missing, which rope_type {kind!r} needs; write "
                f"{_NEEDED[key]}"
            )
    if (factor := positive_number(rope, "factor", block=block)) < 1:
        warn(f"the RoPE block: factor {factor:g} is below 1; it shortens the model's context")
    if kind == "linear":
        return theta, LinearRopeScaling(factor=factor)
    if kind == "llama3":
        return theta, _llama3(rope, block, max_positions, warn)
    return theta, _yarn(rope, block, theta, max_positions, warn)


def _read_factors(rope: Mapping[str, Any], block: str) -> FactorsRopeScaling:
    found = rope.get("factors")
    numbers = found if isinstance(found, list) else []
    if not numbers or not all(type(x) in (int, float) and 0 < x < 1e30 for x in numbers):
        raise ValueError(f"config.json: {block}.factors must be a list of numbers above 0")
    return FactorsRopeScaling(factors=tuple(float(x) for x in numbers))


def _parameters(hf: Mapping[str, Any], warn: Warn) -> tuple[str, dict[str, Any]]:
    """Return the key of the block that counts, and its content without empty values."""
    found: dict[str, dict[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = hf.get(key) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {key} is {part!r}, needed: an object or null")
        found[key] = without_empty(part)
    old, new = found.values()
    if old and new and old != new:
        warn("rope_scaling and rope_parameters differ; rope_scaling is used, so delete the other")
    return ("rope_scaling", old) if old else ("rope_parameters", new)


def _type(rope: dict[str, Any], warn: Warn) -> str:
    """Remove the type from the block and return it. Raises ValueError if it is not supported."""
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    if old not in ("default", kind):
        warn(f"the RoPE block: type is {old!r} and rope_type {kind!r}; rope_type is used")
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("config.json: partial_rotary_factor of RoPE is not supported, only 1")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f"config.json: RoPE type {kind!r} is not supported: {', '.join(_KEYS)}; {_remedy(kind)}"
        )
    layers = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if layers:
        raise ValueError(
            f"config.json: RoPE of its own for {', '.join(map(repr, layers))} is not supported; "
            "needed: one RoPE for all layers"
        )
    return kind


def _remedy(kind: object) -> str:
    """Return what to do about a type that is not supported."""
    if kind == "dynamic":  # it begins to scale beyond the original context
        return "delete rope_scaling to run the model as it is, up to max_position_embeddings tokens"
    if kind in ("longrope", "su"):
        return "its frequencies depend on a text's length; use another checkpoint"
    return "correct rope_type"


def _unused(key: str, kind: str) -> str:
    """Return a sentence on a key that the type does not have, with what may have been meant."""
    near = get_close_matches(key, _KEYS[kind], n=1, cutoff=0.7)
    owners = [name for name, keys in _KEYS.items() if key in keys]
    if near:
        meant = f"the near key is {near[0]}: give that if it is meant, or delete {key}"
    elif owners:
        meant = f"set rope_type to {' or '.join(owners)} if that is meant, or delete it"
    else:
        meant = "delete it"
    return f"{key} means nothing for rope_type {kind!r} and is ignored; {meant}"


def _settle_original(
    rope: dict[str, Any], hf: Mapping[str, Any], max_positions: int, warn: Warn
) -> None:
    """Return the context before scaling: outside of the block, inside it, or the model's."""
    inside, outside = rope.get(_ORIGINAL), hf.get(_ORIGINAL)
    if outside is not None and inside not in (None, outside):
        warn(
            f"{_ORIGINAL} is {outside!r} outside and {inside!r} inside the RoPE block; the one "
            "outside is used, so delete the other"
        )
    stated = inside if outside is None else outside
    rope[_ORIGINAL] = max_positions if stated is None else stated


def _llama3(
    rope: Mapping[str, Any], block: str, max_positions: int, warn: Warn
) -> Llama3RopeScaling:
    original = whole_number(rope, _ORIGINAL)
    if original >= max_positions:
        warn(
            f"the RoPE block: {_ORIGINAL} {original} should be below max_position_embeddings "
            f"{max_positions}"
        )
    low, high = (
        positive_number(rope, key, block=block) for key in ("low_freq_factor", "high_freq_factor")
    )
    if low >= high:
        warn(f"the RoPE block: low_freq_factor {low:g} should be below high_freq_factor {high:g}")
    return Llama3RopeScaling(
        factor=positive_number(rope, "factor", block=block),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _yarn(
    rope: Mapping[str, Any], block: str, theta: float, max_positions: int, warn: Warn
) -> YarnRopeScaling:
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta is {theta}, yarn needs one above 1")
    factor = positive_number(rope, "factor", block=block)
    original = whole_number(rope, _ORIGINAL)
    if max_positions / original not in (1, factor):
        warn(
            f"the RoPE block: factor is {factor:g}, but max_position_embeddings {max_positions} is "
            f"{max_positions / original:g} times {_ORIGINAL} {original}; factor is used"
        )

    def default_factor(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    # Zero or absent means not set, as transformers reads them.
    weights = [rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    attention = default_factor(1.0)
    if len(weights) == 2:
        mscale, all_dim = (
            positive_number(rope, key, block=block) for key in ("mscale", "mscale_all_dim")
        )
        attention = default_factor(mscale) / default_factor(all_dim)
    fast, slow = (
        positive_number({key: rope.get(key) or None}, key, default, block=block)
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        warn(f"the RoPE block: beta_fast {fast:g} should not be below beta_slow {slow:g}")
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=positive_number(rope, "attention_factor", attention, block=block),
        beta_fast=fast,
        beta_slow=slow,
        truncate=flag(rope, "truncate", default=True),
    )
