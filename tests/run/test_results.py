"""The run directory: every file of the contract, read back as it was, whole or not there."""

import json
import re
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import SIZES

import tl_headnorm
from tl_headnorm import collect, load_model, load_questions, load_run
from tl_headnorm.commands.collect import plots
from tl_headnorm.errors import InputError
from tl_headnorm.measures import NORMS
from tl_headnorm.run.directory import new_run_dir
from tl_headnorm.run.files import plain, write_bytes, write_json, write_with
from tl_headnorm.run.results import heads_table, samples_table
from tl_headnorm.settings import Settings

SHAPE = (SIZES["num_hidden_layers"], SIZES["num_attention_heads"])
N = 7
NAMES = tuple(measure.name for measure in NORMS)
FILES = {
    "config.json", "meta.json", "heads.parquet", "samples.parquet", "per_sample.npz",
    "moments.npz",
    *(f"head_{m}_{part}.npy" for m in ("output_norm", "resid_contrib_norm")
      for part in ("mean", "std")),
    *(f"head_{m}_heatmap.{end}" for m in ("output_norm", "resid_contrib_norm")
      for end in ("html", "png")),
}  # fmt: skip
META = {
    "num_processed", "num_skipped", "num_truncated", "num_tokens", "missing_layers", "accuracy",
    "model", "dataset", "template", "prepend_bos", "padding_side", "token_agg", "versions",
    "git_commit", "validated_against_hf", "wall_seconds", "tokens_per_second",
    "peak_memory_bytes", "seed", "started_at", "finished_at",
}  # fmt: skip
MODEL = {"source", "revision", "architecture", "n_layers", "n_heads", "n_key_value_heads",
         "d_head", "d_model", "dtype", "engine", "weight_processing"}  # fmt: skip


@pytest.fixture(scope="module")
def meta(finished):
    return json.loads((finished / "meta.json").read_text())


def test_every_file_of_the_contract(finished):
    found = {path.name for path in finished.iterdir()}
    assert found >= FILES
    assert not {name for name in found if name.startswith(".")}, "nothing temporary is left"
    assert re.fullmatch(r"arc_head_activation_\d{8}_\d{6}", finished.name)


