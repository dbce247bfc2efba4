"""`ablate`, from settings to files."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.ablate import ablate, plots
from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.commands.ablate.summary import summary
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.texts import Texts, windows
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.panel import group_size
from tl_headnorm.plots.save import save_all
from tl_headnorm.run.files import write_json, write_text
from tl_headnorm.run.loading import say
from tl_headnorm.run.stages import run_study
from tl_headnorm.run.study import open_study, record, save_npz, save_table, text_length


def _question_data(
    model: Model, questions: Any, settings: AblateSettings
) -> tuple[ablate.Data, dict[str, Any]]:
    kept = min(settings.reference_samples, len(questions) // 2)
    chosen = questions[: len(questions) - kept]
    chosen = chosen if settings.max_samples < 0 else chosen[: settings.max_samples]
    scored = settings.updated(score_answers=True)
    prepared = prepare(model.tokenizer, model.n_ctx, chosen, scored)
    encoded = prepared.encoded
    if kept:
        rest = questions[len(questions) - kept :]
        encoded = prepare(model.tokenizer, model.n_ctx, rest, scored).encoded
    data = ablate.Data(prepared.encoded, encoded, [q.answer for q in chosen])
    return data, prepared.record


def _text_data(model: Model, texts: Texts, settings: AblateSettings) -> ablate.Data:
    most = settings.max_texts + settings.reference_samples
    rows = windows(
        texts, model.tokenizer, length=text_length(settings, model), most=most,
        prepend_bos=settings.prepend_bos,
    )  # fmt: skip
    return ablate.split_reference(rows, settings.reference_samples, settings.max_texts)


def run_ablate(settings: AblateSettings) -> Path:
    """Remove heads and MLPs, write tables, arrays, figures and a summary; the directory."""
    return run_study(settings, "ablate", _ablate)


def _ablate(settings: AblateSettings, path: Path) -> None:
    started = time.time()
    model, questions, texts = open_study(settings)
    found: dict[str, xr.Dataset] = {}
    prepared: dict[str, Any] = {}
    reference: dict[str, str] = {}
    timed = None
    if questions is not None:
        data, prepared = _question_data(model, questions, settings)
        found["questions"] = ablate.ablate(model, data, settings, progress=True)
        reference["questions"] = _origin(data, settings)
        timed = _timed(model, data, settings)
    if texts is not None:
        data = _text_data(model, texts, settings)
        found["texts"] = ablate.ablate(model, data, settings, progress=True)
        reference["texts"] = _origin(data, settings)
    main = next(iter(found.values()))
    table = ablate.effects_table(main)
    write_json(path / "config.json", settings.as_dict())
    save_table(table, path / "ablation.parquet")
    save_npz(main, path / "per_sample.npz")
    if "texts" in found:
        save_table(perplexity_table(found["texts"]), path / "perplexity.parquet")
    if settings.profile:
        save_table(profile_table(main), path / "profile.parquet")
    title = f"{Path(model.info.source).name} · n={main.sizes['sample']:,}"
    groups = group_size(model.info.n_key_value_heads, model.info.n_heads)
    save_all(plots.figures(table, title, groups), path)
    num_tokens = int(main["n_tokens"].sum())
    meta = record(model, settings, texts, prepared, started, num_tokens, len(table)) | {
        "num_processed": main.sizes["sample"],
        "loss_of": main.attrs["loss_of"],
        "answer_scoring": "letter, softmax over the options' letters" if questions else None,
        "accuracy": None if questions is None else float(main["accuracy"][0]),
        "reference": reference,
        "sharing": timed,
    }
    text = summary(table, meta, found.get("texts"))
    write_text(path / "summary.md", text)
    write_json(path / "meta.json", meta)
    say(text)


def _timed(model: Model, data: ablate.Data, settings: AblateSettings) -> dict[str, float] | None:
    """The sweep's speed against the plain way, where it is asked for."""
    if not settings.time_sharing or data.answers is None:
        return None
    chosen = data.samples[: settings.time_sharing]
    return ablate.sharing_ratio(model, chosen, data.answers, settings)


def _origin(data: ablate.Data, settings: AblateSettings) -> str:
    if set(settings.methods) == {"zero"}:
        return "none: zero needs no reference"
    if data.reference is data.samples:
        return "the same samples that are evaluated"
    return f"{len(data.reference)} other samples, none of them evaluated"


def perplexity_table(result: xr.Dataset) -> pd.DataFrame:
    """perplexity.parquet: a row per set and method, on the texts."""
    table = ablate.effects_table(result)[["set", "method", "layer", "head"]]
    table["n_tokens"] = int((result["n_tokens"] - 1).sum())
    table["loss"] = result["mean_loss"].values
    table["perplexity"] = result["perplexity"].values
    table["perplexity_ratio"] = table["perplexity"] / table["perplexity"].iloc[0]
    table["kl"] = result["mean_kl"].values
    return table


def profile_table(result: xr.Dataset) -> pd.DataFrame:
    """profile.parquet: the largest activations after every block, a row per set and block."""
    names = ("top1", "top2", "top3", "median")
    values = {name: result[f"profile_{name}"].mean("sample").values for name in names}
    n_sets, n_blocks = values["top1"].shape
    table = pd.DataFrame(
        {
            "set": np.repeat([str(s) for s in result["set"].values], n_blocks),
            "method": np.repeat([str(m) for m in result["method"].values], n_blocks),
            "block": np.tile(np.arange(n_blocks), n_sets),
        }
    )
    for name, grid in values.items():
        table[name] = grid.ravel()
    return table
