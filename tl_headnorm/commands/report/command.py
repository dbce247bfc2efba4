"""What `report` does: a run directory's page, written anew."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from tl_headnorm.commands.report.page import Texts, write_report
from tl_headnorm.commands.report.settings import ReportSettings
from tl_headnorm.data.questions import DATASETS, Question, Questions, load_questions
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.loading import quiet, say
from tl_headnorm.run.results import load_run


def run_report(settings: ReportSettings) -> Path:
    """Write every run's report.html; the last run's directory."""
    quiet()
    runs = [(Path(name).expanduser(), load_run(name)) for name in settings.runs]
    for path, run in runs:
        texts = texts_of(run) if settings.texts else Texts(None, "--texts false left them out")
        write_report(run, path, texts)
        size = (path / "report.html").stat().st_size
        missing = "" if texts.questions is not None else f"; no question texts: {texts.why_not}"
        say(f"{path / 'report.html'} ({size / 1e6:.1f} MB{missing})")
    return runs[-1][0]


def report_of_new_run(
    run: xr.Dataset, path: Path, questions: Sequence[Question] | None = None
) -> None:
    """The page of a run that was just made. A fault in it does not cost the run.

    Without questions they are read again, as for a finished run.
    """
    try:
        write_report(run, path, texts_of(run) if questions is None else Texts(questions))
    except Exception as error:
        warnings.warn(
            f"report.html was not written ({type(error).__name__}: {first_line(error)}); the run "
            f"is whole: tl-headnorm report {path}",
            stacklevel=2,
        )


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


def _reread(name: str, settings: dict[str, Any], record: dict[str, Any]) -> Questions:
    """All questions the settings allow, from where the run read them."""
    options = settings.get("n_options")
    if isinstance(options, list) and not all(isinstance(n, int) for n in options):
        options = sorted({n for part in options for n in part})  # merged runs that differed in it
    given = {} if options is None else {"n_options": options}
    return load_questions(
        name, settings.get("data_dir"), str(record.get("split") or "test"), on_bad_record="skip",
        **given,
    )  # fmt: skip
