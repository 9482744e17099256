"""A tiny Hugging Face checkpoint on disk, with tokenizer and EAGLE head."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from flowspec.model.architecture import ModelConfig
from flowspec.model.stage_model import StageModel
from flowspec.speculation.drafters.eagle.network import EagleNet
from tests.support.tiny import CONFIG, randomize

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how many apples are left in the box?",
)


def save_checkpoint(folder: Path, *, num_layers: int = 4) -> Path:
    """Save a tiny Hugging Face checkpoint with tokenizer, and an EAGLE head in its `eagle/`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    config = replace(CONFIG, vocab_size=tokenizer.get_vocab_size(), num_layers=num_layers)
    model = StageModel(
        config, first_layer=0, last_layer=num_layers, with_embedding=True, with_head=True
    )
    randomize(model, seed=3)
    assert model.lm_head is not None
    model.lm_head.weight[1] = 0.0  # `</s>` is never the likeliest, so that answers are long
    target = folder / "target"
    target.mkdir(parents=True)
    save_file(model.state_dict(), target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (target / "tokenizer_config.json").write_text(json.dumps(words))
    (target / "config.json").write_text(json.dumps(_hf_config(config)))
    net = EagleNet(replace(config, num_layers=1), fc_bias=True)
    randomize(net, seed=4)
    eagle = folder / "eagle"
    eagle.mkdir()
    save_file(net.state_dict(), eagle / "model.safetensors", metadata={"format": "pt"})
    (eagle / "config.json").write_text(json.dumps(_hf_config(replace(config, num_layers=1))))
    return folder


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
