"""Metrics of a run: the answer's letter, the next token of a text, the largest activations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.engine.protocol import Hook
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.cached_run import at_last
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.magnitudes import largest

# By name, a value (or an array) of every run and row.
ByName = dict[str, Float[Tensor, "run batch ..."]]
Resid = Float[Tensor, "batch resid_pos d_model"]


class Metric(ABC):
    """Numbers of the runs of a batch, from the residual after the last block."""

    @abstractmethod
    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        """Its values by name, and their shape for one run of one row."""

    @property
    def last_only(self) -> bool:
        """Whether it reads the residual at the last real token alone, [batch, 1, d_model]."""
        return True

    def hooks(self, rows: Rows) -> list[Hook]:
        """Readers that it needs during the pass; what they read goes into `rows.found`."""
        return []

    @abstractmethod
    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        """Values of every run and row; `clean` is the clean run's residual."""


class Loss(Metric):
    """A metric with a loss that is differentiable with respect to the residual."""

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {"loss": ()}

    @abstractmethod
    def loss(self, rows: Rows, resid: Resid) -> Float[Tensor, " batch"]:
        """The loss of every row, in float32 or wider."""

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        each = [self.loss(rows, x) for rows, x in zip(runs, resid, strict=True)]
        return {"loss": torch.stack(each)}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; entries p gives no mass to count nothing."""
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), p.new_zeros(()))
    return terms.sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


@dataclass(frozen=True)
class Letters(Loss):
    """The answer distribution: softmax over the options' letters at the last token.

    loss is -log p(right letter), correct whether it is the largest, kl that of the clean
    distribution to this one. `answers` holds the right option by sample index.
    """

    answers: Sequence[int] | Mapping[int, int]

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {"correct": (), "loss": (), "kl": ()}

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        logp = torch.stack([self.logp(rows, x) for rows, x in zip(runs, resid, strict=True)])
        right = self._answers(runs[0])
        at = right.expand(len(logp), -1)[:, :, None]
        return {
            "correct": (logp.argmax(2) == right).to(logp.dtype),
            "loss": -logp.gather(2, at)[:, :, 0],
            "kl": _kl(self.logp(runs[0], clean).expand_as(logp), logp),
        }

    def loss(self, rows: Rows, resid: Resid) -> Float[Tensor, " batch"]:
        return -self.logp(rows, resid).gather(1, self._answers(rows)[:, None])[:, 0]

    def _answers(self, rows: Rows) -> Tensor:
        return torch.tensor([self.answers[s.index] for s in rows.samples], device=rows.ids.device)

    def logp(self, rows: Rows, resid: Resid) -> Float[Tensor, "batch option"]:
        """log p of every option's letter; -inf beyond a question's own options."""
        letters = [s.letter_ids for s in rows.samples]
        widths = torch.tensor([len(ids) for ids in letters], device=resid.device)
        width = max(len(ids) for ids in letters)
        padded = [ids + ids[:1] * (width - len(ids)) for ids in letters]
        tokens = torch.tensor(padded, device=resid.device)
        logits = rows.model.engine.token_logits(at_last(resid, rows.last)[:, 0], tokens)
        absent = torch.arange(width, device=resid.device) >= widths[:, None]
        return log_softmax(logits.masked_fill(absent, -torch.inf))


@dataclass(frozen=True)
class NextTokens(Metric):
    """The distribution over the vocabulary at every token of a text.

    loss is the mean negative log-likelihood of a sequence's tokens after its first, kl the mean
    over the same places of the clean distribution to this one; nothing is right or wrong.
    """

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {"correct": (), "loss": (), "kl": ()}

    @property
    def last_only(self) -> bool:
        return False

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        """One sequence at a time, so that only one [pos, vocab] table and the clean one exist."""
        engine, batch = runs[0].model.engine, runs[0]
        loss = torch.zeros(len(runs), len(batch), dtype=torch.float64, device=clean.device)
        kl = torch.zeros_like(loss)
        for row, sample in enumerate(batch.samples):
            places = batch.mask[row].bool().nonzero().flatten()[:-1]
            ids = torch.tensor(sample.ids[1:], device=clean.device)
            base = log_softmax(engine.logits(clean[row : row + 1, places])[0])
            for run, x in enumerate(resid):
                logp = log_softmax(engine.logits(x[row : row + 1, places])[0])
                loss[run, row] = -logp.gather(1, ids[:, None]).double().mean()
                kl[run, row] = _kl(base, logp).double().mean()
        return {"correct": torch.full_like(loss, torch.nan), "loss": loss, "kl": kl}


@dataclass(frozen=True)
class Profile(Metric):
    """The largest entries of the residual after every block, [run, batch, layer].

    top1, top2, top3, median of |x| over real tokens and dimensions, and pos and dim of the
    largest. With another metric, its values as well.
    """

    other: Metric | None = None
    columns = ("top1", "top2", "top3", "median", "pos", "dim")

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        own: dict[str, tuple[int, ...]] = dict.fromkeys(self.columns, (n_layers,))
        return own | (self.other.shapes(n_layers, n_heads) if self.other else {})

    @property
    def last_only(self) -> bool:
        return self.other is None or self.other.last_only

    def hooks(self, rows: Rows) -> list[Hook]:
        def read(layer: int, resid: Tensor) -> None:
            found = largest(resid, rows.mask)
            each = [*found.top.T, found.median, found.pos, found.dim]
            rows.found[f"largest {layer}"] = torch.stack([x.double() for x in each], -1)

        readers = edits.read_resid(range(rows.model.info.n_layers), True, read)
        return readers + (self.other.hooks(rows) if self.other else [])

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        layers = [f"largest {layer}" for layer in range(runs[0].model.info.n_layers)]
        found = torch.stack([torch.stack([r.found[x] for x in layers], 1) for r in runs])
        values = self.other(runs, resid, clean) if self.other else {}
        return values | dict(zip(self.columns, found.unbind(-1), strict=True))
