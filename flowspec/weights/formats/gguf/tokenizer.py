"""Rebuilds the tokenizer that a GGUF file holds, as the files of a Hugging Face folder.

Both kinds become a `tokenizer.json`. Byte-level BPE ("gpt2") names how its text is cut into words;
only names whose rule is known are read. SentencePiece ("llama") has scores in place of merges; its
sample is compared with the sentencepiece library's own reading of the same tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowspec.weights.formats.gguf.config import CONTROL
from flowspec.weights.formats.gguf.header import Header

GIVE_TOKENIZER = (
    "give --tokenizer ID or --tokenizer DIR with the Hugging Face tokenizer of the same model"
)
_UNKNOWN, _USER_DEFINED, _UNUSED = 2, 4, 5  # of tokenizer.ggml.token_type, as in SentencePiece
_NORMAL = 1
_SPACE = "▁"  # as SentencePiece writes a space
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreTokenizer:
    """How text is cut into words before merging.

    With `pattern` None the rule of GPT-2 cuts, after single digits where `digits` says so.
    """

    pattern: str | None = None
    digits: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False  # a word that is a token is that token
    adds_bos: bool = False  # unless the file says otherwise


_LLAMA3 = _PreTokenizer(
    pattern=_CONTRACTIONS + r"\p{N}{1,3}" + _AFTER_DIGITS, ignore_merges=True, adds_bos=True
)
# The models' own tokenizers compose characters first (NFC), which llama.cpp leaves out.
_QWEN2 = _PreTokenizer(pattern=_CONTRACTIONS + r"\p{N}" + _AFTER_DIGITS, normalizer="NFC")
PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _PreTokenizer(digits=True),
    "gpt-2": _PreTokenizer(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """The tokens of a file, their types, and the special ones by Hugging Face's names."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    special: Mapping[str, int]  # bos_token, eos_token, unk_token, pad_token -> id
    adds_bos: bool | None
    adds_eos: bool

    def text(self, role: str) -> str | None:
        """Return the text of a special token."""
        return self.tokens[self.special[role]] if role in self.special else None


def rebuild_tokenizer(header: Header) -> dict[str, bytes]:
    """Return the files of the tokenizer, by name.

    Raises ValueError naming what is missing, damaged or of an unsupported kind.
    """
    model = header.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{header.path}: a tokenizer of the kind {model!r} is not rebuilt, only 'gpt2' and "
            f"'llama'; {GIVE_TOKENIZER}"
        )
    vocabulary = _read_vocabulary(header)
    make = _byte_level if model == "gpt2" else _scored
    config = {**_settings(header, vocabulary), "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": make(header, vocabulary),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }


def reference_ids(header: Header, text: str) -> list[int] | None:
    """Return the sentencepiece library's ids of a text; None for a tokenizer of another kind."""
    if header.text("tokenizer.ggml.model") != "llama":
        return None
    from sentencepiece import SentencePieceProcessor

    content = _sentencepiece(header, _read_vocabulary(header))
    return list(SentencePieceProcessor(model_proto=content).encode(text))


def _read_vocabulary(header: Header) -> _Vocabulary:
    tokens = header.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{header.path} has no tokenizer.ggml.tokens; {GIVE_TOKENIZER}")
    kinds = header.numbers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(
            f"{header.path} has {len(tokens)} tokens and {len(kinds)} types of tokens; fetch the "
            "file again"
        )
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {}
    for key, role in roles.items():
        token = header.whole(f"tokenizer.ggml.{key}_token_id")
        if token is not None and token >= len(tokens):
            raise ValueError(
                f"{header.path}: tokenizer.ggml.{key}_token_id is {token}, there are "
                f"{len(tokens)} tokens; {GIVE_TOKENIZER}"
            )
        if token is not None:
            special[f"{role}_token"] = token
    return _Vocabulary(
        tokens=tokens,
        kinds=[int(kind) for kind in kinds],
        special=special,
        adds_bos=header.flag("tokenizer.ggml.add_bos_token"),
        adds_eos=bool(header.flag("tokenizer.ggml.add_eos_token")),
    )


