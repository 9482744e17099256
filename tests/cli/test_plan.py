"""A benchmark's plan: parameters from tables and options, and what makes two samples the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from flowspec.bench.experiment import Group, Plan, make_cases, parse_settings, read_table
from flowspec.bench.prompts import Prompt
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import load_emulation
from flowspec.speculation.strategies import ABLATIONS, STRATEGIES

BUNDLED = Path(__file__).resolve().parents[2] / "config" / "eval.yaml"
PROMPTS = (Prompt("1", "qa", ("who?",)), Prompt("2", "qa", ("what?", "and then?")))


def make_plan(**changes) -> Plan:
    """Two strategies on the reference testbed."""
    cases = make_cases(("ar", "streaming"), ("eagle",), {}, {})
    values = {
        "cluster": "jetson-5",
        "model": "vicuna-7b",
        "table": "main",
        "stages": 4,
        "cases": cases,
        "datasets": {"qa": PROMPTS},
        "temperatures": (0.0, 1.0),
        "seeds": (1, 2),
        "max_tokens": 32,
        "target": Path("target"),
        "emulations": {
            name: load_emulation("jetson-5", "vicuna-7b", drafter=name)
            for name in ("eagle", "none")
        },
        "sources": {"code": "c", "target": "t", "eagle": "e", "revision": "r"},
    }
    return Plan(**{**values, **changes})


def keys_of(plan: Plan) -> list[list[str]]:
    """Of every case in every group."""
    return [list(plan.keys(case, group).values()) for group in plan.groups() for case in plan.cases]


# Groups and keys --------------------------------------------------------------------------------


def test_a_seed_is_enough_without_chance():
    """Greedy decoding gives one answer, sampling one per seed."""
    groups = list(make_plan().groups())
    assert [(g.temperature, g.seed, g.prompts[0].id) for g in groups] == [
        (0.0, 1, "1"),
        (0.0, 1, "2"),
        (1.0, 1, "1"),
        (1.0, 1, "2"),
        (1.0, 2, "1"),
        (1.0, 2, "2"),
    ]
    warm = list(make_plan(warm=True).groups())
    assert [(g.temperature, g.seed, g.prompts) for g in warm] == [
        (0.0, 1, PROMPTS),
        (1.0, 1, PROMPTS),
        (1.0, 2, PROMPTS),
    ]


def test_every_sample_has_a_key_of_its_own():
    """Every turn, question, seed, temperature and strategy; the same each time."""
    keys = [key for some in keys_of(make_plan()) for key in some]
    assert len(set(keys)) == len(keys) == 2 * 3 * 3
    assert keys == [key for some in keys_of(make_plan()) for key in some]


SLOWER = {
    name: load_emulation("jetson-5-125mbit", "vicuna-7b", drafter=name)
    for name in ("eagle", "none")
}


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": "other"},
        {"model": "other"},
        {"table": "all"},
        {"max_tokens": 33},
        {"warm": True},
        {"emulations": SLOWER},
        {"emulations": {}, "real": True},
        {"sources": {"code": "changed", "target": "t", "eagle": "e"}},
        {"sources": {"code": "c", "target": "changed", "eagle": "e"}},
        {"datasets": {"qa": [replace(p, turns=("why?", *p.turns[1:])) for p in PROMPTS]}},
        {"datasets": {"other": PROMPTS}},
    ],
)
def test_whatever_could_change_a_figure_changes_the_keys(changes):
    """Or a resumed run would mix what does not belong together."""
    before, after = keys_of(make_plan()), keys_of(make_plan(**changes))
    assert not {key for some in before for key in some} & {key for some in after for key in some}


def test_what_cannot_change_a_figure_keeps_the_keys():
    """Another drafter file for ar, the revision, the company, where the model lies."""
    plan = make_plan()
    other = make_plan(
        sources={"code": "c", "target": "t", "eagle": "changed", "revision": "later"},
        datasets={"qa": PROMPTS[1:]},
        target=Path("elsewhere"),
    )
    ar, streaming = plan.cases
    group = Group("qa", (PROMPTS[1],), 0.0, 1)
    assert plan.keys(ar, group) == other.keys(ar, group)
    assert plan.keys(streaming, group) != other.keys(streaming, group)


def test_a_sample_says_what_its_key_covers_and_no_title_shows():
    """The same of all drafters but for the draft model: `ar` is every drafter's baseline."""
    plan = make_plan()
    ar, streaming = (plan.hashes(case) for case in plan.cases)
    assert (ar["draft"], streaming["draft"]) == ("", "e")
    assert {**ar, "draft": "e"} == streaming
    changed = make_plan(sources={"code": "x", "target": "y"}, emulations=SLOWER)
    assert all(changed.hashes(changed.cases[1])[name] != value for name, value in streaming.items())
    assert make_plan(emulations={}).hashes(plan.cases[0])["emulation"] == ""


