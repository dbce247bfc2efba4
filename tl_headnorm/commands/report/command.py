"""The command `report`: writes the pages of finished run directories."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from tl_headnorm.commands.report.page import write_report
from tl_headnorm.commands.report.settings import ReportSettings
from tl_headnorm.commands.report.texts import Texts, texts_of
from tl_headnorm.data.questions import Question
from tl_headnorm.errors import first_line
from tl_headnorm.run.loading import quiet, say
from tl_headnorm.run.reading import load_run


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
