#!/usr/bin/env python3
"""Train the bundled demo family: tokenizer, target, text, EAGLE heads, draft model, evaluation.

    python -m flowspec.training.train_demo all --corpus DIR --eval-data DIR

Needs: 2 CPU cores with bf16 instructions, 6 GiB of memory, a C++ compiler (torch.compile), the
packages torch, transformers, tokenizers, safetensors, networkx and sympy. No GPU, no network.
Takes about 3 h on two free cores: target 70 min, its own text 10 min, EAGLE-1 head 25 min, EAGLE-3
head 40 min, draft model 8 min, evaluation 16 min. Every step is resumable: a restarted step
continues from its checkpoint in --work, and a finished step is skipped. Delete its file there to
run it again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from flowspec.training import (
    chat_tokenizer,
    corpus,
    generate,
    tau,
    train_drafters,
    train_eagle3,
    train_target,
)
from flowspec.training.fast_llama import FastLlama, Shape, load_hf_tensors

logger = logging.getLogger("train_demo")

# glibc returns large blocks to the system after every step, and a training step asks for them
# again; keeping them, in one arena, saves a third of the time. Spinning threads for 0.1 ms
# between two parallel regions saves as much again.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "20000",
}
DRAFT_SHAPE = Shape(
    hidden_size=128, intermediate_size=384, num_layers=3, num_heads=2, num_kv_heads=2
)
MAX_SAMPLE = 1537
VOCAB_SIZE = 4096
# Share of the questions that the target answers for its drafters; 1 if not listed.
GENERATE_SHARE = {"factqa": 0.6}


def step_tokenizer(args: argparse.Namespace) -> None:
    """Train the byte-level BPE on the training text."""
    folder = args.work / "tokenizer"
    if (folder / "tokenizer.json").exists():
        return
    sets = corpus.load_pairs(args.corpus, "train")
    texts = (text for pairs in sets.values() for pair in pairs for text in pair)
    chat_tokenizer.save(chat_tokenizer.train(texts, VOCAB_SIZE), folder)


def step_target(args: argparse.Namespace) -> None:
    """Train the target, and write its folder in the Hugging Face layout."""
    folder = args.out / "target"
    if (folder / "model.safetensors").exists():
        return
    tokenizer = load_tokenizer(args)
    model = train_target.train(
        train_target.load_sets(tokenizer, args.corpus, "train", MAX_SAMPLE),
        train_target.load_sets(tokenizer, args.corpus, "val", MAX_SAMPLE),
        shape=Shape(vocab_size=VOCAB_SIZE),
        plan=train_target.TargetPlan(minutes=args.target_minutes),
        checkpoint=args.work / "target.pt",
    )
    train_target.export(model, args.work / "tokenizer", folder)


def step_generate(args: argparse.Namespace) -> None:
    """Generate the target's own answers to questions of the training and held-out text."""
    for split, shares, name in (("val", {}, "held_out"), ("train", GENERATE_SHARE, "generated")):
        path = args.work / f"{name}.npz"
        if path.exists():
            continue
        tokenizer, rng = load_tokenizer(args), random.Random(0)
        sets = corpus.load_pairs(args.corpus, split)
        sets["toolformer"] = corpus.read_set(args.corpus, "toolformer", split, questions_only=True)
        prompts = []
        for which, pairs in sets.items():
            for question, _ in rng.sample(pairs, int(len(pairs) * shares.get(which, 1.0))):
                ids, start = corpus.encode(tokenizer, question, "")
                if start <= MAX_SAMPLE - 400:
                    prompts.append(np.array(ids[:start], dtype=np.uint16))
        samples = generate.self_generate(
            load_target(args), prompts, answers=args.answers, batch=128, max_new=args.max_new,
            minutes=args.generate_minutes, seed=0,
        )  # fmt: skip
        ends = np.cumsum([len(ids) for ids, _ in samples])
        starts = np.array([start for _, start in samples])
        np.savez(path, tokens=np.concatenate([ids for ids, _ in samples]), ends=ends, starts=starts)


