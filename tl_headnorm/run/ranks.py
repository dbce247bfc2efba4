"""The processes of one run, as `torchrun` and `accelerate launch` start them.

They share the units of a run (run/log.py) and exchange a few Python objects before and after it,
over gloo on the CPU whatever the device: no tensor moves, and nothing moves while they measure.
Imports torch only where there are several.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tl_headnorm.errors import InputError, first_line

T = TypeVar("T")
# How long a process may be behind the others before it counts as lost.
PATIENCE = timedelta(minutes=30)


class Elsewhere(InputError):
    """Another rank prints the error; this one ends silently."""

    quiet = True


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run, by the names of torch.distributed."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes the results."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        _wait(lambda: dist.all_gather_object(found, value))
        return found

    def broadcast(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; an error there ends all ranks."""
        made = self.agree(lambda: make() if self.first else None)
        return self.all_gather(made)[0]  # type: ignore[return-value]

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` in every rank; where it fails in any, all raise and one of them prints."""
        if self.world_size == 1:
            return work()
        error: Exception | None = None
        try:
            found = work()
        except Exception as problem:
            error = problem
        failed = [rank for rank, fails in enumerate(self.all_gather(error is not None)) if fails]
        if not failed:
            return found
        if error is None or (isinstance(error, (InputError, OSError)) and failed[0] != self.rank):
            error = Elsewhere(f"process {failed[0]} says what is wrong")
        error.agreed = True  # type: ignore[attr-defined]
        raise error

    def barrier(self, timeout: timedelta = PATIENCE) -> None:
        """Wait for all ranks. Raises InputError where one ended or is overdue."""
        if self.world_size > 1:
            import torch.distributed as dist

            _wait(lambda: dist.monitored_barrier(timeout=timeout))


def _wait(collective: Callable[[], Any]) -> None:
    """Wait for a collective in a thread, so that signals are heard meanwhile."""
    problems: list[Exception] = []

    def run() -> None:
        try:
            collective()
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


def _environment(name: str, default: int) -> int:
    """A whole number that a launcher set."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        raise InputError(
            f"{name}: expected a whole number from the launcher, found {os.environ[name]!r}"
        ) from None


def world_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return _environment("WORLD_SIZE", 1) if "RANK" in os.environ else 1


_connected: Ranks | None = None


def connect() -> Ranks:
    """The ranks of this run; the first call initialises the process group."""
    global _connected
    if world_size() == 1:
        return Ranks()
    if _connected is None:
        import torch.distributed as dist

        found = Ranks(
            _environment("RANK", 0), world_size(),
            _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1),
        )  # fmt: skip
        if not dist.is_initialized():
            _wait(lambda: dist.init_process_group("gloo", timeout=PATIENCE))
        _connected = found
    return _connected


def disconnect(error: BaseException | None = None) -> None:
    """Leave the process group. After an error that all ranks know of, wait until one has printed
    it: a launcher ends the rest when the first one fails."""
    global _connected
    if _connected is None:
        return
    import torch.distributed as dist

    if getattr(error, "agreed", False):
        with suppress(InputError):
            _connected.barrier(timedelta(seconds=5))
    _connected = None
    if dist.is_initialized() and error is None:
        dist.destroy_process_group()


def device_for(device_map: str, ranks: Ranks) -> str:
    """The device of this rank: with CUDA each takes the one of its local rank."""
    if ranks.world_size == 1 or device_map in ("cpu", "mps") or ":" in device_map:
        return device_map
    if device_map not in ("auto", "cuda"):
        raise InputError(
            f"device_map: expected a device for each of {ranks.world_size} processes, found "
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
            f"{ranks.local_world_size}; start {here} processes, or use --device_map cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"
