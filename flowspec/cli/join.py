"""`flowspec join`: make this device part of a cluster."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import flowspec
from flowspec.cli.ui.watch import Watch
from flowspec.cluster.device.agent import DeviceAgent, JoinConfig, JoinRefusedError
from flowspec.cluster.device.layers import DeviceLayers, folder_card
from flowspec.cluster.device.power import find_power_meter
from flowspec.cluster.device.report import default_name, report_device
from flowspec.cluster.discovery import choose_head, find_heads
from flowspec.config import DeviceConfig, override
from flowspec.protocol.control import (
    Assign,
    Control,
    DeviceReport,
    Progress,
    Release,
    Serve,
    StageReady,
    Standby,
    Trouble,
    Welcome,
)
from flowspec.system.address import parse_address, parse_host
from flowspec.system.bundled import find_bundled
from flowspec.system.open_files import check_open_files
from flowspec.system.process_title import name_process
from flowspec.transport.secure.token import derive_keys, read_token
from flowspec.weights.checkpoint import check_model
from flowspec.weights.transfer.cache import ShardCache

DEFAULT_PORT = 7000
MIN_FILES = 64


def join(
    head: Annotated[
        str | None, typer.Argument(help="HOST:PORT of the head. [default: found by mDNS]")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="The cluster's token; safer in --token-file or FLOWSPEC_TOKEN."),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this device. [default: host name]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0: as torch decides.", min=0, max=1024)
    ] = 0,
    kv_memory_mb: Annotated[
        int,
        typer.Option(help="KV cache, MB; 0: as the head says, or half of the free memory.", min=0),
    ] = 0,
    host: Annotated[
        str | None, typer.Option(help="Own address to listen at. [default: automatic]")
    ] = None,
    port: Annotated[
        int, typer.Option(help="Listen at PORT and PORT+1; 0: any free ones.", min=0, max=65534)
    ] = 0,
    model: Annotated[
        Path | None, typer.Option(help="A copy of the model on this device, split or not.")
    ] = None,
    fetch: Annotated[bool, typer.Option(help="Get missing layers from the head.")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for layers. [default: XDG cache]")
    ] = None,
    once: Annotated[bool, typer.Option(help="End when the head ends.")] = False,
    log_json: Annotated[bool, typer.Option(help="Log lines as JSON.")] = False,
) -> None:
    """Give this device's memory and compute to the cluster of HEAD, until stopped.

    It reports its memory and compute, gets its layers, and joins again after head or link failed.
    """
    keys = derive_keys(token or read_token(token_file))
    check_open_files(MIN_FILES)
    if head is None:
        found = choose_head(find_heads())
        head_host, head_port = found.host, found.port
    else:
        head_host, head_port = parse_address(head, default_port=DEFAULT_PORT)
    listen_host = parse_host(host) if host else ""
    name = name or default_name()
    if model is not None:
        model = find_bundled(model)
        _check_folder(model)
    watch = Watch(log_json=log_json, device=name)
    torch_device = pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    own = {"device": torch_device, "threads": torch.get_num_threads(), "kv_memory_mb": kv_memory_mb}
    shards = ShardCache(cache)
    config = JoinConfig(
        host=head_host,
        port=head_port,
        name=name,
        version=flowspec.__version__,
        listen_host=listen_host,
        listen_port=port,
        once=once,
        pinned=folder_card(model, fetch),
        local=override(DeviceConfig(), own, where="options"),
    )
    layers = DeviceLayers(shards, keys, device=torch_device, folder=model, may_fetch=fetch)

    def report() -> DeviceReport:
        found = report_device(torch_device, "float32", shards.root)
        free = found.memory_available_bytes + layers.held_bytes  # new layers replace the old
        return found.model_copy(update={"memory_available_bytes": free})

    agent = DeviceAgent(
        config,
        keys,
        layers,
        report,
        on_event=lambda message: _show(watch, message),
        power=find_power_meter(),
    )
    name_process(f"join {name}")
    try:
        agent.run()
    except JoinRefusedError as error:
        raise ValueError(str(error)) from None
    finally:
        watch.close()


def _check_folder(model: Path) -> None:
    """Raise ValueError if --model names no copy of a model."""
    if not model.exists():
        raise ValueError(
            f"--model {model} is no folder on this device; name a copy of the model, split or not, "
            "or leave it out: the layers come from the head"
        )
    check_model(str(model))


def pick_device(name: str) -> str:
    """Return a device that torch can use here. Raises ValueError if it cannot."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not one torch knows; auto, cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name} was asked for, torch finds no CUDA here; see `flowspec doctor`"
        )
    return name


def _show(watch: Watch, message: Control) -> None:
    match message:
        case Welcome():
            watch.say(f"in the cluster as {message.name}; waiting for layers")
        case Assign():
            watch.say(
                f"stage {message.rank} of {message.num_stages}: layers {message.first_layer} to "
                f"{message.last_layer - 1} of {message.model.model_id}"
            )
        case Progress():
            watch.progress("", message)
        case StageReady():
            watch.say("layers loaded; waiting for the other devices")
        case Serve():
            watch.say("serving")
        case Standby():
            watch.say(message.why)
        case Release():
            watch.say("a device was lost; waiting for a new plan", level="warning")
        case Trouble():
            watch.say_again(message.cause, level="warning")
