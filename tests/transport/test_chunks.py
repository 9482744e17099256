"""Parts of files by hash: limits on clients, and when one must wait."""

import hashlib
import json
import threading

import pytest

from flowspec.request import ClusterError
from flowspec.transport.chunks import TOO_MANY, ChunkServer
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.transfer.shards import fetch_manifest

KEYS = derive_keys(new_token())
SOON_S = 20.0
MANIFEST = json.dumps({"no": "manifest"}).encode()
SHA256 = hashlib.sha256(MANIFEST).hexdigest()


def read(digest: bytes, offset: int, length: int) -> tuple[bytes, int] | None:
    """Return the only file."""
    return (MANIFEST[offset : offset + length], len(MANIFEST)) if digest.hex() == SHA256 else None


def test_one_asker_too_many_waits_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until another has asked for nothing for a while, since leaving is not reported."""
    monkeypatch.setattr("flowspec.transport.chunks.MAX_PEERS", 1)
    monkeypatch.setattr("flowspec.transport.chunks.IDLE_S", 0.5)
    monkeypatch.setattr("flowspec.weights.transfer.shards.BUSY_WAIT_S", 0.1)
    server, over = ChunkServer("tcp://127.0.0.1:0", KEYS, read), threading.Event()

    def serve() -> None:
        while not over.is_set():
            server.serve(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(2):  # each over a connection of its own; all of it came, and was no manifest
            with pytest.raises(ClusterError, match="an invalid manifest"):
                fetch_manifest(server.address, KEYS, SHA256, SOON_S)
    finally:
        over.set()
        thread.join(SOON_S)
        server.close()
    assert server.dropped.counts()[TOO_MANY] > 0
