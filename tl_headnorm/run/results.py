"""xarray.Dataset <-> run directory, and the record of how a result came about."""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.measures import (
    FOLLOW_TOKEN_AGG,
    MEASURES,
    layer_normalised,
    uniform_first_attention,
)
from tl_headnorm.plots import notebook
from tl_headnorm.run.files import write_bytes, write_json, write_with
from tl_headnorm.stats import Moments


def now() -> str:
    """Local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {
        "torch": "torch",
        "transformers": "transformers",
        "transformer_lens": "transformer-lens",
        "tl_headnorm": "tl-headnorm",
    }
    found = {"python": platform.python_version()}
    for name, package in packages.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: of the CUDA device, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def build(
    values: Mapping[str, np.ndarray], moments: Mapping[str, Moments], record: Mapping[str, Any]
) -> xr.Dataset:
    """The Dataset of a run: per measure mean, std, n and M2 [layer, head], values per sample."""
    run = xr.Dataset(attrs=dict(record))
    for name, moment in moments.items():
        text = {**_words(name, record), "measure": name}
        parts = {"mean": moment.mean_or_nan(), "std": moment.std(), "n": moment.n, "M2": moment.M2}
        for part, array in parts.items():
            run[f"{name}_{part}"] = (("layer", "head"), array, {**text, "statistic": part})
        if name in values:
            run[name] = (("sample", "layer", "head"), values[name], text)
    shape = run.sizes
    run = run.assign_coords(layer=np.arange(shape["layer"]), head=np.arange(shape["head"]))
    counts = run[f"{next(iter(moments))}_n"].sum("head").values
    run.attrs["missing_layers"] = [int(layer) for layer in np.flatnonzero(counts == 0)]
    _label(run)
    notebook.show_runs()
    return run


def _words(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Formula and unit of a measure: the run's own record, for it may be a user's."""
    known = record.get("measures", {}).get(name)
    if known is None:
        known = {"formula": MEASURES[name].formula, "unit": MEASURES[name].unit}
    return {"units": known["unit"], "formula": known["formula"]}


def measures_of(run: xr.Dataset) -> list[str]:
    """Names of the measures that a run holds."""
    return [str(v).removesuffix("_M2") for v in run.data_vars if str(v).endswith("_M2")]


def _label(run: xr.Dataset) -> None:
    """For figures of the means: title, std for the hover text, heads that share keys."""
    model, dataset = run.attrs["model"], run.attrs["dataset"]
    where = "last token" if run.attrs["token_agg"] == "last" else "mean over tokens"
    title = (
        f"{Path(model['source']).name} · {dataset['name']} {dataset['split']} · "
        f"n={run.attrs['num_processed']:,}"
    )
    for name in measures_of(run):
        # The others say in their formula which tokens they are of.
        at = f" · {where}" if name in FOLLOW_TOKEN_AGG else ""
        run[f"{name}_mean"].attrs.update(
            title=title + at, std=run[f"{name}_std"].values,
            n_key_value_heads=model.get("n_key_value_heads"),
        )  # fmt: skip


def add_samples(
    run: xr.Dataset, questions: Sequence[Any], encoded: Sequence[Any], predicted: np.ndarray
) -> None:
    """One entry per sample: id, n_tokens, answer letter, predicted letter, correct; accuracy."""
    letters = np.array([q.answer_letter for q in questions], dtype=object)
    scored = len(predicted) > 0 and bool((predicted >= 0).all())
    guesses = [q.letters[p] if scored else None for q, p in zip(questions, predicted, strict=True)]
    correct = [g == a if scored else None for g, a in zip(guesses, letters, strict=True)]
    columns = {
        "sample_id": np.array([q.id for q in questions], dtype=object),
        "n_tokens": np.array([len(sample) for sample in encoded], dtype=np.int64),
        "answer_letter": letters,
        "predicted": np.array(guesses, dtype=object),
        "correct": np.array(correct, dtype=object),
    }
    for name, column in columns.items():
        run.coords[name] = ("sample", column)
    places = getattr(questions, "places", None) or range(len(letters))
    run.coords["sample"] = ("sample", np.array(places, dtype=np.int64))
    run.attrs["accuracy"] = sum(map(bool, correct)) / len(correct) if scored else None


