"""Massive activations: where they are, who attends to them, who makes them, what they are for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float

from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.data.batches import batches_in_order, make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.edits import SetActivations, Start
from tl_headnorm.interventions.heads import Heads, all_heads
from tl_headnorm.interventions.magnitudes import massive as is_massive
from tl_headnorm.interventions.metrics import Letters, NextTokens, Nothing
from tl_headnorm.interventions.replacements import replacement
from tl_headnorm.interventions.runner import Options, Outcome, Variant, run_variants
from tl_headnorm.measures import last_real_position
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Inputs:
    """Sequences to study; the same without (or with) BOS; prompts with answers, if any."""

    samples: Sequence[Encoded]
    other_bos: Sequence[Encoded] = ()
    prompts: Sequence[Encoded] = ()
    answers: Sequence[int] = ()
    texts: bool = True


@dataclass
class _Entry:
    """What is known of one massive dimension in one layer."""

    n_sequences: int = 0
    values: list[float] = field(default_factory=list)
    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)


@torch.inference_mode()
def massive_entries(
    model: Model, samples: Sequence[Encoded], least: float, ratio: float, batch_size: int = 8
) -> pd.DataFrame:
    """Every (layer, dim) that is massive in some sequence: how often, how large, where.

    Columns layer, dim, n_sequences, share (of all sequences), mean_value (signed), max_abs,
    position (most frequent), share_at_position, token_id (most frequent).
    """
    found: dict[tuple[int, int], _Entry] = {}
    for batch in batches_in_order(samples, batch_size, "right"):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)

        def take(layer: int, resid: torch.Tensor, mask: Any = mask, ids: Any = ids) -> None:
            hits = is_massive(resid, mask, least, ratio).nonzero().tolist()
            for _, dim in sorted({(row, dim) for row, _, dim in hits}):
                found.setdefault((layer, dim), _Entry()).n_sequences += 1
            for row, pos, dim in hits:
                entry = found[layer, dim]
                entry.values.append(float(resid[row, pos, dim]))
                entry.positions[pos] += 1  # right padding: positions count real tokens
                entry.tokens[int(ids[row, pos])] += 1

        readers = edits.read_resid(range(model.info.n_layers), True, take)
        edits.run_hooked(model.tl, Start(ids), mask, readers)
    rows = [_entry_row(*key, entry, len(samples)) for key, entry in sorted(found.items())]
    return pd.DataFrame(rows, columns=list(_entry_row(0, 0, _Entry(1, [0.0]), 1)))


def _entry_row(layer: int, dim: int, entry: _Entry, n_samples: int) -> dict[str, Any]:
    position, times = (entry.positions.most_common(1) or [(-1, 0)])[0]
    token = (entry.tokens.most_common(1) or [(-1, 0)])[0][0]
    return {
        "layer": layer,
        "dim": dim,
        "n_sequences": entry.n_sequences,
        "share": entry.n_sequences / n_samples,
        "mean_value": float(np.mean(entry.values)),
        "max_abs": float(np.abs(entry.values).max()),
        "position": position,
        "share_at_position": times / len(entry.values),
        "token_id": token,
    }


@torch.inference_mode()
def head_sinks(
    model: Model, samples: Sequence[Encoded], position: int = 0, batch_size: int = 8
) -> xr.Dataset:
    """Every head's attention to one token, the uniform baseline, and the contribution norm.

    Means over sequences longer than position + 1. A high weight alone makes no sink that
    matters: see the contribution beside it.
    """
    kept = [s for s in samples if len(s) > position + 1]
    parts = []
    for batch in batches_in_order(kept, batch_size, "right"):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        parts.append(edits.read_sinks(model.tl, ids, mask, position))
    mean = {
        name: torch.cat([getattr(part, name) for part in parts]).mean(0).cpu().numpy()
        for name in ("weight", "contribution", "uniform")
    }
    return xr.Dataset(
        {
            "first_token_weight": (("layer", "head"), mean["weight"]),
            "uniform_weight": ((), float(mean["uniform"])),
            "head_resid_contrib_norm": (("layer", "head"), mean["contribution"]),
        }
    )


def profile_of(outcome: Outcome, row: int = 0) -> xr.Dataset:
    """Per layer, means over sequences of top1-3, median and top1 / median; the usual place."""
    seen = {name: values[row] for name, values in outcome.profile.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (seen["top1"] / seen["median"]).mean(0)
    columns = {name: seen[name].mean(0) for name in ("top1", "top2", "top3", "median")}
    columns["ratio"] = ratio
    for name in ("pos", "dim"):
        usual = [Counter(column.astype(int)).most_common(1)[0][0] for column in seen[name].T]
        columns[f"top1_{name}"] = np.array(usual)
    return xr.Dataset({name: ("layer", column) for name, column in columns.items()})


def noise_percent(top1: Float[np.ndarray, " layer"], dtype: str) -> Float[np.ndarray, " layer"]:
    """The step of the data type at that size, in percent: a change below it is no change."""
    bits = {"bf16": 7, "fp16": 10, "fp32": 23, "fp64": 52}[dtype]
    with np.errstate(divide="ignore"):
        step = 2.0 ** (np.floor(np.log2(top1)) - bits)
    return 100 * np.divide(step, top1, out=np.full_like(top1, np.nan), where=top1 > 0)


def pruned_sets(scores: np.ndarray, count: int, seed: int) -> dict[str, Heads]:
    """The `count` heads of the highest score, of the lowest, and random ones, by name."""
    ranks = np.argsort(-scores, axis=None, kind="stable")
    layers, heads = np.unravel_index(ranks, scores.shape)
    order = [(int(layer), int(head)) for layer, head in zip(layers, heads, strict=True)]
    count = min(count, len(order))
    drawn = np.random.default_rng(seed).choice(len(order), size=count, replace=False)
    return {
        f"top {count} heads": tuple(sorted(order[:count])),
        f"bottom {count} heads": tuple(sorted(order[-count:])),
        f"random {count} heads": tuple(sorted(order[i] for i in drawn)),
    }


def is_layer_sweep(name: str) -> bool:
    """Whether a set is one layer's heads or MLP."""
    return name.startswith(("heads of layer ", "mlp "))


