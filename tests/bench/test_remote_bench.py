"""A benchmark on a cluster of devices: what it asks, what it keeps, what it cannot know."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flowspec.bench.aggregate import summarize
from flowspec.bench.answering_remote import RemoteBench
from flowspec.bench.experiment import Plan, make_cases
from flowspec.bench.plots import kinds
from flowspec.bench.plots.theme import drawing, find_theme
from flowspec.bench.prompts import Prompt
from flowspec.bench.records import SampleFile, read_samples
from flowspec.bench.report import csv_report, tables
from flowspec.bench.runner import Outcome, run_plan
from flowspec.cli.bench import _report
from flowspec.cli.bench_remote import assemble_remote, cluster_drafters, disturbances
from flowspec.cli.ui import bench_table
from flowspec.engine.remote import Answer, LongPrompt, RemoteCluster
from flowspec.protocol.control import (
    Ask,
    Decoding,
    Done,
    Figures,
    ModelCard,
    Note,
    Piece,
    StageFigures,
    figures_of,
    stats_of,
)
from flowspec.request import (
    ClusterError,
    DecodeStats,
    FinishReason,
    RequestOutput,
    SamplingParams,
)

PROMPTS = (Prompt("1", "qa", ("who?",)), Prompt("2", "qa", ("what?", "and then?")))
STAGES = StageFigures(rows_pruned=2, rows_run_by_last=13, busy_s=(0.5, 0.25))


def stats(num_tokens: int = 5) -> DecodeStats:
    """A token every quarter of a second; the drafter at work for a fifth of the time."""
    found = DecodeStats(submitted_at=10.0, num_rows_sent=9, num_verdicts=4, draft_s=0.2)
    for number in range(num_tokens):
        found.count_tokens(1, 11.0 + number / 4)
    found.finished_at = found.last_token_at
    return found


def figures(**changes: Any) -> Figures:
    """Of an answer of five tokens."""
    about: dict[str, Any] = {"epoch": 1, "alone": True, "stages": STAGES, **changes}
    return figures_of(stats(), **about)


@dataclass
class Cluster:
    """Answers with the words it is asked; `fails_at`: the question at which it is gone."""

    fails_at: int = 0
    wrong: str = ""  # the strategy whose text differs
    too_long: Sequence[str] = ()
    too_large: Sequence[tuple[str, str]] = ()  # strategy and words
    refused: Sequence[str] = ()  # by the chat template
    answered: Figures = field(default_factory=figures)
    asked: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    num_stages: int = 2
    devices: Sequence[str] = ("ada: layers 0 to 3", "bob: layers 4 to 7")

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        decoding: Decoding,
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
    ) -> Answer | LongPrompt:
        """As a RemoteCluster does."""
        del sampling, max_new_tokens
        words = tuple(one["content"] for one in messages)
        self.asked.append((decoding.strategy, decoding.run, words))
        if len(self.asked) == self.fails_at:
            raise ClusterError("head at here:7000", "connection lost")
        if words[-1] in self.too_long:
            return LongPrompt(4000)
        if words[-1] in self.refused:
            return LongPrompt(0, "the template says no", refused=True)
        if (decoding.strategy, words[-1]) in self.too_large:
            return LongPrompt(9, "it needs 90 rows")
        tokens = (1, 2, 3, 4, 6 if decoding.strategy == self.wrong else 5)
        completion = RequestOutput(
            request=1,
            tokens=tokens,
            text=f"answer to {words[-1]}",
            reason=FinishReason.LENGTH,
            stats=stats_of(self.answered),
        )
        return Answer(9, completion, self.answered)

    @property
    def by_strategy(self) -> list[str]:
        """Which answered, in order."""
        return [strategy for strategy, _, _ in self.asked]


def make_plan(*strategies: str, **changes: Any) -> Plan:
    """On a cluster of two devices."""
    values: dict[str, Any] = {
        "cluster": "here:7000",
        "model": "big",
        "table": "main",
        "stages": 2,
        "cases": make_cases(strategies, ("eagle",), {}, {}),
        "datasets": {"qa": PROMPTS},
        "temperatures": (0.0,),
        "seeds": (1,),
        "max_tokens": 8,
        "target": None,
        "real": True,
        "warm": True,
        "remote": {"devices": ["ada", "bob"], "dtype": "float16"},
        "sources": {"code": "c", "target": "t", "eagle": "e"},
    }
    return Plan(**{**values, **changes})


def run(plan: Plan, cluster: Cluster, out: Path) -> Outcome:
    """What is missing in `out`."""
    bench = RemoteBench(plan, cluster)  # type: ignore[arg-type]
    with SampleFile(out) as file:
        return run_plan(plan, file, jobs=1, tell=lambda now: None, bench=bench)


def test_plain_decoding_is_the_truth_and_asked_once(tmp_path):
    """It comes first; its samples are those answers, and a second turn holds the first's."""
    cluster = Cluster()
    outcome = run(make_plan("streaming", "ar"), cluster, tmp_path)
    assert cluster.by_strategy == ["ar"] * 3 + ["streaming"] * 3
    assert cluster.asked[2][2] == cluster.asked[5][2] == ("what?", "answer to what?", "and then?")
    assert len(outcome.samples) == 6
    assert not any(sample.mismatch for sample in outcome.samples)
    labels = [label for _, label, _ in cluster.asked]
    assert labels[0] == labels[2] != labels[3] == labels[5]


