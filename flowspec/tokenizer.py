"""Tokenizers are read from the vocabulary file of a model folder alone and compared with it.

The class that tokenizer_config.json names decides nothing, because some releases of transformers
rebuild a tokenizer by that class and lose spaces. transformers and similar packages are imported
only here, and late, since that takes seconds.
"""

import codecs
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from unicodedata import normalize

MAX_HELD_TOKENS = 16  # no character needs more; longer sequences of bytes are no text
MAX_REASON_CHARS = 500  # of a template's error


class Tokenizer(Protocol):
    """The call that the head needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens."""


class PromptError(ValueError):
    """A prompt that cannot be turned into tokens, with the reason."""


def check_text(text: str, where: str) -> str:
    """Return `text` if UTF-8 can write it. Raises PromptError naming `where`.

    A byte of the command line that is not UTF-8 arrives as a lone surrogate, and a JSON text may
    hold one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        is_byte = 0xDC80 <= code <= 0xDCFF  # as Python decodes the command line
        found = f"the byte 0x{code - 0xDC00:02x}" if is_byte else f"half a character, \\u{code:04x}"
        place = f"after {before!r}" if before else "at its beginning"
        raise PromptError(
            f"{where} is not valid text: {place} it has {found}; write it in UTF-8"
        ) from None
    return text


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Return the token ids of a conversation, ready for the assistant's turn.

    Uses the tokenizer's chat template; without one, the messages' contents line by line. Raises
    PromptError if the template refuses the conversation or makes no tokens of it, or if the text
    cannot be encoded.
    """
    for message in messages:
        check_text(message["content"], f"the {message['role']}'s message")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if has_template:
        text = _apply_template(tokenizer, messages)
        options = {"add_special_tokens": False}  # the template has written them
    else:
        text, options = "\n".join(message["content"] for message in messages), {}
    try:
        ids = tuple(tokenizer.encode(text, **options))
    except Exception as error:  # the libraries raise errors of any type
        raise PromptError(f"the tokenizer cannot encode the prompt: {_reason(error)}") from error
    if has_template and not ids:
        raise PromptError(
            f"the model's chat template makes {text[:MAX_REASON_CHARS]!r} of this conversation, "
            "which has no tokens; correct the template (chat_template in tokenizer_config.json, or "
            "chat_template.jinja)"
        )
    return ids


def _apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is the model's own program and may raise anything
        refuses = type(error).__name__ == "TemplateError"  # what its raise_exception() raises
        what = "refuses this conversation" if refuses else f"fails with {type(error).__name__}"
        raise PromptError(f"the model's chat template {what}: {_reason(error)}") from error
    return check_text(text, "what the model's chat template has made")


def _reason(error: Exception) -> str:
    """Return what an error says, in one line of a readable length."""
    return " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__


