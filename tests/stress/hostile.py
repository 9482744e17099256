"""Measures the effect of hostile peers on a listening process.

    python -m tests.stress.hostile [--seconds 10] [--only wrong_token,slow_loris] [--json FILE]

A victim process listens as a stage does and serves weights as a head does. While an attack goes on,
a member that was connected before sends messages back and forth; afterwards a new member connects.
Exit code 1 unless, for each attack: the victim lives, grew by less than --max-growth-mb, wrote at
most a handful of log lines, held few descriptors, and members noticed no stall.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.transfer import make_split
from flowspec.protocol.messages import FinishRequest, Started, WireMessage
from flowspec.transport.base import LostPeer
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.transport.zmq import ZmqTransport
from flowspec.weights.transfer.shards import ShardServer
from tests.stress.hostile_attacks import MEMBERS, STRANGERS, Target

HOST = "127.0.0.1"
MAX_LOG_LINES = 6  # of different kinds; each is repeated every 10 s at most
MAX_STALL_S = 2.0  # this machine may be busy with the attack itself
MAX_JOIN_S = 6.0  # a flood from many addresses delays who is not yet connected
VICTIM_FILES = 1024  # that the victim may have open, as is usual for a service
# Held at any time. On busy cores the guard looks late, and more come in before it shuts the door;
# without the filter in the kernel all of VICTIM_FILES are taken.
MAX_DESCRIPTORS = 900
COUNT_LIMIT_S = 6.0  # a handshake that never ends is refused when its time is over
LANES = ("control", "data")


@dataclass
class Outcome:
    """The result of one attack."""

    attack: str
    strikes: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    growth_mb: float = 0.0  # at the worst moment
    descriptors: int = 0  # more than before, after it
    peak_descriptors: int = 0  # at the worst moment
    log_lines: int = 0
    trips: int = 0  # round trips of the member's messages during it
    slowest_trip_ms: float = 0.0
    new_member_ms: float = 0.0
    failure: str = ""


def victim(token: str, split: str, pipe: Any) -> None:
    """Answer members, serve weights, and tell about itself when asked."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (VICTIM_FILES, VICTIM_FILES))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    keys = derive_keys(token)
    book = {1: dict.fromkeys(LANES, f"tcp://{HOST}:0")}
    transport = ZmqTransport(1, book, keys)
    server = ShardServer(Path(split), f"tcp://{HOST}:0", keys)
    pipe.send({**transport.bound, "shards": server.address})
    answering = threading.Event()

    def answer() -> None:
        while not answering.is_set():
            messages: Sequence[WireMessage] = ()
            with contextlib.suppress(LostPeer):  # a member has left
                messages = transport.receive(0.1)
            for message in messages:
                if isinstance(message, Started | FinishRequest) and message.request in book:
                    transport.send(message.request, message)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    while (ask := pipe.recv()) is not None:
        if isinstance(ask, dict):
            book.update(ask)
            pipe.send("noted")
        else:
            counts = [transport.refusals(), transport.dropped.counts(), server.refusals()]
            pipe.send({**vitals(counts), "log_lines": len(lines), "alive": thread.is_alive()})
    answering.set()
    thread.join()
    transport.close()
    server.close()


def vitals(counts: Iterable[dict[str, int]]) -> dict[str, Any]:
    """Return memory, descriptors and the sums of the counts."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    process = psutil.Process()
    rss_mb = process.memory_info().rss / 1e6
    about = {"rss_mb": rss_mb, "peak_mb": max(rss_mb, peak_mb())}
    return {**about, "descriptors": process.num_fds(), "counts": dict(total)}


def peak_mb() -> float:
    """Return the most memory since the last call; 0 on systems other than Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    return int(line.split()[1]) * 1024 / 1e6


