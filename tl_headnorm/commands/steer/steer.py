"""Attention boosted at chosen heads, and what becomes of answers, loss and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.targets import Targets
from tl_headnorm.data.batches import Batch
from tl_headnorm.interventions.heads import Heads
from tl_headnorm.interventions.metrics import Letters, NextTokens, Values
from tl_headnorm.interventions.rankings import random_heads
from tl_headnorm.interventions.steering import HowSteered, Steered, Steering, run_steered
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

    `targets[index]` is an option, or -1, where `target_logp` is that of the right one.
    """

    targets: Sequence[int] = ()

    def __call__(
        self, model: Any, batch: Batch, mask: Tensor, resid: Tensor, clean: Tensor
    ) -> Values:
        """`resid` [variant, batch, 1, d_model], `clean` [batch, 1, d_model]."""
        values = super().__call__(model, batch, mask, resid, clean)
        found = torch.stack([self._logp(model, batch, rows[:, 0]) for rows in resid])
        meant = [
            self.answers[s.index] if self.targets[s.index] < 0 else self.targets[s.index]
            for s in batch.samples
        ]
        at = torch.tensor(meant, device=found.device).expand(len(found), -1)[:, :, None]
        values["predicted"] = found.argmax(2).to(found.dtype)
        values["target_logp"] = found.gather(2, at)[:, :, 0]
        return values


def readout_of(targets: Targets, answers: Sequence[int] | None) -> Any:
    """What steered runs are judged by: the answer's letter or, of texts, the next token."""
    if answers is None:
        return NextTokens()
    meant = [-1] * len(answers)
    for one, option in zip(targets.samples, targets.options, strict=True):
        meant[one.index] = option
    return Answers(answers, targets=meant)


def how_of(settings: SteerSettings) -> HowSteered:
    return HowSteered(
        settings.batch_size, settings.max_batch_tokens, settings.padding_side, settings.queries
    )


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
) -> tuple[pd.DataFrame, Steered, list[Steering]]:
    """(a row per set and boost, `clean` first; what every sample gave; the steerings).

    `answers[i]` is the right option of sample i; None reads the next token of every place. Per
    row, over samples: `accuracy`, `loss` (nats, -log p of the right letter, or of the next
    token), `keyword_weight` (attention of the last token to the span, mean over the set's heads),
    `kl` (of the clean answer distribution to this one), `answer_changed_share`, `target_share`
    (answers that are the option steered to, with Wilson's 95 % interval).

    What the numbers cannot tell: a boost that moves an answer shows that the answer can be had
    from there, not that the model takes it from there by itself.
    """
    steerings = [Steering(name, heads, boost) for name, heads in sets for boost in settings.boosts]
    readout = readout_of(targets, answers)
    found = run_steered(
        model, targets.samples, targets.spans, steerings, readout,
        how=how_of(settings), progress=progress,
    )  # fmt: skip
    rows = [_row(found, 0, Steering("clean", sets[0][1], 1.0), targets)]
    rows += [_row(found, i, steering, targets) for i, steering in enumerate(steerings, 1)]
    return pd.DataFrame(rows, columns=list(COLUMNS)), found, steerings


def _row(found: Steered, number: int, steering: Steering, targets: Targets) -> dict[str, Any]:
    values = {name: value[number] for name, value in found.values.items()}
    weight = found.clean_mean(steering.heads) if number == 0 else found.weight[number - 1]
    # Every predicted token of a text counts alike, every question alike.
    share = None if "predicted" in values else [len(s) - 1 for s in targets.samples]
    row = {
        "set": steering.name,
        "heads": " ".join(f"{layer}.{head}" for layer, head in steering.heads),
        "boost": steering.boost,
        "n_samples": len(targets.samples),
        "accuracy": values["correct"].mean(),
        "loss": np.average(values["loss"], weights=share),
        "keyword_weight": weight.mean(),
        "kl": np.average(values["kl"], weights=share),
        **dict.fromkeys(COLUMNS[8:], np.nan),
    }
    if "predicted" in values:
        clean = found.values["predicted"][0]
        row["answer_changed_share"] = (values["predicted"] != clean).mean()
        row["target_logp"] = values["target_logp"].mean()
        if min(targets.options) >= 0:
            hits = values["predicted"] == np.array(targets.options)
            low, high = wilson(int(hits.sum()), len(hits))
            row |= {"target_share": hits.mean(), "target_share_low": low,
                    "target_share_high": high}  # fmt: skip
    return row


def per_sample_table(
    found: Steered, steerings: Sequence[Steering], targets: Targets, ids: Sequence[str]
) -> pd.DataFrame:
    """samples.parquet: a row per run and sample."""
    parts = []
    clean = Steering("clean", steerings[0].heads, 1.0)
    for number, steering in enumerate([clean, *steerings]):
        weight = found.clean_mean(steering.heads) if number == 0 else found.weight[number - 1]
        columns = {name: value[number] for name, value in found.values.items()}
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
