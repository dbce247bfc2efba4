"""What lies beside a run: studies of the same model, their pages, and their score of each head."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

# A file that only this kind of directory has; the first that fits names it.
KINDS = {
    "ablation.parquet": "ablation",
    "attribution.parquet": "attribution",
    "dims.parquet": "massive activations",
    "attention.html": "attention",
    "prompt_000/attention.html": "attention",
    "steer.parquet": "steering",
    "prompts.parquet": "steering",
    "inactive.parquet": "inactive heads",
    "compare.parquet": "comparison",
    "stability.json": "stability",
    "moments.npz": "head norms",
}
READABLE = (".html", ".md")
MOST_SCORES = 24
MOST_PAGES = 3  # of a folder per prompt


@dataclass(frozen=True)
class Study:
    """A finished directory: its kind, its name, and (label, relative link) of what to read."""

    kind: str
    name: str
    about: str
    links: tuple[tuple[str, str], ...]
    path: Path


@dataclass(frozen=True)
class Score:
    """One number per head from a study, NaN where it did not look at the head."""

    study: str
    name: str
    values: np.ndarray  # [layer, head]
    stderr: np.ndarray | None = None


def studies_beside(path: Path, meta: Mapping[str, Any]) -> list[Study]:
    """Finished directories in the same folder with this run's model and, where named, its data."""
    folder = path.resolve().parent
    found = []
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name == path.resolve().name or not (other / "meta.json").is_file():
            continue
        record = _read_json(other / "meta.json")
        kind = _kind(other)
        if kind is None or not (_same(meta, record) or _mentions(record, path)):
            continue
        found.append(Study(kind, other.name, _about(record), tuple(_links(other)), other))
    return found


def _kind(folder: Path) -> str | None:
    return next((kind for file, kind in KINDS.items() if (folder / file).is_file()), "study")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _part(meta: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = meta.get(name)
    return part if isinstance(part, Mapping) else {}


def _same(meta: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """The same weights; the same questions, unless the study used none."""
    ours, theirs = _part(meta, "model"), _part(other, "model")
    keys = ("source", "revision", "adapter", "n_layers", "n_heads")
    if not theirs or any(ours.get(key) != theirs.get(key) for key in keys):
        return False
    data, used = _part(meta, "dataset"), _part(other, "dataset")
    return not used or (data.get("name"), data.get("sha256")) == (
        used.get("name"),
        used.get("sha256"),
    )


def _mentions(other: Mapping[str, Any], path: Path) -> bool:
    """A comparison or a stability report names the runs it was made of."""
    text = [v for v in other.values() if isinstance(v, str)]
    text += [v for vs in other.values() if isinstance(vs, list) for v in vs if isinstance(v, str)]
    return any(Path(value).name == path.resolve().name for value in text)


def _about(record: Mapping[str, Any]) -> str:
    """What the study ran on, in a few words."""
    data = _part(record, "dataset")
    words = [f"{data.get('name')} {data.get('split') or ''}".strip()] if data else []
    if record.get("texts"):
        words.append(Path(str(_part(record, "texts").get("path", "texts"))).name)
    if record.get("num_processed"):
        words.append(f"n={record['num_processed']:,}")
    if record.get("finished_at"):
        words.append(str(record["finished_at"])[:10])
    return " · ".join(words)


def _links(folder: Path) -> Iterator[tuple[str, str]]:
    """Pages and summaries by their path relative to the run; the heatmaps' own pages left out."""
    pages = [f for f in sorted(folder.iterdir()) if f.suffix in READABLE]
    pages += sorted(folder.glob("prompt_*/*.html"))[:MOST_PAGES]
    for file in pages:
        inside = file.relative_to(folder).as_posix()
        if not inside.endswith("_heatmap.html"):
            yield inside, f"../{quote(folder.name)}/{quote(inside)}"


def scores_of(studies: list[Study], shape: tuple[int, int]) -> list[Score]:
    """What ablation and attribution say of single heads, the newest directories first."""
    found: list[Score] = []
    for study in reversed(studies):
        if study.kind == "ablation":
            names = {"accuracy_drop": "accuracy lost (share)", "loss_delta": "loss added (nats)"}
            found += _scores(study, "ablation.parquet", names, shape)
        elif study.kind == "attribution":
            found += _scores(study, "attribution.parquet", {"mean": "attribution"}, shape)
    return found[:MOST_SCORES]


def _scores(
    study: Study, file: str, columns: Mapping[str, str], shape: tuple[int, int]
) -> Iterator[Score]:
    try:
        table = pd.read_parquet(study.path / file)
        single = table[(table["head"] >= 0) & (table["layer"] >= 0)]
    except (OSError, ValueError, KeyError):
        return  # a damaged study is no fault of this run
    for method, rows in single.groupby("method", sort=False):
        at = rows["layer"].to_numpy(), rows["head"].to_numpy()
        if (at[0] >= shape[0]).any() or (at[1] >= shape[1]).any():
            continue
        for column, text in columns.items():
            if column not in rows or rows[column].isna().all():
                continue
            stderr = _grid(at, rows["stderr"], shape) if "stderr" in rows else None
            yield Score(study.name, f"{method}: {text}", _grid(at, rows[column], shape), stderr)


def _grid(
    at: tuple[np.ndarray, np.ndarray], column: "pd.Series[Any]", shape: tuple[int, int]
) -> np.ndarray:
    grid = np.full(shape, np.nan)
    grid[at] = column.to_numpy(np.float64)
    return grid
