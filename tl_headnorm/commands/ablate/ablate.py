"""What is lost without a head, a set of heads, or MLPs: answers, loss, perplexity."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.commands.collect.measuring import measure_samples
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import forward
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import (
    Heads,
    all_heads,
    is_ranked,
    label,
    parse_heads,
    parse_layers,
    ranked_heads,
)
from tl_headnorm.interventions.metrics import Letters, NextTokens
from tl_headnorm.interventions.replacements import Reference, gather_reference
from tl_headnorm.interventions.runner import Options, Outcome, Variant, run_variants
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Data:
    """Samples to run, samples to take replacements from, and answers (None: next tokens)."""

    samples: Sequence[Encoded]
    reference: Sequence[Encoded]
    answers: Sequence[int] | None = None

    @property
    def readout(self) -> Any:
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


def sets_of(model: Model, settings: AblateSettings) -> list[Variant]:
    """The sets of heads and MLPs the settings ask for, with the first method."""
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    layers = parse_layers(settings.layers, n_layers)
    if settings.experiment == "components":
        return _components(layers, n_layers, n_heads)
    found = [
        Variant(name, heads=heads)
        for name, heads in _head_sets(settings, layers, n_layers, n_heads)
    ]
    if settings.mlps == "sweep":
        found += [Variant(f"mlp {layer}", mlps=(layer,)) for layer in layers]
    elif settings.mlps != "none":
        off = layers if settings.mlps == "all" else parse_layers(settings.mlps, n_layers, "mlps")
        name = "all mlps" if len(off) == n_layers else f"mlps {','.join(map(str, off))}"
        found.append(Variant(name, mlps=off))
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
        heads = ranked_heads(text, settings.run, settings.statistic)
        beyond = [f"{la}.{h}" for la, h in heads if la >= n_layers or h >= n_heads]
        if beyond:
            raise InputError(
                f"run: expected a run of a model with {n_layers} layers and {n_heads} heads, "
                f"found head {beyond[0]} in {settings.run}"
            )
        return [(f"{text} by {settings.statistic}", heads)]
    heads = parse_heads(text, n_layers, n_heads)
    return [(label(heads), heads)]


def _components(layers: Sequence[int], n_layers: int, n_heads: int) -> list[Variant]:
    """All heads, all MLPs, and each layer's of either."""
    whole = "all" if len(layers) == n_layers else "chosen"
    return [
        Variant(f"{whole} heads", heads=all_heads(layers, n_heads)),
        Variant(f"{whole} mlps", mlps=tuple(layers)),
        *(Variant(f"heads of layer {la}", heads=all_heads([la], n_heads)) for la in layers),
        *(Variant(f"mlp {layer}", mlps=(layer,)) for layer in layers),
    ]


def with_methods(sets: Sequence[Variant], methods: Sequence[str]) -> list[Variant]:
    """Every set of heads by every method; MLPs are switched off, which is one method."""
    return [
        replace(one, method=method)
        for method in methods
        for one in sets
        if method == methods[0] or not one.mlps or one.heads
    ]


def threshold_sets(
    values: np.ndarray, threshold: float, measure: str, relative: bool
) -> list[Variant]:
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
        Variant(f"per input: {text}", masks=shares < threshold),
        Variant(f"static: {text}", heads=heads),
    ]


