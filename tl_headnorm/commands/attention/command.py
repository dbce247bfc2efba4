"""`attention`, from settings to files."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_headnorm.commands.attention import distraction, page, plots, summary
from tl_headnorm.commands.attention.generation import Writing, write
from tl_headnorm.commands.attention.inputs import Subject, open_subjects
from tl_headnorm.commands.attention.keywords import (
    Keyword,
    find_keyword,
    focus_table,
    query_positions,
    ranked,
)
from tl_headnorm.commands.attention.patterns import Look, Wanted, check, look
from tl_headnorm.commands.attention.scores import OF_PROMPT, SCORES, measure_repeated
from tl_headnorm.commands.attention.settings import AttentionSettings
from tl_headnorm.data.lines import text_or_file
from tl_headnorm.interventions.generation import check_room
from tl_headnorm.interventions.heads import Heads, all_heads, parse_heads, parse_layers
from tl_headnorm.measures.measurer import Factors, factors_of
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.save import save_png
from tl_headnorm.run.files import write_json, write_text, write_with
from tl_headnorm.run.loading import run_dir, say
from tl_headnorm.run.study import record, save_table

WATCHED = 8
AVERAGED = (*OF_PROMPT, "contribution")  # over the prompts, in heads.parquet


def run_attention(settings: AttentionSettings) -> Path:
    """Look at every prompt, write pages, tables, arrays and a summary; the directory."""
    with run_dir(settings.output_dir, settings.experiment_name) as path:
        _attention(settings, path)
    return path


def _attention(settings: AttentionSettings, path: Path) -> None:
    started = time.time()
    model, subjects = open_subjects(settings)
    info = model.info
    layers = parse_layers(settings.layers, info.n_layers)
    heads = _heads(settings.heads, model, layers)
    wanted = Wanted(layers, heads, settings.keep_mb, settings.local_window)
    repeated = _repeated(model, layers, settings)
    factors = factors_of(model)
    other = text_or_file(settings.distract, "distract") if settings.distract is not None else None
    # What can be wrong with a prompt is found before anything is written.
    asked = [
        [find_keyword(model, s.tokens, text, settings.match) for text in s.keywords]
        for s in subjects.items
    ]
    queries = [query_positions(s.tokens, settings.query) for s in subjects.items]
    for i, subject in enumerate(subjects.items):
        _check(model, subject, asked[i], wanted, settings, other)
    write_json(path / "config.json", settings.as_dict())
    tables: dict[str, list[pd.DataFrame]] = {}
    prompts: list[dict[str, Any]] = []
    scores, uniform = [], []
    several = len(subjects.items) > 1
    for i, subject in enumerate(subjects.items):
        folder = path / f"prompt_{i:03d}" if several else path
        shown = not several or i < settings.pages
        part = _One(model, subject, asked[i], queries[i], settings, repeated, other, factors)
        found = part.look(wanted if shown else Wanted(layers, (), settings.keep_mb, wanted.window))
        if shown:
            folder.mkdir(exist_ok=True)
            part.save(found, folder)
        for name, table in part.tables.items():
            tables.setdefault(name, []).append(table.assign(prompt=i))
        scores.append(np.stack([found.run[n].values for n in AVERAGED]))
        uniform.append([found.run.attrs["uniform"][n] for n in OF_PROMPT])
        prompts.append(part.facts(found))
    for name, parts in tables.items():
        save_table(pd.concat(parts, ignore_index=True), path / f"{name}.parquet")
    table, expected = _heads_table(layers, scores, uniform, repeated)
    save_table(table, path / "heads.parquet")
    text = summary.summary(Path(info.source).name, table, expected, prompts)
    meta = _meta(model, settings, subjects.record, subjects.items, started, expected)
    write_text(path / "summary.md", text)
    write_json(path / "meta.json", meta)
    say(text)


def _check(
    model: Model, subject: Subject, keywords: Sequence[Keyword], wanted: Wanted,
    settings: AttentionSettings, other: str | None,
) -> None:  # fmt: skip
    check(model, subject.tokens, wanted)
    if settings.generate:
        _heads(settings.generate_heads, model, wanted.layers)
        check_room(model, len(subject.tokens), settings.generate)
    if other is not None:
        words = keywords or [distraction.instruction_keyword(subject.tokens, subject.instruction)]
        distraction.put_in(
            model, subject.tokens, words, subject.instruction, other, settings.places,
            settings.prepend_bos,
        )  # fmt: skip


def _heads(text: str | None, model: Model, layers: Sequence[int]) -> Heads | None:
    if text is None:
        return None
    if text == "all":
        return all_heads(layers, model.info.n_heads)
    return parse_heads(text, model.info.n_layers, model.info.n_heads)


Repeated = tuple[dict[str, Any], dict[str, float]]


def _repeated(model: Model, layers: Sequence[int], settings: AttentionSettings) -> Repeated:
    """Induction and duplicate-token scores of every head, where asked for."""
    if not settings.repeat_length:
        return {}, {}
    length = min(settings.repeat_length, (model.n_ctx - 1) // 2)
    return measure_repeated(
        model, layers, length=length, seed=settings.seed, prepend_bos=settings.prepend_bos
    )


def _heads_table(
    layers: Sequence[int], scores: Sequence[np.ndarray], uniform: Sequence[Sequence[float]],
    repeated: Repeated,
) -> tuple[pd.DataFrame, dict[str, float]]:  # fmt: skip
    """heads.parquet: every score, mean over the prompts, and a uniform head's beside it."""
    means = dict(zip(AVERAGED, np.mean(scores, axis=0), strict=True))
    means |= {name: grid.numpy() for name, grid in repeated[0].items()}
    expected = dict(zip(OF_PROMPT, np.mean(uniform, axis=0).tolist(), strict=True)) | repeated[1]
    n_heads = next(iter(means.values())).shape[1]
    table = pd.DataFrame(
        {"layer": np.repeat(layers, n_heads), "head": list(range(n_heads)) * len(layers)}
    )
    for name in SCORES:
        if name in means:
            table[name] = means[name].ravel()
            table[f"{name}_uniform"] = expected[name]
    table["contribution"] = means["contribution"].ravel()
    return table, expected


