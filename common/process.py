"""The process and what surrounds it: standard streams, other programs on the same cores, commands
to paste into a shell.

PyTorch is not imported here: ``settle`` has to run before it is loaded."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Measured with tests/other_programs.py; libgomp's own is 300000.
SPIN_COUNT = "30000"


def settle() -> None:
    """What a script does before it loads PyTorch."""
    open_standard_streams()
    share_cores()


def open_standard_streams() -> None:
    """Open what was closed (cron, daemons, ``2>&-``) to nowhere, and never fail on a name that
    cannot be printed.

    Else the next file that is opened becomes standard error, and a warning lands in the checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        # a notebook's is something else, and prints anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def share_cores() -> None:
    """Have libgomp's threads sleep after a tenth of its own time of waiting: beside other programs,
    the thread that they wait for may have no core, and theirs is the one that it needs. Whoever has
    set one of the two variables has chosen."""
    if not (os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


class UnbreakablePipe:
    """A stream whose reader may leave (``| head -1``): what is then still written goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
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
            os.dup2(nowhere, self.stream.fileno())  # takes what is in the stream's buffer, too
            os.close(nowhere)


@contextlib.contextmanager
def unbreakable_pipes() -> Iterator[None]:
    """For commands whose files and exit status count, whoever reads what they print."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(UnbreakablePipe, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


# ---- commands that are printed to be pasted -----------------------------------------------------


def quoted(path: Path | str) -> str:
    """A path as a word of a shell's command line, whatever its name: also one that looks like an
    option, and, in the $'...' of bash and zsh, one that cannot be printed."""
    text = str(path)
    if text.startswith(("-", "~")):
        text = f"./{text}"
    if text.isprintable() and encodes(text, getattr(sys.stdout, "encoding", None) or "utf-8"):
        return shlex.quote(text)
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def encodes(text: str, encoding: str) -> bool:
    try:
        return text.encode(encoding) is not None
    except UnicodeEncodeError:
        return False


def program(name: str, module: str | None = None) -> str:
    """``python``, ``torchrun`` or ``tensorboard`` as the shell finds it, where it finds the one of
    this environment; else this interpreter's path (with -m ``module``)."""
    here = Path(sys.executable or name)
    found = shutil.which(name)
    if found and Path(found).absolute().parent == here.parent:
        return name
    if here.parent != Path.cwd():  # a name without a / is looked for elsewhere
        with contextlib.suppress(ValueError):
            here = here.relative_to(Path.cwd())
    return quoted(here) + (f" -m {module}" if module else "")
