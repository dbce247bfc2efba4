"""Interventions that remove heads and MLPs or set massive activations, and readers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import Engine, Hook, Start
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.magnitudes import massive
from tl_headnorm.measures import contribution_factor, resid_contrib_norm


@dataclass(frozen=True)
class Ablation(Intervention):
    """Heads whose z is replaced by a method of replacements.py, and MLPs switched off.

    `masks` [sample, layer, head] give the heads per input, by sample index, in place of `heads`.
    What is edited is z, the input of W_O. A slice of the attention's output is no head: every
    head writes into all of d_model.
    """

    name: str
    method: str = "zero"
    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    masks: Bool[np.ndarray, "sample layer head"] | None = field(default=None, compare=False)

    @property
    def first_layer(self) -> int | None:
        layers = {layer for layer, _ in self.heads}
        if self.masks is not None:
            layers = {int(layer) for layer in np.flatnonzero(self.masks.any(axis=(0, 2)))}
        return min([*layers, *self.mlps], default=None)

    def hooks(self, rows: Rows) -> list[Hook]:
        made = []
        for layer in range(rows.model.info.n_layers):
            off = self._off(layer, rows)
            if off.any():
                made.append(self._replace(layer, off.to(rows.ids.device), rows))
            if layer in self.mlps:
                made.append(drop_mlp(rows.model.engine, layer))
        return made

    def _off(self, layer: int, rows: Rows) -> Bool[Tensor, "#batch head"]:
        if self.masks is not None:
            return torch.from_numpy(self.masks[[s.index for s in rows.samples], layer])
        off = torch.zeros(1, rows.model.info.n_heads, dtype=torch.bool)
        off[0, [head for at, head in self.heads if at == layer]] = True
        return off

    def _replace(self, layer: int, off: Bool[Tensor, "#batch head"], rows: Rows) -> Hook:
        def edit(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            new = rows.replacement(self.method, layer)
            if new.shape[1] > z.shape[1]:  # the pass computes the last position only
                new = take_position(new, rows.last)
            return torch.where(off[:, None, :, None], new.to(z.dtype), z)

        return hook_names.z(layer), edit


def drop_mlp(engine: Engine, layer: int) -> Hook:
    """The MLP of a layer adds nothing, its bias included."""
    if engine.cfg.attn_only:
        raise InputError("mlps: expected a model with MLPs, found one of attention alone")
    return hook_names.mlp_out(layer), lambda out, hook: torch.zeros_like(out)


@dataclass(frozen=True, eq=False)
class SetActivations(Intervention):
    """Set massive activations of the residual after `layer` to zero or to a value per dimension.

    Massive: |x| > least and |x| >= ratio * median of the sequence. `least=None` takes the single
    largest of each sequence, whatever its size.
    """

    name: str
    layer: int
    least: float | None
    ratio: float = 0.0
    values: Float[Tensor, " d_model"] | None = None

    @property
    def first_layer(self) -> int:
        return self.layer

    def hooks(self, rows: Rows) -> list[Hook]:
        def edit(x: Tensor, hook: Any) -> Tensor:
            new = x.new_zeros(()) if self.values is None else self.values.to(x.dtype)
            return torch.where(self.entries(x, rows.mask), new, x)

        return [(hook_names.resid_post(self.layer), edit)]

    def entries(
        self, x: Float[Tensor, "row pos d_model"], mask: Int[Tensor, "row pos"]
    ) -> Bool[Tensor, "row pos d_model"]:
        """True at the entries that are set."""
        if self.least is not None:
            return massive(x, mask, self.least, self.ratio)
        size = x.abs() * mask[:, :, None]
        return size == size.amax(dim=(1, 2), keepdim=True)


def read_z(layers: Sequence[int], on_layer: Callable[[int, Tensor], None]) -> list[Hook]:
    """Readers that call `on_layer(layer, z)`; nothing is changed."""
    return _readers(hook_names.z, layers, on_layer)


def read_resid(
    layers: Sequence[int], post: bool, on_layer: Callable[[int, Tensor], None]
) -> list[Hook]:
    """Readers that call `on_layer` with the residual before (or after) each of the layers."""
    return _readers(hook_names.resid_post if post else hook_names.resid_pre, layers, on_layer)


def _readers(
    name: Callable[[int], str], layers: Sequence[int], on_layer: Callable[[int, Tensor], None]
) -> list[Hook]:
    def reader(layer: int) -> Callable[[Tensor, Any], None]:
        def read(value: Tensor, hook: Any) -> None:
            on_layer(layer, value)

        return read

    return [(name(layer), reader(layer)) for layer in layers]


@dataclass(frozen=True)
class Sinks:
    """Per head: attention to one token, and the size of what it adds, over the same queries."""

    weight: Float[Tensor, "batch layer head"]
    contribution: Float[Tensor, "batch layer head"]
    uniform: Float[Tensor, " batch"]


def read_sinks(
    engine: Engine,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    position: int = 0,
) -> Sinks:
    """Mean over the queries q > position of pattern[q, position], and whether it matters.

    `uniform` is the same mean for a uniform causal head, 1/(q + 1);
    `contribution` is the mean of ||z_h W_O^h||_2 at those queries: a sink whose value vector is
    about zero has a high weight and adds nothing. `position` counts real tokens.
    """
    order = mask.cumsum(1) - 1
    queries = mask.bool() & (order > position)
    at = mask.argmax(1) + position
    count = queries.sum(1).clamp_min(1)
    weights: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    layers = range(engine.n_layers)
    factors = {layer: contribution_factor(engine.W_O(layer)) for layer in layers}

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

    engine.run(Start(ids), mask, [*map(on_pattern, layers), *map(on_z, layers)])
    uniform = torch.where(queries, 1.0 / (order + 1).clamp_min(1).double(), 0.0).sum(1) / count
    return Sinks(
        torch.stack([weights[layer] for layer in layers], 1),
        torch.stack([sizes[layer] for layer in layers], 1),
        uniform,
    )
