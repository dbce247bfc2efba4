"""`steer`, from settings to files."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from tl_headnorm.commands.steer import instructions, plots, profiling, prompts, steer, summary
from tl_headnorm.commands.steer.answers import save_answers
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.targets import (
    Targets,
    option_spans,
    question_targets,
    text_targets,
)
from tl_headnorm.data.lines import text_or_file
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.prompts import Prompt, read_instructions
from tl_headnorm.data.questions import Questions
from tl_headnorm.data.spans import TokenText
from tl_headnorm.data.templates import get_template
from tl_headnorm.data.texts import Texts, read_texts
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.heads import Heads, as_file, label
from tl_headnorm.interventions.rankings import choose_heads
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.panel import group_size
from tl_headnorm.plots.save import save
from tl_headnorm.run.files import write_json, write_text
from tl_headnorm.run.loading import open_both, open_model, say
from tl_headnorm.run.stages import run_study
from tl_headnorm.run.study import record, save_table


def run_steer(settings: SteerSettings) -> Path:
    """Steer, write tables, figures and a summary; the directory."""
    return run_study(settings, "steer", _steer if settings.prompts is None else _follow)


@dataclass(frozen=True)
class _Asked:
    """Questions as they are run: tokens, the targets, the right options."""

    questions: Questions
    prepared: Prepared
    targets: Targets
    answers: list[int]


@dataclass
class _Found:
    """Results of questions, texts or both, before anything is written."""

    tables: dict[str, pd.DataFrame]
    samples: pd.DataFrame | None
    picked: profiling.Profile | None
    written: list[instructions.Answer]
    shown: list[Prompt]


def _steer(settings: SteerSettings, path: Path) -> None:
    started = time.time()
    model, asked, texts = _open(settings)
    picked = None
    if settings.profile and asked is not None:
        picked = _profile(model, asked, settings)
        name, heads = f"top:{settings.profile_top} by {settings.profile_by}", picked.heads
    else:
        name, heads = choose_heads(
            settings.heads or "", settings.run, settings.statistic,
            model.info.n_layers, model.info.n_heads,
        )  # fmt: skip
    sets = steer.sets_of(name, heads, model, settings)
    tables: dict[str, pd.DataFrame] = {}
    targets, samples = None, None
    if asked is not None:
        targets = asked.targets.part(picked.test.tolist()) if picked else asked.targets
        found = steer.steer(model, targets, sets, settings, asked.answers, progress=True)
        tables["questions"] = found[0]
        ids = [asked.questions[row].id for row in targets.kept]
        samples = steer.per_sample_table(found[1], found[2], targets, ids)
    if texts is not None:
        tables["texts"] = steer.steer(model, texts[1], sets, settings, progress=True)[0]
        targets = texts[1] if targets is None else targets
    assert targets is not None, "the settings make sure of questions or texts"
    written, shown = _examples(model, asked, targets, name, heads, settings)
    rows = len(next(iter(tables.values())))
    meta = _meta(settings, model, asked, texts, targets, started, rows, heads)
    _save(settings, path, _Found(tables, samples, picked, written, shown), meta, heads)
    text = summary.of_sweep(tables, meta, picked, settings, written)
    _finish(path, text, meta)


def _open(
    settings: SteerSettings,
) -> tuple[Model, _Asked | None, tuple[Texts, Targets] | None]:
    """The model, the questions with their targets, and the texts with theirs."""
    texts = read_texts(settings.texts) if settings.texts else None
    asked = None
    if settings.dataset != "none":
        model, questions = open_both(settings)
        asked = _ask(model, questions, settings)
    else:
        model = open_model(settings)
    if texts is None:
        _check_room(model, asked.targets if asked else None, settings)
        return model, asked, None
    found = text_targets(
        texts, model.tokenizer, settings.keywords, most=settings.max_texts,
        length=min(settings.text_length, model.n_ctx), prepend_bos=settings.prepend_bos,
        offset=settings.span_offset,
    )  # fmt: skip
    _check_room(model, asked.targets if asked else found, settings)
    return model, asked, (texts, found)


def _check_room(model: Model, targets: Targets | None, settings: SteerSettings) -> None:
    """Before the sweep, not after it: whether what is to be written on fits."""
    longest = max((len(sample) for sample in targets.samples), default=0) if targets else 0
    if settings.generate and longest + settings.generate > model.n_ctx:
        raise InputError(
            f"generate: expected at most {model.n_ctx - longest} new tokens after the longest of "
            f"the prompts ({longest} tokens), found {settings.generate}; lower it"
        )


def _ask(model: Model, questions: Questions, settings: SteerSettings) -> _Asked:
    prepared = prepare(
        model.tokenizer, model.n_ctx, questions, settings.updated(score_answers=True)
    )
    targets = question_targets(
        questions, prepared.samples, prepared.encoded, model.tokenizer,
        get_template(settings.template_name, settings.template),
        settings.spans or settings.keywords, part=settings.option_part,
        offset=settings.span_offset, seed=settings.seed,
    )  # fmt: skip
    return _Asked(questions, prepared, targets, [q.answer for q in questions])


def _profile(model: Model, asked: _Asked, settings: SteerSettings) -> profiling.Profile:
    template = get_template(settings.template_name, settings.template)
    options = [
        option_spans(
            asked.questions[row], asked.prepared.samples[row], asked.prepared.encoded[row],
            model.tokenizer, template, settings.option_part,
        )
        for row in asked.targets.kept
    ]  # fmt: skip
    return profiling.profile(model, asked.targets, options, asked.answers, settings, progress=True)


def _meta(
    settings: SteerSettings, model: Model, asked: _Asked | None,
    texts: tuple[Texts, Targets] | None, targets: Targets, started: float, n_rows: int,
    heads: Heads,
) -> dict[str, Any]:  # fmt: skip
    tokens = sum(len(sample) for sample in targets.samples)
    known = {} if asked is None else asked.prepared.record
    meta = record(model, settings, texts[0] if texts else None, known, started, tokens, n_rows)
    meta |= {
        "num_processed": len(targets.samples),
        "heads": as_file(heads),
        "spans": settings.spans or list(settings.keywords),
        "answer_scoring": None if asked is None else "letter, softmax over the options' letters",
    }
    if asked is not None:
        without = len(asked.prepared.encoded) - len(asked.targets.samples)
        meta["num_skipped"] = {
            **known["num_skipped"],
            **({"no such span": without} if without else {}),
        }
    return meta


def _save(
    settings: SteerSettings, path: Path, found: _Found, meta: dict[str, Any], heads: Heads
) -> None:  # fmt: skip
    tables, picked = found.tables, found.picked
    main = next(iter(tables.values()))
    source = Path(meta["model"]["source"]).name
    write_json(path / "config.json", settings.as_dict())
    write_json(path / "heads.json", as_file(heads))
    save_table(main, path / "steer.parquet")
    if found.samples is not None:
        save_table(found.samples, path / "samples.parquet")
        meta["accuracy"] = float(main["accuracy"].iloc[0])
    if "texts" in tables:
        save_table(_perplexity(tables["texts"]), path / "perplexity.parquet")
    name = "questions" if "questions" in tables else "windows of text"
    title = f"{source}: {_what(settings)}, {label(heads)} · n={meta['num_processed']:,} {name}"
    save(plots.sweep(main, title), path / "steer")
    if found.written:
        _save_answers(found.written, found.shown, path, "Written on, plain and steered")
    if picked is not None:
        save_table(picked.table, path / "profile.parquet")
        save_table(picked.offsets, path / "offsets.parquet")
        n = len(picked.test)
        title = f"{source} · n={n:,} held-out questions"
        groups = group_size(meta["model"]["n_key_value_heads"], meta["model"]["n_heads"])
        save(plots.profile(picked.table, picked.offsets, title, groups), path / "profile")


def _what(settings: SteerSettings) -> str:
    what = settings.spans or ", ".join(repr(k) for k in settings.keywords)
    return what + (f" + {settings.span_offset} tokens" if settings.span_offset else "")


def _perplexity(table: pd.DataFrame) -> pd.DataFrame:
    """perplexity.parquet: a row per set and boost, on the texts."""
    kept = table[["set", "heads", "boost", "n_samples", "loss", "keyword_weight", "kl"]].copy()
    kept["perplexity"] = kept["loss"].map(steer.perplexity)
    return kept


def _examples(
    model: Model, asked: _Asked | None, targets: Targets, name: str, heads: Heads,
    settings: SteerSettings,
) -> tuple[list[instructions.Answer], list[Prompt]]:  # fmt: skip
    """Text written on after the first questions (or windows), plain and steered."""
    if settings.generate < 1:
        return [], []
    ready = []
    for i, (sample, span) in enumerate(zip(targets.samples, targets.spans, strict=True)):
        if i == settings.examples:
            break
        row = targets.kept[i]
        identity = str(row) if asked is None else asked.questions[row].id
        text = model.tokenizer.decode(list(sample.ids), skip_special_tokens=True)
        prompt = Prompt(text, (_what(settings),), identity)
        tokens = TokenText(text, sample.ids, ((0, 0),) * len(sample))
        ready.append(prompts.Ready(prompt, tokens, span))
    ways = instructions.ways_of(name, heads, settings)
    answers = instructions.write_answers(model, ready, ways, settings)
    return answers, [one.prompt for one in ready]


def _save_answers(
    answers: Sequence[instructions.Answer], asked: Sequence[Prompt], path: Path, title: str
) -> None:
    rows = [asdict(answer) | {"hit": answer.hit} for answer in answers]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path / "generations.jsonl", lines)
    save_answers(rows, asked, path / "generations.html", title)


def _follow(settings: SteerSettings, path: Path) -> None:
    """Prompts of a file: plain, steered and constrained, side by side."""
    started = time.time()
    asked = read_instructions(settings.prompts or "").items
    text = text_or_file(settings.distract, "distract").strip() if settings.distract else None
    model = open_model(settings)
    ready = prompts.prepare_prompts(asked, model.tokenizer, settings)
    if text is not None:
        ready += prompts.prepare_prompts(asked, model.tokenizer, settings, text)
    info = model.info
    name, heads = choose_heads(
        settings.heads or "", settings.run, settings.statistic, info.n_layers, info.n_heads
    )
    ways = instructions.ways_of(name, heads, settings)
    n_seeds = settings.seeds if settings.temperature > 0 else 1
    with tqdm(total=len(ready) * len(ways) * n_seeds, unit="answer", desc="write") as bar:
        answers = instructions.write_answers(model, ready, ways, settings, bar)
    table = instructions.prompts_table(answers, ways)
    tokens = sum(len(one.tokens) for one in ready)
    meta = record(model, settings, None, {}, started, tokens, len(ways) * n_seeds) | {
        "num_processed": len(asked),
        "heads": as_file(heads),
        "distract": text,
        "n_seeds": n_seeds,
    }
    write_json(path / "config.json", settings.as_dict())
    write_json(path / "heads.json", as_file(heads))
    save_table(table, path / "prompts.parquet")
    source = Path(info.source).name
    title = f"{source}: {len(asked):,} prompts, {n_seeds} answers each, {label(heads)}"
    _save_answers(answers, asked, path, title)
    save(plots.hits(table, [asdict(a) for a in answers], title), path / "hits")
    _finish(path, summary.of_prompts(table, answers, meta, settings), meta)


def _finish(path: Path, text: str, meta: dict[str, Any]) -> None:
    write_text(path / "summary.md", text)
    write_json(path / "meta.json", meta)
    say(text)