class Stand:
    """A victim and a member that it knows."""

    def __init__(self, folder: Path) -> None:
        self.token = str(new_token())
        self.keys = derive_keys(self.token)
        make_split(folder / "split", 1 << 20)
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (self.token, str(folder / "split"), other)
        self.process = context.Process(target=victim, args=arguments, daemon=True)
        self.process.start()
        if not self.pipe.poll(60):
            raise RuntimeError("the victim did not start")
        self.addresses = self.pipe.recv()
        self._next_rank, self._num_attacks = 2, 0
        self.member = self.new_member()
        self.trip(self.member)

    def new_member(self) -> tuple[int, ZmqTransport]:
        """Add another member, with its own inbox, and tell the victim."""
        rank = self._next_rank
        self._next_rank += 1
        there = {lane: self.addresses[lane] for lane in LANES}
        own = dict.fromkeys(LANES, f"tcp://{HOST}:0")
        transport = ZmqTransport(rank, {rank: own, 1: there}, self.keys)
        self._talk({rank: transport.bound})  # it answers only members that it knows
        return rank, transport

    def trip(self, member: tuple[int, ZmqTransport]) -> float:
        """Return the seconds of a round trip on each channel; RuntimeError if a message is lost."""
        rank, transport = member
        start = time.monotonic()
        transport.send(1, Started(request=rank, seq_no=1))
        transport.send(1, FinishRequest(request=rank))
        left = 2
        while time.monotonic() < start + 30.0:
            left -= len(transport.receive(0.5))
            if left <= 0:
                return time.monotonic() - start
        raise RuntimeError("no answer within 30 s")

    def ask(self) -> dict[str, Any]:
        """Return the victim's report on itself."""
        told: dict[str, Any] = self._talk("tell")
        return told

    def _talk(self, words: Any) -> Any:
        self.pipe.send(words)
        if not self.pipe.poll(30):
            raise RuntimeError("the victim does not answer")
        return self.pipe.recv()

    def suffer(self, name: str, seconds: float, seed: int = 0) -> Outcome:
        """Run one attack for `seconds`, with a member's messages beside it."""
        attack = {**STRANGERS, **MEMBERS}[name]
        address = self.addresses["shards" if name == "fuzzed_requests" else "data"]
        port = int(address.rpartition(":")[2])
        self._num_attacks += 1
        source = f"127.0.66.{self._num_attacks}"
        target = Target(host=HOST, port=port, keys=self.keys, source=source, seed=seed)
        outcome, before = Outcome(name), self.ask()
        strikes = [0]

        def strike() -> None:
            strikes[0] = attack(target, time.monotonic() + seconds)

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            while thread.is_alive():
                outcome.slowest_trip_ms = max(outcome.slowest_trip_ms, self.trip(self.member) * 1e3)
                outcome.trips += 1
                held = psutil.Process(self.process.pid).num_fds()
                outcome.peak_descriptors = max(outcome.peak_descriptors, held)
                time.sleep(0.02)
            outcome.strikes = strikes[0]
            newcomer = self.new_member()
            outcome.new_member_ms = self.trip(newcomer) * 1e3
            newcomer[1].close()
            self._compare(outcome, before)
        except (RuntimeError, EOFError, OSError, psutil.Error) as error:
            outcome.failure = str(error)
        finally:
            thread.join()
        return outcome

    def _compare(self, outcome: Outcome, before: dict[str, Any]) -> None:
        end, counted, peak_mb = time.monotonic() + COUNT_LIMIT_S, {}, 0.0
        while not counted and time.monotonic() < end:
            time.sleep(0.3)
            after = self.ask()
            peak_mb = max(peak_mb, after["peak_mb"])
            counted = {k: n - before["counts"].get(k, 0) for k, n in after["counts"].items()}
            counted = {k: n for k, n in counted.items() if n}
        outcome.counted = counted
        outcome.growth_mb = peak_mb - before["rss_mb"]
        outcome.descriptors = after["descriptors"] - before["descriptors"]
        outcome.log_lines = after["log_lines"] - before["log_lines"]
        if not after["alive"]:
            outcome.failure = "the victim's loop has ended"

    def close(self) -> None:
        """End both."""
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(timeout=10)
        self.process.kill()
        self.member[1].close()


@contextlib.contextmanager
def stand() -> Iterator[Stand]:
    """Yield a victim for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        made = Stand(Path(folder))
        try:
            yield made
        finally:
            made.close()


def judge(outcome: Outcome, max_growth_mb: float, seconds: float) -> str:
    """Return what is wrong, in words; empty if nothing is."""
    lines = MAX_LOG_LINES * (1 + int(seconds // 10))
    if outcome.failure:
        return outcome.failure
    if not outcome.strikes:
        return "the attack did nothing"
    if not outcome.counted:
        return "nothing was counted"
    if outcome.growth_mb > max_growth_mb:
        return f"grew by {outcome.growth_mb:.1f} MB"
    if outcome.log_lines > lines:
        return f"{outcome.log_lines} log lines, at most {lines} allowed"
    if outcome.slowest_trip_ms > MAX_STALL_S * 1e3 or outcome.new_member_ms > MAX_JOIN_S * 1e3:
        return "members noticed a stall"
    if outcome.peak_descriptors > MAX_DESCRIPTORS:
        return f"it held {outcome.peak_descriptors} descriptors, at most {MAX_DESCRIPTORS} allowed"
    if outcome.descriptors > 8:
        return f"{outcome.descriptors} descriptors were not closed"
    return ""


def main() -> int:
    """Run all attacks in turn on one victim, and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each attack [10]")
    parser.add_argument("--only", help="comma-separated names of some attacks")
    parser.add_argument("--max-growth-mb", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*STRANGERS, *MEMBERS]
    outcomes, bad = [], 0
    with stand() as made:
        for name in names:
            outcome = made.suffer(name, options.seconds)
            outcomes.append(outcome)
            verdict = judge(outcome, options.max_growth_mb, options.seconds)
            bad += bool(verdict)
            counted = ", ".join(f"{n} {reason}" for reason, n in outcome.counted.items())
            print(
                f"{name:20s} {verdict or 'ok'}: {outcome.strikes} strikes ({counted}); "
                f"{outcome.growth_mb:+.1f} MB, {outcome.descriptors:+d} descriptors (at most "
                f"{outcome.peak_descriptors} held), "
                f"{outcome.log_lines} log lines; member: {outcome.trips} trips, slowest "
                f"{outcome.slowest_trip_ms:.0f} ms; new member {outcome.new_member_ms:.0f} ms",
                flush=True,
            )
            if outcome.failure:
                break
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    total = sum(outcome.strikes for outcome in outcomes)
    print(f"{len(outcomes)} attacks, {total} strikes, {bad} failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
