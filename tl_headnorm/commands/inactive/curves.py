"""Heads switched off by every score, at every share: what is left on the held-out samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from tl_headnorm.commands.inactive.scores import Score
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.plan import Group, plan_batches
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import auto_batch_tokens
from tl_headnorm.interventions.gated_pass import Rule, run_rule
from tl_headnorm.interventions.heads import all_heads
from tl_headnorm.interventions.metrics import Letters
from tl_headnorm.interventions.replacements import Reference
from tl_headnorm.interventions.runner import Options, Variant, run_variants
from tl_headnorm.measures import last_real_position
from tl_headnorm.measures.measurer import factors_of
from tl_headnorm.model.loading import Model

RANDOM = "random"
# Changed runs in one call: their clean pass is shared, their masks are held.
AT_ONCE = 64


@dataclass(frozen=True)
class Curve:
    """What a score, a mode and a replacement leave at every share, sample by sample.

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
    """The model, the held-out prompts (numbered from 0) with their answers, and how to run."""

    model: Model
    samples: list[Encoded]
    answers: list[int]
    shares: tuple[float, ...]
    options: Options
    reference: Reference | None = None
    clean: dict[str, Float[np.ndarray, " sample"]] = field(default_factory=dict)
    progress: bool = False

    @property
    def size(self) -> int:
        return self.model.info.n_layers * self.model.info.n_heads


def numbered(samples: Sequence[Encoded]) -> list[Encoded]:
    """The samples with their row as their index, as masks and answers are looked up."""
    return [replace(sample, index=row) for row, sample in enumerate(samples)]


def leave_one_out(
    model: Model, samples: Sequence[Encoded], answers: Sequence[int], options: Options
) -> Float[np.ndarray, "layer head"]:
    """Mean loss added on the samples by setting each head by itself to zero."""
    info = model.info
    heads = all_heads(range(info.n_layers), info.n_heads)
    variants = [Variant(f"{layer}.{head}", heads=((layer, head),)) for layer, head in heads]
    found = run_variants(
        model, numbered(samples), variants, Letters(answers), options=options, progress=False
    )
    loss = found.values["loss"].mean(1)
    return (loss[1:] - loss[0]).reshape(info.n_layers, info.n_heads)


def static_variants(bench: Bench, score: Score, method: str) -> list[Variant]:
    return [
        Variant(f"{score.name} {share:g}", method, heads=score.lowest(share))
        for share in bench.shares
    ]


def input_variants(bench: Bench, score: Score, method: str) -> list[Variant]:
    """Per input, the heads whose score of a clean pass is under the calibration's quantiles."""
    return [
        Variant(f"{score.name} {share:g}", method, masks=score.held_out < threshold)
        for share, threshold in zip(bench.shares, score.thresholds(bench.shares), strict=True)
    ]


def random_variants(bench: Bench, mode: str, method: str, seed: int) -> list[Variant]:
    """Heads by chance, more at every share: the same for all samples, or drawn for each."""
    info, rng = bench.model.info, np.random.default_rng(seed)
    shape = (info.n_layers, info.n_heads)
    if mode == "static":
        values = rng.random(shape)[None]
        return static_variants(bench, Score(RANDOM, values, values), method)
    ranks = rng.random((len(bench.samples), bench.size)).argsort(1).argsort(1)
    ranks = ranks.reshape(len(bench.samples), *shape)
    return [
        Variant(f"{RANDOM} {share:g}", method, masks=ranks < round(share * bench.size))
        for share in bench.shares
    ]


