"""Processor time of head and stages per segment: real processes, tiny model.

    python -m benchmarks.host [--tokens 300] [--num-draft-tokens 320] [--segment-size 64]
        [--cost flat|measured] [--draft-ms 1] [--profile FILE] [--json FILE]
        [--least-segments-per-s 200] [--most-core 0.5]

One head drives four stage processes over ZeroMQ with `streaming` and a random model of 4 layers, so
that the host's own work dominates. Two things differ from a real run:

- The drafter is a script that knows the true text and is right as often as a good head (first child
  0.7, any child 0.9). The time in its calls is subtracted, because a real drafter's time belongs to
  the draft model, not to the host. Each draft sleeps `--draft-ms` in its own thread, as the forward
  of a small model on an accelerator would; the next one begins as soon as possible. With 0, it is a
  look-up in the head's own thread, as an n-gram drafter's, and the head never rests.
- With `--cost flat`, the default, the head's cost model is one in which any number of rows costs
  the same, as on a memory-bound stage. On this tiny model, rows do have a cost, which makes
  segments small (`--cost measured`); full segments give the host the most work.

"head": processor time of the head's process per segment sent, over all threads, between the first
token and the last, without the drafter's calls. "stage": that of each stage process, including the
forwards. Processor time hardly depends on other programs on the machine; segments/s does.
`--profile` writes cProfile's figures of the head (which then costs more).

The goal for the head is 200 segments/s with half a core, on an idle machine. Neither is checked by
default, because segments/s on busy cores depends on the other programs. The exit code is 1 if the
text is not the target's own, or if a given threshold is missed.
"""

import argparse
import cProfile
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowspec.cli.common import BUNDLED
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.head.pipeline import SegmentCost
from flowspec.model.architecture import read_config
from flowspec.model.stage_model import StageModel
from flowspec.protocol.messages import Segment, WireMessage, segments_of
from flowspec.request import NodeId, Request
from flowspec.speculation.drafters.base import Draft, DraftJob, Lookup, Opening, Proposal
from flowspec.speculation.tree import DraftTree, Node
from flowspec.tokenizer import load_tokenizer
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_whole
from flowspec.weights.manifest import read_manifest
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import even_layers, plan_split

STAGES = 4
CONTEXT = 8192
SIZES = {
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_hidden_layers": STAGES,
    "max_position_embeddings": CONTEXT,
}
FIRST_RIGHT, ANY_RIGHT = 0.7, 0.9  # chance that the truth is the drafter's first child, any child
LOGPROBS = tuple(-0.4 - 0.9 * rank for rank in range(64))  # of its children by rank
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class FlatCost(SegmentCost):
    """t(n) left of the knee: a full segment of rows is always worth sending."""

    def milliseconds(self, rows: int) -> float:
        """Return the same time for any `rows`."""
        return 1.0


class ScriptedDrafter:
    """Right about `truth` as often as the constants say; measures the cost of its own calls."""

    name = "scripted"
    aux_hidden_state_layers = (
        -1,
    )  # as an EAGLE head, so that the verdicts' hidden states travel too

    def __init__(self, truth: Sequence[int], vocab_size: int, *, draft_s: float) -> None:
        self.truth = truth
        self.vocab_size = vocab_size
        self.draft_s = draft_s
        self.cpu_s = 0.0

    def open(self, opening: Opening) -> "ScriptedSession":
        """Begin with a request."""
        return ScriptedSession(self, opening.draft_topk)

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Return a draft of these jobs, which only sleeps or looks up."""
        start = time.thread_time()
        found = Forward(jobs, self.draft_s) if self.draft_s else Lookup(jobs)
        self.cpu_s += time.thread_time() - start
        return found


class Forward(Lookup):
    """A draft that takes its time, in the thread of a model's forward."""

    looked_up = False

    def __init__(self, jobs: Sequence[DraftJob], draft_s: float) -> None:
        super().__init__(jobs)
        self._draft_s = draft_s

    def run(self) -> None:
        """Sleep for the time of a forward, then propose."""
        time.sleep(self._draft_s)


class ScriptedSession:
    """The drafter's state of one request."""

    num_reusable = 0

    def __init__(self, drafter: ScriptedDrafter, draft_topk: int) -> None:
        self.drafter, self.draft_topk = drafter, draft_topk
        self.num_rows_ready = 0
        self._true: set[NodeId] = set()  # nodes on the true path

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the accepted tokens."""
        self.num_rows_ready += len(tokens)

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Ignore the hidden states, which an EAGLE head would need."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the number of rows that a real head would compute."""
        del tree
        return self.num_rows_ready if nodes is None else len(nodes)

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Propose children of the newest accepted token."""
        self.num_rows_ready = 0
        if not len(tree):
            return None
        self._true = {node for node in self._true if node in tree} | {tree.root.id}
        return self._propose(tree.root)

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Propose children of these nodes."""
        del tree
        return [self._propose(node) for node in nodes]

    def _propose(self, node: Node) -> Proposal:
        truth, random = self.drafter.truth, Random(node.position * 65536 + node.token)
        tokens = random.sample(range(self.drafter.vocab_size), self.draft_topk)
        if node.parent in self._true and node.token == truth[node.position]:
            self._true.add(node.id)
        luck = random.random()
        if node.id in self._true and node.position + 1 < len(truth) and luck < ANY_RIGHT:
            rank = 0 if luck < FIRST_RIGHT else random.randrange(1, self.draft_topk)
            tokens = [token for token in tokens if token != truth[node.position + 1]]
            tokens.insert(rank, truth[node.position + 1])
        return Proposal(node.id, tuple(zip(tokens[: self.draft_topk], LOGPROBS, strict=False)))


def make_split(folder: Path) -> Path:
    """Split a random model with the bundled tokenizer in `folder`, one layer per stage."""
    target = folder / "target"
    target.mkdir()
    for name in TOKENIZER_FILES:
        (target / name).write_bytes((BUNDLED / "target" / name).read_bytes())
    hf = json.loads((BUNDLED / "target" / "config.json").read_text()) | SIZES
    (target / "config.json").write_text(json.dumps(hf | {"torch_dtype": "float32"}))
    config = read_config(target)
    torch.manual_seed(0)
    model = StageModel(
        config, first_layer=0, last_layer=STAGES, with_embedding=True, with_head=True
    )
    weights = {
        name: torch.ones_like(weight) if weight.dim() == 1 else torch.randn_like(weight) * 0.2
        for name, weight in model.state_dict().items()
    }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    plan = plan_split(open_checkpoint(target), layers=even_layers(STAGES, STAGES), dtype=None)
    run_split(plan, folder / "split", model_id="bench")
    return folder / "split"


class Meter:
    """Measures the processor time of the head between segments, and of the stages."""

    def __init__(
        self, engine: LocalEngine, drafter: ScriptedDrafter, profile: cProfile.Profile | None
    ) -> None:
        """`profile` begins in the head's thread, at its first segment."""
        self.drafter, self.profile = drafter, profile
        self.stages = [psutil.Process(child.pid) for child in engine.children.values()]
        self.marks: list[float] = []  # the head's processor time at each segment sent
        self._send = engine.transport.send
        engine.transport.send = self._watch  # type: ignore[method-assign]

    def _watch(self, to: int, message: WireMessage) -> None:
        self._send(to, message)
        if isinstance(message, Segment) and not segments_of(message)[0].prefix:
            if self.profile and not self.marks:
                self.profile.enable()
            self.marks.append(self.head_s())

    def head_s(self) -> float:
        """Return processor seconds of this process, all threads, without the drafter's calls."""
        return time.process_time() - self.drafter.cpu_s

    def stages_s(self) -> list[float]:
        """Return the processor seconds of each stage."""
        return [sum(stage.cpu_times()[:2]) for stage in self.stages]


