"""Interventions of the studies: edits of z, MLPs and residuals, and starts at a later layer.

Like hooks.py, this file belongs to the only layer that touches hook points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Hook, Start, Tail
from tl_headnorm.engine.select import engine_of
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.magnitudes import massive
from tl_headnorm.measures import contribution_factor, resid_contrib_norm, take_position

__all__ = ["Hook", "Start"]


def can_start_late(tl: Any) -> bool:
    return engine_of(tl).starts_late


def can_start_mid(tl: Any) -> bool:
    return engine_of(tl).splits_blocks


def add_heads(tl: Any, layer: int, resid_pre: Tensor, z: Tensor) -> Tensor:
    return engine_of(tl).add_heads(layer, resid_pre, z)


def add_mlp(tl: Any, layer: int, resid_mid: Tensor, off: Tensor | None = None) -> Tensor:
    return engine_of(tl).add_mlp(layer, resid_mid, off)


def finish_layer(tl: Any, layer: int, *given: Tensor) -> Tensor:
    return engine_of(tl).finish_layer(layer, *given)


def run_hooked(
    tl: Any,
    start: Start,
    mask: Int[Tensor, "row pos"],
    edits: Sequence[Hook] = (),
    tail: Tail | None = None,
) -> Float[Tensor, "row resid_pos d_model"]:
    return engine_of(tl).run(start, mask, edits, tail=tail)


def replace_heads(
    layer: int,
    chosen: Bool[Tensor, "variant batch head"],
    new: Float[Tensor, "#batch #pos #head #d_head"],
    last: Int[Tensor, " batch"],
) -> Hook:
    """z of the chosen heads becomes `new`; rows of a stacked pass are [variant, sample].

    What is edited is z, the input of W_O. A slice of the attention's output is no head: every
    head writes into all of d_model.
    """

    def edit(z: Tensor, hook: Any) -> Tensor:
        values = new
        if values.shape[1] > z.shape[1]:  # the pass computes the last position only
            values = take_position(values, last)
        grid = z.unflatten(0, (chosen.shape[0], chosen.shape[1]))
        return torch.where(chosen[:, :, None, :, None], values.to(z.dtype), grid).flatten(0, 1)

    return hook_names.z(layer), edit


def drop_mlp(tl: Any, layer: int, chosen: Bool[Tensor, " row"]) -> Hook:
    """The MLP of a layer adds nothing, its bias included, in the chosen rows."""
    if tl.cfg.attn_only:
        raise InputError("mlps: expected a model with MLPs, found one of attention alone")

    def edit(out: Tensor, hook: Any) -> Tensor:
        return out.masked_fill(chosen[:, None, None], 0)

    return hook_names.mlp_out(layer), edit


@dataclass(frozen=True, eq=False)
class SetActivations:
    """Set massive activations of the residual after `layer` to zero or to a value per dimension.

    Massive: |x| > least and |x| >= ratio * median of the sequence. `least=None` takes the single
    largest of each sequence, whatever its size.
    """

    layer: int
    least: float | None
    ratio: float = 0.0
    values: Float[Tensor, " d_model"] | None = None

    def entries(
        self, x: Float[Tensor, "row pos d_model"], mask: Int[Tensor, "row pos"]
    ) -> Bool[Tensor, "row pos d_model"]:
        """Which entries are set."""
        if self.least is not None:
            return massive(x, mask, self.least, self.ratio)
        size = x.abs() * mask[:, :, None]
        return size == size.amax(dim=(1, 2), keepdim=True)


def set_activations(change: SetActivations, mask: Int[Tensor, "row pos"]) -> Hook:
    """The hook that carries out a SetActivations in every row."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        new = x.new_zeros(()) if change.values is None else change.values.to(x.dtype)
        return torch.where(change.entries(x, mask), new, x)

    return hook_names.resid_post(change.layer), edit


def read_z(layers: Sequence[int], take: Callable[[int, Tensor], None]) -> list[Hook]:
    """Hand z of each of the layers to `take`; nothing is changed."""
    return _readers(hook_names.z, layers, take)


def read_resid(
    layers: Sequence[int], post: bool, take: Callable[[int, Tensor], None]
) -> list[Hook]:
    """Hand the residual before (or after) each of the layers to `take`; nothing is changed."""
    return _readers(hook_names.resid_post if post else hook_names.resid_pre, layers, take)


def _readers(
    name: Callable[[int], str], layers: Sequence[int], take: Callable[[int, Tensor], None]
) -> list[Hook]:
    def reader(layer: int) -> Callable[[Tensor, Any], None]:
        def read(value: Tensor, hook: Any) -> None:
            take(layer, value)

        return read

    return [(name(layer), reader(layer)) for layer in layers]


@dataclass(frozen=True)
class Sinks:
    """Per head: attention to one token, and the size of what it adds, over the same queries."""

    weight: Float[Tensor, "batch layer head"]
    contribution: Float[Tensor, "batch layer head"]
    uniform: Float[Tensor, " batch"]


def read_sinks(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    position: int = 0,
) -> Sinks:
    """Mean over the queries q > position of pattern[q, position], beside what says if it matters.

    `uniform` is the same mean for a head that attends alike to all it may see, 1/(q + 1);
    `contribution` is the mean of ||z_h W_O^h||_2 at those queries: a sink whose value vector is
    about zero has a high weight and adds nothing. `position` counts real tokens.
    """
    order = mask.cumsum(1) - 1
    queries = mask.bool() & (order > position)
    at = mask.argmax(1) + position
    count = queries.sum(1).clamp_min(1)
    weights: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    factors = {
        layer: contribution_factor(engine_of(tl).W_O(layer)) for layer in range(tl.cfg.n_layers)
    }

    def mean(values: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch head"]:
        kept = torch.where(queries[:, :, None], values, values.new_zeros(()))
        return kept.sum(1) / count[:, None]

    def on_pattern(layer: int) -> Hook:
        def read(pattern: Tensor, hook: Any) -> None:
            column = pattern[torch.arange(len(at), device=at.device), :, :, at]
            weights[layer] = mean(column.transpose(1, 2).double())

        return hook_names.pattern(layer), read

    def on_z(layer: int) -> Hook:
        def read(z: Tensor, hook: Any) -> None:
            sizes[layer] = mean(resid_contrib_norm(z, factors[layer]).double())

        return hook_names.z(layer), read

    layers = range(tl.cfg.n_layers)
    run_hooked(tl, Start(ids), mask, [*map(on_pattern, layers), *map(on_z, layers)])
    uniform = torch.where(queries, 1.0 / (order + 1).clamp_min(1).double(), 0.0).sum(1) / count
    return Sinks(
        torch.stack([weights[layer] for layer in layers], 1),
        torch.stack([sizes[layer] for layer in layers], 1),
        uniform,
    )
