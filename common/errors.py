"""User-facing errors and the exit status of each."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


class UserError(Exception):
    """An error that the user can fix, in one or two lines: what is wrong, where, what to do next.

    ``status`` is the exit status: 2 for bad use, 1 for a failure.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class Interrupted(Exception):
    """A signal asks the run to end. Raised between two steps or two batches of an evaluation.

    ``signal``: its number, 0 while unknown.
    """

    def __init__(self, signal: int = 0):
        super().__init__(signal)
        self.signal = signal


# ---- exit status --------------------------------------------------------------------------------


class ExitStatus:
    """The exit status of a command; see ``exit_status``."""

    code: int = 0


@contextlib.contextmanager
def exit_status(when_stopped: str) -> Iterator[ExitStatus]:
    """Turn the errors of a command into an exit status, and print each in a line or two:

        with exit_status("Stopped.") as status:
            status.code = command()
        return status.code

    1 or 2 for an error that the user can fix, 128 + N for signal N, 130 after Ctrl-C, with
    ``when_stopped`` printed. Other errors are bugs and keep their traceback.
    """
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
            "Is another program using the memory (nvidia-smi, top)? "
            "Else try a smaller --image-size, or --device cpu."
        )
        status.code = 1
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        print_error(f"{file}{error.strerror or error}")
        status.code = 1
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        status.code = 130


# ---- messages -----------------------------------------------------------------------------------


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    """The text of an error on one line, without the memory address that PIL puts into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text


def printable(path: Path | str) -> str:
    """A file name on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(path))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8 (surrogateescape)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# ---- out of memory ------------------------------------------------------------------------------

# Messages of errors other than OutOfMemoryError that mean out of memory: from the CPU's allocator,
# CUDA, its libraries and Triton.
NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
# Messages that may mean it: a library finds no memory when it starts; PyTorch tries every algorithm
# of cuDNN and swallows the out-of-memory error of each.
PERHAPS_NO_MEMORY = (
    "STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",
)


def is_oom_error(error: Exception) -> bool:
    """Whether an error, of whatever class, means out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    if any(words in message for words in NO_MEMORY):
        return True
    return any(words in message for words in PERHAPS_NO_MEMORY) and gpu_is_half_full()


def gpu_is_half_full() -> bool:
    """Whether less than half of the current GPU's memory is free or in PyTorch's unused cache."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + cached < total / 2
