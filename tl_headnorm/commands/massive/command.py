"""`massive`, from settings to files."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from tl_headnorm.commands.massive import massive, plots
from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.commands.massive.summary import summary
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.texts import Texts, windows
from tl_headnorm.interventions.heads import as_file
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.save import save_all
from tl_headnorm.run.files import write_json, write_text
from tl_headnorm.run.loading import say
from tl_headnorm.run.stages import run_study
from tl_headnorm.run.study import open_study, record, save_npz, save_table, text_length


def run_massive(settings: MassiveSettings) -> Path:
    """Study massive activations, write tables, arrays, figures and a summary; the directory."""
    return run_study(settings, "massive", _massive)


def _massive_inputs(
    model: Model, questions: Any, texts: Texts | None, settings: MassiveSettings
) -> tuple[massive.Inputs, dict[str, Any]]:
    prepared: dict[str, Any] = {}
    prompts: list[Any] = []
    answers: list[int] = []
    if questions is not None:
        chosen = questions if settings.max_samples < 0 else questions[: settings.max_samples]
        made = prepare(model.tokenizer, model.n_ctx, chosen, settings.updated(score_answers=True))
        prompts, prepared, answers = made.encoded, made.record, [q.answer for q in chosen]
    bos, with_bos = model.tokenizer.bos_token_id, settings.prepend_bos
    if texts is None:
        samples = prompts[: settings.max_texts]
        other = [replace(s, ids=s.ids[1:] if with_bos else (bos, *s.ids)) for s in samples]
        other = [] if bos is None else other
        return massive.Inputs(samples, other, answers=answers, texts=False), prepared
    length = text_length(settings, model)
    first, *rest = (
        windows(texts, model.tokenizer, length=length, most=settings.max_texts, prepend_bos=begin)
        for begin in ([False] if bos is None else [with_bos, not with_bos])
    )
    return massive.Inputs(first, rest[0] if rest else [], prompts, answers), prepared


def _massive(settings: MassiveSettings, path: Path) -> None:
    started = time.time()
    model, questions, texts = open_study(settings)
    inputs, prepared = _massive_inputs(model, questions, texts, settings)
    run = massive.study_massive(model, inputs, settings, progress=True)
    write_json(path / "config.json", settings.as_dict())
    save_table(massive.layers_table(run), path / "layers.parquet")
    save_table(massive.heads_table(run), path / "heads.parquet")
    save_table(_entries(run, model), path / "dims.parquet")
    sets = _sets(run)
    save_table(sets, path / "sets.parquet")
    if len(inputs.other_bos):
        save_table(massive.layers_table(run, "other_bos_"), path / "layers_other_bos.parquet")
    save_npz(run, path / "arrays.npz")
    for name, heads in run.attrs["pruned"].items():
        write_json(path / f"{name.split()[0]}_heads.json", as_file(heads))
    title = f"{Path(model.info.source).name} · n={len(inputs.samples)}"
    tokens = [model.tokenizer.decode([i]) for i in run.attrs["picture_ids"]]
    save_all(plots.figures(run, tokens, title), path)
    num_tokens = sum(len(sample) for sample in inputs.samples)
    runs = run.sizes["set"]
    meta = record(model, settings, texts, prepared, started, num_tokens, runs) | {
        "accuracy": float(run["accuracy"][0]) if "accuracy" in run else None,
        "num_tokens": num_tokens,
        "num_processed": len(inputs.samples),
        "least": settings.least,
        "ratio": settings.ratio,
        **{
            k: run.attrs[k]
            for k in ("set_layer", "picture_layer", "massive_position", "has_massive")
        },
    }
    text = summary(run, sets, meta)
    write_text(path / "summary.md", text)
    write_json(path / "meta.json", meta)
    say(text)


def _entries(run: xr.Dataset, model: Model) -> pd.DataFrame:
    """dims.parquet: the massive dimensions, and the token they stand on."""
    names = [str(n) for n in run.data_vars if str(n).startswith("entry_")]
    table = pd.DataFrame({n.removeprefix("entry_"): run[n].values for n in names})
    table["token"] = [model.tokenizer.decode([int(i)]) for i in table["token_id"]]
    return table


def _sets(run: xr.Dataset) -> pd.DataFrame:
    """sets.parquet: loss, perplexity and accuracy (where taken) of every changed run."""
    names = [n for n in ("loss", "perplexity", "accuracy") if n in run]
    columns = {n: run[n].values for n in names}
    return pd.DataFrame({"set": [str(s) for s in run["set"].values], **columns})
