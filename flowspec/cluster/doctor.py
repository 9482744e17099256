"""Checks of a device before it joins, or when it does not work; every problem comes with a fix.

The rules are pure functions of facts; the last part of the file collects the facts.
"""

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import flowspec
from flowspec.protocol.control import DeviceReport, Link
from flowspec.system.address import is_link_local, is_loopback
from flowspec.transport.control_sockets import has_curve
from flowspec.transport.secure.token import TOKEN_VARIABLE
from flowspec.weights.transfer.cache import CacheProblem

MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 13)
MIN_MEMORY_BYTES = 0.5e9  # less does not hold a layer and the runtime
MIN_DISK_BYTES = 1e9
SLOW_LINK_BYTES_PER_S, SLOW_LATENCY_S = 20e6, 0.01
HEAD = "head"  # name of the checks of the link to the head
NVMAP_ERROR = "NvMapMemAllocInternalTagged"
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


class Level(str, Enum):
    """What a check's result means for joining."""

    OK = "ok"
    WARNING = "warning"  # it works, but worse than possible
    ERROR = "error"  # it does not work


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check. `fix` says what to do, if anything."""

    what: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about this device; None means not applicable."""

    python: tuple[int, int]
    report: DeviceReport
    is_jetson: bool = False
    l4t: str = ""  # such as R36.4.7
    cuda_available: bool = False
    has_desktop: bool = False  # a graphical session takes memory on a board
    num_swap_bytes: int = 0
    allocator: str = ""  # value of PYTORCH_CUDA_ALLOC_CONF
    has_bitsandbytes: bool = False
    cuda_error: str = ""  # error of a small allocation and kernel
    has_curve: bool = True
    missing: tuple[str, ...] = ()  # packages
    cache_problem: CacheProblem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """Facts about the link to a head."""

    where: str
    why_unreachable: str = ""
    own_address: str = ""
    link: Link = Link()
    version: str = ""  # of its package, if it let us in
    dtype: str = ""  # of its model
    dtype_error: str = ""  # this device's error when it computes in that dtype


def examine(facts: Facts) -> Iterator[CheckResult]:
    """Check the device itself."""
    report = facts.report
    yield _python(facts)
    yield CheckResult(what="FlowSpec", level=Level.OK, found=flowspec.__version__)
    for name in facts.missing:
        yield CheckResult(
            what=name,
            level=Level.ERROR,
            found="not installed",
            fix="pip install -r requirements.txt (on a Jetson: requirements_jetson.txt)",
        )
    if not facts.has_curve:
        yield CheckResult(
            what="encryption",
            level=Level.ERROR,
            found="this libzmq has no CURVE",
            fix="install pyzmq from its wheel: pip install --force-reinstall pyzmq",
        )
    yield from _torch(facts)
    yield _memory(report)
    yield _cache(facts)
    if report.power_mode:
        yield CheckResult(what="power mode", level=Level.OK, found=report.power_mode)
    yield _interfaces(report)
    if facts.is_jetson:
        yield from _jetson(facts)


def examine_link(facts: LinkFacts) -> Iterator[CheckResult]:
    """Check the link to the head."""
    if facts.why_unreachable:
        yield CheckResult(
            what=HEAD, level=Level.ERROR, found=facts.why_unreachable, fix="see there"
        )
        return
    version = f"FlowSpec {facts.version}" if facts.version else "it lets us in"
    same = facts.version in ("", flowspec.__version__)
    yield CheckResult(
        what=HEAD,
        level=Level.OK if same else Level.ERROR,
        found=f"{facts.where} answers: {version}; this device listens at {facts.own_address}",
        fix="" if same else f"install {facts.version} here, or {flowspec.__version__} there",
    )
    if is_loopback(facts.own_address):
        yield CheckResult(
            what="address",
            level=Level.WARNING,
            found=f"this is the head's own machine: others cannot reach it at {facts.own_address}",
            fix="if other devices join too, use the head's network address",
        )
    if facts.dtype_error:
        yield CheckResult(
            what="dtype",
            level=Level.ERROR,
            found=f"the head's model computes in {facts.dtype}, this device cannot: "
            f"{facts.dtype_error[:300]}",
            fix="join with another --device, or serve with another --dtype",
        )
    yield from _speed(facts.link)


def examine_token(why_wrong: str) -> CheckResult:
    """Report why the link to the head was not checked: no token, or an invalid one."""
    if not why_wrong:
        return CheckResult(
            what="token",
            level=Level.WARNING,
            found="none given, so the link to the head was not checked",
            fix=f"give --token-file FILE or set {TOKEN_VARIABLE}; `flowspec serve` prints it",
        )
    return CheckResult(
        what="token",
        level=Level.ERROR,
        found="cannot be used, so the link to the head was not checked",
        fix=why_wrong,
    )


