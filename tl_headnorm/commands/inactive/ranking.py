"""Ranking of the scores: areas, heads that go at no cost, bootstrap intervals, a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_headnorm.commands.inactive.curves import RANDOM, Curve

Key = tuple[str, str, str]  # score, mode, method
# A curve is ranked where the heads off at its last point are between these parts of the largest
# share wanted: short of it, or far beyond, its area would be made of guesses.
REACHED = (0.9, 1.25)


@dataclass(frozen=True)
class Judged:
    """A choice's curves: of a score one, of random choices one per seed, the clean run in front.

    Arrays are [curve, 1 + share, sample]; `off` is the mean share of heads really off.
    """

    key: Key
    off: Float[np.ndarray, "curve point"]
    correct: Float[np.ndarray, "curve point sample"]
    loss: Float[np.ndarray, "curve point sample"]


def gather(curves: Sequence[Curve], clean: Mapping[str, np.ndarray]) -> dict[Key, Judged]:
    """The curves by choice; random choices of all seeds are one."""
    groups: dict[Key, list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.score, curve.mode, curve.method), []).append(curve)
    found = {}
    for key, members in groups.items():
        off = np.stack([np.r_[0, c.off.mean(1)] for c in members])
        correct, loss = (
            np.stack([np.vstack([clean[name], getattr(c, name)]) for c in members])
            for name in ("correct", "loss")
        )
        found[key] = Judged(key, off, correct, loss)
    return found


def area_weights(off: Float[np.ndarray, " point"], top: float) -> Float[np.ndarray, " point"]:
    """w with w @ values = mean of the curve through (off, values) from 0 to `top`.

    The curve is straight between its points; it ends at `top`, and beyond its last point it
    stays level.
    """
    x = np.maximum.accumulate(off)
    weights = np.zeros(len(x))
    for i, (left, right) in enumerate(pairwise(x)):
        end = min(right, top)
        if end <= left:
            continue
        middle = ((left + end) / 2 - left) / (right - left)
        weights[i] += (end - left) * (1 - middle)
        weights[i + 1] += (end - left) * middle
    weights[-1] += max(0.0, top - x[-1])
    return weights / top


def largest_share(
    off: Float[np.ndarray, " point"], accuracy: Float[np.ndarray, "*draw point"], within: float
) -> Float[np.ndarray, "*draw"]:
    """The largest share up to which accuracy is never more than `within` below the clean one."""
    held = accuracy >= accuracy[..., :1] - within - 1e-9
    last = np.minimum.accumulate(held, axis=-1).sum(-1) - 1
    return np.asarray(off[last])


def draws_of(n: int, repeats: int, seed: int) -> Float[np.ndarray, "draw sample"]:
    """Weight of each sample in each bootstrap draw (sums to 1).

    The same for every choice, so that differences between choices are paired.
    """
    drawn = np.random.default_rng(seed).integers(0, n, (repeats, n))
    return np.stack([np.bincount(draw, minlength=n) for draw in drawn]) / n


@dataclass(frozen=True)
class Boot:
    """Bootstrap replicates of one candidate."""

    accuracy_area: Float[np.ndarray, " draw"]
    loss_area: Float[np.ndarray, " draw"]
    share: Float[np.ndarray, " draw"]


def booted(
    one: Judged, draws: Float[np.ndarray, "draw sample"], top: float, within: float, seed: int
) -> Boot:
    """Of random choices their mean; a draw then also draws from their seeds, so that the interval
    holds the chance of which ones were tried."""
    n = len(one.off)
    seeds = draws_of(n, len(draws), seed + 1) if n > 1 else np.ones((len(draws), 1))
    parts: dict[str, list[np.ndarray]] = {"accuracy": [], "loss": [], "share": []}
    for off, correct, loss in zip(one.off, one.correct, one.loss, strict=True):
        weights = area_weights(off, top)
        accuracy = draws @ correct.T
        parts["accuracy"].append(accuracy @ weights)
        parts["loss"].append(draws @ (loss.T @ weights))
        parts["share"].append(largest_share(off, accuracy, within))
    return Boot(*((np.stack(parts[k], 1) * seeds).sum(1) for k in ("accuracy", "loss", "share")))


def _interval(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def ranking(
    judged: Mapping[Key, Judged],
    *,
    top: float,
    points: float,
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[Key, Boot]]:
    """ranking.parquet, best accuracy area first, and what every draw made of each choice.

    `accuracy_area` is the mean accuracy from no head off to the share `top`, `largest_share` the
    share off before accuracy falls by more than `points` points; 95 % intervals over samples.
    """
    n = next(iter(judged.values())).correct.shape[2]
    draws = draws_of(n, repeats, seed)
    rows, boots = [], {}
    for key, one in judged.items():
        boot = boots[key] = booted(one, draws, top, points / 100, seed)
        areas, losses, shares = [], [], []
        for off, correct, loss in zip(one.off, one.correct, one.loss, strict=True):
            weights = area_weights(off, top)
            areas.append(weights @ correct.mean(1))
            losses.append(weights @ loss.mean(1))
            shares.append(largest_share(off, correct.mean(1), points / 100))
        rows.append(
            {
                "score": key[0],
                "mode": key[1],
                "method": key[2],
                **_interval("accuracy_area", float(np.mean(areas)), boot.accuracy_area),
                **_interval("loss_area", float(np.mean(losses)), boot.loss_area),
                **_interval("largest_share", float(np.mean(shares)), boot.share),
                "reached": float(one.off[:, -1].mean()),
                "ranked": bool(REACHED[0] <= one.off[:, -1].mean() / top <= REACHED[1]),
            }
        )
    table = pd.DataFrame(rows)
    order = table.sort_values(
        ["ranked", "accuracy_area", "loss_area"], ascending=[False, False, True], kind="stable"
    )
    return order.reset_index(drop=True), boots


def curves_table(
    curves: Sequence[Curve], clean: Mapping[str, np.ndarray], shares: Sequence[float]
) -> pd.DataFrame:
    """inactive.parquet: a row per score, mode, method and share; random choices have a number."""
    rows: list[dict[str, Any]] = [
        {
            "score": "clean", "mode": "none", "method": "none", "number": 0, "share": 0.0,
            "share_off": 0.0, "accuracy": float(clean["correct"].mean()),
            "loss": float(clean["loss"].mean()),
        }
    ]  # fmt: skip
    for c in curves:
        for i, share in enumerate(shares):
            rows.append(
                {
                    "score": c.score, "mode": c.mode, "method": c.method, "number": c.number,
                    "share": share, "share_off": float(c.off[i].mean()),
                    "accuracy": float(c.correct[i].mean()), "loss": float(c.loss[i].mean()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def floor_of(key: Key) -> Key:
    """The random choice a choice is held against: drawn per input where it chooses per input."""
    return RANDOM, "static" if key[1] == "static" else "per_input", key[2]


def _keys(table: pd.DataFrame) -> list[Key]:
    return [(str(a), str(b), str(c)) for a, b, c in table[["score", "mode", "method"]].to_numpy()]


def better_than_random(table: pd.DataFrame) -> pd.DataFrame:
    """The ranked choices whose interval of the accuracy area lies above their floor's."""
    floors = table[table["score"] == RANDOM].set_index(["mode", "method"])["accuracy_area_high"]
    rest = table[(table["score"] != RANDOM) & table["ranked"]]
    keys = [floor_of(key)[1:] for key in _keys(rest)]
    high = np.array([floors.get(key, np.inf) for key in keys])
    return rest[rest["accuracy_area_low"].to_numpy() > high]


