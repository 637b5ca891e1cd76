"""The process and its surroundings: standard streams, other programs on the same cores, commands to
paste into a shell.

PyTorch is not imported here: ``settle`` has to run before it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# Measured with tests/other_programs.py; the default of libgomp is 300000.
SPIN_COUNT = "30000"


def settle() -> None:
    """What a script does before it loads PyTorch."""
    open_standard_streams()
    share_cores()


def open_standard_streams() -> None:
    """Open closed standard streams (cron, daemons, ``2>&-``) to nowhere, and escape what they
    cannot print.

    Otherwise the next opened file becomes standard error, and a warning lands in the checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        # a notebook's stream has another type, and prints anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def share_cores() -> None:
    """Let libgomp's threads sleep after a tenth of their default waiting time. Beside other
    programs, the thread that they wait for may have no core, and need the one they spin on. If
    either variable is set, the user has chosen."""
    if not (os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def total_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no POSIX
        return float("inf")


# ---- pipes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def unbreakable_pipes() -> Iterator[None]:
    """For commands whose files and exit status count, even if nobody reads their output."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(UnbreakablePipe, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class UnbreakablePipe:
    """A stream whose reader may leave (``| head -1``): later output goes nowhere."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.broken_is_fine():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.broken_is_fine():
            self.stream.flush()

    @contextlib.contextmanager
    def broken_is_fine(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # takes the stream's buffer, too
            os.close(nowhere)


# ---- commands to paste --------------------------------------------------------------------------


def quoted(path: Path | str) -> str:
    """A path as one word of a shell command, whatever its name. One that looks like an option gets
    a ``./``, an unprintable one the ``$'...'`` of bash and zsh."""
    text = str(path)
    if text.startswith(("-", "~")):
        text = f"./{text}"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if text.isprintable() and encodes(text, encoding):
        return shlex.quote(text)
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def program(name: str, module: str | None = None) -> str:
    """``python``, ``torchrun`` or ``tensorboard`` if the shell finds the one of this environment,
    else the path of this interpreter (with -m ``module``)."""
    here = Path(sys.executable or name)
    found = shutil.which(name)
    if found and Path(found).absolute().parent == here.parent:
        return name
    if here.parent != Path.cwd():  # a shell looks for a name without a / elsewhere
        with contextlib.suppress(ValueError):
            here = here.relative_to(Path.cwd())
    return quoted(here) + (f" -m {module}" if module else "")