def verdict(findings: Sequence[CheckResult]) -> str:
    """Sum up all results in one line."""
    if not can_join(findings):
        return "joining would not work"
    if any(finding.what == HEAD for finding in findings):
        return "joining would work"
    return "nothing on this device prevents joining; the link to a head was not checked"


def can_join(findings: Iterable[CheckResult]) -> bool:
    """Whether no result makes joining impossible."""
    return all(finding.level is not Level.ERROR for finding in findings)


def _python(facts: Facts) -> CheckResult:
    good = MIN_PYTHON <= facts.python <= MAX_PYTHON
    version = ".".join(map(str, facts.python))
    needed = f"{'.'.join(map(str, MIN_PYTHON))} to {'.'.join(map(str, MAX_PYTHON))}"
    return CheckResult(
        what="Python",
        level=Level.OK if good else Level.ERROR,
        found=version,
        fix="" if good else f"needed: {needed}; JetPack 5 has 3.8: install JetPack 6 or 7",
    )


def _torch(facts: Facts) -> Iterator[CheckResult]:
    report = facts.report
    if facts.cuda_error:
        yield _cuda_error(facts)
    elif facts.is_jetson and not facts.cuda_available:
        yield CheckResult(
            what="torch",
            level=Level.WARNING,
            found=f"{report.torch} finds no CUDA: it was built for other machines",
            fix="install NVIDIA's build for this JetPack (docs/deployment.md), then "
            "requirements_jetson.txt with a constraint that keeps it",
        )
    else:
        gflops, rate = report.flops / 1e9, report.bandwidth_bytes_per_s / 1e9
        yield CheckResult(
            what="torch",
            level=Level.OK,
            found=f"{report.torch} on {report.torch_device}: reads {rate:.1f} GB/s, "
            f"{gflops:.0f} GFLOP/s",
        )


def _cuda_error(facts: Facts) -> CheckResult:
    error = facts.cuda_error
    fix = "see the error; run on the CPU with --device cpu meanwhile"
    if NVMAP_ERROR in error or "error 12" in error:
        fix = (
            f"free memory is fragmented (known from L4T 36.4.7 on): export {EXPANDABLE}, or reboot"
        )
    elif "no kernel image" in error or "named symbol not found" in error:
        fix = "this torch was built for another GPU; install NVIDIA's build for this JetPack"
    elif "libcudss" in error or "libnvpl" in error:
        fix = "install the missing library from the CUDA repository of this JetPack"
    elif "NVML" in error:
        fix = "this board has no NVML; its torch says so instead of `out of memory`: free some"
    return CheckResult(what="CUDA", level=Level.ERROR, found=error[:300], fix=fix)


def _memory(report: DeviceReport) -> CheckResult:
    free, total = report.memory_available_bytes / 1e9, report.memory_total_bytes / 1e9
    shared = ", shared by CPU and GPU" if report.unified_memory else ""
    enough = report.memory_available_bytes >= MIN_MEMORY_BYTES
    return CheckResult(
        what="memory",
        level=Level.OK if enough else Level.ERROR,
        found=f"{free:.1f} of {total:.1f} GB available{shared}",
        fix="" if enough else f"needed: {MIN_MEMORY_BYTES / 1e9:.1f} GB; end other programs",
    )


def _cache(facts: Facts) -> CheckResult:
    """Check that layers can be stored in the cache, as `join` checks it."""
    report, problem = facts.report, facts.cache_problem
    if problem is not None:
        level = Level.ERROR if problem.is_fatal else Level.WARNING
        return CheckResult(what="cache", level=level, found=problem.found, fix=problem.fix)
    enough = report.disk_free_bytes >= MIN_DISK_BYTES
    return CheckResult(
        what="disk",
        level=Level.OK if enough else Level.WARNING,
        found=f"{report.disk_free_bytes / 1e9:.1f} GB free for layers",
        fix="" if enough else "free some, or set XDG_CACHE_HOME to a folder on a larger disk",
    )


def _interfaces(report: DeviceReport) -> CheckResult:
    real = [one for one in report.interfaces if not is_loopback(one.address)]
    text = ", ".join(
        f"{one.name} {one.address}" + (f" {one.rate_mbps} Mbit/s" if one.rate_mbps else "")
        for one in real
    )
    slow = [one for one in real if 0 < one.rate_mbps < 1000]
    if not real:
        fix = "connect a cable or Wi-Fi; without one only a head on this machine can be joined"
        return CheckResult(what="network", level=Level.WARNING, found="none is up", fix=fix)
    if all(is_link_local(one.address) for one in real):
        fix = (
            "get an address by DHCP or from the router; without one only a head on the same cable "
            f"can be joined, as in flowspec join '[fe80::1%{real[0].name}]:7000'"
        )
        found = f"{text}: only link-local"
        return CheckResult(what="network", level=Level.WARNING, found=found, fix=fix)
    if slow and len(slow) == len(real):
        fix = f"{slow[0].name} runs at {slow[0].rate_mbps} Mbit/s: check cable and switch"
        return CheckResult(what="network", level=Level.WARNING, found=text, fix=fix)
    return CheckResult(what="network", level=Level.OK, found=text)


