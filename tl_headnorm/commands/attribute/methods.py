"""Methods by gradients of the loss with respect to gates.

Cost per sample, in passes of the whole model (F forward, B backward), L layers, K steps:

    grad_x_act, michel, atp_zero   1 F + 1 B together
    atp_mean, atp_corrupted        1 F + 1 B each; atp_corrupted 1 F more for the other prompt
    ig_joint, ig_path              K F + K B each (+ 2 F for the ends)
    ig_layer                       about K (L+1)/2 (F + B): layer l starts from its own z
    loo                            about N (L+1)/(2L) F for N heads in all, a layer's stacked
    shapley                        2 pairs * N (L+1)/(2L) F (players layers: (L+1)/2 instead)
    rollout                        1 F with all attention patterns

Doubling the steps runs 2K, 4K, ... more for the samples that need it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.interventions.cached_run import CachedRun
from tl_headnorm.interventions.gates import Base

Heads = Float[np.ndarray, "batch layer head"]
PerSample = Float[np.ndarray, " batch"]


@dataclass(frozen=True)
class Scores:
    """One method on one batch.

    `total` is what the heads' scores should sum to (NaN: no claim), `error` the worst amount by
    which they do not, `scale` what it is relative to: the larger of the two end losses.
    """

    values: Heads
    total: PerSample
    error: PerSample
    scale: PerSample
    steps: Int[np.ndarray, " batch"]
    # Sampling variance of the sum over the batch, where a method draws at random.
    noise: Float[np.ndarray, "layer head"] | None = None


def joined(parts: Sequence[Scores], order: Int[np.ndarray, " sample"]) -> Scores:
    """The scores of several batches as one; sample i is the order[i]-th of them all."""
    columns = ("values", "total", "error", "scale", "steps")
    whole = {name: np.concatenate([getattr(p, name) for p in parts])[order] for name in columns}
    noise = [part.noise for part in parts if part.noise is not None]
    return Scores(**whole, noise=np.sum(noise, axis=0) if noise else None)


@dataclass
class Context:
    """One batch of samples, the settings, and what several methods use."""

    gated: GatedLoss
    items: Sequence[Encoded]
    settings: AttributeSettings
    mean: Base | None = None
    corrupted: Base | None = None
    seed: int = 0
    _at_one: dict[str, Heads] = field(default_factory=dict)
    _off: dict[str, PerSample] = field(default_factory=dict)

    @cached_property
    def clean(self) -> CachedRun:
        """The run with all gates at 1, which the other runs start from."""
        return self.gated.clean(self.items)

    @cached_property
    def clean_loss(self) -> PerSample:
        return self.gated.clean_loss(self.clean)

    @property
    def base(self) -> Base | None:
        return self.mean if self.settings.baseline == "mean" else None

    @property
    def rows(self) -> Int[np.ndarray, " batch"]:
        return np.arange(len(self.items))

    @property
    def layers(self) -> range:
        return range(self.gated.n_layers)

    def at_one(self, kind: str) -> Heads:
        """d loss / d gate with all gates at 1, towards zero, the mean or the other prompt."""
        if kind not in self._at_one:
            base = {"zero": None, "mean": self.mean, "corrupted": self.corrupted}[kind]
            assert kind == "zero" or base is not None
            gates = self.gated.ones(len(self.items))
            self._at_one[kind] = self.gated.gradients(
                self.clean, self.rows, gates, self.layers, base=base
            )
        return self._at_one[kind]

    @cached_property
    def start_loss(self) -> PerSample:
        """Loss with every gate at the path's start."""
        if self.settings.gate_start == 0:
            return self.off_loss(self.settings.baseline)
        gates = self.gated.ones(len(self.items)) * self.settings.gate_start
        return self.gated.losses(self.clean, self.rows, gates, self.layers, base=self.base)

    def off_loss(self, kind: str) -> PerSample:
        """Loss with every gate at 0, towards the given base."""
        if kind not in self._off:
            base = {"zero": None, "mean": self.mean, "corrupted": self.corrupted}[kind]
            self._off[kind] = self.gated.off_losses(self.clean, base)
        return self._off[kind]

    def scores(
        self,
        values: Heads,
        end: PerSample,
        steps: int = 1,
        sign: int = 1,
        scale: PerSample | None = None,
    ) -> Scores:
        """Scores whose sum should be sign * (f(1) - end)."""
        total = sign * (self.clean_loss - end)
        if scale is None:
            scale = np.maximum(np.abs(self.clean_loss), np.abs(end))
        error = np.abs(values.sum((1, 2)) - total)
        return Scores(values, total, error, scale, np.full(len(total), steps))


def grad_x_act(context: Context) -> Scores:
    """df/dgate at 1 = sum over positions of (z - base) * df/dz: signed, negative is useful.

    Minus the first-order estimate of switching the head off; blind to saturated heads. Its sum
    misses f(1) - f(0) by whatever is not linear; the completeness error says how much.
    """
    kind = context.settings.baseline
    return context.scores(context.at_one(kind), context.off_loss(kind))


def michel(context: Context) -> Scores:
    """|df/dgate| at 1 of every sample (Michel et al. 2019): a size, whose sum claims nothing.

    Where the settings say so, every layer's scores have L2 norm 1.
    """
    values = np.abs(context.at_one("zero"))
    if context.settings.michel_normalise:
        norms = np.linalg.norm(values, axis=2, keepdims=True)
        values = values / np.where(norms > 0, norms, 1)
    nothing = np.full(len(values), np.nan)
    return Scores(values, nothing, nothing, nothing, np.ones(len(values), dtype=int))


