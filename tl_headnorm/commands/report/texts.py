"""The texts of a run's questions, read again from its data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from tl_headnorm.data.questions import DATASETS, Question, Questions, load_questions
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Texts:
    """The questions in the order of the run's samples, or why there are none."""

    questions: Sequence[Question | None] | None = None
    why_not: str = "the questions were not at hand"


def texts_of(run: xr.Dataset) -> Texts:
    """The run's questions, where its data set can still be read and is unchanged."""
    record = run.attrs.get("dataset")
    record = record if isinstance(record, dict) else {}
    name = record.get("name")
    if name not in DATASETS:
        return Texts(None, f"the data set {name!r} is not registered here")
    try:
        questions = _reread(str(name), run.attrs.get("settings") or {}, record)
    except InputError as error:
        return Texts(None, f"the data set could not be read again ({error})")
    if record.get("sha256") is None or questions.sha256 != record["sha256"]:
        return Texts(None, "the data set has changed since (its sha256 differs)")
    ids = [str(i) for i in run["sample_id"].values]
    if [question.id for question in questions[: len(ids)]] == ids:
        return Texts(questions[: len(ids)])
    by_id = {question.id: question for question in questions}
    if len(by_id) < len(questions):
        return Texts(None, "its ids are not unique, and the run took others than the first")
    return Texts([by_id.get(i) for i in ids])


def _reread(name: str, settings: Mapping[str, Any], record: Mapping[str, Any]) -> Questions:
    """All questions the settings allow, from where the run read them."""
    options = settings.get("n_options")
    if isinstance(options, list) and not all(isinstance(n, int) for n in options):
        options = sorted({n for part in options for n in part})  # merged runs that differed in it
    given = {} if options is None else {"n_options": options}
    return load_questions(
        name, settings.get("data_dir"), str(record.get("split") or "test"), on_bad_record="skip",
        **given,
    )  # fmt: skip
