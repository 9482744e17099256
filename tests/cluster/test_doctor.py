"""The doctor's rules find problems, their severity and their fixes from facts alone."""

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import flowspec
from flowspec.cluster.device.report import why_not_computed
from flowspec.cluster.doctor import (
    CheckResult,
    Facts,
    Level,
    LinkFacts,
    can_join,
    examine,
    examine_link,
    examine_token,
    find_facts,
    verdict,
)
from flowspec.protocol.control import DeviceReport, Interface, Link
from flowspec.weights.transfer.cache import CacheProblem, ShardCache, find_problem

REPORT = DeviceReport(
    hostname="orin",
    kind="NVIDIA Jetson Orin Nano Developer Kit",
    torch_device="cuda",
    memory_available_bytes=5 * 10**9,
    memory_total_bytes=8 * 10**9,
    unified_memory=True,
    disk_free_bytes=50 * 10**9,
    power_mode="MAXN_SUPER",
    bandwidth_bytes_per_s=80e9,
    flops=4e12,
    interfaces=(Interface(name="eth0", address="192.168.1.11", rate_mbps=1000),),
    python="3.10.12",
    torch="2.5.0a0+nv24.08",
)
UNUSABLE = CacheProblem(found="writing fails", fix="give another folder")
FULL = CacheProblem(found="the disk is full", fix="free some", is_fatal=False)
GOOD = Facts(python=(3, 10), report=REPORT, is_jetson=True, l4t="R36.4.3", cuda_available=True)
LINK = Link(latency_s=0.0003, up_bytes_per_s=1.1e8, down_bytes_per_s=1.1e8)


def found(facts: Facts, what: str) -> CheckResult:
    """Return the result of a check, the worst if there are several."""
    findings = [one for one in examine(facts) if one.what == what]
    assert findings, f"nothing about {what}"
    return max(findings, key=lambda one: list(Level).index(one.level))


def with_report(**changes: object) -> Facts:
    """Return a good board with one change."""
    return replace(GOOD, report=REPORT.model_copy(update=changes))


def test_a_good_board_can_join():
    """No check asks for anything."""
    findings = list(examine(GOOD))
    assert can_join(findings)
    assert {one.level for one in findings} == {Level.OK}
    assert not [one for one in findings if one.fix]


@pytest.mark.parametrize(
    ("facts", "what", "level", "fix"),
    [
        (replace(GOOD, python=(3, 8)), "Python", Level.ERROR, "JetPack 6 or 7"),
        (replace(GOOD, missing=("pyzmq",)), "pyzmq", Level.ERROR, "requirements_jetson.txt"),
        (replace(GOOD, has_curve=False), "encryption", Level.ERROR, "pyzmq"),
        (replace(GOOD, cuda_available=False), "torch", Level.WARNING, "NVIDIA's build"),
        (
            replace(GOOD, cuda_error="NvMapMemAllocInternalTagged: 1075072515 error 12"),
            "CUDA",
            Level.ERROR,
            "expandable_segments",
        ),
        (
            replace(GOOD, cuda_error="CUDA error: no kernel image is available"),
            "CUDA",
            Level.ERROR,
            "another GPU",
        ),
        (
            replace(GOOD, cuda_error="NVML_SUCCESS == r ASSERT"),
            "CUDA",
            Level.ERROR,
            "NVML",
        ),
        (with_report(memory_available_bytes=10**8), "memory", Level.ERROR, "0.5 GB"),
        (with_report(disk_free_bytes=10**8), "disk", Level.WARNING, "XDG_CACHE_HOME"),
        (replace(GOOD, cache_problem=UNUSABLE), "cache", Level.ERROR, "another folder"),
        (replace(GOOD, cache_problem=FULL), "cache", Level.WARNING, "free some"),
        (with_report(power_mode="15W"), "power mode", Level.WARNING, "nvpmodel -m"),
        (with_report(interfaces=()), "network", Level.WARNING, "cable or Wi-Fi"),
        (
            with_report(interfaces=(Interface(name="eth0", address="10.0.0.2", rate_mbps=100),)),
            "network",
            Level.WARNING,
            "100 Mbit/s",
        ),
        (
            with_report(interfaces=(Interface(name="eth0", address="fe80::2%eth0"),)),
            "network",
            Level.WARNING,
            "'[fe80::1%eth0]:7000'",
        ),
        (replace(GOOD, l4t="R36.4.7"), "CUDA allocator", Level.WARNING, "expandable_segments"),
        (replace(GOOD, l4t="R39.2.1"), "CUDA allocator", Level.WARNING, "expandable_segments"),
        (replace(GOOD, has_desktop=True), "desktop", Level.WARNING, "multi-user"),
        (replace(GOOD, num_swap_bytes=4 * 10**9), "swap", Level.WARNING, "nvzramconfig"),
        (replace(GOOD, has_bitsandbytes=True), "bitsandbytes", Level.WARNING, "uninstall"),
    ],
)
def test_each_trap_has_its_fix(facts, what, level, fix):
    """Errors prevent joining, warnings do not."""
    finding = found(facts, what)
    assert finding.level is level
    assert fix in finding.fix
    assert can_join(list(examine(facts))) is (level is not Level.ERROR)


def test_the_allocator_is_no_trap_before_its_time_or_once_set():
    """It is known from one release on, and one variable cures it."""
    names = [one.what for one in examine(GOOD)]
    cured = replace(GOOD, l4t="R36.4.7", allocator="expandable_segments:True")
    assert "CUDA allocator" not in [*names, *(one.what for one in examine(cured))]


