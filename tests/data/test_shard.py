"""`shard`: every N-th question, so that N jobs measure each of them once."""

import numpy as np
import pytest
from conftest import question_record, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm import load_questions, load_run
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings, parse_shard

quick = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Eleven questions among skipped and broken lines."""
    records = [question_record(i, 3 if i in (2, 3, 9) else 4) for i in range(14)]
    records[5] = "{"
    records.append(question_record(20, 2))
    return write_jsonl(tmp_path_factory.mktemp("mixed") / "test.jsonl", records)


@quick
@given(parts=st.integers(1, 10), most=st.sampled_from([-1, 10]))
def test_shards_are_a_partition(parts, most, mixed):
    how = {"data_dir": mixed, "on_bad_record": "skip", "max_samples": most}
    whole = load_questions(**how)
    shards = [load_questions(**how, shard=f"{k}/{parts}") for k in range(1, parts + 1)]
    placed = sorted(
        (place, q.id) for part in shards for place, q in zip(part.places, part, strict=True)
    )
    assert placed == list(enumerate(q.id for q in whole))
    skipped = {}
    for part in shards:
        for reason, count in part.skipped.items():
            assert count > 0
            skipped[reason] = skipped.get(reason, 0) + count
    assert skipped == whole.skipped
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert {part.sha256 for part in shards} == {whole.sha256}


def test_a_slice_keeps_its_places(mixed):
    part = load_questions(data_dir=mixed, on_bad_record="skip", shard="2/3")
    assert list(part[1:].places) == list(part.places)[1:]
    assert part[1:].shard == "2/3"


def test_more_parts_than_questions(mixed):
    with pytest.raises(InputError, match=r"shard: expected at most as many parts as questions, fo"):
        load_questions(data_dir=mixed, on_bad_record="skip", shard="12/12")


@pytest.mark.parametrize(
    "shard", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/3", "a/b", "", "1.5/3", " 1/3", "१/३", "1/ 3"]
)
def test_nonsense_is_refused(shard):
    with pytest.raises(InputError) as caught:
        Settings(shard=shard)
    assert str(caught.value).startswith("shard: expected K/N, K from 1 to N, such as 3/16, found ")


def test_shard_is_read():
    assert parse_shard("3/16") == (3, 16)
    assert parse_shard(None) is None


def test_few_shot_shards_share_their_examples(run_cli, small, tmp_path):
    folder = tmp_path / "data"
    write_jsonl(folder / "test.jsonl", [question_record(i) for i in range(4)])
    write_jsonl(folder / "train.jsonl", [question_record(i) for i in range(10, 14)])
    flags = [folder if x == small[3] else x for x in small]
    flags = [512 if x == 400 else x for x in flags]

    def run(*more):
        return run_cli("collect", *flags, "--few_shot", 1, "--output_dir", tmp_path, *more).run_dir

    runs = [run("--shard", "1/2"), run("--shard", "2/2")]
    merged = load_run(run_cli("merge", *runs, "--output_dir", tmp_path).run_dir)
    np.testing.assert_allclose(
        merged["head_output_norm"].values, load_run(run())["head_output_norm"].values, rtol=5e-6
    )
    write_jsonl(folder / "train.jsonl", [question_record(i) for i in range(20, 24)])
    other = run("--shard", "2/2")
    result = run_cli("merge", runs[0], other, "--output_dir", tmp_path)
    assert "found template.examples_sha256 " in result.error_line
