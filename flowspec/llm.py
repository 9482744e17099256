"""LLM: the Python interface, in the form that users of vLLM know.

from flowspec import LLM, SamplingParams

with LLM(stages=4) as llm:
    for output in llm.generate(["Hello!"], SamplingParams(max_tokens=32)):
        print(output.text)
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast

from flowspec.config import EngineConfig, override
from flowspec.engine.build import check_run, load_head_parts
from flowspec.engine.engine import Engine, EngineStatus
from flowspec.engine.local import LocalEngine
from flowspec.engine.prepare import Say, draft_folder, split_folder
from flowspec.engine.remote import RemoteEngine
from flowspec.engine.stream import Stream
from flowspec.request import (
    ChatMessage,
    Decoding,
    Request,
    RequestOutput,
    SamplingParams,
    TokensOut,
)
from flowspec.system.address import parse_address
from flowspec.transport.secure.token import derive_keys, read_token

DEFAULT_PORT = 7000  # of `flowspec serve`

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[ChatMessage]
Params: TypeAlias = SamplingParams | Sequence[SamplingParams]


class LLM:
    """A model behind an engine: head and stages on this machine, or a running cluster.

    `model` is a folder, an HF id, or a split model; the default is the bundled demo model.
    `options` are those of `flowspec run`, by name (`drafter`, `strategy`, `dtype`, `transport`,
    `context`, ...). Raises ValueError for invalid options, OSError if a file is missing, and
    ClusterError if a stage does not start. Use it with `with`, or call `close`.
    """

    def __init__(
        self,
        model: str = "",
        *,
        draft: str = "",
        stages: int | None = None,
        config: EngineConfig | None = None,
        say: Say | None = None,
        **options: Any,
    ) -> None:
        given = {"model": model, "draft": draft, "stages": stages, **options}
        chosen = {name: value for name, value in given.items() if value not in ("", None)}
        effective = override(config or EngineConfig(), chosen, where="LLM")
        check_run(effective)
        effective = effective.changed(draft=draft_folder(effective))
        folder = split_folder(effective, say=say) if say else split_folder(effective)
        local = LocalEngine(effective, load_head_parts(effective, folder))
        local.__enter__()
        self._engine: Engine = local
        self._defaults = Request(prompt="?", max_new_tokens=effective.max_new_tokens)

    @classmethod
    def connect(
        cls, head: str, *, token: str | None = None, token_file: Path | None = None
    ) -> "LLM":
        """Connect to the cluster whose head is at `head` (HOST:PORT).

        The token is that of `flowspec serve`: given here, in a file, or in FLOWSPEC_TOKEN. Raises
        ClusterError if the head cannot be reached.
        """
        host, port = parse_address(head, default_port=DEFAULT_PORT)
        return cls.over(RemoteEngine(host, port, derive_keys(token or read_token(token_file))))

    @classmethod
    def over(cls, engine: Engine) -> "LLM":
        """Make an LLM over an existing engine; `close` closes the engine too."""
        llm = cls.__new__(cls)
        llm._engine = engine
        llm._defaults = Request(prompt="?")
        return llm

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process that was started for it. It is safe to call twice."""
        self._engine.close()

    @property
    def engine(self) -> Engine:
        """The engine, for streams, statuses and draining."""
        return self._engine

    def status(self) -> EngineStatus:
        """Return the engine's present status."""
        return self._engine.status()

    # All at once ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> list[RequestOutput]:
        """Return the answers to one prompt or several, in their order; they run at the same time.

        A prompt is a text, which the model's chat template makes a user's message of, or token ids.
        Raises ValueError for a request that cannot be served and ClusterError if a process fails.
        """
        return self._answers(_prompts(prompts), sampling_params, decoding)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> list[RequestOutput]:
        """Return the next message of one conversation or several, as `generate` does.

        A message is a mapping with "role" (system, user, assistant) and "content".
        """
        return self._answers(_conversations(messages), sampling_params, decoding)

    def _answers(
        self,
        prompts: Sequence[Prompt | Conversation],
        params: Params | None,
        decoding: Decoding | None,
    ) -> list[RequestOutput]:
        streams = []
        try:
            for request in self._requests(prompts, params, decoding):
                streams.append(self._engine.submit(request))
            return [_checked(stream.result()) for stream in streams]
        except BaseException:
            for stream in streams:
                stream.abort()
            raise

    # One, as it comes ----------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> Iterator[str]:
        """Yield the text of one answer as it comes; leaving the loop ends the request."""
        with self.submit(prompt, sampling_params, decoding=decoding) as stream:
            for event in stream:
                if isinstance(event, TokensOut) and event.text:
                    yield event.text
        _checked(stream.result())

    def submit(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> Stream:
        """Return one request's stream of events: tokens, notices, and its RequestOutput."""
        (request,) = self._requests([prompt], sampling_params, decoding)
        return self._engine.submit(request)

    # asyncio -------------------------------------------------------------------------------------

    async def agenerate(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> RequestOutput:
        """Return the answer to one prompt; cancelling the task ends the request."""
        stream = await self._submitted(prompt, sampling_params, decoding)
        with stream:
            async for _ in stream:
                pass
        return _checked(stream.result())

    async def astream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        decoding: Decoding | None = None,
    ) -> AsyncIterator[str]:
        """Yield the text of one answer as it comes; leaving the loop ends the request."""
        stream = await self._submitted(prompt, sampling_params, decoding)
        with stream:
            async for event in stream:
                if isinstance(event, TokensOut) and event.text:
                    yield event.text
        _checked(stream.result())

    async def _submitted(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None,
        decoding: Decoding | None,
    ) -> Stream:
        """Submit in a thread: rendering a long prompt would block the event loop."""
        return await asyncio.to_thread(self.submit, prompt, params, decoding=decoding)

    def _requests(
        self,
        prompts: Sequence[Prompt | Conversation],
        params: Params | None,
        decoding: Decoding | None,
    ) -> list[Request]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(params)} sampling parameters")
        return [
            replace(
                self._defaults,
                prompt=prompt if isinstance(prompt, str) else _as_sequence(prompt),
                sampling=own,
                decoding=decoding,
            )
            for prompt, own in zip(prompts, params, strict=True)
        ]


def _prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return one prompt or several as several."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _conversations(messages: Conversation | Sequence[Conversation]) -> Sequence[Conversation]:
    """Return one conversation or several as several."""
    if messages and isinstance(messages[0], Mapping):
        return [cast(Conversation, messages)]
    return cast(Sequence[Conversation], messages)


def _as_sequence(prompt: Sequence[int] | Conversation) -> tuple[int, ...] | list[ChatMessage]:
    """Return token ids as a tuple and messages as a list; a request tells them apart by this."""
    if prompt and isinstance(prompt[0], int):
        return tuple(cast(Sequence[int], prompt))
    return list(cast(Conversation, prompt))


def _checked(output: RequestOutput) -> RequestOutput:
    """Return the output, or raise the exception that its error stands for."""
    if output.error is not None:
        raise output.error.exception()
    return output
