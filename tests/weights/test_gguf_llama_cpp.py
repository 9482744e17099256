"""Token ids of rebuilt tokenizers against llama.cpp reading the same file."""

import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flowspec.tokenizer import load_tokenizer
from flowspec.weights.formats import find_model
from tests.support.gguf_files import write_gguf
from tests.support.vocabularies import CORPUS

llama_cpp = pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")

ROOT = Path(__file__).resolve().parents[2]
NUM_LINES = 10_000
VOCAB = 1500
POOLS = (
    "abc XYZ 0123456789 .,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`\n\t  ",
    "äöüßéèñçøåŁžαβγδЖдкюяשלוםمرحبا你好世界日本語テスト한국어हिन्दी",
    "😀👩‍👩‍👧🇩🇪🏳️‍🌈ﬁ²³½Ⅷ١٢٣",
    " \u00a0\u2003\u3000\n\r\n\te\u0301",
    ("'s", "'t", "'re", "'VE", "'m", "'LL", "'d", "</s>", "<|im_end|>"),
)


def written_lines() -> list[str]:
    """The lines of this project's texts and modules, in a fixed order of chance."""
    files = sorted([*ROOT.glob("docs/*.md"), *(ROOT / "flowspec").rglob("*.py")])
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    random.Random(1).shuffle(lines)
    return lines


def mixed_lines() -> Iterator[str]:
    """Written text and random characters of many scripts by turns."""
    rng, written = random.Random(0), written_lines()
    for number in range(NUM_LINES // 2):
        yield written[number % len(written)]
        yield "".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randint(1, 60)))


def their_ids(address: str, line: str) -> list[int]:
    """llama.cpp's tokens of a line, special ones read as such."""
    asked = json.dumps({"content": line, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{address}/tokenize", asked, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm", "gpt-2", "llama"])
def test_ids_are_those_of_llama_cpp(tmp_path, name):
    """Qwen's own tokenizer composes characters first, llama.cpp does not: left out there."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    corpus = (*written_lines()[:4000], *CORPUS)
    path = write_gguf(
        tmp_path / "m.gguf", LlamaForCausalLM(config), tokenizer=name, corpus=corpus,
        vocab_size=VOCAB,
    )  # fmt: skip
    for file, content in find_model(path)[1].tokenizer_files().items():
        (tmp_path / file).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    server = llama_cpp.Server(parameters)
    compared = 0
    for line in mixed_lines():
        if name == "qwen2" and normalize("NFC", line) != line:
            continue
        found = tokenizer.encode(line, add_special_tokens=False)
        assert found == their_ids(server.listening_address, line), repr(line)
        compared += 1
    assert compared > 0.7 * NUM_LINES
