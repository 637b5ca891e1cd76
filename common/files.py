"""Files in folders that belong to somebody else: written whole or not at all, and never over a file
of theirs."""

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

# Every temporary file and folder of ours is called so, and nothing else is: what a killed run left
# is known by it.
TEMPORARY = re.compile(r"\.learn-to-pay-attention-[0-9a-f]{16}\.tmp")
LEFTOVER_AGE = 3600.0  # seconds until a temporary file counts as left over by a run that was killed


def temporary_in(folder: Path) -> Path:
    """A name for a new temporary file or folder. Create it exclusively."""
    return folder / f".learn-to-pay-attention-{secrets.token_hex(8)}.tmp"


def replace_file(
    path: Path, write: Callable[[BinaryIO], object], *, previous: Path | None = None
) -> None:
    """Write a file under a temporary name in its folder, see it to the disk, and only then give it
    its name: there is never half a file. What `path` held before stays under the name `previous`,
    if one is given. The caller knows that both names are ours.

    Raises what `write` raises (the file there before is untouched), and OSError naming the file."""
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
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            # a file system without links: for a moment there is only the one before
            except OSError:
                os.replace(path, previous)
        os.replace(temporary, path)
        if os.name == "posix":  # the new name itself is kept by the folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def remove_leftovers(folder: Path, age: float = LEFTOVER_AGE) -> None:
    """Remove our temporary files and folders that nobody has written to for `age` seconds."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                if time.time() - max(p.lstat().st_mtime for p in (path, *path.glob("*"))) >= age:
                    shutil.rmtree(
                        path
                    ) if path.is_dir() and not path.is_symlink() else path.unlink()


def free_path(path: Path, ours: Callable[[Path], bool] = lambda path: False) -> Path:
    """`path`, or the first of name-2.ending, name-3.ending, ... that nothing has, or a file that is
    ours to replace."""
    numbered = (
        path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2)
    )
    return next(
        each
        for each in itertools.chain([path], numbered)
        if not os.path.lexists(each) or ours(each)
    )


def set_aside(path: Path, why: str) -> None:
    """Give a file that stands in our way another name in its folder, and say so: it may be
    somebody's."""
    other = free_path(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    os.rename(path, other)
    print(f"{path} {why}: it is kept as {other.name}", flush=True)


def identity(path: Path | int) -> tuple[int, int] | None:
    """Which file or folder of which disk has this name, or is open as this descriptor; None where
    there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its parents where they are missing. Returns those that were made by this
    call, for `remove_made`. Raises OSError."""
    made = []
    for _ in range(10):  # somebody else may just be removing a parent that they had made
        with contextlib.suppress(FileNotFoundError):
            for each in (*reversed(path.parents), path):
                if not each.is_dir():
                    # somebody else was faster, or it is a file
                    with contextlib.suppress(FileExistsError):
                        each.mkdir()
                        made.append(each)
        if path.is_dir():
            return made
    code = errno.ENOTDIR if os.path.lexists(path) else errno.ENOENT
    raise OSError(code, os.strerror(code), str(path))


def remove_made(made: list[Path]) -> None:
    """Remove the folders that `make_folders` made, as far as nothing has come into them."""
    for each in reversed(made):
        with contextlib.suppress(OSError):
            each.rmdir()


def expand_user(path: str | os.PathLike) -> Path:
    """The path with ~ and ~user as the home folder that it stands for; ./~ is a file of that name,
    as in a shell, and so is ~name where one is there. ValueError where there is no home folder."""
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
