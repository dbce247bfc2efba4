"""Every method over a set of questions or texts: per-sample scores, their moments, their faults."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from tqdm.auto import tqdm

from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.leave_one_out import loo, shapley
from tl_headnorm.commands.attribute.losses import (
    TokenLoss,
    corrupted_items,
    question_items,
    text_file_items,
)
from tl_headnorm.commands.attribute.methods import (
    COMPLETE,
    GRADIENT_METHODS,
    Context,
    Scores,
    joined,
)
from tl_headnorm.commands.attribute.rollout import token_scores
from tl_headnorm.commands.attribute.settings import AttributeSettings, expand_methods
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.gates import Base
from tl_headnorm.interventions.metrics import Loss
from tl_headnorm.interventions.names import useful_sign
from tl_headnorm.model.loading import Model
from tl_headnorm.run import results

HEAD_METHODS = {**GRADIENT_METHODS, "shapley": shapley, "loo": loo}


@dataclass
class Job:
    """Items, groups and the loss of one run, for `attribute` and the validation."""

    gated: GatedLoss
    items: Sequence[Encoded]
    questions: Sequence[Question]
    settings: AttributeSettings
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        if self.settings.loss == "lm":
            return [str(item.index) for item in self.items]
        return [question.id for question in self.questions]

    def groups(self) -> list[str] | None:
        """Every sample's group: its dataset, or a field of the question; None where not asked."""
        name = "dataset" if self.settings.datasets else self.settings.group_by
        if name is None:
            return None
        missing = [q.id for q in self.questions if name not in q.meta]
        if missing:
            known = sorted({key for q in self.questions for key in q.meta} - {"source"})
            raise InputError(
                f"group_by: expected the field {name!r} in every question, found none in "
                f"{len(missing)} of {len(self.questions)} (first: {missing[0]}); fields there: "
                f"{', '.join(known) or 'none'}"
            )
        return [str(q.meta[name]) for q in self.questions]


def open_job(model: Model, questions: Sequence[Question], settings: AttributeSettings) -> Job:
    """Tokenise and set up the loss. Raises InputError for what cannot be run."""
    loss: Loss
    if settings.loss == "lm":
        items, loss = text_file_items(model, settings), TokenLoss(mean=True)
        record: dict[str, Any] = {"num_tokens": sum(map(len, items)), "texts": settings.texts}
    else:
        items, loss, prepared = question_items(model, questions, settings)
        record = prepared.record
    return Job(GatedLoss(model, loss, settings), items, questions, settings, record)


def mean_z(gated: GatedLoss, items: Sequence[Encoded]) -> Base:
    """Every head's mean z over all real positions of all samples, [1, 1, head, d_head]."""
    totals: dict[int, torch.Tensor] = {}
    count = 0.0
    for batch in gated.batches(items):
        z, mask = gated.z(batch)
        count += float(mask.sum())
        for layer, value in z.items():
            kept = torch.where(mask.bool()[:, :, None, None], value.to(gated.dtype), 0)
            totals[layer] = totals.get(layer, 0) + kept.sum((0, 1))
    return {layer: (total / count)[None, None] for layer, total in totals.items()}


def corrupted_z(gated: GatedLoss, items: Sequence[Encoded], others: Sequence[Encoded]) -> Base:
    """z of the other prompts where it meets the originals, both aligned at their last tokens.

    Positions without a counterpart keep their own z, so that nothing is patched there.
    """
    own, mask = gated.z(items)
    theirs, other_mask = gated.z(others)
    base = {layer: value.clone() for layer, value in own.items()}
    for row in range(len(items)):
        here, there = mask[row].nonzero()[:, 0], other_mask[row].nonzero()[:, 0]
        n = min(len(here), len(there))
        for layer, value in base.items():
            value[row, here[-n:]] = theirs[layer][row, there[-n:]]
    return base


def run_methods(job: Job, methods: Sequence[str], *, progress: bool = False) -> dict[str, Scores]:
    """Per-sample scores of the methods, in dataset order."""
    gated, items, settings = job.gated, job.items, job.settings
    parts: dict[str, list[Scores]] = {m: [] for m in methods if m in HEAD_METHODS}
    mean = mean_z(gated, items) if "atp_mean" in parts or settings.baseline == "mean" else None
    others: Sequence[Encoded] = ()
    if "atp_corrupted" in parts:
        others = corrupted_items(gated.model, items, gated.loss, job.questions, settings)
    place = {item.index: row for row, item in enumerate(items)}
    rows: list[int] = []
    with tqdm(total=len(items), unit="sample", disable=not progress, desc="attribute") as bar:
        for number, batch in enumerate(gated.batches(items)):
            here = [place[item.index] for item in batch]
            context = Context(gated, batch, settings, mean, seed=number)
            if others:
                context.corrupted = corrupted_z(gated, batch, [others[row] for row in here])
            for method, found in parts.items():
                scores = HEAD_METHODS[method](context)
                _check_finite(scores.values, method, job, here)
                found.append(scores)
            rows += here
            bar.update(len(batch))
    order = np.argsort(rows)
    return {method: joined(found, order) for method, found in parts.items()}


def _check_finite(
    values: Float[np.ndarray, "batch layer head"], method: str, job: Job, rows: Sequence[int]
) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, layer, head = (int(i) for i in bad[0])
        raise InputError(
            f"{method}: expected finite scores, found {values[row, layer, head]} at layer {layer}, "
            f"head {head} of sample {job.ids[rows[row]]}; try --dtype fp32, or check the weights"
        )


