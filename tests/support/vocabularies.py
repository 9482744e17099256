"""Small vocabularies in every form of model folders, made without torch."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = (
    "Anna has 3 boxes with 12 apples in each box.",
    "the cat sat on the mat, and the dog sat on the log",
    "for i in range(10):\n    print(i)",
    "naïve café, 你好世界, 😀😃 ünïcödé",
)
SPECIAL = ("<s>", "</s>")


def byte_level(
    corpus: Iterable[str] = CORPUS, *, vocab_size: int = 340, special: Iterable[str] = SPECIAL
) -> Tokenizer:
    """Train merges over bytes, like Llama 3, so that characters split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(corpus) * 4, trainer)
    return tokenizer


def write_json_form(folder: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    return write_config(folder, **config)


def write_vocabulary(folder: Path, **config: Any) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().model.save(str(folder))
    return write_config(folder, **config)


def write_sentencepiece(
    folder: Path, *, kind: str = "bpe", corpus: Sequence[str] = CORPUS, **options: Any
) -> Path:
    """Write only tokenizer.model, like Llama 2; `options` go to its trainer."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    llama = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "vocab_size": 340,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus] * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        minloglevel=2,
        **{**llama, **options},
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def write_config(folder: Path, **config: Any) -> Path:
    """Write tokenizer_config.json, with `tokenizer_class` and the like."""
    words = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder
