"""Heads switched off as they are scored: a layer is judged by what the layers before it left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.data.batches import Batch
from tl_headnorm.engine import forward
from tl_headnorm.engine.protocol import Tail
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.replacements import Reference, replacement
from tl_headnorm.measures import Measure, last_real_position
from tl_headnorm.measures.measurer import Factors, How, Measurer
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Rule:
    """A head is off where sign * score is under a threshold.

    `normalised`: the score is divided by the mean size of its layer's.
    """

    measure: Measure
    thresholds: tuple[float, ...]
    sign: int = 1
    normalised: bool = False
    method: str = "zero"


def run_rule(
    model: Model,
    factors: Factors,
    batch: Batch,
    rule: Rule,
    reference: Reference | None = None,
) -> tuple[Float[Tensor, "threshold batch 1 d_model"], Bool[Tensor, "threshold batch layer head"]]:
    """(the residual after the last block at the last token, the heads that were off).

    All thresholds run in one pass, stacked along the batch. In each layer heads are scored on
    what the heads switched off before them left, and go before W_O of their own layer: one pass
    decides and acts, as in Sandoval-Segura et al., "Identifying and Evaluating Inactive Heads in
    Pretrained LLMs", ICLR 2026. It needs the hooked engine.
    """
    if not forward.can_share_prefix(model.tl):
        raise InputError("on_the_fly: expected --engine hooked, found a bridge; leave the mode out")
    if "answer" in rule.measure.reads:
        raise InputError(
            f"on_the_fly: expected a measure that does not look at the answer, found "
            f"{rule.measure.name}"
        )
    n = len(rule.thresholds)
    ids = batch.ids.to(model.device).repeat(n, 1)
    mask = batch.mask.to(model.device).repeat(n, 1)
    last = last_real_position(mask)
    measurer = Measurer(model, factors, How(measures=(rule.measure,)), ())
    least = torch.tensor(rule.thresholds, device=model.device, dtype=torch.float64)
    least = least.repeat_interleave(len(batch))[:, None]
    off = torch.zeros(
        len(ids), model.info.n_layers, model.info.n_heads, dtype=torch.bool, device=model.device
    )

    def take(layer: int, read: dict[str, Tensor]) -> Tensor:
        z = read["z"]
        values = measurer.of_layer(layer, read, mask, last)[rule.measure.name].double()
        off[:, layer] = rule.sign * _scaled(values, rule.normalised) < least
        new = _new(rule.method, layer, mask, reference)
        return torch.where(off[:, layer][:, None, :, None], new.to(z.dtype), z)

    tail = Tail(last, measurer.how.everywhere, True)
    resid = forward.run_layers(
        model.tl, ids, mask, take, reads=measurer.how.reads, tail=tail, edits=True
    )
    size = (n, len(batch))
    return resid.unflatten(0, size), off.unflatten(0, size)


def _scaled(values: Float[Tensor, "row head"], normalised: bool) -> Float[Tensor, "row head"]:
    if not normalised:
        return values
    mean = values.abs().mean(1, keepdim=True)
    return torch.where(mean == 0, 0, values / torch.where(mean == 0, 1, mean))


METHODS = ("zero", "mean")


def _new(
    method: str, layer: int, mask: Int[Tensor, "row pos"], reference: Reference | None
) -> Float[Tensor, "1 1 #head #d_head"]:
    """Of the replacements those that are the same at every position and for every input."""
    assert method in METHODS, method
    none: Sequence[Any] = ()
    return replacement(method, layer, none, mask, reference)
