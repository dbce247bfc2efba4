"""Heads switched off by every score, at every share: what is left on the held-out samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tl_headnorm.commands.inactive.scores import Score
from tl_headnorm.commands.inactive.settings import InactiveSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.edits import Ablation
from tl_headnorm.interventions.gated_pass import Rule
from tl_headnorm.interventions.heads import all_heads
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.metrics import ByName, Letters, Resid
from tl_headnorm.interventions.replacements import Reference
from tl_headnorm.interventions.runner import run
from tl_headnorm.measures.measurer import factors_of
from tl_headnorm.model.loading import Model
from tl_headnorm.settings import Settings

RANDOM = "random"
# (score, mode, method, number of a random choice, an intervention per share)
Plan = tuple[str, str, str, int, Sequence[Intervention]]


@dataclass(frozen=True)
class Curve:
    """Per-sample results of a score, mode and replacement at every share of heads.

    `off` is the share of heads that really were off, per sample. Of random choices `number`
    tells one from the next.
    """

    score: str
    mode: str
    method: str
    off: Float[np.ndarray, "share sample"]
    correct: Float[np.ndarray, "share sample"]
    loss: Float[np.ndarray, "share sample"]
    number: int = 0


@dataclass
class Bench:
    """The model, the held-out prompts (numbered from 0) with their answers, and the settings."""

    model: Model
    samples: list[Encoded]
    answers: list[int]
    settings: InactiveSettings
    reference: Reference | None = None
    clean: dict[str, Float[np.ndarray, " sample"]] = field(default_factory=dict)
    progress: bool = False

    @property
    def shares(self) -> tuple[float, ...]:
        return self.settings.shares

    @property
    def size(self) -> int:
        return self.model.info.n_layers * self.model.info.n_heads


@dataclass(frozen=True)
class LettersAndOff(Letters):
    """The answer distribution, and the share `off` of heads that a rule switched off."""

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(n_layers, n_heads), "off": ()}

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        values = super().__call__(runs, resid, clean)
        none = torch.zeros(len(runs[0]), 1, 1, device=clean.device)
        off = [rows.found.get("off", none).double().mean((1, 2)) for rows in runs]
        return values | {"off": torch.stack(off)}


def numbered(samples: Sequence[Encoded]) -> list[Encoded]:
    """The samples with their row as their index, as masks and answers are looked up."""
    return [replace(sample, index=row) for row, sample in enumerate(samples)]


def leave_one_out(
    model: Model, samples: Sequence[Encoded], answers: Sequence[int], settings: Settings
) -> Float[np.ndarray, "layer head"]:
    """Mean loss added on the samples by setting each head by itself to zero."""
    info = model.info
    heads = all_heads(range(info.n_layers), info.n_heads)
    ablations = [Ablation(f"{layer}.{head}", heads=((layer, head),)) for layer, head in heads]
    values = run(model, numbered(samples), ablations, Letters(answers), settings=settings)
    loss = values["loss"].mean(1)
    return (loss[1:] - loss[0]).reshape(info.n_layers, info.n_heads)


def static_ablations(bench: Bench, score: Score, method: str) -> list[Ablation]:
    return [
        Ablation(f"{score.name} {share:g}", method, heads=score.lowest(share))
        for share in bench.shares
    ]


def input_ablations(bench: Bench, score: Score, method: str) -> list[Ablation]:
    """Per input, the heads whose score of a clean pass is under the calibration's quantiles."""
    return [
        Ablation(f"{score.name} {share:g}", method, masks=score.held_out < threshold)
        for share, threshold in zip(bench.shares, score.thresholds(bench.shares), strict=True)
    ]


