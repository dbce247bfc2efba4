"""Runs that can be resumed: their directory, the settings they go on with, and what an
interruption leaves and says."""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.directory import is_finished, new_run_dir, remove_if_empty
from tl_headnorm.run.files import locked, write_json, write_text
from tl_headnorm.run.ranks import Ranks, connect, device_for
from tl_headnorm.run.signals import Stop, Stopped, on_signals
from tl_headnorm.settings import Settings

STATE = ".state"
SAID = "said"
COMMAND = "command"
VERBS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped"}
# How a run is carried out, not what comes out. Where the model and the questions lie may change
# too: what they hold may not, which is checked when they are open.
FREE = (
    "resume", "checkpoint_every", "device_map", "self_check", "validate_samples",
    "trust_remote_code", "pickled_weights", "debug", "model_path", "adapter_path", "data_dir",
)  # fmt: skip


def settings_of(
    run_dir: str | Path, kind: type[Any] = Settings, command: str = "collect"
) -> dict[str, Any]:
    """The settings in a run's config.json. Raises InputError where there is no run to resume."""
    folder = Path(run_dir).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"resume: expected a run directory of {command}, found nothing at {folder}"
        )
    path = folder / "config.json"
    if not is_finished(folder) and not (folder / STATE).is_dir():
        raise InputError(
            f"resume: expected a directory that {command} left unfinished, found no {STATE} in "
            f"{folder}; check the path, or start a new run"
        )
    began = _command_of(folder, command)
    if began != command:
        raise InputError(
            f"resume: expected a run of {command}, found one of {began} in {folder}; use "
            f"tl-headnorm {began} --resume"
        )
    if not path.is_file():
        raise InputError(
            f"resume: expected config.json in {folder}, found none: the run ended before it began "
            "to measure; start it again"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name: f for f in fields(kind)}
        unknown = sorted(set(found) - set(known))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"resume: expected {path} as {command} wrote it, found it damaged ({first_line(error)})"
        ) from None
    if unknown:
        raise InputError(
            f"resume: expected settings this version knows, found {', '.join(unknown)} in {path}; "
            "resume it with the version that began it"
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _command_of(folder: Path, default: str) -> str:
    """The command that began a run that is not finished."""
    path = folder / STATE / COMMAND
    return path.read_text(encoding="utf-8").strip() if path.is_file() else default


def resumed(
    run_dir: str | Path,
    given: Mapping[str, Any],
    kind: type[Any] = Settings,
    command: str = "collect",
) -> Any:
    """The run's settings with those given that may change; the others are refused by name."""
    began = settings_of(run_dir, kind, command)
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in FREE and name in began and value != began[name]:
            raise InputError(
                f"{name}: expected {_shown(began[name])}, as the run in {run_dir} began, found "
                f"{_shown(value)}; leave it out, or start a new run without --resume"
            )
    return kind(**{**began, **given, "resume": str(run_dir)})


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


@dataclass
class ResumableRun:
    """A run directory at work; `settings` name this rank's own device."""

    path: Path
    ranks: Ranks
    stop: Stop
    settings: Any  # of the command's own class
    finished: bool
    command: str = "collect"

    @property
    def state(self) -> Path:
        """The folder of its log."""
        return self.path / STATE

    @property
    def resumable(self) -> bool:
        """Whether any unit of work is on disk."""
        return any(self.state.rglob("[0-9]*.npz"))

    def finish(self) -> None:
        """The run is complete: its state is not needed any more."""
        shutil.rmtree(self.state, ignore_errors=True)

    def first_to_say(self) -> bool:
        """Of several ranks that end, one prints how to go on."""
        if self.ranks.world_size == 1:
            return True
        try:
            os.close(os.open(self.state / SAID, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # a full disk, or all is finished
            return self.ranks.first
        return True


@contextmanager
def resumable_run(settings: Settings, command: str = "collect") -> Iterator[ResumableRun]:
    """A new run directory, or the one that `resume` names: locked, signals handled.

    After an error or an interruption the directory stays where any unit of work is on disk, and
    the message says how to go on; else a new one is taken back.
    """
    ranks = connect()
    if ranks.world_size == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        print(
            "accelerate started one process; without several GPUs it takes --multi_gpu for more, "
            "or use torchrun",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    with on_signals(echoed=ranks.world_size > 1) as stop, ExitStack() as stack:
        path, finished = ranks.broadcast(lambda: _open(settings, command, stack))
        if not finished:
            ranks.agree(lambda: ranks.first or stack.enter_context(locked(path / STATE)))
        run = ResumableRun(path, ranks, stop, settings, finished, command)
        try:
            device = ranks.agree(lambda: device_for(settings.device_map, ranks))
            run.settings = replace(settings, device_map=device)
            yield run
        except (KeyboardInterrupt, Exception) as error:
            _leave(run, error)
            raise


def _open(settings: Settings, command: str, stack: ExitStack) -> tuple[Path, bool]:
    """The directory, made or locked by rank 0, and whether it is finished."""
    if settings.resume is None:
        path = new_run_dir(settings.output_dir, settings.experiment_name)
        try:
            (path / STATE).mkdir()
            stack.enter_context(locked(path / STATE, alone=True))
            write_text(path / STATE / COMMAND, command + "\n")
            write_json(path / "config.json", settings.as_dict())
        except BaseException:
            _take_back(path)
            raise
        return path, False
    path = Path(settings.resume).expanduser()
    if is_finished(path):  # and ended, maybe, before it had cleared up
        shutil.rmtree(path / STATE, ignore_errors=True)
        return path, True
    stack.enter_context(locked(path / STATE, alone=True))
    (path / STATE / SAID).unlink(missing_ok=True)
    return path, False


def _take_back(path: Path) -> None:
    shutil.rmtree(path / STATE, ignore_errors=True)
    (path / "config.json").unlink(missing_ok=True)
    remove_if_empty(path)


def _leave(run: ResumableRun, error: BaseException) -> None:
    """Say how to go on, or take back a new directory in which nothing is done."""
    agreed = getattr(error, "agreed", False)
    new = run.settings.resume is None and not run.resumable
    if new and (run.ranks.world_size == 1 or agreed):
        if run.ranks.first:
            _take_back(run.path)
        return
    if is_finished(run.path):
        return
    how = f"to go on: tl-headnorm {run.command} --resume {shlex.quote(str(run.path))}"
    spoken = agreed or run.first_to_say()
    if isinstance(error, KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        raise Stopped(signum, f"{VERBS[signum]}; {how}" if spoken else "") from None
    if not spoken:
        error.quiet = True  # type: ignore[attr-defined]
    error.hint = f"; what was measured is kept, {how}"  # type: ignore[attr-defined]
