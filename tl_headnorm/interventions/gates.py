"""Gates on heads: z_h becomes base_h + gate * (z_h - base_h) at every position."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.interventions.intervention import Intervention, Rows

GateRows = Float[Tensor, "#row layer head"]
# Per layer, a head's z at gate 0: the same everywhere, or one per row and position.
Base = Mapping[int, Shaped[Tensor, "#row #pos head d_head"]]


@dataclass(frozen=True, eq=False)
class Gates(Intervention):
    """The same gates for every sample; at gate 0 z is `base` (None: zero), at gate 1 unchanged.

    `since`: the first layer that differs from the run this one starts from, where that is not
    the first one with a gate other than 1.
    """

    name: str
    gates: Float[Tensor, "layer head"]
    base: Base | None = None
    since: int | None = None

    @property
    def first_layer(self) -> int | None:
        return min(moving(self.gates[None]), default=None) if self.since is None else self.since

    def hooks(self, rows: Rows) -> list[Hook]:
        gates = self.gates[None]
        return gate_hooks(gates, moving(gates), self.base, rows.last)


def moving(gates: GateRows) -> list[int]:
    """Layers in which some gate is not 1."""
    layers: list[int] = (gates != 1).any(2).any(0).nonzero().flatten().tolist()
    return layers


def gate_hooks(
    gates: GateRows, layers: Iterable[int], base: Base | None, last: Int[Tensor, " row"]
) -> list[Hook]:
    """Hooks that apply the gates of some layers, differentiable with respect to the gates."""
    return [
        (hook_names.z(layer), _gate(gates[:, layer], None if base is None else base[layer], last))
        for layer in layers
    ]


def _gate(
    gate: Float[Tensor, "#row head"], base: Tensor | None, last: Int[Tensor, " row"]
) -> Callable[[Tensor, Any], Tensor]:
    factor = gate[:, None, :, None]

    def edit(z: Float[Tensor, "row pos head d_head"], hook: Any) -> Tensor:
        # Gates are float32 or wider: the product is rounded once, to the model's type.
        if base is None:
            return (z * factor).to(z.dtype)
        at = base
        if at.shape[1] not in (1, z.shape[1]):  # the pass computes the last position only
            at = take_position(at, last)
        return (z + (1 - factor) * (at - z)).to(z.dtype)

    return edit
