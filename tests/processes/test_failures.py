"""A killed, stopped or broken stage gives an error that names it soon, and no process is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import zmq

from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.request import ClusterError, FinishReason, Request, RequestOutput, TokensOut
from flowspec.runtime import watchdog
from flowspec.transport.zmq import DATA_LANE, local_addresses
from flowspec.weights.load import load_whole
from flowspec.weights.manifest import read_manifest
from tests.processes.conftest import GONE_WITHIN_S, stage_pids

pytestmark = pytest.mark.slow


@pytest.fixture
def endless(parts: HeadParts) -> Request:
    """Return a request that lasts long enough for a fault."""
    return Request(id=1, prompt=tuple(parts.tokenizer.encode("the fox")), max_new_tokens=12_000)


@pytest.fixture
def single(
    config: EngineConfig, parts: HeadParts, whole_split: Path
) -> tuple[EngineConfig, HeadParts]:
    """A cluster of one stage, where a second process would only cost time."""
    whole = replace(parts, folder=whole_split, manifest=read_manifest(whole_split))
    return config.changed(model=str(whole_split), stages=1, strategy="ar"), whole


def output_of_failure(
    cluster: LocalEngine, request: Request, act: Callable[[], object], *, after: int = 5
) -> tuple[RequestOutput, float]:
    """Stream, call `act` after some tokens; return the output with its error, and the delay.

    The output has the tokens that were streamed, and no others.
    """
    seen: list[int] = []
    acted_at = 0.0
    for event in cluster.submit(request):
        if isinstance(event, TokensOut):
            seen.extend(event.tokens)
        if len(seen) >= after and not acted_at:
            act()
            acted_at = time.monotonic()
        if isinstance(event, RequestOutput):
            break
    took_s = time.monotonic() - acted_at
    assert event.reason is FinishReason.ERROR
    assert event.error is not None
    assert list(event.tokens) == seen
    return event, took_s


def test_a_killed_stage_is_named_and_the_tokens_are_kept(config, parts, endless, all_gone):
    """What was accepted is the user's; the rest of the cluster must not linger."""
    with LocalEngine(config.changed(strategy="ar"), parts) as cluster:
        pids = stage_pids(cluster)
        output, took_s = output_of_failure(
            cluster, endless, lambda: os.kill(pids[1], signal.SIGKILL)
        )
    assert took_s < 5.0
    assert output.error.rank == 2
    assert str(output.error).startswith(f"stage 2: process {pids[1]} ended by signal SIGKILL")
    alone = LocalTarget(load_whole(parts.folder), parts.max_context)
    few = replace(endless, max_new_tokens=len(output.tokens))
    assert list(output.tokens) == alone.generate(few)[0]
    all_gone(pids)


def test_a_stopped_stage_is_named_soon_and_given_up_after_the_timeout(
    config, parts, endless, all_gone, monkeypatch, caplog
):
    """A hanging process sends nothing and closes no socket; the others still answer."""
    monkeypatch.setattr(watchdog, "ASK_S", 0.2)
    monkeypatch.setattr(watchdog, "WARN_S", 0.4)
    with LocalEngine(config.changed(timeout_s=1.0), parts) as cluster:
        pids = stage_pids(cluster)
        output, took_s = output_of_failure(
            cluster, endless, lambda: os.kill(pids[-1], signal.SIGSTOP)
        )
        assert took_s < 8.0  # its own drafts count as progress, and this machine may be busy
    assert output.error.rank == len(pids)
    cause = f"process {pids[-1]} gave no answer for 0.5 s: it hangs"
    assert str(output.error) == f"stage {len(pids)}: {cause}"
    (warning,) = caplog.records
    where = f"stage {len(pids)} (process {pids[-1]})"
    assert warning.getMessage() == f"no answer from {where} for 0 s; giving up after 1 s"
    all_gone(pids)


def test_garbage_in_a_stages_socket_is_refused_by_name(single, endless, all_gone):
    """Bytes that are no message must not be guessed at, and must not hang anybody."""
    with LocalEngine(*single) as cluster:
        pids = stage_pids(cluster)
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.connect(local_addresses(cluster.folder, 1)[1][DATA_LANE])
        output, took_s = output_of_failure(
            cluster,
            endless,
            lambda: socket.send_multipart([b"\x80\x04 no message of this protocol", b"", b""]),
        )
        context.destroy(linger=0)
    assert took_s < 5.0
    assert output.error.rank == 1
    assert "not a FlowSpec frame" in output.error.cause
    all_gone(pids)


