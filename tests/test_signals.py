"""Signals that ask a run to end."""

import os
import pty
import signal

import pytest

from training.signals import Signals


def test_a_second_interrupt_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    # ignored, where the tests run in the background of a shell
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals() and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("without_nohup")
# Ctrl-C ends `| tee` as well
@pytest.mark.parametrize("numbers", [[signal.SIGHUP], [signal.SIGINT, signal.SIGHUP]])
@pytest.mark.parametrize("channel", [pty.openpty, os.pipe])
def test_a_closed_terminal_ends_the_run_and_no_line_written_after_it_does_harm(channel, numbers):
    here, there = channel()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(there, 1)
        os.dup2(there, 2)
        with Signals() as signals:
            os.close(here)
            with pytest.raises(OSError):
                os.write(1, b"nobody reads this")
            for number in numbers:
                os.kill(os.getpid(), number)
            assert signals.received == numbers[0]
            assert os.write(1, b"nor this") == os.write(2, b"nor that") == 8
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(there)


def test_nohup_is_heeded(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with Signals() as signals:
        assert set(signals.before) == {signal.SIGINT, signal.SIGTERM}
