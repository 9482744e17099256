"""GGUF against transformers, its own package and llama.cpp's formulas; what is refused, by name."""

import shutil
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flowspec.tokenizer import load_tokenizer, render_chat
from flowspec.weights.checkpoint import open_checkpoint, read_model_config
from flowspec.weights.formats import TensorReader
from flowspec.weights.formats.gguf.header import TENSOR_TYPES, read_gguf_header
from flowspec.weights.formats.gguf.tensors import named_tensors
from flowspec.weights.formats.gguf.tokenizer import PRE_TOKENIZERS
from flowspec.weights.load import load_whole
from tests.support import families
from tests.support.gguf_files import TEMPLATE, write_gguf
from tests.support.models import full_forward
from tests.support.tokenizer_checks import SAMPLE
from tests.support.vocabularies import CORPUS

TOLERANCE = 1e-4
TOKENS = [1, *((7 * i * i + 3) % families.VOCAB for i in range(99))]
# Those that transformers reads and that tests can write: quantized, or random blocks.
KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
FAMILIES = [*families.FAMILIES, *(m for m in families.MATRIX if "llama3" not in m or "mist" in m)]
FAMILIES = [  # what a GGUF file can say
    name
    for name in FAMILIES
    if not (name.startswith("qwen") and name.endswith("window"))  # not which layers have it
    and name != "mistral-llama3-window"  # the converter writes factors for Llama alone
    and "yarn_" not in name  # it has no key for mscale, truncate and the whole factor
]


def our_logits(path: Path) -> torch.Tensor:
    """Logits [n, V] of TOKENS."""
    model = load_whole(path, dtype="float32")
    return model.logits(full_forward(model, TOKENS)[0])


def their_logits(model) -> torch.Tensor:
    """Logits [n, V] of transformers."""
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def wide_model(seed: int = 0) -> LlamaForCausalLM:
    """A model whose rows hold a block of 256 values."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=families.VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.dim() == 2 else weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A small file with tokenizer."""
    return write_gguf(tmp_path / "tiny.gguf", families.make("llama3"))


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_loading_the_same_file(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", wide_model(), kind, tokenizer="")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    expected = their_logits(theirs.eval())
    assert expected.std() > 0.01, "a reference of near-equal logits would show nothing"
    torch.testing.assert_close(our_logits(path), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_that_was_written(tmp_path, family):
    """Every family, with RoPE's factors, scaling, window, biases and tied output."""
    model = families.make(family)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer="")
    torch.testing.assert_close(our_logits(path), their_logits(model), atol=TOLERANCE, rtol=0)


def test_rope_factors_change_the_logits(tmp_path):
    """Without them the text is another, so the test above sees whether they are used."""
    model = families.make("llama3")
    write_gguf(tmp_path / "a.gguf", model, tokenizer="")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    write_gguf(tmp_path / "b.gguf", model, tokenizer="")
    one, other = our_logits(tmp_path / "a.gguf"), our_logits(tmp_path / "b.gguf")
    assert (one - other).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_every_type_is_read_as_its_own_package_reads_it(tmp_path, kind):
    """Random bytes, in matrices larger than a piece and with rows in pairs."""
    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(3).integers(0, 256, (1100, 1024 // values * num_bytes), np.uint8)
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, raw.view(dtype), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    places = read_gguf_header(tmp_path / "m.gguf").tensors
    found = named_tensors(places, num_heads=11, num_kv_heads=11, paired=True)
    with np.errstate(all="ignore"):
        plain = gguf.dequantize(raw.view(dtype), number)
    rows = plain.reshape(11, 50, 2, 1024).swapaxes(1, 2).reshape(1100, 1024)
    expected = {"model.embed_tokens.weight": plain, "model.layers.0.self_attn.q_proj.weight": rows}
    with TensorReader() as reader:
        for name, values in expected.items():
            stored = found[name]
            pieces = [bytes(piece) for piece in reader.pieces(stored)]
            assert max(map(len, pieces)) <= 4 << 20, "more than a piece is in memory at once"
            data = bytearray(b"".join(pieces))
            read = torch.frombuffer(data, dtype=getattr(torch, stored.dtype)).float()
            np.testing.assert_array_equal(read.numpy().reshape(1100, 1024), values)


# Config -----------------------------------------------------------------------------------------


def test_config_is_that_of_the_authors(tmp_path):
    """Numbers come back as they were written, not as float32 rounds them."""
    model = families.make("vicuna")
    config = read_model_config(write_gguf(tmp_path / "m.gguf", model))
    assert config.architecture == "LlamaForCausalLM"
    assert config.rms_norm_eps == 1e-5
    assert config.max_position_embeddings == 256
    assert config.rope_theta == 10000.0
    assert not config.tie_word_embeddings


def test_every_token_that_ends_an_answer_is_known(tmp_path):
    """The file's end of text and end of turn, and control tokens that llama.cpp knows by name."""
    keys = {"tokenizer.ggml.eot_token_id": 7}
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), keys=keys)
    assert read_model_config(path).eos_token_ids == (1, 7, 2)  # 2 is <|im_end|>
    assert read_model_config(path).bos_token_id == 0


def test_yarn_and_its_attention_factor(tmp_path):
    """llama.cpp's factor multiplies yarn's own."""
    keys = {"qwen3.rope.scaling.attn_factor": 0.5}
    path = write_gguf(tmp_path / "m.gguf", families.make("qwen3-yarn"), tokenizer="", keys=keys)
    scaling = read_model_config(path).rope_scaling
    assert scaling is not None
    assert scaling.factor == 4.0
    assert scaling.attention_factor == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))