def ablate(
    model: Model,
    data: Data,
    settings: AblateSettings | None = None,
    *,
    sets: Sequence[Variant] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """The effect of every set by every method, beside the clean model (set `clean`, first).

    Dims (set, sample): `correct`, `loss`, `kl` per sample; over samples `accuracy`,
    `accuracy_drop` (clean minus changed), `loss_delta`. What the numbers cannot tell: a head
    whose removal costs nothing may still do its work, where another one takes over.
    """
    settings = settings or AblateSettings()
    sets = list(sets_of(model, settings) if sets is None else sets)
    if settings.input_threshold is not None:
        measured = measure_samples(
            model, data.samples, token_agg=settings.token_agg, batch_size=settings.batch_size
        ).values[settings.threshold_measure]
        sets += threshold_sets(
            measured, settings.input_threshold, settings.threshold_measure,
            settings.threshold_relative,
        )  # fmt: skip
    variants = with_methods(sets, settings.methods)
    reference = _reference(model, data, settings)
    options = Options(
        batch_size=settings.batch_size, max_batch_tokens=settings.max_batch_tokens,
        padding_side=settings.padding_side, seed=settings.seed, profile=settings.profile,
    )  # fmt: skip
    outcome = run_variants(
        model, data.samples, variants, data.readout,
        reference=reference, options=options, progress=progress,
    )  # fmt: skip
    return as_dataset(outcome, variants, data)


def _reference(model: Model, data: Data, settings: AblateSettings) -> Reference | None:
    if set(settings.methods) == {"zero"}:
        return None
    return gather_reference(
        model, data.reference, batch_size=settings.batch_size,
        padding_side=settings.padding_side, seed=settings.seed,
    )  # fmt: skip


def as_dataset(outcome: Outcome, variants: Sequence[Variant], data: Data) -> xr.Dataset:
    """What came out, labelled; `layer` and `head` are -1 where a set has several (or none)."""
    places = [_place(v) for v in variants]
    result = xr.Dataset(
        {name: (("set", "sample"), value) for name, value in outcome.values.items()},
        coords={
            "set": np.array(["clean", *(v.name for v in variants)], dtype=object),
            "method": ("set", np.array(["none", *(v.method for v in variants)], dtype=object)),
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
    for name, value in outcome.profile.items():
        result[f"profile_{name}"] = (("set", "sample", "block"), value)
    result.attrs["loss_of"] = "next token" if data.answers is None else "answer letter"
    if data.answers is None:
        result["perplexity"] = np.exp(result["mean_loss"])
    return result


def _place(variant: Variant) -> tuple[int, int]:
    if variant.masks is not None:
        return -1, -1
    layers = {layer for layer, _ in variant.heads} | set(variant.mlps)
    layer = layers.pop() if len(layers) == 1 else -1
    alone = len(variant.heads) == 1 and not variant.mlps
    return layer, variant.heads[0][1] if alone else -1


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
    model: Model, samples: Sequence[Encoded], answers: Sequence[int], options: Options | None = None
) -> dict[str, float]:
    """Seconds of a zero sweep over every single head: one full forward each against shared work.

    Also the largest difference between the two in the loss, which must be rounding alone.
    """
    heads = all_heads(range(model.info.n_layers), model.info.n_heads)
    readout = Letters(answers)
    clock = time.perf_counter()
    slow = np.array([[_one_forward(model, s, readout, h) for s in samples] for h in heads])
    full_seconds = time.perf_counter() - clock
    variants = [Variant(f"head {la}.{h}", heads=((la, h),)) for la, h in heads]
    clock = time.perf_counter()
    outcome = run_variants(model, samples, variants, readout, options=options)
    shared_seconds = time.perf_counter() - clock
    return {
        "n_heads": float(len(heads)),
        "n_samples": float(len(samples)),
        "full_seconds": full_seconds,
        "shared_seconds": shared_seconds,
        "ratio": full_seconds / shared_seconds,
        "worst_loss_difference": float(np.abs(slow - outcome.values["loss"][1:]).max()),
    }


def _one_forward(model: Model, sample: Encoded, readout: Letters, head: tuple[int, int]) -> float:
    """The loss by the plain way: the whole model, one head, one sample."""
    batch = make_batch([sample], "right")
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    with forward.zero_heads(model.tl, [head]):
        whole = forward.run_resid(model.tl, ids, mask)
        forward.logits(model.tl, whole)  # a plain forward unembeds every position
    resid = whole[:, -1:]
    return float(readout(model, batch, mask, resid[None], resid)["loss"][0, 0])
