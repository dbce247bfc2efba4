"""Merging: the runs of any split, in any order, are the run of the whole; others are refused."""

import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm import load_run
from tl_headnorm.commands.merge.merging import alike, merge_runs
from tl_headnorm.errors import InputError
from tl_headnorm.run import results
from tl_headnorm.run.files import plain
from tl_headnorm.stats import Moments

quick = settings(max_examples=30, deadline=None, derandomize=True)
NAMES = ("head_output_norm", "head_resid_contrib_norm")
SHAPE = (3, 2)


def made(values, rows, attrs):
    """The run of some rows of `values` [sample, layer, head]."""
    rows = np.asarray(rows, np.int64)
    dataset = {**attrs["dataset"]}
    record = {**attrs, "num_processed": len(rows), "num_tokens": int(10 * len(rows)),
              "num_skipped": {"3 options": len(rows)}, "dataset": dataset}  # fmt: skip
    part = {name: (values + i)[rows].astype(np.float32) for i, name in enumerate(NAMES)}
    run = results.build(part, {n: Moments.of(v) for n, v in part.items()}, record)
    run.coords["sample"] = ("sample", rows)
    columns = {"sample_id": [f"q{r}" for r in rows], "n_tokens": [10] * len(rows),
               "answer_letter": ["A"] * len(rows), "predicted": ["AB"[r % 2] for r in rows],
               "correct": [bool(r % 2 == 0) for r in rows]}  # fmt: skip
    for name, column in columns.items():
        kind = np.int64 if name == "n_tokens" else object
        run.coords[name] = ("sample", np.array(column, dtype=kind))
    run.attrs["accuracy"] = float(np.mean(columns["correct"]))
    return run


@pytest.fixture(scope="module")
def attrs(finished):
    kept = load_run(finished).attrs
    return {k: v for k, v in kept.items() if k not in ("missing_layers", "accuracy")}


@pytest.fixture
def pair(attrs):
    """Two runs of 3 and 5 samples of one file."""
    values = np.random.default_rng(0).gamma(2.0, size=(8, *SHAPE))
    return made(values, [0, 2, 4], attrs), made(values, [1, 3, 5, 6, 7], attrs)


def same_numbers(found, whole):
    for name in NAMES:
        for part in ("mean", "std"):
            np.testing.assert_allclose(
                found[f"{name}_{part}"].values, whole[f"{name}_{part}"].values, rtol=1e-12
            )
        np.testing.assert_array_equal(found[f"{name}_n"].values, whole[f"{name}_n"].values)
        np.testing.assert_array_equal(found[name].values, whole[name].values)
    for name in ("sample", "sample_id", "n_tokens", "predicted", "correct"):
        assert found[name].values.tolist() == whole[name].values.tolist()
    for key in ("accuracy", "num_processed", "num_tokens", "num_skipped", "missing_layers"):
        assert found.attrs[key] == whole.attrs[key]


@st.composite
def splits(draw):
    """(values with a layer that may be missing in some samples, the samples' part)."""
    n = draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = draw(st.sampled_from([0.0, 100.0])) + rng.gamma(2.0, size=(n, *SHAPE))
    values[: draw(st.integers(0, n)), 1] = np.nan
    owner = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    if len(set(owner)) == 1:  # two parts at least
        owner[0] = 4
    return values, owner


@quick
@given(case=splits(), order=st.randoms(use_true_random=False))
def test_any_split_in_any_order_is_the_whole(case, order, attrs):
    values, owner = case
    parts = [made(values, np.flatnonzero(owner == p), attrs) for p in sorted(set(owner))]
    order.shuffle(parts)
    whole = made(values, range(len(values)), attrs)
    same_numbers(merge_runs(parts), whole)
    if len(parts) > 2:  # a merge of merges
        inner = merge_runs(parts[:2])
        nested = merge_runs([*parts[2:], inner])
        same_numbers(nested, whole)
        assert len(nested.attrs["merged"]) == len(parts)


def test_the_mean_of_means_would_be_wrong(pair, attrs):
    """The rival: parts of unequal size."""
    naive = np.mean([run["head_output_norm_mean"].values for run in pair], axis=0)
    merged = merge_runs(pair)["head_output_norm_mean"].values
    assert np.abs(naive - merged).max() > 1e-3


