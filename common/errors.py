"""Errors a user can mend, how they are told, and the exit status of each."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can mend, in one or two lines: what is wrong, where, and what to do next.

    ``status`` is the exit status: 2 for bad use, 1 for a failure."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


# What else than OutOfMemoryError says that memory ran out: the CPU's allocator, CUDA, its libraries
# and Triton. And what may: a library that finds no memory to begin with; cuDNN, of which PyTorch
# tries every algorithm and swallows each one's out-of-memory.
NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


PERHAPS_NO_MEMORY = (
    "STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",
)


class Interrupted(Exception):
    """Raised between two steps (or two batches of an evaluation) when a signal asks the run to end.
    ``signal``: its number, once it is known."""

    def __init__(self, signal: int = 0):
        super().__init__(signal)
        self.signal = signal


def is_oom_error(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that there was not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (
        any(words in said for words in NO_MEMORY)
        or any(words in said for words in PERHAPS_NO_MEMORY)
        and gpu_is_half_full()
    )


def gpu_is_half_full() -> bool:
    """Whether less than half of the current GPU's memory is free, or in PyTorch's hands and unused."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < total / 2


class ExitStatus:
    """The exit status of a command; see exit_status."""

    code: int = 0


@contextlib.contextmanager
def exit_status(when_stopped: str) -> Iterator[ExitStatus]:
    """Turn the errors of a command into an exit status, and tell them in a line or two:

        with exit_status("Stopped.") as status:
            status.code = command()
        return status.code

    1 or 2 for what a user can mend, 128 + N for signal N, 130 after Ctrl-C, when ``when_stopped``
    is printed."""
    status = ExitStatus()
    try:
        yield status
    except Interrupted as stop:  # in the sanity pass; a run catches its own
        status.code = 128 + stop.signal
    except UserError as error:
        print_error(str(error))
        status.code = error.status
    except (RuntimeError, MemoryError) as error:
        if not is_oom_error(error):
            raise
        print_error(
            f"out of memory outside the training step: {one_line(error)[:200]}\n"
            f"Is another program using the memory (nvidia-smi, top)? Else try a smaller --image-size, or --device cpu."
        )
        status.code = 1
    except OSError as error:
        print_error(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        status.code = 1
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        status.code = 130


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    """An error's text in one line, without the memory address that PIL puts into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text


def printable(path: Path | str) -> str:
    """A name on one line, with what cannot be printed escaped."""
    text = os.fspath(path)
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable()
        else c.encode("unicode_escape").decode()
        if not "\udc80" <= c <= "\udcff"
        else f"\\x{ord(c) - 0xDC00:02x}"
        for c in text
    )