def _speed(link: Link) -> Iterator[CheckResult]:
    rate = min(link.up_bytes_per_s, link.down_bytes_per_s)
    if not rate:
        fix = "the head is busy or the link loses many packets: try again"
        yield CheckResult(what="link", level=Level.WARNING, found="could not be measured", fix=fix)
        return
    found = (
        f"{link.latency_s * 1e3:.2f} ms one way, {link.up_bytes_per_s / 1e6:.0f} MB/s to the head, "
        f"{link.down_bytes_per_s / 1e6:.0f} MB/s from it, encrypted"
    )
    slow = rate < SLOW_LINK_BYTES_PER_S or link.latency_s > SLOW_LATENCY_S
    fix = "use a cable (1 Gbit/s or more); Wi-Fi and VPNs cost most of the speed" if slow else ""
    yield CheckResult(what="link", level=Level.WARNING if slow else Level.OK, found=found, fix=fix)


def _jetson(facts: Facts) -> Iterator[CheckResult]:
    """Check known problems of Jetson boards."""
    release = facts.l4t or "unknown"
    yield CheckResult(what="Jetson Linux", level=Level.OK, found=f"L4T {release}")
    if "MAXN" not in facts.report.power_mode.upper() and facts.report.power_mode:
        yield CheckResult(
            what="power mode",
            level=Level.WARNING,
            found=f"{facts.report.power_mode}: below the board's fastest",
            fix="sudo nvpmodel -q --verbose lists the modes, sudo nvpmodel -m N sets one; "
            "sudo jetson_clocks holds the clocks",
        )
    fragile = _at_least(facts.l4t, (36, 4, 7))
    if fragile and "expandable_segments" not in facts.allocator:
        yield CheckResult(
            what="CUDA allocator",
            level=Level.WARNING,
            found="large allocations may fail with NvMap error 12 although memory is free",
            fix=f"export {EXPANDABLE}",
        )
    if facts.has_desktop:
        yield CheckResult(
            what="desktop",
            level=Level.WARNING,
            found="a graphical session takes memory from the model",
            fix="sudo systemctl set-default multi-user.target, then reboot",
        )
    if facts.num_swap_bytes:
        yield CheckResult(
            what="swap",
            level=Level.WARNING,
            found=f"{facts.num_swap_bytes / 1e9:.1f} GB of swap or zram: weights in it are slow",
            fix="sudo systemctl disable nvzramconfig, then reboot",
        )
    if facts.has_bitsandbytes:
        yield CheckResult(
            what="bitsandbytes",
            level=Level.WARNING,
            found="its aarch64 wheels import and fail at their first kernel on a Jetson",
            fix="it is not needed here: pip uninstall bitsandbytes",
        )


def _at_least(l4t: str, version: tuple[int, ...]) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", l4t)[:3])
    return bool(numbers) and numbers >= version


def find_facts(
    report: DeviceReport,
    *,
    is_jetson: bool,
    check_cuda: Callable[[], tuple[bool, str]],
    environment: Mapping[str, str],
    cache_problem: CacheProblem | None = None,
    root: Path = Path("/"),
) -> Facts:
    """Collect the facts about this device; `check_cuda` returns (has CUDA, its error)."""
    available, error = check_cuda()
    return Facts(
        python=sys.version_info[:2],
        report=report,
        is_jetson=is_jetson,
        l4t=_l4t(root / "etc/nv_tegra_release"),
        cuda_available=available,
        cuda_error=error,
        has_desktop=bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))
        or any((root / "tmp/.X11-unix").glob("X*")),
        num_swap_bytes=_swap_bytes(root / "proc/swaps"),
        allocator=environment.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        has_bitsandbytes=_is_installed("bitsandbytes"),
        has_curve=has_curve(),
        cache_problem=cache_problem,
        missing=tuple(n for n in ("pyzmq", "cryptography", "pydantic") if not _is_installed(n)),
    )


def _l4t(file: Path) -> str:
    """Parse `# R36 (release), REVISION: 4.7, ...` as R36.4.7."""
    try:
        text = file.read_text()
    except OSError:
        return ""
    found = re.search(r"R(\d+).*REVISION:\s*([\d.]+)", text)
    return f"R{found[1]}.{found[2]}" if found else ""


def _swap_bytes(file: Path) -> int:
    try:
        lines = file.read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(int(line.split()[2]) * 1024 for line in lines if len(line.split()) > 2)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
