"""Numbers that say what kind of pattern a head has, each beside that of a uniform head."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.interventions.patterns import read_patterns
from tl_headnorm.model.loading import Model

# Of a prompt's own patterns; those of REPEATED are taken on repeated random tokens.
OF_PROMPT = ("first_token", "previous_token", "local", "entropy")
REPEATED = ("induction", "duplicate_token")
SCORES = (*OF_PROMPT, *REPEATED)
WORDS = {
    "first_token": "attention to the first token (sink)",
    "previous_token": "attention to the previous token",
    "local": "attention to the nearest tokens",
    "entropy": "entropy (nats)",
    "induction": "induction, on repeated random tokens",
    "duplicate_token": "same token earlier, on repeated random tokens",
}
MOST_DISTANCES = 128


def uniform_pattern(n_tokens: int) -> Float[Tensor, "1 q k"]:
    """A causal head that attends alike to all it may see: row q is 1/(q + 1) up to q."""
    seen = torch.ones(n_tokens, n_tokens, dtype=torch.float64).tril()
    return (seen / seen.sum(1, keepdim=True))[None]


def prompt_scores(
    pattern: Float[Tensor, "head q k"], window: int
) -> dict[str, Float[Tensor, " head"]]:
    """Scores of one prompt's patterns (real tokens only), float64; NaN where no query counts.

    - first_token: mean over q >= 1 of pattern[q, 0]. The first query, which can see nothing
      else, does not count. A uniform head has (H_T - 1)/(T - 1), H_T the harmonic number.
    - previous_token: mean over q >= 1 of pattern[q, q - 1].
    - local: mean over q >= window of the weight on the `window` tokens that end at the query.
    - entropy: mean over q >= 1 of -sum_k p log p, nats; a uniform head has mean log(q + 1).

    A high score says where a head looks, not that what it finds there matters.
    Sources: Xiao et al. 2023 (sinks), Olsson et al. 2022 (previous tokens).
    """
    p = pattern.double()
    n = p.shape[1]
    near = torch.ones(n, n, dtype=p.dtype, device=p.device).tril().triu(1 - window)
    later = p[:, 1:]
    return {
        "first_token": later[:, :, 0].mean(1),
        "previous_token": p.diagonal(-1, 1, 2).mean(1),
        "local": (p * near).sum(2)[:, window:].mean(1),
        "entropy": torch.special.entr(later).sum(2).mean(1),
    }  # fmt: skip


def distance_profile(
    pattern: Float[Tensor, "head q k"], most: int = MOST_DISTANCES
) -> Float[Tensor, "head distance"]:
    """Mean over queries q >= d of pattern[q, q - d], for d = 0, 1, ... (at most `most`)."""
    p = pattern.double()
    reach = min(p.shape[1], most)
    return torch.stack([p.diagonal(-d, 1, 2).mean(1) for d in range(reach)], 1)


def repeated_scores(pattern: Float[Tensor, "head q k"], first: int) -> dict[str, Tensor]:
    """induction and duplicate_token [head] of a sequence whose tokens from `first` on are R R.

    With L the length of R, mean over the queries q of the second R of pattern[q, q - (L - 1)]
    (the token after the query's earlier occurrence) and of pattern[q, q - L] (that occurrence
    itself). Source: Olsson et al. 2022; the stripe is TransformerLens' demos' diagonal of offset
    1 - L, without its first entry, which belongs to the first R.
    """
    p = pattern.double()
    length = (p.shape[1] - first) // 2
    queries = torch.arange(first + length, p.shape[1], device=p.device)
    return {
        "induction": p[:, queries, queries - (length - 1)].mean(1),
        "duplicate_token": p[:, queries, queries - length].mean(1),
    }


def repeated_tokens(
    model: Model, length: int, n_sequences: int, seed: int, prepend_bos: bool
) -> tuple[Int[Tensor, "batch pos"], int]:
    """Sequences [BOS] R R of random ordinary tokens, and the position at which R begins.

    No token stands twice in R where the vocabulary allows it.
    """
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    size = model.engine.cfg.d_vocab if model.tokenizer is None else len(model.tokenizer)
    ordinary = torch.tensor(
        [i for i in range(min(size, model.engine.cfg.d_vocab)) if i not in special]
    )
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n_sequences):
        order = torch.randperm(len(ordinary), generator=draw)[:length]
        if len(ordinary) < length:
            order = torch.randint(len(ordinary), (length,), generator=draw)
        rows.append(ordinary[order].repeat(2))
    ids = torch.stack(rows)
    bos = getattr(model.tokenizer, "bos_token_id", None) if prepend_bos else None
    if bos is None:
        return ids, 0
    return torch.cat([torch.full((n_sequences, 1), bos), ids], 1), 1


def measure_repeated(
    model: Model,
    layers: Sequence[int],
    *,
    length: int = 50,
    n_sequences: int = 4,
    seed: int = 0,
    prepend_bos: bool = True,
) -> tuple[dict[str, Float[Tensor, "layer head"]], dict[str, float]]:
    """Induction and duplicate-token scores on repeated random tokens; and a uniform head's."""
    ids, first = repeated_tokens(model, length, n_sequences, seed, prepend_bos)
    ids = ids.to(model.device)
    found: dict[int, dict[str, Tensor]] = {}

    def take(layer: int, pattern: Tensor) -> None:
        each = [repeated_scores(row, first) for row in pattern]
        found[layer] = {
            name: torch.stack([e[name] for e in each]).mean(0).cpu() for name in REPEATED
        }

    read_patterns(model.engine, ids, torch.ones_like(ids), layers, take)
    grids = {name: torch.stack([found[layer][name] for layer in layers]) for name in REPEATED}
    uniform = repeated_scores(uniform_pattern(ids.shape[1]), first)
    return grids, {name: float(value[0]) for name, value in uniform.items()}
