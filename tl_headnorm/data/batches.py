"""Padded batches with explicit masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_headnorm.data.tokens import Encoded


@dataclass(frozen=True)
class Batch:
    """Token ids and mask (1 on real tokens); row i is the prompt `samples[i]`."""

    samples: tuple[Encoded, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.samples)


def make_batch(samples: Sequence[Encoded], padding_side: str, pad_id: int = 0) -> Batch:
    """Pad to the longest prompt. The pad id is never seen: the mask covers it."""
    width = max(len(sample) for sample in samples)
    ids = torch.full((len(samples), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        place = slice(0, len(sample)) if padding_side == "right" else slice(-len(sample), None)
        ids[row, place] = torch.tensor(sample.ids)
        mask[row, place] = 1
    return Batch(tuple(samples), ids, mask)


def batches_in_order(
    samples: Sequence[Encoded], batch_size: int, padding_side: str
) -> Iterator[Batch]:
    """Batches of `batch_size` in the order given."""
    for start in range(0, len(samples), batch_size):
        yield make_batch(samples[start : start + batch_size], padding_side)