def measure(
    engine: LocalEngine, meter: Meter, request: Request
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the figures of one request from its first token to its last, and its tokens."""
    meter.marks.clear()
    stream = engine.submit(request)
    next(iter(stream))
    start, head, stages = time.monotonic(), meter.head_s(), meter.stages_s()
    drafter_s = meter.drafter.cpu_s
    answer = stream.result()
    wall, head, stats = time.monotonic() - start, meter.head_s() - head, answer.stats
    count = len(meter.marks)
    each = sorted((b - a) * 1e3 for a, b in zip(meter.marks[:-1], meter.marks[1:], strict=True))
    spent = [b - a for a, b in zip(stages, meter.stages_s(), strict=True)]
    figures = {
        "segments": count,
        "tokens": stats.num_tokens,
        "rows_per_segment": round(stats.num_rows_sent / count, 1),
        "drafts_per_segment": round(stats.num_draft_forwards / count, 2),
        "head_ms": round(head / count * 1e3, 3),
        "head_p50_ms": round(statistics.median(each), 3),
        "head_p99_ms": round(each[int(len(each) * 0.99) - 1], 3),
        "drafter_ms": round((meter.drafter.cpu_s - drafter_s) / count * 1e3, 3),
        "stage_ms": [round(one / count * 1e3, 3) for one in spent],
        "segments_per_s": round(count / wall, 1),
        "head_share_of_a_core": round(head / wall, 3),
    }
    return figures, answer.tokens


def missed(
    figures: dict[str, Any], *, least_segments_per_s: float | None, most_core: float | None
) -> list[str]:
    """Return a sentence for each threshold that the figures miss; None means no threshold."""
    found = []
    rate, share = figures["segments_per_s"], figures["head_share_of_a_core"]
    if least_segments_per_s is not None and not rate >= least_segments_per_s:
        found.append(f"{rate:g} segments/s are fewer than the {least_segments_per_s:g} asked for")
    if most_core is not None and not share <= most_core:
        found.append(f"the head took {share:g} of a core, more than the {most_core:g} asked for")
    return found


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=300, help="of the answer [300]")
    parser.add_argument("--num-draft-tokens", type=int, default=320, help="[320]")
    parser.add_argument("--segment-size", type=int, default=64, help="most rows [64]")
    parser.add_argument("--draft-topk", type=int, default=10, help="[10]")
    parser.add_argument(
        "--cost", choices=("flat", "measured"), default="flat", help="of a segment's rows [flat]"
    )
    parser.add_argument(
        "--draft-ms", type=float, default=1.0, help="of a drafter forward; 0: look-up [1]"
    )
    parser.add_argument("--profile", type=Path, help="write cProfile's figures of the head")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--least-segments-per-s", type=float, metavar="N", help="exit 1 if fewer [not checked]"
    )
    parser.add_argument(
        "--most-core",
        type=float,
        metavar="SHARE",
        help="exit 1 if the head takes more of a core, such as 0.5 [not checked]",
    )
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Measure a model made in `folder`; return the figures and whether the text is the target's."""
    split = make_split(folder)
    config = EngineConfig(
        model=str(split),
        drafter=ScriptedDrafter.name,
        decode={
            "num_draft_tokens": options.num_draft_tokens,
            "segment_size": options.segment_size,
            "draft_topk": options.draft_topk,
            "max_in_flight": STAGES,  # whatever the cores of this machine are
        },
        kept_prefixes=0,
    )
    tokenizer = load_tokenizer(split / "head")
    prompt = tuple(tokenizer.encode("The quick brown fox jumps over the lazy dog."))
    request = Request(id=1, prompt=prompt, max_new_tokens=options.tokens, eos_token_ids=())
    target = LocalTarget(load_whole(folder / "target"), CONTEXT)
    truth = [*prompt, *(t for t, _ in islice(target.stream(request), options.tokens))]
    drafter = ScriptedDrafter(truth, vocab_size=len(tokenizer), draft_s=options.draft_ms / 1e3)
    drafters = {drafter.name: drafter}
    parts = HeadParts(split, read_manifest(split), tokenizer, drafters, CONTEXT, ())
    profile = cProfile.Profile() if options.profile else None
    with LocalEngine(config, parts) as engine:
        if options.cost == "flat":
            engine.head.pipe.cost = FlatCost()
        figures, tokens = measure(engine, Meter(engine, drafter, profile), request)
    if profile:
        profile.dump_stats(options.profile)
    return figures, [*prompt, *tokens] == truth


def main() -> int:
    """Measure, print, and return the exit code."""
    options = parse_options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="flowspec-bench-") as name:
        figures, is_targets_text = run(options, Path(name))
    for key, value in figures.items():
        print(f"{key:22s} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    errors = missed(
        figures,
        least_segments_per_s=options.least_segments_per_s,
        most_core=options.most_core,
    )
    if not is_targets_text:
        errors.insert(0, "the text is not the target's own")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
