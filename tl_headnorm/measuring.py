"""One batch: every measure of every head, and each prompt's predicted option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm import hooks
from tl_headnorm.data.batches import Batch
from tl_headnorm.fast import Tail
from tl_headnorm.measures import (
    MEASURES,
    contribution_factor,
    last_real_position,
    sum_over_tokens,
)
from tl_headnorm.model import Model


@dataclass(frozen=True)
class How:
    """How prompts are measured: what is taken of them, and the ways that make it fast."""

    token_agg: str = "last"
    exclude_first_token: bool = False
    padding_side: str = "right"
    batch_size: int = 8
    max_batch_tokens: int | str = "auto"
    score: bool = False
    share_prefix: bool = True
    sort: bool = True


Factors = Mapping[int, Tensor]


@dataclass(frozen=True)
class Found:
    """What one batch gave: values by measure, each prompt's option, layers that did not fire."""

    values: dict[str, Float[np.ndarray, "batch layer head"]]
    predicted: Int[np.ndarray, " batch"]
    missing: tuple[int, ...]


def factors_of(model: Model) -> dict[int, Float[Tensor, "head k d_head"]]:
    """The contribution factor of every layer."""
    layers = range(model.info.n_layers)
    return {layer: contribution_factor(hooks.W_O(model.tl, layer)) for layer in layers}


class Measurer:
    """Measures batches of one group of prompts; the shared prefix is run once, here."""

    def __init__(self, model: Model, factors: Factors, how: How, prefix: Sequence[int]) -> None:
        self.model, self.factors, self.how = model, factors, how
        self.prefix = hooks.run_prefix(model.tl, prefix) if prefix else None
        self.before = self._prefix_sums() if prefix and how.token_agg == "all" else {}

    def _prefix_sums(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """(sum, count) over the prefix's tokens: constants of every prompt in the group."""
        assert self.prefix is not None
        mask = torch.ones(1, len(self.prefix), dtype=torch.long, device=self.model.device)
        return {
            (name, layer): sum_over_tokens(
                measure.compute(z, self.factors[layer]), mask, self.how.exclude_first_token
            )
            for layer, z in self.prefix.z.items()
            for name, measure in MEASURES.items()
        }

    def __call__(self, batch: Batch) -> Found:
        """Every measure of every head for one batch, and each prompt's predicted option.

        A layer whose hook did not fire is NaN. Only [batch, layer, head] numbers leave the device.
        """
        model, how = self.model, self.how
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        tail = Tail(last_real_position(mask), how.token_agg == "all", how.score)
        seen = hooks.run_z(model.tl, ids, mask, prefix=self.prefix, tail=tail)
        columns: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
        missing = tuple(i for i in range(model.info.n_layers) if i not in seen.z)
        for layer in range(model.info.n_layers):
            z = seen.z.pop(layer, None)
            for name in MEASURES:
                columns[name].append(self._of_layer(name, layer, z, mask))
        values = {n: torch.stack(c, dim=1).double().cpu().numpy() for n, c in columns.items()}
        guesses = _predict(model, batch, seen.resid[:, 0]) if how.score else None
        return Found(values, np.full(len(batch), -1) if guesses is None else guesses, missing)

    def _of_layer(self, name: str, layer: int, z: Tensor | None, mask: Tensor) -> Tensor:
        """One measure of one layer, [batch, head]."""
        if z is None:
            shape = (len(mask), self.model.info.n_heads)
            return torch.full(shape, torch.nan, device=self.model.device)
        per_token = MEASURES[name].compute(z, self.factors[layer])
        if self.how.token_agg == "last":
            return per_token[:, 0]
        # The first token stands in the prefix where there is one.
        skip = self.how.exclude_first_token and self.prefix is None
        total, count = sum_over_tokens(per_token, mask, skip)
        if (name, layer) in self.before:
            earlier, number = self.before[name, layer]
            total, count = total + earlier, count + number
        return total / count


def _predict(
    model: Model, batch: Batch, resid: Float[Tensor, "batch d_model"]
) -> Int[np.ndarray, " batch"]:
    """Position of the option whose letter has the largest next-token logit."""
    width = max(len(sample.letter_ids) for sample in batch.samples)
    # Rows with fewer options repeat their first letter, which is then left out by position: the
    # repeats' logits may differ from the first one's by a rounding, and argmax would take them.
    padded = [s.letter_ids + s.letter_ids[:1] * (width - len(s.letter_ids)) for s in batch.samples]
    letter_ids = torch.tensor(padded, device=model.device)
    counts = torch.tensor([len(s.letter_ids) for s in batch.samples], device=model.device)
    beyond = torch.arange(width, device=model.device) >= counts[:, None]
    logits = hooks.letter_logits(model.tl, resid, letter_ids).masked_fill(beyond, -torch.inf)
    return logits.argmax(dim=1).cpu().numpy()
