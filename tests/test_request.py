"""Parameters are checked where they are made; statistics are plain arithmetic."""

from typing import Any

import pytest

from flowspec.request import (
    ClusterError,
    DecodeStats,
    Request,
    SamplingParams,
    cause_of,
    rank_name,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("min_p", 1.0),
        ("min_p", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
        ("acceptance", ""),
        ("acceptance", "r" * 65),
        ("acceptance", "règle"),
    ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: Any) -> None:
    """A parameter out of range must not reach a device; the message names it."""
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 100.0, "top_k": 1, "top_p": 1.0, "min_p": 0.99, "seed": 2**63 - 1},
        {"temperature": 1e-9, "top_p": 1e-9},
    ],
)
def test_edges_of_sampling_are_accepted(values: dict[str, Any]) -> None:
    """The documented ranges are closed where they say so."""
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ()}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("",)}, "stop string"),
        ({"stop": ("ok", "")}, "stop string"),
    ],
)
def test_bad_requests_are_refused(values: dict[str, Any], message: str) -> None:
    """An empty stop string would end every text at once; an empty prompt has no last node."""
    with pytest.raises(ValueError, match=message):
        Request(**({"id": 1, "prompt": (1,)} | values))


def test_requests_cannot_change() -> None:
    """A request is shared by head, drafter and client."""
    request = Request(id=1, prompt=(1, 2))
    with pytest.raises(AttributeError):
        request.max_new_tokens = 3  # type: ignore[misc]


def test_statistics_of_nothing_are_zero() -> None:
    """A cancelled request has statistics too."""
    stats = DecodeStats()
    assert stats.mean_accepted_length == 0.0
    assert stats.tokens_per_s == 0.0
    assert stats.acceptance_by_depth() == []


def test_statistics() -> None:
    """tau is tokens per verdict; the first token's wait does not count as decode time."""
    stats = DecodeStats(
        num_tokens=9, num_verdicts=3, submitted_at=0.0, first_token_at=2.0, finished_at=6.0
    )
    assert stats.mean_accepted_length == 8 / 3  # the first token has no verdict
    assert stats.tokens_per_s == 2.0


def test_acceptance_by_depth() -> None:
    """Of 4 runs 3 found a token, 2 of these a second one, 1 of these a third."""
    assert DecodeStats(runs=[0, 1, 2, 3]).acceptance_by_depth() == [3 / 4, 2 / 3, 1 / 2]
    assert DecodeStats(runs=[0, 0]).acceptance_by_depth() == []
    # a run cut off by the end of the text reached its depth and failed nowhere
    assert DecodeStats(runs=[0, 1], run_length=1).acceptance_by_depth() == [2 / 3]
    assert DecodeStats(run_length=3).acceptance_by_depth() == [1.0, 1.0, 1.0]


def test_runs_end_with_a_miss_whatever_the_verdicts_between() -> None:
    """A strategy that asks once per level must show the same alpha as one that asks per tree."""
    per_tree, per_level = DecodeStats(), DecodeStats()
    per_tree.count_verdict(2, missed=True)
    for num_drafted, missed in ((1, False), (1, False), (0, True)):
        per_level.count_verdict(num_drafted, missed=missed)
    assert per_tree.runs == per_level.runs == [2]
    assert (per_tree.num_verdicts, per_level.num_verdicts) == (1, 3)


def test_cluster_error_keeps_what_was_generated() -> None:
    """The text up to the failure is the user's."""
    error = ClusterError("stage 3", "link closed", {1: (5, 6)})
    assert str(error) == "stage 3: link closed"
    assert (error.where, error.cause, error.tokens) == ("stage 3", "link closed", {1: (5, 6)})


@pytest.mark.parametrize(("rank", "name"), [(-1, "client"), (0, "head"), (4, "stage 4")])
def test_rank_names(rank: int, name: str) -> None:
    """Errors speak of devices, not of numbers."""
    assert rank_name(rank) == name


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            ValueError("stage_1/model.safetensors is corrupt"),
            "stage_1/model.safetensors is corrupt",
        ),
        (ValueError(), "ValueError"),
        (KeyError("x"), "KeyError: 'x'"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec"),
    ],
)
def test_a_cause_is_a_sentence_or_has_its_kind(error: Exception, cause: str) -> None:
    """What says what to do needs no Python before it; what does not is useless without."""
    assert cause_of(error).startswith(cause)
