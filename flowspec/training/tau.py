"""Mean accepted length of chain and tree drafting, with the project's own model, cache and drafter.

It works in rounds, as a plain EAGLE-2 decoder: draft a tree, verify it in one forward, walk it with
the target's own tokens. tau = tokens gained per round. Shapes: n rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from flowspec.bench.records import repeated_share
from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import COMMITTED, TreeKVCache
from flowspec.model.stage_model import FINAL_NORM, StageModel
from flowspec.request import NO_NODE, Request, SamplingParams
from flowspec.speculation.acceptance import choose
from flowspec.speculation.drafters.base import Opening
from flowspec.speculation.drafters.checkpoint.kind import draft_weights, read_draft, recognise
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from flowspec.speculation.drafters.eagle.load import load_eagle
from flowspec.speculation.drafters.eagle3.drafter import Eagle3Drafter
from flowspec.speculation.drafters.eagle3.load import load_eagle3
from flowspec.speculation.tree import DraftTree, Node
from flowspec.weights.load import load_whole

SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "sum", "qa")
MAX_PROMPT = 1900


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree of `nodes` drafts, `depth` levels, `draft_topk` children a node; a chain has 1."""

    nodes: int
    depth: int
    draft_topk: int


CHAIN, TREE, DEEP = TreeShape(5, 5, 1), TreeShape(60, 7, 10), TreeShape(8, 8, 1)


@dataclass(slots=True)
class PromptResult:
    """The tokens and accepted lengths of one prompt."""

    tokens: list[int]
    accepted: list[int]  # accepted drafts of each round

    @property
    def rounds(self) -> int:
        """Return the number of verdicts."""
        return len(self.accepted)

    @property
    def tau(self) -> float:
        """Return tokens per round; the first token comes from the prompt's own forward."""
        return (len(self.tokens) - 1) / max(self.rounds, 1)


@dataclass(slots=True)
class Pair:
    """A target and its head, with the target's end token."""

    target: StageModel
    drafter: EagleDrafter | Eagle3Drafter
    eos: int = 2

    @classmethod
    def load(cls, target: Path, head: Path) -> Pair:
        """Load both in fp32, so that a tree's rows and a single row give the same text."""
        model = load_whole(target, dtype="float32")
        assert model.lm_head is not None, "a whole model has its lm_head"
        if recognise(read_draft(draft_weights(head))).family == "eagle":
            net = load_eagle(head, target_config=model.config, dtype="float32")
            return cls(model, EagleDrafter(net, model.lm_head.weight))
        net3 = load_eagle3(
            head,
            target_config=model.config,
            embedding=model.get_parameter("model.embed_tokens.weight"),
            dtype="float32",
        )
        return cls(model, Eagle3Drafter(net3))

    def feed(self, session: Any, hidden: Tensor, taps: Mapping[int, Tensor], where: Any) -> None:
        """Give the drafter the hidden states of rows at these positions, with rows of `hidden`."""
        for layer in self.drafter.aux_hidden_state_layers:
            rows = hidden if layer == FINAL_NORM else taps[layer]
            session.accept_hidden_states(layer, {p: rows[row] for p, row in where.items()})


def grow(
    session: object, tree: DraftTree, first: Sequence[tuple[int, float]], shape: TreeShape
) -> None:
    """EAGLE-2's tree: each level expands its `draft_topk` best nodes; the `nodes` best are kept."""
    beam: list[Node] = []
    for token, logprob in first:
        beam.append(tree.add(tree.root.id, token, logprob))
    for level in range(1, shape.depth):
        beam = tree.level(tree.root.position + level, shape.draft_topk)
        for proposal in session.expand(beam, tree):  # type: ignore[attr-defined]
            for token, logprob in proposal.children:
                tree.add(proposal.node, token, logprob)
    tree.keep_best(shape.nodes)


def verify(
    pair: Pair, cache: TreeKVCache, tree: DraftTree, sampling: SamplingParams, session: Any
) -> tuple[list[Node], list[int]]:
    """Walk the tree; return the accepted path (root first) and the token after each node."""
    model = pair.target
    nodes = tree.best_unsent(len(tree))
    row = {node.id: i for i, node in enumerate(nodes)}
    parents = [COMMITTED, *(row[node.parent] for node in nodes[1:])]
    tokens = torch.tensor([node.token for node in nodes])
    where = [node.position for node in nodes]
    layers = pair.drafter.aux_hidden_state_layers
    hidden, taps = run_rows(
        model, cache, tokens, where, parents=parents, aux_hidden_state_layers=layers
    )
    truth = choose(model.logits(hidden), [p + 1 for p in where], sampling)
    path, following = [tree.root], [truth[0]]
    while following[-1] in path[-1].children:
        path.append(tree[path[-1].children[following[-1]]])
        following.append(truth[row[path[-1].id]])
    cache.reroot([row[node.id] for node in path], [])
    session.accept(following)
    pair.feed(session, hidden, taps, {node.position: row[node.id] for node in path})
    return path, following


@torch.inference_mode()
def decode(
    pair: Pair,
    prompt: Sequence[int],
    sampling: SamplingParams,
    shape: TreeShape,
    max_new: int,
    coupled: bool,
) -> PromptResult:
    """Decode one prompt speculatively."""
    request = Request(id=0, prompt=tuple(prompt), sampling=sampling, max_new_tokens=max_new + 16)
    session = pair.drafter.open(
        Opening(request=request, draft_topk=shape.draft_topk, coupled=coupled)
    )
    cache = pair.target.new_cache(len(prompt) + max_new + 128)
    ids = torch.tensor(list(prompt))
    layers = pair.drafter.aux_hidden_state_layers
    where = range(len(prompt))
    hidden, taps = run_rows(
        pair.target, cache, ids, where, parents=None, aux_hidden_state_layers=layers
    )
    text = choose(pair.target.logits(hidden[-1:]), [len(prompt)], sampling)
    session.accept(list(prompt) + text)
    pair.feed(session, hidden, taps, {position: position for position in where})
    tree, accepted = DraftTree(), []
    tree.plant(NO_NODE, text[0], len(prompt))
    while len(text) < max_new and pair.eos not in text:
        proposal = None
        while session.num_rows_ready:
            proposal = session.prefill(tree)
        assert proposal is not None, "the root's features are known"
        grow(session, tree, proposal.children, shape)
        path, following = verify(pair, cache, tree, sampling, session)
        text += following
        accepted.append(len(path) - 1)
        tree.reroot(path[-1].id, following[-1])
    if pair.eos in text:
        text = text[: text.index(pair.eos) + 1]
    return PromptResult(text, accepted)


@torch.inference_mode()
def plain(pair: Pair, prompt: Sequence[int], sampling: SamplingParams, length: int) -> list[int]:
    """Decode with the target alone, token by token."""
    cache = pair.target.new_cache(len(prompt) + length + 8)
    ids = torch.tensor(list(prompt))
    hidden, _ = run_rows(pair.target, cache, ids, range(len(prompt)), parents=None)
    text: list[int] = []
    while len(text) < length:
        text += choose(pair.target.logits(hidden[-1:]), [len(prompt) + len(text)], sampling)
        position = [len(prompt) + len(text) - 1]
        hidden, _ = run_rows(pair.target, cache, torch.tensor(text[-1:]), position, parents=None)
    return text


def read_prompts(folder: Path, name: str, count: int, tokenizer: object) -> list[list[int]]:
    """Return the first turns of the first `count` questions that fit, in the chat template."""
    prompts = []
    for line in (folder / name / "question.jsonl").read_text(encoding="utf-8").splitlines():
        message = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        ids = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            message, add_generation_prompt=True, return_dict=False
        )
        if len(ids) <= MAX_PROMPT:
            prompts.append(list(ids))
    return prompts[:count]


MODES = {
    "greedy chain": (0.0, CHAIN, False),
    "greedy tree": (0.0, TREE, False),
    "T=1 coupled chain": (1.0, CHAIN, True),
    "T=1 coupled tree": (1.0, TREE, True),
    "T=1 usual tree": (1.0, TREE, False),
    "greedy chain of 8": (0.0, DEEP, False),
    "T=1 coupled chain of 8": (1.0, DEEP, True),
}


