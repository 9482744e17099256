"""Runs a stage for one epoch, in its own thread, beside the device's heartbeats."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from flowspec.cluster.device.memory import num_kv_tokens, peak_bytes
from flowspec.config import DeviceConfig
from flowspec.engine.build import new_stage
from flowspec.model.backend import StageBackend
from flowspec.protocol.control import Addresses, Assign, FromDevice, StageReady, Trouble
from flowspec.request import ClusterError, cause_of, rank_name
from flowspec.runtime.event_loop import EventLoop
from flowspec.stage.stage import Stage
from flowspec.system.address import Address, parse_url
from flowspec.transport.secure.keys import Keys
from flowspec.transport.zmq import ZmqTransport

log = logging.getLogger(__name__)
AddressBook: TypeAlias = dict[int, dict[str, str]]  # rank -> channel -> address; read when needed
TURN_S = 0.1  # how soon an idle stage notices that its epoch is over
CAUSE_FIRST_S = 1.0  # time for the head to hear of a loss before this stage leaves
STOP_TIMEOUT_S = 30.0  # a forward may have to end first


class CancelledError(Exception):
    """The epoch ended before its work."""


class LayerSource(Protocol):
    """The source of a device's layers."""

    def load(self, assign: Assign, report: Callable[[FromDevice], None]) -> StageBackend[Any]:
        """Load the assigned layers; `report` gets the progress and may raise CancelledError."""


class StageJob:
    """Fetches, loads, listens and serves until `stop`; reports events through `tell`.

    The job's own thread calls `tell`.
    """

    def __init__(
        self,
        assign: Assign,
        source: LayerSource,
        open_transport: Callable[[int, AddressBook], ZmqTransport],
        tell: Callable[[FromDevice], None],
        local: DeviceConfig,
    ) -> None:
        self.assign, self._local = assign, local
        self.stage: Stage | None = None
        self._source, self._open_transport, self._tell = source, open_transport, tell
        self._addresses: Sequence[Addresses] = ()
        self._may_serve = threading.Event()
        self._stopping = threading.Event()
        name = f"stage-{assign.rank}-{assign.epoch}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether its thread has not ended."""
        return self._thread.is_alive()

    def serve(self, addresses: Sequence[Addresses]) -> None:
        """Start to serve: all stages are ready, and rank k listens at `addresses[k]`."""
        self._addresses = addresses
        self._may_serve.set()

    def stop(self) -> None:
        """End the job; wait until its sockets are closed and its caches are free."""
        self._stopping.set()
        self._may_serve.set()
        self._thread.join(STOP_TIMEOUT_S)

    def _report(self, message: FromDevice) -> None:
        if self._stopping.is_set():
            raise CancelledError
        self._tell(message)

    def _run(self) -> None:
        rank = self.assign.rank
        try:
            model = self._source.load(self.assign, self._report)
            book: AddressBook = {}
            transport = self._open_transport(rank, book)
            try:
                self._serve(model, transport, book)
            except CancelledError:
                raise
            except Exception as error:
                self._tell_why(error)
                # closed connections look like this stage's own end, so the cause must come first
                self._stopping.wait(CAUSE_FIRST_S)
            finally:
                self.stage = None
                transport.close()
        except CancelledError:
            return
        except Exception as error:
            self._tell_why(error)

    def _tell_why(self, error: Exception) -> None:
        """Tell the head the error; log its traceback here.

        A ValueError is a sentence for the user, which the receiver shows.
        """
        if isinstance(error, ClusterError):
            self._tell_lost(error)
            return
        if type(error) is not ValueError:
            log.error("the stage failed", exc_info=error)
        self._tell(Trouble(epoch=self.assign.epoch, cause=cause_of(error)[:4000]))

    def _tell_lost(self, error: ClusterError) -> None:
        """Report that the epoch cannot continue, with the cause and the rank at fault."""
        epoch, rank = self.assign.epoch, self.assign.rank
        log.warning("%s", error)
        ranks = range(self.assign.num_stages + 1)
        lost = next((r for r in ranks if rank_name(r) == error.where and r != rank), -1)
        self._tell(Trouble(epoch=epoch, cause=error.cause[:4000], lost=lost))

    def _serve(self, model: StageBackend[Any], transport: ZmqTransport, book: AddressBook) -> None:
        assign = self.assign
        numerics = assign.model.numerics
        stage = new_stage(assign.rank, assign.num_stages, model, numerics)
        memory_mb = self._local.kv_memory_mb or assign.kv_memory_mb
        stage.num_kv_tokens = num_kv_tokens(model, memory_mb=memory_mb, num_sharing=1)
        stage.peak_memory_bytes = peak_bytes
        own = Addresses(control=transport.bound["control"], data=transport.bound["data"])
        ready = StageReady(
            epoch=assign.epoch,
            model_hash=assign.model.model_hash,
            numerics=numerics,
            addresses=own,
            num_kv_tokens=stage.num_kv_tokens,
        )
        self._report(ready)
        self._may_serve.wait()
        if self._stopping.is_set():
            return
        for rank, there in enumerate(self._addresses):
            book[rank] = {"control": there.control, "data": there.data}
        self.stage = stage
        driver = EventLoop(stage, transport, assign.num_stages)
        while not self._stopping.is_set() and not driver.stopped:
            driver.turn(TURN_S)


def listen(rank: int, host: str, port: int, book: AddressBook, keys: Keys) -> ZmqTransport:
    """Open the data sockets of `rank` at `port` and the next one, or at free ports.

    The caller fills `book` with the other ranks' addresses. Raises ValueError when `host` is not an
    address of this machine.
    """
    if port:
        try:
            return _listen_at(rank, host, (port, port + 1), book, keys)
        except ValueError as error:
            transport = _listen_at(rank, host, (0, 0), book, keys)
            used = " and ".join(str(parse_url(bound).port) for bound in transport.bound.values())
            log.warning("%s; ports %s are used instead", error, used)
            return transport
    return _listen_at(rank, host, (0, 0), book, keys)


def _listen_at(
    rank: int, host: str, ports: tuple[int, int], book: AddressBook, keys: Keys
) -> ZmqTransport:
    control, data = (Address(host, port).url for port in ports)
    book[rank] = {"control": control, "data": data}
    return ZmqTransport(rank, book, keys)
