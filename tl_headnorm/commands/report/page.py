"""report.html: a run in words, tables and figures on one page. No torch."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.report import facts, payload
from tl_headnorm.commands.report.encoding import MOST_BYTES, encode, samples_that_fit
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
    layers, heads = run.sizes["layer"], run.sizes["head"]
    n, seed = run.sizes.get("sample", 0), int(run.attrs.get("seed") or 0)
    shown = samples_that_fit(n, layers * heads, len(per_sample), seed, most_bytes)
    every = len(shown) == n
    encoded = {m: encode(run[m].values if every else run[m].values[shown]) for m in per_sample}
    accuracy = facts.accuracy_of(
        run, [len(q.options) for q in texts.questions or () if q is not None]
    )
    differences = _differences(run, per_sample, accuracy)
    related = related_runs(path, run.attrs)
    samples, cut = payload.samples(run, shown, texts) if per_sample else (None, False)
    data: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "scored": accuracy is not None,
        "measures": [
            payload.measure(run, name, encoded.get(name), differences.get(name)) for name in names
        ],
        "samples": samples,
        "scores": [payload.score(found) for found in head_scores(related, (layers, heads))],
    }
    words = {part["name"]: part for part in data["measures"]}
    return render(
        "commands/report/page.html.j2",
        title=facts.title_of(run.attrs),
        meta=run.attrs,
        model=facts.part(run.attrs, "model"),
        dataset=facts.part(run.attrs, "dataset"),
        skipped={k: v for k, v in facts.part(run.attrs, "num_skipped").items() if v},
        version=facts.part(run.attrs, "versions").get("tl_headnorm", "of unknown version"),
        template=facts.part(run.attrs, "template").get("name", "of the run"),
        rounding=facts.ROUNDING,
        provenance=facts.provenance(run.attrs),
        settings=facts.settings_of(run.attrs),
        n=run.attrs.get("num_processed", n),
        shape=(layers, heads),
        accuracy=accuracy,
        measures=data["measures"],
        ranked=[(part, *payload.ranked(part, heads, RANKED)) for part in data["measures"]],
        differences=[(words[name], found, payload.clearest(found, heads, RANKED))
                     for name, found in differences.items()],
        related=related,
        per_sample=per_sample,
        n_shown=len(shown),
        texts=texts,
        cut=cut,
        path=path,
        data=script_json(data),
        blobs=[(i, encoded[name].text) for i, name in enumerate(names) if name in encoded],
        scripts=SCRIPTS,
        plotly=plotly_library(),
    )  # fmt: skip


def _differences(
    run: xr.Dataset, names: list[str], accuracy: dict[str, Any] | None
) -> dict[str, Difference]:
    """By measure, over all samples of the run; nothing where a group is smaller than two."""
    if accuracy is None or min(accuracy["right"], accuracy["wrong"]) < 2:
        return {}
    right = np.array([bool(x) for x in run["correct"].values])
    seed = int(run.attrs.get("seed") or 0)
    return {name: right_minus_wrong(run[name].values, right, seed) for name in names}
