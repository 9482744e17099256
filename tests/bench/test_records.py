"""A benchmark's records are appended when finished and read back; damage is reported."""

import json
from dataclasses import asdict, fields

import pytest

from flowspec.bench.records import (
    FILE_NAME,
    LEFT_OUT_NAME,
    Sample,
    SampleFile,
    TooLong,
    hash_of,
    hash_tokens,
    read_samples,
)
from tests.support.samples import sample

# what reports and plots are made of; a name that changes here breaks older records
KEYS = """cluster model drafter strategy dataset question turn temperature seed stages table
parameters emulated prompt_tokens tokens token_hash mismatch finish ttft_s decode_s
decode_tokens_per_s end_to_end_tokens_per_s inter_token_ms tau runs alpha mu mu_not_drafted
mu_not_in_flight rows_sent rows_pruned rows_wasted segments draft_forwards drafter_busy stage_busy
stage_idle link_bytes tree_size bound_tokens_per_s bound_share versions revision host started_at
key max_tokens warm code target draft emulation
repeat repeated resumes outage_s devices alone rebuilt relearnt"""


def test_the_schema_is_what_readers_rely_on():
    """It has exactly these names."""
    assert {field.name for field in fields(Sample)} == set(KEYS.split())


def test_what_is_written_is_read_back(tmp_path):
    """This also works in a second process, and with the folder's name."""
    one, two = sample(), sample(question="31", bound_share=0.9, bound_tokens_per_s=11.0)
    with SampleFile(tmp_path / "new") as file:
        file.add(one)
        file.add(two)
    for path in (tmp_path / "new", tmp_path / "new" / FILE_NAME):
        assert read_samples(path) == [one, two]
    with SampleFile(tmp_path / "new") as file:
        assert one.key in file
        assert file[two.key] == two
        assert list(file.select([two.key, "other", one.key])) == [two, one]


def test_a_line_is_there_as_soon_as_its_sample_is_finished(tmp_path):
    """An interrupted run loses no finished sample."""
    with SampleFile(tmp_path) as file:
        file.add(sample())
        assert read_samples(tmp_path) == [sample()]


def test_a_half_written_line_is_left_out_and_overwritten(tmp_path):
    """A killed run leaves such a line."""
    with SampleFile(tmp_path) as file:
        file.add(sample())
    path = tmp_path / FILE_NAME
    with path.open("a") as end:
        end.write('{"cluster": "test')
    assert read_samples(tmp_path) == [sample()]
    with SampleFile(tmp_path) as file:
        file.add(sample(question="31"))
    assert read_samples(tmp_path) == [sample(), sample(question="31")]


def test_of_two_samples_with_one_key_the_later_counts(tmp_path):
    """A bound may be added to an earlier sample."""
    with SampleFile(tmp_path) as file:
        file.add(sample(key="k"))
        file.add(sample(key="other"))
        file.add(sample(key="k", bound_share=0.5))
    assert [(s.key, s.bound_share) for s in read_samples(tmp_path)] == [("other", None), ("k", 0.5)]


def test_records_of_older_versions_are_read_by_the_names_of_today(tmp_path):
    """Published files have the old ones; the same figure stands in one column of a table."""
    old = asdict(sample(strategy="streaming-grafted", drafter="eagle3+graft+calibrate"))
    old["parameters"] = {"tree_size": 60, "topk": 4, "graft": True, "segment_size": 8}
    (tmp_path / FILE_NAME).write_text(json.dumps(old) + "\n")
    (found,) = read_samples(tmp_path)
    assert (found.strategy, found.drafter) == ("streaming-merged", "eagle3+merge+calibrate")
    now = {"num_draft_tokens": 60, "draft_topk": 4, "merge": True, "segment_size": 8}
    assert found.parameters == now
    assert found.tree_size == sample().tree_size  # measured, and no parameter


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda record: record.pop("tau"), ["tau"]),
        (lambda record: record.update(tau="fast"), ["tau"]),
        (lambda record: record.update(colour="red"), ["colour", "unknown"]),
        (lambda record: record.update(stage_busy=[0.5, "x"]), ["stage_busy"]),
    ],
)
def test_what_is_no_sample_is_refused_by_file_and_line(tmp_path, damage, names):
    """It is not silently left out of a table."""
    record = json.loads(json.dumps(asdict(sample())))
    damage(record)
    good = json.dumps(asdict(sample()))
    (tmp_path / FILE_NAME).write_text(f"{good}\n{json.dumps(record)}\n{good}\n")
    with pytest.raises(ValueError, match=f"{FILE_NAME}:2") as error:
        read_samples(tmp_path)
    assert all(name in str(error.value) for name in (*names, "delete the line"))
    with pytest.raises(ValueError, match=f"{FILE_NAME}:2"):
        SampleFile(tmp_path)


def test_the_rows_of_json_are_no_records(tmp_path):
    """The error does not advise to delete anything: the records are elsewhere."""
    (tmp_path / "rows.json").write_text('[\n {"cluster": "jetson-5"}\n]\n')
    with pytest.raises(ValueError, match=r"rows\.json is a list, as .*--json.*of --out") as caught:
        read_samples(tmp_path / "rows.json")
    assert "delete" not in str(caught.value)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    """A file has its name."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="--out .*taken: this folder cannot be written: "):
        SampleFile(tmp_path / "taken")


@pytest.mark.parametrize("line", ["nonsense", "1", '"text"'])
def test_what_is_not_even_an_object_is_refused(tmp_path, line):
    """Such lines come from other programs."""
    (tmp_path / FILE_NAME).write_text(line + "\n")
    with pytest.raises(ValueError, match=f"{FILE_NAME}:1 .*if `flowspec bench` .*wrote this file"):
        read_samples(tmp_path)


def test_a_missing_file_says_what_writes_it(tmp_path):
    """The error names the command."""
    with pytest.raises(ValueError, match="flowspec bench"):
        read_samples(tmp_path / "nowhere.jsonl")


def test_what_was_left_out_is_remembered_apart_from_the_samples(tmp_path):
    """Damage to it only costs asking a question again, not a sample."""
    one, two = (TooLong(key, "qa", key, 1, 2, 900) for key in "ab")
    with SampleFile(tmp_path) as file:
        for known in (one, two, one):
            file.leave_out(known)
    assert read_samples(tmp_path) == []
    with SampleFile(tmp_path) as file:
        assert file.left_out == {"a": one, "b": two}
    path = tmp_path / LEFT_OUT_NAME
    path.write_text(path.read_text()[:-5])
    with SampleFile(tmp_path) as file:
        assert file.left_out == {"a": one}


def test_another_program_may_write_unicode_as_it_is(tmp_path):
    """For instance, jq escapes no line end but the newline."""
    one = sample(question="a\u2028b")
    (tmp_path / FILE_NAME).write_text(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    assert read_samples(tmp_path) == [one]


def test_two_benches_do_not_write_one_file(tmp_path):
    """Their lines could mix."""
    with SampleFile(tmp_path), pytest.raises(ValueError, match="another bench"):
        SampleFile(tmp_path)


def test_hashes_depend_on_content_alone():
    """They depend on every token and its position, but not on the order of keys."""
    assert hash_of({"a": 1, "b": {"c": 2, "d": 3}}) == hash_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": 2})
    assert len({hash_tokens(t) for t in ([], [0], [0, 0], [1, 0], [0, 1])}) == 5
