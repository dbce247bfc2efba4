"""Questions: the same ones from every layout, and a named fault where there is one."""

import json
from pathlib import Path

import pytest
from conftest import question_record, write_jsonl

from tl_headnorm.data.questions import BadRecord, load_questions, parse_record
from tl_headnorm.data.readers import canonical_split, find_split_files
from tl_headnorm.errors import InputError

SIZES = (4, 5, 4, 4)


def records(layout):
    return [question_record(i, n, layout=layout, digits=i == 2) for i, n in enumerate(SIZES)]


def dataset():
    from datasets import Dataset

    return Dataset.from_list(records("hf"))


def write_parquet(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset().to_parquet(path)


def write_arrow(path):
    from datasets.arrow_writer import ArrowWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(path)) as writer:
        for record in records("hf"):
            writer.write(record)
        writer.finalize()


def ai2_file(root):
    return write_jsonl(root / "anything.jsonl", records("ai2"))


def ai2_directory(root):
    return write_jsonl(root / "test.jsonl", records("ai2")).parent


def ai2_named_lower(root):
    return write_jsonl(root / "ARC-Challenge-test.jsonl", records("ai2")).parent


def ai2_named_upper(root):
    return write_jsonl(root / "ARC-Challenge-Test.jsonl", records("ai2")).parent


def ai2_zip(root):
    write_jsonl(root / "ARC-Easy" / "ARC-Easy-Test.jsonl", [question_record(9)])
    write_jsonl(root / "ARC-Challenge" / "ARC-Challenge-Test.jsonl", records("ai2"))
    return root


def hf_jsonl(root):
    return write_jsonl(root / "test.jsonl", records("hf")).parent


