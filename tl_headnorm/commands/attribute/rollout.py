"""Attention rollout: how much of each token reaches the last one, by attention alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.patterns import read_patterns


def rollout(
    attention: Sequence[Float[Tensor, "batch head q k"]], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch q k"]:
    """R_l = norm_rows((mean_h A_l + I) / 2) R_{l-1}, pad rows and columns 0 (Abnar & Zuidema 2020).

    Rows of real tokens sum to 1 and R is lower-triangular. It sees no values, no W_O and no MLP,
    so it says where attention leads, not what is carried.
    """
    real = (mask[:, :, None] * mask[:, None, :]).to(attention[0].dtype)
    identity = torch.eye(mask.shape[1], dtype=real.dtype, device=mask.device) * real
    joint = identity
    for layer in attention:
        step = (torch.where(real > 0, layer.mean(1), 0) + identity) / 2
        step = step / step.sum(-1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
        joint = step @ joint
    return joint


def token_scores(gated: GatedLoss, items: Sequence[Encoded]) -> list[Float[Tensor, " token"]]:
    """The last real token's row for every item, over its own tokens."""
    rows, found = gated.rows(items), dict[int, Tensor]()
    layers = range(gated.n_layers)
    read_patterns(gated.model.engine, rows.ids, rows.mask, layers, found.__setitem__)
    joint = rollout([found[layer].to(gated.dtype) for layer in layers], rows.mask)
    real = rows.mask.bool()
    return [joint[i, last][real[i]].cpu() for i, last in enumerate(rows.last.tolist())]
