"""RoPE scaling: the ways in which a model stretches its rotary positions beyond its training.

Each type is its parameters and its formula over the base frequencies [d/2] (d head dimension).
`attention_factor` multiplies rotated queries and keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowspec.model.fields import flag, positive_number, whole_number

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Type `linear`: positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies [d/2] -> [d/2]."""
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

    def __post_init__(self) -> None:
        """ValueError where the two borders are the wrong way round."""
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"config.json: low_freq_factor {self.low_freq_factor} must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Long waves are stretched by `factor`, short ones kept, those between blended."""
        del theta
        turns = self.original_max_position_embeddings * frequencies / (2 * torch.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
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

    def __post_init__(self) -> None:
        """ValueError where the two borders are the wrong way round."""
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"config.json: beta_fast {self.beta_fast} must not be below "
                f"beta_slow {self.beta_slow}"
            )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Dimensions that turn over `beta_fast` times are kept, below `beta_slow` stretched."""
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
        """The dimension that turns `turns` times over the original context."""
        waves = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(waves) / (2 * math.log(theta))


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", _ORIGINAL),  # the second changes nothing there
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", _ORIGINAL, "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
        "finetuned",  # says how the model came about
    ),
}


def read_rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (before).

    Raises ValueError naming the type or key that is unknown, missing or out of range.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = hf.get(key) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {key} is {part!r}, needed: an object or null")
        rope.update({name: value for name, value in part.items() if value is not None})
    theta = positive_number({"rope_theta": hf.get("rope_theta"), **rope}, "rope_theta", 10000.0)
    named_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", named_type)
    rope.pop("rope_theta", None)
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("config.json: partial_rotary_factor of RoPE is not supported, only 1")
    if kind not in _KEYS:
        raise ValueError(f"config.json: RoPE type {kind!r} is not supported: {', '.join(_KEYS)}")
    unknown = set(rope) - set(_KEYS[kind])
    if unknown:
        raise ValueError(
            f"config.json: RoPE keys {sorted(unknown)} mean nothing for rope_type {kind!r}; "
            f"name the type they belong to ({', '.join(_KEYS)}) or remove them"
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(factor=positive_number(rope, "factor"))
    outside = hf.get(_ORIGINAL)
    if outside not in (None, rope.get(_ORIGINAL)):
        raise ValueError(
            f"config.json: {_ORIGINAL} is {outside!r} outside and {rope.get(_ORIGINAL)!r} inside "
            "the RoPE parameters; give it once, inside"
        )
    return theta, _llama3(rope) if kind == "llama3" else _yarn(rope, hf, theta)


def _llama3(rope: Mapping[str, Any]) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=positive_number(rope, "factor"),
        low_freq_factor=positive_number(rope, "low_freq_factor"),
        high_freq_factor=positive_number(rope, "high_freq_factor"),
        original_max_position_embeddings=whole_number(rope, _ORIGINAL),
    )


def _yarn(rope: Mapping[str, Any], hf: Mapping[str, Any], theta: float) -> YarnRopeScaling:
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta is {theta}, yarn needs one above 1")
    factor = positive_number(rope, "factor")

    def default_factor(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    # Zero or absent: not set, as transformers reads them.
    weights = [rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    attention = default_factor(1.0)
    if len(weights) == 2:
        mscale, all_dim = (positive_number(rope, key) for key in ("mscale", "mscale_all_dim"))
        attention = default_factor(mscale) / default_factor(all_dim)
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=whole_number(
            rope, _ORIGINAL, whole_number(hf, "max_position_embeddings", 2048)
        ),
        attention_factor=positive_number(rope, "attention_factor", attention),
        beta_fast=positive_number({"beta_fast": rope.get("beta_fast") or None}, "beta_fast", 32.0),
        beta_slow=positive_number({"beta_slow": rope.get("beta_slow") or None}, "beta_slow", 1.0),
        truncate=flag(rope, "truncate", default=True),
    )
