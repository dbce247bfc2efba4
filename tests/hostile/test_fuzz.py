"""Whatever comes in: it is read, or refused in one line; never another exception."""

import json
import shutil
import string
import zipfile

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from tl_headnorm import load_run
from tl_headnorm.cli import parse
from tl_headnorm.commands.table import COMMANDS
from tl_headnorm.data.questions import BadRecord, Question, load_questions, parse_record
from tl_headnorm.data.templates import jinja_template
from tl_headnorm.data.texts import read_texts
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import parse_heads
from tl_headnorm.settings import Settings

many = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
some = settings(many, max_examples=40)
few = settings(
    many, max_examples=12, phases=[Phase.explicit, Phase.generate]
)  # a command line takes a third of a second to parse

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # half characters too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
KEYS = st.sampled_from(
    ["id", "question", "stem", "choices", "text", "label", "answerKey", "A", "1", "other"]
) | st.text(max_size=3)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


def refusal(error):
    """What an InputError must be."""
    text = str(error)
    assert text
    assert text.isprintable()
    assert len(text) < 1300
    return text


# Questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(path, **how):
    """The questions of a file, or None where it is refused."""
    try:
        return load_questions(data_dir=path, **how)
    except InputError as error:
        refusal(error)
        return None


@many
@given(data=st.binary(max_size=200), skip=st.sampled_from(["error", "skip"]))
def test_any_bytes(data, skip, folder):
    path = folder / "bytes.jsonl"
    path.write_bytes(data)
    read(path, on_bad_record=skip)


@some
@given(data=st.binary(max_size=200), ending=st.sampled_from(["parquet", "arrow", "json"]))
@example(data=b"PAR1" + b"\0" * 20 + b"PAR1", ending="parquet")
@example(data=b"\xff\xff\xff\xff\x10\0\0\0", ending="arrow")
def test_any_bytes_of_other_formats(data, ending, folder):
    path = folder / f"bytes.{ending}"
    path.write_bytes(data)
    read(path)


@many
@given(record=ANY_JSON)
def test_any_record(record, folder):
    try:
        question = parse_record(record, "here")
    except BadRecord:
        pass
    else:
        assert 0 <= question.answer < len(question.options)
    path = write_jsonl(folder / "record.jsonl", [json.dumps(record)])
    whole = read(path, n_options=tuple(range(2, 27)))
    skipped = read(path, n_options=tuple(range(2, 27)), on_bad_record="skip")
    assert (whole is None) == (skipped is None)


@st.composite
def records(draw):
    """A well-formed record in either layout, and what its question must be."""
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    texts = draw(st.lists(text.filter(str.strip), min_size=2, max_size=26))
    n = len(texts)
    kind = draw(st.sampled_from([string.ascii_uppercase, [str(i + 1) for i in range(26)]]))
    turn = draw(st.integers(0, n - 1))
    labels = [*kind[turn:n], *kind[:turn]]
    answer = draw(st.integers(0, n - 1))
    stem = draw(text.filter(str.strip))
    name = draw(text)
    expected = (name, stem, tuple(texts), tuple(labels), answer)
    key = labels[answer]
    if draw(st.booleans()):
        choices = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
        record = {"id": name, "question": {"stem": stem, "choices": choices}, "answerKey": key}
    else:
        choices = {"text": texts, "label": labels}
        record = {"id": name, "question": stem, "choices": choices, "answerKey": key}
    return record, expected


