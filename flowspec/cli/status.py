"""`flowspec status`: the devices of a running cluster, and whether it is healthy."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flowspec.cli.chat import DEFAULT_PORT
from flowspec.engine.remote import RemoteEngine
from flowspec.protocol.control import ClusterStatus, DeviceStatus
from flowspec.system.address import parse_address
from flowspec.transport.secure.token import derive_keys, read_token


def status(
    head: Annotated[str, typer.Argument(help="HOST:PORT of the head.")],
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show devices, layers, memory, links and requests; exit code 1 if HEAD is not healthy.

    Healthy means that a token has crossed every stage within the last half minute.
    """
    keys = derive_keys(token or read_token(token_file))
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    with RemoteEngine(host, port, keys) as engine:
        now = engine.cluster_status()
    if json_:
        typer.echo(json.dumps(as_json(now)))
    else:
        _show(now, Console(width=140, soft_wrap=True, highlight=False))
    if not now.healthy:
        raise typer.Exit(1)


def as_json(now: ClusterStatus) -> dict[str, Any]:
    """Return what `--json` prints; keys of the earlier version stay beside the new ones."""
    found = now.model_dump(mode="json")
    numerics = found["model"]["numerics"]
    found["model"] |= {name: numerics[name] for name in ("dtype", "quantization")}
    for device in found["devices"]:
        device["kv_rows"] = device["num_kv_tokens"]
        device["kv_rows_used"] = device["num_kv_tokens_used"]
    return found


def _show(now: ClusterStatus, console: Console) -> None:
    console.print(f"{'healthy' if now.healthy else 'NOT HEALTHY'}: {now.why}", markup=False)
    console.print(
        f"{now.model.model_id}, {now.sizes.layers} layers, {now.model.numerics.dtype}, "
        f"{now.strategy} with {now.drafter}; FlowSpec {now.version}, epoch {now.epoch}, "
        f"up {now.uptime_s:.0f} s",
        markup=False,
    )
    console.print(
        f"requests: {now.requests_active} served, {now.requests_waiting} waiting, "
        f"{now.requests_done} done, {now.requests_failed} failed"
    )
    if not now.devices:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "device", "state", "layers", "memory free", "KV tokens", "heard"):
        table.add_column(name)
    for name in ("round trip", "to / from head", "busy", "power", ""):
        table.add_column(name)
    for one in now.devices:
        table.add_row(*_row(one, now))
    console.print(table)


def _row(one: DeviceStatus, now: ClusterStatus) -> tuple[str, ...]:
    lost, report = one.state == "lost", one.report
    layers = f"{one.layers[0]}-{one.layers[1] - 1}" if one.layers else "-"
    link = report.link
    rates = f"{link.up_bytes_per_s / 1e6:.0f} / {link.down_bytes_per_s / 1e6:.0f} MB/s"
    busy = one.busy_s / now.epoch_age_s if now.epoch_age_s and one.rank else 0.0
    total = report.memory_total_bytes / 1e9
    return (
        str(one.rank or "-"),
        one.name,
        one.state,
        layers,
        "-" if lost else f"{report.memory_available_bytes / 1e9:.1f} of {total:.1f} GB",
        f"{one.num_kv_tokens_used} of {one.num_kv_tokens}" if one.num_kv_tokens else "-",
        "-" if lost else f"{one.heartbeat_age_s:.1f} s ago",
        f"{one.round_trip_s * 1e3:.1f} ms" if one.round_trip_s else "-",
        rates if link.up_bytes_per_s else "-",
        f"{min(1.0, busy):.0%}" if one.rank else "-",
        f"{one.power_w:.1f} W" if one.power_w else "-",
        one.about,
    )
