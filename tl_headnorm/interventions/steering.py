"""Attention steering: the weight of chosen tokens times a factor, at chosen heads (PASTA).

Like edits.py, this file belongs to the only layer that touches hook points.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_headnorm.data.batches import Batch, make_batch
from tl_headnorm.data.plan import Group, plan_batches
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.memory import auto_batch_tokens
from tl_headnorm.engine.protocol import Hook, Start, Tail
from tl_headnorm.errors import InputError
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.heads import Heads
from tl_headnorm.measures import last_real_position, take_position
from tl_headnorm.model.loading import Model

Queries = Literal["all", "last"]
# A pass that scores [row, head, query, key] is bounded by more than its tokens.
MOST_SCORES = {"cpu": 2**24, "cuda": 2**28}


@dataclass(frozen=True)
class Steering:
    """One way to steer: the boost of the spans' weights, at these heads. boost 1 changes nothing.

    boost b > 1 raises the weights, 0 < b < 1 lowers them, 0 takes them away.
    """

    name: str
    heads: Heads
    boost: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.boost) and self.boost >= 0):
            raise InputError(f"boost: expected 0 or a number above 0, found {self.boost}")

    @property
    def log_boost(self) -> float:
        return math.log(self.boost) if self.boost else -math.inf

    def start(self) -> int | None:
        """The first layer it changes; None where it changes nothing."""
        return None if self.boost == 1 else min((layer for layer, _ in self.heads), default=None)


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
    first_layer: int = 0,
) -> list[Hook]:
    """Hooks that steer every layer with a boost in it; each row has its span and its boosts."""

    def editor(layer: int) -> Callable[[Tensor, Any], Tensor]:
        def edit(scores: Tensor, hook: Any) -> Tensor:
            return shifted_scores(scores, log_boost[:, layer], span, first_query)

        return edit

    layers = (log_boost != 0).any(2).any(0).nonzero().flatten().tolist()
    return [(hook_names.scores(layer), editor(layer)) for layer in layers if layer >= first_layer]


def boosts_of(
    steerings: Sequence[Steering], n_layers: int, n_heads: int
) -> Float[Tensor, "steering layer head"]:
    """log(boost) of every head, 0 where it is not steered; float64, on the host."""
    table = torch.zeros(len(steerings), n_layers, n_heads, dtype=torch.float64)
    for row, steering in enumerate(steerings):
        for layer, head in steering.heads:
            table[row, layer, head] = steering.log_boost
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
class HowSteered:
    """How steered runs are batched, and which queries are steered."""

    batch_size: int = 8
    max_batch_tokens: int | str = "auto"
    padding_side: str = "right"
    queries: Queries = "all"
    share: bool = True


@dataclass
class Steered:
    """Per steering and sample, the clean run first: the readout's values; and weights.

    A weight is the attention of the last token to the span, the sum over its tokens. `weight`
    [steering, sample] is the mean over each steering's own heads; `clean_weight` has every head
    of the layers that are steered, NaN in the others.
    """

    values: dict[str, Float[np.ndarray, "run sample"]]
    weight: Float[np.ndarray, "steering sample"]
    clean_weight: Float[np.ndarray, "sample layer head"]

    def clean_mean(self, heads: Heads) -> Float[np.ndarray, " sample"]:
        """The clean run's weight, mean over some heads."""
        layers, columns = np.array(heads).T
        return self.clean_weight[:, layers, columns].mean(1)


@torch.inference_mode()
def run_steered(
    model: Model,
    samples: Sequence[Encoded],
    spans: Sequence[Sequence[int]],
    steerings: Sequence[Steering],
    readout: Any,
    *,
    how: HowSteered | None = None,
    progress: bool = False,
) -> Steered:
    """The clean run and every steering, over all samples; rows in the samples' order.

    `spans[i]` are the token positions of sample i. Steerings that begin at the same layer are
    stacked along the batch and start there from the clean run's residual. The clean run takes
    the same way through the layers that are steered, so that what differs is the steering.
    """
    how = how or HowSteered()
    n_runs, info = 1 + len(steerings), model.info
    values: dict[str, np.ndarray] = {}
    clean = np.full((len(samples), info.n_layers, info.n_heads), np.nan)
    weight = np.full((len(steerings), len(samples)), np.nan)
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    bound = how.max_batch_tokens
    most = auto_batch_tokens(model) if bound == "auto" else int(bound)
    # A bridge's own mask handling is only relied on where padding cannot come before a token.
    side = how.padding_side if model.engine.starts_late else "right"
    bar = tqdm(total=len(samples) * n_runs, unit="run", disable=not progress, desc="steer")
    for chosen in plan_batches(Group(tuple(samples), 0), how.batch_size, most):
        rows = [row_of[sample.index] for sample in chosen]
        batch = make_batch(chosen, side)
        runs = _SteeredRuns(model, batch, [spans[row] for row in rows], steerings, readout, how)
        for numbers, found, seen in runs:
            for name, value in found.items():
                table = values.setdefault(name, np.full((n_runs, len(samples)), np.nan))
                table[np.ix_(numbers, rows)] = value.double().cpu().numpy()
            for i, number in enumerate(numbers):
                if number == 0:
                    for layer, by_head in seen.items():
                        clean[rows, layer] = by_head[i].cpu().numpy()
                else:
                    own = [seen[la][i, :, head] for la, head in steerings[number - 1].heads]
                    weight[number - 1, rows] = torch.stack(own).mean(0).cpu().numpy()
            bar.update(len(numbers) * len(rows))
    bar.close()
    return Steered(values, weight, clean)