@many
@given(
    made=records(),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_round_trip(made, ascii_only, mark, end, folder):
    record, fields = made
    expected = Question(*fields)  # not in the strategy: beartype draws from `random`
    data = (json.dumps(record, ensure_ascii=ascii_only) + end).encode()
    path = folder / "round.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + data)
    (found,) = load_questions(data_dir=path, n_options=(len(expected.options),))
    for field in ("id", "stem", "options", "labels", "answer"):
        assert getattr(found, field) == getattr(expected, field)


@many
@given(made=records(), change=ANY_JSON, data=st.data())
def test_one_thing_broken(made, change, data, folder):
    record, _ = made
    place = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = change
        break
    path = write_jsonl(folder / "broken.jsonl", [json.dumps(record)])
    found = read(path, n_options=tuple(range(2, 27)))
    if found is not None:
        (question,) = found
        assert 0 <= question.answer < len(question.options) == len(question.labels)
        question.stem.encode()
        question.id.encode()


@some
@given(
    text=st.text(st.sampled_from("{}% #-'\"|.[]()question for in options endif a1_\n"), max_size=40)
)
def test_any_template(text):
    try:
        template = jinja_template(text)
    except InputError as error:
        refusal(error)
    else:
        assert isinstance(template.render(Question("q", "s", ("a", "b"), ("A", "B"), 0)), str)


# Texts, lists of heads


@many
@given(data=st.binary(max_size=100), ending=st.sampled_from(["txt", "jsonl"]))
def test_any_texts(data, ending, folder):
    path = folder / f"texts.{ending}"
    path.write_bytes(data)
    try:
        assert any(item.strip() for item in read_texts(path).items)
    except InputError as error:
        refusal(error)


@many
@given(text=st.text(st.sampled_from("0123456789.,-* topbm:L"), max_size=20))
def test_any_list_of_heads(text):
    try:
        found = parse_heads(text, 4, 8)
    except InputError as error:
        refusal(error)
    else:
        assert all(0 <= layer < 4 and 0 <= head < 8 for layer, head in found)


@many
@given(data=ANY_JSON)
def test_any_file_of_heads(data, folder):
    path = folder / "heads.json"
    path.write_text(json.dumps(data))
    try:
        assert parse_heads(str(path), 4, 8)
    except InputError as error:
        refusal(error)


# The command line and its YAML


def settings_or_refusal(arguments):
    try:
        name, found = parse(arguments)
    except InputError as error:
        refusal(error)
        return None
    except SystemExit:  # --help, --print_config
        return None
    assert name == arguments[0]
    return found


FLAGS = st.sampled_from(
    [f"--{name}" for name in Settings.__dataclass_fields__ if name != "resume"]
    + ["--config", "--help", "--print_config", "--", "-x", "--nope", "--max_samples=3"]
)
VALUES = st.sampled_from(
    ["", "1", "-1", "true", "null", "[]", "[4,5]", "{}", "nan", "1e9", "a=b", "*", "&a", "!!int x",
     "{{", "'", '"', "%", "\n", "#", "@", "?", ": ", "- ", "é🧪", "1/2", "all", "fp32"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda text: "\0" not in text
)  # fmt: skip


@few
@given(rest=st.lists(FLAGS | VALUES, max_size=5))
def test_any_arguments(rest, capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    settings_or_refusal(["collect", *rest])


@few
@given(
    command=st.sampled_from(sorted(COMMANDS)), name=st.text(string.ascii_letters, max_size=8),
    value=VALUES,
)  # fmt: skip
def test_any_command(command, name, value, capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    settings_or_refusal([command, f"--{name}", value])


YAML_KEYS = st.sampled_from([n for n in Settings.__dataclass_fields__ if n != "resume"])


@few
@given(data=st.dictionaries(YAML_KEYS, ANY_JSON, max_size=3))
def test_any_values_in_yaml(data, folder):
    """JSON is YAML."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(data))
    found = settings_or_refusal(["collect", "--config", str(path)])
    if found is not None:
        assert isinstance(found, Settings)
        json.dumps(found.as_dict())


@few
@given(data=st.binary(max_size=60) | st.text(
    st.sampled_from("seed: [1]{}&*!|>-?%@`'\"#\n\t ,chat~"), max_size=60
).map(str.encode))  # fmt: skip
def test_any_yaml(data, folder):
    path = folder / "any.yaml"
    path.write_bytes(data)
    settings_or_refusal(["collect", "--config", str(path)])


VALID = {
    "seed": st.integers(0, 2**40), "batch_size": st.integers(1, 10**6), "chat": st.booleans(),
    "max_samples": st.just(-1) | st.integers(1, 10**9), "split": st.text("abc", min_size=1),
    "dtype": st.sampled_from(["bf16", "fp16", "fp32"]), "few_shot": st.integers(0, 9),
    "token_agg": st.sampled_from(["last", "all"]),
    "n_options": st.lists(st.integers(2, 26), min_size=1, max_size=4),
    "model_path": st.text(string.ascii_letters + "/._-é🧪", min_size=1, max_size=20),
    "template": st.none() | st.text("{}%:'\" ab\n", max_size=12).map("{{{{ x }}}}{}.".format),
    "shard": st.none() | st.integers(1, 9).map(lambda k: f"{k}/9"),
}  # fmt: skip


@few
@given(values=st.fixed_dictionaries({}, optional=VALID))
def test_valid_settings_survive_yaml(values, folder):
    import yaml

    assume(values)
    path = folder / "valid.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    _, found = parse(["collect", "--config", str(path)])
    for name, value in values.items():
        assert getattr(found, name) == (tuple(value) if isinstance(value, list) else value)


# Run directories


@pytest.fixture(scope="module")
def run(finished, folder):
    """A run directory to damage, and its files as they were."""
    path = folder / "run"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("*.html", "*.png"))
    return path, {p.name: p.read_bytes() for p in path.iterdir()}


def load(run):
    path, whole = run
    try:
        return load_run(path)
    except InputError as error:
        named = str(path) in refusal(error)
        assert named, error  # noqa: PT017 (the exception is one of two right outcomes)
        return None
    finally:
        for file in path.iterdir():
            file.unlink()
        for name, data in whole.items():
            (path / name).write_bytes(data)


FILES = st.sampled_from(
    ["meta.json", "config.json", "moments.npz", "per_sample.npz", "samples.parquet"]
)


@many
@given(
    name=FILES, at=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=8), cut=st.booleans()
)
def test_damaged_bytes(name, at, new, cut, run):
    path, whole = run
    data = whole[name]
    place = int(at * len(data))
    (path / name).write_bytes(data[:place] + new + (b"" if cut else data[place + len(new) :]))
    load(run)


@many
@given(data=st.data())
def test_damaged_json(data, run):
    path, whole = run
    name = data.draw(st.sampled_from(["meta.json", "config.json"]))
    found = json.loads(whole[name])
    place = found
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if data.draw(st.booleans()):
            place[key] = data.draw(ANY_JSON)
        else:
            del place[key]
        break
    (path / name).write_text(json.dumps(found))
    load(run)


@some
@given(data=st.data())
def test_arrays_of_another_kind(data, run):
    path, _ = run
    name = data.draw(st.sampled_from(["moments.npz", "per_sample.npz"]))
    with np.load(path / name) as stored:
        arrays = {key: stored[key] for key in stored.files}
    key = data.draw(st.sampled_from(sorted(arrays)))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    kind = data.draw(st.sampled_from(["f4", "f8", "i8", "?", "U3", "c16", "S2", "M8[s]"]))
    arrays[key] = np.zeros(shape, kind)
    np.savez(path / name, **arrays)
    load(run)


def test_the_untouched_run_is_read(run):
    assert load(run) is not None


def test_a_member_that_lies_about_its_size(run):
    path, _ = run
    with zipfile.ZipFile(path / "moments.npz", "w") as archive:
        text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, 9999), }"
        header = (b"\x93NUMPY\x01\x00v\x00" + text).ljust(127) + b"\n"
        archive.writestr("head_output_norm_M2.npy", header)
    assert load(run) is None
