"""Text comes out piece by piece as it would come out whole, and never past a stop string."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from flowspec.tokenizer import TextStream, render_chat
from tests.support.vocabularies import byte_level

CORPUS = [
    "the cat sat on the mat and the dog sat on the log\n",
    "naïve café, 你好世界, 😀😃 ünïcödé\n" * 3,
    "for i in range(10):\n    print(i)\n",
]
SPECIAL = "<|end|>"


class Wrapped:
    """The two calls of a HF tokenizer, over a raw one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.raw = tokenizer
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        return self.raw.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def encode(self, text: str) -> list[int]:
        return self.raw.encode(text).ids


def metaspace() -> Tokenizer:
    """Like Llama 2: a leading space belongs to the word and goes at the text's beginning."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return tokenizer


BYTES, SPACES = Wrapped(byte_level(CORPUS, special=[SPECIAL])), Wrapped(metaspace())
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["the cat", " sat", "你好", "😀", "é", "\n", " ", "x"])).map("".join),
)


def whole(tokenizer: Wrapped, tokens: Sequence[int]) -> str:
    """The text decoded at once."""
    return tokenizer.raw.decode(list(tokens), skip_special_tokens=True)


def stream_all(stream: TextStream, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Push in pieces of `sizes`, flush at the end; stops where the stream does."""
    pieces, start, turn = [], 0, 0
    while start < len(tokens) and not stream.stopped:
        size = sizes[turn % len(sizes)]
        text, used = stream.push(tokens[start : start + size])
        assert used <= size
        pieces.append(text)
        start, turn = start + size, turn + 1
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text
    return pieces


@given(TEXTS, st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=150)
def test_pieces_make_the_whole(text: str, sizes: list[int]) -> None:
    """Any unicode text, its characters split over tokens in any way, in pieces of any size."""
    tokens = BYTES.encode(text)
    stream = TextStream(BYTES)
    stream_all(stream, tokens, sizes)
    assert stream.text == whole(BYTES, tokens) == text


@given(
    st.sampled_from([BYTES, SPACES]),
    st.lists(st.integers(0, 10_000), max_size=30),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@settings(max_examples=150)
def test_any_tokens_make_the_whole(
    tokenizer: Wrapped, numbers: list[int], sizes: list[int]
) -> None:
    """A model may generate what no text encodes to: broken characters, special tokens inside."""
    tokens = [number % tokenizer.raw.get_vocab_size() for number in numbers]
    stream = TextStream(tokenizer)
    stream_all(stream, tokens, sizes)
    assert stream.text == whole(tokenizer, tokens)


def test_a_special_token_does_not_eat_the_next_space() -> None:
    """Llama 2 decodes a word at the beginning without its space; a skipped token is no beginning.

    The same holds for every token without text.
    """
    end = SPACES.raw.token_to_id(SPECIAL)
    tokens = [*SPACES.encode("the cat"), end, end, *SPACES.encode("sat")]
    stream = TextStream(SPACES)
    stream_all(stream, tokens, [1])
    assert stream.text == whole(SPACES, tokens) == "the cat sat"


def test_unfinished_characters_wait() -> None:
    """Half an emoji is no text; at the end of the generation it comes out as it is."""
    tokens = BYTES.encode("🂡")  # not in the corpus: several tokens
    assert len(tokens) > 2
    stream = TextStream(BYTES)
    assert [stream.push([token])[0] for token in tokens] == [""] * (len(tokens) - 1) + ["🂡"]
    cut_off = TextStream(BYTES)
    assert cut_off.push(tokens[:2]) == ("", 2)
    assert cut_off.flush() == whole(BYTES, tokens[:2])
    assert cut_off.flush() == ""


@given(
    st.text("abé你 ", max_size=30),
    st.lists(st.text("abé你 ", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@settings(max_examples=200)
def test_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    """Nothing of a stop string is ever given out, wherever the token borders lie in it."""
    tokens = BYTES.encode(text)
    stream = TextStream(BYTES, stops)
    stream_all(stream, tokens, sizes)
    # the stop string that is complete first ends the text; of those complete at once the leftmost
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert not stream.stopped
        assert stream.text == text
        return
    assert stream.stopped
    found = [stop for stop in stops if text.find(stop) >= 0]
    possible = {text[: text.find(stop)] for stop in found}
    assert stream.text in possible
    assert not any(stop in stream.text for stop in stops)


def test_stop_string_over_token_borders() -> None:
    """What may begin a stop string is held back, and given out when it does not."""
    tokens = [BYTES.encode(char)[0] for char in "xSTOP"]
    stream = TextStream(BYTES, ["STOP"])
    assert [stream.push([token])[0] for token in tokens] == ["x", "", "", "", ""]
    assert (stream.stopped, stream.text) == (True, "x")
    other = TextStream(BYTES, ["STOP"])
    tokens = [BYTES.encode(char)[0] for char in "STSTA"]
    assert [other.push([token])[0] for token in tokens] == ["", "", "ST", "", "STA"]


def test_used_tokens_are_counted_to_the_stop() -> None:
    """Accepted tokens behind a stop string were never asked for."""
    tokens = [BYTES.encode(char)[0] for char in "abcdef"]
    stream = TextStream(BYTES, ["d"])
    assert stream.push(tokens[:2]) == ("ab", 2)
    assert stream.push(tokens[2:]) == ("c", 2)
    assert stream.stopped
    assert stream.flush() == ""
    assert stream.text == "abc"


def test_held_back_text_is_flushed() -> None:
    """The generation may end in the middle of what might have become a stop string."""
    stream = TextStream(BYTES, ["\n\n"])
    assert stream.push([BYTES.encode(char)[0] for char in "a\n"]) == ("a", 2)
    assert stream.flush() == "\n"
    assert stream.text == "a\n"


def test_cost_per_token_is_flat() -> None:
    """A long answer must not be decoded from its beginning with every token."""
    tokens = BYTES.encode("the cat sat on the mat. " * 100)
    BYTES.num_decoded = 0
    TextStream(BYTES).push(tokens)
    assert BYTES.num_decoded < 6 * len(tokens)


def test_without_a_tokenizer_tokens_just_pass() -> None:
    """Models without text are run by token ids alone."""
    stream = TextStream(None, ["x"])
    assert stream.push([1, 2, 3]) == ("", 3)
    assert stream.flush() == ""
    assert not stream.stopped


def test_chat_without_a_template() -> None:
    """Base models take the messages' contents."""
    messages = [{"role": "user", "content": "the cat"}, {"role": "user", "content": "sat"}]
    assert whole(BYTES, render_chat(BYTES, messages)) == "the cat\nsat"


def test_chat_template_places_the_special_tokens() -> None:
    """With a template the tokenizer must not add its own beginning a second time."""

    class Templated:
        chat_template = "{{ messages }}"
        calls: list[dict[str, bool]] = []

        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
            assert not tokenize
            assert add_generation_prompt
            return "".join(message["content"] for message in messages) + ">"

        def encode(self, text, **options):
            self.calls.append(options)
            return [ord(char) for char in text]

    tokenizer = Templated()
    assert render_chat(tokenizer, [{"role": "user", "content": "a"}]) == (97, 62)
    assert tokenizer.calls == [{"add_special_tokens": False}]
