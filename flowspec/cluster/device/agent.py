"""Device agent: joins a cluster, holds layers, sends heartbeats, and reconnects by itself.

The main loop owns the control socket and never computes. A StageJob in another thread fetches,
loads and runs the layers, so that a long forward does not delay heartbeats.
"""

import logging
import queue
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from flowspec.cluster.device.power import PowerMeter
from flowspec.cluster.device.report import measure_link
from flowspec.cluster.device.stage_thread import AddressBook, LayerSource, StageJob, listen
from flowspec.cluster.network import interfaces
from flowspec.config import DeviceConfig
from flowspec.protocol.control import (
    Assign,
    Beat,
    Bye,
    Control,
    ControlError,
    DeviceReport,
    FromDevice,
    Hello,
    ModelCard,
    Refuse,
    Release,
    Serve,
    Welcome,
    WhoAreYou,
    pack,
    unpack,
)
from flowspec.request import ClusterError
from flowspec.system import signals
from flowspec.system.address import (
    ALL_INTERFACES,
    as_seen_here,
    local_address_towards,
    zone_of,
)
from flowspec.transport.control_sockets import WRONG_TOKEN, ControlClient, UnreachableError
from flowspec.transport.secure.keys import Keys
from flowspec.transport.zmq import ZmqTransport

log = logging.getLogger(__name__)
HANDSHAKE_TIMEOUT_S = 5.0
WELCOME_TIMEOUT_S = 10.0
BACKOFF_S = (0.5, 5.0)  # first and longest wait before the next try
TELL_EVERY_S = 60.0  # between log lines of the same reason


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinConfig:
    """How a device takes part."""

    host: str
    port: int
    name: str
    version: str
    # address where its stage listens; default: its address on the route to the head
    listen_host: str = ""
    listen_port: int = 0  # and the next one; 0: any free ports
    once: bool = False  # end when the head ends, instead of waiting for it
    pinned: ModelCard | None = None  # offline: the only model it can serve
    local: DeviceConfig = DeviceConfig()  # of this device, whatever the head's is


class JoinRefusedError(RuntimeError):
    """Joining cannot work in this state; the text says why and what to do."""


