"""Attention patterns, handed over layer by layer so that none needs to be kept."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Engine, Hook, Start

TakePattern = Callable[[int, Tensor], None]


@torch.inference_mode()
def read_patterns(
    engine: Engine,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    layers: Sequence[int],
    take: TakePattern,
) -> None:
    """Hand the pattern [batch, head, q, k] of each layer to `take(layer, pattern)`.

    Rows of real queries sum to 1 over the real tokens up to them; rows of padding are zero. One
    pass, which ends after the last layer wanted; one layer's pattern exists at
    a time, unless `take` keeps it. Through a bridge attention is Hugging Face's eager one.
    """
    if not layers:
        return
    mask = mask.to(ids.device)
    real = mask.bool()[:, None, :, None]

    def reader(layer: int) -> Hook:
        def read(pattern: Tensor, hook: Any) -> None:
            take(layer, pattern * real.to(pattern.device))

        return hook_names.pattern(layer), read

    readers = [reader(layer) for layer in layers]
    engine.run(Start(ids), mask, readers, stop=max(layers) + 1)


def at_last_query(
    layer: int, heads: Sequence[int], take: Callable[[int, Float[Tensor, "head k"]], None]
) -> Hook:
    """A hook that hands over what the last query of the first row attends to, at some heads."""
    chosen = list(heads)

    def read(pattern: Tensor, hook: Any) -> None:
        take(layer, pattern[0, chosen, -1])

    return hook_names.pattern(layer), read
