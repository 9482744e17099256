"""`flowspec plan`: which device would get which layers, and how fast that would be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowspec.bench.predict import predict_speeds, stand_in_stages
from flowspec.bench.prompts import load_prompts
from flowspec.cli.chat import DEFAULT_PORT
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.cluster.membership.device_planner import (
    as_candidate,
    model_profile,
    model_sizes,
    needs_of,
)
from flowspec.cluster.membership.placement import (
    Candidate,
    Needs,
    Weights,
    fixed_layers,
    needed_bytes,
    plan_layers,
)
from flowspec.cluster.membership.roster import DoesNotFitError, Placement
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation
from flowspec.cost_model.profiles import (
    ClusterProfile,
    DeviceProfile,
    LinkProfile,
    ModelProfile,
    is_profile,
    profile_names,
    read_cluster,
    read_model,
)
from flowspec.engine.build import load_head_parts
from flowspec.engine.remote import RemoteEngine
from flowspec.model.architecture import read_config
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES
from flowspec.system.address import parse_address
from flowspec.transport.secure.token import derive_keys, read_token
from flowspec.weights.checkpoint import read_model_config
from flowspec.weights.manifest import HEAD_FOLDER, MANIFEST_NAME
from flowspec.weights.split_plan import parse_layers

STRATEGIES_SHOWN = "streaming,flowspec,serial_pp,ar"


@dataclass(frozen=True, slots=True)
class _Question:
    """The input of a plan: the head's device, the other devices, the model, what stages hold."""

    head: tuple[DeviceProfile, LinkProfile]
    candidates: Sequence[Candidate]
    model: ModelProfile
    needs: Needs


def plan(
    cluster: Annotated[
        str | None,
        typer.Option(help=f"Name or file of a cluster: {', '.join(profile_names('clusters'))}."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="With --cluster: name or file of a profile, model folder, or GGUF.")
    ] = "vicuna-7b",
    head: Annotated[
        str | None, typer.Option(help="HOST:PORT of a live head, whose devices are used.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers per device, as in 8+8+16. [default: planned]")
    ] = None,
    context: Annotated[
        int, typer.Option(help="Most tokens of a request, for the caches.", min=1)
    ] = 2048,
    requests: Annotated[
        int, typer.Option(help="Most requests decoded at the same time.", min=1)
    ] = 1,
    reserve_mb: Annotated[
        int, typer.Option(help="Memory of each device that is not used, MB.", min=0)
    ] = 600,
    drafter: Annotated[str, typer.Option(help=f"One of {', '.join(DRAFTERS)}.")] = "eagle",
    strategies: Annotated[
        str, typer.Option(help=f"all, or of {', '.join(STRATEGIES)}, with commas.")
    ] = STRATEGIES_SHOWN,
    tokens: Annotated[
        int, typer.Option(help="Tokens per emulated answer; 0: no prediction.", min=0)
    ] = 48,
) -> None:
    """Place a model's layers on the devices of a profile or of a live head; load nothing.

    Speeds are emulated, not measured: the bundled model and its drafter run under a virtual clock
    and are charged the devices' times. The acceptance is that of the bundled model, so use the
    speeds only to compare. The exit code is 1 if the devices cannot hold the model; the message
    says what is needed and what there is.
    """
    if (cluster is None) == (head is None):
        raise ValueError("give either --cluster NAME or --head HOST:PORT")
    names = list(STRATEGIES) if strategies == "all" else strategies.split(",")
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ValueError(f"unknown strategy {unknown[0]}; known: {', '.join(STRATEGIES)}")
    size = {"context": context, "requests": requests, "reserve_bytes": reserve_mb * 1e6}
    if cluster is not None:
        question = _from_profiles(cluster, model, size)
    else:
        assert head is not None
        question = _from_head(head, token or read_token(token_file), size)
    console = Console(width=140, highlight=False)
    try:
        placement = _place(question, layers)
    except DoesNotFitError as error:
        typer.echo(f"does not fit: {error}")
        raise typer.Exit(1) from None
    _show(console, question, placement)
    if tokens:
        torch.set_num_threads(1)
        _predict(console, question, placement, names, drafter, tokens)


def _from_profiles(cluster: str, model: str, size: dict[str, float]) -> _Question:
    profile = read_cluster(cluster)
    candidates = [
        Candidate(name=f"{rank}:{device.name}", device=device, link=link)
        for rank, (device, link) in enumerate(
            zip(profile.devices[1:], profile.links[1:], strict=True), start=1
        )
    ]
    needs = needs_of("float16", **size)  # type: ignore[arg-type]
    sizes = _read_sizes(model, dtype="float16")
    return _Question((profile.devices[0], profile.links[0]), candidates, sizes, needs)


def _read_sizes(name: str, *, dtype: str) -> ModelProfile:
    """Return the sizes of a profile, or of the checkpoint at a path, held in `dtype`."""
    path = Path(name)
    if is_profile("models", name) or not path.exists():
        return read_model(name)
    is_split = (path / MANIFEST_NAME).exists()
    config = read_config(path / HEAD_FOLDER) if is_split else read_model_config(path)
    shown = path.resolve().name if path.is_dir() else path.stem
    return model_profile(shown, model_sizes(config), dtype)