class _One:
    """One prompt: what is found in it, and the files that show it."""

    def __init__(
        self, model: Model, subject: Subject, keywords: Sequence[Keyword], queries: Sequence[int],
        settings: AttentionSettings, repeated: Repeated, other: str | None, factors: Factors,
    ) -> None:  # fmt: skip
        self.model, self.subject, self.keywords = model, subject, keywords
        self.queries, self.settings, self.repeated, self.other = queries, settings, repeated, other
        self.factors = factors
        self.tables: dict[str, pd.DataFrame] = {}
        self.writing: Writing | None = None
        self.cases: list[distraction.Case] = []

    def look(self, wanted: Wanted) -> Look:
        subject = self.subject
        found = look(
            self.model, subject.tokens, wanted, self.keywords, self.queries, self.factors,
            self.repeated[0],
        )  # fmt: skip
        found.run.attrs["uniform"] |= self.repeated[1]
        if self.keywords:
            self.tables["focus"] = focus_table(found.run["focus"])
        if self.settings.generate:
            self.writing = self._write(found)
        if self.other is not None:
            self._distract(wanted.layers)
        return found

    def _write(self, found: Look) -> Writing:
        how, text = self.settings, self.settings.generate_heads or self.settings.heads
        layers = found.run["layer"].values.tolist()
        heads = _heads(text, self.model, layers) or tuple(sorted(_foremost(found)[:WATCHED]))
        return write(
            self.model, self.subject.tokens, heads, max_new_tokens=how.generate,
            temperature=how.temperature, top_k=how.top_k, seed=how.seed,
        )  # fmt: skip

    def _distract(self, layers: Sequence[int]) -> None:
        subject, how = self.subject, self.settings
        words = list(self.keywords) or [
            distraction.instruction_keyword(subject.tokens, subject.instruction)
        ]
        self.cases = distraction.distract(
            self.model, subject.tokens, words, subject.instruction, str(self.other),
            places=how.places, layers=layers, letters=subject.letters,
            prepend_bos=how.prepend_bos,
        )  # fmt: skip
        names = [word.text for word in words]
        self.tables["distraction"] = distraction.distraction_table(self.cases, names, layers)
        self.tables["answers"] = distraction.answers_table(self.cases)

    def changes(self) -> list[tuple[str, np.ndarray]]:
        """(name, change per head) of every place and keyword."""
        words = list(dict.fromkeys(self.tables["distraction"]["keyword"]))
        return [
            (f"{case.place}: {word}", case.weights[:, :, k] - self.cases[0].weights[:, :, k])
            for case in self.cases[1:]
            for k, word in enumerate(words)
        ]

    def save(self, found: Look, folder: Path) -> None:
        """patterns.npz, the page and the pictures."""
        title = f"{Path(self.model.info.source).name} · {len(self.subject.tokens)} tokens"
        _save_npz(_arrays(found), folder / "patterns.npz")
        figures = {"heads": plots.all_heads(found, title), "scores": plots.scores(found.run, title)}
        layer, head = _foremost(found, kept=True)[0]
        if (layer, head) in found.kept:
            name, weights = f"{layer}.{head}", found.kept[layer, head]
            figures[f"head_{name}"] = plots.pattern(weights, found.labels, f"Head {name}", title)
        if self.keywords:
            figures["focus"] = plots.keywords(found.run, title)
        changes = self.changes() if self.cases else []
        layers = [int(i) for i in found.run["layer"].values]
        if changes:
            figures["distraction"] = plots.changes(changes, layers, title)
        if self.writing is not None:
            figures["generation"] = plots.generation(self.writing, title)
            _save_npz(_steps(self.writing), folder / "generation.npz")
        for name, figure in figures.items():
            save_png(figure, folder / f"{name}.png")
        write_text(folder / "attention.html", self._page(found, changes, title))

    def _page(self, found: Look, changes: Sequence[tuple[str, np.ndarray]], title: str) -> str:
        maps = [
            page.score_map(name, grid, None, "distraction", signed=True) for name, grid in changes
        ]
        data, sizes = page.page_data(found, self.writing, maps), found.run.sizes
        about = f"prompt {self.subject.id} · {sizes['layer']} layers × {sizes['head']} heads"
        n_whole = len(set(data["names"]) - set(found.means))
        if n_whole < sizes["layer"] * sizes["head"]:
            about += (
                f" · {n_whole} heads whole on this page, the others as thumbnails; "
                f"{len(found.kept)} in patterns.npz (--heads chooses, --keep_mb bounds them)"
            )
        said = summary.keyword_sentences(found.run, self.keywords) if self.keywords else ""
        return page.page(
            data, title=title, about=about, keywords=said,
            written=self.writing.text if self.writing else "",
            answers=summary.answers(self.cases) if self.cases else (),
        )  # fmt: skip

    def facts(self, found: Look) -> dict[str, Any]:
        """This prompt's part of the summary."""
        facts: dict[str, Any] = {
            "id": self.subject.id,
            "text": found.tokens.text,
            "n_tokens": len(found.tokens),
            "answer": self.subject.answer,
            "n_patterns": len(found.kept),
            "n_left_out": found.left_out,
            "keywords": "",
            "generated": None,
            "distracted": None,
        }
        if self.keywords:
            facts["queries"] = summary.queries(found.run)
            facts["keywords"] = summary.keyword_sentences(found.run, self.keywords)
        if self.writing is not None:
            how = _how(self.settings)
            facts["generated"] = summary.generated(self.writing, self.keywords, how)
        if self.cases:
            facts["distracted"] = summary.distracted(self.cases, self.tables["distraction"])
        return facts


