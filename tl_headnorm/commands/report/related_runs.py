"""Other runs in the same folder with the same model: their pages, and their score of each head."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from tl_headnorm.commands.report.facts import part

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
# (kind, file, {column: what it is}) of the runs that score single heads.
SCORES = (
    ("ablation", "ablation.parquet",
     {"accuracy_drop": "accuracy lost (share)", "loss_delta": "loss added (nats)"}),
    ("attribution", "attribution.parquet", {"mean": "attribution"}),
)  # fmt: skip
SAME = ("source", "revision", "adapter", "n_layers", "n_heads")
READABLE = (".html", ".md")
MOST_SCORES = 24
MOST_PAGES = 3  # of a folder per prompt


@dataclass(frozen=True)
class RelatedRun:
    """A finished directory: its kind, its name, and (label, relative link) of what to read."""

    kind: str
    name: str
    about: str
    links: tuple[tuple[str, str], ...]
    path: Path


@dataclass(frozen=True)
class Score:
    """One number per head from a study, NaN where the study left the head out."""

    study: str
    name: str
    values: np.ndarray  # [layer, head]
    stderr: np.ndarray | None = None


def related_runs(path: Path, meta: Mapping[str, Any]) -> list[RelatedRun]:
    """Finished directories in the same folder with this run's model and, where named, its data."""
    name, folder = path.resolve().name, path.resolve().parent
    found = []
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name == name or not (other / "meta.json").is_file():
            continue
        record = _read_json(other / "meta.json")
        if _same(meta, record) or _mentions(record, name):
            kind = next((k for file, k in KINDS.items() if (other / file).is_file()), "study")
            found.append(RelatedRun(kind, other.name, _about(record), tuple(_links(other)), other))
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _same(meta: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """The same weights; the same questions, unless the study used none."""
    ours, theirs = part(meta, "model"), part(other, "model")
    if not theirs or any(ours.get(key) != theirs.get(key) for key in SAME):
        return False
    data, used = part(meta, "dataset"), part(other, "dataset")
    return not used or all(data.get(key) == used.get(key) for key in ("name", "sha256"))


def _mentions(other: Mapping[str, Any], name: str) -> bool:
    """A comparison or a stability report names the runs it was made of."""
    values = [v for vs in other.values() for v in (vs if isinstance(vs, list) else [vs])]
    return any(Path(value).name == name for value in values if isinstance(value, str))


def _about(record: Mapping[str, Any]) -> str:
    """The data of a run, its size and its day."""
    data, texts = part(record, "dataset"), part(record, "texts")
    words = [
        f"{data.get('name')} {data.get('split') or ''}".strip() if data else "",
        Path(str(texts.get("path", "texts"))).name if texts else "",
        f"n={record['num_processed']:,}" if record.get("num_processed") else "",
        str(record.get("finished_at") or "")[:10],
    ]
    return " · ".join(filter(None, words))


def _links(folder: Path) -> Iterator[tuple[str, str]]:
    """Pages and summaries by their path relative to the run; the heatmaps' own pages left out."""
    pages = [f for f in sorted(folder.iterdir()) if f.suffix in READABLE]
    pages += sorted(folder.glob("prompt_*/*.html"))[:MOST_PAGES]
    for file in pages:
        inside = file.relative_to(folder).as_posix()
        if not inside.endswith("_heatmap.html"):
            yield inside, f"../{quote(folder.name)}/{quote(inside)}"


def head_scores(runs: list[RelatedRun], shape: tuple[int, int]) -> list[Score]:
    """Scores of single heads by ablation and attribution, the newest directories first."""
    found: list[Score] = []
    for run in reversed(runs):
        for kind, file, columns in SCORES:
            if run.kind == kind:
                found += _scores(run, file, columns, shape)
    return found[:MOST_SCORES]


def _scores(
    run: RelatedRun, file: str, columns: Mapping[str, str], shape: tuple[int, int]
) -> Iterator[Score]:
    try:
        table = pd.read_parquet(run.path / file)
        single = table[(table["head"] >= 0) & (table["layer"] >= 0)]
    except (OSError, ValueError, KeyError):
        return  # a damaged study is no fault of this run

    def grid(rows: pd.DataFrame, column: str) -> np.ndarray:
        values = np.full(shape, np.nan)
        values[rows["layer"], rows["head"]] = rows[column].to_numpy(np.float64)
        return values

    for method, rows in single.groupby("method", sort=False):
        if (rows["layer"] >= shape[0]).any() or (rows["head"] >= shape[1]).any():
            continue
        stderr = grid(rows, "stderr") if "stderr" in rows else None
        for column, text in columns.items():
            if column in rows and not rows[column].isna().all():
                yield Score(run.name, f"{method}: {text}", grid(rows, column), stderr)
