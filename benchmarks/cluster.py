"""A cluster on shaped links in network namespaces: how fast it starts, and how it handles faults.

    python -m benchmarks.cluster                    # join to first token, notice and resume
    python -m benchmarks.cluster --only faults --repeat 3
    python -m benchmarks.cluster --faults 200       # the campaign
    python -m benchmarks.cluster --json out.json

Needs root, Linux, `ip`, `tc` and `unshare`. It runs one `flowspec serve` with the bundled model and
four `flowspec join`, each in its own namespace and with its own cache, at 1 Gbit/s (--mbit). Times
are those of a client:

    first token   from the start of the `join` commands, including Python's imports, to the first
                  token of an answer that was requested at that moment; all workers serve
    notice        from a fault in the middle of an answer to the notice of it
    resume        from the fault to the next token; one worker is a spare

Every answer is compared with the target's own. The campaign causes random faults in all phases
(tests/stress/netns_cluster.py lists them), on devices and on the head, and heals them. It requires
no wrong token, no hang, no orphan and no lost request (an answer of a struck head may end in an
error that says so, but the tokens before it must be right). The exit code is 1 if one of these
happened. Nothing is left behind, even after Ctrl-C.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from flowspec.request import ClusterError
from tests.stress.netns_answers import MAX_ANSWER_S, SEED, Alone, Answer, Verdicts
from tests.stress.netns_cluster import INSIDE, KINDS, NetnsCluster, missing, run_inside, wait_until

PHASES = ("idle", "prefill", "decode", "join", "ship", "load", "head")
NUM_WORKERS = 4


def measure_start(cluster: NetnsCluster, alone: Alone, verdicts: Verdicts) -> list[dict[str, Any]]:
    """Measure join to first token, with empty caches and with filled ones."""
    rows = []
    for caches in ("cold", "warm"):
        for name in cluster.names:
            (cluster.folder / f"{name}.log").unlink(missing_ok=True)
        cluster.serve(stages=len(cluster.names), fresh=True)
        start = time.monotonic()
        for name in cluster.names:
            cluster.join(name, fresh=True)
        answer = Answer(cluster, 1, 32, 0.0)
        joined = cluster.wait_for("head", "joined", count=len(cluster.names))
        serving = cluster.wait_for("head", "serving: layers")
        verdicts.check(answer, alone, f"start, {caches} caches")
        assert answer.pieces, answer.error
        rows.append(
            {
                "caches": caches,
                "joined_s": joined - start,
                "serving_s": serving - start,
                "first_token_s": answer.pieces[0] - start,
            }
        )
        verdicts.check_end(cluster)
    return rows


def start_with_spare(cluster: NetnsCluster) -> None:
    """Start the cluster with one worker as a spare."""
    cluster.serve(stages=len(cluster.names) - 1)
    for name in cluster.names:
        cluster.join(name)
    if not cluster.wait_whole():
        raise RuntimeError(f"the cluster did not start:\n{cluster.log('head')[-3000:]}")


def measure_faults(
    cluster: NetnsCluster, alone: Alone, verdicts: Verdicts, repeat: int
) -> list[dict[str, Any]]:
    """Measure one fault in the middle of each answer."""
    start_with_spare(cluster)
    chance = random.Random(SEED)
    rows = []
    for kind in KINDS:
        for temperature in (0.0, 1.0) * repeat:
            answer = Answer(cluster, 1, 200, temperature)
            victim = chance.choice(cluster.stages())
            if not answer.wait_for(10):
                raise RuntimeError(f"an answer was over before the fault: {answer.error}")
            struck = cluster.strike(victim, kind)
            verdicts.check(answer, alone, f"{kind}, T={temperature}")
            noted = [when for when, _ in answer.notes if when >= struck]
            after = [when for when in answer.pieces if noted and when > noted[0]]
            if after:
                rows.append(
                    {
                        "kind": kind,
                        "temperature": temperature,
                        "notice_s": noted[0] - struck,
                        "resume_s": after[0] - struck,
                        "note": answer.notes[0][1],
                    }
                )
            cluster.heal(victim, kind)
            if not cluster.wait_whole():
                verdicts.hangs.append(f"{kind}: {victim} does not come back")
                break
    verdicts.check_end(cluster)
    return rows


class Campaign:
    """Random faults in all phases, each healed a little later."""

    def __init__(self, cluster: NetnsCluster, alone: Alone, verdicts: Verdicts, seed: int) -> None:
        self.cluster, self.alone, self.verdicts = cluster, alone, verdicts
        self.chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self._healers: list[threading.Thread] = []

    def run(self, count: int) -> None:
        """Cause at least `count` faults; end early if something hangs."""
        start_with_spare(self.cluster)
        number = 0
        while self.faults.total() < count and not self.verdicts.hangs:
            phase, kind = PHASES[number % len(PHASES)], self.chance.choice(KINDS)
            where = f"round {number}, {phase}: {kind}"
            self.round(phase, kind, float(self.chance.choice((0, 1))), where)
            number += 1
            print(f"{where}; {self.faults.total()} faults so far", file=sys.stderr)
        self.verdicts.check_end(self.cluster)

    def round(self, phase: str, kind: str, temperature: float, where: str) -> None:
        """Send one request, cause one or two faults, and check that the cluster recovers."""
        cluster, chance = self.cluster, self.chance
        stages = cluster.stages()
        victim = chance.choice(stages)
        if phase == "idle":
            self.strike(victim, kind, phase)
        words = chance.choice((1, 8)) if phase != "prefill" else 40
        answer = Answer(cluster, words, chance.choice((20, 60, 150)), temperature)
        if phase == "prefill":
            time.sleep(chance.uniform(0.0, 0.2))
            self.strike(victim, kind, phase)
        elif phase == "decode":
            answer.wait_for(chance.randint(1, 15))
            self.strike(victim, kind, phase)
        elif phase == "join":
            self.strike_newcomer(victim, kind)
        elif phase in ("ship", "load"):
            self.strike_loading(stages, kind, phase)
        elif phase == "head":
            answer.wait_for(chance.randint(0, 15))
            self.strike("head", kind, "answering")
        check = self.verdicts.check_cut if phase == "head" else self.verdicts.check
        check(answer, self.alone, where)
        for healer in self._healers:
            healer.join(MAX_ANSWER_S)
            if healer.is_alive():
                self.verdicts.hangs.append(f"{where}: a fault is not healed")
        self._healers.clear()
        if not cluster.wait_whole(MAX_ANSWER_S):
            self.verdicts.hangs.append(f"{where}: the devices do not all come back")
            return
        self.verdicts.check(Answer(cluster, 1, 20, temperature), self.alone, f"{where}, afterwards")

    def strike(self, victim: str, kind: str, phase: str) -> None:
        """Cause a fault now; heal it after less or more time than its detection takes."""
        self.cluster.strike(victim, kind)
        self.faults[f"{'head, ' * (victim == 'head')}{phase}: {kind}"] += 1
        delay_s = self.chance.uniform(0.2, 6.0)

        def heal() -> None:
            time.sleep(delay_s)
            self.cluster.heal(victim, kind)

        self._healers.append(threading.Thread(target=heal))
        self._healers[-1].start()

    def strike_newcomer(self, victim: str, kind: str) -> None:
        """Strike a returning device while it says hello."""
        self.cluster.strike(victim, "kill")
        self.faults["join: kill, before"] += 1
        self.cluster.heal(victim, "kill")
        time.sleep(self.chance.uniform(0.0, 1.5))
        self.strike(victim, kind, "join")

    def strike_loading(self, stages: list[str], kind: str, phase: str) -> None:
        """Strike the spare while it loads the layers of a stage that was killed."""
        cluster = self.cluster
        spare = next(name for name in cluster.names if name not in stages)
        if phase == "ship":
            shutil.rmtree(cluster.cache(spare), ignore_errors=True)
        told = cluster.log(spare).count("layers")
        self.strike(self.chance.choice(stages), "kill", f"{phase}, the stage before")
        wait_until(lambda: cluster.log(spare).count("layers") > told, 10.0, poll_s=0.005)
        time.sleep(self.chance.uniform(0.0, 0.3))
        self.strike(spare, kind, phase)


def print_tables(results: dict[str, Any]) -> None:
    """Print the measured times."""
    load = results["load_average"]
    print(f"load average {load[0]:.1f} before, {load[1]:.1f} after, {os.cpu_count()} cores")
    for row in results.get("start", ()):
        print(
            f"join to first token, {row['caches']} caches: all joined {row['joined_s']:.1f} s, "
            f"serving {row['serving_s']:.1f} s, first token {row['first_token_s']:.1f} s"
        )
    for kind in KINDS:
        rows = [row for row in results.get("faults", ()) if row["kind"] == kind]
        if rows:
            notice = sorted(row["notice_s"] for row in rows)
            resume = sorted(row["resume_s"] for row in rows)
            print(
                f"{kind:10} n={len(rows)}  notice {statistics.median(notice):.2f} s (longest "
                f"{notice[-1]:.2f})  resume {statistics.median(resume):.2f} s (longest "
                f"{resume[-1]:.2f})"
            )
    if campaign := results.get("campaign"):
        print(
            f"{sum(campaign.values())} faults: "
            + ", ".join(f"{k} {n}" for k, n in sorted(campaign.items()))
        )


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Measure what the options ask for, inside the namespaces; return the exit code."""
    before = os.getloadavg()[0]
    cluster = NetnsCluster(folder, NUM_WORKERS, options.mbit)
    alone, verdicts = Alone(cluster), Verdicts()
    results: dict[str, Any] = {"mbit": options.mbit}
    try:
        if options.faults:
            campaign = Campaign(cluster, alone, verdicts, options.seed)
            campaign.run(options.faults)
            results["campaign"] = dict(campaign.faults)
        else:
            if options.only != "faults":
                results["start"] = measure_start(cluster, alone, verdicts)
            if options.only != "start":
                results["faults"] = measure_faults(cluster, alone, verdicts, options.repeat)
    except (KeyboardInterrupt, RuntimeError, ClusterError) as error:
        print(f"stopped: {error or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    results["load_average"] = (before, os.getloadavg()[0])
    results["went_wrong"] = verdicts.bad
    for line in verdicts.bad:
        print(line)
    if options.logs and verdicts.bad:
        for log in folder.glob("*.log"):
            shutil.copy(log, options.logs)
    print_tables(results)
    print(verdicts.line())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if verdicts.bad else 0


def main() -> int:
    """Parse the command line, and continue inside the namespaces."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("start", "faults"), help="only one of the two parts")
    parser.add_argument("--repeat", type=int, default=1, help="faults of a kind and temperature")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="campaign of N faults")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the campaign")
    parser.add_argument("--mbit", type=float, default=1000.0, help="rate of each link")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--logs", type=Path, help="folder for all logs if something went wrong")
    options = parser.parse_args()
    if folder := os.environ.get(INSIDE):
        return measure(options, Path(folder))
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    return run_inside(sys.orig_argv[1:])


if __name__ == "__main__":
    sys.exit(main())
