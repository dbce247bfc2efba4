"""Stages of a study: each pass over samples has a run log of its own, so that the study resumes.

The stages are numbered as they begin. A resumed study does again what lies between them, finds the
finished units of every stage in `.state/stage_NNNN`, and goes on with the first that is not whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tl_headnorm.run.loading import say
from tl_headnorm.run.log import InMemory, OnDisk, RunLog
from tl_headnorm.run.resume import ResumableRun, resumable_run
from tl_headnorm.settings import Settings

S = TypeVar("S", bound=Settings)
# A stage of fewer tokens is done again sooner than its log is written.
LEAST_TOKENS = 4096


class Stages:
    """The logs of one study's stages, in the order in which they begin."""

    def __init__(self, run: ResumableRun, every: float) -> None:
        self.run, self.every, self.number = run, every, 0

    def log(self) -> OnDisk:
        """The log of the next stage."""
        self.number += 1
        folder = self.run.state / f"stage_{self.number:04d}"
        folder.mkdir(exist_ok=True)
        return OnDisk(folder, self.every, stop=self.run.stop)


_stages: ContextVar[Stages | None] = ContextVar("stages", default=None)


def stage_log(n_tokens: int) -> RunLog:
    """The log of a stage of `n_tokens`; in memory where it is short, or no study is at work."""
    stages = _stages.get()
    return InMemory() if stages is None or n_tokens < LEAST_TOKENS else stages.log()


def run_study(settings: S, command: str, work: Callable[[S, Path], None]) -> Path:
    """Do a study in its run directory, new or the one that `resume` names; the directory."""
    with resumable_run(settings, command) as run:
        if run.finished:
            say(f"{run.path} is finished: nothing is left to do")
            return run.path
        with _numbered(Stages(run, settings.checkpoint_every)):
            work(replace(run.settings, resume=None), run.path)
        run.finish()
    return run.path


@contextmanager
def _numbered(stages: Stages) -> Iterator[None]:
    """While inside, `stage_log` gives the logs of these stages."""
    token = _stages.set(stages)
    try:
        yield
    finally:
        _stages.reset(token)
