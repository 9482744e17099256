"""Coupled sampling: the target's next token is a pure function of logits, seed and position.

token_i = argmax(log p_i + g_i) with g_i Gumbel noise from (seed, i) alone is an exact sample of p_i
(the Gumbel-max trick), whatever the tree, the schedule or the device (arXiv 2408.07978). Greedy is
its limit at temperature 0. The drafter may use the same noise and rank children by log q + g, which
only changes how often it is right. Shapes: n rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flowspec.protocol.messages import Candidates
from flowspec.request import SamplingParams
from flowspec.speculation.acceptance.base import AcceptanceRule, CandidateNeeds
from flowspec.speculation.acceptance.noise import NoiseStream, uniforms
from flowspec.speculation.processors import warp


@lru_cache(maxsize=256)
def gumbel_noise(seed: int, position: int, vocab_size: int) -> Tensor:
    """Return Gumbel(0, 1) noise [V] in fp32 for absolute `position`; the same on every device."""
    uniform = uniforms(seed, position, vocab_size, NoiseStream.TARGET)
    return torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32))


def noise_rows(seed: int, positions: Sequence[int], vocab_size: int) -> Tensor:
    """Return Gumbel noise [n, V] of the tokens at `positions`."""
    return torch.stack([gumbel_noise(seed, position, vocab_size) for position in positions])


def choose(
    logits: Tensor, positions: Sequence[int], seed: int, candidates: Sequence[Candidates]
) -> list[int]:
    """Sample from logits [n, V] by the noise of seed and position alone; returns tokens [n]."""
    del candidates
    noise = noise_rows(seed, positions, logits.shape[-1]).to(logits.device)
    return (logits + noise).argmax(-1).tolist()


GUMBEL_COUPLED = AcceptanceRule(
    choose, CandidateNeeds.NOTHING, is_exact=True, about="a sample of the target's distribution"
)


def draft_scores(
    logits: Tensor,
    positions: Sequence[int],
    sampling: SamplingParams,
    *,
    coupled: bool,
    target_ids: Tensor | None = None,
) -> Tensor:
    """Return the drafter's log-probabilities [n, V] that its tokens are the target's choices.

    Uncoupled: log q at the request's temperature, as published (at temperature 0: log softmax).
    Coupled: log softmax(logits + T g). If the drafter's logits are right up to Gumbel-like errors,
    this is the chance that the token wins the target's own argmax with the same noise. For a
    drafter with its own vocabulary, `target_ids` [V], on the CPU, has the target's token of each
    column.
    """
    logits = logits.float()
    temperature = sampling.temperature
    if temperature == 0.0:
        return logits.log_softmax(-1)
    if not coupled:
        return (logits / temperature).log_softmax(-1)
    size = logits.shape[-1] if target_ids is None else int(target_ids.max()) + 1
    noise = noise_rows(sampling.seed, positions, size)
    if target_ids is not None:
        noise = noise[:, target_ids]
    kept = torch.where(warp(logits, sampling).isinf(), float("-inf"), logits)
    return (kept + temperature * noise.to(logits.device)).log_softmax(-1)
