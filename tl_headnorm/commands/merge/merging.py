"""Runs of parts of a dataset, made by machines that never met, become the run of the whole."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.errors import InputError
from tl_headnorm.run import results
from tl_headnorm.run.segments import RowFile
from tl_headnorm.settings import parse_shard
from tl_headnorm.stats import Moments

# What made the numbers, in the order in which a difference is named. Batch size, padding side
# and versions are not here: they are recorded, and change a number by rounding only.
MODEL = (
    "model.architecture", "model.n_layers", "model.n_heads", "model.n_key_value_heads",
    "model.d_head", "model.d_model", "model.dtype", "model.engine", "model.weight_processing",
)  # fmt: skip
NAMES_OF_WEIGHTS = ("model.source", "model.revision", "model.adapter")
PROMPTS = (
    "template.name", "template.sha256", "template.chat_sha256", "template.examples_sha256",
    "prepend_bos", "settings.chat", "settings.few_shot",
)  # fmt: skip
NUMBERS = ("token_agg", "exclude_first_token", "measures", "answer_scoring")
SAMPLE_COORDS = ("sample_id", "n_tokens", "answer_letter", "predicted", "correct")

# Samples that are copied at once.
CHUNK = 256

Record = dict[str, Any]


def merge_runs(
    runs: Sequence[xr.Dataset], names: Sequence[str] = (), folder: Path | None = None
) -> xr.Dataset:
    """One run of all samples: moments by Moments.merge, values per sample side by side.

    With `folder` the values are put together in files there that have no name, some samples at a
    time: with runs that are mapped (load_run) memory does not grow with the number of samples.

    Samples come in the order of the dataset where every run is of the same file (sha256) read on
    the same terms, else in the order given, numbered anew. Values per sample are kept where every
    run has them. `attrs["merged"]` holds the record of each run, those of a run that was merged
    before included; what they agree in stands in `attrs` itself, what they differ in as a list.
    Models are told apart by the digest of their weights, so that their paths may differ.

    Raises InputError as `check_runs`. What it cannot tell: whether two versions of a library
    computed alike.
    """
    every, known, order = check_runs(runs, names)
    moments = {
        name: reduce(Moments.merge, (_moments(run, name) for run in runs))
        for name in results.measures_of(runs[0])
    }
    values = {
        name: _in_order([run[name].values for run in runs], order, folder)
        for name in moments
        if all(name in run for run in runs)
    }
    record = merged_record(every) | {
        "merge": {"order": "dataset" if known else "as given"},
        "merged": every,
    }
    merged = results.build(values, moments, record)
    index = np.concatenate([run["sample"].values for run in runs])[order]
    merged.coords["sample"] = ("sample", index if known else np.arange(len(index)))
    for name in SAMPLE_COORDS:
        column = np.concatenate([run[name].values for run in runs])[order]
        merged.coords[name] = ("sample", column)
    correct = merged["correct"].values
    scored = all(value is not None for value in correct)
    merged.attrs["accuracy"] = sum(map(bool, correct)) / len(correct) if scored else None
    return merged


def check_runs(
    runs: Sequence[xr.Dataset], names: Sequence[str] = ()
) -> tuple[list[Record], bool, np.ndarray]:
    """The records of all runs, whether the order of the dataset is known, and that order.

    Raises InputError for fewer than two runs, for runs that differ in what made their numbers
    (model, data type, engine, prompts, aggregation, measures), and for a sample that is in two
    runs (same id, or same place in the same file).
    """
    if len(runs) < 2:
        raise InputError(f"runs: expected two run directories or more, found {len(runs)}")
    names = list(names) or [f"run {i}" for i in range(1, len(runs) + 1)]
    every = [leaf for run, name in zip(runs, names, strict=True) for leaf in leaves_of(run, name)]
    _check_alike(every)
    _check_variables(runs, names)
    known = _order_known(every)
    return every, known, _sample_order(runs, names, known)


def _in_order(parts: Sequence[np.ndarray], order: np.ndarray, folder: Path | None) -> np.ndarray:
    """The parts' rows side by side, in the order given."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    shape = (len(order), *parts[0].shape[1:])
    merged = RowFile(folder, shape, "<f4") if folder else np.zeros(shape, np.float32)
    done = 0
    for part in parts:
        for start in range(0, len(part), CHUNK):
            rows = part[start : start + CHUNK]
            merged[place[done : done + len(rows)]] = rows
            done += len(rows)
    return merged.array() if isinstance(merged, RowFile) else merged


def leaves_of(run: xr.Dataset, name: str) -> list[Record]:
    """The records of the runs in it: its own, or those it was merged from."""
    if "merged" in run.attrs:
        return list(run.attrs["merged"])
    return [{"run": name, **run.attrs}]


def _moments(run: xr.Dataset, name: str) -> Moments:
    n, mean, M2 = (run[f"{name}_{part}"].values for part in ("n", "mean", "M2"))
    # A cell without a sample reads NaN; merging knows it as 0.
    return Moments(n, np.where(n > 0, mean, 0.0), np.where(n > 0, M2, 0.0))


