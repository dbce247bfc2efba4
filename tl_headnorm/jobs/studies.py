"""What `ablate` does, from settings to files, and what the studies' commands share."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm import results
from tl_headnorm.config.studies import AblateSettings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.texts import Texts, read_texts, windows
from tl_headnorm.figures import ablation as figures_ablation
from tl_headnorm.files import write_json, write_text, write_with
from tl_headnorm.intervene.variants import Options
from tl_headnorm.jobs.opening import open_both, open_model, run_dir, say
from tl_headnorm.model import Model
from tl_headnorm.studies import ablation

MOST_SETS = 20  # named one by one in a summary


def open_study(settings: Any) -> tuple[Model, Any, Texts | None]:
    """The model, the questions (None without a dataset) and the texts (None without a file)."""
    texts = read_texts(settings.texts) if settings.texts else None
    if settings.dataset != "none":
        model, questions = open_both(settings.updated(max_samples=-1))
        return model, questions, texts
    model = open_model(settings)
    return model, None, texts


def record(
    model: Model, settings: Any, texts: Texts | None, prepared: Mapping[str, Any], started: float,
    num_tokens: int, runs: int,
) -> dict[str, Any]:  # fmt: skip
    """What meta.json says of every study; `runs` of `num_tokens` each were made."""
    seconds = time.time() - started
    return {
        "num_skipped": {},
        "num_truncated": 0,
        "num_tokens": num_tokens,
        "num_runs": runs,
        "missing_layers": [],
        "accuracy": None,
        "dataset": None,
        "template": None,
        "token_agg": settings.token_agg,
        "validated_against_hf": None,
        **prepared,
        "model": model.info.as_dict(),
        "texts": None if texts is None else {"path": texts.path, "sha256": texts.sha256},
        "prepend_bos": settings.prepend_bos and model.tokenizer.bos_token_id is not None,
        "padding_side": settings.padding_side,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens * runs / max(seconds, 1e-9), 1),
        "peak_memory_bytes": results.peak_memory_bytes(model.device.type),
        "seed": settings.seed,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "finished_at": results.now(),
    }


def save_table(table: pd.DataFrame, path: Path) -> None:
    write_with(path, lambda f: table.to_parquet(f, index=False))


def save_npz(run: xr.Dataset, path: Path) -> None:
    """Every numeric variable by its name."""
    arrays = {str(k): v.values for k, v in run.data_vars.items() if v.dtype.kind in "fiub"}
    write_with(path, partial(np.savez, **arrays))  # type: ignore[arg-type]


def text_length(settings: Any, model: Model) -> int:
    return min(settings.text_length, model.n_ctx)


def _question_data(
    model: Model, questions: Any, settings: AblateSettings
) -> tuple[ablation.Data, dict[str, Any]]:
    kept = min(settings.reference_samples, len(questions) // 2)
    chosen = questions[: len(questions) - kept]
    chosen = chosen if settings.max_samples < 0 else chosen[: settings.max_samples]
    scored = settings.updated(score_answers=True)
    prepared = prepare(model.tokenizer, model.n_ctx, chosen, scored)
    encoded = prepared.encoded
    if kept:
        rest = questions[len(questions) - kept :]
        encoded = prepare(model.tokenizer, model.n_ctx, rest, scored).encoded
    data = ablation.Data(prepared.encoded, encoded, [q.answer for q in chosen])
    return data, prepared.record


def _text_data(model: Model, texts: Texts, settings: AblateSettings) -> ablation.Data:
    most = settings.max_texts + settings.reference_samples
    rows = windows(
        texts, model.tokenizer, length=text_length(settings, model), most=most,
        prepend_bos=settings.prepend_bos,
    )  # fmt: skip
    return ablation.split_reference(rows, settings.reference_samples, settings.max_texts)


def run_ablate(settings: AblateSettings) -> Path:
    """Remove heads and MLPs, write tables, arrays, figures and a summary; the directory."""
    with run_dir(settings.output_dir, settings.experiment_name) as path:
        _ablate(settings, path)
    return path


def _ablate(settings: AblateSettings, path: Path) -> None:
    started = time.time()
    model, questions, texts = open_study(settings)
    found: dict[str, xr.Dataset] = {}
    prepared: dict[str, Any] = {}
    reference: dict[str, str] = {}
    timed = None
    if questions is not None:
        data, prepared = _question_data(model, questions, settings)
        found["questions"] = ablation.ablate(model, data, settings, progress=True)
        reference["questions"] = _origin(data, settings)
        timed = _timed(model, data, settings)
    if texts is not None:
        data = _text_data(model, texts, settings)
        found["texts"] = ablation.ablate(model, data, settings, progress=True)
        reference["texts"] = _origin(data, settings)
    main = next(iter(found.values()))
    table = ablation.effects_table(main)
    write_json(path / "config.json", settings.as_dict())
    save_table(table, path / "ablation.parquet")
    save_npz(main, path / "per_sample.npz")
    if "texts" in found:
        save_table(perplexity_table(found["texts"]), path / "perplexity.parquet")
    if settings.profile:
        save_table(profile_table(main), path / "profile.parquet")
    title = f"{Path(model.info.source).name} · n={main.sizes['sample']:,}"
    for column in ("accuracy_drop", "loss_delta"):
        figures_ablation.save_sweep(table, column, path / f"sweep_{column}", title)
        figures_ablation.save_sets(table, column, path / f"sets_{column}", title)
    num_tokens = int(main["n_tokens"].sum())
    meta = record(model, settings, texts, prepared, started, num_tokens, len(table)) | {
        "num_processed": main.sizes["sample"],
        "loss_of": main.attrs["loss_of"],
        "answer_scoring": "letter, softmax over the options' letters" if questions else None,
        "accuracy": None if questions is None else float(main["accuracy"][0]),
        "reference": reference,
        "sharing": timed,
    }
    text = summarise(table, meta, found.get("texts"))
    write_text(path / "summary.md", text)
    write_json(path / "meta.json", meta)
    say(text)


def _timed(model: Model, data: ablation.Data, settings: AblateSettings) -> dict[str, float] | None:
    """The sweep's speed against the plain way, where it is asked for."""
    if not settings.time_sharing or data.answers is None:
        return None
    options = Options(settings.batch_size, settings.max_batch_tokens, settings.padding_side)
    chosen = data.samples[: settings.time_sharing]
    return ablation.sharing_ratio(model, chosen, data.answers, options)


