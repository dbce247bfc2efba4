"""The heart: every head's norms for every sample of a dataset, and their running moments."""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_headnorm import hooks, results
from tl_headnorm.config import Settings
from tl_headnorm.data.batches import Batch, batches_in_order
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.measures import (
    MEASURES,
    contribution_factor,
    last_real_position,
    mean_over_tokens,
    take_position,
)
from tl_headnorm.model import Model
from tl_headnorm.stats import Moments


@dataclass
class Collected:
    """Per-sample values [sample, layer, head] and moments by measure; predictions by sample."""

    values: dict[str, Float[np.ndarray, "sample layer head"]]
    moments: dict[str, Moments]
    predicted: Int[np.ndarray, " sample"]


def measure_batch(
    model: Model,
    batch: Batch,
    factors: Mapping[int, Tensor],
    *,
    token_agg: str = "last",
    exclude_first_token: bool = False,
    score: bool = False,
) -> tuple[dict[str, Float[np.ndarray, "batch layer head"]], Int[np.ndarray, " batch"]]:
    """Every measure of every head for one batch, and the predicted option of each prompt.

    A layer whose hook did not fire is NaN. Only [batch, layer, head] numbers leave the device.
    """
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    z_by_layer, resid, _ = hooks.run_z(model.tl, ids, mask)
    last = last_real_position(mask)
    columns: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for layer in range(model.info.n_layers):
        z = z_by_layer.pop(layer, None)
        if z is not None and token_agg == "last":
            z = take_position(z, last)
        for name, measure in MEASURES.items():
            if z is None:
                values = torch.full((len(batch), model.info.n_heads), torch.nan)
            elif token_agg == "last":
                values = measure.compute(z, factors[layer])[:, 0]
            else:
                per_token = measure.compute(z, factors[layer])
                values = mean_over_tokens(per_token, mask, exclude_first_token)
            columns[name].append(values.to(model.device))
    stacked = {n: torch.stack(c, dim=1).double().cpu().numpy() for n, c in columns.items()}
    return stacked, _predict(model, batch, resid, last) if score else np.full(len(batch), -1)


def _predict(model: Model, batch: Batch, resid: Tensor, last: Tensor) -> Int[np.ndarray, " batch"]:
    """Position of the option whose letter has the largest next-token logit."""
    width = max(len(sample.letter_ids) for sample in batch.samples)
    # Rows with fewer options repeat their first letter: a tie that argmax never prefers.
    padded = [s.letter_ids + s.letter_ids[:1] * (width - len(s.letter_ids)) for s in batch.samples]
    letter_ids = torch.tensor(padded, device=model.device)
    logits = hooks.letter_logits(model.tl, resid, last, letter_ids)
    return logits.argmax(dim=1).cpu().numpy()


@torch.inference_mode()
def measure_samples(
    model: Model,
    samples: Sequence[Encoded],
    *,
    batch_size: int = 8,
    padding_side: str = "right",
    token_agg: str = "last",
    exclude_first_token: bool = False,
    score: bool = False,
    progress: bool = False,
    names: Sequence[str] = (),
) -> Collected:
    """Measure tokenised prompts; values come back in dataset order, whatever the batches were.

    Raises InputError at a value that is not finite, with layer, head and sample.
    """
    shape = (len(samples), model.info.n_layers, model.info.n_heads)
    out = Collected(
        {name: np.full(shape, np.nan, np.float32) for name in MEASURES},
        {name: Moments.empty(shape[1:]) for name in MEASURES},
        np.full(len(samples), -1),
    )
    factors = {
        layer: contribution_factor(hooks.W_O(model.tl, layer))
        for layer in range(model.info.n_layers)
    }
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    for batch in _progress(batches_in_order(samples, batch_size, padding_side), samples, progress):
        values, predicted = measure_batch(
            model,
            batch,
            factors,
            token_agg=token_agg,
            exclude_first_token=exclude_first_token,
            score=score,
        )
        rows = [row_of[sample.index] for sample in batch.samples]
        for name, value in values.items():
            _check_finite(name, value, [names[r] if names else str(r) for r in rows])
            out.values[name][rows] = value
            out.moments[name].update(value)
        out.predicted[rows] = predicted
    return out


