"""Weight transfer sends only missing files, completes them atomically, and stays in the cache."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from flowspec.request import ClusterError
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_stage_range, load_whole
from flowspec.weights.manifest import FileRecord, Manifest
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from flowspec.weights.transfer import cache as cache_module
from flowspec.weights.transfer.cache import ShardCache, cache_folder, shard_files
from flowspec.weights.transfer.shards import (
    FetchProgress,
    ShardServer,
    fetch_manifest,
    fetch_shards,
)
from tests.support import families

KEYS = derive_keys(new_token())
NUM_LAYERS = 4
ALL = range(1, NUM_LAYERS + 1)
SOON_S = 5.0


@dataclass
class Source:
    """A split model and the server that offers it."""

    whole: Path
    split: Path
    manifest: Manifest
    server: ShardServer


@pytest.fixture(scope="module", params=["llama3", "tied"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Source]:
    """Split the model into single layers."""
    folder = tmp_path_factory.mktemp("head")
    families.save(folder / "hf", request.param)
    plan = plan_split(open_checkpoint(folder / "hf"), layers=(1,) * NUM_LAYERS)
    manifest = run_split(plan, folder / "split", model_id="tiny")
    server = ShardServer(folder / "split", "tcp://127.0.0.1:0", KEYS)
    yield Source(folder / "hf", folder / "split", manifest, server)
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """Return an empty cache."""
    return ShardCache(tmp_path / "cache")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few kB come in many parts."""
    monkeypatch.setattr("flowspec.weights.transfer.download.CHUNK_BYTES", 1000)


def fetch(
    source: Source, cache: ShardCache, shards: range = ALL, timeout_s: float = SOON_S
) -> list[FetchProgress]:
    """Fetch the shards; return the progress reports."""
    said: list[FetchProgress] = []
    fetch_shards(
        source.server.address, KEYS, source.manifest, shards, cache, said.append, timeout_s
    )
    return said


def blob(cache: ShardCache, record: FileRecord) -> Path:
    """Return the path of a complete file."""
    return cache.root / "shards" / record.sha256


def largest(source: Source) -> FileRecord:
    """Return the largest file, which has the most places to cut."""
    return max(shard_files(source.manifest, ALL).values(), key=lambda record: record.bytes)


def test_manifest_comes_by_its_hash(source: Source) -> None:
    """The head sends the hash over the control channel; the shard server sends the rest."""
    address, sha256 = source.server.address, source.server.manifest_sha256
    assert fetch_manifest(address, KEYS, sha256, SOON_S) == source.manifest
    with pytest.raises(ClusterError, match="has no manifest 0000"):
        fetch_manifest(address, KEYS, "0" * 64, SOON_S)
    with pytest.raises(ClusterError, match="as the sha256 of its manifest"):
        fetch_manifest(address, KEYS, "../../etc/passwd", SOON_S)


@pytest.mark.usefixtures("small_parts")
def test_any_range_of_layers_loads_from_the_cache(source: Source, cache: ShardCache) -> None:
    """A new placement moves a boundary; a stage computes with the model's own weights."""
    fetch(source, cache)
    whole = load_whole(source.whole).state_dict()
    for first in range(NUM_LAYERS):
        for last in range(first + 1, NUM_LAYERS + 1):
            stage = load_stage_range(cache.folder(source.manifest), first, last)
            assert (stage.first_layer, stage.last_layer) == (first, last)
            for name, tensor in stage.state_dict().items():
                wanted = "model.embed_tokens.weight" if name not in whole else name
                assert torch.equal(tensor, whole[wanted])


def test_only_what_is_missing_travels(source: Source, cache: ShardCache) -> None:
    """Layers that were there before are neither requested nor written again."""
    fetch(source, cache, range(1, 3))
    first = fetch(source, cache, range(2, 4))[-1]
    sizes = {k: sum(r.bytes for r in shard_files(source.manifest, [k]).values()) for k in ALL}
    assert first.total_bytes == first.done_bytes == sizes[2] + sizes[3]
    assert first.cached_bytes == sizes[2]
    source_gone = replace_address(source)
    said = fetch(source_gone, cache, range(1, 4), timeout_s=0.5)  # nobody is asked
    assert said[-1].cached_bytes == said[-1].total_bytes


def replace_address(source: Source, address: str = "tcp://127.0.0.1:9") -> Source:
    """Return the same model at an address where nobody listens."""

    class Elsewhere:
        pass

    gone = Elsewhere()
    gone.address = address  # type: ignore[attr-defined]
    return replace(source, server=gone)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("cut", [1, 999, 1000, 0.5, -1, None])
