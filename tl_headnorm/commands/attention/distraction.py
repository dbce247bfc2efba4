"""The same instruction with other text beside it: what becomes of the keywords and the answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.attention.keywords import Keyword, uniform_weight
from tl_headnorm.data.spans import Span, TokenText, encode_text, token_labels
from tl_headnorm.data.tokens import ChatText
from tl_headnorm.engine.protocol import Start
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.patterns import at_last_query
from tl_headnorm.model.loading import Model

PLACES = ("before", "inside", "after")
COLUMNS = [
    "place", "layer", "head", "keyword", "weight_before", "weight_after", "change",
    "uniform_before", "uniform_after", "distractor_weight",
]  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?。！？\n])\s*(?=\S)")
_SPACE = re.compile(r"\s+(?=\S)")


@dataclass(frozen=True)
class Distracted:
    """A prompt with text put in: [start, stop) are its characters in the new text."""

    place: str
    text: str
    start: int
    stop: int

    def moved(self, at: int) -> int:
        """Where a character of the old prompt is now."""
        return at if at < self.start else at + self.stop - self.start


def insert(
    prompt: str, instruction: tuple[int, int], distractor: str, place: str, keep: Sequence[Span]
) -> Distracted:
    """The prompt with the distractor before, inside or after the instruction's characters.

    Inside: at the sentence's end nearest to the middle, else at the space nearest to it, never
    inside one of the spans to keep. A space, or a line's end where the instruction has several
    lines, sets the text apart.
    """
    start, stop = instruction
    apart = "\n" if "\n" in prompt[start:stop].strip() else " "
    if place == "before":
        at, text = start, distractor.strip() + apart
    elif place == "after":
        at = start + len(prompt[start:stop].rstrip())
        text = apart + distractor.strip()
    else:
        at = _middle(prompt, instruction, keep)
        text = distractor.strip() + apart
        if at and not prompt[at - 1].isspace():
            text = apart + text
    whole = prompt[:at] + text + prompt[at:]
    whole = ChatText(whole) if isinstance(prompt, ChatText) else whole
    return Distracted(place, whole, at, at + len(text))


def _middle(prompt: str, instruction: tuple[int, int], keep: Sequence[Span]) -> int:
    start, stop = instruction
    middle = (start + stop) / 2
    for pattern in (_SENTENCE, _SPACE, re.compile("")):
        ends = [m.end() for m in pattern.finditer(prompt, start + 1, stop - 1)]
        # finditer looks no further than its end, so a place at the end is after, not inside.
        free = [e for e in ends if start < e < stop and not _within(e, keep)]
        if free:
            return min(free, key=lambda e: abs(e - middle))
    raise InputError(
        "distract_at: expected a place inside the instruction that splits no keyword, found none; "
        "use --distract_at before or after"
    )


def _within(at: int, spans: Sequence[Span]) -> bool:
    return any(span.char_start < at < span.char_stop for span in spans)


@dataclass(frozen=True)
class Answer:
    """Next-token probabilities: of the letters, or of the likeliest tokens."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def best(self) -> str:
        return self.names[int(np.argmax(self.probabilities))]


@dataclass(frozen=True)
class Case:
    """One prompt's attention [layer, head, keyword] from its last token, and the answer.

    `own` is the weight on the distracting text itself (0 in the clean prompt).
    """

    place: str
    weights: Float[np.ndarray, "layer head keyword"]
    uniform: Float[np.ndarray, " keyword"]
    own: Float[np.ndarray, "layer head"]
    answer: Answer
    n_tokens: int


def distract(
    model: Model,
    tokens: TokenText,
    keywords: Sequence[Keyword],
    instruction: tuple[int, int],
    distractor: str,
    *,
    places: Sequence[str] = PLACES,
    layers: Sequence[int],
    letters: Sequence[tuple[str, int]] = (),
    prepend_bos: bool = True,
) -> list[Case]:
    """The clean prompt first, then one case per place. The query is the last token.

    Keywords keep their own occurrences: what the distractor repeats of them does not count.
    `letters` are an answer's letters and their tokens, whose probabilities are among themselves;
    without them the answer is the next token, and each prompt's likeliest ones are followed.
    Raises InputError where a prompt with its distractor does not fit into the context.
    """
    keys = [keyword.positions for keyword in keywords]
    seen = [_seen(model, "clean", tokens, keys, (), layers)]
    made = put_in(model, tokens, keywords, instruction, distractor, places, prepend_bos)
    for text, new in made:
        own = _at(new, text.start, text.stop)
        moved = [_moved(new, text, keyword) for keyword in keywords]
        seen.append(_seen(model, text.place, new, moved, own, layers))
    names = list(letters) or _likeliest(model, [logits for _, logits in seen])
    return [replace(case, answer=_answer(logits, names, bool(letters))) for case, logits in seen]


