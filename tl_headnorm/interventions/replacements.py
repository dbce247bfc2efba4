"""Reference activations for mean, resample and Gaussian ablation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.data.batches import batches_in_order
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Reference:
    """Of every head's z over the reference tokens: mean, std, mean by position, and a bank.

    The bank holds z at random reference tokens, the same tokens for every layer and head.
    """

    mean: Float[Tensor, "layer head d_head"]
    std: Float[Tensor, "layer head d_head"]
    by_position: Float[Tensor, "layer pos head d_head"]
    bank: Float[Tensor, "layer entry head d_head"]
    n_samples: int


def by_token(
    z: dict[int, Tensor], mask: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "layer token head d_head"], Int[Tensor, " token"]]:
    """z of the real tokens of a batch, and each token's position in its sequence."""
    real = mask.bool()
    stacked = torch.stack([z[layer][real].double() for layer in sorted(z)])
    return stacked, (mask.cumsum(1) - 1)[real]


@torch.inference_mode()
def gather_reference(
    model: Model,
    samples: Sequence[Encoded],
    *,
    batch_size: int = 8,
    padding_side: str = "right",
    bank_size: int = 512,
    seed: int = 0,
) -> Reference:
    """Mean, std, mean by position and a random bank of z over the reference samples."""
    longest = max(len(sample) for sample in samples)
    info = model.info
    shape = (info.n_layers, longest, info.n_heads, info.d_head)
    total = torch.zeros(shape, dtype=torch.float64, device=model.device)
    squares = torch.zeros_like(total[:, 0])
    seen = torch.zeros(longest, dtype=torch.float64, device=model.device)
    chosen = _draw([len(sample) for sample in samples], bank_size, seed)
    bank, done = [], 0
    for batch in batches_in_order(samples, batch_size, padding_side):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        tokens, position = by_token(model.engine.run_z(ids, mask).z, mask)
        total.index_add_(1, position, tokens)
        squares += (tokens**2).sum(1)
        seen += torch.bincount(position, minlength=longest)
        wanted = chosen[(chosen >= done) & (chosen < done + tokens.shape[1])] - done
        bank.append(tokens[:, torch.from_numpy(wanted).to(model.device)])
        done += tokens.shape[1]
    mean = total.sum(1) / seen.sum()
    variance = (squares / seen.sum() - mean**2).clamp_min(0)
    positions = total / seen.clamp_min(1)[:, None, None]
    return Reference(mean, variance.sqrt(), positions, torch.cat(bank, 1), len(samples))


def _draw(lengths: Sequence[int], bank_size: int, seed: int) -> np.ndarray:
    """Sorted numbers of the tokens that enter the bank."""
    n_tokens = sum(lengths)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(n_tokens, size=min(bank_size, n_tokens), replace=False))


def replacement(
    method: str,
    layer: int,
    samples: Sequence[Encoded],
    mask: Int[Tensor, "batch pos"],
    reference: Reference | None,
    seed: int = 0,
) -> Float[Tensor, "#batch #pos #head #d_head"]:
    """The replacement of z in one layer, broadcastable to [batch, pos, head, d_head].

    Random draws go by (seed, sample, layer), so neither batches nor padding change them, and
    all heads' variants of one sample see the same draw.
    """
    if method == "zero":
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=mask.device)
    assert reference is not None, f"{method} needs reference samples"
    if method == "mean":
        return reference.mean[layer][None, None]
    order = (mask.cumsum(1) - 1).clamp_min(0)
    if method == "mean_position":
        table = reference.by_position[layer]
        found = table[order.clamp_max(len(table) - 1)]
        # Beyond the longest reference sample there is no mean of that position.
        known = (order < len(table))[:, :, None, None]
        return torch.where(known, found, reference.mean[layer])
    rows = [
        _random(
            method, layer, sample, reference, np.random.default_rng([seed, sample.index, layer])
        )
        for sample in samples
    ]
    width = max(len(row) for row in rows)
    padded = torch.stack(
        [torch.nn.functional.pad(row, (0, 0, 0, 0, 0, width - len(row))) for row in rows]
    )
    index = order.clamp_max(width - 1)[:, :, None, None].expand(-1, -1, *padded.shape[2:])
    return padded.gather(1, index)


def _random(
    method: str, layer: int, sample: Encoded, reference: Reference, rng: np.random.Generator
) -> Float[Tensor, "pos head d_head"]:
    n_heads, d_head = reference.mean.shape[1:]
    device = reference.mean.device
    if method == "gaussian":
        noise = torch.from_numpy(rng.standard_normal((len(sample), n_heads, d_head)))
        return reference.mean[layer] + reference.std[layer] * noise.to(device)
    bank = reference.bank[layer]
    entries = torch.from_numpy(rng.integers(len(bank), size=(len(sample), n_heads))).to(device)
    return bank[entries, torch.arange(n_heads, device=device)]