def samples_table(run: xr.Dataset) -> pd.DataFrame:
    """samples.parquet: one row per sample."""
    table = pd.DataFrame(
        {
            "index": run["sample"].values,
            "id": [str(x) for x in run["sample_id"].values],
            "n_tokens": run["n_tokens"].values,
            "answer_letter": [str(x) for x in run["answer_letter"].values],
            "predicted": pd.array(list(run["predicted"].values), dtype="string"),
            "correct": pd.array(list(run["correct"].values), dtype="boolean"),
        }
    )
    return table


def heads_table(run: xr.Dataset) -> pd.DataFrame:
    """heads.parquet: one row per head, a column per statistic."""
    layer, head = np.meshgrid(run["layer"].values, run["head"].values, indexing="ij")
    table = pd.DataFrame({"layer": layer.ravel(), "head": head.ravel()})
    for name in measures_of(run):
        for part in ("mean", "std", "n"):
            table[f"{name}_{part}"] = run[f"{name}_{part}"].values.ravel()
    return table


def new_run_dir(output_dir: str | Path, experiment_name: str) -> Path:
    """Make `<output_dir>/<experiment_name>_<YYYYmmdd_HHMMSS>`, a second later if it is taken.

    Raises InputError where it cannot be written.
    """
    moment = datetime.now()
    while True:
        path = Path(output_dir).expanduser() / f"{experiment_name}_{moment:%Y%m%d_%H%M%S}"
        try:
            path.mkdir(parents=True)
            write_bytes(path / ".writable", b"")
            (path / ".writable").unlink()
            return path
        except FileExistsError:
            if not path.is_dir():
                raise _not_writable(output_dir, "it is a file") from None
            moment += timedelta(seconds=1)
        except OSError as error:
            remove_if_empty(path)
            raise _not_writable(output_dir, first_line(error)) from None


def _not_writable(output_dir: str | Path, why: str) -> InputError:
    return InputError(
        f"output_dir: expected a directory that can be written, found {output_dir} ({why}); "
        "choose another with --output_dir"
    )


def save_arrays(run: xr.Dataset, path: Path) -> None:
    """Write everything of the run directory but figures and meta.json; each file appears whole."""
    write_json(path / "config.json", run.attrs["settings"])
    names = measures_of(run)
    for name in names:
        for part in ("mean", "std"):
            array = run[f"{name}_{part}"].values.astype(np.float64)
            write_with(path / f"{name}_{part}.npy", partial(_save_array, array))
    moments = {
        f"{name}_{part}": run[f"{name}_{part}"].values
        for name in names
        for part in ("n", "mean", "M2")
    }
    write_with(path / "moments.npz", partial(_save_arrays, moments))
    if all(name in run for name in names):
        arrays = {name: run[name].values.astype(np.float32) for name in names}
        write_with(path / "per_sample.npz", partial(_save_arrays, arrays))
    heads, samples = heads_table(run), samples_table(run)
    write_with(path / "heads.parquet", lambda f: heads.to_parquet(f, index=False))
    write_with(path / "samples.parquet", lambda f: samples.to_parquet(f, index=False))


def finish(run: xr.Dataset, path: Path) -> None:
    """Write meta.json, which says that the directory is complete."""
    meta = {key: value for key, value in run.attrs.items() if key != "settings"}
    write_json(path / "meta.json", meta)


def _save_array(array: np.ndarray, stream: Any) -> None:
    np.save(stream, array)