def test_goes_on_after_a_cut_at_any_byte(
    source: Source, cache: ShardCache, cut: float | None
) -> None:
    """The received part is kept, and only the rest travels."""
    record = largest(source)
    size = record.bytes if cut is None else int(cut * record.bytes) if cut == 0.5 else int(cut)
    size %= record.bytes + 1
    content = (source.split / name_of(source, record)).read_bytes()[:size]
    (cache.root / "shards" / f"{record.sha256}.partial").write_bytes(content)
    said = fetch(source, cache)
    assert said[-1].cached_bytes == size
    assert said[-1].done_bytes == said[-1].total_bytes
    assert all(0 <= s.done_bytes <= s.total_bytes for s in said)
    assert cache.has(record, verify=True)
    assert not list((cache.root / "shards").glob("*.partial"))


def name_of(source: Source, record: FileRecord) -> str:
    """Return a file's name in the split."""
    return next(name for name, other in source.manifest.files.items() if other == record)


@pytest.mark.usefixtures("small_parts")
def test_a_cache_that_was_cleared_meanwhile_is_filled_again(
    source: Source, cache: ShardCache
) -> None:
    """Emptying ~/.cache while the device runs is no reason to fail."""
    fetch(source, cache)
    shutil.rmtree(cache.root)
    fetch(source, cache)
    assert all(
        cache.has(record, verify=True) for record in shard_files(source.manifest, ALL).values()
    )


def test_a_bad_rest_of_an_earlier_run_is_fetched_anew(source: Source, cache: ShardCache) -> None:
    """A power cut can leave zeros in place of bytes."""
    record = largest(source)
    (cache.root / "shards" / f"{record.sha256}.partial").write_bytes(b"\0" * 2000)
    fetch(source, cache)
    assert cache.has(record, verify=True)


def test_a_rotten_file_in_the_cache_is_fetched_anew(source: Source, cache: ShardCache) -> None:
    """Every file is compared by content before it is used again."""
    fetch(source, cache)
    record = largest(source)
    content = bytearray(blob(cache, record).read_bytes())
    content[100] ^= 1
    blob(cache, record).write_bytes(content)
    assert fetch(source, cache)[-1].cached_bytes < sum(
        r.bytes for r in shard_files(source.manifest, ALL).values()
    )
    assert cache.has(record, verify=True)


def test_a_wrong_file_on_the_head_is_refused(
    source: Source, cache: ShardCache, tmp_path: Path
) -> None:
    """There is one clear error; the wrong file is removed and all others stay."""
    shutil.copytree(source.split, tmp_path / "bad")
    record = largest(source)
    path = tmp_path / "bad" / name_of(source, record)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    server = ShardServer(tmp_path / "bad", "tcp://127.0.0.1:0", KEYS)
    try:
        with pytest.raises(ClusterError, match="head: sent a file of .* but its sha256 is not"):
            fetch(replace(source, server=server), cache)
        path.write_bytes(content[:-1])
        with pytest.raises(ClusterError, match=r"head: has a file of \d+ bytes, but \d+ in its"):
            fetch(replace(source, server=server), cache)
        path.unlink()
        server._files.clear()
        with pytest.raises(ClusterError, match="head: has no file"):
            fetch(replace(source, server=server), cache)
    finally:
        server.close()
    assert not blob(cache, record).exists()


