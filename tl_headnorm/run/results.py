"""xarray.Dataset <-> run directory."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.measures import (
    FOLLOW_TOKEN_AGG,
    MEASURES,
)
from tl_headnorm.run.files import write_json, write_with
from tl_headnorm.run.record import git_commit as git_commit
from tl_headnorm.run.record import now as now
from tl_headnorm.run.record import peak_memory_bytes as peak_memory_bytes
from tl_headnorm.run.record import versions as versions
from tl_headnorm.stats import Moments


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
        arrays = {name: np.asarray(run[name].values, np.float32) for name in names}
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