Rows = tuple[list[int], Mapping[str, Tensor], dict[int, Tensor]]


class _SteeredRuns:
    """All runs of one batch: (numbers of the runs, 0 is clean; values; weights) at a time."""

    def __init__(
        self, model: Model, batch: Batch, spans: Sequence[Sequence[int]],
        steerings: Sequence[Steering], readout: Any, how: HowSteered,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.readout, self.how = model, batch, readout, how
        self.steerings = steerings
        self.ids, self.mask = batch.ids.to(model.device), batch.mask.to(model.device)
        self.last = last_real_position(self.mask)
        self.span = span_mask(spans, self.mask)
        self.layers = sorted({layer for s in steerings for layer, _ in s.heads})
        self.share = how.share and model.engine.starts_late
        self.before: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Rows]:
        starts = sorted({s for s in (one.start() for one in self.steerings) if s is not None})
        keep = edits.read_resid(starts if self.share else [], False, self.before.__setitem__)
        clean, seen = self._run(Start(self.ids), 1, keep, 0)
        found = self.readout(self.model, self.batch, self.mask, clean, clean[0])
        same = [0, *(i for i, s in enumerate(self.steerings, 1) if s.start() is None)]
        for number in same:  # nothing changed: the clean run itself, bit for bit
            yield [number], found, seen
        for start, numbers in self._stacks():
            resid, weights = self._steered(start, numbers)
            for layer in seen:
                if layer < start:  # the clean run's
                    weights[layer] = seen[layer].expand(len(numbers), -1, -1)
            changed = self.readout(self.model, self.batch, self.mask, resid, clean[0])
            yield numbers, changed, weights

    def _stacks(self) -> Iterator[tuple[int, list[int]]]:
        """Steerings that begin at the same layer, as many as fit."""
        by_start: dict[int, list[int]] = defaultdict(list)
        for number, steering in enumerate(self.steerings, 1):
            start = steering.start()
            if start is not None:
                by_start[start].append(number)
        n_rows, width = self.batch.ids.shape
        scores = n_rows * self.model.info.n_heads * width**2
        most = max(1, MOST_SCORES.get(self.model.device.type, 2**24) // scores)
        for start, numbers in by_start.items():
            for first in range(0, len(numbers), most):
                yield start, numbers[first : first + most]

    def _steered(self, start: int, numbers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        n, info = len(numbers), self.model.info
        chosen = [self.steerings[number - 1] for number in numbers]
        log_boost = boosts_of(chosen, info.n_layers, info.n_heads)
        changes = steer_hooks(
            log_boost.repeat_interleave(len(self.batch), 0),
            self.span.repeat(n, 1),
            self.last.repeat(n) if self.how.queries == "last" else None,
        )
        begin = Start(self.ids.repeat(n, 1))
        if self.share:
            begin = Start(layer=start, resid=self.before[start].repeat(n, 1, 1))
        return self._run(begin, n, changes, start)

    def _run(
        self, begin: Start, n: int, hooks: Sequence[Hook], first: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The final residual [run, batch, pos, d_model], and weights [run, batch, head]."""
        seen: dict[int, Tensor] = {}
        last, mask = self.last.repeat(n), self.mask.repeat(n, 1)
        tail = Tail(last, False, True) if self.readout.last_only else None
        readers = [
            read_span_weight(layer, self.span.repeat(n, 1), last, seen)
            for layer in self.layers
            if layer >= first
        ]
        resid = self.model.engine.run(begin, mask, [*hooks, *readers], tail=tail)
        if tail is not None and resid.shape[1] > 1:
            resid = take_position(resid, last)
        size = (n, len(self.batch))
        return resid.unflatten(0, size), {k: w.unflatten(0, size) for k, w in seen.items()}


def read_span_weight(
    layer: int,
    span: Bool[Tensor, "row prompt"],
    query: Int[Tensor, " row"],
    into: dict[int, Tensor],
) -> Hook:
    """Put sum over the span of pattern[row, head, query, key] into `into[layer]`, [row, head]."""

    def read(pattern: Tensor, hook: Any) -> None:
        rows = torch.arange(len(query), device=pattern.device)
        into[layer] = weight_on(pattern[rows, :, query], span)

    return hook_names.pattern(layer), read


def weight_on(
    weights: Float[Tensor, "row head k"], span: Bool[Tensor, "row prompt"]
) -> Float[Tensor, "row head"]:
    """The weight on the span's keys, in float32 or wider."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    return (weights[:, :, : span.shape[1]].to(wide) * span[:, None, :]).sum(-1)
