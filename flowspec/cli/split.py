"""`flowspec split`: cut a model into one folder per stage."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flowspec.cli.common import bundled, is_bundled, say_on_stderr
from flowspec.cli.settings import help_of
from flowspec.system import signals
from flowspec.weights.checkpoint import open_checkpoint, resolve_model, resolve_tokenizer
from flowspec.weights.manifest import Manifest
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import SplitPlan, even_layers, parse_layers, plan_split


def split(
    model: Annotated[str, typer.Argument(help="Folder of a model, GGUF file, or Hugging Face id.")],
    stages: Annotated[
        int | None, typer.Option(help="Number of stages, layers shared out.", min=1)
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers per stage, as in 8+8+8+8.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; default: as stored, float32 if dequantized."
        ),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help=help_of("tokenizer"))] = "",
    offline: Annotated[bool, typer.Option(help="Look for an id only in the local cache.")] = False,
) -> None:
    """Split MODEL into stage folders that the workers load."""
    if (stages is None) == (layers is None):
        raise ValueError("give either --stages N or --layers 8+8+8+8")
    model = bundled(model)
    path = resolve_model(model, offline=offline)
    checkpoint = open_checkpoint(path, tokenizer=resolve_tokenizer(tokenizer, offline=offline))
    # The manifest travels to other devices, so it has only the last part of the private path.
    model_id = checkpoint.name if Path(model).exists() else model
    if layers is None:
        assert stages is not None
        counts = even_layers(checkpoint.config.num_layers, stages)
    else:
        counts = parse_layers(layers)
    plan = plan_split(checkpoint, layers=counts, dtype=dtype)
    checkpoint.check_tokenizer()  # raises before anything is written
    out = out or Path("out") / f"{model_id.rsplit('/', maxsplit=1)[-1]}-{len(counts)}stages"
    manifest = _run(plan, out, model_id)
    _report(manifest, out)


def _run(plan: SplitPlan, out: Path, model_id: str) -> Manifest:
    columns = (TextColumn("splitting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # The bar goes to stderr, so that the report can be piped; a log gets no bar.
    console = Console(stderr=True)
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with signals.undoing(), bar:
        task = bar.add_task("split", total=plan.total_bytes)

        def advance(count: int) -> None:
            signals.check()
            bar.advance(task, count)

        return run_split(plan, out, model_id=model_id, on_bytes=advance, on_wait=say_on_stderr)


def _report(manifest: Manifest, out: Path) -> None:
    for folder in ("head", *(f"stage_{k + 1}" for k in range(manifest.num_stages))):
        size = sum(r.bytes for name, r in manifest.files.items() if name.startswith(folder + "/"))
        about = "embedding, lm_head, tokenizer"
        if folder != "head":
            first, last = manifest.layer_range(int(folder.removeprefix("stage_")))
            about = f"layers {first} to {last - 1}"
        typer.echo(f"{out / folder}  {size / 1e6:10.1f} MB  {about}")
    typer.echo(f"{manifest.model_id}: {manifest.num_stages} stages, {manifest.dtype}, whole.")
    command = f"flowspec run --model {shlex.quote(str(out))}"
    if is_bundled(str(out)):
        typer.echo(f"Next: {command}")
        return
    typer.echo(f"Next: {command} --drafter ngram")
    typer.echo("faster with a draft model made for it, --draft FOLDER in place of --drafter ngram")
