"""Tokens to text, and conversations to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

MAX_HELD_TOKENS = 16  # no character needs more; beyond, the bytes are no text
MAX_REASON_CHARS = 500  # of what a template says


class Tokenizer(Protocol):
    """The two calls the head needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""


class PromptError(ValueError):
    """What was asked cannot be turned into tokens; it says why."""


def check_text(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8. Raises PromptError naming `where`.

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
    """Token ids of a conversation, ready for the assistant's turn.

    Uses the tokenizer's chat template; without one, the messages' contents line by line. Raises
    PromptError where the template refuses the conversation or the text cannot be encoded.
    """
    for message in messages:
        check_text(message["content"], f"the {message['role']}'s message")
    if getattr(tokenizer, "chat_template", None):
        text = _apply_template(tokenizer, messages)
        options = {"add_special_tokens": False}  # the template has written them
    else:
        text, options = "\n".join(message["content"] for message in messages), {}
    try:
        return tuple(tokenizer.encode(text, **options))
    except Exception as error:  # the libraries raise of any kind
        raise PromptError(f"the tokenizer cannot encode the prompt: {_reason(error)}") from error


def _apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is the model's own program, and may raise anything
        refuses = type(error).__name__ == "TemplateError"  # what its raise_exception() raises
        what = "refuses this conversation" if refuses else f"fails with {type(error).__name__}"
        raise PromptError(f"the model's chat template {what}: {_reason(error)}") from error
    return check_text(text, "what the model's chat template has made")


def _reason(error: Exception) -> str:
    """What an error says, in one line of a readable length."""
    return " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__


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
