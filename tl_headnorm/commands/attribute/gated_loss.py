"""The loss as a function of the gates, and its gradient, for rows of gates in bounded batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import SHARE, auto_batch_tokens, free_bytes, halving_on_oom
from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import Start, Tail
from tl_headnorm.interventions.cached_run import CachedRun
from tl_headnorm.interventions.gates import Base, GateRows, gate_hooks
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.metrics import Letters, Loss
from tl_headnorm.interventions.runner import Values, run
from tl_headnorm.model.loading import Model
from tl_headnorm.settings import Settings

# Beyond this a batch gains nothing more on a CPU and leaves its caches (measured).
CPU_TOKENS = 2048


def batch_tokens(model: Model, bound: int | str, loss: Loss) -> int:
    """Padded tokens per pass with a graph: it holds every layer's activations until the backward
    pass, and a loss over the whole vocabulary its logits."""
    if bound != "auto":
        return int(bound)
    tokens = auto_batch_tokens(model) // model.info.n_layers
    if not isinstance(loss, Letters):
        logits = int(SHARE * free_bytes(model.device)) // (16 * model.tl.cfg.d_vocab)
        tokens = min(tokens, logits)
    return max(256, min(tokens, CPU_TOKENS) if model.device.type == "cpu" else tokens)


class GatedLoss:
    """A model with a loss, whose heads carry gates. Weights are frozen."""

    def __init__(self, model: Model, loss: Loss, settings: Settings) -> None:
        model.tl.requires_grad_(False)
        self.model, self.loss = model, loss
        self.most = batch_tokens(model, settings.max_batch_tokens, loss)
        self.settings = settings.updated(max_batch_tokens=self.most)
        self.dtype = torch.promote_types(model.tl.cfg.dtype, torch.float32)
        self.n_layers, self.n_heads = model.info.n_layers, model.info.n_heads

    def ones(self, rows: int) -> GateRows:
        shape = (rows, self.n_layers, self.n_heads)
        return torch.ones(shape, dtype=self.dtype, device=self.model.device)

    def batches(self, items: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """Every item once, longest first, at most the settings' prompts and tokens."""
        ordered = sorted(items, key=len, reverse=True)
        while ordered:
            fits = max(1, min(self.settings.batch_size, self.most // len(ordered[0])))
            yield ordered[:fits]
            ordered = ordered[fits:]

    def rows(self, items: Sequence[Encoded]) -> Rows:
        return Rows.pad(self.model, items, self.settings.padding_side)

    @torch.no_grad()
    def clean(self, items: Sequence[Encoded]) -> CachedRun:
        """The run with all gates at 1, from whose layers runs with other gates start."""
        layers = range(self.n_layers)
        return CachedRun(self.rows(items), starts=layers, last_only=self.loss.last_only)

    @torch.no_grad()
    def clean_loss(self, clean: CachedRun) -> Float[np.ndarray, " batch"]:
        return self.loss.loss(clean.rows, clean.resid).double().cpu().numpy()

    def run(
        self,
        items: Sequence[Encoded],
        interventions: Sequence[Intervention],
        *,
        base: Intervention | None = None,
        chained: bool = False,
        progress: str | None = None,
    ) -> Values:
        """The loss of every item under every intervention, by the runner."""
        return run(
            self.model, items, interventions, self.loss, settings=self.settings, base=base,
            chained=chained, progress=progress,
        )  # fmt: skip

    @torch.no_grad()
    def z(self, items: Sequence[Encoded]) -> tuple[dict[int, Tensor], Tensor]:
        """z of every layer and position, and the mask."""
        rows = self.rows(items)
        return self.model.engine.run_z(rows.ids, rows.mask).z, rows.mask

    def _pass(
        self, clean: CachedRun, index: Int[np.ndarray, " row"], gates: GateRows,
        layers: Iterable[int], first: int, base: Base | None,
    ) -> Float[Tensor, " row"]:  # fmt: skip
        at = torch.as_tensor(index, device=self.model.device)
        rows = clean.rows.at(at)
        own = None if base is None else {k: b if len(b) == 1 else b[at] for k, b in base.items()}
        resid = clean.restart(gate_hooks(gates, layers, own, rows.last), first, at)
        return self.loss.loss(rows, resid)

    def off_losses(self, clean: CachedRun, base: Base | None) -> Float[np.ndarray, " batch"]:
        """Loss of every item with all heads off.

        No position then sees another: with the same base at all of them, a loss that reads the
        last position runs that one alone.
        """
        rows, layers = clean.rows, range(self.n_layers)
        same = base is None or all(value.shape[1] == 1 for value in base.values())
        if not (self.loss.last_only and same) or self._by_position:
            return self.losses(clean, np.arange(len(rows)), self.ones(len(rows)) * 0, layers,
                               base=base)  # fmt: skip
        ids = take_position(rows.ids, rows.last)
        first = torch.zeros_like(rows.last)
        hooks = gate_hooks(self.ones(1) * 0, layers, base, first)
        with torch.no_grad():
            tail = Tail(first, z_everywhere=False, resid=True)
            resid = self.model.engine.run(Start(ids), torch.ones_like(ids), hooks, tail=tail)
            return self.loss.loss(rows, resid).double().cpu().numpy()

    @property
    def _by_position(self) -> bool:
        """Whether a token's vector depends on where it stands, heads or no heads."""
        return self.model.tl.cfg.positional_embedding_type != "rotary"

    def losses(
        self, clean: CachedRun, index: Int[np.ndarray, " row"], gates: GateRows,
        layers: Iterable[int], *, first: int = 0, base: Base | None = None,
    ) -> Float[np.ndarray, " row"]:  # fmt: skip
        """Loss of item index[i] under gates[i]; no autograd graph."""
        layers = list(layers)

        @torch.no_grad()
        def part(rows: range) -> Tensor:
            at = slice(rows.start, rows.stop)
            return self._pass(clean, index[at], gates[at], layers, first, base)

        return self._chunked(len(index), clean, part)

    def gradients(
        self, clean: CachedRun, index: Int[np.ndarray, " row"], gates: GateRows,
        layers: Iterable[int], *, first: int = 0, base: Base | None = None,
    ) -> Float[np.ndarray, "row layer head"]:  # fmt: skip
        """d loss / d gate of item index[i] at gates[i], 0 outside `layers`.

        One backward of the rows' sum: rows do not meet, so it holds every row's own gradient. No
        graph is made below the first gate.
        """
        layers = list(layers)

        @torch.enable_grad()
        def part(rows: range) -> Tensor:
            at = slice(rows.start, rows.stop)
            own = gates[at].detach().requires_grad_()
            total = self._pass(clean, index[at], own, layers, first, base).sum()
            return torch.autograd.grad(total, own)[0]

        return self._chunked(len(index), clean, part)

    def _chunked(
        self, n_rows: int, clean: CachedRun, part: Callable[[range], Tensor]
    ) -> np.ndarray:
        """The results of all rows, in passes of at most `most` tokens; what fails is halved."""
        width = clean.rows.ids.shape[1]
        size = max(1, self.most // width)
        found = [
            result.double().cpu().numpy()
            for start in range(0, n_rows, size)
            for _, result in halving_on_oom(range(n_rows)[start : start + size], part, width)
        ]
        return np.concatenate(found)
