"""MEASURES: pure functions from a layer's z to one number per head and position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

HeadValues = Float[Tensor, "batch pos head"]


def output_norm(
    z: Float[Tensor, "batch pos head d_head"], factor: Float[Tensor, "head k d_head"]
) -> HeadValues:
    """||z_h||_2, in the units of the activations; says nothing of what W_O makes of z."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=factor.dtype)


def resid_contrib_norm(
    z: Float[Tensor, "batch pos head d_head"], factor: Float[Tensor, "head k d_head"]
) -> HeadValues:
    """||z_h W_O^h||_2 = ||R_h z_h||_2, the size of what head h adds to the residual stream.

    R_h is `contribution_factor(W_O)`. No [batch, pos, head, d_model] tensor is made. It says
    nothing of the direction: two heads of equal norm may cancel.
    """
    projected = einsum(
        z.to(factor.dtype), factor, "batch pos head d_head, head k d_head -> batch pos head k"
    )
    return torch.linalg.vector_norm(projected, dim=-1)


def contribution_factor(
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head k d_head"]:
    """R_h with ||R_h z|| = ||z W_O^h|| for every z: the R of a QR of W_O^h transposed.

    W_O^h^T = Q R with Q's columns orthonormal, so ||z W_O^h|| = ||Q R z|| = ||R z||.
    k = min(d_head, d_model). Decomposed in float64; float32 for weights of float32 and narrower.
    """
    transposed = rearrange(W_O, "head d_head d_model -> head d_model d_head")
    R = torch.linalg.qr(transposed.double(), mode="r").R
    return R if W_O.dtype == torch.float64 else R.float()


def last_real_position(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Index of the last 1 in every row; right under either padding side.

    `mask.sum(1) - 1` is the usual shortcut and wrong under left padding.
    """
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def take_position(
    x: Shaped[Tensor, "batch pos *rest"], position: Int[Tensor, " batch"]
) -> Shaped[Tensor, "batch 1 *rest"]:
    """x at one position of each row, the position axis kept."""
    return x[torch.arange(len(x), device=x.device), position].unsqueeze(1)


def sum_over_tokens(
    values: HeadValues, mask: Int[Tensor, "batch pos"], exclude_first: bool = False
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch 1"]]:
    """(sum, count) over the real tokens of every row; `exclude_first` skips the first real one."""
    counted = mask.bool() & (mask.cumsum(1) > 1) if exclude_first else mask.bool()
    # where, not a product: a padded position may hold anything at all.
    kept = torch.where(counted.unsqueeze(-1), values, values.new_zeros(()))
    return kept.sum(1), counted.sum(1, keepdim=True).to(values.dtype)


@dataclass(frozen=True)
class Measure:
    """One number per head: its name in files, its formula and unit for figures, its function."""

    name: str
    formula: str
    unit: str
    compute: Callable[[Tensor, Tensor], Tensor]


MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("head_output_norm", "‖z_h‖", "activation units (L2)", output_norm),
        Measure("head_resid_contrib_norm", "‖z_h W_O‖", "residual units (L2)", resid_contrib_norm),
    )
}