def evaluate(
    pair: Pair, tokenizer: object, data: Path, *, prompts: int, max_new: int, modes: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Map mode -> set -> {all, plain (non-looping), looping (count), equal (count), tokens}."""
    table: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in modes}
    for name in SETS:
        for number, prompt in enumerate(read_prompts(data, name, prompts, tokenizer)):
            references: dict[float, list[int]] = {}
            for mode in modes:
                temperature, shape, coupled = MODES[mode]
                sampling = SamplingParams(temperature=temperature, seed=number)
                sample = decode(pair, prompt, sampling, shape, max_new, coupled)
                if temperature not in references:
                    references[temperature] = plain(pair, prompt, sampling, len(sample.tokens))
                size = min(len(references[temperature]), len(sample.tokens))
                equal = references[temperature][:size] == sample.tokens[:size]
                row = table[mode].setdefault(name, {"samples": [], "equal": 0})  # type: ignore[dict-item]
                row["samples"].append(sample)  # type: ignore[attr-defined]
                row["equal"] += equal
    return {
        mode: {name: summary(row) for name, row in rows.items()} for mode, rows in table.items()
    }


def summary(row: Mapping[str, object]) -> dict[str, float]:
    """Return means of one set; `plain` leaves looping samples out.

    One-token answers have no rounds.
    """
    samples = [s for s in row["samples"] if s.rounds]  # type: ignore[attr-defined]
    straight = [s for s in samples if repeated_share(s.tokens) <= 0.3]
    return {
        "all": sum(s.tau for s in samples) / max(len(samples), 1),
        "plain": sum(s.tau for s in straight) / max(len(straight), 1),
        "looping": len(samples) - len(straight),
        "samples": len(samples),
        "equal": row["equal"],  # type: ignore[dict-item]
        "tokens": sum(len(s.tokens) for s in samples),
        "accepted": [n for s in samples for n in s.accepted],  # type: ignore[dict-item]
        "accepted_plain": [n for s in straight for n in s.accepted],  # type: ignore[dict-item]
    }


def by_depth(rows: dict[str, dict[str, Any]], key: str, depth: int) -> list[float]:
    """Return the share of rounds that accepted d drafts, of those that accepted d-1, by depth d."""
    rounds = [n for row in rows.values() for n in row[key]]
    shares = []
    for d in range(1, depth + 1):
        reached = sum(n >= d - 1 for n in rounds)
        shares.append(round(sum(n >= d for n in rounds) / max(reached, 1), 3))
    return shares


def show(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: tau over all samples / over non-looping samples."""
    lines = ["| mode | " + " | ".join(SETS) + " | mean | looping | equal to plain |"]
    lines.append("|" + "---|" * (len(SETS) + 4))
    for mode, rows in table.items():
        cells = [f"{rows[s]['all']:.2f} / {rows[s]['plain']:.2f}" for s in SETS]
        cells = [cell.replace(" / 0.00", " / –") for cell in cells]  # every sample looped
        means = []
        for key in ("all", "plain"):
            known = [rows[s][key] for s in SETS if rows[s][key] > 0]
            means.append(sum(known) / max(len(known), 1))
        count = sum(rows[s]["samples"] for s in SETS)
        looping, equal = (sum(rows[s][key] for s in SETS) for key in ("looping", "equal"))
        lines.append(
            f"| {mode} | {' | '.join(cells)} | **{means[0]:.2f} / {means[1]:.2f}** "
            f"| {looping:.0f} of {count:.0f} | {equal:.0f} |"
        )
    for mode, rows in table.items():
        depth = MODES[mode][1].depth
        shares = (by_depth(rows, key, depth) for key in ("accepted", "accepted_plain"))
        lines.append(f"{mode}, acceptance by depth: all {next(shares)}, not looping {next(shares)}")
    return "\n".join(lines)


def sample_texts(
    pair: Pair, tokenizer: object, data: Path, *, per_set: int, max_new: int
) -> list[dict[str, str]]:
    """Return the target's own answers to the first prompts, greedy and at temperature 1."""
    texts = []
    for name in SETS:
        for prompt in read_prompts(data, name, per_set, tokenizer):
            row = {"set": name, "prompt": tokenizer.decode(prompt)[:400]}  # type: ignore[attr-defined]
            for temperature in (0.0, 1.0):
                sampling = SamplingParams(temperature=temperature, seed=0)
                tokens = plain(pair, prompt, sampling, max_new)
                if pair.eos in tokens:
                    tokens = tokens[: tokens.index(pair.eos)]
                row[f"T={temperature:.0f}"] = tokenizer.decode(tokens)  # type: ignore[attr-defined]
            texts.append(row)
    return texts


def load_tokenizer(folder: Path) -> object:
    """Load the target's tokenizer with its chat template."""
    return AutoTokenizer.from_pretrained(folder)
