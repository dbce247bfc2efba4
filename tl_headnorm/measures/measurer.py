"""One batch: every measure of every head, and each prompt's predicted option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.data.batches import Batch, make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import SHARE, auto_batch_tokens, free_bytes
from tl_headnorm.engine.protocol import Prefix, Tail
from tl_headnorm.errors import InputError
from tl_headnorm.measures import (
    NORMS,
    READS,
    LayerActivations,
    Measure,
    Weights,
    contribution_factor,
    last_real_position,
    ratio,
    sum_over_tokens,
    take_position,
)
from tl_headnorm.model.loading import Model

# Bytes per entry of a pattern at its widest: scores, weights, and what a measure makes of them.
PATTERN_BYTES = 24


@dataclass(frozen=True)
class MeasureOptions:
    """Measurement options: aggregation, batching, prefix caching."""

    token_agg: str = "last"
    exclude_first_token: bool = False
    padding_side: str = "right"
    batch_size: int = 8
    max_batch_tokens: int | str = "auto"
    score: bool = False
    share_prefix: bool = True
    sort: bool = True
    measures: tuple[Measure, ...] = NORMS
    # Position of the right option by sample index, for measures that read `answer`.
    answers: Sequence[int] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Hook points that the measures need, z last."""
        found = {name for measure in self.measures for name in measure.reads}
        return tuple(name for name in reversed(READS) if name in found and name != "answer")

    @property
    def everywhere(self) -> bool:
        """Whether all queries are computed, or the last one alone."""
        looked_at = {"pattern", "v"} & set(self.reads)
        return bool(looked_at) or any(not m.at_last(self.token_agg) for m in self.measures)

    @property
    def final_scale(self) -> bool:
        return any(measure.final_scale for measure in self.measures)


Factors = Mapping[int, Tensor]


@dataclass(frozen=True)
class Found:
    """One batch's results: values by measure, each prompt's option, layers that did not fire."""

    values: dict[str, Float[np.ndarray, "batch layer head"]]
    predicted: Int[np.ndarray, " batch"]
    missing: tuple[int, ...]


def factors_of(model: Model) -> dict[int, Float[Tensor, "head k d_head"]]:
    """The contribution factor of every layer."""
    layers = range(model.info.n_layers)
    return {layer: contribution_factor(model.engine.W_O(layer)) for layer in layers}