class TextStream:
    """Incremental detokenizer with stop strings.

    Text is given out only when later tokens can no longer change it: incomplete UTF-8 and possible
    beginnings of a stop string are held back. It decodes a short tail, so the cost per token is
    flat.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._first = 0  # tokens before this one are settled
        self._settled = 0  # tokens before this one have been turned into text
        self._pending = ""  # decoded, but may begin a stop string
        self.text = ""  # given out so far
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Add tokens; return the text that is now certain and the number of tokens used.

        Fewer tokens than given are used if a stop string was completed.
        """
        given = len(self.text)
        for used, token in enumerate(tokens, start=1):
            self._push_one(token)
            if self.stopped:
                return self.text[given:], used
        return self.text[given:], len(tokens)

    def flush(self) -> str:
        """Return the text held back, at the end of the generation."""
        if self.stopped or self._tokenizer is None:
            return ""
        rest = self._pending + self._decode_new(final=True)
        self._pending = ""
        self.text += rest
        return rest

    def _push_one(self, token: int) -> None:
        if self._tokenizer is None:
            return
        self._tokens.append(token)
        self._pending += self._decode_new(final=False)
        found = [at for at in (self._pending.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.text += self._pending[: min(found)]
            self._pending = ""
            self.stopped = True
            return
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        self.text += self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(self._pending) - held :]

    def _decode_new(self, *, final: bool) -> str:
        assert self._tokenizer is not None
        before = self._decode(self._first, self._settled)
        after = self._decode(self._first, len(self._tokens))
        held = len(self._tokens) - self._settled
        final = final or held > MAX_HELD_TOKENS
        if not final and (len(after) <= len(before) or after.endswith("\ufffd")):
            return ""  # no text of its own (special tokens), or an unfinished character
        self._first, self._settled = self._settled, len(self._tokens)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        assert self._tokenizer is not None
        if start == end:
            return ""
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_FORMS = (JSON_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)  # the first one that exists is read
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_FILES = (
    *(JSON_FILE, VOCABULARY_FILE, MERGES_FILE, *_SMALL_FILES),
    *("config.json", "chat_template.json", "chat_template.jinja"),
)
_NO_LIMIT = 2**62  # of a text's length; the context's limit is checked elsewhere
_SENTENCEPIECE_BPE = 2  # model_type in its trainer's settings
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS_POINTER = b"version https://git-lfs"
_BYTE_LEVEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
# A sample with repeated spaces, spaces before punctuation and at line ends, digits, accents, other
# scripts, an emoji, and a ligature that NFKC splits.
SAMPLE = (
    "Anna has 3 boxes , 12 apples; she did n't count.\n\n\tnaïve café,  Ünïcode 你好 мир 😀 0.5 ﬁn"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reference:
    """The encoding and decoding of the vocabulary file's own library."""

    library: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer in `folder`, compared with its file.

    Raises ValueError if there is none, a file is damaged, a package is missing, or the tokenizer
    does not encode and decode a sample as the file says.
    """
    folder = Path(folder)
    form = _find_form(folder)
    _check_files(folder, form)
    read = {
        JSON_FILE: _read_json_form,
        SENTENCEPIECE_FILE: _read_sentencepiece,
        VOCABULARY_FILE: _read_vocabulary,
    }[form]
    with _without_marks(folder) as readable:
        try:
            tokenizer, reference = read(folder, readable)
        except _FormError as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # for damaged files the libraries raise bare Exceptions too
            reason = _one_line(error).replace(str(readable), str(folder))
            raise ValueError(
                f"the tokenizer in {folder} cannot be loaded: {form}: {reason}; fetch its files "
                "again"
            ) from error
    tokenizer.model_max_length = _NO_LIMIT
    tokenizer.clean_up_tokenization_spaces = False  # it would remove spaces before punctuation
    if reference is not None:
        _compare(tokenizer, reference, folder / form)
    else:
        _check_round_trip(tokenizer, folder / form)
    return tokenizer


class _FormError(ValueError):
    """A vocabulary file in a form that is not supported, in this module's own words."""


def _find_form(folder: Path) -> str:
    for name in _FORMS:
        if (folder / name).exists():
            return name
    raise ValueError(
        f"{folder} has no tokenizer (none of {', '.join(_FORMS)}); copy its files there from where "
        "the model is from"
    )


def _check_files(folder: Path, form: str) -> None:
    """Raise ValueError naming a file that is no JSON, a Git LFS pointer or missing."""
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


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """Give `folder`, or a temporary copy without the byte order marks of its files.

    The libraries do not read a file that begins with such a mark.
    """
    marked = [path for name in _TEXT_FILES if _has_mark(path := folder / name)]
    if not marked:
        yield folder
        return
    with TemporaryDirectory(prefix="flowspec-tokenizer-") as name:
        for path in folder.resolve().iterdir():
            (Path(name) / path.name).symlink_to(path)
        for path in marked:
            copy = Path(name) / path.name
            copy.unlink()
            copy.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield Path(name)


def _has_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file in `folder`; an empty dict if it is missing."""
    path = folder / name
    return dict(_read_small(path)) if path.exists() else {}


def _read_small(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from None


def _read_json_form(folder: Path, readable: Path) -> tuple[Any, _Reference]:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    del folder
    own = Tokenizer.from_file(str(readable / JSON_FILE))
    own.no_truncation()
    own.no_padding()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(readable), local_files_only=True)
    reference = _Reference(
        f"tokenizers {version('tokenizers')}",
        lambda text: list(own.encode(text, add_special_tokens=False).ids),
        lambda ids: own.decode(ids, skip_special_tokens=False),
    )
    return tokenizer, reference


def _read_sentencepiece(folder: Path, readable: Path) -> tuple[Any, _Reference]:
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
        str(readable), local_files_only=True, add_bos_token=begins
    )
    library = f"sentencepiece {version('sentencepiece')}"
    return tokenizer, _Reference(library, own.encode, own.decode)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or its import was blocked
        return False


def _read_vocabulary(folder: Path, readable: Path) -> tuple[Any, None]:
    """Read byte-level BPE; the class name decides how words are cut: the files do not say."""
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
    return getattr(transformers, name).from_pretrained(str(readable), local_files_only=True), None


def _compare(tokenizer: Any, reference: _Reference, path: Path) -> None:
    """Raise ValueError, with both results, if a sample's tokens or text differ from the file's."""
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
    if path.name == SENTENCEPIECE_FILE:  # its settings may differ from what the class computes
        remedy = f"give a folder of the same model that has {JSON_FILE}"
    else:
        remedy = "install the versions of requirements.txt, or fetch the tokenizer's files again"
    raise ValueError(
        f"{path} is not read as it was written: transformers {version('transformers')} makes "
        f"{own!r} of a sample, {reference.library} {file!r}; {remedy}"
    )


def _check_round_trip(tokenizer: Any, path: Path) -> None:
    """Raise ValueError unless the sample comes back as it was; bytes are never lost."""
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if text != SAMPLE:
        raise ValueError(
            f"{path} is not read as it was written: transformers {version('transformers')} makes "
            f"{text!r} of {SAMPLE!r}; give a folder with {JSON_FILE}"
        )


def _loses_spaces(text: str) -> bool:
    """Return whether `text`, made of the sample, has its characters but not its spaces."""
    found, whole = (normalize("NFKC", "".join(one.split()).lower()) for one in (text, SAMPLE))
    is_whole = found == whole
    return is_whole and len(text.split()) < len(SAMPLE.split())


def _one_line(error: Exception) -> str:
    """Return the first line of a library's message, without the full stop."""
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")