def test_a_stage_with_a_damaged_file_says_so(config, parts, tmp_path, all_gone):
    """The error comes before any request, and names the stage, the file and the damage."""
    folder = tmp_path / "split"
    shutil.copytree(parts.folder, folder)
    weights = folder / "stage_2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0xFF
    weights.write_bytes(content)
    cluster = LocalEngine(config.changed(model=str(folder)), replace(parts, folder=folder))
    with pytest.raises(ClusterError, match=r"stage 2\b.*stage_2/model.safetensors.*corrupt"):
        cluster.__enter__()
    all_gone(stage_pids(cluster))
    assert not Path(cluster.folder).exists()


def test_a_stage_without_its_file_says_so(single, tmp_path, all_gone):
    """An interrupted copy must not look like a hang."""
    folder = tmp_path / "split"
    config, parts = single
    shutil.copytree(parts.folder, folder)
    (folder / "stage_1" / "model.safetensors").unlink()
    cluster = LocalEngine(config.changed(model=str(folder)), replace(parts, folder=folder))
    with pytest.raises(ClusterError, match=r"stage 1\b.*stage_1/model.safetensors is missing"):
        cluster.__enter__()
    all_gone(stage_pids(cluster))


class TellsOther(LocalEngine):
    """Its stage 2 is told to compute in another dtype than the head was."""

    def _write_config(self, rank: int) -> Path:
        file = super()._write_config(rank)
        if rank == 2:
            file.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
        return file


def test_a_stage_that_computes_otherwise_is_refused(config, parts, all_gone):
    """Before any request, by the name of the setting, with what is needed and what was found."""
    cluster = TellsOther(config, parts)
    with pytest.raises(
        ClusterError, match=r"stage 2: it computes .*dtype is 'bfloat16', needed 'float32'$"
    ):
        cluster.__enter__()
    all_gone(stage_pids(cluster))


# `flowspec run` ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Running:
    """A `flowspec run` in the middle of an answer, and its stages."""

    process: subprocess.Popen[bytes]
    stages: list[int]
    errors: Path  # what it said on stderr


@pytest.fixture(scope="module")
def runs(
    config: EngineConfig, whole_split: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[signal.Signals, Running]]:
    """Start one run per signal, all together, because starting is slow."""
    folder = tmp_path_factory.mktemp("runs")
    models = {
        signal.SIGKILL: str(whole_split),
        signal.SIGTERM: config.model,
        signal.SIGINT: str(whole_split),
        signal.SIGHUP: str(whole_split),
    }
    command = [sys.executable, "-m", "flowspec", "run", "--draft", config.draft]
    command += ["--strategy", "ar", "--max-new-tokens", "12000"]
    processes = {
        number: subprocess.Popen(
            [*command, "--model", model],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{number.name}.err").open("wb"),
            start_new_session=True,
        )
        for number, model in models.items()
    }
    try:
        yield {
            number: in_the_middle(process, folder / f"{number.name}.err")
            for number, process in processes.items()
        }
    finally:
        for process in processes.values():
            process.kill()  # its stages notice
            process.wait(timeout=5)


def in_the_middle(process: subprocess.Popen[bytes], errors: Path) -> Running:
    """Wait for the answer's first byte."""
    assert process.stdout is not None
    assert process.stdout.read(1), f"ended early with exit code {process.wait()}"
    stages = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert stages
    return Running(process, stages, errors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ending_the_head_ends_every_process(runs, all_gone, number):
    """No stage outlives its head after a request to stop, Ctrl-C, a closed terminal or SIGKILL."""
    run = runs[number]
    run.process.send_signal(number)
    all_gone(run.stages)
    assert run.process.wait(timeout=GONE_WITHIN_S) != 0
    if number != signal.SIGKILL:  # who is killed cannot say so
        assert f"error: ended by {number.name}" in run.errors.read_text()