def study_variants(
    model: Model,
    settings: MassiveSettings,
    pruned: dict[str, Heads],
    entries: pd.DataFrame,
    layer: int,
) -> list[Variant]:
    """Everything that is changed: pruned heads, set activations, and who makes them."""
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    least = settings.least if len(entries) else None
    means = np.zeros(model.info.d_model)
    here = entries[entries["layer"] == layer]
    means[here["dim"].to_numpy(int)] = here["mean_value"]
    values = torch.from_numpy(means).to(model.device, torch.float32)
    found = [Variant(name, heads=heads) for name, heads in pruned.items()]
    what = "massive activations" if len(entries) else "largest activation"
    zeroed = SetActivations(layer, least, settings.ratio)
    found.append(Variant(f"{what} to zero", activations=zeroed))
    if len(entries):
        meant = SetActivations(layer, least, settings.ratio, values)
        found.append(Variant(f"{what} to mean", activations=meant))
    has_mlps = not model.tl.cfg.attn_only
    found.append(Variant("all heads", heads=all_heads(range(n_layers), n_heads)))
    if has_mlps:
        found.append(Variant("all mlps", mlps=tuple(range(n_layers))))
    if settings.sweep_layers:
        found += [
            Variant(f"heads of layer {i}", heads=all_heads([i], n_heads)) for i in range(n_layers)
        ]
        found += [Variant(f"mlp {i}", mlps=(i,)) for i in range(n_layers) if has_mlps]
    return found


def study_massive(
    model: Model, inputs: Inputs, settings: MassiveSettings | None = None, progress: bool = False
) -> xr.Dataset:
    """The whole study. Dims layer, head, set (`clean` first), token, dim, entry.

    What the numbers cannot tell: a large activation is not thereby a used one; only the runs
    that set it to zero or to its mean speak of use.
    """
    settings = settings or MassiveSettings(dataset="none", texts="")
    options = Options(settings.batch_size, settings.max_batch_tokens, settings.padding_side,
                      settings.seed, profile=True)  # fmt: skip
    entries = massive_entries(
        model, inputs.samples, settings.least, settings.ratio, settings.batch_size
    )
    quick = run_variants(model, inputs.samples, [], Nothing(), options=options)
    curve = profile_of(quick)
    # The first layer where they stand: later ones only carry them on.
    layer = int(entries["layer"].min()) if len(entries) else int(curve["ratio"].values.argmax())
    shown = settings.picture_layer
    shown = (
        int(curve["ratio"].values.argmax()) if shown < 0 else min(shown, model.info.n_layers - 1)
    )
    position = int(curve["top1_pos"][shown]) if len(entries) else 0
    sinks = head_sinks(model, inputs.samples, position, settings.batch_size)
    pruned = pruned_sets(sinks[settings.rank_by].values, settings.prune, settings.seed)
    variants = study_variants(model, settings, pruned, entries, layer)
    readout = NextTokens() if inputs.texts else Letters(inputs.answers)
    outcome = run_variants(
        model, inputs.samples, variants, readout, options=options, progress=progress
    )
    result = xr.merge([curve, sinks, _effects(outcome, variants, inputs, model.info.dtype)])
    if len(inputs.prompts):
        result["accuracy"] = ("set", _accuracy(model, inputs, variants, settings))
    for name, column in entries.items():
        result[f"entry_{name}"] = ("entry", column.to_numpy())
    if len(inputs.other_bos):
        other = run_variants(model, inputs.other_bos, [], Nothing(), options=options)
        for name, array in profile_of(other).items():
            result[f"other_bos_{name}"] = array
        changed = massive_entries(model, inputs.other_bos, settings.least, settings.ratio)
        result.attrs["other_bos_massive_dims"] = sorted({int(d) for d in changed["dim"]})
    sample = Encoded(0, inputs.samples[0].ids[: settings.picture_tokens])
    top = next(iter(pruned.values()))
    result["picture_before"] = (("token", "dim"), picture(model, sample, shown, ()))
    result["picture_after"] = (("token", "dim"), picture(model, sample, shown, top))
    result.attrs.update(
        picture_ids=list(sample.ids), picture_layer=shown, set_layer=layer,
        massive_position=position, pruned=pruned, has_massive=bool(len(entries)),
    )  # fmt: skip
    return result


