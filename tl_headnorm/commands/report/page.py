"""report.html: a run in words, tables and figures on one page. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from tl_headnorm.commands.report import facts, payload
from tl_headnorm.commands.report.encoding import MOST_BYTES, Encoded, encode, samples_that_fit
from tl_headnorm.commands.report.related_runs import head_scores, related_runs
from tl_headnorm.commands.report.right_vs_wrong import Difference, right_minus_wrong
from tl_headnorm.commands.report.texts import Texts
from tl_headnorm.plots.page import plotly_library
from tl_headnorm.plots.templates import render, script_json
from tl_headnorm.run.files import write_text

SCRIPTS = ("core.js", "figures.js", "samples.js", "explorer.js")
RANKED = 10


def write_report(run: xr.Dataset, path: Path, texts: Texts | None = None) -> None:
    """Write `path/report.html`; `run` is what collect or load_run returned."""
    write_text(path / "report.html", report_html(run, path, texts or Texts()))


def report_html(
    run: xr.Dataset, path: Path, texts: Texts, *, most_bytes: int = MOST_BYTES
) -> str:  # fmt: skip
    """The page, without network and other files but those it links to.

    1 measures and their per-sample values (see encoding); samples that do not fit in
    `most_bytes` are left out by a random choice with the run's seed, and the page says so;
    2 right against wrong answers; 3 scores of related runs; 4 the page.
    """
    names = facts.measures_of(run)
    per_sample = [name for name in names if name in run and run[name].dims[0] == "sample"]
    shown, encoded = _encoded(run, per_sample, most_bytes)
    options = [len(q.options) for q in texts.questions or () if q is not None]
    accuracy = facts.accuracy_of(run, options)
    differences = _differences(run, per_sample, accuracy)
    related = related_runs(path, run.attrs)
    shape = run.sizes["layer"], run.sizes["head"]
    samples, cut = payload.samples(run, shown, texts) if per_sample else (None, False)
    measures = {
        name: payload.measure(run, name, encoded.get(name), differences.get(name)) for name in names
    }
    data = {
        "layers": shape[0], "heads": shape[1], "scored": accuracy is not None,
        "measures": list(measures.values()), "samples": samples,
        "scores": [payload.score(found) for found in head_scores(related, shape)],
    }  # fmt: skip
    return render(
        "commands/report/page.html.j2", **_record(run), path=path, shape=shape, accuracy=accuracy,
        measures=data["measures"],
        ranked=[(part, *payload.ranked(part, shape[1], RANKED)) for part in measures.values()],
        differences=[(measures[name], found, payload.clearest(found, shape[1], RANKED))
                     for name, found in differences.items()],
        related=related, per_sample=per_sample, n_shown=len(shown), texts=texts, cut=cut,
        data=script_json(data), scripts=SCRIPTS, plotly=plotly_library(),
        blobs=[(i, encoded[name].text) for i, name in enumerate(names) if name in encoded],
    )  # fmt: skip


def _record(run: xr.Dataset) -> dict[str, Any]:
    """The run's own entry on the page."""
    meta = run.attrs
    return {
        "title": facts.title_of(meta),
        "meta": meta,
        "model": facts.part(meta, "model"),
        "dataset": facts.part(meta, "dataset"),
        "skipped": {k: v for k, v in facts.part(meta, "num_skipped").items() if v},
        "version": facts.part(meta, "versions").get("tl_headnorm", "of unknown version"),
        "template": facts.part(meta, "template").get("name", "of the run"),
        "rounding": facts.ROUNDING,
        "provenance": facts.provenance(meta),
        "settings": facts.settings_of(meta),
        "n": meta.get("num_processed", run.sizes.get("sample", 0)),
    }


def _encoded(
    run: xr.Dataset, names: Sequence[str], most_bytes: int
) -> tuple[Int[np.ndarray, " shown"], dict[str, Encoded]]:
    """Indices of the samples that fit, and their values by measure."""
    n, seed = run.sizes.get("sample", 0), int(run.attrs.get("seed") or 0)
    n_values = run.sizes["layer"] * run.sizes["head"]
    shown = samples_that_fit(n, n_values, len(names), seed, most_bytes)
    every = len(shown) == n
    return shown, {m: encode(run[m].values if every else run[m].values[shown]) for m in names}


def _differences(
    run: xr.Dataset, names: Sequence[str], accuracy: Mapping[str, Any] | None
) -> dict[str, Difference]:
    """By measure, over all samples of the run; nothing where a group is smaller than two."""
    if accuracy is None or min(accuracy["right"], accuracy["wrong"]) < 2:
        return {}
    right = np.array([bool(x) for x in run["correct"].values])
    seed = int(run.attrs.get("seed") or 0)
    return {name: right_minus_wrong(run[name].values, right, seed) for name in names}