def test_arrays(finished):
    for name in NAMES:
        mean, std = (np.load(finished / f"{name}_{part}.npy") for part in ("mean", "std"))
        for array in (mean, std):
            assert (array.dtype, array.shape) == (np.float64, SHAPE)
            assert np.isfinite(array).all()
        with np.load(finished / "per_sample.npz") as stored:
            assert set(stored.files) == set(NAMES)
            values = stored[name]
        assert (values.dtype, values.shape) == (np.float32, (N, *SHAPE))
        np.testing.assert_allclose(mean, values.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(std, values.std(0, ddof=1, dtype=np.float64), rtol=1e-5)


def test_moments(finished):
    with np.load(finished / "moments.npz") as stored:
        assert set(stored.files) == {f"{m}_{p}" for m in NAMES for p in ("n", "mean", "M2")}
        for name in NAMES:
            assert stored[f"{name}_n"].dtype == np.int64
            assert (stored[f"{name}_n"] == N).all()
            mean, std = (np.load(finished / f"{name}_{part}.npy") for part in ("mean", "std"))
            assert np.array_equal(stored[f"{name}_mean"], mean)
            np.testing.assert_allclose(np.sqrt(stored[f"{name}_M2"] / (N - 1)), std)


def test_heads_table(finished):
    table = pd.read_parquet(finished / "heads.parquet")
    assert list(table)[:2] == ["layer", "head"]
    assert set(table) >= {f"{m}_{part}" for m in NAMES for part in ("mean", "std", "n")}
    assert len(table) == SHAPE[0] * SHAPE[1]
    mean = np.load(finished / "head_output_norm_mean.npy")
    row = table[(table["layer"] == 2) & (table["head"] == 5)].iloc[0]
    assert row["head_output_norm_mean"] == mean[2, 5]


def test_samples_table(finished, questions_file, llama_dir, meta):
    table = pd.read_parquet(finished / "samples.parquet")
    columns = ["index", "id", "n_tokens", "answer_letter", "predicted", "correct"]
    assert list(table)[:6] == columns
    questions = load_questions(data_dir=questions_file)
    assert table["index"].tolist() == list(range(N))
    assert table["id"].tolist() == [q.id for q in questions]
    assert table["answer_letter"].tolist() == [q.answer_letter for q in questions]
    assert table["n_tokens"].sum() == meta["num_tokens"]
    for row, question in zip(table.itertuples(), questions, strict=True):
        assert row.predicted in question.letters
    right = table["predicted"] == table["answer_letter"]
    assert table["correct"].tolist() == right.tolist()
    assert meta["accuracy"] == pytest.approx(right.mean())


def test_meta(finished, meta, llama_dir, questions_file):
    assert set(meta) >= META
    assert set(meta["model"]) >= MODEL
    assert meta["num_processed"] == N
    assert meta["num_skipped"] == {"3 options": 1}
    assert (meta["num_truncated"], meta["missing_layers"]) == (0, [])
    assert meta["model"]["source"] == str(llama_dir)
    assert (meta["model"]["n_layers"], meta["model"]["n_heads"]) == SHAPE
    assert meta["model"]["n_key_value_heads"] == SIZES["num_key_value_heads"]
    assert meta["model"]["d_head"] == SIZES["head_dim"]
    assert meta["model"]["d_model"] == SIZES["hidden_size"]
    assert (meta["model"]["dtype"], meta["model"]["weight_processing"]) == ("fp32", "none")
    assert set(meta["dataset"]) >= {"name", "split", "path", "sha256"}
    assert meta["dataset"]["path"] == str(questions_file)
    assert set(meta["template"]) >= {"name", "sha256", "common_prefix_length"}
    assert meta["template"]["common_prefix_length"] > 10
    versions = {"python", "torch", "transformers", "transformer_lens", "tl_headnorm"}
    assert set(meta["versions"]) >= versions
    assert "unknown" not in meta["versions"].values()
    assert meta["validated_against_hf"] is None
    assert meta["prepend_bos"] is True
    started, ended = (datetime.fromisoformat(meta[k]) for k in ("started_at", "finished_at"))
    assert started <= ended
    assert meta["wall_seconds"] > 0
    assert meta["peak_memory_bytes"] > 1e6


def test_config(finished, llama_dir):
    config = json.loads((finished / "config.json").read_text())
    assert set(config) == set(Settings().as_dict())
    assert config["model_path"] == str(llama_dir)
    assert (config["dtype"], config["max_length"], config["n_options"]) == ("fp32", 400, [4, 5])
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    assert Settings(**config).as_dict() == json.loads((finished / "config.json").read_text())


def test_json_is_strict(finished):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for name in ("meta.json", "config.json"):
        json.loads((finished / name).read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def model(llama_dir):
    return load_model(llama_dir, dtype="fp32", device_map="cpu")


@pytest.fixture
def save(tmp_path):
    def written(run):
        from tl_headnorm.run.results import finish, save_arrays

        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_arrays(run, folder)
        finish(run, folder)
        return folder

    return written


def same(found, expected):
    """Equal values, coordinates and record (JSON has no tuples)."""
    xr.testing.assert_equal(found, expected)
    assert plain(found.attrs) == plain(expected.attrs)
    for name in expected.variables:
        assert found[name].dims == expected[name].dims
        assert found[name].dtype == expected[name].dtype, name
        assert plain(found[name].attrs) == plain(expected[name].attrs)


@pytest.mark.parametrize("changes", [{}, {"score_answers": False}, {"token_agg": "all"}])
def test_load_run_gives_back_the_dataset(changes, model, questions_file, save):
    questions = load_questions(data_dir=questions_file, max_samples=4)
    run = collect(model, questions, max_length=400, progress=False, **changes)
    back = load_run(save(run))
    same(back, run)
    assert back["head_output_norm"].dims == ("sample", "layer", "head")
    for table in (heads_table, samples_table):
        pd.testing.assert_frame_equal(table(back), table(run))


def test_a_read_run_can_be_written_again(finished, save):
    once = load_run(finished)
    same(load_run(save(once)), once)


def test_one_sample_has_no_spread(model, questions_file, save):
    questions = load_questions(data_dir=questions_file, max_samples=1)
    folder = save(collect(model, questions, max_length=400, progress=False))
    for name in NAMES:
        assert np.isnan(np.load(folder / f"{name}_std.npy")).all()
        assert np.isfinite(np.load(folder / f"{name}_mean.npy")).all()
    table = pd.read_parquet(folder / "heads.parquet")
    assert table["head_output_norm_std"].isna().all()
    assert (table["head_output_norm_n"] == 1).all()


def test_not_scored_is_null_not_false(model, questions_file, save):
    questions = load_questions(data_dir=questions_file, max_samples=2)
    run = collect(model, questions, max_length=400, progress=False, score_answers=False)
    folder = save(run)
    table = pd.read_parquet(folder / "samples.parquet")
    assert table["predicted"].isna().all()
    assert table["correct"].isna().all()
    assert json.loads((folder / "meta.json").read_text())["accuracy"] is None


def test_without_per_sample(run_cli, small, tmp_path, finished):
    run = run_cli("collect", *small, "--per_sample", "false", "--output_dir", tmp_path).run_dir
    assert {p.name for p in run.iterdir()} >= FILES - {"per_sample.npz"}
    assert not (run / "per_sample.npz").exists()
    loaded = load_run(run)
    assert "head_output_norm" not in loaded
    assert loaded["sample_id"].size == N
    for name in NAMES:
        np.testing.assert_allclose(loaded[f"{name}_mean"], load_run(finished)[f"{name}_mean"])


def test_validated_runs_are_stamped(run_cli, small, tmp_path):
    result = run_cli("collect", *small, "--validate_samples", 2, "--output_dir", tmp_path)
    stamp = json.loads((result.run_dir / "meta.json").read_text())["validated_against_hf"]
    assert 0 <= stamp < 1e-4
    assert "against Hugging Face: worst relative difference" in result.err


@pytest.fixture
def copied(finished, tmp_path):
    import shutil

    return shutil.copytree(finished, tmp_path / "copy")


def refused(folder):
    with pytest.raises(InputError) as caught:
        load_run(folder)
    message = str(caught.value)
    assert message.startswith("run: expected ")
    assert "\n" not in message
    assert str(folder) in message
    return message


NEEDED = ["moments.npz", "samples.parquet", "config.json"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(name, copied):
    (copied / name).unlink()
    assert f"{name} damaged or missing (no such file); run collect again" in refused(copied)


@pytest.mark.parametrize("name", [*NEEDED, "meta.json", "per_sample.npz"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_file_is_named(name, keep, copied):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: int(len(data) * keep)])
    assert f"expected {name} as collect wrote it" in refused(copied)


def test_files_of_two_runs_do_not_mix(copied):
    with np.load(copied / "per_sample.npz") as stored:
        fewer = {name: stored[name][:3] for name in stored.files}
    np.savez(copied / "per_sample.npz", **fewer)
    assert "files that do not fit each other" in refused(copied)
    (copied / "meta.json").write_text("{}")
    assert "files that do not fit each other" in refused(copied)


@pytest.mark.parametrize("make", ["nothing", "empty"])
def test_no_run_directory(make, tmp_path):
    folder = tmp_path / "x"
    if make == "empty":
        folder.mkdir()
    assert "a finished run directory with meta.json, found none" in refused(folder)


def test_meta_is_written_last(run_cli, small, tmp_path, monkeypatch):
    """A run that fails in its figures must not look complete."""

    def fail(array, stem):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save_heatmap", fail)
    result = run_cli("collect", *small, "--max_samples", 2, "--output_dir", tmp_path)
    assert result.code == 2
    assert result.out == ""
    (folder,) = tmp_path.iterdir()
    assert (folder / "moments.npz").is_file(), "the failure came after the arrays"
    assert not (folder / "meta.json").exists()
    assert "found none" in refused(folder)


def test_nothing_follows_meta(run_cli, small, tmp_path, monkeypatch):
    order = []
    replace = tl_headnorm.run.files.Path.replace

    def record(self, target):
        order.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(tl_headnorm.run.files.Path, "replace", record)
    run = run_cli("collect", *small, "--max_samples", 1, "--output_dir", tmp_path).run_dir
    assert order[-1] == "meta.json"
    while_it_runs = {".writable", "command", "run.json", "00000000-0000.npz"}
    assert {p.name for p in run.iterdir()} == set(order) - while_it_runs


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def fail(stream):
        stream.write(b"half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_with(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_json_of_numpy_and_nan(tmp_path):
    data = {"a": np.float32(1.5), "b": np.nan, "c": (np.int64(3), np.array([1.0, np.inf])), 4: {5}}
    write_json(tmp_path / "x.json", data)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": 1.5, "b": None, "c": [3, [1.0, None]], "4": [5]}


def test_two_runs_in_the_same_second(tmp_path):
    made = [new_run_dir(tmp_path / "deep" / "er", "name") for _ in range(4)]
    assert len(set(made)) == 4
    assert all(re.fullmatch(r"name_\d{8}_\d{6}", path.name) for path in made)
    assert all(not list(path.iterdir()) for path in made)
