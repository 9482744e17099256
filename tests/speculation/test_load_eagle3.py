"""EAGLE-3 heads: what each origin's checkpoint means, and what is wrong with one that is.

The net is compared with a plain computation of the same formulas, written here from the tensors.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowspec.model.llama import rope_angles, rope_frequencies
from flowspec.speculation.drafters.checkpoint.kind import recognise
from flowspec.speculation.drafters.eagle3.load import load_eagle3
from flowspec.speculation.drafters.eagle3.network import Eagle3Net
from flowspec.weights.load import read_tensors
from tests.support.heads import IDS, ORIGINS, ROPE_BASE, save_eagle3
from tests.support.tiny import CONFIG

EMBEDDING = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, generator=torch.manual_seed(1))
HIDDEN = CONFIG.hidden_size
OFFICIAL = (1, 3, 4)


def load(folder, **changes) -> Eagle3Net:
    """Load a head with the target's embedding."""
    given = {"target_config": CONFIG, "embedding": EMBEDDING} | changes
    return load_eagle3(folder, **given)


@pytest.mark.parametrize("layers", [None, (0, 4, 7)])
@pytest.mark.parametrize("origin", ORIGINS)
def test_every_origin_loads_as_what_it_is(tmp_path, origin, layers) -> None:
    """Names, nested configs, maps of the vocabulary, and layer ids counted either way."""
    stored = save_eagle3(tmp_path, CONFIG, origin, layers=layers)
    net = load(tmp_path)
    assert net.aux_hidden_state_layers == (layers or OFFICIAL)
    assert net.draft_to_target.tolist() == list(IDS)
    assert net.layout == stored.layout
    for name, tensor in stored.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert (net.config.num_kv_heads, net.config.head_dim) == (2, 16)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_the_targets_embedding_is_used_where_there_is_none(tmp_path) -> None:
    save_eagle3(tmp_path, CONFIG, drop=("embed_tokens.weight",))
    net = load(tmp_path, dtype="bfloat16")
    assert torch.equal(net.embed_tokens.weight, EMBEDDING.bfloat16())
    with pytest.raises(ValueError, match="give the target's embedding"):
        load(tmp_path, embedding=None)


def test_a_head_of_another_width_needs_its_own_embedding(tmp_path) -> None:
    """Its input is not of the target's size: the target's embedding would not fit."""
    wide = replace(CONFIG, hidden_size=48)
    stored = save_eagle3(tmp_path, CONFIG, add={"fc.weight": torch.randn(HIDDEN, 144)})
    net = load(tmp_path, target_config=wide, embedding=torch.randn(48, 48))
    assert torch.equal(net.embed_tokens.weight, stored.embed_tokens.weight)
    assert net.fuse(torch.randn(2, 144)).shape == (2, HIDDEN)
    save_eagle3(
        tmp_path,
        CONFIG,
        add={"fc.weight": torch.randn(HIDDEN, 144)},
        drop=("embed_tokens.weight",),
    )
    with pytest.raises(ValueError, match=r"missing tensor: embed_tokens.weight \[48, 32\]"):
        load(tmp_path, target_config=wide, embedding=torch.randn(48, 48))


def test_rope_is_the_heads_own(tmp_path) -> None:
    """Never the target's; 10000 where the config says nothing."""
    target = replace(CONFIG, rope_theta=500000.0)
    save_eagle3(tmp_path, target)
    assert load(tmp_path, target_config=target).config.rope_theta == 10000.0
    save_eagle3(tmp_path, target, hf={"rope_theta": 250000.0})
    assert load(tmp_path, target_config=target).config.rope_theta == 250000.0


@pytest.mark.parametrize("origin", ["official", "speculators"])
def test_a_full_vocabulary_needs_no_map(tmp_path, origin) -> None:
    save_eagle3(tmp_path, CONFIG, origin, ids=None)
    assert load(tmp_path).draft_to_target.tolist() == list(range(CONFIG.vocab_size))


def test_the_map_has_another_name_in_places(tmp_path) -> None:
    offsets = torch.tensor(IDS) - torch.arange(len(IDS))
    save_eagle3(tmp_path, CONFIG, drop=("d2t",), add={"draft_id_to_target_id": offsets})
    assert load(tmp_path).draft_to_target.tolist() == list(IDS)


