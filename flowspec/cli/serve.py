"""`flowspec serve`: be the head of a cluster of devices that join."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import flowspec
from flowspec.bench.provenance import code_hash, folder_hash
from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.common import draft_folder, effective_config, layerwise_folder
from flowspec.cli.settings import NUMERICS, with_settings
from flowspec.cli.ui.prompt import read_line
from flowspec.cli.ui.watch import Watch
from flowspec.cluster.controller.server import HeadServer
from flowspec.cluster.device.report import default_name
from flowspec.cluster.discovery import announced
from flowspec.cluster.hosts import Hosts, read_hosts
from flowspec.cluster.hosts import start as start_hosts
from flowspec.cluster.hosts import stop as stop_hosts
from flowspec.cluster.membership.device_planner import (
    DevicePlanner,
    model_profile,
    model_sizes,
    needs_of,
)
from flowspec.cluster.membership.membership import Membership
from flowspec.cluster.membership.roster import MIN_HEARTBEAT_S, MembershipConfig
from flowspec.cluster.network import own_host, reached_at
from flowspec.config import MAX_TIMEOUT_S, EngineConfig, override
from flowspec.engine.build import HeadParts, check_run, load_head_parts
from flowspec.engine.cluster import ClusterEngine
from flowspec.engine.remote import RemoteEngine
from flowspec.model.architecture import read_config
from flowspec.protocol.control import Interface, ModelCard
from flowspec.request import ClusterError
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES
from flowspec.system import signals
from flowspec.system.address import (
    ALL_INTERFACES,
    Address,
    is_link_local,
    is_loopback,
    parse_host,
    parse_url,
)
from flowspec.system.home import home_folder
from flowspec.system.open_files import check_open_files
from flowspec.system.process_title import name_process
from flowspec.transport.control_sockets import ControlServer
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.token import (
    TOKEN_VARIABLE,
    derive_keys,
    new_token,
    read_token,
    write_token,
)
from flowspec.weights.manifest import HEAD_FOLDER
from flowspec.weights.split_plan import parse_layers
from flowspec.weights.transfer.shards import ShardServer

DEFAULT_PORT = 7000
DRAIN_S = 30.0
PLANNED_CONTEXT = 4096  # most tokens of a request for which caches are planned, by default
PROMPT_HELP = (
    "Ctrl-C ends an answer, /new begins another conversation, Ctrl-D or /quit ends serving."
)
POLL_S = 0.2
MIN_FILES = 128  # 40 are open without any device
HOSTS_END_S = 10.0  # in which devices over ssh must end after the head


@with_settings(
    *("tokenizer", "draft", "drafter", "strategy", "context", "max_num_seqs"),
    *(*NUMERICS, "device"),
    strategy=f"One of {', '.join(STRATEGIES)}.",
    drafter=f"One of {', '.join(DRAFTERS)}.",
    context="Most tokens of a request, prompt and answer; the plan reserves caches for so many. "
    f"[default: the model's limit, with caches for {PLANNED_CONTEXT} at most]",
    device="Device of the drafter: cpu or cuda[:n].",
)
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder, GGUF file or HF id. [default: bundled model]")
    ] = None,
    host: Annotated[str, typer.Option(help="Own address to listen at; *: all.")] = ALL_INTERFACES,
    port: Annotated[
        int, typer.Option(help="Control port; 0: any free one.", min=0, max=65532)
    ] = DEFAULT_PORT,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; a new token is written there.")
    ] = None,
    devices: Annotated[
        int,
        typer.Option(help="Start with so many; 0: as soon as the layers are covered.", min=0),
    ] = 0,
    spares: Annotated[int, typer.Option(help="Devices kept free to replace lost ones.", min=0)] = 0,
    layers: Annotated[str | None, typer.Option(help="Layers per device, as in 8+8+16.")] = None,
    kv_memory_mb: Annotated[
        int,
        typer.Option(
            help="KV cache of devices that set none, MB; 0: half of the free memory.", min=0
        ),
    ] = 0,
    reserve_mb: Annotated[
        int, typer.Option(help="Memory of each device that is not used, MB.", min=0)
    ] = 600,
    settle: Annotated[float, typer.Option(help="Wait after a join for more devices, s.")] = 2.0,
    dead_after: Annotated[
        float, typer.Option(help="A device that is silent so long is lost, s.")
    ] = 2.5,
    rejoin_wait: Annotated[
        float, typer.Option(help="Wait for a lost device before planning without it, s.")
    ] = 5.0,
    give_up: Annotated[
        float, typer.Option(help="Open requests end if layers are missing so long, s.")
    ] = 120.0,
    hosts: Annotated[
        Path | None, typer.Option(help="Start a device on each host of this file, over ssh.")
    ] = None,
    offline: Annotated[bool, typer.Option(help="Look for an id only in the local cache.")] = False,
    mdns: Annotated[bool, typer.Option(help="Announce this head on the local network.")] = True,
    prompt: Annotated[bool, typer.Option(help="Read prompts here, on a terminal.")] = True,
    config: Annotated[Path | None, typer.Option(help="YAML file as for `run`.")] = None,
    log_json: Annotated[bool, typer.Option(help="Log lines as JSON.")] = False,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Load the drafter here, print the line to join with, and give joining devices the layers.

    Answers come as soon as the layers are covered: here, by `flowspec chat HOST:PORT` and by
    `flowspec generate --head HOST:PORT`. Everything is encrypted with the token.
    """
    watch = Watch(log_json=log_json)
    run_config = effective_config(config, {"model": model, **settings})
    check_run(run_config)
    host = parse_host(host)
    check_open_files(MIN_FILES)
    _check_seconds(0.0, settle=settle, rejoin_wait=rejoin_wait, give_up=give_up)
    _check_seconds(4 * MIN_HEARTBEAT_S, dead_after=dead_after)
    over_ssh = read_hosts(hosts) if hosts is not None else None
    if over_ssh is not None:
        port, devices = over_ssh.port, devices or len(over_ssh.hosts) - spares
    token, token_from = _token(token_file)
    keys = derive_keys(token)
    folder, run_config, parts = _load(run_config, offline=offline)
    planner = _planner(run_config, parts, layers, reserve_mb)
    control = ControlServer(host, port, keys)
    shards = _shard_server(folder, host, port + 1 if port else 0, keys, watch)
    membership_config = MembershipConfig(
        version=flowspec.__version__,
        model=_card(run_config, parts),
        manifest_sha256=shards.manifest_sha256,
        shards=shards.address,
        devices=len(parse_layers(layers)) if layers else devices,
        spares=spares,
        settle_s=settle,
        dead_after_s=dead_after,
        heartbeat_s=min(0.5, dead_after / 4),
        rejoin_wait_s=rejoin_wait,
        give_up_s=give_up,
        kv_memory_mb=kv_memory_mb,
    )
    server = HeadServer(
        control,
        _membership(membership_config, planner),
        lambda tell: ClusterEngine(
            run_config, parts, keys, tell, host=host, port=port + 2 if port else 0
        ),
        sizes=model_sizes(read_config(folder / HEAD_FOLDER)),
        on_say=lambda say: watch.say(say.text, device=say.device, level=say.level),
        on_progress=watch.progress,
    )
    with signals.ending_in_order(), contextlib.ExitStack() as stack:
        stack.callback(watch.close)
        stack.callback(shards.close)
        if over_ssh is not None:
            _start_hosts(stack, watch, over_ssh, token)
        stack.callback(server.close)  # first of all: devices over ssh end with the head
        name_process("head")
        server.start()
        head = _print_line(watch, reached_at(host, control.host), control.port, token)
        _say_how_to_ask(watch, head, parts, token_from)
        if mdns:
            _announce(stack, watch, control, parts.manifest.model_id)
        _serve_until_end(server, keys, has_prompt=prompt and sys.stdin.isatty())
        _drain(server, watch)


