"""RemoteEngine: the client of a head elsewhere, over its encrypted control connection."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from types import TracebackType
from typing import Any

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
    ControlError,
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
    DecodeStats,
    Failure,
    FinishReason,
    RefusedError,
    Request,
    RequestOutput,
    SamplingParams,
    StageCounts,
    TokensOut,
    cause_of,
)
from flowspec.system.address import Address
from flowspec.system.open_files import check_open_files
from flowspec.transport.control_sockets import WRONG_TOKEN, ControlClient, UnreachableError
from flowspec.transport.secure.keys import Keys

log = logging.getLogger(__name__)
HANDSHAKE_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0  # for a question that a head answers at once
POLL_S = 0.2
MIN_FILES = 32
HUNG_UP = "this client has hung up"
SILENCE_S = 10.0  # silence of a serving head after which it is asked
FORGOTTEN_AFTER = 3  # statuses, each after so long a silence, without open requests
MAX_REMEMBERED = 256  # finished requests whose stage counts and epochs may be asked for
MAX_REPLIES = 16  # that wait to be read


@dataclass(slots=True)
class _RemoteRequest:
    """An open request, and its answer so far."""

    stream: Stream
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class RemoteEngine:
    """A connection to the head at host:port. Use it with `with`.

    Raises ClusterError, with the reason, if it cannot connect, and RefusedError if the token is
    wrong. Errors name the head by its address.
    """

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        check_open_files(MIN_FILES)
        self.where = f"head at {Address(host, port)}"
        self.control = ControlClient(host, port, keys)
        if reason := self.control.connect(HANDSHAKE_TIMEOUT_S):
            self.control.close()
            raise (RefusedError if WRONG_TOKEN in reason else ClusterError)("head", reason)
        self.epochs: dict[int, tuple[int, int]] = {}  # first and last epoch of finished requests
        self._ids = count(1)
        self._lock = threading.Lock()
        self._open: dict[int, _RemoteRequest] = {}
        self._over: dict[int, Stream] = {}  # the newest finished requests
        self._outbox: queue.SimpleQueue[Control] = queue.SimpleQueue()
        self._replies: queue.Queue[Control] = queue.Queue(MAX_REPLIES)
        self._asking = threading.Lock()  # one question at a time waits for `_replies`
        self._error: ClusterError | None = None  # the reason why nothing more can be asked
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
        """Send a request to the head, which makes its prompt into tokens.

        Raises ValueError for a request that no head accepts, and ClusterError if the connection is
        lost.
        """
        self._check_open()
        ask = ask_of(request, next(self._ids))
        stream = Stream(ask.id, abort=self._drop, ask_counts=self._ask_counts)
        with self._lock:
            self._check_open()  # ending the connection ends the requests registered before
            if not self._open:
                self._heard_at, self._has_asked, self._num_idle = time.monotonic(), False, 0
            self._open[ask.id] = _RemoteRequest(stream)
        self._post(ask)
        return stream

    def status(self) -> EngineStatus:
        """Return the cluster's status. Raises ClusterError if the head gives none."""
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
        """Return the head's full status of its devices. Raises as `status` does."""
        found = self._question(AskStatus(version=flowspec.__version__), ClusterStatus)
        assert isinstance(found, ClusterStatus)
        return found

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests here and wait for this client's open ones."""
        self._draining = True
        end = time.monotonic() + timeout_s
        while self._open and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self._open

    def forget(self) -> None:
        """Make the head forget learnt costs and acceptance.

        Raises ValueError if it serves requests, and ClusterError if it does not answer.
        """
        question = Forget(id=next(self._ids))
        found = self._question(question, Forgotten)
        assert isinstance(found, Forgotten)
        if found.why:
            raise ValueError(found.why)

    def close(self) -> None:
        """Close the connection; open requests end. It is safe to call twice."""
        self._closing.set()
        self.control.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        self._end_all(Failure(cause=HUNG_UP))

    def _post(self, message: Control) -> None:
        self._outbox.put(message)
        self.control.wake()

    def _drop(self, request: int) -> None:
        self._post(Drop(id=request))

    def _ask_counts(self, request: int) -> None:
        self._post(AskCounts(id=request))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)  # otherwise it grows every time
        if self._closing.is_set():
            raise ClusterError(self.where, HUNG_UP)

    def _check_open(self) -> None:
        self._check()
        if self._draining:
            raise ClusterError(self.where, "this client takes no more requests: it is draining")

    def _question(self, message: Control, kind: type[Control]) -> Control:
        """Return the answer to a question that a head answers at once."""
        with self._asking:
            self._check()
            self._clear_replies()
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
                of_another = isinstance(reply, Forgotten) and reply.id != getattr(message, "id", 0)
                if isinstance(reply, kind) and not of_another:
                    return reply
        raise ClusterError(self.where, f"no answer within {ANSWER_TIMEOUT_S:.0f} s")

    def _clear_replies(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._replies.get_nowait()

    # The connection's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._send_posted()
                for frame in self.control.receive(POLL_S):
                    self._take(unpack(frame))
                self._watch()
            for number in list(self._open):
                self._drop(number)
            self._send_posted()
        except ClusterError as error:
            self._fail(error)
        except UnreachableError as error:
            self._fail(ClusterError(self.where, str(error)))
        except ControlError as error:
            cause = f"it says what this client cannot read: {error}"
            self._fail(ClusterError(self.where, cause))
        except Exception as error:
            log.exception("the connection to the head has failed")
            self._fail(ClusterError(self.where, cause_of(error)))
        finally:
            self.control.close()

    def _fail(self, error: ClusterError) -> None:
        """End open requests: nothing more can be asked."""
        with self._lock:
            self._error = error
        self._end_all(Failure(cause=error.cause, rank=0))

    def _send_posted(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.control.send(pack(self._outbox.get_nowait()))

    def _take(self, message: Control) -> None:
        self._note_word(message)
        match message:
            case Piece():
                self._piece(message)
            case Note():
                if (found := self._open.get(message.id)) is not None:
                    found.stream.put(Notice(text=message.text))
            case Done():
                self._done(message)
            case Counts():
                self._take_counts(message)
            case Refuse() if self._open and not self._asking.locked():
                raise RefusedError(self.where, message.why)
            case Refuse() | ClusterStatus() | Forgotten():
                with contextlib.suppress(queue.Full):  # no thread waits for it
                    self._replies.put_nowait(message)

    def _piece(self, message: Piece) -> None:
        found = self._open.get(message.id)
        if found is not None:
            found.tokens.extend(message.tokens)
            found.texts.append(message.text)
            out = TokensOut(request=message.id, tokens=message.tokens, text=message.text)
            found.stream.put(out)

    def _done(self, message: Done) -> None:
        figures = message.figures
        if figures is not None:
            self.epochs[message.id] = figures.first_epoch, figures.epoch
            _keep_newest(self.epochs)
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
            found = self._open.pop(request, None)
            if found is None:
                return
            self._over[request] = found.stream
            _keep_newest(self._over)
        figures = done.figures if done is not None else None
        output = RequestOutput(
            request=request,
            tokens=tuple(found.tokens),
            text="".join(found.texts),
            reason=reason,
            stats=stats_of(figures) if figures is not None else DecodeStats(),
            error=error,
            num_prompt_tokens=done.prompt_tokens if done is not None else 0,
        )
        found.stream.put(output)

    def _take_counts(self, message: Counts) -> None:
        stream = self._over.get(message.id)
        if stream is not None:
            stages = message.stages
            stream.put_counts(None if stages is None else {s.rank: _counts(s) for s in stages})

    def _end_all(self, failure: Failure) -> None:
        for request in list(self._open):
            self._end(request, FinishReason.ERROR, error=failure)
        for stream in list(self._over.values()):
            stream.put_counts(None)  # they will never come

    def _watch(self) -> None:
        """Ask a silent head whether it is there. Raises ClusterError if it is not."""
        if not self.control.is_connected:
            raise ClusterError(self.where, "connection lost")
        if not self._open:
            self._heard_at = time.monotonic()
            return
        silence_s = time.monotonic() - self._heard_at
        if silence_s > SILENCE_S and not self._has_asked:
            self.control.send(pack(AskStatus(version=flowspec.__version__)))
            self._has_asked = True
        if silence_s > 2 * SILENCE_S:
            raise ClusterError(self.where, f"no word from it for {silence_s:.0f} s")

    def _note_word(self, message: Control) -> None:
        """Note a sign of life. Raises ClusterError if the head keeps saying that it serves none.

        A status that another thread has asked for says nothing about open requests.
        """
        if isinstance(message, ClusterStatus) and not self._has_asked:
            return
        self._heard_at, self._has_asked = time.monotonic(), False
        is_idle = isinstance(message, ClusterStatus) and not (
            message.requests_active or message.requests_waiting
        )
        self._num_idle = self._num_idle + 1 if is_idle and self._open else 0
        if self._num_idle >= FORGOTTEN_AFTER:
            raise ClusterError(self.where, "it serves nobody now, and has not answered: ask again")


def ask_of(request: Request, number: int) -> Ask:
    """Return a request as a control message. Raises ValueError for what cannot be sent."""
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
    """Return the first error of an Ask, for the user."""
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
    """Return the fields of an Ask; a request has taken the limits out of the parameters."""
    fields = asdict(sampling)
    return {name: value for name, value in fields.items() if name not in ("max_tokens", "stop")}


def _keep_newest(entries: dict[int, Any]) -> None:
    while len(entries) > MAX_REMEMBERED:
        del entries[next(iter(entries))]


def _counts(figures: StageFigures) -> StageCounts:
    return StageCounts(
        num_rows_run=figures.rows_run, num_rows_pruned=figures.rows_pruned, busy_s=figures.busy_s
    )