def test_without_values_per_sample(pair):
    one, two = pair
    bare = two.drop_vars(NAMES)
    both = merge_runs([one, bare])
    assert not set(NAMES) & set(both.data_vars)
    whole = merge_runs([one, two])
    xr.testing.assert_equal(both, whole.drop_vars(NAMES))
    assert both.sizes["sample"] == 8


def test_what_is_summed_and_what_is_kept(pair, attrs):
    one, two = pair
    two.attrs |= {"padding_side": "left", "peak_memory_bytes": 10**12, "wall_seconds": 2.5,
                  "versions": {**attrs["versions"], "torch": "9.9"},
                  "started_at": "2020-01-01T00:00:00+05:00"}  # fmt: skip
    one.attrs |= {"wall_seconds": 1.5, "started_at": "2020-01-01T00:00:00+09:00"}
    found = merge_runs([one, two], ["/a", "/b"]).attrs
    assert (found["num_processed"], found["num_tokens"], found["wall_seconds"]) == (8, 80, 4.0)
    assert found["tokens_per_second"] == 20.0
    assert found["num_skipped"] == {"3 options": 8}
    assert found["padding_side"] == ["right", "left"]
    assert found["versions"]["torch"] == [attrs["versions"]["torch"], "9.9"]
    assert found["versions"]["python"] == attrs["versions"]["python"]
    assert found["peak_memory_bytes"] == 10**12
    assert found["started_at"] == "2020-01-01T00:00:00+09:00", "earlier by the clock, not by text"
    assert [leaf["run"] for leaf in found["merged"]] == ["/a", "/b"]
    assert [leaf["dataset"]["sha256"] for leaf in found["merged"]] == 2 * [
        attrs["dataset"]["sha256"]
    ]
    assert found["accuracy"] == 0.5
    assert "8" in merge_runs(pair)["head_output_norm_mean"].attrs["title"]


@pytest.mark.parametrize(
    ("checked", "worst"), [((1e-6, 3e-6), 3e-6), ((1e-6, None), None), ((None, None), None)]
)
def test_validated_only_where_all_were(checked, worst, pair):
    for run, value in zip(pair, checked, strict=True):
        run.attrs["validated_against_hf"] = value
    assert merge_runs(pair).attrs["validated_against_hf"] == worst


def set_in(run, key, value):
    """Change a field of the record, its dicts unshared."""
    *path, last = key.split(".")
    place = run.attrs
    for part in path:
        place[part] = dict(place[part])
        place = place[part]
    place[last] = value


DIFFERENT = {
    "weights_sha256": "e" * 64,
    "model.source": "/other/model", "model.revision": "0123abc", "model.adapter": "/lora",
    "model.dtype": "bf16", "model.engine": "bridge", "model.n_key_value_heads": 1,
    "model.d_model": 99, "template.name": "cloze", "template.sha256": "0" * 64,
    "template.chat_sha256": "1" * 64, "template.examples_sha256": "2" * 64,
    "prepend_bos": False, "settings.chat": True, "settings.few_shot": 2, "token_agg": "all",
    "exclude_first_token": True, "answer_scoring": None,
    "measures": {"head_output_norm": {"formula": "|z|", "unit": "u"}},
    "answer_tokens.A": {"token": "ĠA", "id": 999},
}  # fmt: skip


@pytest.mark.parametrize("key", DIFFERENT)
def test_what_made_other_numbers_is_refused(key, pair):
    one, two = pair
    if key in ("model.source", "model.revision", "model.adapter"):  # as an older version wrote it
        del one.attrs["weights_sha256"], two.attrs["weights_sha256"]
    set_in(two, key, DIFFERENT[key])
    with pytest.raises(InputError) as caught:
        merge_runs([one, two], ["/runs/a", "/runs/b"])
    message = str(caught.value)
    assert message.startswith(f"merge: expected runs that were measured alike, found {key} ")
    assert "in /runs/a and " in message
    assert "in /runs/b; " in message
    assert message.endswith("measure them alike, or merge those that were")


def test_the_same_weights_may_lie_elsewhere(pair):
    """Of two machines the paths differ; the digest of the weights says that they are the same."""
    set_in(pair[1], "model.source", "/scratch/elsewhere")
    merged = merge_runs(pair)
    assert merged.attrs["model"] == pair[0].attrs["model"]
    set_in(pair[1], "weights_sha256", "e" * 64)
    with pytest.raises(InputError, match="found weights_sha256 "):
        merge_runs(pair)


