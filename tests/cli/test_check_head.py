"""`flowspec check-head`: the family, all that is wrong at once, and tau of what runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from flowspec.cli.check_head import _score
from flowspec.cli.main import app
from flowspec.model.architecture import ModelConfig, read_config
from flowspec.request import DecodeStats
from flowspec.speculation.drafters.eagle.load import load_eagle
from tests.support.checkpoints import save_checkpoint
from tests.support.heads import save_eagle3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/` of eight layers, `eagle/`, and a file of two prompts."""
    folder = save_checkpoint(tmp_path_factory.mktemp("heads") / "tiny", num_layers=8)
    (folder / "prompts.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "my box"}\n')
    return folder


@pytest.fixture
def target(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The target's config; the command writes its split to ./out, which is a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return read_config(tiny / "target")


def check(tiny: Path, head: Path | str, *more: str) -> Result:
    """Run the command on `head`."""
    words = ["check-head", str(tiny / "target"), str(head), "--prompts"]
    return CliRunner().invoke(
        app, [*words, str(tiny / "prompts.jsonl"), "--max-tokens", "6", *more]
    )


def words_of(result: Result) -> str:
    """The output on one line, out of its boxes."""
    return " ".join(result.output.replace("│", " ").split())


def has_tau(result: Result) -> bool:
    """Whether both shapes of draft were measured."""
    return {"tree", "chain"} == set(re.findall(r"^(\w+): tau \d", result.output, re.MULTILINE))


def test_a_head_that_fits_is_named_and_measured(tiny, target) -> None:
    save_eagle3(Path("head"), target, "speculators", layers=(0, 4, 7))
    result = check(tiny, "head")
    assert result.exit_code == 0, result.output
    assert has_tau(result)
    for words in ("EAGLE-3 head", "recognised by", "speculators form", "outputs of layers 0, 4, 7",
                  f"13 of {target.vocab_size} tokens", "RoPE base 500000,"):  # fmt: skip
        assert words in result.output
    assert "nothing is known" not in result.output


def test_a_head_in_the_first_form_of_speculators_is_measured(tiny, target) -> None:
    """Its `auto_map` names the trainer's code; a whole model with code of its own is refused."""
    save_eagle3(Path("head"), target, "speculators-0.1")
    result = check(tiny, "head")
    assert result.exit_code == 0, result.output
    assert has_tau(result)
    for words in ("speculators form", "hidden 32", "4 query and 2 key/value heads of 16",
                  "RoPE base 500000,", "layers 1, 3, 4 (the usual ones"):  # fmt: skip
        assert words in result.output, words
    assert "nothing is known" not in result.output


def as_speculators(eagle: Path, folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """The EAGLE-1 head in `eagle` as that library writes it; returns the tensors."""
    new = {"fc.": "fusion_fc.", "layers.0.": "transformer."}
    tensors = load_file(eagle / "model.safetensors")
    for name in list(tensors):
        for old in [old for old in new if name.startswith(old)]:
            tensors[name.replace(old, new[old], 1)] = tensors.pop(name)
    embedding = tensors.pop("embed_tokens.weight")  # it is the target's
    folder.mkdir()
    save_file({**tensors, "lm_head.weight": embedding}, folder / "model.safetensors")
    layer = json.loads((eagle / "config.json").read_text())
    whole = {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "auto_map": {"": "eagle.EagleSpeculatorConfig"},
        "fusion_bias": True,
        "layernorms": False,
        "speculators_model_type": "eagle",
        "speculators_config": {"algorithm": "eagle"},
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": layer,
    }
    (folder / "config.json").write_text(json.dumps({**whole, **changes}))
    return tensors


def test_an_eagle1_head_in_the_form_of_speculators_is_the_same_head(tiny, target) -> None:
    as_speculators(tiny / "eagle", Path("head"))
    result = check(tiny, "head")
    assert result.exit_code == 0, result.output
    assert has_tau(result)
    for words in ("EAGLE-1/2 head", "fusion_fc.weight [32, 64]", "lm_head.weight is not used"):
        assert words in words_of(result), words
    embedding = torch.randn(target.vocab_size, 32)
    one, other = (
        load_eagle(folder, target_config=target, embedding=embedding).state_dict()
        for folder in (Path("head"), tiny / "eagle")
    )
    assert torch.equal(one["embed_tokens.weight"], embedding)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if "embed" not in name)


def test_an_eagle1_head_with_norms_of_its_own_is_refused_by_their_names(tiny, target) -> None:
    """They change what it computes: a run without them would only draft badly, and not say so."""
    tensors = as_speculators(tiny / "eagle", Path("head"), layernorms=True)
    output = words_of(check(tiny, "head"))
    assert "layernorms in config.json: a head with norms of its own" in output
    tensors["pre_lm_head_layernorm.weight"] = torch.ones(32)
    save_file(tensors, "head/model.safetensors")
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert "pre_lm_head_layernorm.weight: a head with norms" in words_of(result)


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "mystery"}}, "RoPE type 'mystery'"),
        ({"rope_theta": "500000"}, "rope_theta is '500000'"),
    ],
)
def test_what_could_not_be_read_is_not_shown(tiny, target, hf, named) -> None:
    """A default beside a file that says something else would be a lie."""
    save_eagle3(Path("head"), target, hf=hf)
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert named in words_of(result)
    assert "10000" not in result.output
    assert "base" not in result.output