def test_a_text_that_differs_from_it_is_a_mismatch(tmp_path):
    """Whether or not plain decoding is in the table."""
    cluster = Cluster(wrong="streaming")
    outcome = run(make_plan("streaming"), cluster, tmp_path)
    assert cluster.by_strategy == ["ar"] * 3 + ["streaming"] * 3
    assert [(s.strategy, s.mismatch) for s in outcome.samples] == [("streaming", True)] * 3


def test_what_a_cluster_tells_and_what_not(tmp_path):
    """Shares of the decode time; no cause, no link, no bound."""
    sample = run(make_plan("ar"), Cluster(), tmp_path).samples[0]
    assert (sample.decode_s, sample.ttft_s, sample.prompt_tokens) == (1.0, 1.0, 9)
    assert (sample.rows_sent, sample.rows_pruned, sample.rows_wasted) == (9, 2, 0)
    assert sample.stage_busy == (0.5, 0.25)
    assert sample.drafter_busy == pytest.approx(0.2)
    assert (sample.stage_idle, sample.link_bytes, sample.bound_share) == ((), {}, None)
    assert (sample.emulated, sample.warm, sample.devices) == (False, True, tuple(Cluster().devices))


def test_an_outage_is_no_decode_time(tmp_path):
    """The stages' totals are not known then."""
    broken = figures(stages=None).model_copy(update={"num_resumes": 1, "resume_s": 0.5})
    outcome = run(make_plan("ar"), Cluster(answered=broken), tmp_path)
    sample = outcome.samples[0]
    assert (sample.resumes, sample.outage_s, sample.decode_s) == (1, 0.5, 0.5)
    assert sample.decode_tokens_per_s == pytest.approx(8.0)
    assert (sample.rows_pruned, sample.rows_wasted, sample.stage_busy) == (None, None, ())
    assert list(disturbances(outcome)) == [
        "3 of the answers went on after a device was lost; outages are no decode time"
    ]


def test_every_turn_is_kept_when_it_is_finished(tmp_path):
    """A head that goes away ends the run; the same command goes on with the set, nothing twice."""
    plan = make_plan("ar", "streaming")
    with pytest.raises(ClusterError, match="connection lost"):
        run(plan, Cluster(fails_at=5), tmp_path)
    assert len(read_samples(tmp_path)) == 4
    again = Cluster()
    outcome = run(plan, again, tmp_path)
    assert (len(outcome.samples), outcome.num_run) == (6, 2)
    assert again.by_strategy == ["ar"] * 3 + ["streaming"] * 3  # the truth is not in the file
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    idle = Cluster()
    assert run(plan, idle, tmp_path).num_run == 0
    assert idle.asked == []


def test_repeats_share_one_truth(tmp_path):
    """So that a repeat of plain decoding that differs is noticed."""
    cluster = Cluster()
    outcome = run(make_plan("ar", "streaming", repeats=2), cluster, tmp_path)
    assert cluster.by_strategy == [*["ar"] * 3, *["streaming"] * 3] * 2
    assert [sample.repeat for sample in outcome.samples] == [0] * 6 + [1] * 6


