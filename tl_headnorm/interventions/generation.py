"""Writing on after prompts, token by token, with keys and values cached and hooks in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.engine.protocol import Hook
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Step:
    """State before a token is sampled: the rows so far and the logits after them.

    `ids` are prompt (padding included) and new tokens, as in a transformers LogitsProcessor.
    """

    number: int
    ids: Int[Tensor, "batch pos"]
    logits: Float[Tensor, "batch vocab"]


@dataclass(frozen=True)
class Generated:
    """New tokens; `mask` is 1 where a row wrote one (its end-of-text token included)."""

    ids: Int[Tensor, "batch new"]
    mask: Int[Tensor, "batch new"]

    def rows(self) -> list[list[int]]:
        """Every row's new ids, without what stands after its end."""
        return [row[: int(seen.sum())].tolist() for row, seen in zip(self.ids, self.mask)]  # noqa: B905 (as long as each other)


OnStep = Callable[[Step], "Tensor | None"]


@torch.inference_mode()
def generate(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    hooks: Sequence[Hook] = (),
    on_step: OnStep | None = None,
    eos: Sequence[int] | None = None,
) -> Generated:
    """Up to `max_new_tokens` new tokens a row; the prompt runs once, then one token at a time.

    `temperature` 0 takes the likeliest token (ties: the smaller id), as Hugging Face's `generate`
    with `do_sample=False`; above 0 it samples from softmax(logits / temperature), among the
    `top_k` likeliest where that is given. Every row draws from a generator of its own, seeded by
    its entry of `seed` (one number serves all rows), so that what it writes does not depend on
    the rows beside it. A row ends with a token of `eos` (default: the model's own).

    `hooks` are in place at every pass. The first one has all prompt positions, so a pattern is
    [batch, head, pos, pos]; the later ones have one query and all keys so far,
    [batch, head, 1, pos + number]: keys keep their places. `on_step` is called before each
    choice, and may return logits to choose by instead.

    Rows must end in a real token (left padding): raises InputError otherwise, and where the
    result would not fit into the model's context.
    """
    _check(model, ids, mask, max_new_tokens, temperature, top_k)
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor(sorted(eos_ids(model) if eos is None else eos), device=ids.device)
    choose = _Chooser(len(ids), temperature, top_k, seed)
    run = model.engine.cached_pass(len(ids))
    n_prompt, open_rows = ids.shape[1], torch.ones_like(mask[:, 0])
    written = [open_rows[:, None][:, :0]]
    with model.engine.hooks(hooks):
        for number in range(max_new_tokens):
            logits = run(ids if number == 0 else ids[:, -1:], mask)
            if on_step is not None:
                changed = on_step(Step(number, ids, logits))
                logits = logits if changed is None else changed
            new = choose(logits).to(ids.device)
            written.append(open_rows[:, None])
            open_rows = open_rows * ~torch.isin(new, ends)
            ids = torch.cat([ids, new[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if not open_rows.any():
                break
    return Generated(ids[:, n_prompt:], torch.cat(written, 1))


def eos_ids(model: Model) -> list[int]:
    """The tokens that end a text: the model's generation settings, else the tokenizer's."""
    settings = getattr(model.hf, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = getattr(model.tokenizer, "eos_token_id", None)
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token) for token in found]


def _check(
    model: Model, ids: Tensor, mask: Tensor, n_new: int, temperature: float, top_k: int | None
) -> None:
    if ids.shape != mask.shape or (mask.diff(dim=1) < 0).any() or not mask[:, -1:].bool().all():
        raise InputError(
            "mask: expected rows that end in a real token and have their padding before the "
            "first one, found others; pad on the left to generate"
        )
    if n_new < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise InputError(
            f"generate: expected 1 or more new tokens, a temperature of 0 or more and top_k of 1 "
            f"or more, found {n_new}, {temperature} and {top_k}"
        )
    check_room(model, ids.shape[1], n_new)


def check_room(model: Model, n_prompt: int, n_new: int) -> None:
    """Raise InputError where prompt and new tokens do not fit into the model's context."""
    if n_prompt + n_new - 1 > model.n_ctx:  # the last new token is never run
        raise InputError(
            f"generate: expected prompt and new tokens within the context of {model.n_ctx} tokens, "
            f"found {n_prompt} + {n_new}; shorten the prompt or generate fewer"
        )


class _Chooser:
    """Greedy, or one draw per row from the row's own generator, on the host."""

    def __init__(
        self, n_rows: int, temperature: float, top_k: int | None, seed: int | Sequence[int]
    ) -> None:
        seeds = [seed] * n_rows if isinstance(seed, int) else list(seed)
        if len(seeds) != n_rows:
            raise InputError(f"seed: expected one, or {n_rows} (one a row), found {len(seeds)}")
        self.temperature, self.top_k = temperature, top_k
        self.draws = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        if not self.temperature:
            return logits.argmax(dim=-1)
        scores = logits.double().cpu() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        chances = scores.softmax(dim=-1)
        return torch.cat(
            [torch.multinomial(p, 1, generator=g) for p, g in zip(chances, self.draws, strict=True)]
        )