class DeviceAgent:
    """Runs until `stop`, a signal, a final refusal, or with `once` the head's end."""

    def __init__(
        self,
        config: JoinConfig,
        keys: Keys,
        source: LayerSource,
        report: Callable[[], DeviceReport],
        *,
        on_event: Callable[[Control], None] = lambda message: None,
        power: PowerMeter | None = None,
    ) -> None:
        self.config, self.keys, self.source = config, keys, source
        self.session = secrets.token_hex(8)
        self._new_report, self._on_event, self._power = report, on_event, power
        self._job: StageJob | None = None
        self._words: queue.SimpleQueue[FromDevice] = queue.SimpleQueue()
        self._held: tuple[ModelCard, tuple[int, int]] | None = None
        self._stopping = ""
        self._welcome: Welcome | None = None
        self._heard_at = self._beat_at = 0.0
        self._round_trip_s = 0.0
        self._was_in = self._has_ended = False
        self._told = "", 0.0  # last reason for trying again, and when it was logged
        self._head_host = config.host  # numeric, once there is a connection
        # this device's address and interface on the route to the head
        self._own_host = self._zone = ""

    def stop(self, why: str) -> None:
        """Leave in order; any thread may call this."""
        self._stopping = why

    def run(self) -> None:
        """Stay in the cluster. Raises JoinRefusedError, and ClusterError when `once` ends."""
        wait_s = BACKOFF_S[0]
        while not self._is_stopping():
            reason = self._attend()
            self._drop_job()
            if self._is_stopping():
                return
            if self._welcome is not None:
                wait_s = BACKOFF_S[0]
            if self.config.once and self._has_ended:
                return
            if self.config.once and self._was_in:
                raise ClusterError("head", reason)
            self._tell_why(reason)
            self._pause(wait_s * random.uniform(0.8, 1.2))  # so that devices do not retry in step
            wait_s = min(2 * wait_s, BACKOFF_S[1])

    def _is_stopping(self) -> bool:
        if name := signals.received():
            self._stopping = self._stopping or f"ended by {name}"
        return bool(self._stopping)

    def _tell_why(self, reason: str) -> None:
        """Log the reason once and then at intervals; log another reason at once."""
        now, (told, told_at) = time.monotonic(), self._told
        if reason != told or now - told_at >= TELL_EVERY_S:
            self._told = reason, now
            log.warning("%s; trying again every few seconds", reason)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_stopping():
            time.sleep(0.1)

    def _attend(self) -> str:
        """Run one connection from its first to its last message; return why it ended."""
        host, port = self.config.host, self.config.port
        self._welcome = None
        client = ControlClient(host, port, self.keys)
        try:
            if reason := client.connect(HANDSHAKE_TIMEOUT_S):
                if WRONG_TOKEN in reason and not self._was_in:
                    raise JoinRefusedError(reason)
                return reason
            self._look_up_route(client.host)
            link = measure_link(client)
            hello = self._hello()
            with signals.ending_in_order():  # the head is told first
                self._send(client, hello.model_copy(update={
                    "report": hello.report.model_copy(update={"link": link})
                }))  # fmt: skip
                return self._stay(client)
        except UnreachableError as error:
            return f"the head accepts nothing: {error}"
        finally:
            client.close()

    def _stay(self, client: ControlClient) -> str:
        self._heard_at = started_at = time.monotonic()
        while not self._is_stopping():
            rhythm = self._welcome.heartbeat_s if self._welcome else 0.5
            for frame in client.receive(rhythm / 4):
                self._heard_at = time.monotonic()
                if end := self._take(client, frame):
                    return end
            while not self._words.empty():
                self._pass_on(client, self._words.get())
            if end := self._keep_time(client, started_at):
                return end
        self._send(client, Bye(why=self._stopping))
        return self._stopping

    def _keep_time(self, client: ControlClient, started_at: float) -> str:
        """Send due heartbeats; return a text if silence ends the connection, else an empty one."""
        now, welcome = time.monotonic(), self._welcome
        if welcome is None:
            if now - started_at > WELCOME_TIMEOUT_S:
                return f"no welcome from the head within {WELCOME_TIMEOUT_S:.0f} s"
            return ""
        if now - self._heard_at > welcome.dead_after_s:
            return f"lost the head: no message from it for {now - self._heard_at:.1f} s"
        if now - self._beat_at >= welcome.heartbeat_s:
            self._send_beat(client, now)
        return ""

    def _take(self, client: ControlClient, frame: bytes) -> str:
        """Act on the head's message; return why the connection ends, or an empty text."""
        try:
            message = unpack(frame)
        except ControlError as error:
            return f"the head sent an invalid message: {error}"
        if not isinstance(message, Beat):
            self._on_event(message)
        match message:
            case Beat(sent_at=sent_at) if sent_at:
                self._round_trip_s = max(0.0, time.monotonic() - sent_at)
            case Welcome():
                self._welcome, self._was_in = message, True
            case Refuse(retry=False):
                raise JoinRefusedError(message.why)
            case Refuse():
                return f"the head refuses: {message.why}"
            case WhoAreYou():
                return "the head does not know this device any more"
            case Bye():
                self._has_ended = True
                return f"the head has ended: {message.why}"
            case Assign() | Serve() | Release():
                self._take_work(message)
        return ""

    def _take_work(self, message: Assign | Serve | Release) -> None:
        """Handle layers, the other ranks' addresses, or the end of an epoch."""
        if isinstance(message, Assign):
            self._drop_job()
            shards = as_seen_here(message.shards, self._head_host, self._zone)
            assign = message.model_copy(update={"shards": shards})
            self._job = StageJob(
                assign, self.source, self._open_transport, self._words.put, self.config.local
            )
        elif self._job is None or self._job.assign.epoch != message.epoch:
            return  # the message belongs to an older epoch
        elif isinstance(message, Serve):
            self._told = "", 0.0  # it worked: the next failure is news, even for the same reason
            self._job.serve([a.seen_here(self._head_host, self._zone) for a in message.addresses])
        else:
            self._drop_job()

    def _pass_on(self, client: ControlClient, message: FromDevice) -> None:
        """Send the job's message to the head, unless it belongs to an ended job."""
        job = self._job
        if job is None or getattr(message, "epoch", None) != job.assign.epoch:
            return
        if message.kind == "ready":
            assign = job.assign
            self._held = (assign.model, (assign.first_layer, assign.last_layer))
        self._on_event(message)
        self._send(client, message)

    def _send_beat(self, client: ControlClient, now: float) -> None:
        self._beat_at = now
        watts = self._power.read_w() if self._power is not None else None
        beat = Beat(sent_at=now, power_w=watts or 0.0, round_trip_s=self._round_trip_s)
        self._send(client, beat)

    def _hello(self) -> Hello:
        model, layers = self._held or (self.config.pinned, None)
        return Hello(
            version=self.config.version,
            session=self.session,
            name=self.config.name,
            report=self._new_report(),
            clock=time.time(),
            model=model,
            layers=layers,
            pinned=self.config.pinned is not None,
        )

    def _send(self, client: ControlClient, message: FromDevice) -> None:
        client.send(pack(message))

    def _drop_job(self) -> None:
        if self._job is not None:
            self._job.stop()
            self._job = None

    def _open_transport(self, rank: int, book: AddressBook) -> ZmqTransport:
        host = self.config.listen_host or self._own_host or ALL_INTERFACES
        return listen(rank, host, self.config.listen_port, book, self.keys)

    def _look_up_route(self, head_host: str) -> None:
        """Find the addresses and interface by which head and device see each other."""
        self._head_host = head_host
        self._own_host = own = local_address_towards(head_host, self.config.port)
        named = (one.name for one in interfaces() if one.address == own)
        self._zone = zone_of(own) or next(named, "")
