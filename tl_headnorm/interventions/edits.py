"""Interventions of the studies: edits of z, MLPs and residuals, and starts at a later layer.

Like hooks.py, this file belongs to the only layer that touches hook points.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.bridge import is_bridge
from tl_headnorm.engine.forward import W_O, b_O, to_last_block
from tl_headnorm.engine.short_blocks import Tail, stopping_at
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.magnitudes import massive
from tl_headnorm.measures import contribution_factor, resid_contrib_norm, take_position

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


def can_start_late(tl: Any) -> bool:
    """Whether a pass may begin at a later layer; TransformerBridge runs the whole model only."""
    return not is_bridge(tl)


def can_start_mid(tl: Any) -> bool:
    """Whether a block is resid + attn_out, then + mlp(ln2(resid)): its second half can be run."""
    cfg = tl.cfg
    return can_start_late(tl) and not (
        cfg.parallel_attn_mlp or getattr(cfg, "use_normalization_before_and_after", False)
    )


def add_heads(
    tl: Any,
    layer: int,
    resid_pre: Float[Tensor, "#batch pos d_model"],
    z: Float[Tensor, "*stack pos head d_head"],
) -> Float[Tensor, "*stack pos d_model"]:
    """The residual behind a layer's attention: resid_pre + sum_h z_h W_O^h + b_O."""
    weight = W_O(tl, layer)
    flat = weight.permute(2, 0, 1).reshape(weight.shape[2], -1)
    return resid_pre + F.linear(z.flatten(-2), flat, b_O(tl, layer))


def add_mlp(
    tl: Any,
    layer: int,
    resid_mid: Float[Tensor, "row pos d_model"],
    off: Bool[Tensor, " row"] | None = None,
) -> Float[Tensor, "row pos d_model"]:
    """The residual behind a layer's MLP, which adds nothing in the rows `off`."""
    if tl.cfg.attn_only:
        return resid_mid
    block = tl.blocks[layer]
    out = block.mlp(block.ln2(resid_mid))
    return resid_mid + (out if off is None else out.masked_fill(off[:, None, None], 0))


def finish_layer(
    tl: Any,
    layer: int,
    resid_pre: Float[Tensor, "batch pos d_model"],
    z: Float[Tensor, "batch pos head d_head"],
    chosen: Bool[Tensor, "variant batch head"],
    new: Float[Tensor, "#batch #pos #head #d_head"],
    mlp_off: Bool[Tensor, " variant"],
) -> Float[Tensor, "row pos d_model"]:
    """The residual after a layer whose z is known, with the chosen heads' z replaced by `new`.

    Queries, keys, values and scores of the layer are the clean run's, so none is computed again.
    Rows are [variant, sample].
    """
    changed = torch.where(chosen[:, :, None, :, None], new.to(z.dtype), z)
    resid_mid = add_heads(tl, layer, resid_pre, changed).flatten(0, 1)
    return add_mlp(tl, layer, resid_mid, mlp_off.repeat_interleave(len(z)))


@dataclass(frozen=True)
class Start:
    """Where a pass begins: at the tokens, or at `layer` with the residual before it."""

    ids: Int[Tensor, "row pos"] | None = None
    layer: int = 0
    resid: Float[Tensor, "row pos d_model"] | None = None


def run_hooked(
    tl: Any,
    start: Start,
    mask: Int[Tensor, "row pos"],
    edits: Sequence[Hook] = (),
    tail: Tail | None = None,
) -> Float[Tensor, "row resid_pos d_model"]:
    """The residual after the last block, at all positions or at the tail's; nothing unembedded."""
    with (
        tl.hooks(fwd_hooks=list(edits)),
        stopping_at(tl, tail) if tail else nullcontext(False) as shortened,
    ):
        begin: Any = start.ids if start.resid is None else start.resid
        assert begin is not None, "a pass begins at tokens or at a residual"
        resid = to_last_block(tl, begin, mask, start_layer=start.layer)
    return take_position(resid, tail.last) if tail and not shortened else resid


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
    factors = {layer: contribution_factor(W_O(tl, layer)) for layer in range(tl.cfg.n_layers)}

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
