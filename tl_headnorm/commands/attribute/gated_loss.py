"""The loss as a function of the gates, and its gradient: rows of gates, bounded batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.commands.attribute.losses import Item, LetterLoss, Loss
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import SHARE, auto_batch_tokens, free_bytes, is_out_of_memory, split
from tl_headnorm.engine.protocol import Tail
from tl_headnorm.interventions.gates import Base, Before, GateRows, run_gated, z_of
from tl_headnorm.measures import take_position
from tl_headnorm.model.loading import Model

# Beyond this a batch gains nothing more on a CPU and leaves its caches (measured).
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Bundle:
    """Padded items, what every layer's gates act on, and the loss: at 1, or at given gates."""

    items: tuple[Item, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    before: dict[int, Before]
    clean: Float[np.ndarray, " batch"]

    def __len__(self) -> int:
        return len(self.items)


def batch_tokens(model: Model, bound: int | str, loss: Loss) -> int:
    """Padded tokens per pass with a graph: a pass keeps every layer's activations for the way
    back, and a loss over the whole vocabulary its logits."""
    if bound != "auto":
        return int(bound)
    tokens = auto_batch_tokens(model) // model.info.n_layers
    if not isinstance(loss, LetterLoss):
        logits = int(SHARE * free_bytes(model.device)) // (16 * model.tl.cfg.d_vocab)
        tokens = min(tokens, logits)
    return max(256, min(tokens, CPU_TOKENS) if model.device.type == "cpu" else tokens)


class Engine:
    """A model with a loss, whose heads carry gates. Weights are frozen."""

    def __init__(self, model: Model, loss: Loss, *, bound: int | str = "auto", side: str = "right"):
        model.tl.requires_grad_(False)
        self.model, self.loss, self.side = model, loss, side
        self.most = batch_tokens(model, bound, loss)
        self.dtype = torch.promote_types(model.tl.cfg.dtype, torch.float32)
        self.n_layers, self.n_heads = model.info.n_layers, model.info.n_heads

    def ones(self, rows: int) -> GateRows:
        shape = (rows, self.n_layers, self.n_heads)
        return torch.ones(shape, dtype=self.dtype, device=self.model.device)

    def _padded(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        batch = make_batch([Encoded(i.index, i.ids) for i in items], self.side)
        return batch.ids.to(self.model.device), batch.mask.to(self.model.device)

    @torch.no_grad()
    def bundle(
        self, items: Sequence[Item], gates: GateRows | None = None, base: Base | None = None
    ) -> Bundle:
        """Pad, run once with all gates at 1 or as given, keep what every layer begins with."""
        ids, mask = self._padded(items)
        rows = self.ones(1) if gates is None else gates
        resid, before = run_gated(
            self.model.tl, ids, mask, rows, moving(rows),
            base=base, tail=self.loss.tail(mask), keep=range(self.n_layers),
        )  # fmt: skip
        clean = self.loss(self.model.tl, resid, mask, ids, items)
        return Bundle(tuple(items), ids, mask, before, clean.double().cpu().numpy())

    @torch.no_grad()
    def z(self, items: Sequence[Item]) -> tuple[dict[int, Tensor], Tensor]:
        """z of every layer and position, and the mask."""
        ids, mask = self._padded(items)
        return z_of(self.model.tl, ids, mask), mask

    @torch.no_grad()
    def predicted(self, bundle: Bundle, gates: GateRows, base: Base | None) -> Any:
        """(loss, chosen option) per item under the same gates, of the letter loss."""
        assert isinstance(self.loss, LetterLoss)
        layers = moving(gates)
        first = min(layers, default=self.n_layers - 1)
        resid, _ = run_gated(
            self.model.tl, self._start(bundle, first), bundle.mask, gates, layers,
            start_layer=first, base=base, tail=self.loss.tail(bundle.mask),
        )  # fmt: skip
        logprobs = self.loss.logprobs(self.model.tl, resid, bundle.items).double().cpu().numpy()
        answers = np.array([item.answer for item in bundle.items])
        return -logprobs[np.arange(len(answers)), answers], logprobs.argmax(1)

    def _start(self, bundle: Bundle, layer: int, at: Tensor | None = None) -> Tensor | Before:
        """Where passes from `layer` on begin, for all items or those at `at`."""
        begin = bundle.before[layer]
        if layer == 0 and begin.z is None:
            return bundle.ids if at is None else bundle.ids[at]
        return begin if at is None else begin.rows(at)

    def _pass(
        self,
        bundle: Bundle,
        rows: Int[np.ndarray, " row"],
        gates: GateRows,
        layers: Iterable[int],
        start_layer: int,
        base: Base | None,
    ) -> Float[Tensor, " row"]:
        at = torch.as_tensor(rows, device=self.model.device)
        mask, ids = bundle.mask[at], bundle.ids[at]
        chosen = None if base is None else {k: _rows(b, at) for k, b in base.items()}
        resid, _ = run_gated(
            self.model.tl, self._start(bundle, start_layer, at), mask, gates, layers,
            start_layer=start_layer, base=chosen, tail=self.loss.tail(mask),
        )  # fmt: skip
        return self.loss(self.model.tl, resid, mask, ids, [bundle.items[r] for r in rows])

    def off_losses(self, bundle: Bundle, base: Base | None) -> Float[np.ndarray, " batch"]:
        """Loss of every item with all heads off.

        No position then sees another: with the same base at all of them, a loss that looks at
        the last position runs that one alone.
        """
        n, tail = len(bundle), self.loss.tail(bundle.mask)
        same = base is None or all(value.shape[1] == 1 for value in base.values())
        layers = range(self.n_layers)
        if tail is None or not same or self.model.tl.cfg.positional_embedding_type != "rotary":
            return self.losses(bundle, np.arange(n), self.ones(n) * 0, layers, base=base)
        ids = take_position(bundle.ids, tail.last)
        mask = torch.ones_like(ids)
        alone = Tail(torch.zeros_like(tail.last), z_everywhere=False, resid=True)
        with torch.no_grad():
            resid, _ = run_gated(
                self.model.tl, ids, mask, self.ones(1) * 0, layers, base=base, tail=alone
            )
            found = self.loss(self.model.tl, resid, mask, ids, bundle.items)
        return found.double().cpu().numpy()

    def losses(
        self,
        bundle: Bundle,
        rows: Int[np.ndarray, " row"],
        gates: GateRows,
        layers: Iterable[int],
        *,
        start_layer: int = 0,
        base: Base | None = None,
    ) -> Float[np.ndarray, " row"]:
        """Loss of item rows[i] under gates[i]; nothing is kept for a way back."""
        layers, out = list(layers), np.empty(len(rows))

        def run(part: slice) -> Tensor:
            with torch.no_grad():
                return self._pass(bundle, rows[part], gates[part], layers, start_layer, base)

        return self._chunked(out, bundle.ids.shape[1], run)

    def gradients(
        self,
        bundle: Bundle,
        rows: Int[np.ndarray, " row"],
        gates: GateRows,
        layers: Iterable[int],
        *,
        start_layer: int = 0,
        base: Base | None = None,
    ) -> Float[np.ndarray, "row layer head"]:
        """d loss / d gate of item rows[i] at gates[i], 0 outside `layers`.

        One backward of the rows' sum: rows do not meet, so it holds every row's own gradient. No
        graph is made below the first gate.
        """
        layers, out = list(layers), np.zeros(gates.shape)

        def run(part: slice) -> Tensor:
            at = gates[part].detach().requires_grad_()
            with torch.enable_grad():
                total = self._pass(bundle, rows[part], at, layers, start_layer, base).sum()
            return torch.autograd.grad(total, at)[0]

        return self._chunked(out, bundle.ids.shape[1], run)

    def _chunked(self, out: np.ndarray, width: int, run: Callable[[slice], Tensor]) -> np.ndarray:
        """Fill `out` by slices of at most `most` tokens; halve those that do not fit."""
        size, rows = max(1, self.most // width), range(len(out))
        pending = deque(rows[i : i + size] for i in range(0, len(out), size))
        while pending:
            part = pending.popleft()
            chosen = slice(part.start, part.stop)
            try:
                out[chosen] = run(chosen).double().cpu().numpy()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                pending.extendleft(reversed(split(part, width, error)))
        return out


def _rows(base: Tensor, at: Tensor) -> Tensor:
    return base if len(base) == 1 else base[at]


def moving(gates: GateRows) -> list[int]:
    """Layers in which some gate is not 1."""
    return (gates != 1).any(2).any(0).nonzero().flatten().tolist()


def batches(engine: Engine, items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """Every item once, longest first, at most `batch_size` prompts and the engine's tokens."""
    ordered = sorted(items, key=len, reverse=True)
    while ordered:
        fits = max(1, min(batch_size, engine.most // len(ordered[0])))
        yield ordered[:fits]
        ordered = ordered[fits:]


def bundles(
    engine: Engine,
    items: Sequence[Item],
    batch_size: int,
    gates: GateRows | None = None,
    base: Base | None = None,
) -> Iterator[Bundle]:
    """The bundle of every batch."""
    for batch in batches(engine, items, batch_size):
        yield engine.bundle(batch, gates, base)
