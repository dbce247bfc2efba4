"""Attention boosted at chosen heads, and what becomes of answers, loss and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.targets import Targets
from tl_headnorm.interventions.heads import Heads
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import ByName, Letters, Metric, NextTokens, Resid
from tl_headnorm.interventions.rankings import random_heads
from tl_headnorm.interventions.runner import Values, run
from tl_headnorm.interventions.steering import SpanWeight, Steering
from tl_headnorm.model.loading import Model
from tl_headnorm.stats import wilson

COLUMNS = (
    "set", "heads", "boost", "n_samples", "accuracy", "loss", "keyword_weight", "kl",
    "answer_changed_share", "target_share", "target_share_low", "target_share_high",
    "target_logp",
)  # fmt: skip


@dataclass(frozen=True)
class Answers(Letters):
    """Letters, and which option was chosen and how likely the one steered to is.

    `targets` are options by sample index; -1 or none: `target_logp` is that of the right one.
    """

    targets: Mapping[int, int] = field(default_factory=dict)

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(n_layers, n_heads), "predicted": (), "target_logp": ()}

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        values = super().__call__(runs, resid, clean)
        logp = torch.stack([self.logp(rows, x) for rows, x in zip(runs, resid, strict=True)])
        meant = [self._target(s.index) for s in runs[0].samples]
        at = torch.tensor(meant, device=logp.device).expand(len(logp), -1)[:, :, None]
        values["predicted"] = logp.argmax(2).to(logp.dtype)
        values["target_logp"] = logp.gather(2, at)[:, :, 0]
        return values

    def _target(self, index: int) -> int:
        option = self.targets.get(index, -1)
        return self.answers[index] if option < 0 else option


def metric_of(targets: Targets, answers: Sequence[int] | None) -> Metric:
    """The answer's letter or, of texts, the next token."""
    if answers is None:
        return NextTokens()
    options = zip(targets.samples, targets.options, strict=True)
    return Answers(answers, {sample.index: option for sample, option in options})


def run_steered(
    model: Model,
    targets: Targets,
    steerings: Sequence[Steering],
    metric: Metric,
    settings: SteerSettings,
    *,
    progress: bool = False,
) -> Values:
    """The metric and `weight` (see SpanWeight) of the clean run and of every steering.

    The steerings' spans are those of the targets, their queries those of the settings.
    """
    spans = targets.span_of
    steerings = [replace(s, spans=spans, queries=settings.queries) for s in steerings]
    heads = tuple({head for steering in steerings for head in steering.heads})
    metric = SpanWeight(metric, spans, heads)
    return run(
        model, targets.samples, steerings, metric, settings=settings,
        progress="steer" if progress else None,
    )  # fmt: skip


def sets_of(
    name: str, heads: Heads, model: Model, settings: SteerSettings
) -> list[tuple[str, Heads]]:
    """The chosen set and the random ones it is compared with."""
    info = model.info
    drawn = random_heads(heads, info.n_layers, info.n_heads, settings.random_sets, settings.seed)
    everything = len(heads) == info.n_layers * info.n_heads  # nothing to compare it with
    return [(name, heads), *([] if everything else drawn)]


def steer(
    model: Model,
    targets: Targets,
    sets: Sequence[tuple[str, Heads]],
    settings: SteerSettings,
    answers: Sequence[int] | None = None,
    *,
    progress: bool = False,
) -> tuple[pd.DataFrame, Values, list[Steering]]:
    """(a row per set and boost, `clean` first; values of every run and sample; the runs).

    `answers[i]` is the right option of sample i; None reads the next token of every place. Per
    row, over samples: `accuracy`, `loss` (nats, -log p of the right letter, or of the next
    token), `keyword_weight` (attention of the last token to the span, mean over the set's heads),
    `kl` (of the clean answer distribution to this one), `answer_changed_share`, `target_share`
    (answers that are the option steered to, with Wilson's 95 % interval).

    What the numbers cannot tell: a boost that moves an answer shows that the answer can be had
    from there, not that the model takes it from there by itself.

    1 every set at every boost, and the clean run with the weight of the first set's heads
    2 run them  3 means over samples.
    """
    # 1
    runs = [Steering("clean", sets[0][1], 1.0)]
    runs += [Steering(name, heads, boost) for name, heads in sets for boost in settings.boosts]
    # 2
    metric = metric_of(targets, answers)
    values = run_steered(model, targets, runs, metric, settings, progress=progress)
    values = {name: value[1:] for name, value in values.items()}
    # 3
    rows = [_row(values, i, steering, targets) for i, steering in enumerate(runs)]
    return pd.DataFrame(rows, columns=list(COLUMNS)), values, runs


def _row(found: Values, number: int, steering: Steering, targets: Targets) -> dict[str, Any]:
    values = {name: value[number] for name, value in found.items()}
    # Every predicted token of a text counts alike, every question alike.
    share = None if "predicted" in values else [len(s) - 1 for s in targets.samples]
    row = {
        "set": steering.name,
        "heads": " ".join(f"{layer}.{head}" for layer, head in steering.heads),
        "boost": steering.boost,
        "n_samples": len(targets.samples),
        "accuracy": values["correct"].mean(),
        "loss": np.average(values["loss"], weights=share),
        "keyword_weight": values["weight"].mean(),
        "kl": np.average(values["kl"], weights=share),
        **dict.fromkeys(COLUMNS[8:], np.nan),
    }
    if "predicted" in values:
        row["answer_changed_share"] = (values["predicted"] != found["predicted"][0]).mean()
        row["target_logp"] = values["target_logp"].mean()
        if min(targets.options) >= 0:
            hits = values["predicted"] == np.array(targets.options)
            low, high = wilson(int(hits.sum()), len(hits))
            row |= {"target_share": hits.mean(), "target_share_low": low,
                    "target_share_high": high}  # fmt: skip
    return row


def per_sample_table(
    found: Values, runs: Sequence[Steering], targets: Targets, ids: Sequence[str]
) -> pd.DataFrame:
    """samples.parquet: a row per run and sample."""
    parts = []
    for number, steering in enumerate(runs):
        columns = {name: value[number] for name, value in found.items()}
        weight = columns.pop("weight")
        head = {"set": steering.name, "boost": steering.boost, "id": list(ids)}
        span = {"target": list(targets.options), "keyword_weight": weight}
        parts.append(pd.DataFrame({**head, **columns, **span}))
    return pd.concat(parts, ignore_index=True)


def bootstrap_interval(
    values: Float[np.ndarray, " sample"], draws: int, seed: int
) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean, over samples drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, size=(draws, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def perplexity(loss: float) -> float:
    """exp of the mean loss per token, in nats."""
    return float(np.exp(loss))