def stored_samples(path: Path) -> list[corpus.Sample]:
    """Return the samples that the step `generate` wrote."""
    stored = np.load(path)
    pieces = np.split(stored["tokens"], stored["ends"][:-1])
    return list(zip(pieces, stored["starts"].tolist(), strict=True))


def drafter_samples(args: argparse.Namespace) -> tuple[list[corpus.Sample], list[corpus.Sample]]:
    """Return the generated text plus --corpus-share of the corpus, and the held-out text."""
    samples, held_out = (stored_samples(args.work / f"{n}.npz") for n in ("generated", "held_out"))
    wanted = int(args.corpus_share * len(samples))
    if not wanted:
        return samples, held_out
    sets = train_target.load_sets(load_tokenizer(args), args.corpus, "train", 1153)
    own = [sample for chosen in sets.values() for sample in chosen]
    return samples + random.Random(1).sample(own, min(len(own), wanted)), held_out


def drafter_blocks(
    args: argparse.Namespace,
) -> tuple[list[train_drafters.Blocks], list[train_drafters.Blocks]]:
    """Return both parts of `drafter_samples` in blocks."""
    samples, held_out = drafter_samples(args)
    return (
        train_drafters.make_blocks(samples, seed=0),
        train_drafters.make_blocks(held_out, seed=0),
    )


def step_eagle(args: argparse.Namespace) -> None:
    """Train the EAGLE head; write it in the public checkpoint layout."""
    folder = args.out / "eagle"
    if (folder / "model.safetensors").exists() and not args.init:
        return
    target = load_target(args)
    plan = train_drafters.HeadPlan(
        minutes=args.eagle_minutes, checkpoint=args.work / "eagle.pt", steps=args.unroll,
        init=args.init and args.init / "eagle", rate=args.rate,
    )  # fmt: skip
    head, figures = train_drafters.train_eagle(target, *drafter_blocks(args), plan)
    train_drafters.export_eagle(head, target, folder)
    write_figures(args, "eagle", figures)


def step_eagle3(args: argparse.Namespace) -> None:
    """Train the EAGLE-3 head; write it in the official checkpoint layout."""
    folder = args.out / "eagle3"
    if (folder / "model.safetensors").exists() and not args.init:
        return
    target = load_target(args)
    default = train_eagle3.default_layers(target.shape.num_layers)
    layers = tuple(map(int, args.eagle3_layers.split(","))) if args.eagle3_layers else default
    eagle = args.out / "eagle"
    begun = (eagle / "model.safetensors").exists() and layers[-1] == default[-1]
    plan = train_eagle3.Eagle3TrainingPlan(
        layers=layers,
        eagle=eagle if begun else None,
        draft_vocab=args.draft_vocab, minutes=args.eagle3_minutes,
        checkpoint=args.work / "eagle3.pt", steps=args.eagle3_unroll,
        init=args.init and args.init / "eagle3", rate=args.rate,
    )  # fmt: skip
    head, figures = train_eagle3.train(target, *drafter_samples(args), plan)
    train_eagle3.export(head, target, plan, folder)
    write_figures(args, "eagle3", figures)


def step_draft(args: argparse.Namespace) -> None:
    """Train the small draft model with the target's tokenizer."""
    folder = args.out / "draft"
    if (folder / "model.safetensors").exists():
        return
    draft, figures = train_drafters.train_draft(
        load_target(args), *drafter_blocks(args),
        shape=DRAFT_SHAPE, minutes=args.draft_minutes, checkpoint=args.work / "draft.pt",
    )  # fmt: skip
    train_target.export(draft, args.work / "tokenizer", folder)
    write_figures(args, "draft", figures)


