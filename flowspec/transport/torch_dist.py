"""torch.distributed transport: gloo, and nccl for hidden states on a GPU; trusted networks only.

Neither encrypts nor authenticates: whoever reaches the ports can read, join and end the cluster.
"""

import os
import queue
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flowspec.protocol.codec import WireError, decode, encode_tensors
from flowspec.protocol.messages import DATA, HEAD, WireMessage
from flowspec.request import rank_name
from flowspec.system.address import local_address_towards
from flowspec.transport.torch_link import AnyFrame, Meeting, TorchLink

MAX_WAITING_MESSAGES = 1000  # limit at which the links' threads stop reading
LINGER_S = 1.0
STORE_TIMEOUT_S = 120.0


class TorchDistTransport:
    """Rank `rank` of ranks 0..num_stages, which all meet at `meeting`, in any order.

    Receiving raises ClusterError when the head loses a stage or a stage loses the head. A stage
    that loses another stage learns of it when it sends to it.
    """

    def __init__(self, rank: int, num_stages: int, meeting: Meeting) -> None:
        self.rank = rank
        self._inbox: queue.SimpleQueue[WireMessage | Exception | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._closed = threading.Event()
        device = meeting.make_device()
        self._links = {
            peer: TorchLink(rank, peer, meeting, device, self._deliver, self._broken)
            for peer in range(num_stages + 1)
            if peer != rank
        }

    def send(self, to: int, message: WireMessage) -> None:
        """Send a message; raises ClusterError when the peer is gone or takes nothing for long."""
        self._links[to].send(encode_tensors(message), type(message).__name__)

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the messages that have come, control first; wait at most `timeout_s` for one."""
        control: list[WireMessage] = []
        data: list[WireMessage] = []
        wait = timeout_s > 0 and self._failure is None
        while True:
            try:
                item = self._inbox.get(wait, timeout_s)
            except queue.Empty:
                break
            wait = False
            if item is None:  # `wake` was called
                continue
            if isinstance(item, Exception):
                self._failure = self._failure or item
            else:
                (data if isinstance(item, DATA) else control).append(item)
        if self._failure is not None and not control and not data:
            raise self._failure  # messages that came before the failure are returned first
        return control + data

    def wake(self) -> None:
        """End the current or the next wait of `receive`."""
        self._inbox.put(None)

    def has_lost(self, peer: int) -> bool:
        """Whether the connection to `peer` has broken or ended."""
        return self._links[peer].has_ended()

    def close(self) -> None:
        """Close all connections; sent messages are still delivered within a time limit."""
        self._closed.set()
        end = time.monotonic() + LINGER_S
        for link in self._links.values():
            link.say_bye(end)
        for link in self._links.values():
            link.hang_up(end)

    def _deliver(self, frames: list[AnyFrame]) -> None:
        while self._inbox.qsize() >= MAX_WAITING_MESSAGES and not self._closed.wait(0.01):
            pass
        try:
            self._inbox.put(decode(frames))
        except WireError as error:
            raise WireError(f"{rank_name(self.rank)} received a bad frame: {error}") from None

    def _broken(self, peer: int, error: Exception) -> None:
        if isinstance(error, WireError) or HEAD in (self.rank, peer):
            self._inbox.put(error)


def meet_in_folder(folder: str, *, gpu: str = "") -> Meeting:
    """Let processes of this machine meet at a file in a folder that only this user may enter.

    Raises ValueError when this torch lacks what is needed, as `meet_by_torchrun` does.
    """
    check_backends(gpu)
    path = str(Path(folder) / "ranks")
    return Meeting(lambda: dist.FileStore(path, -1), gpu=gpu)


def meet_by_torchrun(*, gpu: str = "") -> Meeting:
    """Let the processes that torchrun has started meet, on one or several machines.

    On several machines, each process listens at its address on the route to torchrun's master, or
    on the interface that GLOO_SOCKET_IFNAME names.
    """
    check_backends(gpu)
    env = os.environ
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    hosted = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = env["RANK"] == "0" and not hosted
    first = dist.TCPStore(host, port, None, is_master, timeout, multi_tenant=True)

    def open_store() -> Any:
        store = dist.TCPStore(first.host, port, None, False, timeout)  # `first` may be the server
        return dist.PrefixStore(f"flowspec-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        return Meeting(open_store, gpu=gpu)
    interface = env.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    return Meeting(open_store, host=local_address_towards(host, port), interface=interface, gpu=gpu)


def tell(meeting: Meeting, key: str, text: str) -> None:
    """Store a text for all ranks at the meeting point."""
    meeting.open_store().set(key, text)


def hear(meeting: Meeting, key: str, timeout_s: float) -> str | None:
    """Return what a rank has stored under `key`; None if nothing comes within the time."""
    store = meeting.open_store()
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError:
        return None
    return str(store.get(key).decode())


def check_backends(gpu: str) -> None:
    """Raise ValueError when this torch lacks gloo, or with `gpu` also when it lacks nccl."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError("this torch is built without torch.distributed gloo; use --transport zmq")
    if gpu and not dist.is_nccl_available():
        raise ValueError("this torch is built without nccl; use --transport gloo or zmq")
    if gpu and torch.device(gpu).index >= torch.cuda.device_count():
        raise ValueError(
            f"transport nccl needs a GPU for each process, {gpu} here, but this machine has "
            f"{torch.cuda.device_count()}: use --transport gloo or zmq"
        )