def put_in(
    model: Model, tokens: TokenText, keywords: Sequence[Keyword], instruction: tuple[int, int],
    distractor: str, places: Sequence[str], prepend_bos: bool,
) -> list[tuple[Distracted, TokenText]]:  # fmt: skip
    """The prompt with the distractor at each place, and its tokens; errors as in `distract`."""
    if tokens.cut:
        raise InputError(
            f"distract: expected a whole prompt to put text into, found one whose first "
            f"{tokens.cut} characters were cut; raise --max_length"
        )
    spans = [span for keyword in keywords for span in keyword.spans]
    found = []
    for place in places:
        made = insert(tokens.text, instruction, distractor, place, spans)
        new = encode_text(model.tokenizer, made.text, prepend_bos=prepend_bos)
        if len(new) > model.n_ctx:
            raise InputError(
                f"distract: expected at most {model.n_ctx} tokens with the distracting text, found "
                f"{len(new)}; shorten it"
            )
        found.append((made, new))
    return found


def _moved(tokens: TokenText, made: Distracted, keyword: Keyword) -> list[int]:
    """The tokens of a keyword's own occurrences in the distracted prompt."""
    found = set()
    for span in keyword.spans:
        start, last = made.moved(span.char_start), made.moved(span.char_stop - 1)
        found.update(_at(tokens, start, last + 1))
    return sorted(found)


def instruction_keyword(tokens: TokenText, instruction: tuple[int, int]) -> Keyword:
    """The whole instruction as a keyword, token by token, so that text may stand between."""
    start, stop = instruction
    spans = [
        Span("(instruction)", i, i + 1, a, b)
        for i, (a, b) in enumerate(tokens.offsets)
        if start <= a < b <= stop
    ]
    return Keyword("(instruction)", tokens.text[start:stop], tuple(spans))


def _at(tokens: TokenText, start: int, stop: int) -> list[int]:
    """The tokens of some characters."""
    return [i for i, (a, b) in enumerate(tokens.offsets) if a < stop and b > start and a < b]


@torch.inference_mode()
def _seen(
    model: Model, place: str, tokens: TokenText, keys: Sequence[Sequence[int]],
    own: Sequence[int], layers: Sequence[int],
) -> tuple[Case, Tensor]:  # fmt: skip
    """A case without its answer, and the logits [vocab] of its next token."""
    ids = torch.tensor([tokens.ids], device=model.device)
    rows: dict[int, Tensor] = {}

    def take(layer: int, row: Tensor) -> None:
        rows[layer] = row.double().cpu()

    heads = range(model.info.n_heads)
    readers = [at_last_query(layer, heads, take) for layer in layers]
    resid = model.engine.run(Start(ids), torch.ones_like(ids), readers)
    last = torch.stack([rows[layer] for layer in layers])
    weights = torch.stack([last[:, :, list(k)].sum(2) for k in keys], 2).numpy()
    uniform = np.array([uniform_weight(k, len(tokens) - 1) for k in keys])
    mine = last[:, :, list(own)].sum(2).numpy()
    case = Case(place, weights, uniform, mine, Answer((), ()), len(tokens))
    return case, model.engine.logits(resid[:, -1:])[0, 0].double().cpu()


def _answer(logits: Tensor, names: Sequence[tuple[str, int]], among: bool) -> Answer:
    """Softmax over these tokens alone, or their part of that over the vocabulary."""
    ids = [token for _, token in names]
    chances = logits[ids].softmax(0) if among else logits.softmax(0)[ids]
    return Answer(tuple(name for name, _ in names), tuple(chances.tolist()))


def _likeliest(model: Model, rows: Sequence[Tensor], n: int = 3) -> list[tuple[str, int]]:
    """The likeliest tokens of every prompt, each once."""
    ids = list(dict.fromkeys(token for row in rows for token in row.topk(n).indices.tolist()))
    labels = [token_labels(model.tokenizer, [token])[0] for token in ids]
    return list(zip(labels, ids, strict=True))


def distraction_table(
    cases: Sequence[Case], keywords: Sequence[str], layers: Sequence[int]
) -> pd.DataFrame:
    """distraction.parquet: per place, head and keyword the weight before and after, and change."""
    clean, rows = cases[0], []
    for case in cases[1:]:
        for (i, head, k), after in np.ndenumerate(case.weights):
            before = clean.weights[i, head, k]
            pair = [case.place, layers[i], head, keywords[k], before, after, after - before]
            rows.append([*pair, clean.uniform[k], case.uniform[k], case.own[i, head]])
    return pd.DataFrame(rows, columns=COLUMNS)


def answers_table(cases: Sequence[Case]) -> pd.DataFrame:
    """answers.parquet: per case the probability of each answer followed, and which is best."""
    return pd.DataFrame(
        {
            "place": [c.place for c in cases for _ in c.answer.names],
            "answer": [name for c in cases for name in c.answer.names],
            "probability": [p for c in cases for p in c.answer.probabilities],
            "best": [name == c.answer.best for c in cases for name in c.answer.names],
        }
    )
