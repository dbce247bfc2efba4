"""SIGINT and SIGTERM: the batch at work is finished and what was measured is kept."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun hands on the terminal's SIGINT that its processes got themselves: one key press.
ECHO_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; `message` says how it is continued."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum, self.message = signum, message

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class Stop:
    """What a signal does: stop at once, or when the work that is `held` lets go."""

    def __init__(self, *, echoed: bool = False) -> None:
        self.signum: int | None = None
        self._holds, self._echoed, self._first = False, echoed, 0.0

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        """The handler; a second signal of the same kind ends the process at once."""
        now = time.monotonic()
        if self.signum is not None:
            if not (self._echoed and now - self._first < ECHO_SECONDS):
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.signum, self._first = signum, now
        if not self._holds:
            raise Stopped(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for `check`."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        self.check()

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def on_signals(*, echoed: bool = False) -> Iterator[Stop]:
    """Install the handlers, in the main thread only, and put the old ones back.

    `echoed`: a launcher may hand on the signal that the terminal sent already.
    """
    stop = Stop(echoed=echoed)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop.handle) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