def _atp(kind: str) -> Callable[[Context], Scores]:
    def atp(context: Context) -> Scores:
        return context.scores(-context.at_one(kind), context.off_loss(kind), sign=-1)

    atp.__doc__ = f"(z_base - z) * df/dz, base {kind}: estimated loss change, positive is useful."
    return atp


def quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


def path_points(
    steps: int, n_layers: int, start: float, layered: bool
) -> tuple[Float[np.ndarray, "step layer"], Float[np.ndarray, "step layer"]]:
    """Gates along the path and the weight of the gradient there, d gate/dt included.

    joint: gate = a0 + t (1 - a0). layered: gate_l = a0 + t^(1 + l/L) (1 - a0).
    """
    t, weights = quadrature(steps)
    bend = np.arange(n_layers) / n_layers if layered else np.zeros(n_layers)
    gates = start + t[:, None] ** (1 + bend) * (1 - start)
    speed = (1 + bend) * t[:, None] ** bend * (1 - start)
    return gates, weights[:, None] * speed


def _integrate(
    context: Context,
    chosen: Int[np.ndarray, " row"],
    gates: Float[np.ndarray, "step layer"],
    weights: Float[np.ndarray, "step layer"],
    layers: range,
    start_layer: int,
) -> Heads:
    """Sum over steps of weight * gradient for the chosen items; steps and items share batches."""
    gated, n_steps = context.gated, len(gates)
    rows = np.repeat(chosen, n_steps)
    wide = torch.as_tensor(np.tile(gates, (len(chosen), 1)), dtype=gated.dtype)
    alphas = wide.to(gated.model.device)[:, :, None].expand(-1, -1, gated.n_heads)
    found = gated.gradients(
        context.clean, rows, alphas, layers, first=start_layer, base=context.base
    )
    parts = found.reshape(len(chosen), n_steps, *found.shape[1:])
    return np.einsum("bklh,kl->blh", parts, weights)


def _until_complete(
    context: Context,
    integral: Callable[[np.ndarray, int], Heads],
    end: PerSample,
    scale: PerSample | None = None,
) -> Scores:
    """Double the steps of the samples whose sum is off by more than the tolerance."""
    settings, n = context.settings, len(context.items)
    steps, pending = settings.steps, np.arange(n)
    values = np.zeros((n, context.gated.n_layers, context.gated.n_heads))
    used = np.zeros(n, dtype=int)
    while True:
        values[pending] = integral(pending, steps)
        used[pending] = steps
        found = context.scores(values, end, scale=scale)
        pending = np.flatnonzero(found.error > settings.tolerance * found.scale)
        steps *= 2
        if len(pending) == 0 or steps > settings.max_steps:
            return Scores(values, found.total, found.error, found.scale, used)


def _ig_path(layered: bool) -> Callable[[Context], Scores]:
    def integrate(context: Context) -> Scores:
        start, n_layers = context.settings.gate_start, context.gated.n_layers

        def integral(chosen: np.ndarray, steps: int) -> Heads:
            gates, weights = path_points(steps, n_layers, start, layered)
            return _integrate(context, chosen, gates, weights, context.layers, 0)

        return _until_complete(context, integral, context.start_loss)

    return integrate


def ig_layer(context: Context) -> Scores:
    """Only one layer's gates move, the others stay at 1: every layer's sum is complete.

    The sum over all layers is not f(1) - f(0) where layers stand in for each other (an AND gives
    1 and 1). The error is that of the layer that is worst, relative to the largest end loss of
    any layer: a layer that does nothing has two tiny ends, whose rounding is no fault.
    """
    settings, gated = context.settings, context.gated
    n, start = len(context.items), settings.gate_start
    ends = np.stack([_layer_end(context, layer) for layer in context.layers])
    scale = np.maximum(np.abs(context.clean_loss), np.abs(ends).max(0))
    values = np.zeros((n, gated.n_layers, gated.n_heads))
    error, used = np.zeros(n), np.zeros(n, dtype=int)
    for layer in context.layers:
        only = range(layer, layer + 1)

        def integral(chosen: np.ndarray, steps: int, only: range = only) -> Heads:
            alphas, weights = path_points(steps, gated.n_layers, start, layered=False)
            still = np.ones_like(alphas)
            still[:, only] = alphas[:, only]
            return _integrate(context, chosen, still, weights, only, only.start)

        found = _until_complete(context, integral, ends[layer], scale)
        values[:, layer] = found.values[:, layer]
        error, used = np.maximum(error, found.error), np.maximum(used, found.steps)
    return Scores(values, np.full(n, np.nan), error, scale, used)


def _layer_end(context: Context, layer: int) -> PerSample:
    """Loss with one layer's gates at the path's start, the others at 1."""
    gates = context.gated.ones(len(context.items))
    gates[:, layer] = context.settings.gate_start
    return context.gated.losses(
        context.clean, context.rows, gates, [layer], first=layer, base=context.base
    )


GRADIENT_METHODS: dict[str, Callable[[Context], Scores]] = {
    "grad_x_act": grad_x_act,
    "michel": michel,
    "ig_joint": _ig_path(layered=False),
    "ig_path": _ig_path(layered=True),
    "ig_layer": ig_layer,
    "atp_zero": _atp("zero"),
    "atp_mean": _atp("mean"),
    "atp_corrupted": _atp("corrupted"),
}
# Their sums promise f(1) - f(a0) (ig_layer: layer by layer); an error is a fault to warn of.
COMPLETE = ("ig_joint", "ig_path", "ig_layer", "shapley")
