"""Does it follow the instruction? Answers written plainly, steered, and with texts forced in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_headnorm.commands.steer.prompts import Ready
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.interventions.constrained_decoding import MustInclude
from tl_headnorm.interventions.generation import Generated, Step, eos_ids, generate
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.steering import Steering, weight_on
from tl_headnorm.model.loading import Model
from tl_headnorm.stats import wilson


@dataclass(frozen=True)
class Way:
    """A way of generating: plain, steered by a boost, or with must_include forced in."""

    name: str
    steering: Steering
    constrained: bool = False


@dataclass(frozen=True)
class Answer:
    """One continuation; `weights[t]` is the attention to the keywords when token t was chosen.

    The weight is the sum over the keywords' tokens, the mean over the chosen heads. `asked` is
    the number of texts that must appear: where it is 0 there is nothing to hit or to miss.
    """

    prompt: str
    way: str
    distracted: bool
    seed: int
    text: str
    weights: list[float]
    steps: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    asked: int = 0

    @property
    def hit(self) -> bool | None:
        return not self.missing if self.asked else None


def ways_of(name: str, heads: Any, settings: SteerSettings) -> list[Way]:
    """Plain, every boost but 1, and constrained."""
    steered = [
        Way(f"steered x{boost:g}", Steering(name, heads, boost))
        for boost in settings.boosts
        if boost != 1
    ]
    plain = Steering(name, heads, 1.0)
    return [Way("plain", plain), *steered, Way("constrained", plain, constrained=True)]


def missing_texts(text: str, needed: Sequence[str]) -> list[str]:
    """Those that do not stand in the text, upper and lower case alike."""
    return [phrase for phrase in needed if phrase.casefold() not in text.casefold()]


def write_answers(
    model: Model, ready: Sequence[Ready], ways: Sequence[Way], settings: SteerSettings,
    progress: Any = None,
) -> list[Answer]:  # fmt: skip
    """Every prompt, every way, every seed; rows of a batch are written side by side.

    A row draws from its own seed, so the same seed stands for the same luck in every way.
    """
    n_seeds = settings.seeds if settings.temperature > 0 else 1
    rows = [(one, settings.seed + i) for one in ready for i in range(n_seeds)]
    found = []
    for way in ways:
        if way.constrained:
            chosen = [(one, seed) for one, seed in rows if one.prompt.must_include]
        else:
            chosen = rows
        for start in range(0, len(chosen), settings.batch_size):
            part = chosen[start : start + settings.batch_size]
            found += _write(model, part, way, settings)
            if progress is not None:
                progress.update(len(part))
    return found


def _write(
    model: Model, rows: Sequence[tuple[Ready, int]], way: Way, settings: SteerSettings
) -> list[Answer]:
    ready = [one for one, _ in rows]
    samples = [Encoded(i, one.tokens.ids) for i, one in enumerate(ready)]
    batch = Rows.pad(model, samples, "left")
    spans = {i: one.span for i, one in enumerate(ready)}
    steering = replace(way.steering, spans=spans, queries=settings.queries)
    watch = KeywordWatch(steering, steering.span(batch))
    hooks = [] if steering.first_layer is None else steering.hooks(batch)
    written = generate(
        model, batch.ids, batch.mask, max_new_tokens=settings.generate,
        temperature=settings.temperature, seed=[seed for _, seed in rows],
        hooks=[*hooks, *watch.hooks()],
        on_step=_constraint(batch, ready, settings) if way.constrained else None,
    )  # fmt: skip
    return _answers(model, rows, way, written, watch.weights())


def _constraint(
    batch: Rows, ready: Sequence[Ready], settings: SteerSettings
) -> Callable[[Step], Tensor]:
    processor = MustInclude(
        batch.model.tokenizer, [list(one.prompt.must_include) for one in ready],
        prompt_length=batch.ids.shape[1], max_new_tokens=settings.generate,
        eos=eos_ids(batch.model), least=settings.must_include_least,
    )  # fmt: skip
    return lambda step: processor(step.ids, step.logits)


class KeywordWatch:
    """The attention of each pass's last query to the span, mean over the steering's heads."""

    def __init__(self, steering: Steering, span: Tensor) -> None:
        self.steering, self.span = steering, span
        self.seen: dict[int, list[Tensor]] = {}

    def hooks(self) -> list[Hook]:
        layers = sorted({layer for layer, _ in self.steering.heads})
        return [(hook_names.pattern(layer), self._reader(layer)) for layer in layers]

    def _reader(self, layer: int) -> Any:
        heads = [head for at, head in self.steering.heads if at == layer]

        def read(pattern: Tensor, hook: Any) -> None:
            total = weight_on(pattern[:, heads, -1], self.span).sum(1)
            self.seen.setdefault(layer, []).append(total.cpu())

        return read

    def weights(self) -> np.ndarray:
        """[row, step]."""
        layers = [torch.stack(steps, 1) for steps in self.seen.values()]
        return (torch.stack(layers).sum(0) / len(self.steering.heads)).numpy()


def _answers(
    model: Model, rows: Sequence[tuple[Ready, int]], way: Way, written: Generated,
    weights: np.ndarray,
) -> list[Answer]:  # fmt: skip
    found = []
    for (one, seed), new, weight in zip(rows, written.rows(), weights, strict=True):
        text = continuation(model.tokenizer, one.tokens.ids, new)
        values = weight[: len(new)].tolist()
        found.append(
            Answer(
                one.prompt.id, way.name, one.distracted, seed, text, values,
                steps_of(model.tokenizer, one.tokens.ids, new, values),
                missing_texts(text, one.prompt.must_include),
                len(one.prompt.must_include),
            )
        )  # fmt: skip
    return found


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The generated text, with its leading spaces."""
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(tokenizer.decode(list(prompt), skip_special_tokens=True)) :]


