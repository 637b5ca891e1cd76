"""Archives of data sets: downloaded whole or not at all, verified, and unpacked inside one
folder."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from common.errors import UserError, one_line
from common.files import expand_user, make_folders, remove_leftovers, remove_made, temporary_in
from common.hub import SOCKET_TIMEOUT
from datasets.image_files import shows_progress

ATTEMPTS = 3  # in a row without a new byte before a download is given up
PAUSE = 2.0  # seconds between two attempts
BLOCK = 2**18  # bytes read at a time
PASSING = (408, 416, 429)  # and 500 and above: HTTP errors that may be temporary


class _Broken(Exception):
    """A connection that failed or ended early: worth another attempt."""


# ---- where the data are -------------------------------------------------------------------------


def data_folder(data_dir: str | os.PathLike) -> Path:
    """--data-dir as a path. Raises UserError for a ~ without a home folder."""
    try:
        return expand_user(data_dir)
    except ValueError as error:
        raise UserError(f"--data-dir {error}") from None


def find_named(folder: Path, names: Sequence[str]) -> list[Path]:
    """The paths in a folder with one of the names, in any case, in the order of ``names``."""
    folded = [name.casefold() for name in names]
    found = [path for path in _listed(folder) if path.name.casefold() in folded]
    return sorted(found, key=lambda path: (folded.index(path.name.casefold()), path.name))


def find_below(root: Path, names: Sequence[str]) -> list[Path]:
    """The paths with one of the names in ``root``, then those in its folders: archives get unpacked
    one level too deep, or beside other things."""
    folders = (path for path in sorted(_listed(root)) if not path.name.startswith("."))
    inside = (path for folder in folders for path in find_named(folder, names))
    return [*find_named(root, names), *inside]


def find_beside(root: Path, names: Sequence[str]) -> list[Path]:
    """The paths with one of the names beside ``root``, and the two folders above ``root``."""
    above = root.absolute().parents[:2]
    return [*(find_named(above[0], names) if above else ()), *above]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # not a folder, or not readable
        return []


def check_data_dir(
    root: Path, download: bool, what: str, folder: str, other: Path | None, by_hand: str
) -> None:
    """Refuse what looks like a mistyped --data-dir instead of downloading into it.

    Args:
        root: the data folder.
        download: whether downloading into ``root`` is allowed.
        what, by_hand: for messages: the data set, and what to do without a download.
        folder: the name of the folder that ``root`` should hold.
        other: the data set's path, if it was found near ``root``.

    Raises:
        UserError: ``root`` is a file, or mistyped, or a download is not allowed.
    """
    if root.exists() and not root.is_dir():
        raise UserError(
            f"--data-dir {root} is a file, not a folder. Give the folder that holds {folder}/"
        )
    if other:
        raise UserError(
            f"no {what} in {root}, but there is one at {other}: give --data-dir {other.parent}"
        )
    if not root.is_dir() and not (download and root.absolute().parent.is_dir()):
        raise UserError(f"data folder {root} does not exist. Check --data-dir. {by_hand}")
    if not download:
        raise UserError(f"no {what} in {root}. {by_hand}")


def check_space(folder: Path, mib: int, what: str) -> None:
    """Raises UserError if fewer than ``mib`` MiB are free in ``folder`` (in its parent, if it does
    not exist yet)."""
    existing = folder if folder.is_dir() else folder.absolute().parent
    free = shutil.disk_usage(existing).free // 2**20
    if free < mib:
        raise UserError(
            f"{what} needs {mib:,} MiB of disk space in {folder}, where {free:,} MiB are free. "
            f"Make room, or give a --data-dir on another disk"
        )


def md5_of(path: Path) -> str:
    """The md5 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_archive(path: Path, md5: str, url: str) -> None:
    """Raises UserError unless the file is the whole archive."""
    try:
        is_whole = md5_of(path) == md5
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). "
            f"Make it readable, or move it away and start again"
        ) from None
    if not is_whole:
        size = path.stat().st_size
        raise UserError(
            f"{path} is damaged or half a download ({size:,} bytes, its md5 is not {md5}). "
            f"Move it away and start again, or fetch it from {url}"
        )


# ---- download -----------------------------------------------------------------------------------