def test_what_is_read_is_shown_beside_an_error(tiny, target) -> None:
    """A refused key is no reason to show defaults for the others."""
    hf = {"rope_theta": 500000.0, "quantization_config": {"quant_method": "gptq"}}
    save_eagle3(Path("head"), target, hf=hf)
    output = words_of(check(tiny, "head"))
    assert "the checkpoint is quantised (gptq)" in output
    assert "RoPE base 500000" in output
    assert "10000" not in output.replace("target's (base 10000)", "")


def test_defaults_are_shown_as_defaults(tiny, target) -> None:
    save_eagle3(Path("head"), target)
    output = words_of(check(tiny, "head"))
    assert "RoPE base 10000 (the default: the config names none)" in output
    assert "layers 1, 3, 4 (the usual ones: the config names none)" in output


def test_a_near_key_of_rope_is_a_note(tiny, target) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    save_eagle3(Path("head"), target, hf={"rope_scaling": {**yarn, "attn_factor": 0.9}})
    result = check(tiny, "head")
    assert result.exit_code == 0, result.output
    assert "attn_factor means nothing for rope_type 'yarn'" in words_of(result)
    assert "the near key is attention_factor" in words_of(result)


def test_an_eagle1_head_is_measured_as_one(tiny, target) -> None:
    result = check(tiny, tiny / "eagle", "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "EAGLE-1/2 head" in result.output
    assert has_tau(result)
    assert "every tensor and every config key fits" in result.output


def test_everything_wrong_is_listed_at_once(tiny, target) -> None:
    """One run tells all there is to repair; nothing is measured."""
    save_eagle3(
        Path("head"),
        target,
        layers=(1, 3, 9),
        hf={"vocab_size": 61, "num_attention_heads": 3, "draft_vocab_size": 99, "fc_norm": True},
        drop=("norm.weight", "midlayer.mlp.up_proj.weight"),
        add={
            "extra.weight": torch.ones(2),
            "other.bias": torch.ones(3),
            "midlayer.hidden_norm.weight": torch.ones(5),
            "d2t": torch.full((13,), 400),
        },
    )
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert not has_tau(result)
    output = words_of(result)
    for words in ("norm.weight [32]", "midlayer.mlp.up_proj.weight", "extra.weight [2]",
                  "other.bias [3]", "hidden_norm.weight is [5], needed [32]", "vocab_size is 61",
                  "no 3 heads", "draft_vocab_size is 99", "[1, 3, 9] do not all lie", "fc_norm is",
                  "d2t leads 13 of 13"):  # fmt: skip
        assert words in output, words


def test_a_contradiction_is_reported_and_the_tensors_are_believed(tiny, target) -> None:
    save_eagle3(Path("head"), target, hf={"draft_vocab_size": 99})
    result = check(tiny, "head", "--limit", "1")
    assert result.exit_code == 1, result.output
    assert "contradiction" in result.output
    assert has_tau(result)


@pytest.mark.parametrize(("origin", "ids"), [("speculators", (0, 2, 3)), ("specforge", (2, 4, 5))])
def test_layer_ids_of_the_other_convention_are_suspected(tiny, target, origin, ids) -> None:
    """Here [1, 3, 4] counted by input, or [2, 4, 5] by output: the usual layers, off by one."""
    save_eagle3(Path("head"), target, origin, layers=ids)
    result = check(tiny, "head", "--limit", "1")
    assert result.exit_code == 1, result.output
    assert "if counted the other way" in words_of(result)


def test_a_family_without_a_drafter_is_named(tiny, target) -> None:
    save_eagle3(Path("head"), target, add={"mask_hidden": torch.ones(1, 1, 96)})
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert "no drafter runs a P-EAGLE head" in words_of(result)
    assert not has_tau(result)


def test_a_damaged_config_is_one_finding_among_others(tiny, target) -> None:
    save_eagle3(Path("head"), target, drop=("norm.weight",))
    Path("head/config.json").write_text("{")
    output = words_of(check(tiny, "head"))
    assert "cannot be read as JSON" in output
    assert "norm.weight [32]" in output
    assert "hidden 32, 13 of" in output
    for unread in ("RoPE", "query", "official", "layers 1"):
        assert unread not in output, unread


def test_acceptance_by_depth_counts_what_was_reached() -> None:
    """Runs of 0, 2 and 3 drafts ended by a miss, one of 2 by the end of the text."""
    stats = DecodeStats(num_tokens=11, num_verdicts=4, runs=[0, 2, 3], run_length=2)
    score = _score("chain", [stats], levels=4)
    assert score.by_depth == (3 / 4, 1.0, 1 / 2, 0.0)
    assert score.tau == 10 / 4
