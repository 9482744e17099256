"""The demo family's training code packs, exports and drafts as the served models do."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import TreeKVCache
from flowspec.model.llama import rope_angles, rope_frequencies
from flowspec.speculation.drafters.eagle.load import load_eagle
from flowspec.training import (
    chat_tokenizer,
    corpus,
    fast_eagle,
    generate,
    train_drafters,
    train_target,
)
from flowspec.training.fast_llama import (
    FastLlama,
    Shape,
    document_bias,
    load_hf_tensors,
    rope_table,
)
from flowspec.weights.load import load_whole

ROOT = Path(__file__).resolve().parents[2]


TINY = Shape(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
             num_kv_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer.train(["Two and two make four.\n", "How many apples are 12?"], 300)


@pytest.fixture(scope="module")
def target() -> FastLlama:
    """Return a random target whose layers change the output, without compilation."""
    model = FastLlama(TINY)
    model.block = train_free_block
    with torch.no_grad():
        for layer in model.layers:
            for weight in list(layer)[:4]:
                weight.copy_(torch.randn_like(weight.float()) * 0.2)
    return model.requires_grad_(False)


def train_free_block(*args):
    from flowspec.training.fast_llama import block_forward

    return block_forward(*args)


@pytest.fixture(scope="module")
def folder(target, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    chat_tokenizer.save(tokenizer, path / "tokenizer")
    train_target.export(target, path / "tokenizer", path / "target")
    return path


def test_template_and_encoding_agree(tokenizer, folder):
    """The model is trained on exactly what a chat request sends."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder / "target")
    message = [{"role": "user", "content": "How many apples?"}]
    ids, start = corpus.encode(tokenizer, "How many apples?", "four.")
    sent = hf.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert list(sent) == ids[:start]
    assert corpus.EOS in ids[start:]


def test_packing_keeps_every_token_once(tokenizer):
    rng = random.Random(0)
    samples = [(np.arange(n, dtype=np.uint16) + 10, 3) for n in (5, 30, 9, 70, 12)]
    tokens, weights = corpus.pack(samples, 32, 0.5, rng)
    assert sorted(tokens[tokens > 0]) == sorted(t for ids, _ in samples for t in ids)
    assert ((weights > 0) <= (tokens > 0)).all()


def test_long_copies_stay_whole():
    sample = (np.ones(50, dtype=np.uint16), 3)
    kept = corpus.that_fit({"summ": [sample], "gsm8k": [sample]}, 32)
    assert (len(kept["summ"]), len(kept["gsm8k"])) == (0, 1)


def test_export_runs_the_same_in_the_stage_model(target, folder):
    """The exported folder, read by the project's own loader, gives the trainer's hidden states."""
    ids = torch.randint(6, 300, (1, 20))
    model = load_whole(folder / "target", dtype="float32")
    served, _ = run_rows(model, model.new_cache(32), ids[0], range(20), parents=None)
    trained = target.features(ids, document_bias(ids))[0].float()
    assert torch.allclose(served, trained, atol=0.15)
    again = FastLlama(TINY, seed=9)
    load_hf_tensors(again, target.hf_tensors())
    assert torch.equal(again.layers[1][2], target.layers[1][2])


