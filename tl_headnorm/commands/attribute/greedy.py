"""Sequential leave-one-out: the reference that pruning orders are held against."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.leave_one_out import without_each
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.gates import Base

# The reference runs unasked up to this many heads, in so many rounds.
MOST_HEADS, ROUNDS = 64, 8


def rounds_of(asked: int | None, n_heads: int) -> int:
    """Rounds to run: as asked, at most one per head; unasked, a few in a small model."""
    if asked is None:
        asked = ROUNDS if n_heads <= MOST_HEADS else 0
    return min(asked, n_heads)


def greedy_order(
    gated: GatedLoss,
    items: Sequence[Encoded],
    rounds: int,
    *,
    most: bool,
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
    on = np.ones((gated.n_layers, gated.n_heads), dtype=bool)
    order: list[int] = []
    for left in range(rounds, 0, -1):
        word = f"greedy, {'most' if most else 'least'} first, {left} rounds left"
        losses = without_each(gated, items, on, base, word if progress else None)
        cost = losses.mean(0).ravel()
        heads = np.flatnonzero(on)
        ranked = heads[np.argsort(-cost[heads] if most else cost[heads], kind="stable")]
        gone = ranked[: -(-len(heads) // left)]
        order += gone.tolist()
        on.ravel()[gone] = False
    return np.array(order)
