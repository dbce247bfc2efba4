"""Answers, loss and perplexity without a head, a set of heads, or MLPs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import xarray as xr

from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.protocol import Start
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.edits import Ablation
from tl_headnorm.interventions.heads import (
    Heads,
    all_heads,
    label,
    parse_heads,
    parse_layers,
)
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import Letters, Metric, NextTokens, Profile
from tl_headnorm.interventions.rankings import is_ranked, ranked_heads
from tl_headnorm.interventions.replacements import Reference, gather_reference
from tl_headnorm.interventions.runner import Values, run
from tl_headnorm.model.loading import Model
from tl_headnorm.settings import Settings


@dataclass(frozen=True)
class Data:
    """Samples to run, samples to take replacements from, and answers (None: next tokens)."""

    samples: Sequence[Encoded]
    reference: Sequence[Encoded]
    answers: Sequence[int] | None = None

    @property
    def metric(self) -> Metric:
        return NextTokens() if self.answers is None else Letters(self.answers)


def split_reference(encoded: Sequence[Encoded], n_reference: int, most: int = -1) -> Data:
    """The last `n_reference` samples (half of them at most) are kept apart as the reference.

    The first `most` of the others are run (-1: all). With n_reference 0 nothing is kept apart:
    the replacements then come from the very samples they are judged on, and the record says so.
    """
    kept = min(n_reference, len(encoded) // 2)
    samples = encoded[: len(encoded) - kept]
    samples = samples if most < 0 else samples[:most]
    return Data(samples, encoded[len(encoded) - kept :] if kept else samples)


def sets_of(model: Model, settings: AblateSettings) -> list[Ablation]:
    """The sets of heads and MLPs the settings ask for, with the first method."""
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    layers = parse_layers(settings.layers, n_layers)
    if settings.experiment == "components":
        return _components(layers, n_layers, n_heads)
    found = [
        Ablation(name, heads=heads)
        for name, heads in _head_sets(settings, layers, n_layers, n_heads)
    ]
    if settings.mlps == "sweep":
        found += [Ablation(f"mlp {layer}", mlps=(layer,)) for layer in layers]
    elif settings.mlps != "none":
        off = layers if settings.mlps == "all" else parse_layers(settings.mlps, n_layers, "mlps")
        name = "all mlps" if len(off) == n_layers else f"mlps {','.join(map(str, off))}"
        found.append(Ablation(name, mlps=off))
    if not found and settings.input_threshold is None:
        raise InputError("heads: expected heads or MLPs to remove, found none of either")
    return found


def _head_sets(
    settings: AblateSettings, layers: Sequence[int], n_layers: int, n_heads: int
) -> list[tuple[str, Heads]]:
    text, every = settings.chosen_heads, all_heads(layers, n_heads)
    if text == "none":
        return []
    if text == "sweep":
        return [(f"head {layer}.{head}", ((layer, head),)) for layer, head in every]
    if text == "all":
        whole = len(layers) == n_layers
        return [("all heads" if whole else f"all heads of layers {settings.layers}", every)]
    if is_ranked(text):
        files, statistic = ("heads.parquet",), settings.statistic
        return [ranked_heads(text, settings.run, statistic, n_layers, n_heads, files)]
    heads = parse_heads(text, n_layers, n_heads)
    return [(label(heads), heads)]


def _components(layers: Sequence[int], n_layers: int, n_heads: int) -> list[Ablation]:
    """All heads, all MLPs, and each layer's of either."""
    whole = "all" if len(layers) == n_layers else "chosen"
    return [
        Ablation(f"{whole} heads", heads=all_heads(layers, n_heads)),
        Ablation(f"{whole} mlps", mlps=tuple(layers)),
        *(Ablation(f"heads of layer {la}", heads=all_heads([la], n_heads)) for la in layers),
        *(Ablation(f"mlp {layer}", mlps=(layer,)) for layer in layers),
    ]


def with_methods(sets: Sequence[Ablation], methods: Sequence[str]) -> list[Ablation]:
    """Every set of heads by every method; MLPs are switched off, which is one method."""
    return [
        replace(one, method=method)
        for method in methods
        for one in sets
        if method == methods[0] or not one.mlps or one.heads
    ]


def threshold_sets(
    values: np.ndarray, threshold: float, measure: str, relative: bool
) -> list[Ablation]:
    """Heads under a threshold: of each input by itself, and one set for all by the mean.

    `values` [sample, layer, head]. The two are different experiments: the first may spare a head
    on the very inputs it works on.
    """
    shares = values / values.mean(axis=2, keepdims=True) if relative else values
    unit = " of the layer's mean" if relative else ""
    static = shares.mean(axis=0) < threshold
    heads = tuple((int(layer), int(head)) for layer, head in np.argwhere(static))
    text = f"{measure} < {threshold:g}{unit}"
    return [
        Ablation(f"per input: {text}", masks=shares < threshold),
        Ablation(f"static: {text}", heads=heads),
    ]


