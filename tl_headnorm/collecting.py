"""The heart: every head's norms for every sample of a dataset, and their running moments."""

import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_headnorm import hf, hooks, results
from tl_headnorm.config.run import Settings
from tl_headnorm.data.batches import Batch, make_batch
from tl_headnorm.data.plan import Group, plan_batches, prefix_groups
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.measures import MEASURES
from tl_headnorm.measuring import Factors, Found, How, Measurer, factors_of
from tl_headnorm.memory import auto_batch_tokens, halves, is_out_of_memory
from tl_headnorm.model import Model
from tl_headnorm.stats import Moments
from tl_headnorm.store import RowFile


@dataclass
class Collected:
    """Per-sample values [sample, layer, head] and moments by measure; predictions by sample.

    The values are arrays, or the store they were written to.
    """

    values: Mapping[str, Any]
    moments: dict[str, Moments]
    predicted: Int[np.ndarray, " sample"]


@torch.inference_mode()
def measure_samples(
    model: Model,
    samples: Sequence[Encoded],
    *,
    progress: bool = False,
    names: Sequence[str] = (),
    store: Mapping[str, Any] | None = None,
    factors: Factors | None = None,
    **how: Any,
) -> Collected:
    """Measure tokenised prompts; values come back in dataset order, whatever the batches were.

    `how` takes the fields of How. `store` receives the per-sample values by measure, where they
    are not to be kept in memory (anything that takes `store[name][rows] = values`). Raises
    InputError at a value that is not finite, with layer, head and sample.
    """
    options = How(**how)
    shape = (len(samples), model.info.n_layers, model.info.n_heads)
    values = store or {name: np.full(shape, np.nan, np.float32) for name in MEASURES}
    moments = {name: Moments.empty(shape[1:]) for name in MEASURES}
    out = Collected(values, moments, np.full(len(samples), -1))
    factors = factors or factors_of(model)
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    with _Progress(len(samples), progress) as bar:
        for batch, found in _batches(model, samples, factors, options):
            rows = [row_of[sample.index] for sample in batch.samples]
            for name, value in found.values.items():
                labels = [names[r] if names else str(r) for r in rows]
                _check_finite(name, value, labels, found.missing)
                out.values[name][rows] = value
                out.moments[name].update(value)
            out.predicted[rows] = found.predicted
            bar.step(batch)
    return out


def _batches(
    model: Model, samples: Sequence[Encoded], factors: Factors, how: How
) -> Iterator[tuple[Batch, Found]]:
    """Every prompt exactly once; a batch that does not fit in memory is halved and run again."""
    bound = how.max_batch_tokens
    most = auto_batch_tokens(model) if bound == "auto" else int(bound)
    shared = how.share_prefix and hooks.can_share_prefix(model.tl)
    groups = prefix_groups(samples) if shared else [Group(tuple(samples), 0)]
    for group in groups:
        measurer = Measurer(model, factors, how, group.prefix)
        pending = deque(plan_batches(group, how.batch_size, most, sort=how.sort))
        while pending:
            chosen = pending.popleft()
            batch = make_batch(chosen, how.padding_side, skip=group.prefix_length)
            try:
                found = measurer(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                pending.extendleft(reversed(halves(chosen, error)))
                continue
            yield batch, found


class _Progress:
    """A bar on stderr that counts samples and shows tokens/s."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, unit="sample", disable=not shown, desc="collect")
        self.started, self.tokens = time.perf_counter(), 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, batch: Batch) -> None:
        self.tokens += sum(len(sample) for sample in batch.samples)
        rate = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(len(batch))


def _check_finite(
    name: str, value: np.ndarray, names: Sequence[str], missing: Sequence[int]
) -> None:
    """NaN stands for a layer whose hook did not fire; anywhere else it is an error."""
    bad = ~np.isfinite(value)
    bad[:, list(missing)] = False
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
    scratch: Path | None = None,
    **overrides: Any,
) -> xr.Dataset:
    """Measure every head over a set of questions.

    Settings may be given by name: `collect(model, questions, token_agg="all")`. Returns a
    Dataset with dims (layer, head[, sample]): `<measure>_mean`, `_std` (ddof 1), `_n` and the
    per-sample `<measure>`, in dataset order, and the run's record in `attrs`.

    `head_output_norm` is ||z_h||_2, `head_resid_contrib_norm` is ||z_h W_O^h||_2, taken at the
    last real token of a prompt or averaged over all its real tokens. Per-sample values go
    through files in the directory `scratch`, where one is given, instead of memory.

    What the numbers cannot tell: the direction of a head's contribution, and whether anything
    downstream reads it.
    """
    settings = (settings or Settings()).updated(**overrides)
    started_at, clock = results.now(), time.perf_counter()
    prepared = prepare(model.tokenizer, model.n_ctx, questions, settings)
    shape = (len(prepared.encoded), model.info.n_layers, model.info.n_heads)
    files = {n: RowFile(scratch / f".{n}.npy", shape) for n in MEASURES} if scratch else {}
    collected = measure_samples(
        model,
        prepared.encoded,
        store=files or None,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        padding_side=settings.padding_side,
        token_agg=settings.token_agg,
        exclude_first_token=settings.exclude_first_token,
        score=settings.score_answers,
        progress=progress,
        names=[question.id for question in questions],
    )
    seconds = time.perf_counter() - clock
    record = _record(model, prepared, settings, started_at, seconds)
    values = {name: file.array() for name, file in files.items()} or collected.values
    run = results.build(values, collected.moments, record)
    results.add_samples(run, questions, prepared.encoded, collected.predicted)
    _warn_missing(run)
    if settings.validate_samples:
        checked = hf.validate(model, run, prepared.encoded, settings, settings.validate_samples)
        run.attrs["validated_against_hf"] = checked["worst_relative"]
        if not checked["passed"]:
            warnings.warn(f"Hugging Face disagrees: {hf.describe(checked)}", stacklevel=2)
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