def most_tokens(model: Model, options: MeasureOptions, longest: int) -> int:
    """Padded tokens per pass: the setting, or what fits; a pattern takes `longest` per token."""
    if options.max_batch_tokens != "auto":
        return int(options.max_batch_tokens)
    most = auto_batch_tokens(model)
    if "pattern" in options.reads:
        per_token = PATTERN_BYTES * model.info.n_heads * longest
        most = min(most, int(SHARE * free_bytes(model.device)) // per_token)
    return max(most, 1)


class Measurer:
    """Measures batches of one group of prompts; the shared prefix is run once, here."""

    def __init__(
        self, model: Model, factors: Factors, options: MeasureOptions, prefix: Sequence[int]
    ) -> None:
        self.model, self.options = model, options
        self.weights = {
            layer: Weights(model.engine.W_O(layer), model.engine.b_O(layer), factor)
            for layer, factor in factors.items()
        }
        # Per measure and layer (sum, count) over the prefix: constants of every prompt.
        self.before: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.prefix: Prefix | None = None
        if prefix:
            whole = any(not m.at_last(options.token_agg) for m in options.measures)
            self.prefix = model.engine.run_prefix(prefix, reads=options.reads if whole else (),
                on_layer=self._on_prefix_layer if whole else lambda layer, read: None,
            )  # fmt: skip

    def _on_prefix_layer(self, layer: int, read: dict[str, Tensor]) -> None:
        z = read.pop("z")
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        activations = LayerActivations(z, real, real.cumsum(1) - 1, real, self.weights[layer], read)
        for measure in self.options.measures:
            if not measure.at_last(self.options.token_agg):
                counted = measure.counted(activations, self.options.exclude_first_token)
                values = measure.compute(activations)
                self.before[measure.name, layer] = sum_over_tokens(values, counted)

    def __call__(self, samples: Sequence[Encoded]) -> Found:
        """Every measure of every head for prompts of the group, and each one's predicted option.

        One batch. A layer whose hook did not fire is NaN. Only [batch, layer, head] numbers leave
        the device.
        """
        model, options = self.model, self.options
        skip = len(self.prefix) if self.prefix else 0
        batch = make_batch(samples, options.padding_side, skip=skip)
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        last = last_real_position(mask)
        tail = Tail(last, options.everywhere, options.score or options.final_scale)
        answer = self._answer(batch) if any("answer" in m.reads for m in options.measures) else None
        columns: dict[str, dict[int, Tensor]] = {measure.name: {} for measure in options.measures}

        def on_layer(layer: int, read: dict[str, Tensor]) -> None:
            if answer is not None:
                read["answer"] = answer
            for name, values in self.of_layer(layer, read, mask, last).items():
                columns[name][layer] = values

        resid = model.engine.run_layers(
            ids, mask, on_layer, reads=options.reads, prefix=self.prefix, tail=tail
        )
        layers = range(model.info.n_layers)
        missing = tuple(i for i in layers if any(i not in c for c in columns.values()))
        nothing = torch.full((len(mask), model.info.n_heads), torch.nan, device=model.device)
        nothing = nothing.to(self.weights[0].factor.dtype)
        scale = model.engine.final_scale(resid[:, 0]) if options.final_scale else None
        values = {}
        for measure in options.measures:
            found = [columns[measure.name].get(layer, nothing) for layer in layers]
            column = torch.stack(found, dim=1).double()
            if measure.final_scale and scale is not None:
                column = column / scale[:, None, None]
            values[measure.name] = column.cpu().numpy()
        guesses = _predict(model, batch, resid[:, 0]) if options.score else None
        return Found(values, np.full(len(batch), -1) if guesses is None else guesses, missing)

    def of_layer(
        self, layer: int, read: dict[str, Tensor], mask: Tensor, last: Tensor
    ) -> dict[str, Float[Tensor, "batch head"]]:
        """Every measure of one layer, from its activations at this pass's tokens."""
        activations = self._activations(layer, read, mask, last)
        found = {}
        for measure in self.options.measures:
            per_token = measure.compute(activations)
            found[measure.name] = self._over_tokens(measure, layer, per_token, activations, last)
        return found

    def _activations(
        self, layer: int, read: dict[str, Tensor], mask: Tensor, last: Tensor
    ) -> LayerActivations:
        """One layer's activations at all queries, or at the last one alone."""
        before = len(self.prefix) if self.prefix else 0
        real, place = mask.bool(), mask.cumsum(1) - 1 + before
        keys = torch.nn.functional.pad(real, (before, 0), value=True)
        if not self.options.everywhere:
            read = {k: _at(v, last) if k != "answer" else v for k, v in read.items()}
            real, place = take_position(real, last), take_position(place, last)
        elif self.prefix and "v" in read:
            read["past_v"] = self.model.engine.prefix_values(self.prefix, layer)
        return LayerActivations(read.pop("z"), real, place, keys, self.weights[layer], read)

    def _over_tokens(
        self,
        measure: Measure,
        layer: int,
        per_token: Tensor,
        activations: LayerActivations,
        last: Tensor,
    ) -> Float[Tensor, "batch head"]:
        """One number of the values per token: the last, a mean, or their ratio."""
        at_last = (take_position(per_token, last) if self.options.everywhere else per_token)[:, 0]
        if measure.at_last(self.options.token_agg):
            return at_last
        counted = measure.counted(activations, self.options.exclude_first_token)
        total, count = sum_over_tokens(per_token, counted)
        if (measure.name, layer) in self.before:
            earlier, number = self.before[measure.name, layer]
            total, count = total + earlier, count + number
        if measure.tokens == "last_to_all":
            return ratio(at_last, total / count)
        return total / count  # NaN where nothing is counted

    def _answer(self, batch: Batch) -> Float[Tensor, "batch d_model"]:
        """The direction of every prompt's answer."""
        if self.options.answers is None or any(len(s.letter_ids) < 2 for s in batch.samples):
            raise InputError(
                "measures: expected prompts with an answer's letter for direct_logit, found none; "
                "use --score_answers true, or leave it out"
            )
        device = self.model.device
        letters, counts = _letters(batch, device)
        answers = torch.tensor(
            [self.options.answers[s.index] for s in batch.samples], device=device
        )
        return self.model.engine.answer_directions(letters, counts, answers)


def _at(x: Tensor, last: Tensor) -> Tensor:
    """x at the last position; the last block may have computed no other."""
    return take_position(x, last) if x.shape[1] > 1 else x


def _letters(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the letters [batch, option], and each prompt's number of options.

    Rows with fewer options repeat their first letter.
    """
    width = max(len(sample.letter_ids) for sample in batch.samples)
    padded = [s.letter_ids + s.letter_ids[:1] * (width - len(s.letter_ids)) for s in batch.samples]
    counts = torch.tensor([len(s.letter_ids) for s in batch.samples], device=device)
    return torch.tensor(padded, device=device), counts


def _predict(
    model: Model, batch: Batch, resid: Float[Tensor, "batch d_model"]
) -> Int[np.ndarray, " batch"]:
    """Position of the option whose letter has the largest next-token logit."""
    letter_ids, counts = _letters(batch, model.device)
    # Repeats are left out by position: their logits may differ from the first one's by a
    # rounding, and argmax would take them.
    beyond = torch.arange(letter_ids.shape[1], device=model.device) >= counts[:, None]
    logits = model.engine.token_logits(resid, letter_ids).masked_fill(beyond, -torch.inf)
    return logits.argmax(dim=1).cpu().numpy()
