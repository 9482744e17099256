"""The connection of two ranks by torch.distributed: gloo, and nccl for tensors on a GPU.

Every pair of ranks has its own process groups, so that a broken connection identifies its peer and
harms no other. A message is an envelope (a byte tensor: number of frames, their lengths, and the
short frames themselves), followed by each long frame as its own tensor. Some receives of envelopes
are always posted: a short message is one write, and a slow receiver delays only its own sender.
"""

import contextlib
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from flowspec.protocol.codec import MAX_FRAME_BYTES, Frame, WireError
from flowspec.request import ClusterError
from flowspec.transport.base import LOST, LostPeer

JOIN_TIMEOUT_S = 120.0  # wait for the peer's process to start
CONNECT_TIMEOUT_S = 30.0  # time limit once both are there
SEND_TIMEOUT_S = 10.0
SLOWEST_BYTES_PER_S = 1e6  # extra time for a long frame
MAX_QUEUED_MESSAGES = 1000  # before the connection is made
MAX_UNDER_WAY = 32  # sends not checked for completion yet; their tensors are kept alive
ENVELOPE_BYTES = 524_288  # most segments fit: one write without an answer
NUM_POSTED = 4  # posted receives of envelopes
MAX_FRAMES = 256
JOIN_POLL_S = 0.02
# gloo closes a connection whose wait times out, so an idle one must have no limit
FOREVER = timedelta(days=50 * 365)
ENVELOPE, LONG_FRAME, NOTHING = 0, 1, 2  # tags
INSIDE, BY_GLOO, BY_NCCL = range(3)  # how a frame travels
_COUNT = struct.Struct("<H")
_FRAME = struct.Struct("<IB")  # bytes, way

AnyFrame: TypeAlias = Frame | Tensor


@dataclass(frozen=True, slots=True)
class Meeting:
    """The place where the ranks of a cluster find each other."""

    # a dist.Store for one user, because a waiting user locks the others out
    open_store: Callable[[], Any]
    host: str = "127.0.0.1"  # address at which the others reach this rank
    interface: str = ""  # network interface to use in place of `host`
    gpu: str = ""  # its tensors travel by nccl; empty means only gloo

    def make_device(self) -> Any:
        """Return the listener and event loop that the gloo groups of a rank share."""
        if self.interface:
            return dist.ProcessGroupGloo.create_device(interface=self.interface)
        return dist.ProcessGroupGloo.create_device(hostname=self.host)


