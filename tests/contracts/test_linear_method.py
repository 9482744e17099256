"""The contract of linear methods: they load a checkpoint's tensors and multiply exactly.

The rows of the table, and a second method: int8 with one scale per output channel.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowspec.engine.engine import generate
from flowspec.engine.reference import LocalTarget
from flowspec.model import linear
from flowspec.model.linear import (
    NONE,
    PLAIN,
    QUANTIZATIONS,
    Linear,
    Quantization,
    checkpoint_shapes,
    load_weights,
)
from flowspec.model.stage_model import StageModel
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.strategies import STRATEGIES
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import fill, load_stage, load_stage_range, load_whole
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import even_layers, plan_split
from tests.support import families
from tests.support.clusters import check_empty, make_cluster
from tests.support.scripted import ScriptedDrafter, mixed
from tests.support.tiny import CONFIG, MAX_CONTEXT, T0, T1, request, whole_model


class Int8Linear:
    """Whole numbers of -127 to 127, and what one of them is worth in each row."""

    def create_weights(self, layer: Linear, *, bias: bool) -> None:
        """Register int8 weights and scales."""
        shape = layer.out_features, layer.in_features
        layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        layer.register_buffer("scale", torch.empty(layer.out_features))
        layer.register_parameter("bias", None)
        if bias:
            layer.bias = nn.Parameter(torch.empty(layer.out_features), requires_grad=False)

    def checkpoint_shapes(self, layer: Linear) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the checkpoint's tensors."""
        return PLAIN.checkpoint_shapes(layer)

    def load_weights(self, layer: Linear, tensors: Mapping[str, Tensor]) -> None:
        """Convert the tensors to int8."""
        weight = tensors["weight"].float()
        scale = weight.abs().amax(dim=1) / 127
        layer.scale = scale.to(tensors["weight"].dtype)
        whole = (weight / scale[:, None]).round().to(torch.int8)
        layer.weight = nn.Parameter(whole, requires_grad=False)
        if layer.has_bias:
            layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """Multiply by the int8 weight."""
        y = F.linear(x, layer.weight.to(x.dtype)) * layer.scale
        return y if layer.bias is None else y + layer.bias


INT8 = Quantization(lambda name: Int8Linear(), "for these tests")
# As formats do that store their layers in several ways.
MIXED = Quantization(lambda name: Int8Linear() if ".mlp." in name else PLAIN, "for these tests")
ALL = {**QUANTIZATIONS, "int8": INT8, "mixed": MIXED}
WITHIN = {"none": 0.0, "int8": 0.01, "mixed": 0.01}  # of the largest output, off the plain product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_it_multiplies_by_the_weight_of_the_checkpoint(
    name: str, dtype: torch.dtype, bias: bool
) -> None:
    """Made without memory, filled with the checkpoint's tensors; output in the input's dtype."""
    method = ALL[name].method_of("model.layers.0.mlp.up_proj")
    with torch.device("meta"):
        layer = Linear(24, 10, bias=bias, method=method)
    assert all(value.is_meta for value in layer.state_dict().values()), "it took memory"
    generator = torch.Generator().manual_seed(5)
    shapes = {"weight": (10, 24), **({"bias": (10,)} if bias else {})}
    assert dict(method.checkpoint_shapes(layer)) == shapes
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    method.load_weights(layer, tensors)
    for shape in ((7, 24), (2, 3, 24)):
        x = torch.randn(shape, generator=generator).to(dtype)
        y, wanted = layer(x), F.linear(x, tensors["weight"], tensors.get("bias"))
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        allowed = WITHIN[name] + (0.01 if dtype == torch.bfloat16 and WITHIN[name] else 0.0)
        assert (y - wanted).abs().max() <= allowed * wanted.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_a_method_can_be_given_to_a_layer_that_has_another(name: str) -> None:
    """No weight of the first method is left."""
    layer = Linear(6, 4, bias=True, method=Int8Linear())
    method = ALL[name].method_of("model.layers.0.mlp.up_proj")
    layer.use(method)
    fresh = Linear(6, 4, bias=True, method=method)
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    assert [v.dtype for v in layer.state_dict().values()] == [
        v.dtype for v in fresh.state_dict().values()
    ]


@lru_cache(maxsize=16)
def quantized(name: str, *ends: int) -> StageModel:
    """Layers of the tiny model by one of ALL; without `ends` the whole of it."""
    first, last = ends or (0, CONFIG.num_layers)
    with torch.device("meta"):
        model = StageModel(
            CONFIG,
            first_layer=first,
            last_layer=last,
            with_embedding=first == 0,
            with_head=last == CONFIG.num_layers,
            quantization=ALL[name],
        )
    weights = whole_model().state_dict()
    load_weights(model, {name: weights[name] for name in checkpoint_shapes(model)})
    return model


