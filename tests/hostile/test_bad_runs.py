"""Run directories, texts and lists of heads that are damaged or of another kind."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import question_record, write_jsonl
from hostile import Cases, raw

from tl_headnorm import load_run
from tl_headnorm.data.texts import read_texts
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import parse_heads

case = Cases()


def ablate(**changes):
    return {"command": "ablate", "reference_samples": 0, "max_samples": 2, **changes}


# Texts


def texts(data, name="texts.txt"):
    def make(folder, model):
        return ablate(texts=raw(folder, data, name), heads="0.1", dataset="none", data_dir=None)

    return make


TEXTS = {
    "UTF-16": ("a text".encode("utf-16"), "t.txt", "texts: expected a UTF-8 text file or a .jsonl"),
    "binary": (bytes(range(256)), "t.txt", "can't decode byte 0x80 in position 128"),
    "empty": (b"", "t.txt", "texts: expected text in "),
    "blank": (b" \n\t\n", "t.txt", "t.txt, found none"),
    "no JSON": (
        b"a text\n",
        "t.jsonl",
        "t.jsonl, line 1: expected JSON, found a fault (Expecting v",
    ),
    "no text": (
        b'"a b c d"\n{"txt": "a"}\n',
        "t.jsonl",
        "line 2: expected a text or an object with",
    ),
    "half a character": (b'"\\ud800"\n', "t.jsonl", "line 1: expected Unicode text, found half a"),
    "nested": (b"[" * 100_000, "t.jsonl", "line 1: expected JSON, found a fault (maximum recurs"),
    "digits": (b"9" * 5000, "t.jsonl", "line 1: expected JSON, found a fault (Exceeds the limit"),
}
for name, (data, file, message) in TEXTS.items():
    make = texts(data, file)
    make.__name__ = f"texts: {name}"
    case(message)(make)


@case("texts: expected a UTF-8 text file or a .jsonl of texts, found ", "No such file or directory")
def no_texts(folder, model):
    return ablate(texts=folder / "none.txt", heads="0.1", dataset="none", data_dir=None)


# Lists of heads

HEADS = {
    "true": ('{"1": [true]}', "heads: expected 'layer: [heads]' in "),
    "a fraction": ('{"1": [0.5]}', 'such as {"3": [0, 2]}, found {"1": [0.5]}'),
    "text": ('{"1": "12"}', 'found {"1": "12"}'),
    "a list": ("[1]", "found [1]"),
    "a word": ('{"one": [1]}', 'found {"one": [1]}'),
    "below zero": ('{"1": [-1]}', "heads from 0 to 5, found 1.-1"),
    "a layer beyond": (
        '{"3": [0]}',
        "expected layers from 0 to 2 and heads from 0 to 5, found 3.0",
    ),
    "none": ("{}", "heads: expected at least one head, found none; give "),
    "a layer twice": ('{"1": [0], "1": [2]}', "heads: expected each layer once in "),
    "cut": ('{"1": [0', "heads: expected a file with 'layer: [heads]', found "),
    "NUL": ("\0", "special characters are not allowed"),
    "digits": ("9" * 5000, "Exceeds the limit"),
}
for name, (text, message) in HEADS.items():

    def make(folder, model, text=text):
        return ablate(heads=raw(folder, text.encode(), "heads.json"))

    make.__name__ = f"heads: {name}"
    case(message)(make)


@case("heads: expected L.H, L.H-H, L.*, a file, all, sweep, none, top:K or bottom:K, found '9999")
def a_layer_of_many_digits(folder, model):
    return ablate(heads="9" * 400 + ".1")


# Several datasets


@case("datasets: expected different datasets, or files of different names, found ['test', 'test']")
def two_files_of_one_name(folder, model):
    for name in "ab":
        write_jsonl(folder / name / "test.jsonl", [question_record(ord(name))])
    names = f"[{folder / 'a' / 'test.jsonl'}, {folder / 'b' / 'test.jsonl'}]"
    return {"command": "attribute", "datasets": names, "data_dir": None}


@case("data_dir: expected an existing file or directory, found nothing at ")
def a_dataset_that_is_not_there(folder, model):
    names = f"[{folder / 'none.jsonl'}]"
    return {"command": "attribute", "datasets": names, "data_dir": None}


# Run directories given to other commands


def stability(folder, arrays):
    run = folder / "run"
    run.mkdir()
    (run / "meta.json").write_text("{}")
    if isinstance(arrays, bytes):
        (run / "per_sample.npz").write_bytes(arrays)
    else:
        np.savez(run / "per_sample.npz", **arrays)
    return {"command": "attribute", "run": run, "stability": "true"}


@case("run: expected arrays in ", "per_sample.npz, found it damaged (File is not a zip file)")
def damaged_arrays(folder, model):
    return stability(folder, b"PK\x03\x04 and no more")


@case("found it damaged (Object arrays cannot be loaded when allow_pickle=False)")
def arrays_with_pickled_objects(folder, model):
    return stability(folder, {"a": np.array([{}], dtype=object)})


@case(
    "run: expected numbers [sample, layer, head] in ", "found a of another kind; give a run direc"
)
def arrays_of_another_shape(folder, model):
    return stability(folder, {"a": np.zeros(3)})


@case("run: expected numbers [sample, layer, head] in ", "found nothing of another kind")
def no_arrays(folder, model):
    return stability(folder, {})


@case("run: expected a run directory with heads.parquet, found ")
def ranking_without_a_table(folder, model):
    (folder / "run").mkdir()
    return ablate(heads="top:2", run=folder / "run")


@case("run: expected a run directory with heads.parquet, found ", "magic bytes")
def ranking_by_a_damaged_table(folder, model):
    raw(folder / "run", b"no parquet at all", "heads.parquet")
    return ablate(heads="top:2", run=folder / "run")


@case("run: expected a finished run directory with meta.json, found none in ")
def norms_of_an_unfinished_run(folder, model):
    (folder / "run").mkdir()
    return {"command": "attribute", "norms": folder / "run"}


@case.table
def test_one_clear_line(name, run_cli, flags, tmp_path, llama_dir):
    case.check(name, run_cli, flags, tmp_path, llama_dir)


@pytest.mark.parametrize(
    ("text", "heads"),
    [('{"1": [2, 0], "0": [5]}', ((0, 5), (1, 0), (1, 2))), ("1: [2]\n", ((1, 2),)),
     ('{"1": ["2"]}', ((1, 2),))],
)  # fmt: skip
def test_lists_of_heads_that_are_fine(text, heads, tmp_path):
    assert parse_heads(str(raw(tmp_path, text.encode(), "h.json")), 3, 6) == heads


def test_a_line_separator_inside_a_text_is_part_of_it(tmp_path):
    path = raw(tmp_path, '"one\u2028two\x85three"\r\n{"text": "four"}\n'.encode(), "t.jsonl")
    assert read_texts(path).items == ("one\u2028two\x85three", "four")
    with pytest.raises(json.JSONDecodeError):  # the rival
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# load_run


def drop(name):
    def damage(run):
        (run / name).unlink()

    return damage


def edit(name, **changes):
    def damage(run):
        found = json.loads((run / name).read_text())
        found.update(changes)
        (run / name).write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))

    return damage


def write(name, data):
    def damage(run):
        (run / name).write_bytes(data)

    return damage


def arrays(name, change):
    def damage(run):
        with np.load(run / name) as stored:
            found = {key: stored[key] for key in stored.files}
        change(found)
        np.savez(run / name, **found)

    return damage


def table(change):
    def damage(run):
        change(pd.read_parquet(run / "samples.parquet")).to_parquet(run / "samples.parquet")

    return damage


def smaller(found):
    for key in found:
        found[key] = found[key][:-1]


def swap(found):
    found["head_output_norm"] = found["head_output_norm"].transpose(1, 0, 2)


DAMAGE = {
    "meta.json is a list": (write("meta.json", b"[]"), "meta.json damaged or missing (a list, not"),
    "meta.json is null": (write("meta.json", b"null"), "a NoneType, not an object"),
    "meta.json is UTF-16": (write("meta.json", "{}".encode("utf-16")), "meta.json damaged or mis"),
    "meta.json nested": (write("meta.json", b"[" * 100_000), "(maximum recursion depth exceeded"),
    "config.json is text": (write("config.json", b'"x"'), "config.json damaged or missing (a str"),
    "no model": (edit("meta.json", model="gone"), "do not fit each other (KeyError: 'model')"),
    "model is text": (edit("meta.json", model="llama"), "do not fit each other (TypeError"),
    "no dataset": (edit("meta.json", dataset=None), "do not fit each other (TypeError"),
    "another count": (edit("meta.json", num_processed=6), "7 rows in samples.parquet, 7 samples i"),
    "moments of nothing": (arrays("moments.npz", dict.clear), "no measure in moments.npz"),
    "half the moments": (
        arrays("moments.npz", lambda a: a.pop("head_output_norm_mean")),
        "(KeyError: 'head_output_norm_mean')",
    ),
    "moments of a layer less": (arrays("moments.npz", smaller), "files that do not fit each other"),
    "values of a sample less": (arrays("per_sample.npz", smaller), "do not fit each other (ValueE"),
    "values turned round": (arrays("per_sample.npz", swap), "files that do not fit each other"),
    "pickled values": (
        arrays("per_sample.npz", lambda a: a.update(head_output_norm=np.array([{}], dtype=object))),
        "Object arrays cannot be loaded when allow_pickle=False",
    ),
    "a sample less": (table(lambda t: t.iloc[:-1]), "files that do not fit each other"),
    "no id": (table(lambda t: t.drop(columns="id")), "(KeyError: 'id')"),
    "length is text": (table(lambda t: t.assign(n_tokens="x")), "files that do not fit each other"),
    "no samples": (drop("samples.parquet"), "samples.parquet damaged or missing (no such file)"),
    "a directory": (
        lambda run: (drop("moments.npz")(run), (run / "moments.npz").mkdir()),
        "moments.npz damaged or missing ([Errno 21] Is a directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, finished, tmp_path):
    damage, message = DAMAGE[name]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run)
    with pytest.raises(InputError) as caught:
        load_run(run)
    assert str(caught.value).startswith("run: expected ")
    assert str(run) in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; run collect again")
