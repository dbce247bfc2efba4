"""summary.md of steering: a sweep over boosts, or a file of prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_headnorm.commands.steer.instructions import Answer
from tl_headnorm.commands.steer.profiling import Profile
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.commands.steer.steer import perplexity
from tl_headnorm.plots.templates import fixed, general, percent, render

SHOWN = 3  # prompts whose answers are quoted


def of_sweep(
    tables: Mapping[str, pd.DataFrame], meta: Mapping[str, Any], picked: Profile | None,
    settings: SteerSettings, written: Sequence[Answer],
) -> str:  # fmt: skip
    """Of a sweep over boosts, on questions, on texts, or both."""
    return render(
        "commands/steer/sweep.md.j2",
        source=Path(meta["model"]["source"]).name,
        heads=" ".join(f"{layer}.{h}" for layer, hs in meta["heads"].items() for h in hs),
        target=settings.spans or ", ".join(repr(k) for k in settings.keywords),
        settings=settings,
        profile=None if picked is None else _profile(picked, settings),
        clean={name: table.iloc[0].to_dict() for name, table in tables.items()},
        tables={name: _table(name, _with_random(table)) for name, table in tables.items()},
        perplexity=perplexity,
        answers=_quoted(written),
    )


def of_prompts(
    table: pd.DataFrame, answers: Sequence[Answer], meta: Mapping[str, Any],
    settings: SteerSettings,
) -> str:  # fmt: skip
    """Of a file of prompts."""
    return render(
        "commands/steer/prompts.md.j2",
        source=Path(meta["model"]["source"]).name,
        meta=meta,
        settings=settings,
        table=_ways_table(table[table["prompt"] == "all"]),
        answers=_quoted(answers),
    )


def _profile(picked: Profile, settings: SteerSettings) -> dict[str, Any]:
    """The heads that were picked, their effect on the other half, and the best offset."""
    column = "effect" if settings.profile_by == "steering" else "attention"
    best = picked.table[picked.table["picked"]].sort_values(f"{column}_fit", ascending=False)
    names = {f"{column}_test{end}": f"test{end}" for end in ("", "_low", "_high")}
    far = picked.offsets.sort_values("contrast").iloc[-1]
    return {
        "n_fit": len(picked.fit),
        "n_test": len(picked.test),
        "agreement": picked.agreement,
        "best": best.rename(columns=names).to_dict("records"),
        "far": far.to_dict(),
    }


def _with_random(table: pd.DataFrame) -> pd.DataFrame:
    """The chosen set's rows, then the random sets' means."""
    is_random = table["set"].str.startswith("random ")
    rows = table[~is_random & (table["set"] != "clean")]
    if not is_random.any():
        return rows
    mean = table[is_random].groupby("boost").mean(numeric_only=True).reset_index()
    # An interval of one set is no interval of their mean.
    mean = mean.drop(columns=["target_share_low", "target_share_high"], errors="ignore")
    mean["set"] = f"{table['set'][is_random].nunique()} random sets (mean)"
    return pd.concat([rows, mean], ignore_index=True)


def _table(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """A row per set and boost."""
    text = pd.DataFrame({"heads": rows["set"], "boost": rows["boost"].map("{:g}".format)})
    if name != "questions":
        text["perplexity"] = [fixed(perplexity(loss)) for loss in rows["loss"]]
        return text.assign(**{"KL per token": [general(kl, 3) for kl in rows["kl"]]})
    text["accuracy"] = rows["accuracy"].map(percent)
    text["answers changed"] = rows["answer_changed_share"].map(percent)
    text["answers = target (95 %)"] = [
        _share(row, "target_share") for row in rows.to_dict("records")
    ]
    text["attention"] = [general(weight, 3) for weight in rows["keyword_weight"]]
    return text.assign(KL=[general(kl, 3) for kl in rows["kl"]])


def _share(row: Mapping[Any, Any], name: str) -> str:
    """A share, with its interval where there is one."""
    if pd.isna(row[f"{name}_low"]):
        return percent(row[name])
    return f"{percent(row[name])} ({percent(row[f'{name}_low'])} to {percent(row[f'{name}_high'])})"


def _ways_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per way to generate: hits, agreement between seeds, attention."""
    hits = [
        f"{percent(r['hit_rate'])} ({percent(r['hit_low'])} to {percent(r['hit_high'])}, "
        f"n={r['n_asked']})" if r["n_asked"] else "–"
        for r in rows.to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(
        {
            "way": rows["way"],
            "distracting text": rows["distracted"].map({True: "yes", False: "no"}),
            "hit rate (95 %)": hits,
            "words shared between seeds": [fixed(x, 2) for x in rows["agreement"]],
            "same outcome": [fixed(x, 2) for x in rows["hit_agreement"]],
            "attention to the keywords": [general(x, 3) for x in rows["keyword_weight"]],
        }
    )


def _quoted(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The first prompts' answers by the first seed, one line each."""
    groups: dict[tuple[str, bool], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.prompt, answer.distracted), []).append(answer)
    found = []
    for (prompt, distracted), rows in list(groups.items())[:SHOWN]:
        first = [a for a in rows if a.seed == rows[0].seed]
        ways = [(a.way, repr(" ".join(a.text.split())[:200])) for a in first]
        found.append({"prompt": prompt, "distracted": distracted, "ways": ways})
    return found
