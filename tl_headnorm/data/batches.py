"""Padded batches with explicit masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_headnorm.data.tokens import Encoded


@dataclass(frozen=True)
class Batch:
    """Token ids and mask (1 on real tokens); row i is the prompt `samples[i]`.

    Where the prompts share a prefix that was run before, ids and mask are what follows it.
    """

    samples: tuple[Encoded, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.samples)


def make_batch(
    samples: Sequence[Encoded], padding_side: str, *, skip: int = 0, pad_id: int = 0
) -> Batch:
    """Pad to the longest prompt, without the first `skip` tokens of each.

    The mask covers the pad id.
    """
    rows = [sample.ids[skip:] for sample in samples]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), None)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return Batch(tuple(samples), ids, mask)


def batches_in_order(
    samples: Sequence[Encoded], batch_size: int, padding_side: str
) -> Iterator[Batch]:
    """Batches of `batch_size` in the order given."""
    for start in range(0, len(samples), batch_size):
        yield make_batch(samples[start : start + batch_size], padding_side)
