"""Tokens to text and prompts to tokens; transformers is imported here alone, and late."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them, by its kind
_NO_LIMIT = 2**62  # of a text: who has one says so, and not by a warning of the library's
MAX_HELD_TOKENS = 16  # no character needs more; beyond, the bytes are no text


class Tokenizer(Protocol):
    """The two calls the head needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""


def load_tokenizer(folder: str | Path) -> Any:
    """The HF tokenizer in `folder`. Raises ValueError where there is none."""
    check_tokenizer(Path(folder))
    from transformers import AutoTokenizer  # here: importing it takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.model_max_length = _NO_LIMIT
        return tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {reason}") from None


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError where `folder` has no file that a tokenizer is loaded from."""
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise ValueError(
            f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)}); copy its files there "
            "from where the model is from"
        )


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation, ready for the assistant's turn.

    Uses the tokenizer's chat template; without one, the messages' contents line by line.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(tokenizer.encode("\n".join(message["content"] for message in messages)))


class TextStream:
    """Incremental detokenizer with stop strings.

    Text leaves only when later tokens can no longer change it: incomplete UTF-8 and what may be the
    beginning of a stop string are held back. Decodes a short tail, so the cost per token is flat.
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
        """Take tokens in; returns the text now certain and how many tokens were used.

        Fewer than given are used where a stop string was completed.
        """
        given = len(self.text)
        for used, token in enumerate(tokens, start=1):
            self._push_one(token)
            if self.stopped:
                return self.text[given:], used
        return self.text[given:], len(tokens)

    def flush(self) -> str:
        """The text held back, at the end of the generation."""
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
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