def _how(settings: AttentionSettings) -> str:
    if not settings.temperature:
        return "greedy"
    among = "" if settings.top_k is None else f" among the {settings.top_k} likeliest"
    return f"sampled at temperature {settings.temperature:g}{among}, seed {settings.seed}"


def _foremost(found: Look, kept: bool = False) -> list[tuple[int, int]]:
    """Heads by weight on the first keyword, or those least on the first token; kept ones first."""
    if "focus" in found.run:
        first = str(found.run["keyword"].values[0])
        order = [(layer, head) for layer, head, _ in ranked(found.run["focus"], first)]
    else:
        series = found.run["first_token"].to_series().sort_values(kind="stable")
        order = [(int(layer), int(head)) for layer, head in series.index]
    return sorted(order, key=lambda pair: pair not in found.kept) if kept else order


def _arrays(found: Look) -> dict[str, np.ndarray]:
    """patterns.npz: `patterns` float16 [layer, head, q, k], or [head, q, k] with `heads`."""
    layers, n_heads = found.run["layer"].values, found.run.sizes["head"]
    n = len(found.labels)
    stacked = np.stack(list(found.kept.values())) if found.kept else np.zeros((0, n, n), np.float16)
    arrays = {"tokens": np.array(found.labels), "ids": np.array(found.tokens.ids)}
    arrays |= {"layers": layers, "mean": found.means["all heads"]}
    if not found.left_out:
        return arrays | {"patterns": stacked.reshape(len(layers), n_heads, n, n)}
    return arrays | {"patterns": stacked, "heads": np.array(list(found.kept)).reshape(-1, 2)}


def _save_npz(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    write_with(path, partial(np.savez_compressed, **arrays))  # type: ignore[arg-type]


def _steps(writing: Writing) -> dict[str, np.ndarray]:
    """generation.npz: `weights` float16 [head, step, pos], NaN where nothing stood yet."""
    return {
        "weights": writing.weights, "heads": np.array(writing.heads),
        "tokens": np.array(writing.labels), "n_prompt": np.array(writing.n_prompt),
    }  # fmt: skip


def _meta(
    model: Model, settings: AttentionSettings, prepared: Mapping[str, Any],
    subjects: Sequence[Subject], started: float, expected: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    num_tokens = sum(len(subject.tokens) for subject in subjects)
    return record(model, settings, None, prepared, started, num_tokens, 1) | {
        "num_processed": len(subjects),
        "num_tokens": num_tokens,
        "uniform": dict(expected),
        "local_window": settings.local_window,
        "repeat_length": settings.repeat_length,
    }
