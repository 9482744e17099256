"""Filters between the logits and the distribution that is sampled. Shapes: n rows, V vocabulary."""

import torch
from torch import Tensor

from flowspec.request import SamplingParams


def warp(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """logits [n, V] -> logits [n, V] over temperature, filtered tokens at -inf.

    Order: temperature, top-k, top-p, min-p; each filter sees what the one before left. The most
    likely token always stays. Needs temperature > 0 (greedy needs no distribution).
    """
    assert sampling.temperature > 0.0, "greedy decoding takes the arg-max of the raw logits"
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1.0:
        # sorted as logits: near ones may round to equal probabilities
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.softmax(-1)
        # a token goes when those before it already hold top_p
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        outside[..., 0] = False
        logits = logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))
    if sampling.min_p > 0.0:
        # p < min_p * p_max, in log space
        floor = logits.max(dim=-1, keepdim=True).values + torch.tensor(sampling.min_p).log()
        logits = logits.masked_fill(logits < floor.to(logits.device), float("-inf"))
    return logits