def _origin(data: ablation.Data, settings: AblateSettings) -> str:
    if set(settings.methods) == {"zero"}:
        return "none: zero needs no reference"
    if data.reference is data.samples:
        return "the same samples that are evaluated"
    return f"{len(data.reference)} other samples, none of them evaluated"


def perplexity_table(result: xr.Dataset) -> pd.DataFrame:
    """perplexity.parquet: a row per set and method, on the texts."""
    table = ablation.effects_table(result)[["set", "method", "layer", "head"]]
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


def summarise(table: pd.DataFrame, meta: Mapping[str, Any], texts: xr.Dataset | None) -> str:
    """summary.md of an ablation: plain sentences with the numbers in them."""
    clean, rest = table.iloc[0], table.iloc[1:]
    answers = meta["accuracy"] is not None
    lines = ["# Ablation", ""]
    source = Path(meta["model"]["source"]).name
    if answers:
        lines.append(
            f"{source} answers {clean['accuracy']:.1%} of {clean['n_samples']:,} questions (by "
            f"letter), with an answer loss of {clean['loss']:.3f} nats."
        )
    else:
        lines.append(
            f"{source} predicts {clean['n_samples']:,} windows of text with a loss of "
            f"{clean['loss']:.4f} nats per token."
        )
    for method, rows in rest.groupby("method", sort=False):
        lines += ["", *_method_lines(str(method), rows, answers)]
    for name, origin in meta["reference"].items():
        lines += ["", f"Replacements for the {name} come from: {origin}."]
    if texts is not None:
        values = texts["perplexity"].values
        worst = int(np.nanargmax(values))
        lines += [
            "",
            f"Perplexity on the text is {values[0]:.2f} clean; it is highest, {values[worst]:.2f}, "
            f"with {texts['set'].values[worst]} changed ({texts['method'].values[worst]}).",
        ]
    if meta["sharing"] is not None:
        timed = meta["sharing"]
        lines += [
            "",
            f"Timed on {timed['n_samples']:.0f} questions and {timed['n_heads']:.0f} heads: one "
            f"full forward per head and question takes {timed['full_seconds']:.1f} s, the shared "
            f"sweep {timed['shared_seconds']:.1f} s, {timed['ratio']:.1f} times less; the losses "
            f"differ by at most {timed['worst_loss_difference']:.1g} nats.",
        ]
    lines += [
        "",
        "A head whose removal costs nothing may still do its work where another one takes over; "
        "sets removed together show that, single heads do not.",
    ]
    return "\n".join(lines) + "\n"


def _method_lines(method: str, rows: pd.DataFrame, answers: bool) -> list[str]:
    """What one method shows: of the single heads, and of the larger sets."""
    column, unit = ("accuracy_drop", 100.0) if answers else ("loss_delta", 1.0)
    what = "points of accuracy" if answers else "nats of loss"
    single, sets = rows[rows["head"] >= 0], rows[rows["head"] < 0]
    lines = []
    if len(single) > 1:
        ordered = single.sort_values(column, ascending=False)
        costly = ", ".join(
            f"{row['layer']}.{row['head']} ({unit * row[column]:.3g})"
            for row in ordered.head(5).to_dict("records")
        )
        lines.append(f"By {method}, one head at a time: the most costly are {costly} {what}.")
        if answers:
            lines.append(
                f"{(single[column] > 0.2).sum()} of {len(single)} heads cost more than 20 points; "
                f"{(single[column] <= 0).sum()} cost none."
            )
    else:
        sets = rows
    for row in sets.head(MOST_SETS).to_dict("records"):
        lost = f"{100 * row['accuracy_drop']:.3g} points of accuracy lost, " if answers else ""
        effect = f"loss {row['loss_delta']:+.3g} nats, KL {row['kl']:.3g}"
        lines.append(f"- {row['set']} ({method}): {lost}{effect}")
    if len(sets) > MOST_SETS:
        lines.append(f"- and {len(sets) - MOST_SETS} more, in ablation.parquet")
    return lines