def random_ablations(bench: Bench, mode: str, method: str, seed: int) -> list[Ablation]:
    """Heads by chance, more at every share: the same for all samples, or drawn for each."""
    info, rng = bench.model.info, np.random.default_rng(seed)
    shape = (info.n_layers, info.n_heads)
    if mode == "static":
        values = rng.random(shape)[None]
        return static_ablations(bench, Score(RANDOM, values, values), method)
    ranks = rng.random((len(bench.samples), bench.size)).argsort(1).argsort(1)
    ranks = ranks.reshape(len(bench.samples), *shape)
    return [
        Ablation(f"{RANDOM} {share:g}", method, masks=ranks < round(share * bench.size))
        for share in bench.shares
    ]


def rules(bench: Bench, score: Score, method: str, factors: Mapping[int, Any]) -> list[Rule]:
    """Heads scored and switched off in one pass, by the calibration's quantiles."""
    assert score.measure is not None
    return [
        Rule(f"{score.name} {share:g} on the fly", score.measure, factors, threshold,
             score.sign, score.normalised, method)
        for share, threshold in zip(bench.shares, score.thresholds(bench.shares), strict=True)
    ]  # fmt: skip


def run_curves(bench: Bench, plans: Sequence[Plan]) -> list[Curve]:
    """The curves of interventions made beforehand.

    The same set of heads is run once, whatever score it came from.
    """
    changes = {_key(one): one for *_, each in plans for one in each}
    values = run(
        bench.model, bench.samples, list(changes.values()), LettersAndOff(bench.answers),
        settings=bench.settings, reference=bench.reference,
        progress="switch off" if bench.progress else None,
    )  # fmt: skip
    bench.clean = {name: rows[0] for name, rows in values.items()}
    row_of = {key: row for row, key in enumerate(changes, 1)}
    curves = []
    for score, mode, method, number, each in plans:
        rows = [row_of[_key(one)] for one in each]
        off = [_share_off(one, bench, values["off"][r]) for one, r in zip(each, rows, strict=True)]
        correct, loss = values["correct"][rows], values["loss"][rows]
        curves.append(Curve(score, mode, method, np.stack(off), correct, loss, number))
    return curves


def _key(one: Intervention) -> Any:
    if not isinstance(one, Ablation):
        return id(one)
    masks = None if one.masks is None else np.packbits(one.masks).tobytes()
    return one.method, one.heads, masks


def _share_off(
    one: Intervention, bench: Bench, off: Float[np.ndarray, " sample"]
) -> Float[np.ndarray, " sample"]:
    """The share of heads that an intervention switches off on every sample."""
    if not isinstance(one, Ablation):
        return off
    if one.masks is None:
        return np.full(len(bench.samples), len(one.heads) / bench.size)
    return one.masks.mean((1, 2))


def all_curves(bench: Bench, scores: Sequence[Score]) -> list[Curve]:
    """Every score in every mode with every replacement, and random choices as the floor.

    1 plan sets chosen beforehand  2 random choices  3 rules that choose inside the pass
    4 run all of them.
    """
    settings, plans = bench.settings, list[Plan]()
    modes = settings.chosen_modes
    makers: dict[str, Callable[[Bench, Score, str], list[Ablation]]] = {
        "static": static_ablations,
        "per_input": input_ablations,
    }
    for method in settings.methods:
        # 1
        for mode in (m for m in modes if m in makers):
            plans += [
                (score.name, mode, method, 0, makers[mode](bench, score, method))
                for score in scores
                if mode == "static" or not score.looks
            ]
        # 2: on the fly or by a clean pass, chance chooses alike.
        kinds = dict.fromkeys("static" if m == "static" else "per_input" for m in modes)
        plans += [
            (RANDOM, kind, method, i, random_ablations(bench, kind, method, settings.seed + i))
            for kind in kinds
            for i in range(settings.random_orders)
        ]
    # 3
    if "on_the_fly" in modes:
        factors = factors_of(bench.model)
        able = [s for s in scores if s.measure is not None and not s.looks]
        plans += [
            (score.name, "on_the_fly", method, 0, rules(bench, score, method, factors))
            for method in settings.methods
            for score in able
        ]
    # 4
    return run_curves(bench, plans)
