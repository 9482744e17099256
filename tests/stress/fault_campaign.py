"""Fault campaign: thousands of runs with every kind of fault; the text must stay right.

    python -m tests.stress.fault_campaign --seeds 2000             # simulated, on a virtual clock
    python -m tests.stress.fault_campaign --seeds 1 --first 4711   # one of them again
    python -m tests.stress.fault_campaign --real 200               # real processes, real signals

Simulated: a tiny model, random drafter, requests and delays, a random strategy for the cluster and
another one for every second request; stages crash and come back, also in another number;
connections are cut and lose what is on them; messages are lost, doubled and overtaken. Real: see
tests/stress/real_faults.py. Wanted: every answer token for token the target's own, every request
answered, an end in bounded time. Exit code 1: something else happened; the seeds are printed.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from flowspec.protocol.messages import Submit
from flowspec.request import ClusterError, Decoding, Request, RequestOutput
from flowspec.simulator.faults import FaultPlan, FaultySimulator
from flowspec.simulator.simulator import adversarial, instant_link, unit_work
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from tests.support.clusters import make_cluster, small
from tests.support.scripted import drafter_named
from tests.support.tiny import PROMPT, SAMPLINGS, expected, request, stage_models

ROOT = Path(__file__).resolve().parents[2]


PLANS = {
    "crash": FaultPlan(crash_every_s=10.0),
    "crash, other number": FaultPlan(crash_every_s=10.0, other_counts=(1, 2, 3, 4)),
    "cut": FaultPlan(cut_every_s=5.0),
    "drop": FaultPlan(drop=0.02),
    "duplicate": FaultPlan(duplicate=0.1),
    "reorder": FaultPlan(reorder=0.03),
    "all": FaultPlan(
        crash_every_s=20.0,
        cut_every_s=10.0,
        drop=0.002,
        duplicate=0.02,
        reorder=0.005,
        other_counts=(1, 2, 3, 5),
    ),
}
DRAFTERS = ("mixed", "perfect", "hostile", "ngram", "eagle", "draft_model")
MAX_VIRTUAL_S = 5_000.0  # an undisturbed run takes a tenth


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's run; `wrong` describes a failure, or is empty."""

    plan: str
    wrong: str
    counts: dict[str, int]
    virtual_s: float


def run_seed(seed: int) -> Outcome:
    """Run one cluster with a few requests and one plan of faults."""
    random = Random(seed)
    name = list(PLANS)[seed % len(PLANS)]
    num_stages = random.randint(1, 5)
    charges = adversarial(seed) if random.random() < 0.3 else (unit_work, instant_link)
    cluster = make_cluster(
        num_stages,
        random.choice(sorted(STRATEGIES)),
        drafter=drafter_named(random.choice(DRAFTERS), seed=seed),
        limits={"max_num_seqs": random.randint(1, 3), "max_cached": random.randint(0, 1)},
    )
    head = cluster.head
    head.resumes = True
    simulator = FaultySimulator(
        {0: head, **{stage.rank: stage for stage in cluster.stages}},
        work_time=charges[0],
        link_time=charges[1],
        plan=PLANS[name],
        seed=seed,
        new_stage=lambda rank, count, epoch: Stage(
            rank, count, stage_models(count)[rank - 1], epoch=epoch
        ),
    )
    asked = [_request(random, number) for number in range(1, random.randint(2, 4))]
    open_ids = {one.id for one in asked}
    simulator.epoch_of_head = lambda: head.pipe.epoch
    simulator.outage_of_head = lambda: head.outage
    simulator.is_idle = lambda: not open_ids
    wrong = _serve(simulator, open_ids, asked)
    return Outcome(name, wrong, simulator.totals.counts, simulator.now)


def _request(random: Random, number: int) -> Request:
    length = random.choice((1, 6, 11))
    sampling = random.choice(SAMPLINGS)
    # a few lengths, so that the target's own answers are computed once
    count = random.choice((6, 14, 24))
    asked = request(number, prompt=PROMPT[:length], sampling=sampling, max_new_tokens=count)
    if random.random() < 0.5:
        return asked
    strategy = random.choice(sorted(STRATEGIES))
    parameters = small(strategy, merge=random.random() < 0.3)
    return replace(asked, decoding=Decoding(strategy=strategy, parameters=parameters))


def _serve(simulator: FaultySimulator, open_ids: set[int], asked: list[Request]) -> str:
    """Serves the requests, taking each out of `open_ids` as it ends; returns what went wrong."""
    for one in asked:
        simulator.submit(Submit(request=one))
    done: dict[int, RequestOutput] = {}
    try:
        while open_ids and simulator.now < MAX_VIRTUAL_S and simulator.step():
            while simulator.to_client:
                event = simulator.to_client.popleft()
                if isinstance(event, RequestOutput):
                    assert event.request not in done, f"request {event.request}: a second end"
                    done[event.request] = event
                    open_ids.discard(event.request)
    except (ClusterError, AssertionError, LookupError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    if open_ids:
        return f"no end after {simulator.now:.0f} virtual s: {sorted(open_ids)} are open"
    return _find_wrong(asked, done)


def _find_wrong(asked: list[Request], done: dict[int, RequestOutput]) -> str:
    for one in asked:
        if done[one.id].error is not None:
            return f"request {one.id}: {done[one.id].error}"
        if list(done[one.id].tokens) != expected(one):
            return f"request {one.id}: not the target's tokens"
    return ""


def run_simulated(first: int, count: int) -> int:
    """Run the seeds and print totals; return the number of runs that failed."""
    started = time.monotonic()
    totals: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    bad = 0
    longest = 0.0
    for seed in range(first, first + count):
        outcome = run_seed(seed)
        totals.update(outcome.counts)
        runs[outcome.plan] += 1
        longest = max(longest, outcome.virtual_s)
        if outcome.wrong:
            bad += 1
            print(f"seed {seed} ({outcome.plan}): {outcome.wrong}", flush=True)
    print(f"{count} seeds from {first} in {time.monotonic() - started:.0f} s: {bad} went wrong")
    print("runs: " + ", ".join(f"{name} {n}" for name, n in sorted(runs.items())))
    print("faults: " + ", ".join(f"{name} {n}" for name, n in sorted(totals.items())))
    print(f"longest run: {longest:.0f} virtual s")
    return bad


def main() -> int:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many simulated runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--real", type=int, default=0, help="how many faults in real processes")
    options = parser.parse_args()
    if options.real:
        from tests.stress.real_faults import run_real

        return int(run_real(options.real, seed=options.first) > 0)
    return int(run_simulated(options.first, options.seeds) > 0)


if __name__ == "__main__":
    sys.exit(main())
