"""Signals that ask a run to end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading


class Signals:
    """SIGINT, SIGTERM, a terminal that is closed (SIGHUP), and what batch systems send before they
    end a job, ask the run to end after the step; a second SIGINT ends the process at once. Ctrl-C
    also ends the `tee` behind a pipe, and whatever wrote there would then fail: see
    ``nobody_reads``. Python gives signals to the main thread only: in another one there are none.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> Signals:
        # Windows has the first two
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        # nohup's SIGHUP stays ignored
        ignored = [n for n in numbers[2:] if signal.getsignal(n) == signal.SIG_IGN]
        main = threading.current_thread() is threading.main_thread()
        self.before = {
            n: signal.signal(n, self.receive) for n in numbers if main and n not in ignored
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            # None: not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)
        self.received = self.received or number
        if number == getattr(signal, "SIGHUP", None):
            self.nobody_reads()
        with contextlib.suppress(OSError):
            os.write(
                2,
                b"\nStopping after this step; once more Ctrl-C to leave at once without saving.\n",
            )

    @staticmethod
    def nobody_reads() -> None:
        """Send what is still printed to nowhere, where it went to a terminal or a pipe: writing
        there would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            with contextlib.suppress(OSError):  # closed already
                if not stat.S_ISREG(os.fstat(number).st_mode):
                    os.dup2(nowhere, number)

    def __call__(self) -> bool:
        return self.received is not None