def test_a_seed_matters_only_where_it_draws(pair):
    set_in(pair[1], "settings.seed", 7)
    assert merge_runs(pair).attrs["settings"]["seed"] == [42, 7]
    for run in pair:
        set_in(run, "settings.few_shot", 2)
    with pytest.raises(InputError, match=r"found settings.seed 42 in run 1 and 7 in run 2"):
        merge_runs(pair)


def test_a_length_matters_only_where_it_cut(pair):
    set_in(pair[1], "settings.max_length", 128)
    assert merge_runs(pair).attrs["settings"]["max_length"] == [400, 128]
    pair[0].attrs["num_truncated"] = 1
    with pytest.raises(InputError, match=r"found settings.max_length 400 in run 1 and 128 in ru"):
        merge_runs(pair)


def test_letters_only_one_run_has_are_no_difference(pair):
    tokens = dict(pair[1].attrs["answer_tokens"])
    last = max(tokens)
    del tokens[last]
    pair[1].attrs["answer_tokens"] = tokens
    assert merge_runs(pair).attrs["answer_tokens"] == pair[0].attrs["answer_tokens"]


def test_other_shapes_and_measures(pair, attrs):
    values = np.ones((3, 2, 2))
    with pytest.raises(InputError, match=r"same layers and heads, found \(3, 2\) in run 1 and \(2"):
        merge_runs([pair[0], made(values, [0, 1], attrs)])
    fewer = pair[1].drop_vars([v for v in pair[1].data_vars if "resid" in str(v)])
    with pytest.raises(InputError, match=r"the same measures, found .* in run 2; merge runs of"):
        merge_runs([pair[0], fewer])


def test_a_sample_in_two_runs(pair, attrs):
    values = np.ones((8, *SHAPE))
    again = made(values, [2, 6], attrs)
    message = r"every sample once, found 'q2' in run 1 and again in run 3; .*see --shard"
    with pytest.raises(InputError, match=message):
        merge_runs([*pair, again])
    renamed = made(values, [6, 2], attrs)  # without ids, a file's path stands for them
    renamed.coords["sample_id"] = ("sample", np.array(["/x, line 7", "/x, line 3"], dtype=object))
    with pytest.raises(InputError, match=r"found '/x, line 7' in run 2 and again in run 3"):
        merge_runs([*pair, renamed])


def test_other_files_come_in_the_order_given(pair):
    one, two = pair
    set_in(two, "dataset.sha256", "f" * 64)
    set_in(two, "dataset.name", "arc_easy")
    for runs in ([one, two], [two, one]):
        merged = merge_runs(runs)
        ids = [i for run in runs for i in run["sample_id"].values]
        assert merged["sample_id"].values.tolist() == ids
        assert merged["sample"].values.tolist() == list(range(8))
        values = np.concatenate([run["head_output_norm"].values for run in runs])
        assert np.array_equal(merged["head_output_norm"].values, values)
        assert merged.attrs["merge"]["order"] == "as given"
    assert merged.attrs["dataset"]["name"] == "arc_easy + arc_challenge"
    assert merged.attrs["dataset"]["sha256"][0] == "f" * 64


@pytest.mark.parametrize("key", ["settings.n_options", "settings.on_bad_record"])
def test_places_of_other_terms_are_not_compared(key, pair):
    """Place 2 among questions with 3 options is another question than place 2 among all."""
    set_in(pair[1], key, [3])
    pair[1].coords["sample"] = ("sample", np.arange(5))
    assert merge_runs(pair).attrs["merge"]["order"] == "as given"


def test_alike():
    assert alike([1, 1]) == 1
    assert alike([1, 2, 1]) == [1, 2]
    assert alike([{"a": 1, "b": [2]}, {"a": 3, "b": [2]}]) == {"a": [1, 3], "b": [2]}
    assert alike([{"a": 1}, {}]) == {"a": [1, None]}
    assert alike([None, {"a": 1}]) == [None, {"a": 1}]


# In little memory


def written(run, path):
    path.mkdir()
    results.save_arrays(run, path)
    results.finish(run, path)
    return path