def _progress(batches: Iterable[Batch], samples: Sequence[Encoded], shown: bool) -> Iterable[Batch]:
    """A bar on stderr that counts samples and shows tokens/s."""
    started, tokens = time.perf_counter(), 0
    with tqdm(total=len(samples), unit="sample", disable=not shown, desc="collect") as bar:
        for batch in batches:
            yield batch
            tokens += int(batch.mask.sum())
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(batch))


def _check_finite(name: str, value: np.ndarray, names: Sequence[str]) -> None:
    """NaN of a whole layer means its hook did not fire; anything else not finite is an error."""
    bad = ~np.isfinite(value) & ~np.isnan(value).all(axis=(0, 2), keepdims=True)
    bad |= np.isinf(value)
    if bad.any():
        row, layer, head = np.argwhere(bad)[0]
        raise InputError(
            f"{name}: expected finite values, found {value[row, layer, head]} in layer {layer}, "
            f"head {head} of sample {names[row]}; try --dtype fp32, or check the weights"
        )


def collect(
    model: Model,
    questions: Sequence[Question],
    settings: Settings | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> xr.Dataset:
    """Measure every head over a set of questions.

    Settings may be given by name: `collect(model, questions, token_agg="all")`. Returns a
    Dataset with dims (layer, head[, sample]): `<measure>_mean`, `_std` (ddof 1), `_n` and the
    per-sample `<measure>`, in dataset order, and the run's record in `attrs`.

    `head_output_norm` is ||z_h||_2, `head_resid_contrib_norm` is ||z_h W_O^h||_2, taken at the
    last real token of a prompt or averaged over all its real tokens. What the numbers cannot
    tell: the direction of a head's contribution, and whether anything downstream reads it.
    """
    settings = (settings or Settings()).updated(**overrides)
    started_at, clock = results.now(), time.perf_counter()
    prepared = prepare(model.tokenizer, model.n_ctx, questions, settings)
    collected = measure_samples(
        model,
        prepared.encoded,
        batch_size=settings.batch_size,
        padding_side=settings.padding_side,
        token_agg=settings.token_agg,
        exclude_first_token=settings.exclude_first_token,
        score=settings.score_answers,
        progress=progress,
        names=[question.id for question in questions],
    )
    seconds = time.perf_counter() - clock
    record = _record(model, prepared, settings, started_at, seconds)
    run = results.build(collected.values, collected.moments, record)
    results.add_samples(run, questions, prepared.encoded, collected.predicted)
    _warn_missing(run)
    if settings.validate_samples:
        from tl_headnorm.hf import validate

        checked = validate(model, questions, settings, limit=settings.validate_samples, run=run)
        run.attrs["validated_against_hf"] = checked["worst_relative"]
    run.attrs["finished_at"] = results.now()
    return run


def _record(
    model: Model, prepared: Prepared, settings: Settings, started_at: str, seconds: float
) -> dict[str, Any]:
    """What meta.json says, but for what only the values tell."""
    tokens = sum(len(sample) for sample in prepared.encoded)
    return {
        "num_processed": len(prepared.encoded),
        **prepared.record,
        "model": model.info.as_dict(),
        "padding_side": settings.padding_side,
        "token_agg": settings.token_agg,
        "exclude_first_token": settings.exclude_first_token,
        "answer_scoring": "letter" if settings.score_answers else None,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "validated_against_hf": None,
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_bytes": results.peak_memory_bytes(model.device.type),
        "seed": settings.seed,
        "started_at": started_at,
        "settings": settings.as_dict(),
    }


def _warn_missing(run: xr.Dataset) -> None:
    missing = run.attrs["missing_layers"]
    if missing:
        warnings.warn(
            f"no values for layers {missing}: their hook_z did not fire; they are NaN with count 0",
            stacklevel=3,
        )
