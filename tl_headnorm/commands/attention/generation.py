"""Attention during generation: one row of the pattern per new token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.data.spans import TokenText, token_labels
from tl_headnorm.interventions.generation import generate
from tl_headnorm.interventions.heads import Heads
from tl_headnorm.interventions.patterns import at_last_query
from tl_headnorm.model.loading import Model


@dataclass(frozen=True)
class Writing:
    """A continuation, and what chosen heads attended to when each of its tokens was chosen.

    `weights[i, t, k]` is head i's attention from the last position before new token t to token
    k: row t has n_prompt + t entries that sum to 1, the rest is NaN. `labels` name all tokens,
    the prompt's first.
    """

    heads: Heads
    weights: Float[np.ndarray, "head step pos"]
    labels: list[str]
    n_prompt: int
    text: str

    def on(self, keys: Sequence[int]) -> Float[np.ndarray, "head step"]:
        """Each head's summed weight on some tokens of the prompt, per new token."""
        return np.nansum(self.weights[:, :, list(keys)].astype(np.float64), axis=2)


def write(
    model: Model,
    tokens: TokenText,
    heads: Heads,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Writing:
    """Let the model go on after the prompt; keeps one row per step and chosen head, float16.

    Row t is the pattern of the position that says new token t: the same as the last query of
    transformers' `generate(output_attentions=True).attentions[t]`.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    rows: dict[tuple[int, int], list[np.ndarray]] = {pair: [] for pair in heads}

    def take(layer: int, pattern: Tensor) -> None:
        for head, row in zip(by_layer[layer], pattern.float().cpu().numpy(), strict=True):
            rows[layer, head].append(row.astype(np.float16))

    ids = torch.tensor([tokens.ids])
    written = generate(
        model, ids, torch.ones_like(ids), max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, seed=seed,
        hooks=[at_last_query(layer, chosen, take) for layer, chosen in by_layer.items()],
    )  # fmt: skip
    new = written.rows()[0]
    grid = np.full((len(heads), len(new), len(tokens) + len(new)), np.nan, np.float16)
    for i, pair in enumerate(heads):
        for t, row in enumerate(rows[pair]):
            grid[i, t, : len(row)] = row
    labels = token_labels(model.tokenizer, [*tokens.ids, *new])
    text = model.tokenizer.decode([*tokens.ids, *new], skip_special_tokens=True)
    before = model.tokenizer.decode(list(tokens.ids), skip_special_tokens=True)
    return Writing(heads, grid, labels, len(tokens), text[len(before) :])
