"""summary.md of a steering run: plain sentences with the numbers in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_headnorm.commands.steer.instructions import Answer
from tl_headnorm.commands.steer.profiling import Profile
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.steer import perplexity

SHOWN = 3


def of_sweep(
    tables: Mapping[str, pd.DataFrame], meta: Mapping[str, Any], picked: Profile | None,
    settings: SteerSettings, written: Sequence[Answer],
) -> str:  # fmt: skip
    """Of a sweep over boosts, on questions, on texts, or both."""
    lines = ["# Steering", ""]
    source, heads = Path(meta["model"]["source"]).name, meta["heads"]
    names = " ".join(f"{layer}.{h}" for layer, hs in heads.items() for h in hs)
    what = settings.spans or ", ".join(repr(k) for k in settings.keywords)
    moved = f", moved by {settings.span_offset} tokens" if settings.span_offset else ""
    lines += [f"{source}, attention to {what}{moved} multiplied at the heads {names}."]
    if picked is not None:
        lines += ["", *_profile_lines(picked, settings)]
    for name, table in tables.items():
        lines += ["", *(_question_lines(table) if name == "questions" else _text_lines(table))]
    if written:
        lines += ["", *_written_lines(written)]
    lines += [
        "",
        "A boost that moves an answer shows that the answer can be had from there; it does not "
        "show that the model takes it from there by itself. Far boosts put a head where it never "
        "is: compare with the random sets at the same boost.",
    ]
    return "\n".join(lines) + "\n"


def _profile_lines(picked: Profile, settings: SteerSettings) -> list[str]:
    by = settings.profile_by
    column = "effect" if by == "steering" else "attention"
    best = picked.table[picked.table["picked"]].sort_values(f"{column}_fit", ascending=False)
    shown = ", ".join(
        f"{row['layer']}.{row['head']} ({row[f'{column}_test']:+.3g}, "
        f"{row[f'{column}_test_low']:+.3g} to {row[f'{column}_test_high']:+.3g})"
        for row in best.to_dict("records")
    )
    unit = "nats of log p of the target" if by == "steering" else "attention to the right option"
    far = picked.offsets.sort_values("contrast").iloc[-1]
    return [
        f"Heads picked on {len(picked.fit):,} questions by {by}; on the {len(picked.test):,} "
        f"others they show, each alone, in {unit} (95 % interval): {shown}.",
        f"The ranks of all heads agree between the halves with a Spearman correlation of "
        f"{picked.agreement:.2f}.",
        f"The last token looks most at the right option, against the mean of the others, "
        f"{int(far['offset'])} tokens behind its {settings.option_part} (head "
        f"{int(far['layer'])}.{int(far['head'])}, {far['contrast']:+.3f}).",
    ]


def _question_lines(table: pd.DataFrame) -> list[str]:
    clean = table.iloc[0]
    lines = [
        f"Without steering it answers {clean['accuracy']:.1%} of {clean['n_samples']:,} questions "
        f"(by letter); attention of the last token to the span is {clean['keyword_weight']:.3g}.",
        "",
        "| heads | boost | accuracy | answers changed | answers = target (95 %) | attention | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _with_random(table):
        share = "–"
        if pd.notna(row["target_share"]):
            share = f"{row['target_share']:.1%}"
            if pd.notna(row["target_share_low"]):
                share += f" ({row['target_share_low']:.1%} to {row['target_share_high']:.1%})"
        lines.append(
            f"| {row['set']} | {row['boost']:g} | {row['accuracy']:.1%} | "
            f"{row['answer_changed_share']:.1%} | {share} | {row['keyword_weight']:.3g} | "
            f"{row['kl']:.3g} |"
        )
    return lines


def _with_random(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """The chosen set's rows, then the random sets' means."""
    is_random = table["set"].str.startswith("random ")
    rows = table[~is_random & (table["set"] != "clean")].to_dict("records")
    if is_random.any():
        others = table[is_random]
        mean = others.groupby("boost").mean(numeric_only=True).reset_index()
        # An interval of one set is no interval of their mean.
        mean[["target_share_low", "target_share_high"]] = float("nan")
        rows += [
            {**row, "set": f"{others['set'].nunique()} random sets (mean)"}
            for row in mean.to_dict("records")
        ]
    return rows


def _text_lines(table: pd.DataFrame) -> list[str]:
    clean = table.iloc[0]
    lines = [
        f"On {clean['n_samples']:,} windows of text perplexity is {perplexity(clean['loss']):.3f} "
        "clean:",
        "",
        "| heads | boost | perplexity | KL per token |",
        "|---|---|---|---|",
    ]
    for row in _with_random(table):
        lines.append(
            f"| {row['set']} | {row['boost']:g} | {perplexity(row['loss']):.3f} | {row['kl']:.3g} |"
        )
    return lines


def _written_lines(written: Sequence[Answer]) -> list[str]:
    """The first prompts' texts, every way."""
    first = list(dict.fromkeys((a.prompt, a.distracted) for a in written))[:SHOWN]
    lines = ["What it writes (all of it in generations.jsonl and generations.html):"]
    for key in first:
        group = [a for a in written if (a.prompt, a.distracted) == key]
        one = [a for a in group if a.seed == group[0].seed]
        lines += ["", f"- prompt {key[0]}{', with the distracting text' if key[1] else ''}"]
        lines += [f"  - {a.way}: {' '.join(a.text.split())[:200]!r}" for a in one]
    return lines


def of_prompts(
    table: pd.DataFrame, answers: Sequence[Answer], meta: Mapping[str, Any],
    settings: SteerSettings,
) -> str:  # fmt: skip
    """Of a file of prompts."""
    source = Path(meta["model"]["source"]).name
    rule = f"{meta['n_seeds']} answers each at temperature {settings.temperature:g}"
    if settings.temperature == 0:
        rule = "one answer each, the likeliest token at every step"
    lines = [
        "# Does it follow the instruction?",
        "",
        f"{source}, {meta['num_processed']:,} prompts, {rule}, {settings.generate} new tokens at "
        "most. A hit has every text of must_include in it, whatever its case; prompts that ask for "
        "none are not counted.",
        "",
        "| way | distracting text | hit rate (95 %) | words shared between seeds | same outcome | "
        "attention to the keywords |",
        "|---|---|---|---|---|---|",
    ]
    for row in table[table["prompt"] == "all"].to_dict("records"):
        numbers = [row["agreement"], row["hit_agreement"]]
        shared, same = ("–" if pd.isna(x) else f"{x:.2f}" for x in numbers)
        hits = "–"
        if row["n_asked"]:
            interval = f"{row['hit_low']:.1%} to {row['hit_high']:.1%}, n={row['n_asked']}"
            hits = f"{row['hit_rate']:.1%} ({interval})"
        lines.append(
            f"| {row['way']} | {'yes' if row['distracted'] else 'no'} | {hits} | {shared} | "
            f"{same} | {row['keyword_weight']:.3g} |"
        )
    lines += [
        "",
        "Constrained answers hold the texts because they are put in, not because they fit; read "
        "them beside the steered ones.",
        "",
        *_written_lines(answers),
    ]
    return "\n".join(lines) + "\n"
