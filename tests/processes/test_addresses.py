"""`serve` and `join` without IPv4, and beside Docker's bridge, as commands in namespaces."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowspec.engine.build import HeadParts
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request
from flowspec.tokenizer import render_chat
from flowspec.weights.load import load_whole
from tests.stress.netns_cluster import missing

ROOT = Path(__file__).resolve().parents[2]


PROMPT = "the quick brown fox"
no_namespaces = missing() or (
    "" if Path("/proc/net/if_inet6").exists() else "this kernel has no IPv6"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(no_namespaces), reason=no_namespaces or "they can be made"),
]


@pytest.fixture(scope="module")
def told(checkpoint: Path) -> dict[str, Any]:
    """Return the output of the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.netns_addresses", str(ROOT), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_cluster_without_ipv4_answers(told: dict[str, Any], parts: HeadParts) -> None:
    """One device came by mDNS, one by a link-local address, the client by a name."""
    ipv6 = told["ipv6"]
    assert ipv6["line"].startswith("flowspec join '[fd00:f1::1]:7000' --token ")
    assert "the address is that of lan0" in ipv6["log"]
    code, said = ipv6["generate"]
    assert code == 0, said
    prompt = render_chat(parts.tokenizer, [{"role": "user", "content": PROMPT}])
    request = Request(id=1, prompt=prompt, max_new_tokens=12, eos_token_ids=parts.eos_token_ids)
    tokens = LocalTarget(load_whole(parts.folder), parts.max_context).generate(request)[0]
    assert parts.tokenizer.decode(tokens, skip_special_tokens=True) in said
    code, said = ipv6["status"]
    status = json.loads(said)
    assert (code, status["healthy"]) == (0, True)
    assert {one["name"]: one["state"] for one in status["devices"]} == {
        "ada": "serving",
        "bob": "serving",
    }


def test_the_doctor_knows_a_network_without_ipv4(told: dict[str, Any]) -> None:
    """It does not ask for a cable, and finds the head and this device's address on the route."""
    for (code, findings), own in zip(
        told["ipv6"]["doctors"], ("fd00:f1::2", "fe80::3%wlan0"), strict=True
    ):
        by_name = {one["what"]: one for one in findings}
        assert code == 0
        assert by_name["network"]["level"] == "ok"
        assert own in by_name["network"]["found"]
        assert by_name["head"]["found"].endswith(f"this device listens at {own}")
        assert "link" in by_name


def test_what_cannot_be_reached_is_told_by_its_address(told: dict[str, Any]) -> None:
    """One interface does not exist, and one port is closed."""
    code, said = told["ipv6"]["no_such_interface"]
    assert code == 3
    assert "no interface eth7" in said
    code, said = told["ipv6"]["closed"]
    assert code == 3
    assert "fd00:f1::1 refuses port 7009" in said


def test_the_line_to_paste_has_the_address_of_the_default_route(told: dict[str, Any]) -> None:
    """Docker's bridge has the lower index; other addresses come with their interface."""
    log = told["docker"]["log"]
    assert "flowspec join 10.9.0.5:7000 --token" in log
    assert "the address is that of eth0" in log
    assert (
        "by another of this machine's addresses: [fd00:9::5]:7000 (eth0), 100.64.0.7:7000 "
        "(tailscale0), 172.17.0.1:7000 (docker0), 172.18.0.1:7000 (br-0a1b2c3d4e5f)"
    ) in log


def test_serve_is_there_by_both_families(told: dict[str, Any]) -> None:
    """`serve` without --host listens at every address."""
    for said in told["docker"]["status"]:
        assert "waiting for devices to join" in said
