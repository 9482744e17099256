"""LLM: the Python interface over any engine, and what `flowspec` offers by name."""

import asyncio
import subprocess
import sys

import pytest

import flowspec
from flowspec import LLM, Decoding, SamplingParams
from flowspec.engine.engine import EngineStatus
from flowspec.engine.stream import Stream
from flowspec.request import ClusterError, Failure, FinishReason, Request, RequestOutput, TokensOut
from flowspec.tokenizer import TextStream
from tests.support.clusters import LetterTokenizer, make_cluster
from tests.support.tiny import PROMPT, T1, expected, request

LETTERS = LetterTokenizer()


class EchoEngine:
    """Answers every request with its prompt's first word, and keeps what it was asked."""

    def __init__(self, error: Failure | None = None) -> None:
        self.asked: list[Request] = []
        self.aborted: list[int] = []
        self.closed = False
        self.error = error

    def submit(self, asked: Request) -> Stream:
        """Answer at once."""
        self.asked.append(asked)
        number = len(self.asked)
        stream = Stream(number, abort=self.aborted.append)
        text = asked.prompt if isinstance(asked.prompt, str) else "?"
        stream.put(TokensOut(request=number, tokens=(1,), text=text))
        reason = FinishReason.STOP if self.error is None else FinishReason.ERROR
        stream.put(
            RequestOutput(request=number, tokens=(1,), text=text, reason=reason, error=self.error)
        )
        return stream

    def status(self) -> EngineStatus:
        """It is healthy."""
        return EngineStatus(model="echo")

    def drain(self, timeout_s: float) -> bool:
        """Nothing is open."""
        return timeout_s >= 0

    def forget(self) -> None:
        """Nothing is learnt."""

    def close(self) -> None:
        """Note it."""
        self.closed = True


def test_a_prompt_or_several_are_answered_in_order():
    """One text is one prompt; token ids are one prompt, too."""
    engine = EchoEngine()
    llm = LLM.over(engine)
    assert [output.text for output in llm.generate("one")] == ["one"]
    assert [output.text for output in llm.generate(["one", "two"])] == ["one", "two"]
    llm.generate([3, 1, 4])
    llm.generate([[3, 1], [4]])
    assert [asked.prompt for asked in engine.asked[3:]] == [(3, 1, 4), (3, 1), (4,)]


def test_a_conversation_or_several_are_continued():
    """Messages stay messages; the engine renders them."""
    engine = EchoEngine()
    llm = LLM.over(engine)
    turns = [{"role": "user", "content": "hello"}]
    llm.chat(turns)
    llm.chat([turns, [{"role": "user", "content": "again"}]])
    assert [asked.prompt for asked in engine.asked] == [
        turns,
        turns,
        [{"role": "user", "content": "again"}],
    ]


def test_limits_of_the_sampling_parameters_are_the_requests_own():
    """As users of vLLM write them; the stages never see them."""
    engine = EchoEngine()
    params = SamplingParams(temperature=0.5, max_tokens=7, stop=("END",))
    LLM.over(engine).generate("x", params, decoding=Decoding(strategy="flowspec"))
    (asked,) = engine.asked
    assert (asked.max_new_tokens, asked.stop) == (7, ("END",))
    assert (asked.sampling.max_tokens, asked.sampling.stop) == (None, ())
    assert asked.decoding == Decoding(strategy="flowspec")


def test_each_prompt_may_have_parameters_of_its_own():
    """As many as there are prompts."""
    engine = EchoEngine()
    llm = LLM.over(engine)
    llm.generate(["a", "b"], [SamplingParams(seed=1), SamplingParams(seed=2)])
    assert [asked.sampling.seed for asked in engine.asked] == [1, 2]
    with pytest.raises(ValueError, match="2 prompts have 1 sampling parameters"):
        llm.generate(["a", "b"], [SamplingParams()])


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(Failure(cause="too long"), ValueError), (Failure(cause="gone", rank=2), ClusterError)],
)
def test_an_error_of_an_answer_is_raised(failure, kind):
    """By every form of asking."""
    llm = LLM.over(EchoEngine(failure))
    with pytest.raises(kind, match=failure.cause):
        llm.generate("x")
    with pytest.raises(kind, match=failure.cause):
        list(llm.stream("x"))
    with pytest.raises(kind, match=failure.cause):
        asyncio.run(llm.agenerate("x"))


def test_with_closes_the_engine():
    """Whatever happened inside."""
    engine = EchoEngine()
    with LLM.over(engine) as llm:
        assert llm.status().model == "echo"
    assert engine.closed


def test_text_is_the_targets_in_every_form():
    """Whole, streamed, and by coroutines at once, over a real pipeline."""
    asked = request(sampling=T1, max_new_tokens=9)
    want = expected(asked)
    params = SamplingParams(temperature=T1.temperature, seed=T1.seed, max_tokens=9)
    llm = LLM.over(make_cluster(2))
    assert list(llm.generate(list(PROMPT), params)[0].tokens) == want
    stream = llm.submit(list(PROMPT), params)
    pieces = [event.tokens for event in stream if isinstance(event, TokensOut)]
    assert [token for piece in pieces for token in piece] == want

    async def both() -> list[RequestOutput]:
        return await asyncio.gather(*(llm.agenerate(list(PROMPT), params) for _ in range(2)))

    assert [list(output.tokens) for output in asyncio.run(both())] == [want, want]


def test_leaving_a_stream_early_ends_the_request():
    """The pipeline is free for others."""
    engine = make_cluster(2, new_text=lambda asked: TextStream(LETTERS))
    llm = LLM.over(engine)
    for _ in llm.stream(list(PROMPT), SamplingParams(max_tokens=40)):
        break
    assert engine.status().num_running == 0


def test_public_names_are_there_and_importing_them_is_cheap():
    """`import flowspec` alone takes no seconds: it loads no torch."""
    assert set(flowspec.__all__) == {
        "LLM",
        "Decoding",
        "RequestOutput",
        "SamplingParams",
        "__version__",
    }
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = flowspec.Nonsense
    code = "import sys, flowspec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
