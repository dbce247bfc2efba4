"""Methods that switch heads off for real: exact leave-one-out, and Shapley values."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from tl_headnorm.commands.attribute.gated_loss import Bundle, Engine
from tl_headnorm.commands.attribute.methods import Context, PerSample, Scores
from tl_headnorm.interventions.gates import Base, Before, run_gated


def without_each(
    engine: Engine, bundle: Bundle, on: Bool[np.ndarray, "layer head"], base: Base | None
) -> Float[np.ndarray, "batch layer head"]:
    """Loss with one more head off, each on its own; NaN at the heads that are off already.

    `bundle` was run with the heads `on`. A layer's heads are stacked along the batch and start
    behind the layer's attention, which no gate of its own changes.
    """
    n = len(bundle)
    values = np.full((n, engine.n_layers, engine.n_heads), np.nan)
    now = torch.as_tensor(on, dtype=engine.dtype, device=engine.model.device)
    for layer in range(engine.n_layers):
        heads = np.flatnonzero(on[layer])
        gates = now.repeat(n * len(heads), 1, 1)
        gates[np.arange(len(gates)), layer, np.tile(heads, n)] = 0
        acting = [layer, *(k for k in range(layer + 1, engine.n_layers) if not on[k].all())]
        found = engine.losses(
            bundle, np.repeat(np.arange(n), len(heads)), gates, acting,
            start_layer=layer, base=base,
        )  # fmt: skip
        values[:, layer, heads] = found.reshape(n, len(heads))
    return values


def loo(context: Context) -> Scores:
    """f(1) - f(head off), every head on its own: the truth that the estimates are held against.

    What it cannot tell: heads that stand in for each other look useless one by one.
    """
    engine, bundle = context.engine, context.bundle
    on = np.ones((engine.n_layers, engine.n_heads), dtype=bool)
    values = bundle.clean[:, None, None] - without_each(engine, bundle, on, context.base)
    return context.scores(values, context.off_loss(context.settings.baseline))


class _Coalition:
    """The heads that are on, and what every layer begins with under them."""

    def __init__(self, context: Context) -> None:
        self.context, self.engine = context, context.engine
        self.gates = self.engine.ones(1) * 0
        self.before: dict[int, Before] = {}
        self.loss = self._run(0)

    def _run(self, layer: int) -> PerSample:
        """Loss of every item, computed from `layer` on."""
        bundle, engine = self.context.bundle, self.engine
        tl, mask = engine.model.tl, bundle.mask
        known = layer > 0 or (layer in self.before and self.before[layer].z is not None)
        start = self.before[layer] if known else bundle.ids
        with torch.no_grad():
            resid, kept = run_gated(
                tl, start, mask, self.gates, self.context.layers,
                start_layer=layer, base=self.context.base, tail=engine.loss.tail(mask),
                keep=range(layer + bool(self.before), engine.n_layers),
            )  # fmt: skip
            loss = engine.loss(tl, resid, mask, bundle.ids, bundle.items)
        self.before.update(kept)
        return loss.double().cpu().numpy()

    def copy(self) -> "_Coalition":
        other = object.__new__(_Coalition)
        other.context, other.engine = self.context, self.engine
        other.gates, other.before, other.loss = self.gates.clone(), dict(self.before), self.loss
        return other

    def join(self, player: Sequence[tuple[int, int]]) -> PerSample:
        """Switch the player's heads on; what the loss gained by it."""
        for layer, head in player:
            self.gates[:, layer, head] = 1
        before, self.loss = self.loss, self._run(min(layer for layer, _ in player))
        return self.loss - before


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
    """
    settings, engine, bundle = context.settings, context.engine, context.bundle
    players = players_of(settings.shapley_players, engine.n_layers, engine.n_heads)
    generator = np.random.default_rng([settings.seed, context.seed])
    shape = (settings.shapley_pairs, len(bundle), engine.n_layers, engine.n_heads)
    pairs = np.zeros(shape)
    empty = _Coalition(context)
    for pair in range(settings.shapley_pairs):
        order = generator.permutation(len(players))
        for direction in (order, order[::-1]):
            coalition = empty.copy()
            for player in direction:
                gain = coalition.join(players[player]) / len(players[player]) / 2
                for layer, head in players[player]:
                    pairs[pair, :, layer, head] += gain
    values = pairs.mean(0)
    found = context.scores(values, empty.loss, steps=2 * settings.shapley_pairs)
    noise = _noise(pairs)
    return Scores(values, found.total, found.error, found.scale, found.steps, noise)


def _noise(pairs: Float[np.ndarray, "pair batch layer head"]) -> Float[np.ndarray, "layer head"]:
    """Sampling variance of the batch's sum: samples share permutations, so pairs are the unit."""
    n_pairs = len(pairs)
    if n_pairs < 2:
        return np.full(pairs.shape[2:], np.nan)
    return pairs.sum(1).var(0, ddof=1) / n_pairs
