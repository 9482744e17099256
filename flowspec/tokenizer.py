"""Tokenizers from model folders, read from the vocabulary file alone and compared with it.

The class that tokenizer_config.json names decides nothing: some releases of transformers rebuild a
tokenizer by that class and lose spaces. transformers and its like are imported here alone, and
late, since that takes seconds.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_FORMS = (JSON_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)  # the first that is there is read
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NO_LIMIT = 2**62  # of a text's length: the context's limit is checked elsewhere
_SENTENCEPIECE_BPE = 2  # model_type in its trainer's settings
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS_POINTER = b"version https://git-lfs"
_BYTE_LEVEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
# Spaces in a row, before punctuation and at line ends; digits, accents, other scripts, an emoji.
SAMPLE = (
    "Anna has 3 boxes , 12 apples; she did n't count.\n\n\tnaïve café,  Ünïcode 你好 мир 😀 0.5 end"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reference:
    """How the vocabulary file's own library encodes and decodes."""

    library: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in `folder`, compared with its file.

    Raises ValueError where there is none, a file is damaged, a package is missing, or the
    tokenizer does not encode and decode a sample as the file says.
    """
    folder = Path(folder)
    form = _find_form(folder)
    _check_files(folder, form)
    read = {
        JSON_FILE: _read_json_form,
        SENTENCEPIECE_FILE: _read_sentencepiece,
        VOCABULARY_FILE: _read_vocabulary,
    }[form]
    try:
        tokenizer, reference = read(folder)
    except _FormError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # for damaged files the libraries raise bare Exceptions too
        raise ValueError(
            f"the tokenizer in {folder} cannot be loaded: {form}: {_one_line(error)}; fetch its "
            "files again"
        ) from error
    tokenizer.model_max_length = _NO_LIMIT
    tokenizer.clean_up_tokenization_spaces = False  # it would remove spaces before punctuation
    if reference is not None:
        _compare(tokenizer, reference, folder / form)
    else:
        _check_round_trip(tokenizer, folder / form)
    return tokenizer


class _FormError(ValueError):
    """A vocabulary file that is not of a form that is read, in this module's own words."""


def _find_form(folder: Path) -> str:
    for name in _FORMS:
        if (folder / name).exists():
            return name
    raise ValueError(
        f"{folder} has no tokenizer (none of {', '.join(_FORMS)}); copy its files there from where "
        "the model is from"
    )


def _check_files(folder: Path, form: str) -> None:
    """Raises ValueError naming a file that is no JSON, a Git LFS pointer or missing."""
    with (folder / form).open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(
            f"{folder / form} is a Git LFS pointer, not the file itself; run `git lfs pull` where "
            "the model was cloned, or download the file"
        )
    if form == VOCABULARY_FILE and not (folder / MERGES_FILE).exists():
        raise ValueError(f"{folder} has {VOCABULARY_FILE} but no {MERGES_FILE}; copy it there too")
    for path in (folder / name for name in _SMALL_FILES):
        if path.exists() and not isinstance(_read_small(path), dict):
            raise ValueError(f"{path} must hold a JSON object; fetch it again")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file in `folder` holds; nothing where there is none."""
    path = folder / name
    return dict(_read_small(path)) if path.exists() else {}


def _read_small(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None


def _read_json_form(folder: Path) -> tuple[Any, _Reference]:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_file(str(folder / JSON_FILE))
    own.no_truncation()
    own.no_padding()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    reference = _Reference(
        f"tokenizers {version('tokenizers')}",
        lambda text: list(own.encode(text, add_special_tokens=False).ids),
        lambda ids: own.decode(ids, skip_special_tokens=False),
    )
    return tokenizer, reference


def _read_sentencepiece(folder: Path) -> tuple[Any, _Reference]:
    path = folder / SENTENCEPIECE_FILE
    with path.open("rb") as file:
        if _TIKTOKEN_LINE.match(file.read(200)):
            raise _FormError(
                f"{path} is in tiktoken's form, which is not read; give the folder of the same "
                f"model that has {JSON_FILE}"
            )
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [name for module, name in needed.items() if not _is_installed(module)]
    if missing:
        raise _FormError(
            f"{path} is a SentencePiece model, and reading it needs {' and '.join(missing)}; run "
            f"`{sys.executable} -m pip install {' '.join(missing)}`, or give a folder with "
            f"{JSON_FILE}"
        )
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import LlamaTokenizer

    content = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    if content.trainer_spec.model_type != _SENTENCEPIECE_BPE:
        raise _FormError(
            f"{path} is a SentencePiece model of another type than BPE, which is not read; give a "
            f"folder with {JSON_FILE}"
        )
    own = SentencePieceProcessor(model_file=str(path))
    begins = _settings(folder, "tokenizer_config.json").get("add_bos_token", True)
    tokenizer = LlamaTokenizer.from_pretrained(
        str(folder), local_files_only=True, add_bos_token=begins
    )
    library = f"sentencepiece {version('sentencepiece')}"
    return tokenizer, _Reference(library, own.encode, own.decode)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or was barred from being imported
        return False


def _read_vocabulary(folder: Path) -> tuple[Any, None]:
    """Byte-level BPE. The two files do not tell how words are cut, so the class's name must."""
    import transformers

    named = str(_settings(folder, "tokenizer_config.json").get("tokenizer_class") or "")
    if not named:
        model_type = str(_settings(folder, "config.json").get("model_type"))
        named = _BYTE_LEVEL.get(model_type, "none")
    name = named.removesuffix("Fast")
    if name not in _BYTE_LEVEL.values():
        known = " and ".join(sorted(set(_BYTE_LEVEL.values())))
        raise _FormError(
            f"{folder} has {VOCABULARY_FILE} and {MERGES_FILE}, which are read with the "
            f"tokenizer_class {known}; tokenizer_config.json names {named}; give a folder with "
            f"{JSON_FILE}"
        )
    return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True), None


def _compare(tokenizer: Any, reference: _Reference, path: Path) -> None:
    """Raises ValueError with both values where the sample's tokens or text are not the file's."""
    found = list(tokenizer.encode(SAMPLE, add_special_tokens=False))
    needed = reference.encode(SAMPLE)
    texts = [tokenizer.decode(found, skip_special_tokens=False), reference.decode(needed)]
    if texts[0] != texts[1]:
        own, file = texts
    elif found != needed:
        at = next((i for i, (a, b) in enumerate(zip(found, needed, strict=False)) if a != b), 0)
        own, file = (tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (found, needed))
    else:
        if _loses_spaces(texts[1]):
            _log.warning("%s loses the spaces of a text: it makes %r of %r", path, texts[1], SAMPLE)
        return
    raise ValueError(
        f"{path} is not read as it was written: transformers {version('transformers')} makes "
        f"{own!r} of a sample, {reference.library} {file!r}; install the versions of "
        "requirements.txt, or fetch the tokenizer's files again"
    )


def _check_round_trip(tokenizer: Any, path: Path) -> None:
    """Bytes are never lost, so the sample must come back as it was. Raises ValueError."""
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if text != SAMPLE:
        raise ValueError(
            f"{path} is not read as it was written: transformers {version('transformers')} makes "
            f"{text!r} of {SAMPLE!r}; give a folder with {JSON_FILE}"
        )


def _loses_spaces(text: str) -> bool:
    """Whether `text`, made of the sample, has its characters but not its spaces."""
    is_whole = "".join(text.split()).lower() == "".join(SAMPLE.split()).lower()
    return is_whole and len(text.split()) < len(SAMPLE.split())


def _one_line(error: Exception) -> str:
    """The first line of what a library says, without the full stop."""
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")
