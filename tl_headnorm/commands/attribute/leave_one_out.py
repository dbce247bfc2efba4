"""Methods that switch heads off for real: exact leave-one-out, and Shapley values."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.methods import Context, Scores
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.gates import Base, Gates


def without_each(
    gated: GatedLoss,
    items: Sequence[Encoded],
    on: Bool[np.ndarray, "layer head"],
    base: Base | None,
    progress: str | None = None,
) -> Float[np.ndarray, "item layer head"]:
    """Loss with one more head off, each on its own; NaN at the heads that are off already."""
    heads = np.argwhere(on)
    each = []
    for layer, head in heads.tolist():
        gates = gated.ones(1)[0]
        gates[layer, head] = 0
        each.append(Gates(f"{layer}.{head}", gates, base))
    off = None
    if not on.all():
        now = torch.as_tensor(on, dtype=gated.dtype, device=gated.model.device)
        off = Gates("off already", now, base)
    values = np.full((len(items), *on.shape), np.nan)
    found = gated.run(items, each, base=off, progress=progress)["loss"][1:]
    values[:, heads[:, 0], heads[:, 1]] = found.T
    return values


def loo(context: Context) -> Scores:
    """f(1) - f(head off), every head on its own: the truth that the estimates are held against.

    What it cannot tell: heads that stand in for each other look useless one by one.
    """
    gated = context.gated
    on = np.ones((gated.n_layers, gated.n_heads), dtype=bool)
    without = without_each(gated, context.items, on, context.base)
    values = context.clean_loss[:, None, None] - without
    return context.scores(values, context.off_loss(context.settings.baseline))


def players_of(kind: str, n_layers: int, n_heads: int) -> list[list[tuple[int, int]]]:
    """Every player's (layer, head) pairs."""
    by_layer = [[(layer, head) for head in range(n_heads)] for layer in range(n_layers)]
    return by_layer if kind == "layers" else [[pair] for pairs in by_layer for pair in pairs]


def shapley(context: Context) -> Scores:
    """Shapley values by permutation sampling: the mean gain of a head that joins in any order.

    Every permutation telescopes, so the heads' sum is f(1) - f(all off) at any number of them;
    each is used with its reverse, which lowers the variance. A batch shares its permutations, so
    that a head's joining recomputes only the layers from its own on. With layers as players a
    layer's value is spread evenly over its heads.

    1 draw permutations  2 run each as a chain: all heads off, then one player more at a time
    3 a player's gain is the loss with it less the loss before it.
    """
    settings, gated = context.settings, context.gated
    players = players_of(settings.shapley_players, gated.n_layers, gated.n_heads)
    generator = np.random.default_rng([settings.seed, context.seed])
    n = len(context.items)
    pairs = np.zeros((settings.shapley_pairs, n, gated.n_layers, gated.n_heads))
    for pair in range(settings.shapley_pairs):
        # 1
        order = generator.permutation(len(players))
        for direction in (order, order[::-1]):
            # 2
            joining = [players[player] for player in direction]
            chain = coalitions(gated, joining, context.base)
            losses = gated.run(context.items, chain, chained=True)["loss"][1:]
            # 3
            for player, gain in zip(joining, np.diff(losses, axis=0), strict=True):
                for layer, head in player:
                    pairs[pair, :, layer, head] += gain / len(player) / 2
    values = pairs.mean(0)
    found = context.scores(values, losses[0], steps=2 * settings.shapley_pairs)
    return Scores(values, found.total, found.error, found.scale, found.steps, _noise(pairs))


def coalitions(
    gated: GatedLoss, joining: Sequence[Sequence[tuple[int, int]]], base: Base | None
) -> list[Gates]:
    """All heads off, then every player's heads on in turn; each from the layer that changes."""
    gates = gated.ones(1)[0] * 0
    chain = [Gates("all off", gates.clone(), base, since=0)]
    for player in joining:
        for layer, head in player:
            gates[layer, head] = 1
        first = min(layer for layer, _ in player)
        chain.append(Gates("one more", gates.clone(), base, since=first))
    return chain


def _noise(pairs: Float[np.ndarray, "pair batch layer head"]) -> Float[np.ndarray, "layer head"]:
    """Sampling variance of the batch's sum: samples share permutations, so pairs are the unit."""
    n_pairs = len(pairs)
    if n_pairs < 2:
        return np.full(pairs.shape[2:], np.nan)
    return pairs.sum(1).var(0, ddof=1) / n_pairs