def test_every_repeat_has_keys_of_its_own():
    """The first those of a run without repeats, so that such a run can be repeated later."""
    once, thrice = keys_of(make_plan(real=True)), keys_of(make_plan(real=True, repeats=3))
    flat = [key for some in thrice for key in some]
    assert len(set(flat)) == len(flat) == 3 * sum(map(len, once))
    assert {key for some in once for key in some} < set(flat)


def test_what_a_warm_cluster_has_answered_before_is_part_of_the_key():
    """Its costs and scores are learnt from it."""
    plan = make_plan(warm=True)
    case = plan.cases[1]
    after_one = plan.keys(case, Group("qa", PROMPTS, 0.0, 1))
    as_first = plan.keys(case, Group("qa", PROMPTS[1:], 0.0, 1))
    assert after_one["2", 0] != as_first["2", 0]
    longer = plan.keys(case, Group("qa", (*PROMPTS, Prompt("3", "qa", ("when?",))), 0.0, 1))
    assert after_one.items() <= longer.items()


# Parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["main", "all"])
def test_the_bundled_tables_are_sound(table):
    """Every strategy has its parameters; what the tables promise of fairness holds."""
    found = read_table(BUNDLED, table)
    assert set(found) == {*STRATEGIES, *ABLATIONS}
    cases = {c.strategy: c for c in make_cases(tuple(STRATEGIES), ("eagle",), found, {})}
    for name, case in cases.items():
        if name == "ar":
            assert case.parameters == {}
            continue
        on = table == "all"
        assert case.parameters["merge"] is on
        assert case.parameters["calibrate"] is (on or name == "streaming")
        if name != "streaming":
            assert case.parameters["coupled_drafting"] is on
    assert cases["streaming"].parameters["coupled_drafting"] is True


def test_options_beat_the_table_which_beats_the_defaults():
    """And a drafter's switches lie between."""
    table = {"streaming": {"segment_size": 48, "merge": False}}
    settings = parse_settings(
        ["streaming.draft_topk=5", "num_draft_tokens=99"], ("ar", "streaming")
    )
    ar, plain, merged = make_cases(("ar", "streaming"), ("eagle", "ngram+merge"), table, settings)
    default = STRATEGIES["streaming"].defaults.model_dump()
    assert (ar.drafter, ar.parameters) == ("none", {})  # no tree
    assert plain.parameters == {
        **default,
        "segment_size": 48,
        "draft_topk": 5,
        "num_draft_tokens": 99,
    }
    assert (merged.drafter, merged.drafter_name) == ("ngram+merge", "ngram")
    assert merged.parameters["merge"] is True
    config = merged.config(EngineConfig())
    assert (config.strategy, config.drafter) == ("streaming", "ngram")
    assert config.decode["draft_topk"] == 5


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("segment_size", ["key=value"]),
        ("=3", ["key=value"]),
        ("pipedec.draft_topk=3", ["pipedec", "streaming"]),
        ("streaming.=3", ["streaming"]),
    ],
)
def test_what_is_no_setting_is_refused(setting, names):
    """With the form it needs."""
    with pytest.raises(ValueError, match="--set") as error:
        parse_settings([setting], ("ar", "streaming"))
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("setting", ["streaming.speed=3", "streaming.draft_topk=many"])
def test_unknown_parameters_are_refused_by_strategy(setting):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match="strategy streaming"):
        make_cases(("streaming",), ("eagle",), {}, parse_settings([setting], ("streaming",)))


def test_a_table_may_switch_off_what_a_strategy_does_not_have(tmp_path):
    """Tables of earlier versions do so for ar; a switch that is on is refused."""
    path = tmp_path / "own.yaml"
    path.write_text("old: {every: {merge: true}, ar: {graft: false, calibrate: false}}\n")
    found = read_table(path, "old")
    assert (found["ar"], found["streaming"]) == ({}, {"merge": True})
    path.write_text("old: {ar: {calibrate: true}}\n")
    with pytest.raises(ValueError, match="old: ar: calibrate is no parameter of strategy ar"):
        read_table(path, "old")
    path.write_text("old: {ar: {speed: false}}\n")
    with pytest.raises(ValueError, match="old: ar: speed is no parameter of strategy ar"):
        read_table(path, "old")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("main: {}\n", ["other", "main"]),
        ("- 1\n", ["tables"]),
        ("other: {warp: {draft_topk: 3}}\n", ["other", "warp", "streaming"]),
        ("other: {streaming: {speed: 3}}\n", ["other", "streaming", "speed"]),
        ("other: {streaming: 3}\n", ["other", "map"]),
        ("other: [1]\n", ["other", "map"]),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name(tmp_path, text, names):
    """File, table, strategy, key."""
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"own\.yaml") as error:
        read_table(path, "other")
    assert all(name in str(error.value) for name in names)