def fetch(
    url: str, md5: str, path: Path, *, size_mib: int, what: str, by_hand: str, progress: bool
) -> None:
    """Download ``url`` to ``path``, creating its folder.

    The file gets its name only when it is whole, and only if nothing has that name by then. So a
    broken download leaves nothing, and two processes can safely download the same file.

    Args:
        size_mib: approximate size; twice that is refused.
        what, by_hand: for messages: the data set, and what to do without a download.

    Raises:
        UserError: the download failed, or there is too little disk space.
    """
    root = path.parent
    folder = temporary_in(root)
    made = []
    try:
        check_space(root, size_mib, what)
        made = make_folders(root)
        remove_leftovers(root)
        folder.mkdir()
        print(f"downloading {url} ({size_mib:,} MiB) to {root}", flush=True)
        partial = folder / path.name
        with open(partial, "wb") as file:
            _transfer(url, file, 2 * size_mib * 2**20, what, progress)
            file.flush()
            os.fsync(file.fileno())
        found = md5_of(partial)
        if found != md5:
            size = partial.stat().st_size
            raise ValueError(
                f"received {size:,} bytes with md5 {found}: half a download, or another file"
            )
        if not os.path.lexists(path):
            os.replace(partial, path)
    except (OSError, ValueError, _Broken) as error:
        raise UserError(
            f"could not download {what} to {root} ({one_line(error)}); nothing was kept. "
            f"Try again, or: {by_hand}"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        remove_made(made)


def _transfer(url: str, file: BinaryIO, limit: int, what: str, progress: bool) -> None:
    """Download to ``file``. After a broken connection, the next attempt asks for the rest."""
    reached = failures = 0
    with tqdm(
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        disable=not shows_progress(progress),
    ) as bar:
        while True:
            try:
                return _receive(url, file, limit, bar)
            except _Broken as error:
                failures = 0 if file.tell() > reached else failures + 1
                reached = max(reached, file.tell())
                if failures == ATTEMPTS:
                    raise
                bar.write(f"the download stopped ({one_line(error)}): trying again")
                time.sleep(PAUSE)


def _receive(url: str, file: BinaryIO, limit: int, bar: tqdm) -> None:
    """One connection: append the rest to ``file``, or write all of it if the server does not send
    parts."""
    offset = file.tell()
    headers = {"User-Agent": "learn-to-pay-attention"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with _connection():
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=SOCKET_TIMEOUT)
    with response:
        content_range = response.headers.get("Content-Range")
        if response.status != 206:
            offset = file.seek(0)
            file.truncate()
        elif not (content_range or "").startswith(f"bytes {offset}-"):
            raise ValueError(
                f"the server sent {one_line(content_range)}, not the rest from byte {offset}"
            )
        length = response.headers.get("Content-Length")
        bar.total = total = length and offset + int(length)
        while total is None or file.tell() < total:
            with _connection():
                block = response.read1(BLOCK)
            if not block:
                break
            file.write(block)
            bar.update(file.tell() - bar.n)
            if file.tell() > limit:
                raise ValueError(f"received more than {limit:,} bytes: another file")
    if total is not None and file.tell() < total:
        raise _Broken(f"received {file.tell():,} of {total:,} bytes")


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Turns network errors into _Broken, except those that another attempt would not fix."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code not in PASSING:
            raise
        raise _Broken(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(one_line(error)) from None


# ---- unpack -------------------------------------------------------------------------------------


def unpack(archive: Path, folder_name: str, root: Path, *, progress: bool) -> None:
    """Unpack ``folder_name`` from a .tar.gz into ``root``, whole or not at all. Other members are
    skipped. Two processes can safely unpack the same archive.

    Raises:
        UserError: the archive cannot be unpacked, or has a member that is neither file nor folder
            or would leave the folder.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"this Python cannot unpack {archive} safely. Use 3.10.12, 3.11.4, 3.12 or newer, "
            f"or unpack {folder_name}/ to {root} yourself"
        )
    folder = temporary_in(root)
    try:
        remove_leftovers(root)
        folder.mkdir()
        print(f"unpacking {archive} to {root / folder_name}", flush=True)
        with (
            open(archive, "rb") as file,
            tarfile.open(fileobj=file, mode="r:gz") as tar,
            tqdm(
                desc="unpacking",
                total=archive.stat().st_size,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=False,
                disable=not shows_progress(progress),
            ) as bar,
        ):
            for member in tar:
                if _belongs(member, folder_name):
                    tar.extract(member, folder, filter="data")
                    os.utime(folder)  # marks it as in use for remove_leftovers
                bar.update(file.tell() - bar.n)
            # on to the checksum at the end: a damaged header ends the loop above
            while tar.fileobj.read(BLOCK):
                pass
        if not (folder / folder_name).is_dir():
            raise ValueError(f"it holds no folder {folder_name}")
        _put(folder / folder_name, root / folder_name)
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(
            f"could not unpack {archive} to {root} ({one_line(error)}); nothing was kept. "
            f"Fix that and start again, or unpack {folder_name}/ there yourself"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _belongs(member: tarfile.TarInfo, folder_name: str) -> bool:
    """Whether a member is in the folder. Raises ValueError for one that an honest archive of files
    does not have."""
    path = PurePosixPath(member.name)
    leaves_folder = path.is_absolute() or ".." in path.parts or "\\" in member.name
    if leaves_folder or not (member.isreg() or member.isdir()):
        name = member.name[:100]
        raise ValueError(f"its member {name!r} is not a plain file or folder inside it")
    return path.parts[:1] == (folder_name,)


def _put(folder: Path, target: Path) -> None:
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster
            raise
