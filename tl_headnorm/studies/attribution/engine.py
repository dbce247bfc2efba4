"""The loss as a function of the gates, and its gradient: rows of gates, bounded batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.intervene.gates import Base, GateRows, run_gated, z_of
from tl_headnorm.memory import SHARE, auto_batch_tokens, free_bytes, is_out_of_memory
from tl_headnorm.model import Model
from tl_headnorm.studies.attribution.losses import Item, LetterLoss, Loss

# Beyond this a batch gains nothing more on a CPU and leaves its caches (measured).
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Bundle:
    """Padded items, the residual before every layer with all gates at 1, and the loss there."""

    items: tuple[Item, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    resid: dict[int, Tensor]
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
    def bundle(self, items: Sequence[Item]) -> Bundle:
        """Pad, run once with all gates at 1, keep the residual before every layer but the first."""
        ids, mask = self._padded(items)
        keep = range(1, self.n_layers)
        resid, kept = run_gated(
            self.model.tl, ids, mask, self.ones(1), (), tail=self.loss.tail(mask), keep=keep
        )
        clean = self.loss(self.model.tl, resid, mask, ids, items)
        return Bundle(tuple(items), ids, mask, kept, clean.double().cpu().numpy())

    @torch.no_grad()
    def z(self, items: Sequence[Item]) -> tuple[dict[int, Tensor], Tensor]:
        """z of every layer and position, and the mask."""
        ids, mask = self._padded(items)
        return z_of(self.model.tl, ids, mask), mask

    @torch.no_grad()
    def predicted(self, bundle: Bundle, gates: GateRows | None, base: Base | None) -> Any:
        """(loss, chosen option) per item under the same gates, of the letter loss."""
        assert isinstance(self.loss, LetterLoss)
        rows = self.ones(1) if gates is None else gates
        tl, tail = self.model.tl, self.loss.tail(bundle.mask)
        layers = [] if gates is None else moving(rows)
        resid, _ = run_gated(tl, bundle.ids, bundle.mask, rows, layers, base=base, tail=tail)
        logprobs = self.loss.logprobs(tl, resid, bundle.items).double().cpu().numpy()
        answers = np.array([item.answer for item in bundle.items])
        return -logprobs[np.arange(len(answers)), answers], logprobs.argmax(1)

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
        start = bundle.resid[start_layer][at] if start_layer else ids
        chosen = None if base is None else {k: _rows(b, at) for k, b in base.items()}
        resid, _ = run_gated(
            self.model.tl, start, mask, gates, layers,
            start_layer=start_layer, base=chosen, tail=self.loss.tail(mask),
        )  # fmt: skip
        return self.loss(self.model.tl, resid, mask, ids, [bundle.items[r] for r in rows])

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

        def run(part: slice) -> None:
            with torch.no_grad():
                found = self._pass(bundle, rows[part], gates[part], layers, start_layer, base)
            out[part] = found.double().cpu().numpy()

        self._chunked(len(rows), bundle.ids.shape[1], run)
        return out

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

        def run(part: slice) -> None:
            at = gates[part].detach().requires_grad_()
            with torch.enable_grad():
                total = self._pass(bundle, rows[part], at, layers, start_layer, base).sum()
            (found,) = torch.autograd.grad(total, at)
            out[part] = found.double().cpu().numpy()

        self._chunked(len(rows), bundle.ids.shape[1], run)
        return out

    def _chunked(self, n_rows: int, width: int, run: Callable[[slice], None]) -> None:
        """Call `run` on slices of at most `most` tokens; halve those that do not fit."""
        size = max(1, self.most // width)
        pending = deque(slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size))
        while pending:
            part = pending.popleft()
            try:
                run(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                pending.extendleft(reversed(_halves(part, width, error)))


def _rows(base: Tensor, at: Tensor) -> Tensor:
    return base if len(base) == 1 else base[at]


def _halves(part: slice, width: int, error: RuntimeError) -> list[slice]:
    if part.stop - part.start == 1:
        raise InputError(
            f"memory: expected room for one prompt of {width} tokens and its gradient, found too "
            f"little ({first_line(error)}); lower --max_length or use --dtype bf16"
        ) from error
    middle = (part.start + part.stop + 1) // 2
    return [slice(part.start, middle), slice(middle, part.stop)]


def moving(gates: GateRows) -> list[int]:
    """Layers in which some gate is not 1."""
    return (gates != 1).any(2).any(0).nonzero().flatten().tolist()


def bundles(engine: Engine, items: Sequence[Item], batch_size: int) -> Iterator[Bundle]:
    """Every item once, longest first, at most `batch_size` prompts and the engine's tokens."""
    ordered = sorted(items, key=len, reverse=True)
    while ordered:
        fits = max(1, min(batch_size, engine.most // len(ordered[0])))
        yield engine.bundle(ordered[:fits])
        ordered = ordered[fits:]