@dataclass(frozen=True)
class Verdict:
    """Who wins and how sure that is.

    `beats`: in which share of the draws of samples the winner's area is above another's; `stays`:
    how the one that wins on every other sample places on the rest, 1 the first of `among`.
    """

    winner: Key
    beats_runner_up: float
    runner_up: Key
    beats_random: float
    over_random: tuple[float, float, float]
    stays: int
    among: int


def verdict(
    judged: Mapping[Key, Judged], table: pd.DataFrame, boots: Mapping[Key, Boot], *, top: float
) -> Verdict:
    """The first of the ranking, against the best of the other scores and against chance."""
    rows = table[table["ranked"] & (table["score"] != RANDOM)]
    keys = _keys(rows)
    winner = keys[0]
    others = [key for key in keys[1:] if key[0] != winner[0]]
    runner_up = others[0] if others else winner
    gain = boots[winner].accuracy_area - boots[floor_of(winner)].accuracy_area
    low, high = np.percentile(gain, [2.5, 97.5])
    halves = [
        {
            key: float(
                area_weights(judged[key].off[0], top) @ judged[key].correct[0][:, part].mean(1)
            )
            for key in keys
        }
        for part in (slice(0, None, 2), slice(1, None, 2))
    ]
    picked = max(keys, key=lambda key: halves[0][key])
    stays = 1 + sum(halves[1][key] > halves[1][picked] for key in keys)
    return Verdict(
        winner=winner,
        beats_runner_up=_share_above(boots[winner], boots[runner_up]),
        runner_up=runner_up,
        beats_random=float((gain > 0).mean()),
        over_random=(float(gain.mean()), float(low), float(high)),
        stays=stays,
        among=len(keys),
    )


def _share_above(a: Boot, b: Boot) -> float:
    """In which part of the draws a's area is larger, ties counting half."""
    gain = a.accuracy_area - b.accuracy_area
    return float((gain > 0).mean() + (gain == 0).mean() / 2)
