"""Run directories: made, taken back while empty, complete once meta.json is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.files import write_bytes


def is_finished(folder: Path) -> bool:
    """Whether meta.json is there: it is written last."""
    return (folder / "meta.json").is_file()


def new_run_dir(output_dir: str | Path, experiment_name: str) -> Path:
    """Make `<output_dir>/<experiment_name>_<YYYYmmdd_HHMMSS>`, a second later if it is taken.

    Raises InputError where it cannot be written.
    """
    moment = datetime.now()
    while True:
        path = Path(output_dir).expanduser() / f"{experiment_name}_{moment:%Y%m%d_%H%M%S}"
        try:
            path.mkdir(parents=True)
            write_bytes(path / ".writable", b"")
            (path / ".writable").unlink()
            return path
        except FileExistsError:
            if not path.is_dir():
                raise _not_writable(output_dir, "it is a file") from None
            moment += timedelta(seconds=1)
        except OSError as error:
            remove_if_empty(path)
            raise _not_writable(output_dir, first_line(error)) from None


def _not_writable(output_dir: str | Path, why: str) -> InputError:
    return InputError(
        f"output_dir: expected a directory that can be written, found {output_dir} ({why}); "
        "choose another with --output_dir"
    )


def remove_if_empty(path: Path) -> None:
    """Take back a run directory in which nothing was written."""
    try:
        path.rmdir()
    except OSError:
        return


@contextmanager
def run_dir(output_dir: str, name: str) -> Iterator[Path]:
    """A new run directory to fill; taken back if nothing was written before an error."""
    path = new_run_dir(output_dir, name)
    try:
        yield path
    except BaseException:
        remove_if_empty(path)
        raise
