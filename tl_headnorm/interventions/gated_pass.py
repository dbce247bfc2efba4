"""Heads switched off as they are scored: a layer is scored on what the layers before it left."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.measures import Measure
from tl_headnorm.measures.measurer import Factors, How, Measurer


@dataclass(frozen=True)
class Rule(Intervention):
    """Heads are off where sign * score is under a threshold; one pass decides and acts.

    In each layer heads are scored on what the heads switched off before them left, and go before
    W_O of their own layer, as in Sandoval-Segura et al., "Identifying and Evaluating Inactive
    Heads in Pretrained LLMs", ICLR 2026. `normalised`: the score is divided by the mean size of
    its layer's. The heads that were off are `rows.found["off"]` [batch, layer, head].
    """

    name: str
    measure: Measure
    factors: Factors = field(repr=False)
    threshold: float
    sign: int = 1
    normalised: bool = False
    method: str = "zero"

    @property
    def first_layer(self) -> int:
        return 0

    @property
    def everywhere(self) -> bool:
        return How(measures=(self.measure,)).everywhere

    def hooks(self, rows: Rows) -> list[Hook]:
        """Raises InputError on a bridge, and for a measure that reads the answer."""
        if not rows.model.engine.starts_late:
            raise InputError(
                "on_the_fly: expected --engine hooked, found a bridge; leave the mode out"
            )
        if "answer" in self.measure.reads:
            raise InputError(
                f"on_the_fly: expected a measure that does not look at the answer, found "
                f"{self.measure.name}"
            )
        info = rows.model.info
        measurer = Measurer(rows.model, self.factors, How(measures=(self.measure,)), ())
        off = torch.zeros(len(rows), info.n_layers, info.n_heads, device=rows.ids.device)
        rows.found["off"] = off
        read: dict[str, Tensor] = {}

        def reader(layer: int, name: str) -> Callable[[Tensor, Any], Tensor | None]:
            def on_point(value: Tensor, hook: Any) -> Tensor | None:
                read[name] = value
                if name != "z":  # z is the last of a layer's
                    return None
                values = measurer.of_layer(layer, dict(read), rows.mask, rows.last)
                scores = self.sign * _scaled(values[self.measure.name].double(), self.normalised)
                gone = scores < self.threshold
                off[:, layer] = gone.to(off.dtype)
                new = rows.replacement(self.method, layer).to(value.dtype)
                return torch.where(gone[:, None, :, None], new, value)

            return on_point

        return [
            (getattr(hook_names, name)(layer), reader(layer, name))
            for layer in range(info.n_layers)
            for name in measurer.how.reads
        ]


def _scaled(values: Float[Tensor, "row head"], normalised: bool) -> Float[Tensor, "row head"]:
    """Divided by the mean size of the layer's heads, where that is wanted and not zero."""
    if not normalised:
        return values
    mean = values.abs().mean(1, keepdim=True)
    return torch.where(mean == 0, 0, values / torch.where(mean == 0, 1, mean))
