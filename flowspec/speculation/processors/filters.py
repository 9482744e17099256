"""Filters between the logits and the distribution that is sampled. Shapes: n rows, V vocabulary."""

import torch
from torch import Tensor

from flowspec.request import SamplingParams
from flowspec.speculation.processors.base import LogitsFilter


def _temperature(logits: Tensor, sampling: SamplingParams) -> Tensor:
    return logits.float() / sampling.temperature


def _top_k(logits: Tensor, sampling: SamplingParams) -> Tensor:
    if sampling.top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def _top_p(logits: Tensor, sampling: SamplingParams) -> Tensor:
    # sorted as logits, since close ones may round to equal probabilities
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.softmax(-1)
    # a token is dropped if those before it already hold top_p
    outside = ordered.cumsum(-1) - ordered >= sampling.top_p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))


def _min_p(logits: Tensor, sampling: SamplingParams) -> Tensor:
    # p < min_p * p_max, in log space
    floor = logits.max(dim=-1, keepdim=True).values + torch.tensor(sampling.min_p).log()
    return logits.masked_fill(logits < floor.to(logits.device), float("-inf"))


TEMPERATURE = LogitsFilter(lambda s: True, _temperature, "logits over temperature")
TOP_K = LogitsFilter(lambda s: s.top_k > 0, _top_k, "the k likeliest tokens")
TOP_P = LogitsFilter(
    lambda s: s.top_p < 1.0, _top_p, "the likeliest tokens that hold probability p"
)
MIN_P = LogitsFilter(
    lambda s: s.min_p > 0.0, _min_p, "tokens above a share of the likeliest one's chance"
)
