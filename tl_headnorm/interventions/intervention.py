"""An intervention: a named change of a forward pass, made by hooks from its first layer on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.positions import last_real_position
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.interventions.replacements import Reference, replacement
from tl_headnorm.model.loading import Model


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples of one batch in a pass, and the intervention that acts on them.

    `found` holds per-row tensors [batch, ...] that hooks of the metric or of the intervention
    put there during the pass. Before a pass from a later layer it holds the clean run's.
    """

    model: Model
    samples: tuple[Encoded, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    reference: Reference | None = None
    seed: int = 0
    intervention: "Intervention | None" = None
    found: dict[str, Tensor] = field(default_factory=dict)
    _drawn: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def pad(cls, model: Model, samples: Sequence[Encoded], side: str, **fields: Any) -> "Rows":
        """The samples padded to the longest, on the model's device."""
        batch = make_batch(samples, side)
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        return cls(model, batch.samples, ids, mask, **fields)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of every row's last real token."""
        return last_real_position(self.mask)

    def replacement(self, method: str, layer: int) -> Float[Tensor, "#batch #pos #head #d_head"]:
        """See replacements.py; the last one is kept, which the next intervention often shares."""
        if (method, layer) not in self._drawn:
            self._drawn.clear()
            self._drawn[method, layer] = replacement(
                method, layer, self.samples, self.mask, self.reference, self.seed
            )
        return self._drawn[method, layer]

    def under(self, intervention: "Intervention | None", found: dict[str, Tensor]) -> "Rows":
        """The same rows in a pass of their own."""
        return replace(self, intervention=intervention, found=dict(found))

    def at(self, index: Int[Tensor, " row"]) -> "Rows":
        """Rows by number, any of them several times."""
        samples = tuple(self.samples[i] for i in index.tolist())
        ids, mask = self.ids[index], self.mask[index]
        return replace(self, samples=samples, ids=ids, mask=mask, found={}, _drawn={})


class Intervention(ABC):
    """A change of a forward pass."""

    name: str

    @property
    @abstractmethod
    def first_layer(self) -> int | None:
        """The first layer that it changes; None where it changes nothing."""

    @property
    def kind(self) -> str:
        """Interventions of one kind hook the same points, so that they run well in one pass."""
        return type(self).__name__

    @property
    def everywhere(self) -> bool:
        """Whether its hooks read z of the last layer at all positions, not at the last one."""
        return False

    @abstractmethod
    def hooks(self, rows: Rows) -> list[Hook]:
        """The hooks that change a pass over these rows."""


def stack_hooks(parts: Sequence[Sequence[Hook]]) -> list[Hook]:
    """Hooks of a pass whose rows are [part, batch]: every part's hooks act on its own rows."""
    by_point: dict[str, list[list[Any]]] = {}
    for number, hooks in enumerate(parts):
        for name, function in hooks:
            by_point.setdefault(name, [[] for _ in parts])[number].append(function)
    return [(name, _on_slices(functions)) for name, functions in by_point.items()]


def _on_slices(functions: Sequence[Sequence[Any]]) -> Callable[[Tensor, Any], Tensor | None]:
    def edit(x: Shaped[Tensor, "row ..."], hook: Any) -> Tensor | None:
        before = x.chunk(len(functions)) if len(functions) > 1 else (x,)
        after = [apply(chain, part, hook) for chain, part in zip(functions, before, strict=True)]
        if all(new is old for new, old in zip(after, before, strict=True)):
            return None
        return torch.cat(after) if len(after) > 1 else after[0]

    return edit


def apply(functions: Sequence[Any], x: Tensor, hook: Any = None) -> Tensor:
    """x after every function in turn; a function that returns None has read it only."""
    for function in functions:
        new = function(x, hook)
        x = x if new is None else new
    return x
