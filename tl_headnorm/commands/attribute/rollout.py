"""Attention rollout: how much of each token reaches the last one, by attention alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.commands.attribute.gated_loss import Bundle, Engine
from tl_headnorm.interventions.gates import patterns


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


@torch.no_grad()
def token_scores(engine: Engine, bundle: Bundle) -> list[Float[Tensor, " token"]]:
    """The last real token's row for every item, over its own tokens."""
    wide = [a.to(engine.dtype) for a in patterns(engine.model.tl, bundle.ids, bundle.mask)]
    joint = rollout(wide, bundle.mask)
    out = []
    for row, real in zip(joint, bundle.mask.bool(), strict=True):
        out.append(row[real.nonzero()[-1, 0]][real].cpu())
    return out
