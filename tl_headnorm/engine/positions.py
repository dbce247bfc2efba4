"""Token positions in padded batches, right under either padding side."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def last_real_position(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Index of the last 1 in every row.

    `mask.sum(1) - 1` is the usual shortcut and wrong under left padding.
    """
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def take_position(
    x: Shaped[Tensor, "batch pos *rest"], position: Int[Tensor, " batch"]
) -> Shaped[Tensor, "batch 1 *rest"]:
    """x at one position of each row; the position axis stays."""
    return x[torch.arange(len(x), device=x.device), position].unsqueeze(1)