def _load(config: EngineConfig, *, offline: bool) -> tuple[Path, EngineConfig, HeadParts]:
    """Split the model, one shard per layer, and load what the head computes itself.

    Returns the split's folder and the configuration with the draft model's folder.
    """
    typer.echo(f"loading {config.model} ...", err=True)
    config = override(config, {"draft": draft_folder(config, offline=offline)}, where="draft")
    folder = layerwise_folder(config, offline=offline)
    torch.set_num_threads(config.local.threads)
    parts = load_head_parts(config, folder)
    if parts.drafters and config.draft:
        parts.draft_hash = folder_hash(Path(config.draft))  # for the records of benchmarks
    parts.code_hash = code_hash()  # the files may change while this process runs
    return folder, config, parts


def _card(config: EngineConfig, parts: HeadParts) -> ModelCard:
    """Describe the model to devices and clients."""
    manifest = parts.manifest
    return ModelCard(
        model_id=manifest.model_id,
        model_hash=manifest.model_hash,
        stored_dtype=manifest.dtype,
        numerics=config.numerics,
    )


def _membership(config: MembershipConfig, planner: DevicePlanner) -> Membership:
    """Make the core that decides which device holds which layers, with this machine's clocks."""
    now = time.monotonic()
    return Membership(config, planner, now, wall_offset_s=time.time() - now)


def _start_hosts(stack: contextlib.ExitStack, watch: Watch, over_ssh: Hosts, token: str) -> None:
    """Start a device on each host; they end with the stack."""
    logs = Path("out") / "hosts"
    stack.callback(stop_hosts, start_hosts(over_ssh, token, logs), HOSTS_END_S)
    watch.say(f"devices are started over ssh; what they say is in {logs}")


def _serve_until_end(server: HeadServer, keys: Keys, *, has_prompt: bool) -> None:
    """Serve until the prompt loop ends or a signal comes. Raises ClusterError if the head fails."""
    control = server.control
    if has_prompt:
        _prompt_loop(own_host(control.host, control.port), control.port, keys)
        return
    while not signals.received():
        server.check()
        time.sleep(POLL_S)


