"""`flowspec doctor`: would joining work from here, and what is in the way?"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowspec.cli.chat import DEFAULT_PORT
from flowspec.cli.join import pick_device
from flowspec.cluster.device.report import is_jetson, measure_link, report_device, why_not_computed
from flowspec.cluster.doctor import (
    CheckResult,
    Level,
    LinkFacts,
    can_join,
    examine,
    examine_link,
    examine_token,
    find_facts,
    verdict,
)
from flowspec.engine.remote import HANDSHAKE_TIMEOUT_S, RemoteEngine
from flowspec.protocol.control import Link
from flowspec.request import ClusterError
from flowspec.system.address import local_address_towards, parse_address
from flowspec.transport.control_sockets import ControlClient, why_unreachable
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.token import TOKEN_VARIABLE, derive_keys, read_token
from flowspec.weights.transfer.cache import cache_folder, find_problem


def doctor(
    head: Annotated[str | None, typer.Argument(help="HOST:PORT of a head to reach.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder in which join would keep layers. [default: XDG cache]"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON list of findings.")] = False,
) -> None:
    """Check this device and, with HEAD, the connection to it; every finding names its fix.

    The exit code is 0 if nothing prevents joining, else 1.
    """
    torch_device = pick_device(device)
    cache = cache or cache_folder()
    problem = find_problem(cache)
    report = report_device(torch_device, "float32", cache)
    facts = find_facts(
        report,
        is_jetson=is_jetson(),
        check_cuda=_check_cuda,
        environment=os.environ,
        cache_problem=problem,
    )
    findings = list(examine(facts))
    if head is not None:
        findings += _examine_head(head, token, token_file, torch_device)
    if json_:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        _show(findings)
    if not can_join(findings):
        raise typer.Exit(1)


def _examine_head(
    head: str, token: str | None, token_file: Path | None, torch_device: str
) -> list[CheckResult]:
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    try:
        keys = derive_keys(token or read_token(token_file))
    except ValueError as error:
        # Without the token only the port can be looked at.
        reason = why_unreachable(host, port)
        given = token or token_file or os.environ.get(TOKEN_VARIABLE)
        found = [examine_token(str(error) if given else "")]
        if reason:
            found += examine_link(LinkFacts(where=head, why_unreachable=reason))
        return found
    try:
        with RemoteEngine(host, port, keys) as engine:
            status, address = engine.cluster_status(), engine.control.host
        link, own = _measure(host, port, keys), local_address_towards(address, port)
    except ClusterError as error:
        return list(examine_link(LinkFacts(where=head, why_unreachable=error.cause)))
    dtype = status.model.numerics.dtype
    facts = LinkFacts(
        where=head,
        own_address=own,
        link=link,
        version=status.version,
        dtype=dtype,
        dtype_error=why_not_computed(torch_device, dtype),
    )
    return list(examine_link(facts))


def _measure(host: str, port: int, keys: Keys) -> Link:
    """Measure latency and rates of the link to the head over a separate connection."""
    client = ControlClient(host, port, keys)
    try:
        return Link() if client.connect(HANDSHAKE_TIMEOUT_S) else measure_link(client)
    finally:
        client.close()


def _check_cuda() -> tuple[bool, str]:
    """Return whether CUDA is there, and the error of a small kernel if that fails."""
    if not torch.cuda.is_available():
        return False, ""
    try:
        torch.ones(1 << 20, device="cuda").sum().item()
    except (RuntimeError, OSError) as error:
        return True, str(error)
    return True, ""


def _show(findings: list[CheckResult]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    marks = {Level.OK: "ok", Level.WARNING: "!", Level.ERROR: "NO"}
    for finding in findings:
        row = (marks[finding.level], finding.what, finding.found, finding.fix)
        table.add_row(*(text.replace("[", r"\[") for text in row))
    Console(width=140).print(table)
    typer.echo(verdict(findings))