def ablate(
    model: Model,
    data: Data,
    settings: AblateSettings | None = None,
    *,
    sets: Sequence[Ablation] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """The effect of every set by every method, beside the clean model (set `clean`, first).

    Dims (set, sample): `correct`, `loss`, `kl` per sample; over samples `accuracy`,
    `accuracy_drop` (clean minus changed), `loss_delta`. What the numbers cannot tell: a head
    whose removal costs nothing may still do its work, where another one takes over.

    1 sets of heads and MLPs, by every method  2 reference activations that replace z
    3 run them  4 label the values by set and sample.
    """
    settings = settings or AblateSettings()
    # 1
    sets = list(sets_of(model, settings) if sets is None else sets)
    if settings.input_threshold is not None:
        sets += _threshold_sets(model, data, settings, settings.input_threshold)
    ablations = with_methods(sets, settings.methods)
    # 2
    reference = _reference(model, data, settings)
    # 3
    metric = Profile(data.metric) if settings.profile else data.metric
    values = run(
        model, data.samples, ablations, metric, settings=settings, reference=reference,
        progress="ablate" if progress else None,
    )  # fmt: skip
    # 4
    return as_dataset(values, ablations, data)


def _threshold_sets(
    model: Model, data: Data, settings: AblateSettings, threshold: float
) -> list[Ablation]:
    measured = measure_samples(
        model, data.samples, token_agg=settings.token_agg, batch_size=settings.batch_size
    ).values[settings.threshold_measure]
    measure, relative = settings.threshold_measure, settings.threshold_relative
    return threshold_sets(measured, threshold, measure, relative)


def _reference(model: Model, data: Data, settings: AblateSettings) -> Reference | None:
    if set(settings.methods) == {"zero"}:
        return None
    return gather_reference(
        model, data.reference, batch_size=settings.batch_size,
        padding_side=settings.padding_side, seed=settings.seed,
    )  # fmt: skip


def as_dataset(values: Values, ablations: Sequence[Ablation], data: Data) -> xr.Dataset:
    """The values by set and sample; `layer` and `head` are -1 where a set has several (or none)."""
    places = [_place(one) for one in ablations]
    result = xr.Dataset(
        {name: (("set", "sample"), values[name]) for name in ("correct", "loss", "kl")},
        coords={
            "set": np.array(["clean", *(v.name for v in ablations)], dtype=object),
            "method": ("set", np.array(["none", *(v.method for v in ablations)], dtype=object)),
            "layer": ("set", np.array([-1, *(layer for layer, _ in places)])),
            "head": ("set", np.array([-1, *(head for _, head in places)])),
            "n_tokens": ("sample", np.array([len(s) for s in data.samples])),
        },
    )
    result["accuracy"] = result["correct"].mean("sample", skipna=False)
    result["accuracy_drop"] = result["accuracy"][0] - result["accuracy"]
    weights = xr.ones_like(result["n_tokens"])
    if data.answers is None:  # every predicted token counts alike
        weights = result["n_tokens"] - 1
    mean = result["loss"].weighted(weights).mean("sample")
    result["mean_loss"], result["loss_delta"] = mean, mean - mean[0]
    result["mean_kl"] = result["kl"].weighted(weights).mean("sample")
    for name in (column for column in Profile.columns if column in values):
        result[f"profile_{name}"] = (("set", "sample", "block"), values[name])
    result.attrs["loss_of"] = "next token" if data.answers is None else "answer letter"
    if data.answers is None:
        result["perplexity"] = np.exp(result["mean_loss"])
    return result


def _place(ablation: Ablation) -> tuple[int, int]:
    if ablation.masks is not None:
        return -1, -1
    layers = {layer for layer, _ in ablation.heads} | set(ablation.mlps)
    layer = layers.pop() if len(layers) == 1 else -1
    alone = len(ablation.heads) == 1 and not ablation.mlps
    return layer, ablation.heads[0][1] if alone else -1


def effects_table(result: xr.Dataset) -> pd.DataFrame:
    """ablation.parquet: a row per set and method, `clean` first."""
    n_samples = result.sizes["sample"]
    columns = {
        "set": [str(name) for name in result["set"].values],
        "method": [str(name) for name in result["method"].values],
        "layer": result["layer"].values.astype(np.int64),
        "head": result["head"].values.astype(np.int64),
        "n_samples": np.full(result.sizes["set"], n_samples),
        "accuracy": result["accuracy"].values,
        "accuracy_drop": result["accuracy_drop"].values,
        "loss": result["mean_loss"].values,
        "loss_delta": result["loss_delta"].values,
        "kl": result["mean_kl"].values,
    }
    return pd.DataFrame(columns)


@torch.inference_mode()
def sharing_ratio(
    model: Model,
    samples: Sequence[Encoded],
    answers: Sequence[int],
    settings: Settings | None = None,
) -> dict[str, float]:
    """Seconds of a zero sweep over every single head: one full forward each against shared work.

    Also the largest difference between the two in the loss, which must be rounding alone.
    """
    heads = all_heads(range(model.info.n_layers), model.info.n_heads)
    metric = Letters(answers)
    clock = time.perf_counter()
    slow = np.array([[_one_forward(model, s, metric, h) for s in samples] for h in heads])
    full_seconds = time.perf_counter() - clock
    ablations = [Ablation(f"head {la}.{h}", heads=((la, h),)) for la, h in heads]
    clock = time.perf_counter()
    values = run(model, samples, ablations, metric, settings=settings)
    shared_seconds = time.perf_counter() - clock
    return {
        "n_heads": float(len(heads)),
        "n_samples": float(len(samples)),
        "full_seconds": full_seconds,
        "shared_seconds": shared_seconds,
        "ratio": full_seconds / shared_seconds,
        "worst_loss_difference": float(np.abs(slow - values["loss"][1:]).max()),
    }


def _one_forward(model: Model, sample: Encoded, metric: Letters, head: tuple[int, int]) -> float:
    """The loss by the plain way: the whole model, one head, one sample."""
    rows = Rows.pad(model, [sample], "right")
    with model.engine.zero_heads([head]):
        resid = model.engine.run(Start(rows.ids), rows.mask)
        model.engine.logits(resid)  # a plain forward unembeds every position
    return float(metric.loss(rows, resid)[0])
