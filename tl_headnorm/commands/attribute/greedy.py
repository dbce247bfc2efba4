"""Sequential leave-one-out: the reference that pruning orders are held against."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tl_headnorm.commands.attribute.gated_loss import Engine, bundles
from tl_headnorm.commands.attribute.leave_one_out import without_each
from tl_headnorm.commands.attribute.losses import Item
from tl_headnorm.interventions.gates import Base

# The reference runs unasked up to this many heads, in so many rounds.
MOST_HEADS, ROUNDS = 64, 8


def rounds_of(asked: int | None, n_heads: int) -> int:
    """Rounds to run: as asked, at most one per head; unasked, a few in a small model."""
    if asked is None:
        asked = ROUNDS if n_heads <= MOST_HEADS else 0
    return min(asked, n_heads)


def greedy_order(
    engine: Engine,
    items: Sequence[Item],
    rounds: int,
    *,
    most: bool,
    batch_size: int,
    base: Base | None = None,
    progress: bool = False,
) -> Int[np.ndarray, " n"]:
    """Heads by flat index in the order they go, each time the one that costs least (or most).

    Every round measures the mean loss with one more head off, for every head left, given those
    off already, and removes an even share of the heads. With a round per head that is N (N + 1) / 2
    evaluations of N heads; with R rounds about N (R + 1) / 2. A head's evaluation starts at its
    layer: about (L + 1) / (2 L) of a forward pass. Single leave-one-out ranks heads once and is
    blind to heads that stand in for each other; this is not. It is greedy all the same, so no
    proof that no better order exists.
    """
    on = np.ones((engine.n_layers, engine.n_heads), dtype=bool)
    order: list[int] = []
    word = "most" if most else "least"
    for left in tqdm(range(rounds, 0, -1), disable=not progress, desc=f"greedy, {word} first"):
        cost = _mean_loss(engine, items, on, batch_size, base).ravel()
        heads = np.flatnonzero(on)
        ranked = heads[np.argsort(-cost[heads] if most else cost[heads], kind="stable")]
        gone = ranked[: -(-len(heads) // left)]
        order += gone.tolist()
        on.ravel()[gone] = False
    return np.array(order)


def _mean_loss(
    engine: Engine,
    items: Sequence[Item],
    on: Bool[np.ndarray, "layer head"],
    batch_size: int,
    base: Base | None,
) -> Float[np.ndarray, "layer head"]:
    """Mean loss over the items with one more head off, NaN at those that are off."""
    gates = torch.as_tensor(on, dtype=engine.dtype, device=engine.model.device)[None]
    total = np.zeros(on.shape)
    for bundle in bundles(engine, items, batch_size, gates, base):
        total += without_each(engine, bundle, on, base).sum(0)
    return total / len(items)
