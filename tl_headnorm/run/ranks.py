"""The processes of one run, as `torchrun` and `accelerate launch` start them.

They share the work and say a few words to one another before and after it, over gloo on the
CPU whatever the device: no tensor moves, and none moves while they measure.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.launch import number, processes

T = TypeVar("T")
# How long a process may be behind the others before it counts as lost.
PATIENCE = timedelta(minutes=30)


class Elsewhere(InputError):
    """Another process has said what is wrong; this one ends without a word."""

    quiet = True


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run: `rank` of `world`, `local_rank` of `local_world` here."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes the results."""
        return self.rank == 0

    def everyones(self, mine: T) -> list[T]:
        """What each process has to say, by rank."""
        if self.world == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        _call(lambda: dist.all_gather_object(found, mine))
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, told to all; its InputError ends them all."""
        made = self.together(lambda: make() if self.first else None)
        return self.everyones(made)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Do the same work everywhere; where it fails anywhere all end, and one says why."""
        if self.world == 1:
            return work()
        error: Exception | None = None
        try:
            found = work()
        except Exception as problem:
            error = problem
        failed = [rank for rank, fails in enumerate(self.everyones(error is not None)) if fails]
        if not failed:
            return found
        speaks = failed[0] == self.rank
        if error is None or (isinstance(error, (InputError, OSError)) and not speaks):
            error = Elsewhere(f"process {failed[0]} says what is wrong")
        error.agreed = True  # type: ignore[attr-defined]
        raise error

    def wait(self, patience: timedelta = PATIENCE) -> None:
        """Until all are here. Raises InputError where one ended or is overdue."""
        if self.world > 1:
            import torch.distributed as dist

            _call(lambda: dist.monitored_barrier(timeout=patience))


def _call(work: Callable[[], Any]) -> None:
    """Wait for the others in a thread of its own, so that signals are heard meanwhile."""
    problems: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # gloo raises RuntimeError, the store its own kinds
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if problems:
        raise InputError(
            "processes: expected all processes of the run until its end, lost one "
            f"({first_line(problems[0])})"
        ) from problems[0]


_connected: Ranks | None = None


def ranks() -> Ranks:
    """The processes of this run; the first call connects them."""
    global _connected
    if processes() == 1:
        return Ranks()
    if _connected is None:
        import torch.distributed as dist

        found = Ranks(
            number("RANK", 0), number("WORLD_SIZE", 1),
            number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1),
        )  # fmt: skip
        if not dist.is_initialized():
            _call(lambda: dist.init_process_group("gloo", timeout=PATIENCE))
        _connected = found
    return _connected


def leave(error: BaseException | None = None) -> None:
    """Part from the others; after an error all know of, not before one has spoken: a launcher
    ends the rest when the first one fails."""
    global _connected
    if _connected is None:
        return
    import torch.distributed as dist

    if getattr(error, "agreed", False):
        with suppress(InputError):
            _connected.wait(timedelta(seconds=5))
    _connected = None
    if dist.is_initialized() and error is None:
        dist.destroy_process_group()


def device_for(device_map: str, ranks: Ranks) -> str:
    """The device of this process: with CUDA each takes its own."""
    if ranks.world == 1:
        return device_map
    if device_map not in ("auto", "cuda"):
        if device_map in ("cpu", "mps") or ":" in device_map:
            return device_map
        raise InputError(
            f"device_map: expected a device for each of {ranks.world} processes, found "
            f"{device_map}, which spreads one model over all of them; start one process, or use "
            "--device_map auto"
        )
    import torch

    if not torch.cuda.is_available():
        return device_map
    here = torch.cuda.device_count()
    if ranks.local_rank >= here:
        raise InputError(
            f"device_map: expected a GPU for each process on this machine, found {here} for "
            f"{ranks.local_world}; start {here} processes, or use --device_map cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"