def _drain(server: HeadServer, watch: Watch) -> None:
    """Finish the open requests; a further signal ends the wait."""
    watch.say("shutting down: open requests are finished first")
    before = signals.received()
    server.drain("it is shutting down", DRAIN_S, in_a_hurry=lambda: signals.received() != before)


def _check_seconds(least: float, **options: float) -> None:
    """Raise ValueError for a time that is out of range or NaN."""
    for name, value in options.items():
        if not least <= value <= MAX_TIMEOUT_S:
            raise ValueError(
                f"--{name.replace('_', '-')} must be from {least:g} to {MAX_TIMEOUT_S:g} seconds, "
                f"not {value:g}"
            )


def _print_line(watch: Watch, ways: Sequence[Interface], port: int, token: str) -> str:
    """Print the command for devices on stdout, and the head's other addresses in the log.

    Returns the address in that command, quoted for a shell.
    """
    first, *others = ways
    via = f" (the address is that of {first.name})" if first.name else ""
    watch.say(f"run this on each device{via}:")
    head = shlex.quote(str(Address(first.address, port)))  # a shell would interpret brackets
    typer.echo(f"flowspec join {head} --token {token}")
    sys.stdout.flush()
    if is_link_local(first.address):
        watch.say("after the %, put the interface by which that device reaches this one")
    if others:
        listed = ", ".join(f"{Address(way.address, port)} ({way.name})" for way in others)
        watch.say(f"or by another of this machine's addresses: {listed}")
    return head


def _announce(
    stack: contextlib.ExitStack, watch: Watch, control: ControlServer, model: str
) -> None:
    """Announce the head by mDNS until the stack ends, if other machines can reach it."""
    addresses = [way.address for way in reached_at(control.host, control.host)]
    if is_loopback(addresses[0]):
        return
    why = stack.enter_context(announced(default_name(), addresses, control.port, model))
    watch.say(why or "announced by mDNS: flowspec join finds this head without an address")


def _say_how_to_ask(watch: Watch, head: str, parts: HeadParts, token_from: str) -> None:
    """Say which commands work once devices have joined."""
    watch.say(f"once devices hold all {sum(parts.manifest.layers)} layers: flowspec chat {head}")
    watch.say(f'for scripts: flowspec generate --head {head} "..."')
    watch.say(f"devices and health: flowspec status {head}")
    watch.say(f"each with --token as above or, on this machine, {token_from}")


def _token(file: Path | None) -> tuple[str, str]:
    """Return the cluster's token, and the option or variable from which others here read it.

    It is the given one, the one kept from before, or a new one that is kept for the next start.
    """
    if file is None and os.environ.get(TOKEN_VARIABLE):
        return read_token(None, prompt=False), TOKEN_VARIABLE
    path = file or _state_folder() / "token"
    if not path.exists():
        try:
            with signals.undoing():
                write_token(path, new_token())
        except OSError as error:
            raise ValueError(
                f"the token cannot be kept in {path.parent}: {error.strerror}; give --token-file "
                f"FILE in a folder that this user may write to, or set {TOKEN_VARIABLE}"
            ) from None
    return read_token(path, prompt=False), f"--token-file {_short(path)}"


def _short(path: Path) -> str:
    """Write a path in the home folder with ~."""
    with contextlib.suppress(RuntimeError, ValueError):
        return f"~/{path.relative_to(Path.home())}"
    return str(path)


def _state_folder() -> Path:
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base).expanduser() / "flowspec"
    return home_folder(instead="XDG_STATE_HOME") / ".local" / "state" / "flowspec"


def _shard_server(folder: Path, host: str, port: int, keys: Keys, watch: Watch) -> ShardServer:
    """Start the shard server at `port`; if that is taken, at a free one, with a warning."""
    try:
        return ShardServer(folder, Address(host, port).url, keys)
    except ValueError as error:
        if not port:
            raise
        server = ShardServer(folder, Address(host, 0).url, keys)
        used = parse_url(server.address).port
        watch.say(f"{error}; layers are given out at port {used} instead", level="warning")
        return server


def _planner(
    config: EngineConfig, parts: HeadParts, layers: str | None, reserve_mb: int
) -> DevicePlanner:
    model = read_config(parts.folder / HEAD_FOLDER)
    # Most requests are much shorter than a long context.
    context = config.context or min(parts.max_context, PLANNED_CONTEXT)
    needs = needs_of(
        config.numerics.dtype, context=context, requests=1, reserve_bytes=reserve_mb * 1e6
    )
    profile = model_profile(parts.manifest.model_id, model_sizes(model), config.numerics.dtype)
    counts = parse_layers(layers) if layers else ()
    if counts and sum(counts) != profile.layers:
        raise ValueError(
            f"--layers {layers} adds up to {sum(counts)}, the model has {profile.layers} layers"
        )
    return DevicePlanner(profile, needs, layers=counts)


def _prompt_loop(host: str, port: int, keys: Keys) -> None:
    try:
        with RemoteEngine(host, port, keys) as engine:
            chat_loop(engine, ChatOptions(), about=PROMPT_HELP, read=read_line)
    except ClusterError:
        if not signals.received():
            raise
