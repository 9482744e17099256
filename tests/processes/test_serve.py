"""`serve` and `join` as commands over the loopback: an answer continues after a device's death."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flowspec.cluster.device.agent import DeviceAgent, JoinConfig, JoinRefusedError
from flowspec.cluster.device.stage_thread import LayerSource
from flowspec.engine.build import HeadParts
from flowspec.engine.reference import LocalTarget
from flowspec.engine.remote import RemoteEngine
from flowspec.engine.stream import Notice
from flowspec.request import FinishReason, Request, RequestOutput, SamplingParams, TokensOut
from flowspec.tokenizer import render_chat
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.load import load_whole
from tests.support.devices import CONTEXT, Processes

pytestmark = pytest.mark.slow

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Start a head and three devices: two serve, one is a spare."""
    processes = Processes(tmp_path_factory.mktemp("serve"), checkpoint, str(new_token()))
    try:
        processes.serve()
        for name in ("ada", "bob", "cyd"):
            processes.join(name)
        processes.wait_for("head", r"serving: layers")
        processes.wait_for("head", r"joined", count=3)
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def client(cluster: Processes) -> Iterator[RemoteEngine]:
    """Return a connection for several tests."""
    with RemoteEngine("127.0.0.1", cluster.port, derive_keys(cluster.token)) as one:
        yield one


def alone(parts: HeadParts, *, count: int, temperature: float) -> list[int]:
    """Return the target in this process."""
    prompt = render_chat(parts.tokenizer, [{"role": "user", "content": PROMPT}])
    request = Request(
        id=1,
        prompt=prompt,
        sampling=SamplingParams(temperature=temperature, seed=7),
        max_new_tokens=count,
        eos_token_ids=parts.eos_token_ids,
    )
    return LocalTarget(load_whole(parts.folder), parts.max_context).generate(request)[0]


def ask(
    client: RemoteEngine,
    *,
    count: int,
    temperature: float = 0.0,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> tuple[RequestOutput, list[str]]:
    """The answer and its notices; `on_tokens` hears how many tokens have come."""
    request = Request(
        prompt=[{"role": "user", "content": PROMPT}],
        sampling=SamplingParams(temperature=temperature, seed=7),
        max_new_tokens=count,
    )
    seen: list[int] = []
    notices = []
    for event in client.submit(request):
        match event:
            case TokensOut():
                seen.extend(event.tokens)
                on_tokens(len(seen))
            case Notice():
                notices.append(event.text)
            case RequestOutput():
                assert list(event.tokens) == seen
                return event, notices
    raise AssertionError("no end")


def test_the_head_says_how_to_ask_and_the_token_once(cluster):
    """The output explains the next step; only the join line shows the secret."""
    said, head = cluster.log("head"), f"127.0.0.1:{cluster.port}"
    for line in (
        f"once devices hold all 2 layers: flowspec chat {head}",
        f'for scripts: flowspec generate --head {head} "..."',
        f"devices and health: flowspec status {head}",
        "each with --token as above or, on this machine, FLOWSPEC_TOKEN",
    ):
        assert said.count(line) == 1
    assert said.count(cluster.token) == 1


def test_ps_tells_the_processes_apart(cluster):
    """The head and each device, by the name that it was given."""
    shown = {
        name: " ".join(filter(None, psutil.Process(process.pid).cmdline()))
        for name, process in cluster.running.items()
    }
    devices = {name: f"flowspec join {name}" for name in ("ada", "bob", "cyd")}
    assert shown == {"head": "flowspec head", **devices}


def test_joined_devices_answer_as_the_target_alone(cluster, client, parts):
    """They need no configuration: layers come over the network, by hash."""
    output, _ = ask(client, count=24, temperature=1.0)
    assert list(output.tokens) == alone(parts, count=24, temperature=1.0)
    assert (output.reason, output.stats.num_resumes) == (FinishReason.LENGTH, 0)
    for name in cluster.stages():
        assert "fetch 100%" in cluster.log(name)
    status = client.cluster_status()
    assert status.healthy, status.why
    assert status.max_context == CONTEXT
    assert [one.state for one in status.devices].count("serving") == 2
    assert [one.state for one in status.devices].count("spare") == 1


def test_a_prompt_beyond_the_context_is_told_how_to_raise_it(client):
    """`--context` of `serve` limits a request, and not only the placement."""
    turns = [{"role": "user", "content": "fox " * CONTEXT}]
    error = client.submit(Request(prompt=turns, max_new_tokens=4)).result(timeout_s=60.0).error
    assert f"the context holds {CONTEXT}; shorten the prompt, or raise --context" in error.cause
    assert error.rank is None


def test_a_killed_device_is_replaced_in_the_middle_of_an_answer(cluster, client, parts):
    """After SIGKILL, the spare takes the layers, and the text is the same."""
    victim = cluster.stages()[1]

    def kill(count: int) -> None:
        if count >= 10 and cluster.running[victim].is_alive():
            cluster.running[victim].kill()

    output, notices = ask(client, count=120, temperature=1.0, on_tokens=kill)
    assert list(output.tokens) == alone(parts, count=120, temperature=1.0)
    assert (output.error, output.stats.num_resumes) == (None, 1)
    assert any(f"on {victim}" in notice for notice in notices), notices
    assert victim not in cluster.stages()
    lost = [one for one in client.cluster_status().devices if one.state == "lost"]
    assert [one.name for one in lost] == [victim]


class NoLayers(LayerSource):
    """A source for a device that never gets layers."""


def test_a_wrong_token_is_said_on_both_sides(cluster):
    """The device ends with advice, and the head counts a stranger."""
    config = JoinConfig(
        host="127.0.0.1",
        port=cluster.port,
        name="stranger",
        version="0",
        listen_host="127.0.0.1",
    )

    def report() -> None:
        raise AssertionError("it is not let in")

    agent = DeviceAgent(config, derive_keys(new_token()), NoLayers(), report)
    with pytest.raises(JoinRefusedError, match="token is not this cluster's"):
        agent.run()
    cluster.wait_for("head", r"refused connections: wrong token")


def test_the_head_comes_back_and_devices_rejoin_without_transfer(cluster, client, parts):
    """SIGTERM lets the open answer end; devices wait for the head with their layers loaded."""
    loaded = {name: cluster.log(name).count("load 100%") for name in cluster.stages()}
    head = cluster.running["head"]
    told: list[int] = []

    def terminate(count: int) -> None:
        if not told:
            head.terminate()
            told.append(count)

    output, _ = ask(client, count=60, on_tokens=terminate)
    assert told[0] < 60
    assert output.error is None
    assert list(output.tokens) == alone(parts, count=60, temperature=0.0)
    head.join(timeout=20)
    assert head.exitcode == 0
    cluster.serve()
    cluster.wait_for("head", r"serving: layers", count=3)
    for name, count in loaded.items():
        assert cluster.log(name).count("load 100%") == count
    with RemoteEngine("127.0.0.1", cluster.port, derive_keys(cluster.token)) as again:
        output, _ = ask(again, count=12)
    assert list(output.tokens) == alone(parts, count=12, temperature=0.0)
