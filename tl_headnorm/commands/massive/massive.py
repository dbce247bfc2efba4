"""Massive activations: where they are, who attends to them, who makes them, what they are for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.protocol import Start
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.edits import Ablation, SetActivations
from tl_headnorm.interventions.heads import Heads, all_heads
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.magnitudes import massive as is_massive
from tl_headnorm.interventions.metrics import Letters, NextTokens, Profile
from tl_headnorm.interventions.runner import Values, run
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Inputs:
    """Sequences to study; the same without (or with) BOS; prompts with answers, if any."""

    samples: Sequence[Encoded]
    other_bos: Sequence[Encoded] = ()
    prompts: Sequence[Encoded] = ()
    answers: Sequence[int] = ()
    texts: bool = True


@torch.inference_mode()
def massive_entries(
    model: Model, samples: Sequence[Encoded], least: float, ratio: float, batch_size: int = 8
) -> pd.DataFrame:
    """Every (layer, dim) that is massive in some sequence: how often, how large, where.

    Columns layer, dim, n_sequences, share (of all sequences), mean_value (signed), max_abs,
    position (most frequent), share_at_position, token_id (most frequent).
    """
    hits: list[tuple[int, int, int, float, int, int]] = []
    for start in range(0, len(samples), batch_size):
        rows = Rows.pad(model, samples[start : start + batch_size], "right")

        def read(layer: int, resid: Tensor, rows: Rows = rows, start: int = start) -> None:
            for row, pos, dim in is_massive(resid, rows.mask, least, ratio).nonzero().tolist():
                # Right padding: positions count real tokens.
                value, token = float(resid[row, pos, dim]), int(rows.ids[row, pos])
                hits.append((layer, dim, start + row, value, pos, token))

        readers = edits.read_resid(range(model.info.n_layers), True, read)
        model.engine.run(Start(rows.ids), rows.mask, readers)
    entries = pd.DataFrame(hits, columns=list(_HIT)).groupby(["layer", "dim"])
    rows_of = [_entry(key, each, len(samples)) for key, each in entries]
    return pd.DataFrame(rows_of, columns=list(_ENTRY))


_HIT = ("layer", "dim", "sequence", "value", "position", "token")
_ENTRY = (
    *("layer", "dim", "n_sequences", "share", "mean_value", "max_abs"),
    *("position", "share_at_position", "token_id"),
)


def _entry(key: Any, hits: pd.DataFrame, n_samples: int) -> tuple[Any, ...]:
    position, times = Counter(hits["position"]).most_common(1)[0]
    token = Counter(hits["token"]).most_common(1)[0][0]
    n, values = hits["sequence"].nunique(), hits["value"].to_numpy()
    sizes = float(values.mean()), float(np.abs(values).max())
    return *key, n, n / n_samples, *sizes, position, times / len(hits), token


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
    for start in range(0, len(kept), batch_size):
        rows = Rows.pad(model, kept[start : start + batch_size], "right")
        parts.append(edits.read_sinks(model.engine, rows.ids, rows.mask, position))
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


def profile_of(model: Model, samples: Sequence[Encoded], settings: MassiveSettings) -> xr.Dataset:
    """Per layer, means over sequences of top1-3, median and top1 / median; the usual place."""
    seen = {k: v[0] for k, v in run(model, samples, [], Profile(), settings=settings).items()}
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


def interventions_of(
    model: Model,
    settings: MassiveSettings,
    pruned: dict[str, Heads],
    entries: pd.DataFrame,
    layer: int,
) -> list[Intervention]:
    """Everything that is changed: pruned heads, set activations, and who makes them."""
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    least = settings.least if len(entries) else None
    means = np.zeros(model.info.d_model)
    here = entries[entries["layer"] == layer]
    means[here["dim"].to_numpy(int)] = here["mean_value"]
    values = torch.from_numpy(means).to(model.device, torch.float32)
    found: list[Intervention] = [Ablation(name, heads=heads) for name, heads in pruned.items()]
    what = "massive activations" if len(entries) else "largest activation"
    found.append(SetActivations(f"{what} to zero", layer, least, settings.ratio))
    if len(entries):
        found.append(SetActivations(f"{what} to mean", layer, least, settings.ratio, values))
    has_mlps = not model.tl.cfg.attn_only
    found.append(Ablation("all heads", heads=all_heads(range(n_layers), n_heads)))
    if has_mlps:
        found.append(Ablation("all mlps", mlps=tuple(range(n_layers))))
    if settings.sweep_layers:
        found += [
            Ablation(f"heads of layer {i}", heads=all_heads([i], n_heads)) for i in range(n_layers)
        ]
        found += [Ablation(f"mlp {i}", mlps=(i,)) for i in range(n_layers) if has_mlps]
    return found


def study_massive(
    model: Model, inputs: Inputs, settings: MassiveSettings | None = None, progress: bool = False
) -> xr.Dataset:
    """Massive activations of a model. Dims layer, head, set (`clean` first), token, dim, entry.

    What the numbers cannot tell: a large activation is not thereby a used one; only the runs
    that set it to zero or to its mean speak of use.

    1 where they are: dimensions and the curve over layers  2 which heads attend to their token
    3 runs without heads, MLPs or the activations themselves  4 the same with (or without) BOS,
    and the picture before and after pruning.
    """
    settings = settings or MassiveSettings(dataset="none", texts="")
    # 1
    least, ratio, batch_size = settings.least, settings.ratio, settings.batch_size
    entries = massive_entries(model, inputs.samples, least, ratio, batch_size)
    curve = profile_of(model, inputs.samples, settings)
    steepest = int(curve["ratio"].values.argmax())
    # The first layer where they are: later ones only carry them on.
    layer = int(entries["layer"].min()) if len(entries) else steepest
    shown = settings.picture_layer
    shown = steepest if shown < 0 else min(shown, model.info.n_layers - 1)
    # 2
    position = int(curve["top1_pos"][shown]) if len(entries) else 0
    sinks = head_sinks(model, inputs.samples, position, batch_size)
    pruned = pruned_sets(sinks[settings.rank_by].values, settings.prune, settings.seed)
    # 3
    changes = interventions_of(model, settings, pruned, entries, layer)
    metric = Profile(NextTokens() if inputs.texts else Letters(inputs.answers))
    values = run(
        model, inputs.samples, changes, metric, settings=settings,
        progress="massive" if progress else None,
    )  # fmt: skip
    result = xr.merge([curve, sinks, _effects(values, changes, inputs, model.info.dtype)])
    if len(inputs.prompts):
        result["accuracy"] = ("set", _accuracy(model, inputs, changes, settings))
    # 4
    for name, column in entries.items():
        result[f"entry_{name}"] = ("entry", column.to_numpy())
    if len(inputs.other_bos):
        for name, array in profile_of(model, inputs.other_bos, settings).items():
            result[f"other_bos_{name}"] = array
        changed = massive_entries(model, inputs.other_bos, least, ratio)
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
    values: Values, changes: Sequence[Intervention], inputs: Inputs, dtype: str
) -> xr.Dataset:
    """Per set: the profile per layer, its change in percent, loss, perplexity or accuracy."""
    names = np.array(["clean", *(change.name for change in changes)], dtype=object)
    profile = values["top1"].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = 100 * (profile - profile[0]) / profile[0]
    weights = np.array([len(s) - 1 for s in inputs.samples]) if inputs.texts else None
    loss = np.average(values["loss"], axis=1, weights=weights)
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
        found["accuracy"] = ("set", values["correct"].mean(1))
    return found


def _accuracy(
    model: Model, inputs: Inputs, changes: Sequence[Intervention], settings: MassiveSettings
) -> np.ndarray:
    """Accuracy on the prompts by set; NaN for the layer sweeps, which it is not taken of."""
    wanted = [i for i, change in enumerate(changes) if not is_layer_sweep(change.name)]
    chosen, metric = [changes[i] for i in wanted], Letters(inputs.answers)
    correct = run(model, inputs.prompts, chosen, metric, settings=settings)["correct"]
    found = np.full(1 + len(changes), np.nan)
    found[[0, *(i + 1 for i in wanted)]] = correct.mean(1)
    return found


@torch.inference_mode()
def picture(
    model: Model, sample: Encoded, layer: int, heads: Heads
) -> Float[np.ndarray, "token dim"]:
    """|x| of the residual after a layer, token by dimension, without some heads."""
    rows = Rows.pad(model, [sample], "right")
    kept: dict[int, torch.Tensor] = {}
    readers = edits.read_resid([layer], True, kept.__setitem__)
    hooks = [*Ablation("pruned", heads=heads).hooks(rows), *readers]
    model.engine.run(Start(rows.ids), rows.mask, hooks)
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
