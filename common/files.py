"""Files in folders that belong to the user: written whole or not at all, and never over a file of
the user's."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# All our temporary files and folders have such a name, and nothing else has: it identifies what a
# killed run left behind.
TEMPORARY = re.compile(r"\.learn-to-pay-attention-[0-9a-f]{16}\.tmp")
LEFTOVER_AGE = 3600.0  # seconds after which a temporary file counts as left behind by a killed run


# ---- write --------------------------------------------------------------------------------------


def replace_file(
    path: Path, write: Callable[[BinaryIO], object], *, previous: Path | None = None
) -> None:
    """Write a file under a temporary name in its folder, flush it to the disk, then rename it:
    there is never half a file. ``previous``, if given, is the new name of the old file. The caller
    makes sure that neither is a file of the user's.

    Raises what ``write`` raises (the old file is then untouched), and OSError naming the file.
    """
    temporary = temporary_in(path.parent)
    try:
        file = open(temporary, "xb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            _keep_as(path, previous)
        os.replace(temporary, path)
        if os.name == "posix":
            _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _keep_as(path: Path, previous: Path) -> None:
    """Give a file a second name, instead of whatever has that name."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links: for a moment only the previous file exists
        os.replace(path, previous)


def _flush_folder(folder: Path) -> None:
    """Flush a new name to the disk: the folder holds it, not the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- temporary files ----------------------------------------------------------------------------


def temporary_in(folder: Path) -> Path:
    """A name for a new temporary file or folder. Create it exclusively."""
    return folder / f".learn-to-pay-attention-{secrets.token_hex(8)}.tmp"


def remove_leftovers(folder: Path, age: float = LEFTOVER_AGE) -> None:
    """Remove our temporary files and folders that were not written to for ``age`` seconds."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                if time.time() - _last_change(path) >= age:
                    _remove(path)


def _last_change(path: Path) -> float:
    """The time of the last change of a file, or of a folder and the files in it."""
    return max(each.lstat().st_mtime for each in (path, *path.glob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---- names --------------------------------------------------------------------------------------


def free_path(path: Path, replaceable: Callable[[Path], bool] = lambda path: False) -> Path:
    """``path``, or the first of name-2.ending, name-3.ending, ... that does not exist, or is
    ``replaceable``."""
    numbered = (
        path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2)
    )
    candidates = itertools.chain([path], numbered)
    return next(each for each in candidates if not os.path.lexists(each) or replaceable(each))


def set_aside(path: Path, why: str) -> None:
    """Rename a file that is in the way, and print the new name: it may be the user's."""
    other = free_path(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    os.rename(path, other)
    print(f"{path} {why}: it is kept as {other.name}", flush=True)


def identity(path: Path | int) -> tuple[int, int] | None:
    """The device and inode of a path or an open descriptor; None if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def expand_user(path: str | os.PathLike) -> Path:
    """The path with ~ and ~user expanded to the home folder. As in a shell, ./~ is a file of that
    name; so is ~name if such a file exists. Raises ValueError without a home folder."""
    text, path = os.fspath(path), Path(path)  # a Path drops the ./
    first = path.parts[0] if path.parts else ""
    if not text.startswith("~") or first != "~" and os.path.lexists(path):
        return path
    try:
        if first == "~" and os.environ.get("HOME") == "":  # else ~/x would be /x
            raise RuntimeError
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path}: there is no home folder for {first} (a file of that name is ./{first})"
        ) from None


# ---- folders ------------------------------------------------------------------------------------


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its missing parents. Returns those that this call made, for
    ``remove_made``. Raises OSError."""
    made = []
    for _ in range(10):  # another process may be removing a parent that it had made
        with contextlib.suppress(FileNotFoundError):
            for folder in (*reversed(path.parents), path):
                if not folder.is_dir():
                    # another process was faster, or it is a file
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir()
                        made.append(folder)
        if path.is_dir():
            return made
    code = errno.ENOTDIR if os.path.lexists(path) else errno.ENOENT
    raise OSError(code, os.strerror(code), str(path))


def remove_made(made: list[Path]) -> None:
    """Remove the folders that ``make_folders`` made, if they are still empty."""
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()