def test_unrolled_training_is_what_the_served_head_computes(target, folder):
    """Step k of training equals k chained rows of EagleNet over its tree cache."""
    head = fast_eagle.FastEagle(target.embed.detach(), (2, 2, 16), 40)
    head.step = fast_eagle.draft_step
    with torch.no_grad():
        for weight in list(head.weights):
            weight.add_(torch.randn_like(weight.float()) * 0.1)
    train_drafters.export_eagle(head, target, folder / "eagle")
    ids, length, steps = torch.randint(6, 300, (1, 13)), 12, 3
    features = target.features(ids[:, :-1], document_bias(ids[:, :-1]))
    row = 9  # true rows up to 9, then rows 10 and 11 from the head's own features
    sees = torch.ones(1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        first, chains = head.unroll(
            ids[:, 1:], features, rope_table(TINY, length), sees, torch.tensor([[row]]), steps
        )
    outputs = [first[0, row], *(out[0, 0] for out in chains)]
    config = load_whole(folder / "target", dtype="float32").config
    net = load_eagle(folder / "eagle", target_config=config, dtype="float32")
    cache = TreeKVCache(num_layers=1, num_kv_heads=2, head_dim=16, capacity=32)
    true, frequencies = features[0].float(), rope_frequencies(config)
    rope = rope_angles(frequencies, torch.arange(row + 1), torch.float32)
    window = cache.append_prefix(row + 1)
    guess = net(ids[0, 1 : row + 2], true[: row + 1], rope, window.attend(0))[-1:]
    for k, trained in enumerate(outputs):
        difference = (guess[0] - trained.float()).norm() / trained.float().norm()
        assert difference < 0.03, f"step {k + 1}"
        if row + k + 1 == length:
            break
        rope = rope_angles(frequencies, torch.tensor([row + k + 1]), torch.float32)
        window = cache.append_tree([k - 1])
        guess = net(ids[0, row + k + 2][None], guess, rope, window.attend(0))


def test_an_exported_head_is_taken_up_whole(target, folder):
    """Training continues from the export: loading it gives the same tensors."""
    head = fast_eagle.FastEagle(target.embed.detach(), (2, 2, 16), 40)
    with torch.no_grad():
        for weight in list(head.weights):
            weight.copy_(torch.randn_like(weight.float()))
    again = fast_eagle.FastEagle(target.embed.detach(), (2, 2, 16), 40, seed=5)
    again.load(head.tensors())
    assert all(torch.equal(a, b) for a, b in zip(again.weights, head.weights, strict=True))
    assert not torch.equal(head.weights[2], torch.zeros_like(head.weights[2]))


def test_every_prompt_is_answered_greedily_and_sampled(target, monkeypatch):
    """Answers of one prompt are neighbours; less room makes more batches, not other answers."""
    monkeypatch.setattr(generate, "repeated_share", lambda text: 0.0)
    prompts = [np.array([1, *range(6, 6 + n)], dtype=np.uint16) for n in (3, 9, 5)]
    wanted = {tuple(p): generate.continue_batch(target, [p], torch.zeros(1), 4)[0] for p in prompts}
    monkeypatch.setattr(generate, "ROOM", 10)
    made = generate.self_generate(
        target, prompts, answers=2, batch=8, max_new=4, minutes=1.0, seed=0
    )
    assert len(made) == 6
    for ids, start in made[::2]:
        assert ids[start:].tolist() == wanted[tuple(ids[:start])]
    assert all(
        tuple(a[:s]) == tuple(b[:s]) for (a, s), (b, _) in zip(made[::2], made[1::2], strict=True)
    )


def test_generation_with_cache_is_the_model_alone(target):
    """Greedy continuation of left-padded rows equals step-by-step argmax."""
    prompts = [np.array([1, 9, 8], dtype=np.uint16), np.array([1, 7, 6, 5, 40], dtype=np.uint16)]
    texts = generate.continue_batch(target, prompts, torch.zeros(2), 4)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [*prompt.tolist(), *text]
        x = torch.tensor([ids])
        logits = target.features(x, document_bias(x))[0] @ target.head.T
        chosen = logits[len(prompt) - 1 : -1].float()
        best = chosen.max(-1).values - chosen.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert float(best.max()) < 0.1  # equal up to bf16 ties


def test_looping_text_is_recognised():
    assert generate.repeated_share([1, 2, 3, 4] * 20) > 0.3
    assert generate.repeated_share(list(range(50))) == 0.0


def test_shipped_folders_are_complete():
    """The models in the repository load and fit together."""
    shipped = ROOT / "models" / "demo"
    model = load_whole(shipped / "target", dtype="float32")
    net = load_eagle(shipped / "eagle", target_config=model.config, dtype="float32")
    assert net.fc.weight.shape == (256, 512)
    assert json.loads((shipped / "draft" / "config.json").read_text())["vocab_size"] == 4096
    assert load_whole(shipped / "draft").config.vocab_size == model.config.vocab_size
    size = sum(p.stat().st_size for p in shipped.rglob("*") if p.is_file())
    assert size < 40 * 2**20