def run_curves(
    bench: Bench, plans: Sequence[tuple[str, str, str, int, list[Variant]]]
) -> list[Curve]:
    """The curves of variants made beforehand: (score, mode, method, number, a variant a share).

    The same set of heads is run once, whatever score it came from.
    """
    wanted = [v for *_, variants in plans for v in variants]
    keys = [_key(v) for v in wanted]
    first = dict(zip(keys, wanted, strict=True))
    values: dict[Any, dict[str, np.ndarray]] = {}
    todo = list(first.items())
    bar = tqdm(total=len(todo), unit="set", disable=not bench.progress, desc="switch off")
    for start in range(0, len(todo), AT_ONCE):
        part = todo[start : start + AT_ONCE]
        found = run_variants(
            bench.model, bench.samples, [v for _, v in part], Letters(bench.answers),
            reference=bench.reference, options=bench.options,
        ).values  # fmt: skip
        bench.clean = {name: rows[0] for name, rows in found.items()}
        for row, (key, _) in enumerate(part, 1):
            values[key] = {name: found[name][row] for name in ("correct", "loss")}
        bar.update(len(part))
    bar.close()
    curves = []
    for score, mode, method, number, variants in plans:
        rows = [values[_key(v)] for v in variants]
        off = np.stack([_share_off(v, bench) for v in variants])
        correct, loss = (np.stack([r[n] for r in rows]) for n in ("correct", "loss"))
        curves.append(Curve(score, mode, method, off, correct, loss, number))
    return curves


def _key(variant: Variant) -> Any:
    masks = None if variant.masks is None else np.packbits(variant.masks).tobytes()
    return variant.method, variant.heads, masks


def _share_off(variant: Variant, bench: Bench) -> Float[np.ndarray, " sample"]:
    if variant.masks is None:
        return np.full(len(bench.samples), len(variant.heads) / bench.size)
    return variant.masks.mean((1, 2))


@torch.inference_mode()
def fly_curve(bench: Bench, score: Score, method: str, factors: Mapping[int, Any]) -> Curve:
    """Heads scored and switched off in one pass, by the calibration's quantiles."""
    assert score.measure is not None
    rule = Rule(
        score.measure, tuple(score.thresholds(bench.shares)), score.sign, score.normalised, method
    )
    n_shares, n = len(bench.shares), len(bench.samples)
    off, correct, loss = (np.empty((n_shares, n)) for _ in range(3))
    readout, model = Letters(bench.answers), bench.model
    bound = bench.options.max_batch_tokens
    most = min(auto_batch_tokens(model), 4096) if bound == "auto" else int(bound)
    most = max(1, most // n_shares)
    for chosen in plan_batches(Group(tuple(bench.samples), 0), bench.options.batch_size, most):
        batch = make_batch(chosen, bench.options.padding_side)
        resid, heads = run_rule(model, factors, batch, rule, bench.reference)
        mask = batch.mask.to(model.device)
        assert last_real_position(mask).shape[0] == len(chosen)
        found = readout(model, batch, mask, resid, resid[0])
        rows = [sample.index for sample in chosen]
        off[:, rows] = heads.double().mean((2, 3)).cpu().numpy()
        correct[:, rows] = found["correct"].double().cpu().numpy()
        loss[:, rows] = found["loss"].double().cpu().numpy()
    return Curve(score.name, "on_the_fly", method, off, correct, loss)


def all_curves(
    bench: Bench,
    scores: Sequence[Score],
    *,
    modes: Sequence[str],
    methods: Sequence[str],
    random_orders: int,
    seed: int = 0,
) -> list[Curve]:
    """Every score in every mode with every replacement, and random choices as the floor."""
    makers: dict[str, Callable[[Bench, Score, str], list[Variant]]] = {
        "static": static_variants,
        "per_input": input_variants,
    }
    plans = []
    for method in methods:
        for mode in (m for m in modes if m in makers):
            plans += [
                (score.name, mode, method, 0, makers[mode](bench, score, method))
                for score in scores
                if mode == "static" or not score.looks
            ]
        # On the fly or by a clean pass, chance chooses alike.
        kinds = dict.fromkeys("static" if m == "static" else "per_input" for m in modes)
        plans += [
            (RANDOM, kind, method, i, random_variants(bench, kind, method, seed + i))
            for kind in kinds
            for i in range(random_orders)
        ]
    curves = run_curves(bench, plans)
    if "on_the_fly" in modes:
        factors = factors_of(bench.model)
        able = [s for s in scores if s.measure is not None and not s.looks]
        jobs = [(score, method) for method in methods for score in able]
        for score, method in tqdm(
            jobs, unit="score", disable=not bench.progress, desc="on the fly"
        ):
            curves.append(fly_curve(bench, score, method, factors))
    return curves
