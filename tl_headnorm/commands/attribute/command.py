"""`attribute`, from settings to files."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.attribute import plots
from tl_headnorm.commands.attribute.attribute import attribute, importance, open_job
from tl_headnorm.commands.attribute.groups import compare_groups
from tl_headnorm.commands.attribute.pruning import rank_correlations, validate_scores
from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.commands.attribute.stability import stability
from tl_headnorm.commands.attribute.summary import stability_section, summary
from tl_headnorm.data.questions import DATASETS, Question, Questions
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.panel import Figure, group_size
from tl_headnorm.plots.save import save_page
from tl_headnorm.run import results
from tl_headnorm.run.files import write_json, write_text, write_with
from tl_headnorm.run.loading import open_model, open_questions, say
from tl_headnorm.run.reading import load_run
from tl_headnorm.run.stages import run_study
from tl_headnorm.run.study import save_table

Figures = dict[str, Figure]  # by file stem


def run_attribute(settings: AttributeSettings) -> Path:
    """Attribute, report, write the run directory; its path."""
    path = run_study(settings, "attribute", _attribute if settings.run is None else _report_on)
    say((path / "summary.md").read_text(encoding="utf-8"))
    return path


def _load(settings: AttributeSettings) -> tuple[Model, Questions]:
    """Questions first: they fail fast, a model is slow to load."""
    if settings.loss == "lm":
        questions = Questions(())
    elif settings.datasets:
        questions = _several(settings)
    else:
        questions = open_questions(settings)
    return open_model(settings), questions


def _several(settings: AttributeSettings) -> Questions:
    """The questions of several datasets or files, each marked with where it is from."""
    found: list[Question] = []
    labels = [name if name in DATASETS else Path(name).stem for name in settings.datasets or []]
    if len(set(labels)) < len(labels):
        raise InputError(
            f"datasets: expected different datasets, or files of different names, found {labels}; "
            "name each once, and rename a file where two are called alike"
        )
    for name in settings.datasets or []:
        known = name in DATASETS
        dataset, data_dir = (name, None) if known else ("multiple_choice", name)
        part = open_questions(settings, dataset, data_dir)
        label = name if known else Path(name).stem
        found += [replace(q, meta={**q.meta, "dataset": label}) for q in part]
    return Questions(tuple(found), name=", ".join(settings.datasets or []), split=settings.split)


def _attribute(settings: AttributeSettings, path: Path) -> None:
    norms = _norms(settings.norms) if settings.norms else {}
    model, questions = _load(settings)
    _check_fit(norms, model)
    run = attribute(model, questions, settings)
    figures = _save_scores(run, path)
    methods = [str(method) for method in run["method"].values]
    scores = {m: run["score"].loc[{"method": m}].values for m in methods}
    reports: dict[str, Any] = {}
    if settings.stability:
        reports = _stability(scores, settings.seed, path, figures)
    groups = _groups(run, scores, settings, path, figures) if _grouped(settings) else {}
    validation = None
    maps = importance(run)
    if settings.validate:
        validation = validate_scores(open_job(model, questions, settings), run, progress=True)
        figures["pruning"] = _save_validation(validation, run, path)
        maps = validation["importance"]
    ranks = _ranks({**maps, **norms}, path, figures) if len(maps) + len(norms) > 1 else None
    text = summary(run, stability=reports, validation=validation, groups=groups, ranks=ranks)
    write_text(path / "summary.md", text)
    if figures:
        save_page(figures, path, "attribution", "Head attribution")
    _finish(run, path)


def _grouped(settings: AttributeSettings) -> bool:
    return bool(settings.group_by or settings.datasets)


def _norms(source: str) -> dict[str, np.ndarray]:
    """Mean norms of a collect run."""
    run = load_run(source)
    return {name: run[f"{name}_mean"].values for name in results.measures_of(run)}


def _check_fit(norms: Mapping[str, np.ndarray], model: Model) -> None:
    wanted = (model.info.n_layers, model.info.n_heads)
    for name, value in norms.items():
        if value.shape != wanted:
            raise InputError(
                f"norms: expected a run of a model with {wanted[0]} layers of {wanted[1]} heads, "
                f"found {name} of {value.shape[0]} layers of {value.shape[1]}; give --norms a run "
                "of this model"
            )


def _save_scores(run: xr.Dataset, path: Path) -> Figures:
    """The files that other programs read, and the maps for the page."""
    write_json(path / "config.json", run.attrs["settings"])
    methods = [str(method) for method in run["method"].values]
    columns = ["mean", "std", "stderr", "sampling_stderr"]
    rows = run[columns].to_dataframe().reset_index()
    rows["method"] = rows["method"].astype(str)
    save_table(rows[["method", "layer", "head", *columns]], path / "attribution.parquet")
    arrays = {m: run["score"].loc[{"method": m}].values.astype(np.float32) for m in methods}
    write_with(path / "per_sample.npz", partial(np.savez, **arrays))
    samples = pd.DataFrame({"index": run["sample"].values})
    samples["id"] = [str(i) for i in run["sample_id"].values]
    samples["group"] = [str(g) for g in run["group"].values]
    for name in methods:
        for column in ("completeness_error", "completeness_relative", "steps"):
            samples[f"{column}_{name}"] = run[column].loc[{"method": name}].values
    save_table(samples, path / "samples.parquet")
    if "rollout" in run.attrs:
        _save_rollout(run.attrs.pop("rollout"), path)
    return {"attribution_maps": _maps(run, methods)} if methods else {}


def _maps(run: xr.Dataset, methods: list[str]) -> Figure:
    maps = {m: run["mean"].loc[{"method": m}].values for m in methods}
    title = f"Mean score of every head, {run.sizes['sample']} samples (blue lowers the loss"
    title += "; atp_*: red is useful)" if any(m.startswith("atp") for m in methods) else ")"
    return plots.maps(maps, title, shared=False, groups=_shared_keys(run))


def _shared_keys(run: xr.Dataset) -> int | None:
    """Heads that share keys and values."""
    return group_size(run.attrs["model"].get("n_key_value_heads"), run.sizes["head"])


def _save_rollout(tokens: list[np.ndarray], path: Path) -> None:
    rows = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(len(tokens)), [len(t) for t in tokens]),
            "position": np.concatenate([np.arange(len(t)) for t in tokens]),
            "rollout": np.concatenate(tokens),
        }
    )
    save_table(rows, path / "rollout.parquet")


def _stability(
    values: Mapping[str, np.ndarray], seed: int, path: Path, figures: Figures
) -> dict[str, Any]:
    reports = {name: stability(value, seed=seed) for name, value in values.items()}
    write_json(path / "stability.json", reports)
    figures |= {f"stability_{n}": plots.stability(n, values[n], r) for n, r in reports.items()}
    return reports


def _groups(
    run: xr.Dataset,
    scores: Mapping[str, np.ndarray],
    settings: AttributeSettings,
    path: Path,
    figures: Figures,
) -> dict[str, pd.DataFrame]:
    found = {}
    for method, values in scores.items():
        found[method] = compare_groups(
            values, list(run["group"].values), permutations=settings.permutations,
            fdr=settings.fdr, seed=settings.seed,
        )  # fmt: skip
        means = [c for c in found[method].columns if c.startswith("mean_")]
        shape = (run.sizes["layer"], run.sizes["head"])
        maps = {c.removeprefix("mean_"): found[method][c].to_numpy().reshape(shape) for c in means}
        title = f"{method}: mean score per group, one scale"
        groups = _shared_keys(run)
        figures[f"groups_{method}"] = plots.maps(maps, title, shared=True, groups=groups)
    rows = [table.assign(method=method) for method, table in found.items()]
    save_table(pd.concat(rows, ignore_index=True), path / "groups.parquet")
    return found


def _save_validation(found: Mapping[str, Any], run: xr.Dataset, path: Path) -> Figure:
    save_table(found["curves"], path / "pruning.parquet")
    save_table(found["areas"], path / "pruning_areas.parquet")
    source, n = Path(run.attrs["model"]["source"]).name, found["n_measuring"]
    return plots.pruning(found["curves"], "Heads pruned in each method's order",
                         f"{source} · {n} samples that did not rank the heads")  # fmt: skip


def _ranks(maps: Mapping[str, np.ndarray], path: Path, figures: Figures) -> pd.DataFrame:
    table = rank_correlations(maps)
    long = table.rename_axis("method").reset_index().melt("method", var_name="other")
    save_table(long.rename(columns={"value": "spearman"}), path / "rank_correlation.parquet")
    figures["rank_correlation"] = plots.ranks(table)
    return table


def _report_on(settings: AttributeSettings, path: Path) -> None:
    """Stability of the per-sample values of a finished run, whatever it measured."""
    source = Path(str(settings.run)).expanduser()
    stored = source / "per_sample.npz"
    if not (source / "meta.json").is_file() or not stored.is_file():
        raise InputError(
            f"run: expected a finished run directory with per_sample.npz and meta.json, found none "
            f"in {source}; check the path, or run it again with --per_sample true"
        )
    try:
        with stored.open("rb") as stream, np.load(stream) as arrays:
            values = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise of every kind on a damaged archive
        raise InputError(
            f"run: expected arrays in {stored}, found it damaged ({first_line(error)})"
        ) from None
    wrong = [n for n, v in values.items() if v.ndim != 3 or v.dtype.kind != "f" or not v.size]
    if wrong or not values:
        raise InputError(
            f"run: expected numbers [sample, layer, head] in {stored}, found "
            f"{wrong[0] if wrong else 'nothing'} of another kind; give a run directory of collect "
            "or attribute"
        )
    write_json(path / "config.json", settings.as_dict())
    figures: Figures = {}
    reports = _stability(values, settings.seed, path, figures)
    save_page(figures, path, "stability", f"Stability of {source.name}")
    text = f"# Stability of {source.name}\n\n" + stability_section(reports)
    write_text(path / "summary.md", text)
    meta = {"run": str(source), "measures": list(values), "versions": results.versions(),
            "git_commit": results.git_commit(), "seed": settings.seed,
            "finished_at": results.now()}  # fmt: skip
    write_json(path / "meta.json", meta)


def _finish(run: xr.Dataset, path: Path) -> None:
    """meta.json last: it says that the directory is complete."""
    run.attrs["finished_at"] = results.now()
    run.attrs["has"] = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    results.finish(run, path)
