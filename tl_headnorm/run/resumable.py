"""The directory of a run that is kept as it goes: begun, resumed, and what an interruption says."""

import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tl_headnorm.run import results
from tl_headnorm.run.checkpoints import Keeper, locked
from tl_headnorm.run.files import write_json
from tl_headnorm.run.loading import say
from tl_headnorm.run.ranks import Ranks, device_for, ranks
from tl_headnorm.run.resume import STATE, is_finished
from tl_headnorm.run.signals import Stopped, on_signals
from tl_headnorm.settings import Settings

SAID = "said"
VERBS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped"}


@dataclass
class KeptRun:
    """A run directory being filled; `placed` are the settings with this process's own device."""

    path: Path
    ranks: Ranks
    keeper: Keeper
    placed: Settings
    finished: bool

    @property
    def resumable(self) -> bool:
        """Whether anything measured is on disk."""
        share = getattr(self.keeper, "share", None)
        return share is not None and bool(share.saved or self.keeper.finished.any())

    def finish(self) -> None:
        """The run is complete: nothing is left to be resumed."""
        shutil.rmtree(self.path / STATE, ignore_errors=True)

    def first_to_say(self) -> bool:
        """Of several processes that end, one says so."""
        if self.ranks.world == 1:
            return True
        try:
            os.close(os.open(self.path / STATE / SAID, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # a full disk, or all is finished
            return self.ranks.first
        return True


@contextmanager
def kept_run(settings: Settings) -> Iterator[KeptRun]:
    """A new run directory, or the one that `resume` names; locked, with signals looked after.

    After an error or an interruption that left something to go on with, the directory stays and
    the message says how; else a new one is taken back.
    """
    every = ranks()
    if every.world == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        say(
            "accelerate started one process; without several GPUs it takes --multi_gpu for more, "
            "or use torchrun"
        )
    with on_signals(echoed=every.world > 1) as stop, ExitStack() as stack:
        path, finished = every.from_first(lambda: _open(settings, stack))
        state = path / STATE
        if not finished:
            every.together(lambda: every.first or stack.enter_context(locked(state, alone=False)))
        keeper = Keeper(state, settings.checkpoint_every, every, stop)
        run = KeptRun(path, every, keeper, settings, finished)
        try:
            device = every.together(lambda: device_for(settings.device_map, every))
            run.placed = replace(settings, device_map=device)
            yield run
        except (KeyboardInterrupt, Exception) as error:
            _leave(run, error, resumed=settings.resume is not None)
            raise
        finally:
            keeper.close()


def _open(settings: Settings, stack: ExitStack) -> tuple[Path, bool]:
    """The directory, made or locked by the first process, and whether it is finished."""
    if settings.resume is None:
        path = results.new_run_dir(settings.output_dir, settings.experiment_name)
        try:
            (path / STATE).mkdir()
            stack.enter_context(locked(path / STATE, alone=True))
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
    results.remove_if_empty(path)


def _leave(run: KeptRun, error: BaseException, *, resumed: bool) -> None:
    """Say how to go on, or take back a directory in which nothing is worth it."""
    alone = run.ranks.world == 1 or getattr(error, "agreed", False)
    if not run.resumable and not resumed and alone:
        if run.ranks.first:
            _take_back(run.path)
        return
    if is_finished(run.path):
        return
    how = f"to go on: tl-headnorm collect --resume {shlex.quote(str(run.path))}"
    spoken = getattr(error, "agreed", False) or run.first_to_say()
    if isinstance(error, KeyboardInterrupt):
        signum = getattr(error, "signum", signal.SIGINT)
        raise Stopped(signum, f"{VERBS[signum]}; {how}" if spoken else "") from None
    if not spoken:
        error.quiet = True  # type: ignore[attr-defined]
    error.hint = f"; what was measured is kept, {how}"  # type: ignore[attr-defined]