def test_unknown_keys_are_named_and_do_not_stop(tmp_path, caplog):
    """An author's note is no reason to turn a model away."""
    keys = {"llama.note_of_the_author": 3, "llama.expert_count": 0, "llama.logit_scale": 1.0}
    path = write_gguf(tmp_path / "m.gguf", families.make("llama2"), keys=keys)
    open_checkpoint(path)
    assert "nothing is known of llama.note_of_the_author;" in caplog.text


REFUSED = {
    "architecture": ({"general.architecture": "gemma3"}, "architecture 'gemma3'.*llama, qwen2"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is set"),
    "scale": ({"llama.logit_scale": 0.5}, "llama.logit_scale is set"),
    "sections": ({"llama.rope.dimension_sections": [1, 2]}, "rope.dimension_sections is set"),
    "partial": ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4, heads have 8"),
    "longrope": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
        "'longrope'.*not supported, only none, linear and yarn",
    ),
    "both": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        "'yarn' with rope_freqs.weight is not supported",
    ),
    "layers": ({"llama.attention.head_count": [4, 4, 2, 4]}, "head_count differs between layers"),
    "missing": ({"llama.block_count": None}, "lacks the key llama.block_count"),
    "kind": ({"llama.block_count": "four"}, "block_count is 'four', needed: a whole number"),
    "huge": ({"llama.block_count": 3_000_000}, "block_count is 3000000"),
    "deeper": (
        {"llama.block_count": 5},
        "block_count is 5, but there is no blk.4.attn_norm.weight",
    ),
    "wider": ({"llama.embedding_length": 64}, "metadata asks for"),
    "heads": ({"llama.attention.head_count_kv": 3}, "no multiple"),
    "shallower": ({"llama.block_count": 3}, "holds 9 tensors that LlamaForCausalLM does not have"),
    "embeddings": ({"llama.attention.causal": False}, "attention.causal is false"),
    "parts": ({"split.count": 3}, "is one of 3 parts; name it as llama.cpp does"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    keys, said = REFUSED[name]
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), keys=keys)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(path)


def test_a_window_without_its_layers_is_refused(tmp_path):
    keys = {"qwen2.attention.sliding_window": 24}
    path = write_gguf(tmp_path / "m.gguf", families.make("qwen2"), keys=keys)
    with pytest.raises(ValueError, match=r"sliding_window is 24.*which layers"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blk.0.ffn_gate_exps.weight", "mixtures of experts are not supported"),
        ("blk.0.attn_qkv.weight", "only plain Llama, Mistral, Qwen2 and Qwen3"),
        ("blk.99999999.attn_q.weight", "only plain Llama"),
    ],
)
def test_tensors_of_other_models_are_refused_by_name(tmp_path, name, said):
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), extra=name)
    with pytest.raises(ValueError, match=f"{name}: .*{said}"):
        open_checkpoint(path)


def test_a_type_that_cannot_be_dequantized_is_refused_by_name(tiny):
    """Q8_1 exists for activations, 41 has no reader, 99 does not exist."""
    raw = tiny.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 16  # after dimensions
    for number, shown in ((9, "Q8_1"), (41, "Q1_0"), (99, "number 99")):
        tiny.write_bytes(raw[:at] + struct.pack("<I", number) + raw[at + 4 :])
        with pytest.raises(ValueError, match=rf"blk.0.ffn_up.weight has the type {shown}.*Q4_K"):
            open_checkpoint(tiny)


