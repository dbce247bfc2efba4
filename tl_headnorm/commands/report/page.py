"""report.html: what a run holds, in words, tables and figures on one page. No torch."""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.report import facts
from tl_headnorm.commands.report.encoding import MOST_BYTES
from tl_headnorm.commands.report.payload import Parts, Texts, gather, measure_words, script_json
from tl_headnorm.commands.report.right_vs_wrong import Contrast
from tl_headnorm.run.files import plain, write_text

SCRIPTS = ("core.js", "figures.js", "samples.js", "explorer.js")
RANKED = 10


def write_report(run: xr.Dataset, path: Path, texts: Texts | None = None) -> None:
    """Write `path/report.html`; `run` is what collect or load_run returned."""
    write_text(path / "report.html", report_html(run, path, texts or Texts()))


def report_html(
    run: xr.Dataset, path: Path, texts: Texts, *, most_bytes: int = MOST_BYTES
) -> str:  # fmt: skip
    """The page; it needs no network and no file beside it but those it links to.

    Per-sample values are kept in 16 bits a head (see packing); samples that would not fit in
    `most_bytes` are left out by a random choice with the run's seed, and the page says so.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    parts = gather(run, path, texts, most_bytes)
    environment = Environment(
        loader=PackageLoader("tl_headnorm.commands.report", "assets"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(formula=_formula, number=_number)
    return environment.get_template("template.html").render(
        **_words(run, path, parts),
        measures=parts.payload["measures"], ranked=[_ranked(run, name) for name in parts.names],
        contrasts=[(measure_words(run, name), found, _clearest(run, found))
                   for name, found in parts.contrasts.items()],
        studies=parts.studies, held=parts.held, shown=len(parts.shown), cut=parts.cut,
        has_text=texts.questions is not None, why_not=texts.why_not,
        payload=script_json(parts.payload),
        blobs=[(i, parts.packed[name].text)
               for i, name in enumerate(parts.names) if name in parts.packed],
        css=_asset("report.css"), js="\n".join(_asset(name) for name in SCRIPTS), plotly=_plotly(),
    )  # fmt: skip


def _words(run: xr.Dataset, path: Path, parts: Parts) -> dict[str, Any]:
    """What the page says of the run as a whole."""
    meta, accuracy = run.attrs, parts.accuracy
    return {
        "title": facts.title_of(meta),
        "where": facts.where(meta),
        "version": facts.part(meta, "versions").get("tl_headnorm", "of unknown version"),
        "template": facts.part(meta, "template").get("name", "of the run"),
        "finished": meta.get("finished_at", "not finished when written"),
        "n": meta.get("num_processed", run.sizes.get("sample", 0)),
        "overview": facts.overview(run, accuracy),
        "warnings": facts.warnings_of(run, accuracy),
        "provenance": facts.provenance(meta),
        "settings": _settings(meta),
        "accuracy": accuracy,
        "run_name": path.resolve().name,
        "run_path": str(path),
        "run_literal": repr(str(path)),
        "shape": (run.sizes["layer"], run.sizes["head"]),
    }


@cache
def _asset(name: str) -> str:
    return (files("tl_headnorm.commands.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _formula(text: str) -> Any:
    """z_h and W_O^h as they are printed."""
    from markupsafe import Markup, escape

    tags = {"_": "sub", "^": "sup"}
    marked = re.sub(
        r"([_^])(\w+)", lambda m: f"<{tags[m[1]]}>{m[2]}</{tags[m[1]]}>", str(escape(text))
    )
    return Markup(marked)


def _number(value: float, digits: int, sign: str = "") -> str:
    """So many digits that count, zeros at the end included; a dash for none."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:{sign}#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def _settings(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, json.dumps(plain(value), ensure_ascii=False))
            for key, value in facts.part(meta, "settings").items()]  # fmt: skip


def _place(run: xr.Dataset, index: int) -> dict[str, int]:
    layer, head = divmod(index, run.sizes["head"])
    return {"layer": layer, "head": head}


def _ranked(run: xr.Dataset, name: str) -> dict[str, Any]:
    """The heads with the largest and the smallest means, those without values left out."""
    mean = run[f"{name}_mean"].values.ravel()
    std = run[f"{name}_std"].values.ravel() if f"{name}_std" in run else np.full(mean.shape, np.nan)
    order = np.argsort(-mean, kind="stable")
    order = order[np.isfinite(mean[order])]
    rows = [
        _place(run, int(i)) | {"rank": rank + 1, "mean": mean[i], "std": std[i]}
        for rank, i in enumerate(order)
    ]
    few = min(RANKED, -(-len(rows) // 2))
    return {
        "measure": measure_words(run, name),
        "top": rows[:few],
        "bottom": rows[few:][-few:][::-1],
    }


def _clearest(run: xr.Dataset, found: Contrast) -> list[dict[str, Any]]:
    """The heads whose difference is largest beside its standard error."""
    order = np.argsort(-np.nan_to_num(np.abs(found.t)), kind="stable")[:RANKED]
    return [
        _place(run, int(i))
        | {"difference": found.difference[i], "stderr": found.stderr[i], "t": found.t[i]}
        for i in order
        if np.isfinite(found.t[i])
    ]


__all__ = ["Texts", "report_html", "write_report"]
