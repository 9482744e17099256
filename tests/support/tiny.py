"""A tiny eight-layer model, cut anywhere, and its own answers.

It is random, but its logits are far apart and depend on everything before them, so that a wrong
mask, position or cache row changes the text.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import torch
from torch import nn

from flowspec.engine.reference import LocalTarget
from flowspec.model.architecture import ModelConfig
from flowspec.model.stage_model import StageModel
from flowspec.request import Request, SamplingParams
from flowspec.weights.split_plan import even_layers

VOCAB = 48
MAX_CONTEXT = 256
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=MAX_CONTEXT,
)
PROMPT = (3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9)
T0 = SamplingParams()
T1 = SamplingParams(temperature=1.0, seed=11)
SAMPLINGS = (
    T0,
    T1,
    replace(T1, top_k=7, seed=12),
    replace(T1, top_p=0.8, seed=13),
    replace(T1, min_p=0.05, seed=14),
    replace(T1, temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, seed=15),
)


def randomize(net: nn.Module, seed: int, *, head_scale: float = 3.0) -> None:
    """Set weights that keep activations alive; lm_head is larger, for clear choices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            scale *= head_scale if "lm_head" in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    net.requires_grad_(False)


@lru_cache(maxsize=8)
def whole_model(config: ModelConfig = CONFIG) -> StageModel:
    """Return all layers in one model."""
    torch.set_num_threads(1)
    model = StageModel(config, first_layer=0, last_layer=8, with_embedding=True, with_head=True)
    randomize(model, seed=1)
    return model


@lru_cache(maxsize=1)
def whole_model_bf16() -> StageModel:
    """Return the model in bfloat16, where the order of sums decides close choices."""
    return copy.deepcopy(whole_model()).to(torch.bfloat16)


@lru_cache(maxsize=16)
def stage_models(
    num_stages: int, *, bf16: bool = False, config: ModelConfig = CONFIG
) -> tuple[StageModel, ...]:
    """Return the same weights in `num_stages` pieces."""
    weights = (whole_model_bf16() if bf16 else whole_model(config)).state_dict()
    models, first = [], 0
    for count in even_layers(config.num_layers, num_stages):
        last = first + count
        model = StageModel(
            config,
            first_layer=first,
            last_layer=last,
            with_embedding=first == 0,
            with_head=last == config.num_layers,
        )
        own = {name: weights[name] for name in model.state_dict()}
        model.load_state_dict(own, assign=True)
        models.append(model.requires_grad_(False))
        first = last
    return tuple(models)


def local_target(max_context: int = MAX_CONTEXT) -> LocalTarget:
    """Return the model alone, without stages."""
    return LocalTarget(whole_model(), max_context)


def request(
    number: int = 1,
    *,
    prompt: Sequence[int] = PROMPT,
    sampling: SamplingParams = T0,
    max_new_tokens: int = 14,
    stop: tuple[str, ...] = (),
    eos: tuple[int, ...] = (),
) -> Request:
    """Return a request with the defaults of these tests."""
    return Request(
        id=number,
        prompt=tuple(prompt),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        eos_token_ids=eos,
    )


@lru_cache(maxsize=256)
def truth(prompt: tuple[int, ...], sampling: SamplingParams, count: int = 48) -> tuple[int, ...]:
    """Return the prompt and the `count` tokens with which the target alone continues."""
    alone = Request(id=0, prompt=prompt, sampling=sampling, max_new_tokens=count)
    return (*prompt, *(token for token, _ in islice(local_target().stream(alone), count)))


def expected(asked: Request, max_context: int = MAX_CONTEXT) -> list[int]:
    """Return the target's own answer, by LocalTarget's own stop rules."""
    return local_target(max_context).generate(asked)[0]