def test_a_conversation_that_is_refused_is_left_out_from_its_later_turn(tmp_path):
    """A first turn ends the benchmark: the file is to be mended, whose line is named."""
    outcome = run(make_plan("ar"), Cluster(refused=["and then?"]), tmp_path)
    assert [(s.question, s.turn) for s in outcome.samples] == [("1", 0), ("2", 0)]
    assert [(one.turn, one.reason) for one in outcome.too_long] == [(1, "the template says no")]
    first = replace(PROMPTS[0], where="ask.jsonl:3")
    plan = make_plan("ar", datasets={"qa": (first,)})
    with pytest.raises(ValueError, match=r"ask\.jsonl:3: the template says no"):
        run(plan, Cluster(refused=["who?"]), tmp_path / "other")


def test_a_turn_that_is_too_long_is_left_out(tmp_path):
    """With those after it, and counted once."""
    cluster = Cluster(too_long=["and then?"])
    outcome = run(make_plan("ar", "streaming"), cluster, tmp_path)
    assert len(outcome.samples) == 4
    ((one,), (line,)) = outcome.too_long, (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert (one.question, one.turn, one.num_turns, one.prompt_tokens) == ("2", 1, 1, 4000)
    assert json.loads(line)["key"] == one.key


def test_devices_models_and_truth_are_part_of_a_sample_s_key():
    """Records of other ones are not taken for these."""
    plan = make_plan("ar")
    others = [
        replace(plan, remote={**(plan.remote or {}), "devices": ["ada", "cyd"]}),
        replace(plan, remote={**(plan.remote or {}), "dtype": "float32"}),
        replace(plan, sources={**plan.sources, "target": "another"}),
        replace(plan, remote=None),
    ]
    keys = {
        key
        for one in (plan, *others)
        for group in one.groups()
        for key in one.keys(one.cases[0], group).values()
    }
    assert len(keys) == 5 * 3


def told(monkeypatch: pytest.MonkeyPatch, plan: Plan, outcome: Outcome) -> str:
    """What the command prints."""
    console = Console(width=120, record=True)
    monkeypatch.setattr(bench_table, "Console", lambda width: console)
    _report(plan, outcome, Path("out"), None)
    return console.export_text()


@pytest.mark.parametrize("stages", [STAGES, None])
def test_tables_reports_and_plots_leave_out_what_is_not_known(
    tmp_path, monkeypatch, capsys, stages
):
    """No made-up 0, no traceback."""
    plan = make_plan("ar", "streaming")
    outcome = run(plan, Cluster(answered=figures(stages=stages)), tmp_path)
    table = told(monkeypatch, plan, outcome)
    assert "big on here:7000, 2 stages, table main (measured on a cluster of devices)" in table
    assert "0 differ from plain decoding on the cluster" in capsys.readouterr().out
    assert "waiting for" not in table
    assert ("each stage busy" in table) is (stages is not None)
    columns = {column for one in tables(outcome.samples) for column in one.columns}
    assert ("pruned" in columns) is ("stages busy %" in columns) is (stages is not None)
    assert not columns & {"waiting for link", "upstream busy", "of the bound"}
    csv_report(outcome.samples)
    ((_, rows),) = summarize(outcome.samples).items()
    assert {row.rows_pruned is None for row in rows} == {stages is None}
    theme = find_theme("light")
    with drawing(theme):
        kinds.speedup(outcome.samples, theme, "ar")
        if stages is None:
            with pytest.raises(ValueError, match="no record says what its stages did"):
                kinds.time(outcome.samples, theme, "ar")
        else:
            kinds.time(outcome.samples, theme, "ar")
        with pytest.raises(ValueError, match="do not say link_mbps"):
            kinds.PLOTS["bandwidth"](outcome.samples, theme, "ar")


class Client:
    """A connection to a head that says what it is told to."""

    where = "head at here:7000"

    def __init__(self, *events: Piece | Note | Done, **status: Any) -> None:
        self.events = events
        self.now = {"healthy": True, "why": "", "epoch": 1, "max_context": 100, "devices": ()}
        self.now |= status

    def status(self) -> Any:
        """As it is."""
        return SimpleNamespace(**self.now)

    def new_ask(self, **fields: Any) -> Ask:
        """Checked as a real one."""
        return Ask.model_validate({"version": "0", "id": 1, **fields}, strict=False)

    def ask(self, ask: Ask) -> Iterator[Piece | Note | Done]:
        """What it is told to say."""
        assert ask.decoding is not None
        yield from self.events


def ask(client: Client, said: list[str] | None = None) -> Answer | LongPrompt:
    """One question."""
    cluster = RemoteCluster(client, (said if said is not None else []).append)  # type: ignore[arg-type]
    question = [{"role": "user", "content": "who?"}]
    decoding = Decoding(strategy="ar", parameters={"draft_topk": 1}, run="1")
    return cluster.ask(question, decoding, SamplingParams(seed=3), max_new_tokens=50)


def test_an_answer_is_put_together():
    """With why it waited."""
    pieces = Piece(id=1, tokens=(1, 2), text="a "), Piece(id=1, tokens=(3,), text="b")
    end = Done(id=1, reason="stop", prompt_tokens=7, figures=figures())
    said: list[str] = []
    client = Client(pieces[0], Note(id=1, text="bob is lost"), pieces[1], end)
    answer = ask(client, said)
    assert isinstance(answer, Answer)
    assert (answer.completion.tokens, answer.completion.text) == ((1, 2, 3), "a b")
    assert answer.num_prompt == 7
    assert answer.completion.stats.time_to_first_token_s == 1.0
    assert said == ["bob is lost"]


def test_what_a_head_refuses_is_told_in_its_words():
    """A prompt that is too long is none of its failures."""
    busy = Done(id=1, reason="error", error="the head serves another request", prompt_tokens=9)
    with pytest.raises(ClusterError, match="head at here:7000: the head serves another request"):
        ask(Client(busy))
    long = Done(id=1, reason="error", error="51 prompt tokens and 50 more", prompt_tokens=51)
    assert ask(Client(long)) == LongPrompt(51)
    refused = Done(
        id=1, reason="error", error="the template says no", refused=True, bad_prompt=True
    )
    assert ask(Client(refused)) == LongPrompt(0, "the template says no", refused=True)
    with pytest.raises(ClusterError, match="no figures"):
        ask(Client(Done(id=1, reason="stop")))
    with pytest.raises(ClusterError, match="not healthy: 2 of 8 layers"):
        ask(Client(healthy=False, why="2 of 8 layers are nobody's"))


def served_with(drafter: str, *, code: str = "", **card: str) -> Any:
    """A cluster as the command sees it."""
    values = {"model_id": "big", "model_hash": "b" * 64, "stored_dtype": "x", **card}
    status = SimpleNamespace(drafter=drafter, draft_hash="d", model=ModelCard(**values))
    status.max_context, status.code_hash = 100, code
    return SimpleNamespace(status=status, devices=["ada"], num_stages=1, num_kv_tokens=0)


def test_the_drafter_is_the_cluster_s():
    """Switches are free."""
    cluster = served_with("eagle3")
    assert cluster_drafters((), ("streaming",), cluster) == ("eagle3",)
    assert cluster_drafters(("eagle3+merge",), ("streaming",), cluster) == ("eagle3+merge",)
    assert cluster_drafters(("eagle3+graft",), ("streaming",), cluster) == ("eagle3+merge",)
    with pytest.raises(ValueError, match="served with eagle3; give --drafter eagle3.*serve MODEL"):
        cluster_drafters(("eagle",), ("streaming",), cluster)
    assert cluster_drafters((), ("ar",), served_with("none")) == ("none",)
    with pytest.raises(ValueError, match="served without a drafter.*flowspec serve MODEL"):
        cluster_drafters((), ("ar", "streaming"), served_with("none"))


def test_another_target_than_the_cluster_s_is_refused(tmp_path, monkeypatch):
    """With both hashes."""
    from tests.support.checkpoints import save_checkpoint

    monkeypatch.chdir(tmp_path)
    target = save_checkpoint(tmp_path / "tiny", num_layers=2) / "target"
    asked: dict[str, Any] = {"datasets": {}, "temperatures": (0.0,), "seeds": (1,)}
    asked |= {"head": "here", "max_tokens": 8, "table": "main"}
    with pytest.raises(ValueError, match=r"not the model of this cluster, big: .*bbbbbbbbbbbbbbbb"):
        assemble_remote((), served_with("eagle"), target=str(target), **asked)
    plan = assemble_remote((), served_with("eagle"), target=None, **asked)
    assert (plan.cluster, plan.target, plan.sources["eagle"]) == ("here:7000", None, "d")
