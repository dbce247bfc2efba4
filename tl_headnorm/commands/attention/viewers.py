"""Arguments for other attention viewers in notebooks; none of them is required."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tl_headnorm.commands.attention.patterns import Look
from tl_headnorm.errors import InputError


def to_circuitsvis(found: Look, layer: int, heads: Sequence[int] | None = None) -> dict[str, Any]:
    """Arguments of `circuitsvis.attention.attention_heads` for one layer.

    `tokens`: text per token; `attention`: float32 [head, destination, source];
    `attention_head_names`: "L.H". Use: `attention_heads(**to_circuitsvis(found, layer=3))`.
    `attention_patterns` takes the first two. Raises InputError for heads that were not kept.
    """
    chosen = _kept_heads(found, layer) if heads is None else list(heads)
    return {
        "tokens": list(found.labels),
        "attention": np.stack([_pattern(found, layer, head) for head in chosen]),
        "attention_head_names": [f"{layer}.{head}" for head in chosen],
    }


def to_bertview(found: Look, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Arguments of `bertviz.head_view` and `bertviz.model_view`.

    `attention`: a tuple with, per layer, a float32 tensor [1, head, q, k]; `tokens`: text per
    token. Use: `head_view(**to_bertview(found))`. Raises InputError unless all heads of the
    layers were kept, because those viewers know heads by their places.
    """
    chosen = [int(i) for i in found.run["layer"].values] if layers is None else list(layers)
    n_heads = found.run.sizes["head"]
    attention = tuple(
        torch.from_numpy(np.stack([_pattern(found, layer, h) for h in range(n_heads)]))[None]
        for layer in chosen
    )
    return {"attention": attention, "tokens": list(found.labels)}


def _kept_heads(found: Look, layer: int) -> list[int]:
    heads = sorted(head for at, head in found.kept if at == layer)
    if not heads:
        raise _not_kept(found, f"layer {layer}")
    return heads


def _pattern(found: Look, layer: int, head: int) -> np.ndarray:
    if (layer, head) not in found.kept:
        raise _not_kept(found, f"{layer}.{head}")
    return found.kept[layer, head].astype(np.float32)


def _not_kept(found: Look, what: str) -> InputError:
    return InputError(
        f"heads: expected heads whose whole pattern was kept ({len(found.kept)} are), found "
        f"{what}; look again with it among the heads wanted, or with more keep_mb"
    )
