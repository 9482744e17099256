"""Verification: compares every strategy's tokens with the target alone, at the same seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import torch

from flowspec.engine.engine import Engine, generate_all
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request, RequestOutput, SamplingParams
from flowspec.speculation.acceptance.gumbel_coupled import noise_rows
from flowspec.speculation.processors import warp

NEAR_TIE_EPS = 4  # rounding steps of the dtype, relative to the largest logit


@dataclass(slots=True)
class Combination:
    """One row of the report."""

    strategy: str
    drafter: str
    driver: str
    stages: int
    temperature: float
    requests: int = 1  # requests decoded at the same time
    runs: int = 0
    mismatches: int = 0
    near_ties: int = 0
    tokens: int = 0
    verdicts: int = 0
    divergences: list[str] = field(default_factory=list)
    _hash: Any = field(default_factory=sha256)

    def add(self, completion: RequestOutput) -> None:
        """Count a run."""
        self.runs += 1
        self.tokens += completion.stats.num_tokens
        self.verdicts += completion.stats.num_verdicts
        self._hash.update(np.array([len(completion.tokens), *completion.tokens], "<i4").tobytes())

    @property
    def tokens_sha256(self) -> str:
        """Return the hash of all runs' tokens in order (each: their count and ids as i32).

        It is equal on machines with the same models, prompts and seeds, for any strategy, drafter,
        event loop and other requests.
        """
        return str(self._hash.hexdigest())

    @property
    def tau(self) -> float:
        """Return the mean tokens per verdict over all runs."""
        return (self.tokens - self.runs) / self.verdicts if self.verdicts else 0.0

    def as_json(self) -> dict[str, object]:
        """Return the record that --json writes."""
        return {
            "strategy": self.strategy,
            "drafter": self.drafter,
            "driver": self.driver,
            "stages": self.stages,
            "temperature": self.temperature,
            "requests": self.requests,
            "runs": self.runs,
            "mismatches": self.mismatches,
            "near_ties": self.near_ties,
            "tau": round(self.tau, 4),
            "tokens": self.tokens,
            "tokens_sha256": self.tokens_sha256,
            "divergences": self.divergences,
        }


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of two token sequences, with the reference's preference in logits."""

    position: int  # index into the generated tokens
    expected: int | None
    found: int | None
    gap: float
    resolution: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding of this dtype can explain it."""
        return abs(self.gap) < self.resolution

    def __str__(self) -> str:
        kind = "near-tie" if self.is_near_tie else "ERROR"
        return (
            f"{kind} at token {self.position}: {self.expected} expected, {self.found} found, "
            f"logit gap {self.gap:.2e} (resolution {self.resolution:.2e})"
        )


def resolution_of(dtype: torch.dtype, largest_logit: float) -> float:
    """Return the logit gap that rounding explains: 0 in fp32, else NEAR_TIE_EPS steps."""
    if dtype == torch.float32:
        return 0.0
    return NEAR_TIE_EPS * torch.finfo(dtype).eps * max(1.0, abs(largest_logit))


def find_divergence(
    alone: LocalTarget, request: Request, expected: Sequence[int], found: Sequence[int]
) -> Divergence | None:
    """Return the first difference and how close it was; None if the sequences are equal."""
    if list(expected) == list(found):
        return None
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    if at >= len(expected) or at >= len(found):
        return Divergence(
            at,
            expected[at] if at < len(expected) else None,
            found[at] if at < len(found) else None,
            float("inf"),
            0.0,
        )
    _, logits = next(islice(alone.stream(request), at, None))
    scores = logits[None]
    sampling = request.sampling
    if sampling.temperature > 0:
        noise = noise_rows(sampling.seed, [len(request.prompt_tokens) + at], logits.shape[-1])
        scores = (warp(scores, sampling) + noise.to(scores.device)) * sampling.temperature
    gap = float(scores[0, expected[at]] - scores[0, found[at]])
    resolution = resolution_of(alone.model.dtype, float(logits.abs().max()))
    return Divergence(at, expected[at], found[at], gap, resolution)


class LosslessChecker:
    """Compares runs with the target alone; computes each reference answer only once."""

    def __init__(self, alone: LocalTarget) -> None:
        self.alone = alone
        self._expected: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}

    def expected(self, request: Request) -> list[int]:
        """The target's own tokens."""
        key = (request.prompt_tokens, request.sampling)
        if key not in self._expected:
            self._expected[key] = self.alone.generate(request)[0]
        return self._expected[key]

    def check(
        self, engine: Engine, requests: Sequence[Request], row: Combination
    ) -> Iterator[Divergence | None]:
        """Run the requests, `row.requests` at once; add to `row`; yield each one's divergence."""
        for start in range(0, len(requests), row.requests):
            group = requests[start : start + row.requests]
            for request, completion in zip(group, generate_all(engine, group), strict=True):
                if completion.error is not None:
                    raise completion.error.exception()
                row.add(completion)
                divergence = find_divergence(
                    self.alone, request, self.expected(request), completion.tokens
                )
                if divergence is not None:
                    row.near_ties += divergence.is_near_tie
                    row.mismatches += not divergence.is_near_tie
                    row.divergences.append(str(divergence))
                yield divergence
