"""Which heads help when steered alone: picked on one half of the questions, tested on the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.steer import bootstrap_interval, metric_of, run_steered
from tl_headnorm.commands.steer.targets import Targets, shifted
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.plan import Group, plan_batches
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import auto_batch_tokens
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import Heads, all_heads
from tl_headnorm.interventions.patterns import read_patterns
from tl_headnorm.interventions.steering import Steering
from tl_headnorm.measures import last_real_position
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
    """
    info = model.info
    every = all_heads(range(info.n_layers), info.n_heads)
    boost = max(settings.boosts) if settings.profile_boost is None else settings.profile_boost
    steerings = [Steering(f"{layer}.{head}", ((layer, head),), boost) for layer, head in every]
    metric = metric_of(targets, answers)
    values = run_steered(model, targets, steerings, metric, settings, progress=progress)
    logp = values["target_logp"]
    effect = (logp[1:] - logp[0]).T
    right = [answers[s.index] for s in targets.samples]
    contrast = attention_contrast(
        model, targets.samples, options, right,
        (0, *range(1, settings.profile_offsets + 1), settings.span_offset), settings,
    )  # fmt: skip
    fit, test = halves(len(targets.samples), settings.seed)
    here = contrast[settings.span_offset].reshape(len(right), -1)
    table = _table(every, effect, here, fit, test, settings)
    by = "effect_fit" if settings.profile_by == "steering" else "attention_fit"
    best = table.sort_values(by, ascending=False, kind="stable").head(settings.profile_top)
    heads = tuple(sorted(zip(best["layer"].tolist(), best["head"].tolist(), strict=True)))
    table["picked"] = [pair in set(heads) for pair in every]
    ranks = table[by].corr(table[by.replace("fit", "test")], method="spearman")
    return Profile(table, _offsets(every, contrast), heads, fit, test, float(ranks))


def attention_contrast(
    model: Model,
    samples: Sequence[Encoded],
    options: OptionSpans,
    answers: Sequence[int],
    offsets: Sequence[int],
    settings: SteerSettings,
) -> dict[int, Float[np.ndarray, "sample layer head"]]:
    """By offset: attention of the last token to the answer's span less the others' mean."""
    info = model.info
    shape = (len(samples), info.n_layers, info.n_heads)
    found = {offset: np.full(shape, np.nan) for offset in dict.fromkeys(offsets)}
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    most = settings.max_batch_tokens
    bound = auto_batch_tokens(model) if most == "auto" else int(most)
    for chosen in plan_batches(Group(tuple(samples), 0), settings.batch_size, bound):
        batch = make_batch(chosen, "right")
        last = last_real_position(batch.mask)
        weights = np.zeros((len(chosen), *shape[1:], batch.ids.shape[1]))

        def take(layer: int, pattern, last=last, weights=weights) -> None:  # type: ignore[no-untyped-def]
            rows = range(len(last))
            weights[:, layer] = pattern[rows, :, last].cpu().double().numpy()

        read_patterns(
            model.engine, batch.ids.to(model.device), batch.mask.to(model.device),
            range(info.n_layers), take,
        )  # fmt: skip
        for i, sample in enumerate(chosen):
            row = row_of[sample.index]
            for offset, table in found.items():
                spans = [shifted(span, offset, len(sample)) for span in options[row]]
                each = np.stack([weights[i][:, :, list(span)].sum(-1) for span in spans])
                right = answers[row]
                table[row] = each[right] - np.delete(each, right, axis=0).mean(0)
    return found


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