class TorchLink:
    """Rank `rank`'s end of its connection to `peer`.

    Its own thread connects, then calls `deliver` with the frames of each message and, once,
    `broken` with the reason why no more will come. An error in `deliver` breaks the link.
    """

    def __init__(
        self,
        rank: int,
        peer: int,
        meeting: Meeting,
        device: Any,
        deliver: Callable[[list[AnyFrame]], None],
        broken: Callable[[int, Exception], None],
    ) -> None:
        self.rank, self.peer = rank, peer
        self._meeting, self._device = meeting, device
        self._deliver, self._broken = deliver, broken
        self._me = int(rank > peer)  # rank in the groups of two
        self._changed = threading.Condition()  # guards the attributes below
        self._error: Exception | None = None
        self._gloo: Any = None
        self._nccl: list[Any] = []  # by sender: in one group, two sends would wait for each other
        self._backlog: deque[list[AnyFrame]] = deque()
        self._under_way: deque[tuple[Any, Tensor]] = deque()
        self._said_bye = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"link-{rank}-{peer}")
        self._thread.start()

    def send(self, frames: list[AnyFrame], what: str) -> None:
        """Send a message; errors call it `what`.

        Raises ClusterError when the connection is broken or accepts nothing for too long.
        """
        with self._changed:
            if not self._changed.wait_for(self._has_room, SEND_TIMEOUT_S):
                raise self._took_nothing(what)
            if self._error is not None:
                raise self._error
            if self._gloo is None:
                self._backlog.append(frames)
            else:
                self._post(frames, what)

    def has_ended(self) -> bool:
        """Whether the link can neither send nor receive any more."""
        return self._error is not None

    def say_bye(self, end: float) -> None:
        """Tell the peer that nothing more will come; try until `end` (monotonic clock)."""
        with self._changed:
            if self._backlog:
                self._changed.wait_for(lambda: not self._backlog or self._error, _left(end))
            with contextlib.suppress(ClusterError):  # the peer may be gone
                self._bye()

    def hang_up(self, end: float) -> None:
        """Close the connection once the peer has taken all, or at `end` (monotonic clock)."""
        with self._changed:
            if self._said_bye:
                self._changed.wait_for(lambda: self._error, _left(end))
            self._closing.set()
            if self._gloo is not None:
                _close_gloo(self._gloo, 1 - self._me)
            for group in self._nccl:
                group.abort()
        self._thread.join(_left(end) + 0.1)

    # Sending, with `_changed` held --------------------------------------------------------------

    def _has_room(self) -> bool:
        waiting = self._gloo is None and self._error is None
        return not waiting or len(self._backlog) < MAX_QUEUED_MESSAGES

    def _post(self, frames: Sequence[AnyFrame], what: str) -> None:
        start = time.monotonic()
        try:
            envelope, long_frames = pack(frames, with_gpu=bool(self._nccl))
            self._start(self._gloo, envelope, ENVELOPE)
            for frame in long_frames:
                by_gloo = frame.device.type == "cpu"
                self._start(self._gloo if by_gloo else self._nccl[self._me], frame, LONG_FRAME)
        except RuntimeError as error:
            if self._error is None:
                late = time.monotonic() - start >= SEND_TIMEOUT_S
                self._error = self._took_nothing(what) if late else self._lost(error)
            raise self._error from None

    def _start(self, group: Any, tensor: Tensor, tag: int) -> None:
        self._under_way.append((group.send([tensor], 1 - self._me, tag), tensor))
        if len(self._under_way) > MAX_UNDER_WAY:
            work, oldest = self._under_way.popleft()
            work.wait(_limit(oldest.numel()))

    def _bye(self) -> None:
        if self._gloo is not None and self._error is None and not self._said_bye:
            self._said_bye = True
            self._post([], "goodbye")  # real messages have frames, so an empty one means the end

    def _took_nothing(self, what: str) -> ClusterError:
        return ClusterError.of_rank(self.peer, f"took no {what} for {SEND_TIMEOUT_S:.0f} s")

    def _lost(self, error: Exception) -> ClusterError:
        # torch.distributed raises only RuntimeError; its place in the source helps no user
        cause = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0]
        return LostPeer.of_rank(self.peer, f"{LOST}: {cause}")

    # The link's own thread ----------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception
        try:
            if self._connect():
                self._read()
            error = LostPeer.of_rank(self.peer, f"{LOST}: it has left the cluster")
        except (WireError, ClusterError) as named:
            error = named
        except RuntimeError as lost:
            error = self._lost(lost)
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        if not self._closing.is_set():
            self._broken(self.peer, self._error)

    def _connect(self) -> bool:
        """Meet the peer in the store; return False if this end was closed meanwhile."""
        pair = f"{min(self.rank, self.peer)}-{max(self.rank, self.peer)}"
        store = dist.PrefixStore(pair, self._meeting.open_store())
        store.set(str(self.rank), "here")
        end = time.monotonic() + JOIN_TIMEOUT_S
        while not store.check([str(self.peer)]):
            if self._closing.wait(JOIN_POLL_S):
                return False
            if time.monotonic() > end:
                raise ClusterError.of_rank(self.peer, f"not there after {JOIN_TIMEOUT_S:.0f} s")
        gloo = _make_gloo(dist.PrefixStore("gloo", store), self._me, self._device)
        nccl = []
        if self._meeting.gpu:
            torch.cuda.set_device(self._meeting.gpu)  # applies to this thread
            for sender in range(2):
                nccl.append(_make_nccl(dist.PrefixStore(f"nccl{sender}", store), self._me))
        with self._changed:
            self._gloo, self._nccl = gloo, nccl
            while self._backlog and not self._error:
                self._post(self._backlog.popleft(), "message")
            self._changed.notify_all()
        return True

    def _read(self) -> None:
        """Deliver messages until the peer says that there are no more."""
        envelopes = [torch.empty(ENVELOPE_BYTES, dtype=torch.uint8) for _ in range(NUM_POSTED)]
        posted = deque((self._expect(envelope, ENVELOPE), envelope) for envelope in envelopes)
        while True:
            work, envelope = posted.popleft()
            work.wait(FOREVER)
            frames = self._open(_bytes_of(envelope))
            if not frames:
                break
            posted.append((self._expect(envelope, ENVELOPE), envelope))
            self._deliver(frames)
        with self._changed:
            self._bye()

    def _expect(self, tensor: Tensor, tag: int) -> Any:
        return self._gloo.recv([tensor], 1 - self._me, tag)

    def _open(self, envelope: memoryview) -> list[AnyFrame]:
        (count,) = _COUNT.unpack_from(envelope)
        if count > MAX_FRAMES:
            raise WireError(f"an envelope has {count} frames, at most {MAX_FRAMES} are allowed")
        start = _COUNT.size + count * _FRAME.size
        frames: list[AnyFrame] = []
        for size, way in _FRAME.iter_unpack(envelope[_COUNT.size : start]):
            if size > MAX_FRAME_BYTES:
                raise WireError(f"a frame has {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
            if way == BY_GLOO:
                frame = torch.empty(size, dtype=torch.uint8)
                self._expect(frame, LONG_FRAME).wait(_limit(size))
                frames.append(_bytes_of(frame))
            elif way == BY_NCCL and self._nccl:
                frames.append(self._receive_on_gpu(size))
            elif way == INSIDE and start + size <= ENVELOPE_BYTES:
                frames.append(bytes(envelope[start : start + size]))
                start += size
            else:
                raise WireError(f"not an envelope: a frame of {size} bytes by way {way}")
        return frames

    def _receive_on_gpu(self, size: int) -> Tensor:
        frame = torch.empty(size, dtype=torch.uint8, device=self._meeting.gpu)
        work = self._nccl[1 - self._me].recv([frame], 1 - self._me, LONG_FRAME)
        end = time.monotonic() + _limit(size).total_seconds()
        while not work.is_completed():  # wait() would block the GPU's stream, without a time limit
            if time.monotonic() > end:
                raise ClusterError.of_rank(self.peer, f"sent no {size} bytes that it announced")
            time.sleep(5e-5)
        work.wait()
        return frame


def pack(frames: Sequence[AnyFrame], *, with_gpu: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return a message's envelope, and the long frames that follow it on their own."""
    table = bytearray(_COUNT.pack(len(frames)))
    inside: list[Frame] = []
    following: list[Tensor] = []
    room = ENVELOPE_BYTES - _COUNT.size - len(frames) * _FRAME.size
    for frame in frames:
        if isinstance(frame, Tensor):
            if with_gpu and frame.device.type != "cpu" and len(frame):
                table += _FRAME.pack(len(frame), BY_NCCL)
                following.append(frame)
                continue
            frame = _bytes_of(frame.cpu())
        if len(frame) <= room:
            table += _FRAME.pack(len(frame), INSIDE)
            inside.append(frame)
            room -= len(frame)
        else:
            table += _FRAME.pack(len(frame), BY_GLOO)
            following.append(torch.frombuffer(frame, dtype=torch.uint8))
    return torch.frombuffer(bytearray(b"".join((table, *inside))), dtype=torch.uint8), following


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a flat byte tensor on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _make_gloo(store: Any, me: int, device: Any) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    options._threads = 1  # of collectives, which are not used
    options._devices = [device]
    return dist.ProcessGroupGloo(store, me, 2, options)


def _make_nccl(store: Any, me: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _limit(MAX_FRAME_BYTES)
    return dist.ProcessGroupNCCL(store, me, 2, options)


def _close_gloo(group: Any, peer: int) -> None:
    """Close a gloo connection: a wait on it that times out also ends every other wait on it."""
    try:
        group.recv([torch.empty(1, dtype=torch.uint8)], peer, NOTHING).wait(
            timedelta(milliseconds=1)
        )
    except RuntimeError:
        return


def _limit(size: int) -> timedelta:
    return timedelta(seconds=SEND_TIMEOUT_S + size / SLOWEST_BYTES_PER_S)


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic())
