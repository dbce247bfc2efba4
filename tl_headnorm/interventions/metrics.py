"""What an ablation is measured by: the answer's letter, or the next token of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.data.batches import Batch
from tl_headnorm.engine import forward

Values = dict[str, Float[Tensor, "variant batch"]]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; entries p gives no mass to count nothing."""
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), p.new_zeros(()))
    return terms.sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


@dataclass(frozen=True)
class Letters:
    """The answer distribution: softmax over the options' letters at the last token.

    loss is -log p(right letter), correct whether it is the largest, kl that of the clean
    distribution to this one.
    """

    answers: Sequence[int]
    last_only: bool = True

    def __call__(
        self, model: Any, batch: Batch, mask: Tensor, resid: Tensor, clean: Tensor
    ) -> Values:
        """`resid` [variant, batch, 1, d_model], `clean` [batch, 1, d_model]."""
        base = self._logp(model, batch, clean[:, 0])
        found = torch.stack([self._logp(model, batch, rows[:, 0]) for rows in resid])
        right = torch.tensor([self.answers[s.index] for s in batch.samples], device=found.device)
        loss = -found.gather(2, right.expand(len(found), -1)[:, :, None])[:, :, 0]
        return {
            "correct": (found.argmax(2) == right).to(loss.dtype),
            "loss": loss,
            "kl": _kl(base.expand_as(found), found),
        }

    def _logp(self, model: Any, batch: Batch, resid: Tensor) -> Float[Tensor, "batch option"]:
        widths = torch.tensor([len(s.letter_ids) for s in batch.samples], device=resid.device)
        width = int(widths.max())
        padded = [
            s.letter_ids + s.letter_ids[:1] * (width - len(s.letter_ids)) for s in batch.samples
        ]
        logits = forward.letter_logits(model.tl, resid, torch.tensor(padded, device=resid.device))
        absent = torch.arange(width, device=resid.device) >= widths[:, None]
        return _log_softmax(logits.masked_fill(absent, -torch.inf))


@dataclass(frozen=True)
class NextTokens:
    """The distribution over the vocabulary at every token of a text.

    loss is the mean negative log-likelihood of a sequence's tokens after its first, kl the mean
    over the same places of the clean distribution to this one; nothing is right or wrong.
    """

    last_only: bool = False

    def __call__(
        self, model: Any, batch: Batch, mask: Tensor, resid: Tensor, clean: Tensor
    ) -> Values:
        """`resid` [variant, batch, pos, d_model], `clean` [batch, pos, d_model].

        One sequence at a time, so that only one [pos, vocab] table and the clean one exist.
        """
        n_variants, n_rows = resid.shape[:2]
        loss = torch.zeros(n_variants, n_rows, dtype=torch.float64, device=resid.device)
        kl = torch.zeros_like(loss)
        for row in range(n_rows):
            places = mask[row].bool().nonzero().flatten()[:-1]
            ids = torch.tensor(batch.samples[row].ids[1:], device=resid.device)
            base = _log_softmax(forward.logits(model.tl, clean[row : row + 1, places])[0])
            for variant in range(n_variants):
                at = resid[variant, row : row + 1, places]
                logp = _log_softmax(forward.logits(model.tl, at)[0])
                loss[variant, row] = -logp.gather(1, ids[:, None]).double().mean()
                kl[variant, row] = _kl(base, logp).double().mean()
        return {"correct": torch.full_like(loss, torch.nan), "loss": loss, "kl": kl}


@dataclass(frozen=True)
class Nothing:
    """For runs of which only the profile is wanted."""

    last_only: bool = True

    def __call__(
        self, model: Any, batch: Batch, mask: Tensor, resid: Tensor, clean: Tensor
    ) -> Values:
        """No values."""
        return {}
