"""`inactive`, from settings to files."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.inactive import plots
from tl_headnorm.commands.inactive.inactive import Found, find_inactive, split_rows
from tl_headnorm.commands.inactive.settings import InactiveSettings
from tl_headnorm.commands.inactive.summary import PUBLISHED_BEST, summary
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.interventions.names import useful_sign
from tl_headnorm.measures import choose_measures
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.save import save
from tl_headnorm.run.files import write_json, write_text, write_with
from tl_headnorm.run.loading import open_both, say
from tl_headnorm.run.reading import load_run
from tl_headnorm.run.stages import run_study
from tl_headnorm.run.study import record, save_table


def run_inactive(settings: InactiveSettings) -> Path:
    """Rank heads by every score, switch them off, write tables, a figure and a summary."""
    choose_measures(settings.measures, settings.measures_file)
    path = run_study(settings, "inactive", _inactive)
    say((path / "summary.md").read_text(encoding="utf-8"))
    return path


def _inactive(settings: InactiveSettings, path: Path) -> None:
    started = time.time()
    run = None if settings.run is None else load_run(settings.run)
    model, questions = open_both(settings)
    split = split_rows(len(questions), settings.calibration_share)
    ids = [q.id for q in questions]
    orders, notes = _orders(settings, {ids[i] for i in split.calibration}, set(ids), model)
    found = find_inactive(model, questions, settings, run=run, orders=orders, progress=True)
    _save(found, path, settings)
    meta = _meta(found, model, settings, notes, started)
    write_text(path / "summary.md", summary(found, meta))
    write_json(path / "meta.json", meta)


def _orders(
    settings: InactiveSettings, ranking: set[str], every: set[str], model: Model
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Orders of finished attribute runs, larger is more useful, and what to say of them.

    Where a run shares questions with this one, only those that rank heads here are used.
    """
    orders: dict[str, np.ndarray] = {}
    notes = []
    for source in settings.attributions or []:
        values, ids = _attributed(Path(source).expanduser())
        rows = [i for i, name in enumerate(ids) if name in ranking]
        if not rows and set(ids) & every:
            raise InputError(
                f"attributions: expected questions that rank heads here, found only measuring ones "
                f"in {source}; attribute on other questions"
            )
        rows = rows or list(range(len(ids)))
        for method, scores in values.items():
            expected = (model.info.n_layers, model.info.n_heads)
            if scores.shape[1:] != expected:
                raise InputError(
                    f"attributions: expected scores of {expected[0]} layers and {expected[1]} "
                    f"heads, found {scores.shape[1:]} in {source}"
                )
            name = f"attribution:{method}"
            name += f":{len(orders)}" if name in orders else ""
            orders[name] = useful_sign(method) * scores[rows].mean(0, dtype=np.float64)
        notes.append(f"Attributions of {source} are means over {len(rows)} of its questions.")
    return orders, notes


def _attributed(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Per-sample scores by method, and the samples' ids."""
    try:
        with (path / "per_sample.npz").open("rb") as stream, np.load(stream) as stored:
            values = {name: stored[name] for name in stored.files}
        table = pd.read_parquet(path / "attribution.parquet", columns=["method"])
        ids = [str(i) for i in pd.read_parquet(path / "samples.parquet")["id"]]
    except Exception as error:  # damaged files fail in as many ways as there are formats
        raise InputError(
            f"attributions: expected a finished attribute run, found {path} "
            f"({first_line(error)}); check the path"
        ) from None
    return {str(m): values[str(m)] for m in dict.fromkeys(table["method"])}, ids


def _save(found: Found, path: Path, settings: InactiveSettings) -> None:
    write_json(path / "config.json", settings.as_dict())
    save_table(found.table, path / "inactive.parquet")
    save_table(found.ranking, path / "ranking.parquet")
    long = found.correlations.rename_axis("score").reset_index().melt("score", var_name="other")
    save_table(long.rename(columns={"value": "spearman"}), path / "rank_correlation.parquet")
    heads = {score.name: score.mean.ravel() for score in found.scores}
    layer, head = np.divmod(np.arange(found.scores[0].mean.size), found.scores[0].mean.shape[1])
    save_table(pd.DataFrame({"layer": layer, "head": head, **heads}), path / "heads.parquet")
    arrays = {
        name: np.stack([getattr(curve, name) for curve in found.curves]).astype(np.float32)
        for name in ("off", "correct", "loss")
    }
    names = {
        name: np.array([str(getattr(curve, name)) for curve in found.curves])
        for name in ("score", "mode", "method", "number")
    }
    rows = {"calibration": found.split.calibration, "held_out": found.split.held_out}
    stored: dict[str, Any] = {**arrays, **names, **rows}
    write_with(path / "per_sample.npz", partial(np.savez, **stored))
    source = Path(settings.model_path).name
    title = f"{source} · {len(found.split.held_out):,} questions"
    figure = plots.figure(found.table, found.ranking, title, (PUBLISHED_BEST,))
    save(figure, path / "inactive")


def _meta(
    found: Found, model: Model, settings: InactiveSettings, notes: list[str], started: float
) -> dict[str, Any]:
    n = len(found.split.calibration) + len(found.split.held_out)
    num_tokens = int(found.record["num_tokens"])
    plain = record(
        model, settings, None, found.record, started, num_tokens, len(found.table)
    )  # fmt: skip
    verdict = found.verdict
    return plain | {
        "num_processed": n,
        "num_ranking": len(found.split.calibration),
        "num_measuring": len(found.split.held_out),
        "mean_tokens": num_tokens / n,
        "answer_scoring": "letter, softmax over the options' letters",
        "accuracy": float(found.clean["correct"].mean()),
        "shares": list(settings.shares),
        "points": settings.points,
        "scores_from": settings.run,
        "winner": dict(zip(("score", "mode", "method"), verdict.winner, strict=True)),
        "beats_runner_up": verdict.beats_runner_up,
        "beats_random": verdict.beats_random,
        "over_random": list(verdict.over_random),
        "notes": notes,
    }