# Split sets and folders -------------------------------------------------------------------------


def test_a_split_set_is_one_model(tmp_path):
    """Named by any part or by the folder; its values are those of one file."""
    model = families.make("llama3")
    first = write_gguf(tmp_path / "m.gguf", model, parts=3)
    assert first.name == "m-00001-of-00003.gguf"
    for path in (tmp_path, first, tmp_path / "m-00003-of-00003.gguf"):
        logits = our_logits(path)
        torch.testing.assert_close(logits, their_logits(model), atol=TOLERANCE, rtol=0)


def test_missing_and_exchanged_parts_are_named(tmp_path):
    first = write_gguf(tmp_path / "m.gguf", families.make("llama3"), parts=3)
    second, third = (tmp_path / f"m-0000{k}-of-00003.gguf" for k in (2, 3))
    shutil.copy(second, tmp_path / "kept")
    shutil.copy(third, second)
    with pytest.raises(
        ValueError, match=r"00002-of-00003.gguf says that it is part 2 .from 0. of 3"
    ):
        open_checkpoint(first)
    second.unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 parts: m-00002-of-00003.gguf"):
        open_checkpoint(first)
    shutil.copy(tmp_path / "kept", tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="several GGUF models"):
        open_checkpoint(tmp_path)


# Tokenizer --------------------------------------------------------------------------------------

LINES = (
    *CORPUS,
    *(
        "",
        " ",
        "a  b\t\n\n c",
        "it's we'LL 1234567 x=1.5",
        "<s>not special? </s>",
        "e\u0301 \u00e9",
    ),
    *("\u0645\u0631\u062d\u0628\u0627", "👩‍👩‍👧 ok", "x" * 300, "3.14\r\n\r\nend  "),
)


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "llama"])
def test_the_tokenizer_gives_every_text_back(tmp_path, name):
    """Special tokens, the chat template and BOS are those of the file."""
    keys = {"tokenizer.ggml.add_bos_token": True}
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), tokenizer=name, keys=keys)
    checkpoint = open_checkpoint(path)
    checkpoint.check_tokenizer()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file, content in checkpoint.tokenizer_files().items():
        (folder / file).write_bytes(content)
    tokenizer = load_tokenizer(folder)
    for line in (*LINES, SAMPLE):
        if name == "llama" and "<s>" in line:
            continue  # there a space goes before the text after each special token
        ids = tokenizer.encode(line, add_special_tokens=False)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        composed = normalize("NFC", line) if "qwen" in name else line
        assert text == composed, name
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id
    assert tokenizer.encode("</s>", add_special_tokens=False) == [tokenizer.eos_token_id]
    asked = render_chat(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(asked) == "[user] hi\n[assistant]"


def test_sentencepiece_gives_the_ids_of_its_own_library(tmp_path):
    """From scores alone, on texts with bytes that the vocabulary lacks."""
    from sentencepiece import SentencePieceProcessor

    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), tokenizer="llama")
    own = SentencePieceProcessor(model_file=str(tmp_path / "spm" / "tokenizer.model"))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file, content in open_checkpoint(path).tokenizer_files().items():
        (folder / file).write_bytes(content)
    tokenizer = load_tokenizer(folder)
    lines = [line for line in LINES if "<s>" not in line]  # there the library sees no token
    for line in (*lines, SAMPLE):
        assert tokenizer.encode(line, add_special_tokens=False) == own.encode(line), line


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_words_are_cut_as_the_models_own_tokenizers_cut_them(tmp_path, name):
    """Digits alone or by three, contractions, spaces: the words before merging."""
    expected = {
        "gpt-2": ["We", "'", "LL", "Ġsee", "Ġ1234", "ĊĊ", "Ġok"],
        "smollm": ["We", "'", "LL", "Ġsee", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġok"],
        "qwen2": ["We", "'LL", "Ġsee", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġok"],
        "llama-bpe": ["We", "'LL", "Ġsee", "Ġ", "123", "4", "ĊĊ", "Ġok"],
    }
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), tokenizer=name)
    raw = open_checkpoint(path).tokenizer_files()["tokenizer.json"]
    cut = Tokenizer.from_str(raw.decode()).pre_tokenizer.pre_tokenize_str("We'LL see 1234\n\n ok")
    assert [word for word, _ in cut] == expected[name]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not known, only llama-bpe"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer '' is not known"),
        ({"tokenizer.ggml.model": "t5"}, "of the kind 't5' is not rebuilt"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens and 340 types"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, "do not go together"),
        ({"tokenizer.ggml.merges": ["qq"]}, "do not go together"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, there are 340 tokens"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
    ],
)
def test_a_tokenizer_that_is_not_rebuilt_is_refused_with_advice(tmp_path, keys, said):
    """Its weights are read all the same: --tokenizer takes its place."""
    path = write_gguf(tmp_path / "m.gguf", families.make("llama3"), keys=keys)
    checkpoint = open_checkpoint(path)
    with pytest.raises(ValueError, match=said) as raised:
        checkpoint.check_tokenizer()
    if "types" not in said:
        assert "--tokenizer ID or --tokenizer DIR" in str(raised.value)


