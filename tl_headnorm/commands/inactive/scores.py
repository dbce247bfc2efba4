"""Scores of heads per sample, small where a head is taken for inactive; and their combinations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_headnorm.measures import Measure, layer_normalised

# The two parts of the samples differ in number, so the first axis has no name.
Values = Float[np.ndarray, "_ layer head"]
FOLDS = 5


@dataclass(frozen=True)
class Score:
    """A score of every head of every sample; heads with the smallest values go first.

    `measure` is what it is of, as seen on the fly, or None for a combination. Where `looks` is
    true it knows the sample's answer, so that it may rank heads for all samples but not choose
    them per input.
    """

    name: str
    calibration: Values
    held_out: Values
    measure: Measure | None = None
    normalised: bool = False
    sign: int = 1
    looks: bool = False

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        """Over the calibration samples for which it is defined."""
        return np.nanmean(self.calibration, axis=0)

    def thresholds(self, shares: Sequence[float]) -> list[float]:
        """Quantiles over all calibration samples and heads: heads under them are that share."""
        values = self.calibration[np.isfinite(self.calibration)]
        return [float(np.quantile(values, share)) for share in shares]

    def lowest(self, share: float) -> tuple[tuple[int, int], ...]:
        """That share of all heads, lowest mean first."""
        mean = self.mean
        count = round(share * mean.size)
        order = np.argsort(mean.ravel(), kind="stable")[:count]
        return tuple(sorted((int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order))


def make_scores(
    measures: Iterable[Measure],
    calibration: Mapping[str, Values],
    held_out: Mapping[str, Values],
    *,
    normalise: bool = True,
    above: Sequence[str] = (),
) -> list[Score]:
    """Every measure as a score: low is inactive; for those in `above` also high is.

    Names: `cosine_all`, `cosine_all/layer` (over the layer's mean head), `attention_first>` and
    `attention_first/layer>` (high is inactive).
    """
    scores = []
    for measure in measures:
        for normalised in (False, True) if normalise else (False,):
            for sign in (1, -1) if measure.name in above else (1,):
                ours, theirs = (
                    sign * (layer_normalised(v) if normalised else v)
                    for v in (calibration[measure.name], held_out[measure.name])
                )
                name = measure.name + "/layer" * normalised + ">" * (sign < 0)
                looks = "answer" in measure.reads
                scores.append(Score(name, ours, theirs, measure, normalised, sign, looks))
    return scores


def ranked(
    values: Float[np.ndarray, "*any"], among: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "*any"]:
    """Share of the values in `among` that are smaller, ties counting half: from 0 to 1."""
    ordered = np.sort(among[np.isfinite(among)])
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.where(np.isfinite(values), below / (2 * len(ordered)), 0.5)


def mean_rank(scores: Sequence[Score]) -> Score:
    """The mean of the scores' ranks among the calibration values, all scores alike."""
    ours = np.mean([ranked(s.calibration, s.calibration) for s in scores], axis=0)
    return Score("mean_rank", ours, np.mean([ranked(s.held_out, s.calibration) for s in scores], 0))


def fit_logistic(
    features: Float[np.ndarray, "head feature"],
    active: Bool[np.ndarray, " head"],
    ridge: float = 1.0,
    steps: int = 50,
) -> Float[np.ndarray, " weight"]:
    """Weights (the last one the intercept) of a logistic model with an L2 penalty, by Newton.

    The intercept is not penalised. Minimises sum log(1 + exp(-y w x)) + ridge/2 |w|^2.
    """
    X = np.column_stack([features, np.ones(len(features))])
    penalty = np.diag([ridge] * features.shape[1] + [1e-6])
    w = np.zeros(X.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(X @ w, -30, 30)))
        gradient = X.T @ (p - active) + penalty @ w
        hessian = X.T @ (X * (p * (1 - p))[:, None]) + penalty
        step = np.linalg.solve(hessian, gradient)
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    return w


def folds(n: int, seed: int) -> Int[np.ndarray, " n"]:
    """A fold for each head, as even as can be."""
    return np.random.default_rng(seed).permutation(np.arange(n) % min(FOLDS, n))


def logistic(
    scores: Sequence[Score], effect: Float[np.ndarray, "layer head"], seed: int = 0
) -> Score:
    """Probability that a head's removal costs more than the median head's.

    A logistic model of the scores' ranks, trained on leave-one-out effects of the calibration
    samples. A head's own effect never enters its score: heads are scored by the model trained on
    the other folds of heads.
    """
    active = (effect > np.median(effect)).ravel()
    ranks = {
        part: np.stack([ranked(getattr(s, part), s.calibration) for s in scores], axis=-1)
        for part in ("calibration", "held_out")
    }
    features = ranks["calibration"].mean(0).reshape(effect.size, -1) - 0.5
    fold = folds(effect.size, seed)
    weights = np.empty((effect.size, features.shape[1] + 1))
    for one in np.unique(fold):
        train = fold != one
        weights[~train] = fit_logistic(features[train], active[train])
    weights = weights.reshape(*effect.shape, -1)
    ours, theirs = (
        ((ranks[p] - 0.5) * weights[..., :-1]).sum(-1) + weights[..., -1]
        for p in ("calibration", "held_out")
    )
    return Score("logistic", ours, theirs)


def fixed_order(name: str, importance: Float[np.ndarray, "layer head"]) -> Score:
    """A score that is the same on every sample: leave-one-out, or an attribution's mean."""
    return Score(name, importance[None], importance[None], looks=True)


def rank_correlations(scores: Sequence[Score]) -> pd.DataFrame:
    """Spearman correlation between the mean scores of the heads, as a square table."""
    columns = {score.name: score.mean.ravel() for score in scores}
    return pd.DataFrame(columns).rank().corr()