def _save_arrays(arrays: Mapping[str, np.ndarray], stream: Any) -> None:
    np.savez(stream, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub: keywords are bool


def load_run(path: str | Path) -> xr.Dataset:
    """The Dataset of a finished run directory. Raises InputError where it is not one."""
    folder = Path(path).expanduser()
    if not (folder / "meta.json").is_file():
        raise InputError(
            f"run: expected a finished run directory with meta.json, found none in {folder}; "
            "check the path, or run collect again if it was interrupted"
        )
    record = _read(folder / "meta.json", _json)
    record["settings"] = _read(folder / "config.json", _json)
    stored = _read(folder / "moments.npz", _arrays)
    samples = folder / "per_sample.npz"
    values = _read(samples, _arrays) if samples.exists() else {}
    table = _read(folder / "samples.parquet", pd.read_parquet)
    try:
        return _assemble(record, stored, values, table)
    except Exception as error:  # what is missing or of another kind shows itself anywhere
        raise InputError(
            f"run: expected what collect wrote in {folder}, found files that do not fit each "
            f"other ({type(error).__name__}: {first_line(error)}); run collect again"
        ) from error


def derive(run: xr.Dataset) -> xr.Dataset:
    """The run with what follows from its per-sample values, and is therefore never stored.

    `<measure>_over_layer` [sample, layer, head]: each value over the mean size of its layer's
    heads on that sample; `<measure>_over_layer_mean` [layer, head]: its mean over samples. Beside
    attention_first, `attention_first_uniform` [sample] is that of a head that attends alike to
    all it may see. Raises InputError without per-sample values.
    """
    found = run.copy()
    for name in measures_of(run):
        if name not in run:
            raise InputError(
                f"run: expected per-sample values of {name}, found none; collect with "
                "--per_sample true"
            )
        words = run[name].attrs | {"formula": f"{run[name].attrs['formula']} / layer mean"}
        values = layer_normalised(run[name].values.astype(np.float64))
        found[f"{name}_over_layer"] = (run[name].dims, values, {**words, "units": "share"})
        mean = Moments.of(values).mean_or_nan()
        words = {**words, "units": "share", "statistic": "mean"}
        found[f"{name}_over_layer_mean"] = (("layer", "head"), mean, words)
    if "attention_first" in run:
        shares = [uniform_first_attention(int(n)) for n in run["n_tokens"].values]
        found.coords["attention_first_uniform"] = ("sample", np.array(shares))
    return found


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """A file of a run; damaged ones fail in as many ways as there are formats."""
    try:
        return read(path)
    except Exception as error:
        what = "no such file" if not path.exists() else first_line(error)
        raise InputError(
            f"run: expected {path.name} as collect wrote it, found {path} damaged or missing "
            f"({what}); run collect again"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    # np.load would leave the file of a damaged archive open.
    with path.open("rb") as stream, np.load(stream) as stored:
        return {name: stored[name] for name in stored.files}


def _assemble(
    record: dict[str, Any],
    stored: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    table: pd.DataFrame,
) -> xr.Dataset:
    names = [key.removesuffix("_M2") for key in stored if key.endswith("_M2")]
    if not names:
        raise ValueError("no measure in moments.npz")
    moments = {
        name: Moments(*(stored[f"{name}_{part}"] for part in ("n", "mean", "M2"))) for name in names
    }
    run = build({name: values[name] for name in names if values}, moments, record)
    most = max(int(moment.n.max()) for moment in moments.values())
    if most > len(table) or len(table) != record["num_processed"]:
        raise ValueError(
            f"{len(table)} rows in samples.parquet, {most} samples in moments.npz, "
            f"{record['num_processed']} in meta.json"
        )
    run.coords["sample"] = ("sample", table["index"].to_numpy())
    run.coords["sample_id"] = ("sample", table["id"].to_numpy(dtype=object))
    run.coords["n_tokens"] = ("sample", table["n_tokens"].to_numpy(dtype=np.int64))
    for column in ("answer_letter", "predicted", "correct"):
        known = table[column].astype(object)
        run.coords[column] = ("sample", known.where(known.notna(), None).to_numpy(dtype=object))
    return run


def remove_if_empty(path: Path) -> None:
    """Take back a run directory in which nothing was written."""
    try:
        path.rmdir()
    except OSError:
        return