def _field(leaf: Mapping[str, Any], key: str) -> Any:
    found: Any = leaf
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _check_alike(leaves: Sequence[Record]) -> None:
    """Raise InputError naming the first thing in which a run differs from the first one."""
    known = all(leaf.get("weights_sha256") for leaf in leaves)
    names = () if known else NAMES_OF_WEIGHTS
    keys = [*names, "weights_sha256", *MODEL, *PROMPTS, *NUMBERS]
    if any(_field(leaf, "settings.few_shot") for leaf in leaves):
        keys.append("settings.seed")  # it draws the examples
    if any(leaf.get("num_truncated") for leaf in leaves):
        keys.append("settings.max_length")  # it says what was cut away
    keys += sorted({f"answer_tokens.{k}" for leaf in leaves for k in leaf.get("answer_tokens", {})})
    first = leaves[0]
    for key in keys:
        expected = _field(first, key)
        for leaf in leaves[1:]:
            found = _field(leaf, key)
            absent = key.startswith("answer_tokens.") and (found is None or expected is None)
            if found != expected and not absent:
                raise InputError(
                    f"merge: expected runs that were measured alike, found {key} "
                    f"{_short(expected)} in {first['run']} and {_short(found)} in "
                    f"{leaf['run']}; measure them alike, or merge those that were"
                )


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_variables(runs: Sequence[xr.Dataset], names: Sequence[str]) -> None:
    """The arrays themselves must fit, whatever the records say."""
    for what, of in (
        ("measures", lambda run: tuple(sorted(results.measures_of(run)))),
        ("layers and heads", lambda run: (run.sizes["layer"], run.sizes["head"])),
    ):
        for run, name in zip(runs[1:], names[1:], strict=True):
            if of(run) != of(runs[0]):
                raise InputError(
                    f"merge: expected runs with the same {what}, found {of(runs[0])} in "
                    f"{names[0]} and {of(run)} in {name}; merge runs of one model and one choice "
                    "of measures"
                )


def _order_known(leaves: Sequence[Record]) -> bool:
    """Whether a sample's index is its place in one and the same list of questions."""
    terms = ("dataset.name", "dataset.split", "dataset.sha256", "settings.n_options",
             "settings.on_bad_record")  # fmt: skip
    alike = all(len(distinct(_field(leaf, key) for leaf in leaves)) == 1 for key in terms)
    return alike and _field(leaves[0], "dataset.sha256") is not None


def _sample_order(runs: Sequence[xr.Dataset], names: Sequence[str], known: bool) -> np.ndarray:
    """Where each sample of the merged run stands in the runs put side by side."""
    owner = np.repeat(np.arange(len(runs)), [run.sizes["sample"] for run in runs])
    ids = [str(i) for run in runs for i in run["sample_id"].values]
    _check_once(ids, owner, names, ids)
    index = np.concatenate([run["sample"].values for run in runs])
    if not known:
        return np.arange(len(index))
    _check_once(index.tolist(), owner, names, ids)
    return np.argsort(index, kind="stable")


def _check_once(
    keys: Sequence[Any], owner: np.ndarray, names: Sequence[str], ids: Sequence[str]
) -> None:
    first: dict[Any, int] = {}
    for row, key in enumerate(keys):
        if key in first:
            raise InputError(
                f"merge: expected every sample once, found {ids[row]!r} in "
                f"{names[owner[first[key]]]} and again in {names[owner[row]]}; merge runs of "
                "different samples (see --shard), and give different questions different ids"
            )
        first[key] = row


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of its first appearance; they need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def alike(values: Sequence[Any]) -> Any:
    """The value all share, else the list of the different ones; dicts key by key."""
    different = distinct(values)
    if len(different) == 1:
        return different[0]
    if all(isinstance(value, Mapping) for value in different):
        keys = dict.fromkeys(key for value in different for key in value)
        return {key: alike([value.get(key) for value in values]) for key in keys}
    return different


def merged_record(leaves: Sequence[Record]) -> Record:
    """What meta.json says of all of them: sums, extremes, and what they agree in."""
    keys = dict.fromkeys(key for leaf in leaves for key in leaf)
    record = {key: alike([leaf.get(key) for leaf in leaves]) for key in keys if key != "run"}
    for key in ("num_processed", "num_truncated", "num_tokens"):
        record[key] = sum(leaf[key] for leaf in leaves)
    seconds = sum(leaf["wall_seconds"] for leaf in leaves)
    skipped: Counter[str] = Counter()
    for leaf in leaves:
        skipped.update(leaf["num_skipped"])
    checked = [leaf["validated_against_hf"] for leaf in leaves]
    shard = _shard(leaves)
    datasets = [leaf["dataset"] for leaf in leaves]
    record |= {
        "num_skipped": dict(skipped),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(record["num_tokens"] / max(seconds, 1e-9), 1),
        "peak_memory_bytes": max(leaf["peak_memory_bytes"] for leaf in leaves),
        "started_at": min((leaf["started_at"] for leaf in leaves), key=datetime.fromisoformat),
        "finished_at": max((leaf["finished_at"] for leaf in leaves), key=datetime.fromisoformat),
        "validated_against_hf": None if None in checked else max(checked),
        "model": leaves[0]["model"],
        "dataset": alike(datasets) | {"shard": shard} | _in_words(datasets),
        "settings": record["settings"] | {"shard": shard},
        "answer_tokens": {
            letter: token
            for leaf in leaves
            for letter, token in (leaf.get("answer_tokens") or {}).items()
        },
    }
    return record


def _in_words(datasets: Sequence[Record]) -> Record:
    """Name and split stay text, for titles."""
    return {
        key: " + ".join(map(str, distinct(data[key] for data in datasets)))
        for key in ("name", "split")
    }


def _shard(leaves: Sequence[Record]) -> Any:
    """None where the parts are the whole, else which parts there are."""
    shards = [_field(leaf, "dataset.shard") for leaf in leaves]
    parts = [parse_shard(shard) for shard in shards]
    if None not in parts:
        counts = {part[1] for part in parts if part}
        found = {part[0] for part in parts if part}
        if len(counts) == 1 and found == set(range(1, counts.pop() + 1)) and _order_known(leaves):
            return None
    return alike(shards)