def attribute(
    model: Model,
    questions: Sequence[Question] = (),
    settings: AttributeSettings | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> xr.Dataset:
    """Score every head of every sample with every method of the settings.

    Returns a Dataset with dims (method, sample, layer, head): `score`, its `mean`, `std` (ddof 1)
    and `stderr` over samples, `sampling_stderr` of the mean where a method draws at random,
    `completeness_error` and `completeness_relative` per sample, `steps`. The loss is positive, so
    a useful head has a negative score, except where `useful_sign` is +1 (michel, atp_*).

    1 tokens, loss and groups  2 scores of every method, batch by batch  3 rollout of tokens
    4 means over samples, and the faults of the sums that methods promise.
    """
    settings = (settings or AttributeSettings()).updated(**overrides)
    started_at, clock = results.now(), time.perf_counter()
    # 1
    job = open_job(model, questions, settings)
    groups = job.groups()
    # 2
    methods = expand_methods(settings.methods)
    scores = run_methods(job, methods, progress=progress)
    # 3
    rollout = {"rollout": rollout_tokens(job)} if "rollout" in methods else {}
    # 4
    run = _dataset(scores, job, groups)
    completeness = _completeness(run)
    run.attrs |= rollout | {
        "num_processed": len(job.items),
        **job.record,
        "model": model.info.as_dict(),
        "loss": settings.loss,
        "methods": list(methods),
        "completeness_error": completeness,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "wall_seconds": round(time.perf_counter() - clock, 3),
        "peak_memory_bytes": results.peak_memory_bytes(model.device.type),
        "seed": settings.seed,
        "started_at": started_at,
        "settings": settings.as_dict(),
        "finished_at": results.now(),
    }
    _warn_incomplete(run, settings.tolerance)
    return run


def _dataset(found: dict[str, Scores], job: Job, groups: list[str] | None) -> xr.Dataset:
    methods, n = list(found), len(job.items)
    shape = (0, n, job.gated.n_layers, job.gated.n_heads)
    score = np.stack([s.values for s in found.values()]) if found else np.empty(shape)
    std = score.std(1, ddof=1) if n > 1 else np.full((len(found), *shape[2:]), np.nan)
    none = np.full(shape[2:], np.nan)
    noise = [none if s.noise is None else s.noise for s in found.values()]
    heads, samples = ("method", "layer", "head"), ("method", "sample")

    def column(of: Callable[[Scores], np.ndarray]) -> Any:
        return samples, np.stack([of(s) for s in found.values()]) if found else np.empty((0, n))

    return xr.Dataset(
        {
            "score": (("method", "sample", "layer", "head"), score),
            "mean": (heads, score.mean(1)),
            "std": (heads, std),
            "stderr": (heads, std / np.sqrt(n)),
            "sampling_stderr": (heads, np.sqrt(noise) / n if found else std),
            "completeness_error": column(lambda s: s.error),
            "completeness_relative": column(lambda s: s.error / np.maximum(s.scale, 1e-12)),
            "steps": column(lambda s: s.steps),
            "useful_sign": ("method", np.array([useful_sign(m) for m in methods], int)),
        },
        coords={
            "method": np.array(methods, dtype=object),
            "layer": np.arange(shape[2]),
            "head": np.arange(shape[3]),
            "sample": np.arange(n),
            "sample_id": ("sample", np.array(job.ids, dtype=object)),
            "group": ("sample", np.array(groups or [""] * n, dtype=object)),
        },
    )


def _completeness(run: xr.Dataset) -> dict[str, Any]:
    """Per method: worst and mean over samples, absolute and relative; None: it promises no sum."""
    report: dict[str, Any] = {}
    for method in run["method"].values:
        absolute = run["completeness_error"].loc[{"method": method}].values
        relative = run["completeness_relative"].loc[{"method": method}].values
        if np.isnan(absolute).all():
            report[method] = None
            continue
        report[method] = {
            "worst_absolute": float(absolute.max()),
            "mean_absolute": float(absolute.mean()),
            "worst_relative": float(relative.max()),
            "mean_relative": float(relative.mean()),
            "promised": method in COMPLETE,
            "steps_most": int(run["steps"].loc[{"method": method}].max()),
        }
    return report


def over_tolerance(run: xr.Dataset, tolerance: float) -> dict[str, int]:
    """By method that promises a sum: the samples that miss it by more than the tolerance."""
    relative = run["completeness_relative"]
    counts = {m: int((relative.loc[{"method": m}] > tolerance).sum()) for m in run["method"].values}
    return {method: n for method, n in counts.items() if n and method in COMPLETE}


def _warn_incomplete(run: xr.Dataset, tolerance: float) -> None:
    for method, n in over_tolerance(run, tolerance).items():
        worst = run.attrs["completeness_error"][method]["worst_relative"]
        warnings.warn(
            f"{method}: the scores of {n} of {run.sizes['sample']} samples do not sum to the "
            f"loss difference within {tolerance:g} (worst {worst:.2g}); raise --max_steps, or use "
            "--dtype fp32",
            stacklevel=3,
        )


def rollout_tokens(job: Job) -> list[np.ndarray]:
    """Rollout of every sample's last token over its tokens, in dataset order."""
    place = {item.index: row for row, item in enumerate(job.items)}
    found: list[Any] = [None] * len(job.items)
    for batch in job.gated.batches(job.items):
        for item, scores in zip(batch, token_scores(job.gated, batch), strict=True):
            found[place[item.index]] = scores.double().numpy()
    return found


def importance(run: xr.Dataset) -> dict[str, np.ndarray]:
    """Mean usefulness [layer, head] per method, larger is more useful."""
    signs = run["useful_sign"].values
    return {
        method: sign * run["mean"].loc[{"method": method}].values
        for method, sign in zip(run["method"].values, signs, strict=True)
    }
