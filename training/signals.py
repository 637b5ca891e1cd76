"""Signals that ask a run to end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from types import FrameType

STOPPING = b"\nStopping after this step; press Ctrl-C again to quit without saving.\n"


class Signals:
    """A context in which SIGINT, SIGTERM, a closed terminal (SIGHUP), and the signals that batch
    systems send before they end a job ask the run to end after the step; call it to see whether one
    has arrived. A second SIGINT ends the process at once.

    Ctrl-C also ends the ``tee`` behind a pipe, where writing then fails: see ``nobody_reads``. Only
    the main thread can handle signals: in another one this does nothing.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        numbers = []
        if threading.current_thread() is threading.main_thread():
            # Windows has the first two
            numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        # nohup's SIGHUP stays ignored
        ignored = [n for n in numbers[2:] if signal.getsignal(n) == signal.SIG_IGN]
        self.before = {n: signal.signal(n, self.receive) for n in numbers if n not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            # None: a handler that was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)
        self.received = self.received or number
        if number == getattr(signal, "SIGHUP", None):
            self.nobody_reads()
        with contextlib.suppress(OSError):
            os.write(2, STOPPING)

    @staticmethod
    def nobody_reads() -> None:
        """Discard further output to a terminal or a pipe: writing there would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            with contextlib.suppress(OSError):  # closed already
                if not stat.S_ISREG(os.fstat(number).st_mode):
                    os.dup2(nowhere, number)

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.received is not None
