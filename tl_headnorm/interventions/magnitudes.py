"""Sizes of the residual stream's entries: the largest, the median, and the massive ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Largest:
    """Per sequence: the three largest |x|, the median |x|, where the largest stands."""

    top: Float[Tensor, "row rank"]
    median: Float[Tensor, " row"]
    pos: Int[Tensor, " row"]
    dim: Int[Tensor, " row"]


def _sizes(x: Tensor, mask: Tensor) -> Tensor:
    """|x| in float32 or wider; NaN at padded positions, which may hold anything."""
    wide = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return wide.masked_fill(~mask.bool()[:, :, None], torch.nan)


def _median(sizes: Tensor) -> Tensor:
    """The lower median over real tokens and dimensions, per row."""
    return sizes.flatten(1).nanmedian(dim=1).values


def largest(x: Float[Tensor, "row pos d_model"], mask: Int[Tensor, "row pos"]) -> Largest:
    """Sort |x| over [pos, d_model] of each sequence; positions count real tokens from 0.

    Source: Sun et al., "Massive Activations in Large Language Models", 2024.
    """
    sizes = _sizes(x, mask)
    top, where = sizes.nan_to_num(-1.0).flatten(1).topk(min(3, sizes[0].numel()), dim=1)
    pos, dim = where[:, 0] // x.shape[2], where[:, 0] % x.shape[2]
    order = mask.cumsum(1) - 1
    return Largest(top, _median(sizes), order.gather(1, pos[:, None])[:, 0], dim)


def massive(
    x: Float[Tensor, "row pos d_model"],
    mask: Int[Tensor, "row pos"],
    least: float,
    ratio: float,
) -> Bool[Tensor, "row pos d_model"]:
    """|x| > least and |x| >= ratio * median of the sequence, at real tokens."""
    sizes = _sizes(x, mask)
    return (sizes > least) & (sizes >= ratio * _median(sizes)[:, None, None])
