"""Heads switched off as they are scored: a layer is scored on what the layers before it left."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.engine.protocol import Hook, layer_readers
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.measures import Measure
from tl_headnorm.measures.measurer import Factors, MeasureOptions, Measurer


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
    def kind(self) -> str:
        return f"rule of {self.measure.name}"

    @property
    def everywhere(self) -> bool:
        return MeasureOptions(measures=(self.measure,)).everywhere

    def hooks(self, rows: Rows) -> list[Hook]:
        """Raises InputError for a measure that reads the answer."""
        if "answer" in self.measure.reads:
            raise InputError(
                f"on_the_fly: expected a measure that does not look at the answer, found "
                f"{self.measure.name}"
            )
        info = rows.model.info
        measurer = Measurer(rows.model, self.factors, MeasureOptions(measures=(self.measure,)), ())
        off = torch.zeros(len(rows), info.n_layers, info.n_heads, device=rows.ids.device)
        rows.found["off"] = off

        def on_layer(layer: int, read: dict[str, Tensor]) -> Tensor:
            z = read["z"]
            values = measurer.of_layer(layer, read, rows.mask, rows.last)
            scores = self.sign * _scaled(values[self.measure.name].double(), self.normalised)
            gone = scores < self.threshold
            off[:, layer] = gone.to(off.dtype)
            new = rows.replacement(self.method, layer).to(z.dtype)
            return torch.where(gone[:, None, :, None], new, z)

        return layer_readers(info.n_layers, measurer.options.reads, on_layer)


def _scaled(values: Float[Tensor, "row head"], normalised: bool) -> Float[Tensor, "row head"]:
    """Divided by the mean size of the layer's heads, where that is wanted and not zero."""
    if not normalised:
        return values
    mean = values.abs().mean(1, keepdim=True)
    return torch.where(mean == 0, 0, values / torch.where(mean == 0, 1, mean))