def _from_head(head: str, token: str, size: dict[str, float]) -> _Question:
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    with RemoteEngine(host, port, derive_keys(token)) as engine:
        now = engine.cluster_status()
    present = [one for one in now.devices if one.state != "lost"]
    if not present:
        raise ValueError(f"no device has joined {head} yet")
    candidates = [as_candidate(one.name, one.report) for one in present]
    # The head's own device is not measured; assume that it is like the fastest of the others.
    fastest = max(candidates, key=lambda c: c.device.bandwidth_gb_s)
    profile = model_profile(now.model.model_id, now.sizes, now.model.numerics.dtype)
    needs = needs_of(now.model.numerics.dtype, **size)  # type: ignore[arg-type]
    return _Question((fastest.device, fastest.link), candidates, profile, needs)


def _place(question: _Question, layers: str | None) -> Placement:
    if layers is None:
        return plan_layers(question.candidates, question.model, question.needs)
    counts = parse_layers(layers)
    if sum(counts) != question.model.layers:
        raise ValueError(
            f"--layers {layers} adds up to {sum(counts)}, {question.model.name} has "
            f"{question.model.layers} layers"
        )
    return fixed_layers(question.candidates, question.model, question.needs, counts)


def _show(console: Console, question: _Question, placement: Placement) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "device", "layers", "memory needed", "available", "weights read at"):
        table.add_column(name)
    table.add_column("")
    by_name = {candidate.name: candidate for candidate in question.candidates}
    last = len(placement.places)
    for rank, place in enumerate(placement.places, start=1):
        one = by_name[place.name]
        needed = needed_bytes(
            question.model,
            question.needs,
            place.last - place.first,
            first=rank == 1,
            last=rank == last,
        )
        table.add_row(
            *(str(rank), one.name, f"{place.first}-{place.last - 1} ({place.last - place.first})"),
            *(f"{needed / 1e9:.2f} GB", f"{one.memory_bytes / 1e9:.2f} GB"),
            f"{one.device.bandwidth_gb_s:.1f} GB/s",
        )
    for name, why in placement.left_out.items():
        one = by_name[name]
        memory, rate = f"{one.memory_bytes / 1e9:.2f} GB", f"{one.device.bandwidth_gb_s:.1f} GB/s"
        table.add_row("-", name, "-", "-", memory, rate, why)
    console.print(table)
    if placement.about:
        console.print(placement.about, markup=False)


def _predict(
    console: Console,
    question: _Question,
    placement: Placement,
    strategies: Sequence[str],
    drafter: str,
    tokens: int,
) -> None:
    """Print tokens/s of this placement, and of one device if it can hold the whole model."""
    options = {"this plan": placement}
    alone = _best_alone(question)
    if alone is not None and len(placement.places) > 1:
        options[f"{alone.places[0].name} alone"] = alone
    config = EngineConfig(drafter=drafter)
    shards = "+".join(["1"] * 8)
    folder = split_folder(config.changed(layers=shards))
    parts = load_head_parts(config.changed(draft=draft_folder(config)), folder)
    num_layers = len(parts.manifest.layers)
    texts = [p.turns[0] for p in load_prompts(BUNDLED / "prompts.jsonl", limit=3)]
    table = Table("tokens/s, emulated", *strategies, box=None, pad_edge=False)
    speeds = {}
    for name, option in options.items():
        if len(option.places) > num_layers:
            console.print(f"no prediction: more than {num_layers} stages")
            return
        emulation = _emulation(question, option, drafter)
        stages = stand_in_stages(folder, num_layers, len(option.places))
        speeds[name] = predict_speeds(
            config, parts, stages, emulation, strategies, texts, num_tokens=tokens
        )
        table.add_row(name, *(f"{speeds[name][s]:.1f}" for s in strategies))
    console.print(table)
    if len(speeds) == 2:
        plan_best, alone_best = (max(one.values()) for one in speeds.values())
        if alone_best > plan_best:
            console.print(
                f"one device alone would be faster: {alone_best:.1f} against {plan_best:.1f}"
            )


def _best_alone(question: _Question) -> Placement | None:
    """Return the placement on the fastest device that can hold the whole model, if any can."""
    for one in sorted(question.candidates, key=lambda c: -c.device.bandwidth_gb_s):
        try:
            return plan_layers([one], question.model, question.needs, weights=Weights())
        except DoesNotFitError:
            continue
    return None


def _emulation(question: _Question, placement: Placement, drafter: str) -> Emulation:
    by_name = {candidate.name: candidate for candidate in question.candidates}
    used = [by_name[place.name] for place in placement.places]
    profile = ClusterProfile(
        name="plan",
        devices=(question.head[0], *(one.device for one in used)),
        links=(question.head[1], *(one.link for one in used)),
    )
    counts = tuple(place.last - place.first for place in placement.places)
    # The placement has checked the memory already, with caches and reserve.
    roomy = tuple(replace(device, memory_gb=1e6) for device in profile.devices)
    return Emulation(
        cluster=replace(profile, devices=roomy),
        model=question.model,
        drafter=drafter,
        layers=counts,
    )