@pytest.mark.usefixtures("small_parts")
def test_a_head_that_vanishes_and_comes_back(
    source: Source, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that returns in time is not noticed; else there is one error, and all parts stay."""
    server = ShardServer(source.split, "tcp://127.0.0.1:0", KEYS)
    there = replace(source, server=server)
    reads, real = [0], server._read

    def read_some(digest: bytes, offset: int, length: int) -> tuple[bytes, int] | None:
        reads[0] += 1
        if reads[0] == 20:
            server._closing.set()  # and no answer any more
        return real(digest, offset, length)

    server._server._read = read_some
    with pytest.raises(ClusterError, match=r"head: sent no weights for 1 s \(\d+ of \d+ bytes"):
        fetch(there, cache, timeout_s=1.0)
    server.close()
    kept = sum(p.stat().st_size for p in (cache.root / "shards").iterdir())
    assert kept > 10_000
    again: list[ShardServer] = []

    def come_back() -> None:
        time.sleep(0.4)
        again.append(ShardServer(source.split, server.address, KEYS))

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        said = fetch(there, cache)
    finally:
        thread.join()
        again[0].close()
    assert said[-1].cached_bytes == kept
    assert said[-1].done_bytes == said[-1].total_bytes


def test_a_full_disk_is_told_before_and_meanwhile(
    source: Source, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has both numbers before any request; later, written parts stay."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "RESERVE_BYTES", 1 << 60)
        with pytest.raises(ClusterError, match=r"this device: too little disk.*needed.*free"):
            fetch(source, cache)
    real, budget = os.write, [20_000]

    def write(handle: int, content: memoryview) -> int:
        if budget[0] <= 0:
            raise OSError(28, "No space left on device")
        content = content[: budget[0]]
        budget[0] -= len(content)
        return real(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(ClusterError, match="this device: the disk is full"):
            fetch(source, cache)
    assert fetch(source, cache)[-1].cached_bytes == 20_000


def test_several_devices_at_once_and_two_on_one_cache(source: Source, tmp_path: Path) -> None:
    """Each device gets everything; two processes with one cache share the work and the files."""
    caches = [ShardCache(tmp_path / name) for name in ("a", "b", "c", "c")]
    errors: list[BaseException] = []

    def work(cache: ShardCache) -> None:
        try:
            fetch(source, cache)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not errors
    for cache in caches:
        assert all(cache.has(r, verify=True) for r in shard_files(source.manifest, ALL).values())


@pytest.mark.parametrize("local", ["split", "whole"])
def test_who_has_the_model_fetches_nothing(source: Source, cache: ShardCache, local: str) -> None:
    """It uses a split with the same hashes, or cuts the model itself; no head is needed."""
    left = cache.adopt(getattr(source, local), source.manifest, ALL)
    assert left == []
    said = fetch(replace_address(source), cache, timeout_s=0.5)
    assert said[-1].cached_bytes == said[-1].total_bytes
    load_stage_range(cache.folder(source.manifest), 0, NUM_LAYERS)


def test_another_model_is_not_taken_for_this_one(
    source: Source, cache: ShardCache, tmp_path: Path
) -> None:
    """A model of the same shape with other weights is detected by content and left alone."""
    record = largest(source)
    shutil.copytree(source.split, tmp_path / "near")
    path = tmp_path / "near" / name_of(source, record)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.adopt(tmp_path / "near", source.manifest, ALL) == [name_of(source, record)]


@pytest.mark.parametrize(
    "sha256", ["../../evil", "/etc/passwd", "a" * 63 + "/", "A" * 64, "", "a" * 65]
)
def test_no_manifest_leads_out_of_the_cache(
    source: Source, cache: ShardCache, tmp_path: Path, sha256: str
) -> None:
    """This holds even for one that passed its own checks: file names are hashes."""
    files = {name: replace(r, sha256=sha256) for name, r in source.manifest.files.items()}
    before = sorted(tmp_path.rglob("*"))
    for bad in (
        replace(source.manifest, files=files),
        replace(source.manifest, model_hash=sha256),
    ):
        with pytest.raises((ValueError, ClusterError)):
            fetch(replace(source, manifest=bad), cache, timeout_s=1.0)
    new = set(tmp_path.rglob("*")) - set(before)
    assert all(cache.root in path.parents for path in new)


def test_a_link_in_place_of_a_partial_file_is_not_followed(
    source: Source, cache: ShardCache, tmp_path: Path
) -> None:
    """A user who can write into the cache cannot make this process write elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (cache.root / "shards" / f"{largest(source).sha256}.partial").symlink_to(victim)
    with pytest.raises(ClusterError, match="this device: cannot write"):
        fetch(source, cache)
    assert victim.read_text() == "precious"


def test_a_wrong_token_gets_nothing(source: Source, cache: ShardCache) -> None:
    """It gets no byte, and it is counted."""
    other = derive_keys(new_token())
    with pytest.raises(ClusterError, match="sent no weights"):
        fetch_shards(source.server.address, other, source.manifest, ALL, cache, timeout_s=0.6)
    assert sum(p.stat().st_size for p in (cache.root / "shards").iterdir()) == 0
    assert sum(source.server.refusals().values()) > 0


def test_the_caller_can_end_it(source: Source, cache: ShardCache) -> None:
    """An exception from `on_progress` ends it at once and leaves no thread."""

    class EndedError(Exception):
        pass

    def stop(progress: FetchProgress) -> None:
        raise EndedError

    before = threading.active_count()
    with pytest.raises(EndedError):
        fetch_shards(source.server.address, KEYS, source.manifest, ALL, cache, stop, SOON_S)
    assert threading.active_count() == before


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative path is ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flowspec"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "flowspec"


def test_an_address_in_use_is_told(source: Source) -> None:
    """The error names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot listen at {address}: Address already"):
            ShardServer(source.split, address, KEYS)