def test_runs_are_merged_in_the_memory_of_some_samples(attrs, tmp_path):
    """48 MB of values in three runs; the rival reads them all."""
    n, shape = 12_000, (16, 32)
    values = np.random.default_rng(0).gamma(2.0, size=(n, *shape)).astype(np.float32)
    paths = [written(made(values, range(k, n, 3), attrs), tmp_path / f"run{k}") for k in range(3)]
    peaks = []
    for mapped in (True, False):
        folder = tmp_path / f"mapped_{mapped}"
        folder.mkdir()
        tracemalloc.start()
        runs = [load_run(path, mapped=mapped) for path in paths]
        merged = merge_runs(runs, folder=folder if mapped else None)
        written(merged, folder / "merged")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(merged[NAMES[0]].values, values)
        assert [p.name for p in folder.iterdir()] == ["merged"]
    assert peaks[0] < 32e6 < 96e6 < peaks[1]
    xr.testing.assert_equal(
        load_run(tmp_path / "mapped_True" / "merged"),
        load_run(tmp_path / "mapped_False" / "merged"),
    )


def test_a_mapped_run_is_the_run_and_its_damage_is_seen(finished, tmp_path):
    xr.testing.assert_identical(load_run(finished, mapped=True), load_run(finished))
    path = shutil.copytree(finished, tmp_path / "copy")
    data = bytearray((path / "per_sample.npz").read_bytes())
    data[len(data) // 2] ^= 1  # one bit of one value
    (path / "per_sample.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"per_sample.npz damaged or missing"):
        load_run(path, mapped=True)


# From the command line


@pytest.fixture(scope="module")
def parts(run_cli, small, tmp_path_factory):
    """The parts of the seven questions, one in three and two without values per sample."""
    folder = tmp_path_factory.mktemp("parts")

    def run(shard, *more):
        return run_cli("collect", *small, "--shard", shard, "--output_dir", folder, *more).run_dir

    return [run(f"{k}/3") for k in (1, 2, 3)]


def test_parts_merge_to_the_whole(parts, finished, run_cli, tmp_path):
    result = run_cli("merge", parts[2], parts[0], parts[1], "--output_dir", tmp_path)
    assert result.out == f"{result.run_dir}\n"
    assert "7 samples of 3 runs, order: dataset" in result.err
    assert {p.name for p in result.run_dir.iterdir()} == {p.name for p in finished.iterdir()}
    merged, whole = load_run(result.run_dir), load_run(finished)
    for name in NAMES:
        # Other batches round otherwise: float32, so a few times 1e-7.
        np.testing.assert_allclose(merged[name].values, whole[name].values, rtol=5e-6)
        np.testing.assert_allclose(
            merged[f"{name}_mean"].values, whole[f"{name}_mean"].values, rtol=1e-6
        )
        mean = np.load(result.run_dir / f"{name}_mean.npy")
        np.testing.assert_allclose(mean, merged[name].values.mean(0, dtype=np.float64), rtol=1e-6)
    table, expected = (pd.read_parquet(p / "samples.parquet") for p in (result.run_dir, finished))
    pd.testing.assert_frame_equal(table, expected)
    meta, other = (json.loads((p / "meta.json").read_text()) for p in (result.run_dir, finished))
    for key in ("num_processed", "num_skipped", "num_truncated", "num_tokens", "accuracy",
                "dataset", "model", "token_agg", "answer_tokens"):  # fmt: skip
        assert meta[key] == other[key], key
    assert [leaf["dataset"]["shard"] for leaf in meta["merged"]] == ["3/3", "1/3", "2/3"]
    assert meta["merge"]["runs"] == [str(p.resolve()) for p in (parts[2], parts[0], parts[1])]
    config = json.loads((result.run_dir / "config.json").read_text())
    whole_config = json.loads((finished / "config.json").read_text())
    assert {k for k in config if config[k] != whole_config[k]} == {"output_dir"}


def test_places_are_those_of_the_whole(parts):
    tables = [pd.read_parquet(part / "samples.parquet") for part in parts]
    assert [t["index"].tolist() for t in tables] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_merge_can_be_merged(parts, run_cli, tmp_path):
    inner = run_cli("merge", *parts[:2], "--output_dir", tmp_path).run_dir
    assert json.loads((inner / "meta.json").read_text())["dataset"]["shard"] == ["1/3", "2/3"]
    outer = run_cli("merge", inner, parts[2], "--output_dir", tmp_path).run_dir
    flat = run_cli("merge", *parts, "--output_dir", tmp_path).run_dir
    a, b = load_run(outer), load_run(flat)
    xr.testing.assert_allclose(a, b, rtol=1e-12)
    left = {"merge", "finished_at"}
    assert {k: v for k, v in plain(a.attrs).items() if k not in left} == {
        k: v for k, v in plain(b.attrs).items() if k not in left
    }


def test_without_per_sample_file(parts, run_cli, small, tmp_path):
    bare = run_cli("collect", *small, "--shard", "2/3", "--per_sample", "false",
                   "--output_dir", tmp_path).run_dir  # fmt: skip
    result = run_cli("merge", parts[0], bare, parts[2], "--output_dir", tmp_path / "m")
    assert not (result.run_dir / "per_sample.npz").exists()
    assert f"no per_sample.npz is written: {bare} has none" in result.err
    whole = load_run(run_cli("merge", *parts, "--output_dir", tmp_path / "m").run_dir)
    assert (
        load_run(result.run_dir)["sample_id"].values.tolist() == whole["sample_id"].values.tolist()
    )


def damaged(folder, parts, llama):
    path = shutil.copytree(parts[1], folder / "damaged")
    data = (path / "moments.npz").read_bytes()
    (path / "moments.npz").write_bytes(data[: len(data) // 2])
    return [parts[0], path]


def unfinished(folder, parts, llama):
    path = shutil.copytree(parts[1], folder / "unfinished")
    (path / "meta.json").unlink()
    return [parts[0], path]


def fewer_rows(folder, parts, llama):
    path = shutil.copytree(parts[1], folder / "fewer")
    (path / "per_sample.npz").unlink()
    table = pd.read_parquet(path / "samples.parquet")
    table.iloc[:1].to_parquet(path / "samples.parquet", index=False)
    return [parts[0], path]


def copied(folder, parts, llama):
    return [parts[0], shutil.copytree(parts[0], folder / "copy")]


def another_model(folder, parts, llama):
    return [parts[0], llama]


REFUSED = {
    "none": (lambda *_: [], "merge: expected two run directories or more, found 0; use tl-headno"),
    "one": (lambda f, p, m: p[:1], "merge: expected two run directories or more, found 1; use "),
    "twice": (lambda f, p, m: [p[0], f"{p[0]}/../{p[0].name}"], "found again (as"),
    "missing": (lambda f, p, m: [p[0], f / "none"], "finished run directory with meta.json, found"),
    "a file": (lambda f, p, m: [p[0], p[0] / "meta.json"], "finished run directory with meta.js"),
    "unfinished": (unfinished, "a finished run directory with meta.json, found none in "),
    "damaged": (damaged, "expected moments.npz as collect wrote it, found "),
    "fewer rows": (fewer_rows, "found files that do not fit each other (ValueError: 1 rows in sam"),
    "a copy": (copied, "merge: expected every sample once, found 'q0' in "),
    "another model": (another_model, "found weights_sha256 "),
}


@pytest.fixture(scope="module")
def other_run(run_cli, small, bpe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    flags = [make_llama(folder / "m", bpe, seed=1) if i == 1 else x for i, x in enumerate(small)]
    return run_cli("collect", *flags, "--shard", "2/3", "--output_dir", folder).run_dir


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, parts, other_run, run_cli, tmp_path):
    make, message = REFUSED[name]
    runs = make(tmp_path, parts, other_run)
    result = run_cli("merge", *runs, "--output_dir", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    line = result.error_line
    assert message in line if name != "twice" else "different run directories" in line
    assert not (tmp_path / "out").exists()


def test_name_with_a_folder(parts, run_cli, tmp_path):
    result = run_cli("merge", *parts, "--experiment_name", "a/b", "--output_dir", tmp_path)
    assert "experiment_name: expected a name without '/'" in result.error_line


def test_settings_from_a_file(parts, run_cli, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(f"output_dir: {tmp_path}\nexperiment_name: all\n")
    assert run_cli("merge", *parts, "--config", path).run_dir.name.startswith("all_")