def test_sizes_and_biases_are_the_tensors(tmp_path) -> None:
    """Flags and sizes of the config are wrong here, as in published ones."""
    wrong = {"draft_vocab_size": 99, "num_key_value_heads": 4, "intermediate_size": 8,
             "attention_bias": False}  # fmt: skip
    bias = {f"midlayer.self_attn.{x}_proj.bias": torch.randn(n) for x, n in
            (("q", 64), ("k", 32), ("v", 32))}  # fmt: skip
    save_eagle3(tmp_path, CONFIG, hf=wrong, add=bias)
    net = load(tmp_path)
    assert torch.equal(net.midlayer.self_attn.k_proj.bias, bias["midlayer.self_attn.k_proj.bias"])
    assert net.midlayer.self_attn.o_proj.bias is None
    assert net.lm_head.out_features == len(IDS)


@pytest.mark.parametrize("origin", ["official", "specforge", "speculators"])
@pytest.mark.parametrize("empty", [[], None])
def test_no_aux_hidden_state_layers_are_the_usual_ones(tmp_path, origin, empty) -> None:
    """An empty list says no more than a key that is not there, at either level of the config."""
    names = {"eagle_aux_hidden_state_layer_ids": empty, "draft_vocab_size": None, "head_dim": None}
    hf = {"eagle_config": names} if origin == "specforge" else names
    save_eagle3(tmp_path, CONFIG, origin, hf=hf)
    assert load(tmp_path).aux_hidden_state_layers == OFFICIAL


def test_the_layers_own_config_counts_most(tmp_path) -> None:
    """A speculators config has the defaults of transformers, which say nothing."""
    save_eagle3(tmp_path, CONFIG, "speculators", hf={"rope_theta": 1.0, "rms_norm_eps": 0.5})
    content = json.loads((tmp_path / "config.json").read_text())
    content["transformer_layer_config"]["rope_theta"] = 250000.0
    del content["transformer_layer_config"]["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = load(tmp_path).config
    assert (config.rope_theta, config.rms_norm_eps) == (250000.0, 1e-5)


def test_what_rope_leaves_out_is_told_when_a_head_is_loaded(tmp_path, caplog) -> None:
    """Once, with the file that it is in."""
    rope = {"rope_type": "linear", "factor": 2.0, "factors": [2]}
    save_eagle3(tmp_path, CONFIG, hf={"rope_scaling": rope})
    for _ in range(2):
        load(tmp_path)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'config.json'}: the RoPE block: factors means nothing")


def test_what_training_left_in_the_file_is_not_used(tmp_path) -> None:
    """The target's norm and lm_head, which some versions of speculators store too."""
    left = {"verifier_norm.weight": torch.ones(HIDDEN), "verifier_lm_head.weight": torch.ones(1, 1)}
    save_eagle3(tmp_path, CONFIG, "speculators", add=left)
    assert load(tmp_path).aux_hidden_state_layers == OFFICIAL


SWAPPED = torch.tensor(IDS) - torch.arange(len(IDS))
ONE = torch.ones(HIDDEN)