def byte_order_mark(root):
    path = write_jsonl(root / "test.jsonl", records("hf"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    return path


def parquet_file(root):
    write_parquet(root / "x.parquet")
    return root / "x.parquet"


def parquet_repository(root):
    write_parquet(root / "ARC-Challenge" / "test-00000-of-00001.parquet")
    return root


def parquet_shards(root):
    rows = records("hf")
    from datasets import Dataset

    for i in range(2):
        part = Dataset.from_list(rows[2 * i : 2 * i + 2])
        part.to_parquet(root / f"test-0000{i}-of-00002.parquet")
    return root


def saved_dataset(root):
    dataset().save_to_disk(root / "saved")
    return root / "saved"


def saved_dict(root):
    from datasets import Dataset, DatasetDict

    other = Dataset.from_list([question_record(9, layout="hf")])
    DatasetDict({"train": other, "test": dataset()}).save_to_disk(root / "saved")
    return root / "saved"


def hub_snapshot(root):
    snapshots = root / "hub" / "datasets--allenai--ai2_arc" / "snapshots"
    blob = root / "hub" / "datasets--allenai--ai2_arc" / "blobs" / "0a1b"
    write_parquet(blob)
    link = snapshots / "21f0" / "ARC-Challenge" / "test-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    return root


def arrow_cache(root):
    folder = root / "allenai___ai2_arc" / "ARC-Challenge" / "0.0.0" / "21f0"
    write_arrow(folder / "ai2_arc-test.arrow")
    (folder / "dataset_info.json").write_text("{}")
    return root


LAYOUTS = [ai2_file, ai2_directory, ai2_named_lower, ai2_named_upper, ai2_zip, hf_jsonl,
           byte_order_mark, parquet_file, parquet_repository, parquet_shards, saved_dataset,
           saved_dict, hub_snapshot, arrow_cache]  # fmt: skip


def comparable(questions):
    """All of a question but where it was read."""
    return [(q.id, q.stem, q.options, q.labels, q.answer) for q in questions]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_questions(layout, tmp_path):
    found = load_questions("arc_challenge", layout(tmp_path), "test")
    expected = [parse_record(record) for record in records("ai2")]
    assert comparable(found) == comparable(expected)
    assert len(found.sha256) == 64
    assert found.skipped == {}
    assert Path(found.path).exists()


def test_digest_follows_the_bytes(tmp_path):
    first = load_questions(data_dir=ai2_file(tmp_path / "a"))
    same = load_questions(data_dir=ai2_file(tmp_path / "b"))
    other = load_questions(data_dir=hf_jsonl(tmp_path / "c"))
    assert first.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize("names", [("dev", "validation"), ("Dev", "val"), ("Train", "train")])
def test_split_names(names, tmp_path):
    stored, asked = names
    write_jsonl(tmp_path / f"ARC-Challenge-{stored}.jsonl", records("ai2"))
    assert len(load_questions(data_dir=tmp_path, split=asked)) == len(SIZES)


def test_unknown_split():
    with pytest.raises(InputError, match=r"split: expected test, .* found 'tset'"):
        canonical_split("tset")


@pytest.mark.parametrize(
    ("labels", "key", "position"),
    [
        ("ABCD", "A", 0), ("ABCD", "D", 3), ("ABCDE", "E", 4), ("1234", "1", 0), ("1234", "4", 3),
        ("12345", "5", 4), ("ABCD", "2", 1), ("1234", "B", 1), ("ABCDE", "5", 4),
        ("ABCD", 3, 2), ("1234", 3, 2), ("ABCD", " C ", 2), ("BCDA", "A", 3), ("4321", "1", 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["ai2", "hf"])
def test_answer_is_the_place_of_its_label(layout, labels, key, position):
    record = question_record(0, len(labels), layout=layout, answer=key)
    if layout == "ai2":
        for choice, label in zip(record["question"]["choices"], labels, strict=True):
            choice["label"] = label
    else:
        record["choices"]["label"] = list(labels)
    question = parse_record(record)
    assert question.answer == position
    assert question.answer_letter == "ABCDE"[position]


def change(**changes):
    return {**question_record(0, layout="hf"), **changes}


def no_key(key):
    record = question_record(0, layout="hf")
    del record[key]
    return record


BAD = {
    "not an object": ([1], "expected an object, found list"),
    "number": (3, "expected an object, found int"),
    "no question": (no_key("question"), "expected text under 'question' in the record"),
    "no choices": (no_key("choices"), "expected choices with the lists text and label"),
    "no answer": (no_key("answerKey"), "expected a label under 'answerKey', found nothing"),
    "null lists": (change(choices={"text": None, "label": None}), "lists text and label"),
    "text for a list": (change(choices={"text": "abcd", "label": "ABCD"}), "lists text and label"),
    "hidden answer": (change(answerKey=""), "expected answerKey among the labels"),
    "answer elsewhere": (change(answerKey="F"), r"among the labels \['A', 'B', 'C', 'D'\], found"),
    "answer 0": (change(answerKey=0), "found 0"),
    "answer as a list": (change(answerKey=["A"]), "found list"),
    "empty stem": (change(question="  "), "expected a question, found an empty one"),
    "fewer labels": (
        change(choices={"text": ["a", "b", "c", "d"], "label": ["A"]}),
        "expected a label for each option, found 1 for 4",
    ),
    "same labels": (
        change(choices={"text": ["a", "b"], "label": ["A", "A"]}),
        "expected different labels",
    ),
    "empty option": (
        change(choices={"text": ["a", ""], "label": ["A", "B"]}),
        "expected text in every option, found ''",
    ),
    "number as option": (
        change(choices={"text": ["a", 2], "label": ["A", "B"]}),
        "expected text in every option, found 2",
    ),
    "AI2 choices": ({"question": {"stem": "x", "choices": "AB"}}, "a list under question.choices"),
    "AI2 no stem": ({"question": {"choices": []}}, "expected text under 'stem' in the question"),
    "AI2 option": ({"question": {"stem": "x", "choices": ["a"]}}, "objects with text and label"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_says_what_is_wrong(name):
    record, message = BAD[name]
    with pytest.raises(BadRecord, match=message):
        parse_record(record)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"id": "q", "question"', "expected one JSON object, found a broken line"),
        ("[]", "expected an object, found list"),
        ('{"id": "q", "question": "Why?"}', "expected choices"),
        ("[" * 100_000, "expected one JSON object"),
    ],
)
def test_broken_line_names_file_line_and_fault(line, fault, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [question_record(0), line, question_record(1)])
    with pytest.raises(InputError) as caught:
        load_questions(data_dir=path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: {fault}")
    assert "--on_bad_record skip" in message
    kept = load_questions(data_dir=path, on_bad_record="skip")
    assert [q.id for q in kept] == ["q0", "q1"]
    assert kept.skipped == {"malformed record": 1}


def test_bytes_that_are_not_text(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [question_record(0)])
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: expected UTF-8 text, found byte 0xff"):
        load_questions(data_dir=path)


def test_parquet_row_is_named(tmp_path):
    from datasets import Dataset

    rows = [*records("hf"), question_record(5, layout="hf", answer="Z")]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"test.parquet, row 5: expected answerKey"):
        load_questions(data_dir=tmp_path)


def test_option_counts_are_skipped_and_counted_by_reason(tmp_path):
    sizes = (3, 4, 5, 3, 2, 4)
    path = write_jsonl(
        tmp_path / "test.jsonl", [question_record(i, n) for i, n in enumerate(sizes)]
    )
    usual = load_questions(data_dir=path)
    assert [q.id for q in usual] == ["q1", "q2", "q5"]
    assert usual.skipped == {"3 options": 2, "2 options": 1}
    every = load_questions(data_dir=path, n_options=(2, 3, 4, 5))
    assert len(every) == 6
    assert every.skipped == {}


@pytest.mark.parametrize(("asked", "got"), [(-1, 4), (1, 1), (3, 3), (99, 4)])
def test_max_samples_takes_the_first_usable(asked, got, tmp_path):
    rows = [question_record(7, 3), *records("ai2")]
    questions = load_questions(data_dir=write_jsonl(tmp_path / "x.jsonl", rows), max_samples=asked)
    assert [q.id for q in questions] == [f"q{i}" for i in range(got)]


def test_slice_keeps_where_it_came_from(tmp_path):
    questions = load_questions(data_dir=ai2_file(tmp_path))
    part = questions[:2]
    assert len(part) == 2
    assert (part.sha256, part.name) == (questions.sha256, "arc_challenge")
    assert questions[1] is part[1]


def test_no_usable_question(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [question_record(0, 3), question_record(1, 3)])
    with pytest.raises(InputError, match=r"no usable question in .* found none: 3 options \(2\)"):
        load_questions(data_dir=path)


def test_two_candidates_are_not_mixed(tmp_path):
    for name in ("ARC-Easy-Test", "ARC-Challenge-Test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [question_record(len(name))])
    with pytest.raises(InputError, match=r"expected one file of the test split .* ARC-Challenge"):
        load_questions("multiple_choice", tmp_path)
    assert [f.name for f in find_split_files(tmp_path, "test", "ARC-Easy")] == [
        "ARC-Easy-Test.jsonl"
    ]


def test_directory_without_the_split_lists_what_is_there(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", records("ai2"))
    with pytest.raises(InputError, match=r"expected the test split in .* found train.jsonl"):
        load_questions(data_dir=tmp_path)


def test_saved_dataset_of_another_split_is_refused(tmp_path):
    from datasets import Dataset, NamedSplit

    Dataset.from_list(records("hf"), split=NamedSplit("train")).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="expected the split test, found train"):
        load_questions(data_dir=tmp_path / "saved")
    assert len(load_questions(data_dir=tmp_path / "saved", split="train")) == len(SIZES)


def test_hub_is_asked_for_the_right_thing(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    questions = load_questions("arc_easy", split="dev")
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"split": "validation"})]
    assert comparable(questions) == comparable(parse_record(r) for r in records("ai2"))
    assert questions.path == "allenai/ai2_arc/ARC-Easy"
    assert questions.sha256 is None


def test_hub_out_of_reach_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_questions("arc_challenge")
    assert str(caught.value) == (
        "dataset allenai/ai2_arc (ARC-Challenge, test): expected it in the cache or on the hub, "
        "found neither (Couldn't reach the Hub); give --data_dir a copy on disk"
    )


def test_the_real_test_split(shared_data):
    path = shared_data / "arc_challenge"
    questions = load_questions("arc_challenge", path, "test")
    assert len(questions) == 1168
    assert questions.skipped == {"3 options": 4}
    assert sum(questions.skipped.values()) + len(questions) == 1172
    assert sum(len(q.options) == 5 for q in questions) == 3
    numeric = [q for q in questions if q.labels == ("1", "2", "3", "4")]
    assert len(numeric) == 21
    assert all(q.answer_letter in q.letters for q in numeric)
    dev = load_questions("arc_challenge", path, "dev")
    assert len(dev) == 296
    assert dev.skipped == {"3 options": 3}


def test_real_answers_are_those_of_the_file(shared_data):
    """Counted by another way than `_answer_position`: the label beside the answer's text."""
    path = shared_data / "arc_challenge" / "ARC-Challenge-Test.jsonl"
    raw = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    for question in load_questions("arc_challenge", path):
        labels = {c["text"]: c["label"] for c in raw[question.id]["question"]["choices"]}
        assert labels[question.options[question.answer]] == raw[question.id]["answerKey"]
