"""Archives of data sets: fetched from their server whole or not at all, checked, and unpacked
inside one folder."""

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
from common.files import (
    expand_user,
    make_folders,
    remove_leftovers,
    remove_made,
    temporary_in,
)
from common.hub import SOCKET_TIMEOUT
from datasets.image_files import shows_progress

ATTEMPTS = 3  # in a row without a new byte until a download is given up
PAUSE = 2.0  # seconds between two attempts
BLOCK = 2**18  # bytes read at a time
PASSING = (408, 416, 429)  # with 500 and above: HTTP errors that another attempt may not meet


class _Broken(Exception):
    """A connection that failed or ended early: worth another attempt."""


def data_folder(data_dir: str | os.PathLike) -> Path:
    """--data-dir as a path. Raises UserError for a ~ that stands for no folder."""
    try:
        return expand_user(data_dir)
    except ValueError as error:
        raise UserError(f"--data-dir {error}") from None


def named(folder: Path, names: Sequence[str]) -> list[Path]:
    """What has one of the names in a folder, in capital or small letters, in the order of `names`."""
    small = [name.casefold() for name in names]
    found = [path for path in _listed(folder) if path.name.casefold() in small]
    return sorted(found, key=lambda path: (small.index(path.name.casefold()), path.name))


def around(root: Path, names: Sequence[str]) -> list[Path]:
    """What has one of the names in `root`, then what has one in a folder of root's: archives are
    unpacked one level too deep, or beside other things."""
    inside = (
        path
        for folder in sorted(_listed(root))
        if not folder.name.startswith(".")
        for path in named(folder, names)
    )
    return [*named(root, names), *inside]


def near(root: Path, names: Sequence[str]) -> list[Path]:
    """What has one of the names beside `root`, and the two folders that `root` lies in."""
    above = root.absolute().parents[:2]
    return [*(named(above[0], names) if above else ()), *above]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # no folder, or one that we may not read
        return []


def check_data_dir(
    root: Path, download: bool, what: str, folder: str, other: Path | None, by_hand: str
) -> None:
    """Refuse what looks like a mistyped --data-dir rather than download `what` into it; it should
    hold `folder`. `other`: where the data set is, if it was found near `root`."""
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
    """UserError where fewer than `mib` MiB are free in `folder` (or its parent, while it is yet to
    be made)."""
    free = shutil.disk_usage(folder if folder.is_dir() else folder.absolute().parent).free // 2**20
    if free < mib:
        raise UserError(
            f"{what} needs {mib:,} MiB of disk space in {folder}, where {free:,} MiB are free. Make room,"
            f" or give a --data-dir on another disk"
        )


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_archive(path: Path, md5: str, url: str) -> None:
    """UserError unless the file is the whole archive."""
    try:
        right = md5_of(path) == md5
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). Make it readable, or move it away and start"
            f" again"
        ) from None
    if not right:
        raise UserError(
            f"{path} is damaged or half a download ({path.stat().st_size:,} bytes, its md5 is not {md5})."
            f" Move it away and start again, or fetch it from {url}"
        )


# -------------------------------------------------------------------------------------------------
# download


def fetch(
    url: str, md5: str, path: Path, *, size_mib: int, what: str, by_hand: str, progress: bool
) -> None:
    """Download `url` to `path`, making its folder. The file gets its name only when it is whole,
    and only if nothing has that name by then: a broken download leaves nothing, and a second
    process that downloads the same does no harm.

    size_mib: about how much will come; twice that is refused.
    what, by_hand: for messages: the data set, and what to do without a download. Raises UserError.
    """
    root, made, folder = path.parent, [], temporary_in(path.parent)
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
            raise ValueError(
                f"{partial.stat().st_size:,} bytes came, with md5 {found}: half a download, or another"
                f" file"
            )
        if not os.path.lexists(path):
            os.replace(partial, path)
    except (OSError, ValueError, _Broken) as error:
        raise UserError(
            f"could not download {what} to {root} ({one_line(error)}); nothing was kept. Try again, or:"
            f" {by_hand}"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        remove_made(made)


def _transfer(url: str, file: BinaryIO, limit: int, what: str, progress: bool) -> None:
    """Write what the server holds to `file`. Where the connection breaks, the next attempt asks for
    the rest."""
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
    """One connection: append what `file` still lacks, or write all of it where the server sends
    only the whole."""
    offset = file.tell()
    headers = {"User-Agent": "learn-to-pay-attention"} | (
        {"Range": f"bytes={offset}-"} if offset else {}
    )
    with _connection():
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=SOCKET_TIMEOUT
        )
    with response:
        if response.status != 206:
            offset = file.seek(0)
            file.truncate()
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise ValueError(
                f"the server sent {one_line(response.headers.get('Content-Range'))}, not the rest from"
                f" byte {offset}"
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
                raise ValueError(f"more than {limit:,} bytes came: another file")
    if total is not None and file.tell() < total:
        raise _Broken(f"{file.tell():,} of {total:,} bytes came")


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Turns the network's errors into _Broken; one that no other attempt would mend stays what it
    is."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code not in PASSING:
            raise
        raise _Broken(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(one_line(error)) from None


# -------------------------------------------------------------------------------------------------
# unpack


def unpack(archive: Path, folder_name: str, root: Path, *, progress: bool) -> None:
    """Unpack what lies under `folder_name`/ in a .tar.gz to root/folder_name, whole or not at all;
    other members are passed over. A second process that unpacks the same does no harm.

    Raises UserError, for a member too that is neither file nor folder or would leave the folder.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"this Python cannot unpack {archive} safely. Use 3.10.12, 3.11.4, 3.12 or newer, or unpack"
            f" {folder_name}/ to {root} yourself"
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
                    os.utime(folder)  # still in use: remove_leftovers looks at the time
                bar.update(file.tell() - bar.n)
            # to the end, where the checksum is: a damaged header ends the loop above
            while tar.fileobj.read(BLOCK):
                pass
        if not (folder / folder_name).is_dir():
            raise ValueError(f"it holds no folder {folder_name}")
        _put(folder / folder_name, root / folder_name)
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(
            f"could not unpack {archive} to {root} ({one_line(error)}); nothing was kept. Start again when"
            f" that is mended, or unpack {folder_name}/ there yourself"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _belongs(member: tarfile.TarInfo, folder_name: str) -> bool:
    """Whether a member lies in the folder. ValueError for one that no honest archive of files
    holds."""
    path = PurePosixPath(member.name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in member.name
        or not (member.isreg() or member.isdir())
    ):
        raise ValueError(f"its member {member.name[:100]!r} is no plain file or folder inside it")
    return path.parts[:1] == (folder_name,)


def _put(folder: Path, target: Path) -> None:
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