def pieces(name: str, num_stages: int) -> list[StageModel]:
    """The whole of it in so many stages."""
    stages, first = [], 0
    for count in even_layers(CONFIG.num_layers, num_stages):
        stages.append(quantized(name, first, first + count))
        first += count
    return stages


@pytest.mark.parametrize("name", ALL)
def test_a_stage_tells_the_dtype_of_its_activations(name: str) -> None:
    """Not that of a weight: caches are made in it, and hidden states leave in it."""
    for model in pieces(name, 3):
        assert model.dtype == torch.float32
        assert model.new_cache(4).keys.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [*QUANTIZATIONS, "int8"])
def test_every_strategy_says_what_the_target_alone_says(name, strategy, sampling) -> None:
    """Lossless against the target with the same linear layers, in any order of events."""
    asked = request(sampling=sampling, max_new_tokens=12)
    alone = LocalTarget(quantized(name), MAX_CONTEXT).generate(asked)[0]
    drafter = ScriptedDrafter(mixed, true=(*asked.prompt, *alone))
    charges, parts = adversarial(len(strategy)), pieces(name, 3)
    cluster = make_cluster(3, strategy, drafter=drafter, charges=charges, backends=parts)
    assert list(generate(cluster, asked).tokens) == alone
    check_empty(cluster)


def test_the_second_method_is_really_used() -> None:
    """It changes the logits; else equality with the target alone would say nothing."""
    hidden = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(quantized("int8").logits(hidden), whole_model().logits(hidden))
    dtypes = {v.dtype for v in quantized("mixed").state_dict().values()}
    assert dtypes == {torch.int8, torch.float32}


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A split model of two stages on disk; beside it `hf`, whole."""
    families.save(tmp_path / "hf")
    plan = plan_split(open_checkpoint(tmp_path / "hf"), layers=(3, 1))
    run_split(plan, tmp_path / "split", model_id="tiny")
    return tmp_path / "split"


@pytest.mark.parametrize("name", ALL)
def test_loading_takes_the_name_of_a_quantization(name, split, monkeypatch) -> None:
    """Every way from disk gives the same layers."""
    monkeypatch.setitem(linear.QUANTIZATIONS, name, ALL[name])
    whole = load_whole(split.parent / "hf", quantization=name).state_dict()
    parts = [load_stage(split, stage, quantization=name) for stage in (1, 2)]
    parts += [load_stage_range(split, 0, 4, quantization=name)]
    parts += [load_whole(split, quantization=name)]
    for part in parts:
        for key, value in part.state_dict().items():
            assert torch.equal(value, whole[key]), key
    kinds = {layer.method.__class__ for layer in parts[0].modules() if isinstance(layer, Linear)}
    assert (Int8Linear in kinds) == (name != "none")


def test_what_is_missing_or_unknown_is_named(split: Path) -> None:
    """A tensor that a method needs, and a name that the table does not have."""
    weights = dict(whole_model().state_dict())
    del weights["model.layers.2.mlp.up_proj.weight"]
    with torch.device("meta"):
        model = StageModel(
            CONFIG,
            first_layer=0,
            last_layer=8,
            with_embedding=True,
            with_head=True,
            quantization=INT8,
        )
    with pytest.raises(ValueError, match=r"missing tensors \['model.layers.2.mlp.up_proj.weight'"):
        fill(model, weights, Path("here"))
    with pytest.raises(ValueError, match="unknown quantization 'int3'; known: none"):
        load_stage(split, 1, quantization="int3")


def test_a_tied_head_stays_plain(tmp_path: Path, monkeypatch) -> None:
    """The embedding is looked up by rows, so both keep the one weight, on every cut."""
    monkeypatch.setitem(linear.QUANTIZATIONS, "int8", INT8)
    families.save(tmp_path / "hf", "tied")
    model = load_whole(tmp_path / "hf", quantization="int8")
    assert model.lm_head is not None
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")
    plan = plan_split(open_checkpoint(tmp_path / "hf"), layers=(3, 1))
    run_split(plan, tmp_path / "split", model_id="tiny")
    last = load_stage(tmp_path / "split", 2, quantization="int8")
    assert last.lm_head is not None
    assert torch.equal(last.lm_head.weight, model.lm_head.weight)
    assert NONE.method_of("lm_head") is PLAIN