def steps_of(
    tokenizer: Any, prompt: Sequence[int], new: Sequence[int], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """The answer line by line, with each line's mean attention to the keywords.

    A line is what a reader of a stepwise answer would call a step; a line of spaces alone is none.
    """
    steps: list[dict[str, Any]] = []
    begin, known = 0, continuation(tokenizer, prompt, [])
    for stop in range(1, len(new) + 1):
        text = continuation(tokenizer, prompt, new[:stop])
        line = text[len(known) :].lstrip()
        if "\n" not in line and stop < len(new):
            continue
        line = line.rstrip()
        if line:
            mean = float(np.mean(weights[begin:stop]))
            steps.append({"text": line, "tokens": stop - begin, "keyword_weight": mean})
            begin = stop
            known = text
    return steps


def agreement(texts: Sequence[str]) -> float:
    """Mean over pairs of |A & B| / |A | B| of their words (Jaccard); NaN for fewer than two."""
    sets = [set(text.casefold().split()) for text in texts]
    pairs = [
        len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(sets, 2)
    ]  # fmt: skip
    return float(np.mean(pairs)) if pairs else float("nan")


def hit_agreement(hits: Sequence[bool]) -> float:
    """Share of pairs of seeds that both hit or both miss; NaN for fewer than two."""
    pairs = [a == b for a, b in combinations(hits, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def prompts_table(answers: Sequence[Answer], ways: Sequence[Way]) -> pd.DataFrame:
    """prompts.parquet: a row per prompt, way and distraction; prompt `all` is over all prompts.

    `hit_rate`: share of the `n_asked` answers of prompts with must_include that hold all of it;
    NaN without one. Wilson's interval takes the answers for independent.
    """
    boosts = {way.name: way.steering.boost for way in ways}
    groups: dict[tuple[str, str, bool], list[Answer]] = {}
    for answer in answers:
        for prompt in (answer.prompt, "all"):
            groups.setdefault((prompt, answer.way, answer.distracted), []).append(answer)
    rows = []
    for (prompt, way, distracted), group in groups.items():
        hits = _hits(group)
        low, high = wilson(sum(hits), len(hits)) if hits else (np.nan, np.nan)
        by_prompt: dict[str, list[Answer]] = {}
        for answer in group:
            by_prompt.setdefault(answer.prompt, []).append(answer)
        each = list(by_prompt.values())
        rows.append(
            {
                "prompt": prompt, "way": way, "boost": boosts[way], "distracted": distracted,
                "n_answers": len(group), "n_asked": len(hits),
                "hit_rate": float(np.mean(hits)) if hits else np.nan, "hit_low": low,
                "hit_high": high,
                "agreement": _mean(agreement([a.text for a in g]) for g in each),
                "hit_agreement": _mean(hit_agreement(_hits(g)) for g in each),
                "keyword_weight": _mean(np.mean(a.weights) for a in group if a.weights),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _hits(group: Sequence[Answer]) -> list[bool]:
    return [not answer.missing for answer in group if answer.asked]


def _mean(values: Any) -> float:
    known = [float(v) for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
