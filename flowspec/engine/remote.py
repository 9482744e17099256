"""RemoteEngine: a head somewhere else as an engine, over its encrypted control connection."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from types import TracebackType

from pydantic import ValidationError

import flowspec
from flowspec.engine.engine import EngineStatus, StageStatus
from flowspec.engine.stream import Notice, Stream
from flowspec.protocol.control import (
    MAX_ASK_BYTES,
    Ask,
    AskCounts,
    AskStatus,
    ClusterStatus,
    Control,
    Counts,
    DecodingSpec,
    Done,
    Drop,
    Forget,
    Forgotten,
    Note,
    Piece,
    Refuse,
    StageFigures,
    pack,
    stats_of,
    unpack,
)
from flowspec.request import (
    ClusterError,
    Failure,
    FinishReason,
    RefusedError,
    Request,
    RequestOutput,
    SamplingParams,
    StageCounts,
    TokensOut,
)
from flowspec.system.address import Address
from flowspec.system.open_files import check_open_files
from flowspec.transport.control_sockets import WRONG_TOKEN, ControlClient, UnreachableError
from flowspec.transport.secure.keys import Keys

HANDSHAKE_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0  # of a question that a head answers at once
POLL_S = 0.2
MIN_FILES = 32
SILENCE_S = 10.0  # of a head that serves requests, until it is asked whether it is there
FORGOTTEN_AFTER = 3  # statuses, each after so long a silence, that say it serves nobody


class RemoteEngine:
    """A connection to the head at host:port. Use it with `with`.

    Raises ClusterError where it cannot be had, with why; RefusedError where the token is another.
    The head's own place in errors is its address.
    """

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        check_open_files(MIN_FILES)
        self.where = f"head at {Address(host, port)}"
        self.control = ControlClient(host, port, keys)
        if reason := self.control.connect(HANDSHAKE_TIMEOUT_S):
            self.control.close()
            raise (RefusedError if WRONG_TOKEN in reason else ClusterError)("head", reason)
        self.epochs: dict[int, tuple[int, int]] = {}  # of finished requests: first and last
        self._ids = count(1)
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._partial: dict[int, tuple[list[int], str]] = {}  # tokens and text so far
        self._over: dict[int, Stream] = {}  # whose stage counts have been asked for
        self._outbox: queue.SimpleQueue[Control] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Control] = queue.SimpleQueue()
        self._asking = threading.Lock()  # one question at a time waits for `_replies`
        self._error: ClusterError | None = None  # why nothing more can be asked
        self._closing = threading.Event()
        self._draining = False
        self._heard_at, self._has_asked, self._num_idle = time.monotonic(), False, 0
        self._thread = threading.Thread(target=self._run, name="remote head", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RemoteEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Any thread ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Ask the head; the prompt is made into tokens there.

        Raises ValueError for what no head takes, ClusterError where the connection is lost.
        """
        self._check()
        if self._draining:
            raise ClusterError(self.where, "this client takes no more requests")
        ask = ask_of(request, next(self._ids))
        stream = Stream(ask.id, abort=self._drop, ask_counts=self._ask_counts)
        with self._lock:
            if not self._streams:
                self._heard_at, self._has_asked, self._num_idle = time.monotonic(), False, 0
            self._streams[ask.id] = stream
            self._partial[ask.id] = ([], "")
        self._post(ask)
        return stream

    def status(self) -> EngineStatus:
        """The cluster now. Raises ClusterError where the head does not answer or refuses."""
        now = self.cluster_status()
        return EngineStatus(
            healthy=now.healthy,
            why="" if now.healthy else now.why,
            model=now.model.model_id,
            num_stages=sum(device.rank > 0 for device in now.devices),
            max_context=now.max_context,
            strategy=now.strategy,
            drafters=() if now.drafter == "none" else (now.drafter,),
            num_running=now.requests_active,
            num_waiting=now.requests_waiting,
            num_finished=now.requests_done,
            num_failed=now.requests_failed,
            stages={
                device.rank: StageStatus(
                    busy_s=device.busy_s,
                    kv_tokens_used=device.num_kv_tokens_used,
                    peak_memory_bytes=device.peak_memory_bytes,
                )
                for device in now.devices
                if device.rank
            },
        )

    def cluster_status(self) -> ClusterStatus:
        """All that the head says of its devices. Raises like `status`."""
        found = self._question(AskStatus(version=flowspec.__version__), ClusterStatus)
        assert isinstance(found, ClusterStatus)
        return found

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests here and wait for this client's open ones."""
        self._draining = True
        end = time.monotonic() + timeout_s
        while self._streams and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self._streams

    def forget(self) -> None:
        """Have the head learn costs and acceptance anew.

        Raises ValueError where it serves requests, ClusterError where it does not answer.
        """
        found = self._question(Forget(id=next(self._ids)), Forgotten)
        assert isinstance(found, Forgotten)
        if found.why:
            raise ValueError(found.why)

    def close(self) -> None:
        """Hang up; the head ends what is open."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        self._end_all(Failure(cause="this client has hung up", rank=0))

    def _post(self, message: Control) -> None:
        self._outbox.put(message)
        self.control.wake()

    def _drop(self, request: int) -> None:
        self._post(Drop(id=request))

    def _ask_counts(self, request: int) -> None:
        self._post(AskCounts(id=request))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise ClusterError(self.where, "this client has hung up")

    def _question(self, message: Control, kind: type[Control]) -> Control:
        """The answer to a question that a head answers at once."""
        with self._asking:
            self._check()
            while not self._replies.empty():
                self._replies.get()
            self._post(message)
            end = time.monotonic() + ANSWER_TIMEOUT_S
            while (left := end - time.monotonic()) > 0:
                try:
                    reply = self._replies.get(timeout=min(left, POLL_S))
                except queue.Empty:
                    self._check()
                    continue
                if isinstance(reply, Refuse):
                    raise RefusedError(self.where, reply.why)
                if isinstance(reply, kind):
                    return reply
        raise ClusterError(self.where, f"no answer within {ANSWER_TIMEOUT_S:.0f} s")

    # The connection's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._send_posted()
                for frame in self.control.receive(POLL_S):
                    self._take(unpack(frame))
                self._watch()
            self._send_posted()  # requests that are taken back
        except ClusterError as error:
            self._error = error
        except UnreachableError as error:
            self._error = ClusterError(self.where, str(error))
        except ValueError as error:
            self._error = ClusterError(self.where, f"it says what this client cannot read: {error}")
        finally:
            if self._error is not None:
                self._replies.put(Note(id=0, text=""))  # whoever waits looks at the error
                self._end_all(Failure(cause=self._error.cause, rank=0))
            self.control.close()

    def _send_posted(self) -> None:
        while not self._outbox.empty():
            self.control.send(pack(self._outbox.get()))

    def _take(self, message: Control) -> None:
        self._heard_at, self._has_asked = time.monotonic(), False
        self._count_idle(message)
        match message:
            case Piece():
                self._piece(message)
            case Note():
                if (stream := self._streams.get(message.id)) is not None:
                    stream.put(Notice(text=message.text))
            case Done():
                self._done(message)
            case Counts():
                self._take_counts(message)
            case Refuse():
                self._replies.put(message)
                if self._streams:
                    raise RefusedError(self.where, message.why)
            case ClusterStatus() | Forgotten():
                self._replies.put(message)

    def _piece(self, message: Piece) -> None:
        stream = self._streams.get(message.id)
        if stream is None:
            return
        tokens, text = self._partial[message.id]
        tokens.extend(message.tokens)
        self._partial[message.id] = tokens, text + message.text
        stream.put(TokensOut(request=message.id, tokens=message.tokens, text=message.text))

    def _done(self, message: Done) -> None:
        figures = message.figures
        if figures is not None:
            self.epochs[message.id] = figures.first_epoch, figures.epoch
        self._end(
            message.id,
            message.reason,
            error=message.failure.failure() if message.failure is not None else None,
            done=message,
        )

    def _end(
        self,
        request: int,
        reason: FinishReason,
        *,
        error: Failure | None = None,
        done: Done | None = None,
    ) -> None:
        with self._lock:
            stream = self._streams.pop(request, None)
            tokens, text = self._partial.pop(request, ([], ""))
        if stream is None:
            return
        self._over[request] = stream
        while len(self._over) > 256:
            del self._over[next(iter(self._over))]
        output = RequestOutput(
            request=request,
            tokens=tuple(tokens),
            text=text,
            reason=reason,
            error=error,
            num_prompt_tokens=done.prompt_tokens if done is not None else 0,
        )
        if done is not None and done.figures is not None:
            output = RequestOutput(
                request=request,
                tokens=output.tokens,
                text=text,
                reason=reason,
                stats=stats_of(done.figures),
                error=error,
                num_prompt_tokens=done.prompt_tokens,
            )
        stream.put(output)

    def _take_counts(self, message: Counts) -> None:
        stream = self._over.pop(message.id, None)
        if stream is not None and message.stages is not None:
            stream.put_counts({one.rank: _counts(one) for one in message.stages})

    def _end_all(self, failure: Failure) -> None:
        for request in list(self._streams):
            self._end(request, FinishReason.ERROR, error=failure)

    def _watch(self) -> None:
        """Ask a head that says nothing whether it is there; raises ClusterError where it is not."""
        if not self.control.is_connected:
            raise ClusterError(self.where, "connection lost")
        if not self._streams:
            self._heard_at = time.monotonic()
            return
        silence_s = time.monotonic() - self._heard_at
        if silence_s > SILENCE_S and not self._has_asked:
            self.control.send(pack(AskStatus(version=flowspec.__version__)))
            self._has_asked = True
        if silence_s > 2 * SILENCE_S:
            raise ClusterError(self.where, f"no word from it for {silence_s:.0f} s")

    def _count_idle(self, message: Control) -> None:
        """Raises ClusterError where the head says again and again that it serves nobody."""
        is_idle = isinstance(message, ClusterStatus) and not (
            message.requests_active or message.requests_waiting
        )
        self._num_idle = self._num_idle + 1 if is_idle and self._streams else 0
        if self._num_idle >= FORGOTTEN_AFTER:
            raise ClusterError(self.where, "it serves nobody now, and has not answered: ask again")


def ask_of(request: Request, number: int) -> Ask:
    """A request as a control message. Raises ValueError for what cannot be sent."""
    prompt = request.prompt
    turns: Sequence[object] = ()
    tokens: tuple[int, ...] = ()
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, tuple) and isinstance(prompt[0], int):
        tokens = prompt  # type: ignore[assignment]
    else:
        turns = [dict(turn) for turn in prompt]  # type: ignore[arg-type, call-overload]
    decoding = request.decoding
    content = {
        "version": flowspec.__version__,
        "id": number,
        "turns": turns,
        "prompt": tokens,
        "max_new_tokens": request.max_new_tokens,
        "stop": request.stop,
        "end_ids": request.eos_token_ids,
        "decoding": DecodingSpec(
            strategy=decoding.strategy,
            parameters=dict(decoding.parameters),
            drafter=decoding.drafter,
        )
        if decoding is not None
        else None,
        "exclusive": request.exclusive,
        **_sampling_fields(request.sampling),
    }
    try:
        ask = Ask.model_validate(content, strict=False)
    except ValidationError as error:
        raise ValueError(_why_invalid(error)) from None
    if (size := len(pack(ask))) > MAX_ASK_BYTES:
        raise ValueError(_too_long(size))
    return ask


def _why_invalid(error: ValidationError) -> str:
    """The first thing that is wrong with an Ask, for a person."""
    first = error.errors(include_url=False)[0]
    place, value, limits = first["loc"], first["input"], first.get("ctx", {})
    kind = first["type"]
    if place[0] == "turns" and place[-1] == "content" and kind == "string_too_long":
        return _too_long(len(value.encode(errors="replace")))
    if kind == "string_unicode":
        return "the text has half of a surrogate pair, which is no character; remove it"
    if place[0] == "turns" and kind == "too_long":
        return (
            f"the conversation has {len(value)} messages, at most {limits['max_length']} are sent"
        )
    if place[0] == "stop" and kind == "too_long":
        return f"{len(value)} stop strings are given, at most {limits['max_length']} can be"
    if place[0] == "stop" and kind == "string_too_long":
        most = limits["max_length"]
        return f"a stop string has {len(value)} characters, at most {most} are possible"
    name = ".".join(str(part) for part in place)
    return f"{name} cannot be {value!a}: {first['msg'].lower()}"


def _too_long(size: int) -> str:
    return (
        f"the conversation takes {size:,} bytes, at most {MAX_ASK_BYTES:,} can be sent to the "
        "head; shorten it"
    )


def _sampling_fields(sampling: SamplingParams) -> dict[str, object]:
    """What an Ask has of it: a request has taken the limits out."""
    fields = asdict(sampling)
    return {name: value for name, value in fields.items() if name not in ("max_tokens", "stop")}


def _counts(figures: StageFigures) -> StageCounts:
    return StageCounts(
        num_rows_run=figures.rows_run, num_rows_pruned=figures.rows_pruned, busy_s=figures.busy_s
    )