@pytest.mark.parametrize(
    ("origin", "changes", "named"),
    [
        ("official", {"drop": ("norm.weight",)}, "missing tensor: norm.weight"),
        ("official", {"drop": ("d2t", "t2d")}, "d2t.*13 of 48 tokens"),
        ("official", {"add": {"midlayer.self_attn.q_norm.weight": ONE}}, "missing.*k_norm"),
        ("official", {"add": {"layers.1.mlp.up_proj.weight": ONE}}, "unexpected.*layers.1"),
        ("official", {"add": {"norm.weight": torch.ones(31)}}, r"norm.weight is \[31\], needed"),
        ("official", {"add": {"fc.weight": torch.ones(32, 128)}}, "another target"),
        ("official", {"add": {"d2t": SWAPPED + 40}}, "outside the target's vocabulary of 48"),
        ("official", {"add": {"d2t": SWAPPED + 1}}, "d2t and t2d disagree"),
        ("official", {"add": {"d2t": -torch.arange(13)}}, "to a token another has"),
        ("official", {"add": {"d2t": SWAPPED[:5]}}, r"d2t is \[5\], needed \[13\]"),
        ("official", {"add": {"t2d": torch.ones(40, dtype=torch.bool)}}, r"t2d is \[40\]"),
        ("official", {"add": {"embed_tokens.weight": torch.ones(60, 32)}}, "has 60 tokens"),
        ("official", {"hf": {"num_attention_heads": 3}}, "no 3 heads"),
        ("official", {"hf": {"head_dim": 32}}, "64 rows, which are no 4 heads"),
        ("specforge", {"layers": (1, 3, 8)}, "do not all lie in 0 to 7"),
        ("speculators", {"layers": (-1, 3, 7)}, "do not all lie in 1 to 8"),
        ("specforge", {"layers": (1, 3, 3)}, "needed: 3"),
        ("specforge", {"hf": {"aux_hidden_state_layer_ids": "1,2"}}, "a list of layer ids"),
        ("speculators", {"hf": {"norm_before_residual": None}}, "norm_before_residual is missing"),
        ("official", {"hf": {"rope_scaling": {"rope_type": "mystery"}}}, "'mystery'"),
        ("speculators", {"drop": ("input_norm.weight",)}, "norm_before_fc.*set norm_before_fc to"),
        ("official", {"hf": {"input_norm": True}}, "input_norm.weight is not in the checkpoint"),
        ("official", {"hf": {"layer_types": ["sliding_attention"]}}, "layer_types.*full attention"),
        ("official", {"hf": {"quantization_config": {"quant_method": "fp8"}}}, "quantised .fp8"),
        ("official", {"hf": {"hidden_act": "gelu"}}, "'gelu'"),
        ("official", {"hf": {"logit_scale": 0.5}}, "logit_scale = 0.5"),
        ("official", {"hf": {"eagle_config": {"use_aux_hidden_state": False}}}, "three layers"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, origin, changes, named) -> None:
    save_eagle3(tmp_path, CONFIG, origin, **changes)
    with pytest.raises(ValueError, match=named):
        load(tmp_path)


@pytest.mark.parametrize(
    ("drop", "add", "named"),
    [
        ((), {"mask_hidden": torch.ones(1, 1, 96)}, "P-EAGLE"),
        (("lm_head.weight",), {"hidden_norm.weight": ONE}, "DFlash"),
        ((), {"markov_head.markov_w1.weight": ONE}, "DFlash.*DSpark"),
        ((), {"0.0.linear.weight": ONE}, "Medusa"),
    ],
)
def test_other_families_are_named(tmp_path, drop, add, named) -> None:
    save_eagle3(tmp_path, CONFIG, drop=drop, add=add)
    with pytest.raises(ValueError, match=f"no EAGLE-3 head, found: {named}"):
        load(tmp_path)
    assert recognise(read_tensors(tmp_path / "model.safetensors")).family != "eagle3"


# ---------------------------------------------------------------- the plain computation


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """RoPE on [n, heads, 16] as a product of complex numbers."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    angles = positions[:, None, None] * base ** (-torch.arange(8, dtype=torch.float64) / 8)
    spun = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((spun.real, spun.imag), dim=-1).float()


def plain_outputs(
    w: dict[str, Tensor], layout, tokens: Tensor, hidden_states: Tensor, *, base: float
) -> Tensor:
    """a_i [n, Hd] of every row, for the hidden states [n, Hd] that the layer takes."""
    embedded = norm(w["embed_tokens.weight"][tokens], w["midlayer.input_layernorm.weight"])
    normed = norm(hidden_states, w["midlayer.hidden_norm.weight"])
    x = torch.cat((embedded, normed), dim=-1)
    n, where = len(tokens), torch.arange(len(tokens))
    q, k, v = (x @ w[f"midlayer.self_attn.{p}_proj.weight"].T for p in "qkv")
    q, k = q.view(n, 4, 16), k.view(n, 2, 16)
    if "midlayer.self_attn.q_norm.weight" in w:
        q = norm(q, w["midlayer.self_attn.q_norm.weight"])
        k = norm(k, w["midlayer.self_attn.k_norm.weight"])
    q, k = turned(q, where, base), turned(k, where, base)
    heads = []
    for h in range(4):
        scores = q[:, h] @ k[:, h // 2].T / 4.0
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v.view(n, 2, 16)[:, h // 2])
    x = torch.cat(heads, dim=-1) @ w["midlayer.self_attn.o_proj.weight"].T
    x = x + (normed if layout.norm_before_residual else hidden_states)
    y = norm(x, w["midlayer.post_attention_layernorm.weight"])
    gate, up = (y @ w[f"midlayer.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T


def plain_fused(w: dict[str, Tensor], layout, hidden_states: Tensor) -> Tensor:
    """g_i of the target's hidden states [n, 3, Ht]."""
    if layout.norm_before_fc:
        hidden_states = norm(hidden_states.flatten(1), w["input_norm.weight"]).view(
            hidden_states.shape
        )
    if layout.fc_norm:
        weights = [w[f"fc_norm.{i}.weight"] for i in range(3)]
        hidden_states = torch.stack(
            [norm(hidden_states[:, i], weights[i]) for i in range(3)], dim=1
        )
    return hidden_states.flatten(1) @ w["fc.weight"].T


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `attend` of rows that follow one another."""
    return F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        is_causal=True, enable_gqa=True,
    )[0].transpose(0, 1)  # fmt: skip


@pytest.mark.parametrize("origin", [*ORIGINS, "speculators-0.1 of a Qwen3 layer"])
def test_the_net_computes_the_formulas(tmp_path, origin) -> None:
    """Five true rows, then three drafted ones, each on the state of the row before."""
    origin, _, qwen = origin.partition(" ")
    stored = save_eagle3(tmp_path, CONFIG, origin)
    with torch.no_grad():
        for name, weight in stored.named_parameters():
            if weight.dim() == 1:  # norms that do something
                weight.copy_(1.0 + 0.3 * torch.randn(len(weight), generator=torch.manual_seed(7)))
            del name
    changed = {n: t for n, t in stored.state_dict().items() if t.dim() == 1}
    if qwen:
        for name in ("q_norm", "k_norm"):
            weight = 1.0 + 0.3 * torch.randn(16, generator=torch.manual_seed(8))
            changed[f"midlayer.self_attn.{name}.weight"] = weight
    save_eagle3(tmp_path, CONFIG, origin, add=changed)
    net = load(tmp_path)
    w, layout = {**stored.state_dict(), **changed}, stored.layout
    base = ROPE_BASE if origin.startswith("speculators") else 10000.0
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(5, 3, HIDDEN, generator=generator)
    tokens = torch.randint(0, CONFIG.vocab_size, (8,), generator=generator)
    with torch.no_grad():
        hidden_states, mine = plain_fused(w, layout, true), net.fuse(true.flatten(1))
        for n in range(5, 9):
            outputs = plain_outputs(w, layout, tokens[:n], hidden_states, base=base)
            logits = norm(outputs[-1], w["norm.weight"]) @ w["lm_head.weight"].T
            handed = norm(outputs, w["norm.weight"]) if layout.norm_output else outputs
            rope = rope_angles(rope_frequencies(net.config), torch.arange(n), torch.float32)
            states = net(tokens[:n], mine, rope, causal)
            assert torch.allclose(states, handed, atol=2e-5), n
            assert torch.allclose(net.logits(states[-1]), logits, atol=2e-4), n
            hidden_states = torch.cat((hidden_states, handed[-1:]))
            mine = torch.cat((mine, states[-1:]))


def test_the_norm_flags_change_what_is_computed(tmp_path) -> None:
    """A flag that did nothing would pass every comparison above with weights of one."""
    results = []
    for flags in ({}, {"norm_before_residual": True}, {"norm_output": True}):
        save_eagle3(tmp_path, CONFIG, hf=flags)
        net = load(tmp_path)
        rope = rope_angles(rope_frequencies(net.config), torch.arange(4), torch.float32)
        hidden_states = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2))
        results.append(net(torch.arange(4), hidden_states, rope, causal))
    assert not torch.allclose(results[0], results[1], atol=0.01)
    assert not torch.allclose(results[0], results[2], atol=0.01)