# Hostile files ----------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    """Do everything that a split does before and while it reads."""
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer_files()
    with TensorReader() as reader:
        for stored in checkpoint.tensors.values():
            for _ in reader.pieces(stored):
                pass


def test_a_truncated_file_is_refused_wherever_it_ends(tiny):
    raw = tiny.read_bytes()
    for end in [*range(0, 3000, 7), *range(3000, len(raw) - 32, 997)]:
        tiny.write_bytes(raw[:end])
        with pytest.raises(ValueError, match="tiny.gguf"):
            read_all(tiny)


def test_a_damaged_file_is_read_or_refused(tiny):
    """Any byte of the header may be any other; nothing but ValueError comes of it."""
    raw = tiny.read_bytes()
    rng = np.random.default_rng(0)
    read = 0
    header = raw.index(b"blk.3.ffn_down.weight") + 200
    for _ in range(400):
        damaged = bytearray(raw)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))])
        tiny.write_bytes(damaged)
        with suppress(ValueError):
            read_all(tiny)
            read += 1
    assert 40 < read < 360


@pytest.mark.slow
def test_random_damage_is_read_or_refused_in_bounded_memory(tiny):
    """Eight bytes that claim 2**63 of anything allocate nothing."""
    raw = tiny.read_bytes()
    read_all(tiny)  # imports
    header = raw.index(b"blk.3.ffn_down.weight") + 200
    tracemalloc.start()
    for claim in (1 << 63, (1 << 32) - 1, 1 << 40, 1 << 24):
        for at in range(8, header, 71):
            tiny.write_bytes(raw[:at] + struct.pack("<Q", claim) + raw[at + 8 :])
            with suppress(ValueError):
                read_all(tiny)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def bomb(*parts: bytes) -> bytes:
    """A header with one metadata entry, then these bytes."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + b"".join(parts) + bytes(4096)


BOMBS = {
    "tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(99),
        "claims 1152921504606846976",
    ),
    "entries": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(99),
        "metadata entries, which",
    ),
    "text": (bomb(struct.pack("<IQ", 8, 1 << 60)), "k claims 1152921504606846976 bytes"),
    "long": (bomb(struct.pack("<IQ", 8, 9000)), "truncated or damaged at k: 9000 bytes"),
    "array": (bomb(struct.pack("<IIQ", 9, 5, 1 << 60)), "claims 1152921504606846976 elements"),
    "texts": (bomb(struct.pack("<IIQ", 9, 8, 1 << 50)), "elements, which do not fit"),
    "nested": (bomb(struct.pack("<IIQ", 9, 9, 1)), "array of the unsupported type 9"),
    "type": (bomb(struct.pack("<I", 77)), "unknown type 77"),
    "truth": (bomb(struct.pack("<IB", 7, 2)), "truth value 2"),
    "version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9, read are"),
    "old": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, read are"),
    "big": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "other": (b"PK\x03\x04" + bytes(99), "is not a GGUF file"),
    "empty": (b"", "is not a GGUF file"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_claims_are_compared_with_the_file(tmp_path, name):
    content, said = BOMBS[name]
    (tmp_path / "bomb.gguf").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path / "bomb.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_tensor_beyond_the_file_or_over_another_is_refused(tiny):
    """Offsets are compared with the file's size before anything is read."""
    raw = tiny.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 16 + 4  # after dimensions and type
    for offset, said in ((1 << 62, "needs 5120 bytes at"), (33, "needs 5120"), (0, "overlap")):
        tiny.write_bytes(raw[:at] + struct.pack("<Q", offset) + raw[at + 8 :])
        with pytest.raises(ValueError, match=said):
            open_checkpoint(tiny)