def step_evaluate(args: argparse.Namespace) -> None:
    """Measure tau per evaluation set and acceptance by depth; print a table for each head."""
    torch.set_grad_enabled(False)
    tokenizer = tau.load_tokenizer(args.out / "target")
    modes = args.modes.split(",") if args.modes else list(tau.MODES)
    for head in args.heads.split(","):
        pair = tau.Pair.load(args.out / "target", args.out / head)
        table = tau.evaluate(
            pair, tokenizer, args.eval_data, prompts=args.prompts, max_new=args.max_new, modes=modes
        )
        write_figures(args, f"tau_{head}", table)
        sys.stdout.write(f"{head}\n{tau.show(table)}\n")
    texts = tau.sample_texts(pair, tokenizer, args.eval_data, per_set=3, max_new=args.max_new)
    write_figures(args, "samples", {"texts": texts})


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer of the first step."""
    return Tokenizer.from_file(str(args.work / "tokenizer" / "tokenizer.json"))


def load_target(args: argparse.Namespace) -> FastLlama:
    """Load the trained target, to compute hidden states."""
    model = FastLlama(Shape(vocab_size=VOCAB_SIZE))
    load_hf_tensors(model, load_file(args.out / "target" / "model.safetensors"))
    return model.requires_grad_(False)


def write_figures(args: argparse.Namespace, name: str, figures: dict[str, Any]) -> None:
    """Save the measured figures for the documentation."""
    (args.work / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


STEPS = {
    "tokenizer": step_tokenizer,
    "target": step_target,
    "generate": step_generate,
    "eagle": step_eagle,
    "eagle3": step_eagle3,
    "draft": step_draft,
    "evaluate": step_evaluate,
}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--corpus", type=Path, help="folder with <set>.train.jsonl.gz files")
    parser.add_argument("--eval-data", type=Path, help="folder of <set>/question.jsonl files")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="the model folders")
    parser.add_argument("--init", type=Path, help="folder of eagle and eagle3 heads to start from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on a head's learning rate")
    parser.add_argument(
        "--corpus-share", type=float, default=0.1, help="share of the corpus that is added"
    )
    parser.add_argument("--target-minutes", type=float, default=70)
    parser.add_argument("--eagle-minutes", type=float, default=25)
    parser.add_argument("--eagle3-minutes", type=float, default=40)
    parser.add_argument("--draft-minutes", type=float, default=8)
    parser.add_argument("--generate-minutes", type=float, default=10)
    parser.add_argument("--unroll", type=int, default=5, help="draft steps unrolled in training")
    parser.add_argument("--eagle3-unroll", type=int, default=7, help="like --unroll, for EAGLE-3")
    parser.add_argument("--eagle3-layers", default="", help="layers it reads, as in 1,3,4")
    parser.add_argument("--draft-vocab", type=int, default=3584, help="EAGLE-3's vocabulary size")
    parser.add_argument("--max-new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument(
        "--answers", type=int, default=2, help="answers per question; all but the first at T = 1"
    )
    parser.add_argument("--prompts", type=int, default=8, help="prompts per evaluation set")
    parser.add_argument("--modes", default="", help="some of: " + ", ".join(tau.MODES))
    parser.add_argument("--eager", action="store_true", help="do not compile; for short runs")
    parser.add_argument("--heads", default="eagle,eagle3", help="heads to evaluate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.step != "evaluate" and args.corpus is None:
        parser.error("--corpus DIR is needed to train")
    if args.step in ("evaluate", "all") and args.eval_data is None:
        parser.error("--eval-data DIR is needed to evaluate")
    return args


def main() -> None:
    """Run one step, or all in order."""
    args = parse()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ENVIRONMENT}
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch._dynamo.config.disable = args.eager
    # One graph per draft step and block length; beyond the limit, torch would not compile them.
    torch._dynamo.config.recompile_limit = 64
    args.work.mkdir(parents=True, exist_ok=True)
    for name in STEPS if args.step == "all" else [args.step]:
        STEPS[name](args)


if __name__ == "__main__":
    main()
