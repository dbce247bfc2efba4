"""Run directories read back, into memory or as files are used."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.measures import layer_normalised, uniform_first_attention
from tl_headnorm.run.directory import is_finished
from tl_headnorm.run.results import build, measures_of
from tl_headnorm.stats import Moments


def load_run(path: str | Path, *, mapped: bool = False) -> xr.Dataset:
    """The Dataset of a finished run directory. Raises InputError where it is not one.

    `mapped`: values per sample are read from disk as they are used, not into memory.
    """
    folder = Path(path).expanduser()
    if not is_finished(folder):
        raise InputError(
            f"run: expected a finished run directory with meta.json, found none in {folder}; "
            "check the path, or run collect again if it was interrupted"
        )
    record = _read(folder / "meta.json", _json)
    record["settings"] = _read(folder / "config.json", _json)
    stored = _read(folder / "moments.npz", _arrays)
    samples = folder / "per_sample.npz"
    values = _read(samples, mapped_npz if mapped else _arrays) if samples.exists() else {}
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


def mapped_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed .npz, read from disk as they are used, in little memory.

    Raises ValueError where the archive's checksums do not hold.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} has another checksum")
        for entry in archive.infolist():
            with archive.open(entry) as member, path.open("rb") as stream:
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                stream.seek(entry.header_offset + 26)  # the lengths of the entry's name and extras
                lengths = sum(int.from_bytes(stream.read(2), "little") for _ in range(2))
                start = entry.header_offset + 30 + lengths + member.tell()
            if entry.compress_type != zipfile.ZIP_STORED or fortran:
                raise ValueError(f"{entry.filename} is compressed or in Fortran order")
            array = (
                np.memmap(path, dtype, "r", start, shape)
                if 0 not in shape
                else np.zeros(shape, dtype)
            )
            found[entry.filename.removesuffix(".npy")] = array
    return found
