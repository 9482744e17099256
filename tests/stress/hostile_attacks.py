"""Attacks of a hostile peer on a listening port, one function each; hostile.py runs them.

`attack(target, end)` continues until `end` (monotonic seconds) and returns how often it struck.
Each stranger has its own address, and members have another one, as on a network.
"""

import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from flowspec.protocol.codec import encode
from flowspec.protocol.messages import AddRequest, Reroot, Segment, Started
from flowspec.request import NodeId
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.pieces import cut
from flowspec.transport.secure.token import derive_keys, new_token

GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" * 32
MAX_OPEN = 600
MAX_FLOOD = 4000
FLOOD_S = 2.0
PAUSE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A cluster's port; `keys` are for attacks with a valid key."""

    host: str
    port: int
    keys: Keys
    source: str = "127.0.0.66"
    seed: int = 0


def dial(target: Target, source: str = "") -> socket.socket | None:
    """Open a TCP connection; return None if it is refused."""
    raw = socket.socket()
    raw.settimeout(0.3)
    try:
        raw.bind((source or target.source, 0))
        raw.connect((target.host, target.port))
    except OSError:
        raw.close()
        return None
    return raw


def repeat(target: Target, end: float, say: Callable[[socket.socket], None]) -> int:
    """Connect, `say` something and hang up, as fast as possible."""
    count = 0
    while time.monotonic() < end:
        count += 1
        raw = dial(target)
        if raw is None:
            continue
        with raw:
            try:
                say(raw)
            except OSError:
                continue
    return count


def connect_flood(target: Target, end: float) -> int:
    """Connect and hang up."""
    return repeat(target, end, lambda raw: None)


def http(target: Target, end: float) -> int:
    """Send a request as a browser or a scanner does."""
    request = b"GET / HTTP/1.1\r\nHost: there\r\n\r\n" + b"x" * 100
    return repeat(target, end, lambda raw: listen_after(raw, request))


def noise(target: Target, end: float) -> int:
    """Send bytes of no protocol."""
    return repeat(target, end, lambda raw: listen_after(raw, os.urandom(2000)))


def handshake_flood(target: Target, end: float) -> int:
    """Send a correct greeting, then a HELLO without a valid key."""
    hello = b"\x04\xc8\x05HELLO\x01\0" + b"\0" * 72 + os.urandom(120)
    return repeat(target, end, lambda raw: listen_after(raw, GREETING + hello))


def oversize_frame(target: Target, end: float) -> int:
    """Announce a first frame of 1 GiB, and send as much of it as the other side takes."""
    content = b"\0" * 65536

    def say(raw: socket.socket) -> None:
        raw.sendall(GREETING + b"\x06" + (1 << 30).to_bytes(8, "big"))
        while time.monotonic() < end:
            raw.sendall(content)

    return repeat(target, end, say)


def listen_after(raw: socket.socket, content: bytes) -> None:
    """Send all content, and wait until the other side hangs up."""
    raw.sendall(content)
    while raw.recv(4096):
        pass


def hold_open(target: Target, end: float, drip: bytes, sources: list[str]) -> int:
    """Open as many connections as possible; send each a byte of `drip` from time to time."""
    count, held = 0, []
    while time.monotonic() < end:
        if len(held) < MAX_OPEN:
            count += 1
            raw = dial(target, sources[count % len(sources)])
            if raw is not None:
                raw.setblocking(False)
                held.append((raw, count))
        for raw, begun in held[-64:]:
            at = (count - begun) // 50
            if at < len(drip):
                try:
                    raw.send(drip[at : at + 1])
                except OSError:
                    continue
        time.sleep(0.001)
    for raw, _ in held:
        raw.close()
    return count


def silent_connections(target: Target, end: float) -> int:
    """Open connections that send nothing."""
    return hold_open(target, end, b"", [target.source])


def slow_loris(target: Target, end: float) -> int:
    """Send the greeting one byte at a time."""
    return hold_open(target, end, GREETING, [target.source])


def many_addresses(target: Target, end: float) -> int:
    """Open silent connections from two hundred addresses."""
    return hold_open(target, end, b"", [f"127.0.7.{k}" for k in range(1, 201)])


def descriptor_flood(target: Target, end: float) -> int:
    """Far more silent connections than a process may have files open, at once, and held."""
    end = max(end, time.monotonic() + FLOOD_S)
    held: list[socket.socket] = []
    try:
        while time.monotonic() < end and len(held) < MAX_FLOOD:
            raw = socket.socket()
            held.append(raw)
            raw.setblocking(False)
            raw.bind((f"127.0.8.{1 + len(held) % 200}", 0))
            raw.connect_ex((target.host, target.port))
            if len(held) % 50 == 0:
                time.sleep(0.002)
    except OSError:  # this process may have no more open itself
        pass
    time.sleep(max(0.0, end - time.monotonic()))
    for raw in held:
        raw.close()
    return len(held)


def _zmq_attack(
    target: Target, end: float, make: Callable[["zmq.Socket[bytes]"], None], kind: int = zmq.PUSH
) -> int:
    """Connect ZeroMQ's own client with the settings of `make`, again and again."""
    context, count = zmq.Context(), 0
    try:
        while time.monotonic() < end:
            outbox = context.socket(kind)
            outbox.setsockopt(zmq.LINGER, 0)
            outbox.setsockopt(zmq.RECONNECT_IVL, -1)
            make(outbox)
            outbox.connect(f"tcp://{target.source}:0;{target.host}:{target.port}")
            for _ in range(10):
                outbox.send_multipart([os.urandom(100)], zmq.NOBLOCK)
            time.sleep(PAUSE_S)
            outbox.close(linger=0)
            count += 1
    finally:
        context.destroy(linger=0)
    return count