def test_jetson_traps_are_not_looked_for_elsewhere():
    """A PC may have a desktop and swap."""
    pc = replace(GOOD, is_jetson=False, has_desktop=True, num_swap_bytes=10**9)
    assert {one.what for one in examine(pc)}.isdisjoint({"desktop", "swap", "Jetson Linux"})


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (LinkFacts(where="h", why_unreachable="h refuses port 7"), Level.ERROR, "refuses port 7"),
        (LinkFacts(where="h", link=LINK, version="0.0.1"), Level.ERROR, "0.0.1"),
        (
            LinkFacts(where="h", link=LINK, own_address="127.0.0.1"),
            Level.WARNING,
            "cannot reach it at 127.0.0.1",
        ),
        (
            LinkFacts(where="h", link=LINK, own_address="::1"),
            Level.WARNING,
            "cannot reach it at ::1",
        ),
        (
            LinkFacts(where="h", link=LINK, dtype="bfloat16", dtype_error="not implemented"),
            Level.ERROR,
            "computes in bfloat16, this device cannot: not implemented",
        ),
        (LinkFacts(where="h"), Level.WARNING, "could not be measured"),
        (
            LinkFacts(where="h", link=LINK.model_copy(update={"up_bytes_per_s": 2e6})),
            Level.WARNING,
            "2 MB/s to the head",
        ),
        (
            LinkFacts(where="h", link=LINK, version=flowspec.__version__, own_address="10.0.0.2"),
            Level.OK,
            "0.30 ms one way, 110 MB/s to the head",
        ),
    ],
)
def test_the_way_to_the_head(facts, level, words):
    """The head is unreachable, of another version, slow, or fine."""
    findings = list(examine_link(facts))
    worst = max(findings, key=lambda one: list(Level).index(one.level))
    assert worst.level is level
    assert any(words in one.found for one in findings)
    assert all(one.fix for one in findings if one.level is not Level.OK)


def test_without_a_token_the_way_to_the_head_is_not_said_to_work():
    """The result says what was not checked and what to do."""
    none, wrong = examine_token(""), examine_token("the token has a typing mistake; copy it")
    device = list(examine(GOOD))
    for finding, level, fix in (
        (none, Level.WARNING, "FLOWSPEC_TOKEN"),
        (wrong, Level.ERROR, "typing mistake"),
    ):
        assert finding.level is level
        assert "was not checked" in finding.found
        assert fix in finding.fix
    assert verdict([*device, none]) == verdict(device)
    assert "the link to a head was not checked" in verdict(device)
    assert verdict([*device, wrong]) == "joining would not work"
    facts = LinkFacts(where="h", link=LINK, version=flowspec.__version__, own_address="10.0.0.2")
    assert verdict([*device, *examine_link(facts)]) == "joining would work"


def test_an_ipv6_address_is_a_network():
    """A device needs no IPv4."""
    only = with_report(interfaces=(Interface(name="eth0", address="fd00::2", rate_mbps=1000),))
    finding = found(only, "network")
    assert (finding.level, finding.found) == (Level.OK, "eth0 fd00::2 1000 Mbit/s")


@pytest.mark.parametrize(
    ("owner", "name", "number", "words"),
    [
        (fcntl, "flock", errno.ENOLCK, "locking a file fails: No locks available"),
        (Path, "symlink_to", errno.EPERM, "making a link fails: Operation not permitted, "),
        (Path, "replace", errno.EIO, "renaming a file fails: Input/output error"),
        (os, "write", errno.EROFS, "writing fails: Read-only file system"),
    ],
)
def test_a_disk_that_lacks_one_thing_is_no_cache(tmp_path, monkeypatch, owner, name, number, words):
    """`join` refuses a network folder without locks, or a card without links, in the same words."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fail)
    problem = find_problem(tmp_path)
    assert problem is not None
    assert problem.is_fatal
    assert words in problem.found
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
    with pytest.raises(ValueError, match="cannot be used: .* fails: .*; set XDG_CACHE_HOME"):
        ShardCache(tmp_path)


def test_a_full_disk_is_fatal_only_without_layers(tmp_path, monkeypatch):
    """Cached layers can be served; missing ones are reported when they are fetched."""
    assert find_problem(tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match="is full: free 1 MB, needed 67 MB"):
        ShardCache(tmp_path)
    (tmp_path / "shards" / f"{'a' * 64}.partial").touch()
    assert find_problem(tmp_path).is_fatal
    (tmp_path / "shards" / ("a" * 64)).touch()
    assert not find_problem(tmp_path).is_fatal
    ShardCache(tmp_path)


def test_what_the_device_cannot_compute_in_is_found_by_trying():
    """Every CPU computes in float32, none multiplies matrices of booleans."""
    assert why_not_computed("cpu", "float32") == ""
    assert why_not_computed("cpu", "bool") != ""
    assert why_not_computed("cpu", "float3") != ""


def test_facts_are_read_from_the_system(tmp_path: Path):
    """They include the release, swap, and the error of a small kernel."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.7, GCID: 1\n")
    swaps = "Filename Type Size Used Priority\n/dev/zram0 partition 634 0 5\n"
    (tmp_path / "proc/swaps").write_text(swaps)
    facts = find_facts(
        REPORT,
        is_jetson=True,
        check_cuda=lambda: (True, "boom"),
        environment={"DISPLAY": ":0"},
        root=tmp_path,
    )
    assert (facts.l4t, facts.num_swap_bytes, facts.cuda_error) == ("R36.4.7", 634 * 1024, "boom")
    assert facts.has_desktop
    assert facts.missing == ()
