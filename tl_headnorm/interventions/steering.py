"""Attention steering: the weight of chosen tokens times a factor, at chosen heads (PASTA)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import Heads
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.metrics import ByName, Metric, Resid

Queries = Literal["all", "last"]


@dataclass(frozen=True)
class Steering(Intervention):
    """The attention weights of every sample's span times `boost`, at chosen heads.

    boost b > 1 raises the weights, 0 < b < 1 lowers them, 0 takes them away, 1 changes nothing.
    `spans` are token positions by sample index; `queries` last steers the last token's alone.
    """

    name: str
    heads: Heads
    boost: float
    spans: Mapping[int, Sequence[int]] = field(default_factory=dict, repr=False)
    queries: Queries = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.boost) and self.boost >= 0):
            raise InputError(f"boost: expected 0 or a number above 0, found {self.boost}")

    @property
    def log_boost(self) -> float:
        return math.log(self.boost) if self.boost else -math.inf

    @property
    def first_layer(self) -> int | None:
        return None if self.boost == 1 else min((layer for layer, _ in self.heads), default=None)

    def hooks(self, rows: Rows) -> list[Hook]:
        info = rows.model.info
        table = boosts_of(self, info.n_layers, info.n_heads)
        first_query = rows.last if self.queries == "last" else None
        return steer_hooks(table, self.span(rows), first_query)

    def span(self, rows: Rows) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of each row's span."""
        return span_mask([self.spans[s.index] for s in rows.samples], rows.mask)


def shifted_scores(
    scores: Float[Tensor, "row head q k"],
    log_boost: Float[Tensor, "#row head"],
    span: Bool[Tensor, "row prompt"],
    first_query: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, "row head q k"]:
    """scores + log(boost) on the span's keys: softmax then gives p_k b / sum_j p_j b_j.

    The last query is the last key, so the queries of a cached step are the last `q` of the keys;
    keys past `span` were generated and belong to no span. Queries before `first_query` stay as
    they are, as do masked entries, and queries that see nothing but the span: for them any boost
    is the identity, and with boost 0, the limit, their row would be empty.
    Source: Zhang et al., "Tell Your Model Where to Attend" (PASTA), 2023.
    """
    n_queries, n_keys = scores.shape[2:]
    keys = torch.nn.functional.pad(span, (0, n_keys - span.shape[1]))[:, None, None, :]
    # A bridge masks with the type's lowest number, HookedTransformer with -inf.
    seen = scores > torch.finfo(scores.dtype).min / 2
    where = keys & seen & (seen & ~keys).any(-1, keepdim=True)
    if first_query is not None:
        at = torch.arange(n_keys - n_queries, n_keys, device=scores.device)
        where = where & (at >= first_query[:, None])[:, None, :, None]
    shift = log_boost.to(scores.dtype).to(scores.device)[:, :, None, None]
    return torch.where(where & (shift != 0), scores + shift, scores)


def steer_hooks(
    log_boost: Float[Tensor, "#row layer head"],
    span: Bool[Tensor, "row prompt"],
    first_query: Int[Tensor, " row"] | None = None,
) -> list[Hook]:
    """Hooks that steer every layer with a boost in it; each row has its span and its boosts."""

    def editor(layer: int) -> Callable[[Tensor, Any], Tensor]:
        def edit(scores: Tensor, hook: Any) -> Tensor:
            return shifted_scores(scores, log_boost[:, layer], span, first_query)

        return edit

    layers = (log_boost != 0).any(2).any(0).nonzero().flatten().tolist()
    return [(hook_names.scores(layer), editor(layer)) for layer in layers]


def boosts_of(steering: Steering, n_layers: int, n_heads: int) -> Float[Tensor, "1 layer head"]:
    """log(boost) of every head, 0 where it is not steered; float64, on the host."""
    table = torch.zeros(1, n_layers, n_heads, dtype=torch.float64)
    for layer, head in steering.heads:
        table[0, layer, head] = steering.log_boost
    return table


def span_mask(
    spans: Sequence[Sequence[int]], mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """True at the tokens of each row's span; positions count the row's real tokens from 0."""
    found = torch.zeros_like(mask, dtype=torch.bool)
    starts = mask.argmax(1)
    for row, places in enumerate(spans):
        found[row, [int(starts[row]) + place for place in places]] = True
    return found


@dataclass(frozen=True)
class SpanWeight(Metric):
    """The values of another metric, and `weight`: the last token's attention to the span.

    The sum over the span's tokens, the mean over each steering's own heads. `heads` are all
    heads of the steerings: the patterns of their layers are read in every run, so that steered
    and clean runs take the same path and differ by the steering alone.
    """

    other: Metric
    spans: Mapping[int, Sequence[int]]
    heads: Heads

    def shapes(self, n_layers: int, n_heads: int) -> dict[str, tuple[int, ...]]:
        return {**self.other.shapes(n_layers, n_heads), "weight": ()}

    @property
    def last_only(self) -> bool:
        return self.other.last_only

    def hooks(self, rows: Rows) -> list[Hook]:
        span = span_mask([self.spans[s.index] for s in rows.samples], rows.mask)

        def reader(layer: int) -> Callable[[Tensor, Any], None]:
            def read(pattern: Tensor, hook: Any) -> None:
                at = torch.arange(len(span), device=pattern.device)
                rows.found[f"weight {layer}"] = weight_on(pattern[at, :, rows.last], span)

            return read

        layers = sorted({layer for layer, _ in self.heads})
        return [(hook_names.pattern(layer), reader(layer)) for layer in layers]

    def __call__(self, runs: Sequence[Rows], resid: Sequence[Resid], clean: Resid) -> ByName:
        each = [self._weight(rows) for rows in runs]
        return self.other(runs, resid, clean) | {"weight": torch.stack(each)}

    def _weight(self, rows: Rows) -> Float[Tensor, " batch"]:
        if not isinstance(rows.intervention, Steering):
            return torch.full_like(rows.last, torch.nan, dtype=torch.float64)
        heads = rows.intervention.heads
        return torch.stack([rows.found[f"weight {la}"][:, h] for la, h in heads]).mean(0)


def weight_on(
    weights: Float[Tensor, "row head k"], span: Bool[Tensor, "row prompt"]
) -> Float[Tensor, "row head"]:
    """The weight on the span's keys, in float32 or wider."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    return (weights[:, :, : span.shape[1]].to(wide) * span[:, None, :]).sum(-1)