def with_keys(outbox: "zmq.Socket[bytes]", server: bytes, public: bytes, secret: bytes) -> None:
    """Make a CURVE client with these keys."""
    outbox.setsockopt(zmq.CURVE_SERVERKEY, server)
    outbox.setsockopt(zmq.CURVE_PUBLICKEY, public)
    outbox.setsockopt(zmq.CURVE_SECRETKEY, secret)


def plaintext(target: Target, end: float) -> int:
    """Connect ZeroMQ without encryption."""
    return _zmq_attack(target, end, lambda outbox: None)


def wrong_token(target: Target, end: float) -> int:
    """Connect as a member of another cluster."""
    other = derive_keys(new_token())
    keys = (other.server_public, other.member_public, other.member_secret)
    return _zmq_attack(target, end, lambda outbox: with_keys(outbox, *keys))


def stolen_public_key(target: Target, end: float) -> int:
    """Connect with the server's public key but without the members' secret key."""
    other = derive_keys(new_token())
    keys = (target.keys.server_public, other.member_public, other.member_secret)
    return _zmq_attack(target, end, lambda outbox: with_keys(outbox, *keys))


def replay(target: Target, end: float) -> int:
    """Replay the recorded bytes of a member."""
    begun = time.monotonic()
    said = record_member(target)
    end += time.monotonic() - begun
    assert len(said) > 300, f"only {len(said)} bytes of a member were recorded"
    return repeat(target, end, lambda raw: listen_after(raw, said))


def record_member(target: Target) -> bytes:
    """Record what a member's client sends through a relay, up to its first message."""
    context, said = zmq.Context(), bytearray()
    keys = target.keys
    try:
        with socket.create_server(("127.0.0.1", 0)) as relay:
            outbox = context.socket(zmq.PUSH)
            outbox.setsockopt(zmq.LINGER, 0)
            with_keys(outbox, keys.server_public, keys.member_public, keys.member_secret)
            outbox.connect(f"tcp://127.0.0.1:{relay.getsockname()[1]}")
            outbox.send_multipart(cut(encode(Started(request=0, seq_no=666)), 1024))
            near, _ = relay.accept()
            far = socket.create_connection((target.host, target.port))
            near.settimeout(0.1)
            far.settimeout(0.1)
            stop = time.monotonic() + 0.6
            while time.monotonic() < stop:
                for source, sink in ((near, far), (far, near)):
                    try:
                        content = source.recv(65536)
                    except TimeoutError:
                        continue
                    sink.sendall(content)
                    if source is near:
                        said += content
            near.close()
            far.close()
    finally:
        context.destroy(linger=0)
    return bytes(said)


def fuzzed_frames(target: Target, end: float) -> int:
    """Send, with a valid key, messages with changed bits, frames and lengths."""
    chance = random.Random(target.seed)
    nodes = tuple(NodeId(k) for k in range(8))
    good = [
        [bytes(frame) for frame in cut(encode(message), 1024)]
        for message in (
            AddRequest(request=1, capacity=10, context=10),
            Reroot(request=1, position=1, parent=NodeId(1), token=1),
            Segment(request=1, seq_no=1, nodes=nodes, parents=nodes, tokens=(1,) * 8),
        )
    ]

    def mutate() -> list[bytes]:
        frames = [bytearray(frame) for frame in chance.choice(good)]
        for _ in range(chance.randint(1, 4)):
            frame = chance.choice(frames)
            match chance.randrange(5):
                case 0 if frame:
                    frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
                case 1:
                    frame += os.urandom(chance.randint(1, 300))
                case 2:
                    del frame[chance.randint(0, len(frame)) :]
                case 3:
                    frames.insert(chance.randint(0, len(frames)), bytearray(os.urandom(8)))
                case 4 if len(frames) > 1:
                    frames.remove(frame)
        return [bytes(frame) for frame in frames]

    return _behind_the_key(target, end, mutate, zmq.PUSH)


def fuzzed_requests(target: Target, end: float) -> int:
    """Send, with a valid key, requests for parts of files that do not exist."""
    chance = random.Random(target.seed)

    def make() -> list[bytes]:
        head = chance.choice([b"FC\x01\0", b"FC\x01\x01", b"GE", os.urandom(4)])
        length = chance.choice([0, 1, 262144, 2**32 - 1]).to_bytes(4, "little")
        content = head + os.urandom(32) + os.urandom(8) + length
        return [content] * chance.choice([1, 1, 1, 2]) if chance.random() < 0.8 else [b""]

    return _behind_the_key(target, end, make, zmq.DEALER)


def _behind_the_key(target: Target, end: float, make: Callable[[], list[bytes]], kind: int) -> int:
    context, count, keys = zmq.Context(), 0, target.keys
    try:
        outbox = context.socket(kind)
        outbox.setsockopt(zmq.SNDTIMEO, 100)
        with_keys(outbox, keys.server_public, keys.member_public, keys.member_secret)
        outbox.connect(f"tcp://{target.host}:{target.port}")
        while time.monotonic() < end:
            try:
                outbox.send_multipart(make())
                count += 1
            except zmq.Again:
                continue
            if kind == zmq.DEALER:
                while outbox.poll(0):
                    outbox.recv_multipart()
    finally:
        context.destroy(linger=0)
    return count


STRANGERS = {
    attack.__name__: attack
    for attack in (
        wrong_token,
        stolen_public_key,
        plaintext,
        replay,
        http,
        noise,
        connect_flood,
        handshake_flood,
        oversize_frame,
        silent_connections,
        slow_loris,
        many_addresses,
        descriptor_flood,
    )
}
MEMBERS = {"fuzzed_frames": fuzzed_frames, "fuzzed_requests": fuzzed_requests}
