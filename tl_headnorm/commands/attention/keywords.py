"""Keywords in a prompt, exact or nearest by the model's embeddings, and attention to them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.data.spans import Span, TokenText, find_spans, positions
from tl_headnorm.data.tokens import token_ids
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import Model

_WORD = re.compile(r"\w+")
CANDIDATES = 3


@dataclass(frozen=True)
class Keyword:
    """A keyword, what it matched in the prompt, and how close that is (None: it is itself).

    `rivals` are the next closest words of the prompt with their cosines.
    """

    text: str
    matched: str
    spans: tuple[Span, ...]
    similarity: float | None = None
    rivals: tuple[tuple[str, float], ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        return positions(self.spans)


def find_keyword(model: Model, tokens: TokenText, text: str, match: str = "exact") -> Keyword:
    """The keyword's occurrences; with match="semantic", where there are none, the nearest word's.

    Nearest: the word of the prompt whose mean embedding row has the largest cosine with the
    keyword's own. It is a distance between words out of context, of whatever quality the model's
    embeddings have; what was matched and how close is to be shown. Raises InputError as
    find_spans does.
    """
    try:
        return Keyword(text, text, tuple(find_spans(tokens, text)))
    except InputError:
        if match != "semantic" or not text.strip():
            raise
    ranked = nearest_words(model, tokens, text)
    if not ranked:
        raise InputError(f"keyword: expected a prompt with words to compare {text!r} with")
    word, cosine = ranked[0]
    return Keyword(text, word, tuple(find_spans(tokens, word)), cosine, tuple(ranked[1:CANDIDATES]))


def nearest_words(model: Model, tokens: TokenText, text: str) -> list[tuple[str, float]]:
    """The prompt's words by cosine with `text`, largest first.

    Words are runs of letters and digits; a run without ASCII letters (scripts written without
    spaces) also counts in the pieces the tokenizer makes of it.
    """
    shown = tokens.text[tokens.cut :]
    words = {m.group() for m in _WORD.finditer(shown)}
    for word in [w for w in words if not w.isascii()]:
        words |= {tokens.text[a:b].strip() for a, b in tokens.offsets if tokens.text[a:b] in word}
    words = {word for word in words if word}
    table = model.engine.W_E
    wanted = _vector(model.tokenizer, table, text)
    cosines = {
        w: float(torch.cosine_similarity(wanted, _vector(model.tokenizer, table, w), dim=0))
        for w in words
    }
    return sorted(cosines.items(), key=lambda pair: (-pair[1], pair[0]))


def _vector(tokenizer: Any, table: Tensor, word: str) -> Float[Tensor, " d_model"]:
    """Mean embedding row of the tokens of a word as it stands inside a text, after a space."""
    space, spaced = token_ids(tokenizer, ["a", f"a {word.strip()}"])
    ids = spaced[len(space) :] if spaced[: len(space)] == space else spaced
    return table[torch.tensor(ids, device=table.device)].double().mean(0)


def query_positions(tokens: TokenText, query: str | None) -> tuple[int, ...]:
    """The tokens that look: those of every occurrence of `query`, or the last one."""
    if query is None:
        return (len(tokens) - 1,)
    return positions(find_spans(tokens, query, name="query"))


def uniform_weight(keys: Sequence[int], query: int) -> float:
    """Weight on the keys of a head that attends alike to all that the query sees."""
    return sum(key <= query for key in keys) / (query + 1)


def focus_reader(
    keywords: Sequence[Keyword], queries: Sequence[int]
) -> Callable[[Float[Tensor, "head q k"]], Float[np.ndarray, "keyword head query"]]:
    """A function of one layer's pattern: summed weight on each keyword's tokens per query."""

    def read(pattern: Float[Tensor, "head q k"]) -> Float[np.ndarray, "keyword head query"]:
        rows = pattern[:, list(queries)].double()
        weights = [rows[:, :, list(keyword.positions)].sum(2) for keyword in keywords]
        return torch.stack(weights).cpu().numpy()

    return read


def focus_table(focus: xr.DataArray) -> pd.DataFrame:
    """focus.parquet of one prompt: layer, head, keyword, query_pos, weight, uniform_weight.

    `focus` is [layer, head, keyword, query] with the coordinate `uniform` [keyword, query].
    """
    uniform = focus.coords["uniform"]
    table = focus.to_series().rename("weight").reset_index()
    table = table.rename(columns={"query": "query_pos"})
    table["uniform_weight"] = [
        float(uniform.sel(keyword=k, query=q))
        for k, q in zip(table["keyword"], table["query_pos"], strict=True)
    ]
    return table[["layer", "head", "keyword", "query_pos", "weight", "uniform_weight"]]


def ranked(focus: xr.DataArray, keyword: str) -> list[tuple[int, int, float]]:
    """(layer, head, weight) by mean weight over the queries, largest first."""
    grid = focus.sel(keyword=keyword).mean("query")
    layers, values = grid["layer"].values, grid.values
    order = np.argsort(-values, axis=None, kind="stable")
    n_heads = values.shape[1]
    return [(int(layers[i // n_heads]), int(i % n_heads), float(values.flat[i])) for i in order]