def _effects(
    outcome: Outcome, variants: Sequence[Variant], inputs: Inputs, dtype: str
) -> xr.Dataset:
    """Per set: the profile per layer, its change in percent, loss, perplexity or accuracy."""
    names = np.array(["clean", *(v.name for v in variants)], dtype=object)
    profile = outcome.profile["top1"].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = 100 * (profile - profile[0]) / profile[0]
    weights = np.array([len(s) - 1 for s in inputs.samples]) if inputs.texts else None
    loss = np.average(outcome.values["loss"], axis=1, weights=weights)
    found = xr.Dataset(
        {
            "set_top1": (("set", "layer"), profile),
            "change_percent": (("set", "layer"), change),
            "noise_percent": ("layer", noise_percent(profile[0], dtype)),
            "loss": ("set", loss),
        },
        coords={"set": names},
    )
    if inputs.texts:
        found["perplexity"] = np.exp(found["loss"])
    else:
        found["accuracy"] = ("set", outcome.values["correct"].mean(1))
    return found


def _accuracy(
    model: Model, inputs: Inputs, variants: Sequence[Variant], settings: MassiveSettings
) -> np.ndarray:
    """Accuracy on the prompts by set; NaN for the layer sweeps, which it is not taken of."""
    wanted = [i for i, v in enumerate(variants) if not is_layer_sweep(v.name)]
    options = Options(settings.batch_size, settings.max_batch_tokens, settings.padding_side)
    outcome = run_variants(
        model, inputs.prompts, [variants[i] for i in wanted], Letters(inputs.answers),
        options=options,
    )  # fmt: skip
    found = np.full(1 + len(variants), np.nan)
    found[[0, *(i + 1 for i in wanted)]] = outcome.values["correct"].mean(1)
    return found


@torch.inference_mode()
def picture(
    model: Model, sample: Encoded, layer: int, heads: Heads
) -> Float[np.ndarray, "token dim"]:
    """|x| of the residual after a layer, token by dimension, without some heads."""
    batch = make_batch([sample], "right")
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    new = replacement("zero", layer, batch.samples, mask, None)
    changes = []
    for at in sorted({layer for layer, _ in heads}):
        chosen = torch.zeros(1, 1, model.info.n_heads, dtype=torch.bool, device=model.device)
        chosen[0, 0, [head for la, head in heads if la == at]] = True
        changes.append(edits.replace_heads(at, chosen, new, last_real_position(mask)))
    kept: dict[int, torch.Tensor] = {}
    readers = edits.read_resid([layer], True, kept.__setitem__)
    edits.run_hooked(model.tl, Start(ids), mask, [*changes, *readers])
    return kept[layer][0].abs().double().cpu().numpy()


def layers_table(result: xr.Dataset, prefix: str = "") -> pd.DataFrame:
    """layers.parquet."""
    names = ("top1", "top2", "top3", "median", "ratio", "top1_pos", "top1_dim")
    columns = {name: result[f"{prefix}{name}"].values for name in names}
    return pd.DataFrame({"layer": np.arange(result.sizes["layer"]), **columns})


def heads_table(result: xr.Dataset) -> pd.DataFrame:
    """heads.parquet."""
    weights = result["first_token_weight"].values
    layer, head = np.indices(weights.shape)
    return pd.DataFrame(
        {
            "layer": layer.ravel(),
            "head": head.ravel(),
            "first_token_weight": weights.ravel(),
            "uniform_weight": np.full(weights.size, float(result["uniform_weight"])),
            "head_resid_contrib_norm": result["head_resid_contrib_norm"].values.ravel(),
        }
    )
