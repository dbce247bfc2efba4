"""All heads on one prompt: scores and thumbnails of each, whole patterns of those asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, UInt8
from torch import Tensor

from tl_headnorm.commands.attention.keywords import Keyword, focus_reader, uniform_weight
from tl_headnorm.commands.attention.scores import (
    OF_PROMPT,
    SCORES,
    distance_profile,
    prompt_scores,
    uniform_pattern,
)
from tl_headnorm.data.spans import TokenText, token_labels
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import Heads, all_heads
from tl_headnorm.interventions.patterns import read_patterns
from tl_headnorm.measures import contribution_factor, resid_contrib_norm
from tl_headnorm.model.loading import Model

BYTES = 2  # of a kept weight, float16
HEADS_AT_ONCE = 4


@dataclass(frozen=True)
class Wanted:
    """Requested patterns: layers, heads with full patterns (None: as many as fit), their memory."""

    layers: tuple[int, ...]
    heads: Heads | None = None
    keep_mb: float = 32.0
    window: int = 8
    thumbnail: int = 40


@dataclass
class Look:
    """One prompt through every head of the layers.

    `run` has the scores and `contribution` (see `contributions`) [layer, head], `profile`
    [layer, head, distance] and, with keywords, `focus` [layer, head, keyword, query]; a uniform
    head's scores are in attrs["uniform"]. `thumbnails` are the largest weight of every block of
    the pattern, `last_rows` every head's attention from the last token. `kept` are whole patterns
    by (layer, head), `means` averages over heads or layers.
    """

    tokens: TokenText
    labels: list[str]
    run: xr.Dataset
    thumbnails: UInt8[np.ndarray, "layer head side side"]
    last_rows: Float[np.ndarray, "layer head k"]
    kept: dict[tuple[int, int], Float[np.ndarray, "q k"]]
    means: dict[str, Float[np.ndarray, "q k"]]
    keywords: Sequence[Keyword] = field(default_factory=tuple)

    @property
    def left_out(self) -> int:
        """Heads of the layers looked at that are not kept whole."""
        return self.run.sizes["layer"] * self.run.sizes["head"] - len(self.kept)


def look(
    model: Model,
    tokens: TokenText,
    wanted: Wanted,
    keywords: Sequence[Keyword] = (),
    queries: Sequence[int] = (),
    factors: Mapping[int, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> Look:
    """One pass; a second one where not every head fits, for the patterns of the foremost heads.

    `scores` are more scores [layer, head], such as those on repeated tokens; see `foremost`.
    Memory is bounded by `keep_mb` and one layer's pattern. Raises InputError where the heads
    asked for do not fit.
    """
    room, with_means = check(model, tokens, wanted)
    every = all_heads(wanted.layers, model.info.n_heads)
    chosen = wanted.heads if wanted.heads is not None else every if len(every) <= room else ()
    reader = _Reader(model, tokens, wanted, keywords, queries, set(chosen), with_means)
    read_patterns(model.engine, *_row(model, tokens), wanted.layers, reader)
    found = reader.finish()
    added = contributions(model, tokens, wanted.layers, factors)
    found.run["contribution"] = ("layer", "head"), added
    for name, grid in (scores or {}).items():
        found.run[name] = ("layer", "head"), grid.numpy()
    if wanted.heads is None and not chosen and room > 0:
        found.kept = patterns_of(model, tokens, sorted(foremost(found.run)[:room]))
    return found


def check(model: Model, tokens: TokenText, wanted: Wanted) -> tuple[int, bool]:
    """Whole patterns there is room for, and whether the means over heads and layers fit beside.

    Raises InputError for a prompt that is too long and for heads that do not fit or are not in
    the layers.
    """
    if len(tokens) > model.n_ctx:
        raise InputError(
            f"prompt: expected at most {model.n_ctx} tokens, the model's context, found "
            f"{len(tokens)}; shorten it"
        )
    outside = [f"{at}.{head}" for at, head in wanted.heads or () if at not in wanted.layers]
    if outside:
        raise InputError(
            f"heads: expected heads of the layers {', '.join(map(str, wanted.layers))}, found "
            f"{outside[0]}; name its layer in --layers too"
        )
    room = int(wanted.keep_mb * 2**20 // (BYTES * len(tokens) ** 2))
    with_means = 2 * _n_means(model, wanted) <= room
    room -= _n_means(model, wanted) if with_means else 0
    if wanted.heads is not None and len(wanted.heads) > room:
        raise InputError(
            f"heads: expected at most {room} patterns of {len(tokens)} tokens in "
            f"{wanted.keep_mb:g} MB, found {len(wanted.heads)}; choose fewer or raise --keep_mb"
        )
    return room, with_means


def contributions(
    model: Model,
    tokens: TokenText,
    layers: Sequence[int],
    factors: Mapping[int, Tensor] | None = None,
) -> Float[np.ndarray, "layer head"]:
    """Mean over the queries q >= 1 of ||z_h W_O^h||_2, what a head adds to the residual stream.

    Beside first_token it tells a sink that adds nothing from one that matters: attention says
    where a head looks, not what it takes from there. `factors` are contribution_factor(W_O).
    """
    z = model.engine.run_z(*_row(model, tokens)).z
    sizes = []
    for layer in layers:
        factor = factors[layer] if factors else contribution_factor(model.engine.W_O(layer))
        norms = resid_contrib_norm(z[layer], factor)[0].double()
        sizes.append(norms[1:].mean(0).cpu().numpy())
    return np.stack(sizes)


def patterns_of(
    model: Model, tokens: TokenText, heads: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Float[np.ndarray, "q k"]]:
    """Whole patterns of some heads, float16."""
    kept: dict[tuple[int, int], np.ndarray] = {}

    def take(layer: int, pattern: Tensor) -> None:
        for at, head in heads:
            if at == layer:
                kept[at, head] = _half(pattern[0, head])

    layers = sorted({layer for layer, _ in heads})
    read_patterns(model.engine, *_row(model, tokens), layers, take)
    return kept


def _row(model: Model, tokens: TokenText) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([tokens.ids], device=model.device)
    return ids, torch.ones_like(ids)


def _n_means(model: Model, wanted: Wanted) -> int:
    return len(wanted.layers) + model.info.n_heads + 1


def _half(pattern: Tensor) -> Float[np.ndarray, "q k"]:
    return pattern.float().cpu().numpy().astype(np.float16)


def foremost(run: xr.Dataset) -> list[tuple[int, int]]:
    """Heads by weight on the first keyword, else in turn the first by each score of the summary."""
    if "focus" in run:
        grids = [run["focus"].isel(keyword=0).mean("query").values]
    else:
        scores = {name: run[name].values for name in SCORES if name in run}
        grids = [-grid if name == "entropy" else grid for name, grid in scores.items()]
    orders = [
        np.argsort(-np.nan_to_num(grid, nan=-np.inf), axis=None, kind="stable") for grid in grids
    ]
    layers, n_heads = run["layer"].values, run.sizes["head"]
    ranked = dict.fromkeys(int(i) for turn in zip(*orders, strict=True) for i in turn)
    return [(int(layers[i // n_heads]), i % n_heads) for i in ranked]


class _Reader:
    """Takes one layer's pattern after the other and keeps only what was asked for."""

    def __init__(
        self, model: Model, tokens: TokenText, wanted: Wanted, keywords: Sequence[Keyword],
        queries: Sequence[int], chosen: set[tuple[int, int]], with_means: bool,
    ) -> None:  # fmt: skip
        self.model, self.tokens, self.wanted, self.chosen = model, tokens, wanted, chosen
        self.keywords, self.queries, self.with_means = keywords, queries, with_means
        self.focus = focus_reader(keywords, queries) if keywords else None
        self.scores: dict[str, list[Tensor]] = {name: [] for name in OF_PROMPT}
        self.profiles: list[Tensor] = []
        self.thumbnails: list[np.ndarray] = []
        self.last_rows: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.kept: dict[tuple[int, int], np.ndarray] = {}
        self.means: dict[str, np.ndarray] = {}
        self.total: Tensor | None = None  # over layers: [head, q, k], or [q, k] without the means

    def __call__(self, layer: int, pattern: Tensor) -> None:
        one = pattern[0].float().to(self.model.device)
        few = one.split(HEADS_AT_ONCE)  # float64 copies of a few heads, not of a layer
        parts = [prompt_scores(part, self.wanted.window) for part in few]
        for name in OF_PROMPT:
            self.scores[name].append(torch.cat([part[name] for part in parts]).cpu())
        self.profiles.append(torch.cat([distance_profile(part) for part in few]).cpu())
        self.thumbnails.append(thumbnails(one, self.wanted.thumbnail))
        self.last_rows.append(_half(one[:, -1]))
        if self.focus is not None:
            self.weights.append(self.focus(one))
        for head in range(len(one)):
            if (layer, head) in self.chosen:
                self.kept[layer, head] = _half(one[head])
        if self.with_means:
            self.means[f"layer {layer}"] = _half(one.mean(0))
        part = one if self.with_means else one.mean(0)
        self.total = part if self.total is None else self.total + part

    def finish(self) -> Look:
        layers, n_heads = list(self.wanted.layers), self.model.info.n_heads
        assert self.total is not None
        mean = self.total / len(layers)
        if self.with_means:
            self.means |= {f"head {h}": _half(mean[h]) for h in range(n_heads)}
        self.means["all heads"] = _half(mean.mean(0) if self.with_means else mean)
        labels = token_labels(self.model.tokenizer, self.tokens.ids)
        return Look(
            self.tokens, labels, self._dataset(), np.stack(self.thumbnails),
            np.stack(self.last_rows), self.kept, self.means, tuple(self.keywords),
        )  # fmt: skip

    def _dataset(self) -> xr.Dataset:
        n, window = len(self.tokens), self.wanted.window
        uniform = {k: float(v[0]) for k, v in prompt_scores(uniform_pattern(n), window).items()}
        run = xr.Dataset(
            {name: (("layer", "head"), torch.stack(v).numpy()) for name, v in self.scores.items()},
            coords={"layer": list(self.wanted.layers), "head": range(self.model.info.n_heads)},
        )
        run["profile"] = ("layer", "head", "distance"), torch.stack(self.profiles).numpy()
        run["uniform_profile"] = "distance", distance_profile(uniform_pattern(n))[0].numpy()
        if self.keywords:
            weights = np.stack(self.weights)  # [layer, keyword, head, query]
            run = run.assign_coords(
                keyword=[k.text for k in self.keywords], query=list(self.queries)
            )
            run["focus"] = ("layer", "head", "keyword", "query"), weights.transpose(0, 2, 1, 3)
            expected = [
                [uniform_weight(k.positions, q) for q in self.queries] for k in self.keywords
            ]
            run = run.assign_coords(uniform=(("keyword", "query"), expected))
        return run.assign_attrs(uniform=uniform, n_tokens=n, window=window)


def thumbnails(
    pattern: Float[Tensor, "head q k"], side: int
) -> UInt8[np.ndarray, "head side side"]:
    """Patterns as pictures of at most `side` cells: the largest weight of each block.

    255 times the square root, so that thin stripes and small weights can be seen.
    """
    step = -(-pattern.shape[1] // side)
    small = torch.nn.functional.max_pool2d(pattern[:, None].float(), step, ceil_mode=True)[:, 0]
    return (small.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu().numpy()
