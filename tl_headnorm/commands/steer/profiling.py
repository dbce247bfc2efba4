"""Heads steered one by one: picked on one half of the questions, tested on the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.steer import bootstrap_interval, metric_of, run_steered
from tl_headnorm.commands.steer.targets import Targets, shifted
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import Heads, all_heads
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import ByName, Metric, Resid
from tl_headnorm.interventions.runner import run
from tl_headnorm.interventions.steering import Steering
from tl_headnorm.model.loading import Model

OptionSpans = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Profile:
    """`table` has a row per head, `offsets` one per head and offset; `heads` are those picked.

    `fit` and `test` number the samples of either half.
    """

    table: pd.DataFrame
    offsets: pd.DataFrame
    heads: Heads
    fit: np.ndarray
    test: np.ndarray
    agreement: float


def halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of n samples, drawn by `seed`, each in ascending order."""
    if n < 4:
        raise InputError(f"profile: expected 4 questions or more to split in halves, found {n}")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def profile(
    model: Model,
    targets: Targets,
    options: OptionSpans,
    answers: Sequence[int],
    settings: SteerSettings,
    *,
    progress: bool = False,
) -> Profile:
    """Steer every head alone; the `profile_top` heads that help most on the fit half are picked.

    `effect`: mean change of log p (nats) of the option steered to or, where the span is of no
    option, of the right one. `attention`: attention of the last token to the right option's span
    minus the mean of the other options', at `span_offset` tokens behind it; `options[i][j]` are
    the tokens of option j of sample i. `effect_test` and `attention_test` are of questions that
    did not pick; their intervals are bootstrapped over questions. A head that helps alone need
    not help beside others, and the other way round.

    1 steer each head alone  2 read every head's attention to the options  3 pick on one half of
    the questions, test on the other.
    """
    # 1
    info = model.info
    every = all_heads(range(info.n_layers), info.n_heads)
    boost = max(settings.boosts) if settings.profile_boost is None else settings.profile_boost
    steerings = [Steering(f"{layer}.{head}", ((layer, head),), boost) for layer, head in every]
    metric = metric_of(targets, answers)
    values = run_steered(model, targets, steerings, metric, settings, progress=progress)
    logp = values["target_logp"]
    effect = (logp[1:] - logp[0]).T
    # 2
    samples, offset = targets.samples, settings.span_offset
    offsets = tuple(dict.fromkeys((*range(settings.profile_offsets + 1), offset)))
    by_index = {s.index: option for s, option in zip(samples, options, strict=True)}
    right = {s.index: answers[s.index] for s in samples}
    reading = AttentionContrast(by_index, right, offsets)
    attention = {
        int(k): v[0] for k, v in run(model, samples, [], reading, settings=settings).items()
    }
    # 3
    fit, test = halves(len(targets.samples), settings.seed)
    here = attention[offset].reshape(len(samples), -1)
    table = _table(every, effect, here, fit, test, settings)
    by = "effect_fit" if settings.profile_by == "steering" else "attention_fit"
    best = table.sort_values(by, ascending=False, kind="stable").head(settings.profile_top)
    heads = tuple(sorted(zip(best["layer"].tolist(), best["head"].tolist(), strict=True)))
    table["picked"] = [pair in set(heads) for pair in every]
    ranks = table[by].corr(table[by.replace("fit", "test")], method="spearman")
    return Profile(table, _offsets(every, attention), heads, fit, test, float(ranks))


@dataclass(frozen=True)
class AttentionContrast(Metric):
    """By offset: attention of the last token to the answer's span less the others' mean.

    [run, batch, layer, head]; `options` are the tokens of every option, by sample index, as
    `answers` are. A span is moved to the right by the offset.
    """

    options: Mapping[int, Sequence[Sequence[int]]]
    answers: Mapping[int, int]
    offsets: Sequence[int]

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {str(offset): (n_layers, n_heads) for offset in self.offsets}

    def hooks(self, rows: Rows) -> list[Hook]:
        def reader(layer: int) -> Callable[[Tensor, Any], None]:
            def read(pattern: Float[Tensor, "batch head q k"], hook: Any) -> None:
                at = torch.arange(len(rows), device=pattern.device)
                rows.found[f"pattern {layer}"] = pattern[at, :, rows.last].double()

            return read

        layers = range(rows.model.info.n_layers)
        return [(hook_names.pattern(layer), reader(layer)) for layer in layers]

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        return {
            str(offset): torch.stack([self._contrast(rows, offset) for rows in runs])
            for offset in self.offsets
        }

    def _contrast(self, rows: Rows, offset: int) -> Float[Tensor, "batch layer head"]:
        layers = range(rows.model.info.n_layers)
        weights = torch.stack([rows.found[f"pattern {layer}"] for layer in layers], 1)
        found = []
        for i, (sample, start) in enumerate(zip(rows.samples, rows.mask.argmax(1), strict=True)):
            spans = [shifted(span, offset, len(sample)) for span in self.options[sample.index]]
            places = [torch.tensor(span, dtype=torch.long, device=start.device) for span in spans]
            each = torch.stack([weights[i][:, :, start + at].sum(-1) for at in places])
            others = torch.arange(len(each)) != self.answers[sample.index]
            found.append(each[~others][0] - each[others].mean(0))
        return torch.stack(found)


def _table(
    every: Heads,
    effect: Float[np.ndarray, "sample head"],
    attention: Float[np.ndarray, "sample head"],
    fit: np.ndarray,
    test: np.ndarray,
    settings: SteerSettings,
) -> pd.DataFrame:
    table = pd.DataFrame(every, columns=["layer", "head"])
    for name, values in (("effect", effect), ("attention", attention)):
        table[f"{name}_fit"] = values[fit].mean(0)
        table[f"{name}_test"] = values[test].mean(0)
        bounds = [
            bootstrap_interval(values[test, i], settings.bootstrap, settings.seed)
            for i in range(len(every))
        ]
        table[f"{name}_test_low"], table[f"{name}_test_high"] = zip(*bounds, strict=True)
    return table


def _offsets(
    every: Heads, contrast: dict[int, Float[np.ndarray, "sample layer head"]]
) -> pd.DataFrame:
    parts = []
    for offset, values in sorted(contrast.items()):
        flat = values.reshape(len(values), -1)
        part = pd.DataFrame(every, columns=["layer", "head"])
        part["offset"], part["n_samples"] = offset, len(flat)
        part["contrast"] = flat.mean(0)
        part["stderr"] = flat.std(0, ddof=1) / np.sqrt(len(flat)) if len(flat) > 1 else np.nan
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
