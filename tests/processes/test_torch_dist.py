"""Head and stages over torch.distributed gloo, started by flowspec or by torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flowspec.config import EngineConfig, override
from flowspec.engine.build import HeadParts
from flowspec.engine.engine import generate
from flowspec.engine.launch import Launch, find_launch
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.engine.torchrun import fit_to_launch, own_device
from flowspec.request import Decoding, Request, SamplingParams
from flowspec.speculation.strategies import STRATEGIES
from flowspec.weights.load import load_whole
from tests.processes.conftest import stage_pids
from tests.processes.test_failures import output_of_failure
from tests.processes.test_local_cluster import check_rest

pytestmark = pytest.mark.slow

TORCHRUN_S = 60.0


@pytest.fixture(scope="module")
def gloo(config: EngineConfig) -> EngineConfig:
    """A run over gloo."""
    return config.changed(transport="gloo")


def ask(
    parts: HeadParts, count: int, *, temperature: float = 0.0, strategy: str = "streaming"
) -> Request:
    """Return a request for `count` tokens."""
    return Request(
        prompt=tuple(parts.tokenizer.encode("the lazy dog")),
        sampling=SamplingParams(temperature=temperature, seed=5),
        max_new_tokens=count,
        decoding=Decoding(strategy=strategy),
    )


def test_text_is_the_targets_own_also_after_idle_time(gloo, parts, all_gone):
    """Every strategy runs; in between, nothing is sent or computed."""
    alone = LocalTarget(load_whole(parts.folder), parts.max_context)
    with LocalEngine(gloo, parts) as cluster:
        for number, name in enumerate(STRATEGIES):
            request = ask(parts, 12, temperature=number % 2, strategy=name)
            assert list(generate(cluster, request).tokens) == alone.generate(request)[0], name
        pids = stage_pids(cluster)
        check_rest(cluster)
        request = ask(parts, 12)
        assert list(generate(cluster, request).tokens) == alone.generate(request)[0]
    all_gone(pids)


@pytest.mark.parametrize(
    ("number", "victim", "cause"),
    [(signal.SIGKILL, 1, "ended by signal SIGKILL"), (signal.SIGSTOP, 2, "it hangs")],
)
def test_a_lost_stage_is_named_in_time(gloo, parts, all_gone, number, victim, cause):
    """Killed: the broken connection says so at once. Stopped: its silence, within the timeout."""
    with LocalEngine(gloo.changed(timeout_s=1.0), parts) as cluster:
        pids = stage_pids(cluster)
        output, took_s = output_of_failure(
            cluster, ask(parts, 12_000), lambda: os.kill(pids[victim - 1], number)
        )
        assert took_s < 8.0  # its own drafts count as progress, and this machine may be busy
    assert str(output.error).startswith(f"stage {victim}: process {pids[victim - 1]} ")
    assert cause in output.error.cause
    all_gone(pids)


def test_a_stage_lost_while_idle_is_told_to_the_next_request(gloo, parts, all_gone):
    """The head sleeps until then, though the connection has broken."""
    with LocalEngine(gloo, parts) as cluster:
        pids = stage_pids(cluster)
        generate(cluster, ask(parts, 4))
        os.kill(pids[1], signal.SIGKILL)
        cluster.children[2].wait(timeout=5.0)
        check_rest(cluster)
        error = cluster.submit(ask(parts, 4)).result(timeout_s=20.0).error
    assert error.rank == 2
    assert "SIGKILL" in error.cause
    all_gone(pids)


# torchrun ---------------------------------------------------------------------------------------


def torchrun(config: EngineConfig, folder: Path, *options: str) -> subprocess.Popen[str]:
    """`torchrun --nproc_per_node 3 -m flowspec run --transport gloo`, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command += ["-m", "flowspec", "run", "--transport", "gloo"]
    command += ["--model", config.model, "--draft", config.draft]
    errors = (folder / "errors").open("w")
    with errors:
        return subprocess.Popen(
            [*command, *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def killed(config: EngineConfig, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A long run under torchrun; whatever is left of it at the end is killed."""
    run = torchrun(config, tmp_path, "--strategy", "ar", "--max-new-tokens", "12000")
    children = []
    try:
        assert run.stdout is not None
        assert run.stdout.read(1), (tmp_path / "errors").read_text()
        children = psutil.Process(run.pid).children(recursive=True)
        yield run, tmp_path / "errors"
    finally:
        run.kill()
        run.wait(timeout=5)
        for child in children:
            if child.is_running():
                child.kill()


def test_torchrun_starts_head_and_stages(config, tmp_path):
    """Every process runs the same command, one of them prints, and the text is exact."""
    run = torchrun(config, tmp_path, "--max-new-tokens", "12")
    out, _ = run.communicate(timeout=TORCHRUN_S)
    errors = (tmp_path / "errors").read_text()
    assert run.returncode == 0, errors
    assert out.count("identical to the target alone: yes") == 1
    assert errors.count("starting") == errors.count("for trusted networks only") == 1
    assert "head + 2 stages" in errors


def test_under_torchrun_a_killed_stage_ends_all_in_time(killed, all_gone):
    """The head names it; nobody waits for torchrun's own timeouts."""
    run, errors = killed
    ranks = {}
    for child in psutil.Process(run.pid).children():
        ranks[child.environ()["RANK"]] = child.pid
    os.kill(ranks["2"], signal.SIGKILL)
    start = time.monotonic()
    assert run.stdout is not None
    run.stdout.read()
    assert run.wait(timeout=TORCHRUN_S) != 0
    assert time.monotonic() - start < TORCHRUN_S / 2
    assert "stage 2: connection lost" in errors.read_text()
    all_gone(ranks.values())


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "5"}


def test_the_place_under_torchrun_is_read_from_its_environment():
    """Variables of the same names have no meaning without torchrun."""
    assert find_launch(TORCHRUN) == Launch(rank=3, local_rank=1, num_stages=4)
    assert find_launch({"RANK": "3", "WORLD_SIZE": "5"}) is None
    config = EngineConfig(transport="nccl", device="cuda")
    assert own_device(config, Launch(3, 1, 4)) == "cuda:1"


@pytest.mark.parametrize(
    ("size", "values", "message"),
    [
        (5, {"transport": "zmq"}, "add --transport gloo"),
        (5, {"stages": 2}, "4 stages, not 2; leave the number of stages out or start 3 processes"),
        (5, {"layers": "3+3+2"}, "4 stages, not 3"),
        (1, {}, "nproc_per_node 2"),
    ],
)
def test_what_contradicts_torchrun_is_said(size, values, message):
    """Before anything is split or loaded."""
    config = override(EngineConfig(transport="gloo"), values, where="test")
    with pytest.raises(ValueError, match=message):
        fit_to_launch(config, Launch(0, 0, size - 1))


def test_torchrun_decides_the_number_of_stages():
    """This holds even if the layers are given, as long as their number fits."""
    for values in ({}, {"stages": 4}, {"layers": "2+2+2+2"}):
        config = override(EngineConfig(transport="gloo"), values, where="test")
        assert fit_to_launch(config, Launch(0, 0, 4)).stages == 4