def _settings(header: Header, vocabulary: _Vocabulary) -> dict[str, Any]:
    """Return what `tokenizer_config.json` says of both kinds."""
    config: dict[str, Any] = {role: vocabulary.text(role) for role in vocabulary.special}
    config["clean_up_tokenization_spaces"] = False
    if template := header.text("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _byte_level(header: Header, vocabulary: _Vocabulary) -> bytes:
    """Return a `tokenizer.json` of byte-level BPE."""
    from tokenizers import decoders

    rule = _find_pre_tokenizer(header)
    parts = [merge.partition(" ") for merge in header.texts("tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in parts]
    tokenizer = _new_tokenizer(header, vocabulary, merges, ignore_merges=rule.ignore_merges)
    _cut_words(tokenizer, rule)
    tokenizer.decoder = decoders.ByteLevel()
    _frame(tokenizer, vocabulary, default_bos=rule.adds_bos)
    return str(tokenizer.to_str()).encode()


def _scored(header: Header, vocabulary: _Vocabulary) -> bytes:
    """Return a `tokenizer.json` of SentencePiece's BPE, in the form that Llama 2's own has."""
    from tokenizers import decoders, normalizers

    tokenizer = _new_tokenizer(
        header,
        vocabulary,
        _merges_by_score(vocabulary, _scores(header, vocabulary)),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=vocabulary.text("unk_token"),
    )
    has_prefix = _has_space_prefix(header)
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _frame(tokenizer, vocabulary, default_bos=True)
    return str(tokenizer.to_str()).encode()


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return every way to put a token together from two others, best score first."""
    ids = {
        text: i
        for i, text in enumerate(vocabulary.tokens)
        if vocabulary.kinds[i] in (_NORMAL, _USER_DEFINED)
    }
    found = []
    for text, i in ids.items():
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in ids and right in ids:
                found.append((-scores[i], ids[left], ids[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _new_tokenizer(
    header: Header, vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any
) -> Any:
    """Return a BPE tokenizer with the file's tokens, special ones apart."""
    from tokenizers import AddedToken, Tokenizer, models

    used = {i: text for i, text in enumerate(vocabulary.tokens) if vocabulary.kinds[i] != _UNUSED}
    ids = {text: i for i, text in used.items()}
    if len(ids) != len(used):
        twice = next(text for i, text in used.items() if ids[text] != i)
        raise ValueError(f"{header.path} has the token {twice[:80]!r} twice; {GIVE_TOKENIZER}")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"{header.path}: tokens and merges do not go together ({error}); {GIVE_TOKENIZER}"
        ) from error
    for i, text in used.items():  # one by one, so that their order is that of the ids
        if vocabulary.kinds[i] in (_UNKNOWN, CONTROL, _USER_DEFINED):
            is_special = vocabulary.kinds[i] != _USER_DEFINED
            add = tokenizer.add_special_tokens if is_special else tokenizer.add_tokens
            add([AddedToken(text, special=is_special, normalized=False)])
    return tokenizer


def _find_pre_tokenizer(header: Header) -> _PreTokenizer:
    name = header.text("tokenizer.ggml.pre") or ""
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: the pre-tokenizer {name!r} is not known, only "
            f"{', '.join(PRE_TOKENIZERS)}; {GIVE_TOKENIZER}"
        )
    return PRE_TOKENIZERS[name]


def _cut_words(tokenizer: Any, rule: _PreTokenizer) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    parts: list[Any] = []
    if rule.normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    if rule.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    own = rule.pattern is None
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _frame(tokenizer: Any, vocabulary: _Vocabulary, *, default_bos: bool) -> None:
    """Put the tokens that begin and end every text around it, where the file says so."""
    from tokenizers import processors

    adds_bos = default_bos if vocabulary.adds_bos is None else vocabulary.adds_bos
    around = {"bos_token": adds_bos, "eos_token": vocabulary.adds_eos}
    used = {role: vocabulary.text(role) for role, is_on in around.items() if is_on}
    texts = [used.get("bos_token"), "$A", used.get("eos_token")]
    if not any(used.values()):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[text for text in texts if text],
        special_tokens=[(text, vocabulary.special[role]) for role, text in used.items() if text],
    )


def _scores(header: Header, vocabulary: _Vocabulary) -> list[float]:
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(
            f"{header.path} has {len(vocabulary.tokens)} tokens and {len(scores)} scores; "
            f"{GIVE_TOKENIZER}"
        )
    return scores


def _has_space_prefix(header: Header) -> bool:
    """Whether a text begins with a space; refuses what is not rebuilt of its normalization."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if header.is_set(f"tokenizer.ggml.{key}"):
            raise ValueError(
                f"{header.path}: tokenizer.ggml.{key} is set, which is not rebuilt; "
                f"{GIVE_TOKENIZER}"
            )
    return header.flag("tokenizer.ggml.add_space_prefix") is not False


def _sentencepiece(header: Header, vocabulary: _Vocabulary) -> bytes:
    """Return a SentencePiece model of BPE with byte fallback."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    scores = _scores(header, vocabulary)
    for text, score, kind in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = True
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.bos_id = vocabulary.special.get("bos_token", -1)
    trainer.eos_id = vocabulary.special.get("eos_token", -1)
    trainer.unk_id = vocabulary.special.get("unk_token", 0)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = _has_space_prefix(header)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(model.SerializeToString())
