"""Images decoded once, into a verified cache that is mapped into memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import one_line, printable
from common.files import make_folders, remove_leftovers, remove_made, replace_file
from datasets.decoding import (
    THUMBNAIL,
    Decoding,
    Pictures,
    decode,
    decode_images,
    decoded_chunks,
    joined,
    with_crops,
)
from datasets.image_files import (
    REMEDY,
    Crop,
    UnreadableImage,
    open_rgb,
    print_once,
    shows_progress,
    size_of,
)

CACHE_VERSION = 4  # raise it when decoding changes: caches of an older version are made again
KEY_CHARACTERS = 20
CHECKSUM_BYTES = 2**26  # of a tensor, per call of the checksum
# What the small file of a cache holds of Pictures, besides "key", "crc32" and "unreadable".
TENSORS = {
    "crops": (torch.int32, 4),
    "sizes": (torch.int32, 2),
    "thumbnails": (torch.uint8, THUMBNAIL**2),
}


def load_or_decode(
    paths: Sequence[Path | str],
    cache_dir: Path,
    name: str,
    root: Path,
    *,
    size: tuple[int, int] | None,
    resize: bool,
    num_workers: int,
    progress: bool,
    crops: list[Crop] | None = None,
    upright: bool = True,
    center: bool = False,
    skip_unreadable: bool = False,
) -> Pictures:
    """The images of ``paths``, from the cache if it was made from the same files and crops, else
    decoded and cached.

    The cache is written while the images are decoded, and mapped into memory, not read: images may
    take more than the memory, and the system can take back what they take of it.

    Args:
        cache_dir, name: the cache is <cache_dir>/<name>-...npy (the pixels) and ...pt (all else).
        root: the folder that holds all paths; the cache key has names relative to it.
        size: (H, W) of the result; None: that of the first image.
        resize, upright, center, skip_unreadable: see Decoding. ``upright`` is False where crops or
            boxes are in the file's own pixels.
        num_workers, progress, crops: see decoded_chunks.

    Raises:
        UserError: as decode_images, and where an image is smaller than MIN_IMAGE_SIZE.
    """
    stem = f"{name}-{size[0]}px-" if resize else f"{name}-"
    made_from = f"{CACHE_VERSION} {size if resize else None} {upright} {center}"
    key = _cache_key(paths, root, made_from, crops, progress, skip_unreadable)
    cache = Cache(cache_dir, stem, key, len(paths))
    pictures = cache.read()
    if pictures and any(is_readable(paths[i]) for i in pictures.unreadable):
        pictures = None  # a permission was missing, or a disk
    if pictures is None:
        decoding = Decoding(
            size or size_of(paths[0], upright), resize, center, upright, skip_unreadable
        )
        options = dict(num_workers=num_workers, progress=progress, title=name, crops=crops)
        pictures = cache.write(paths, decoding, **options)
        pictures = pictures or decode_images(paths, decoding, **options)
    elif size and tuple(pictures.images.shape[1:3]) != size:
        decode(paths[0], Decoding(size, False, upright=upright))  # raises, naming both sizes
    if pictures.unreadable and not skip_unreadable:
        raise UnreadableImage(next(iter(pictures.unreadable.values())))
    return pictures


def _cache_key(
    paths: Sequence[Path | str],
    root: Path,
    made_from: str,
    crops: list[Crop] | None,
    progress: bool,
    skip_unreadable: bool,
) -> str:
    """What the cache is made from: ``made_from``, and the name, length in bytes, modification time
    and crop of every file."""
    digest = hashlib.sha256(made_from.encode())
    name_start = len(str(root)) + 1
    files = with_crops(paths, crops)
    hide = not shows_progress(progress)
    for path, crop in tqdm(files, desc="files", unit="", leave=False, disable=hide, delay=2):
        try:
            stat = os.stat(path)
            size, time = stat.st_size, stat.st_mtime_ns
        except (OSError, ValueError) as error:
            if not skip_unreadable:
                reason = one_line(error)
                raise UnreadableImage(
                    f"{printable(path)} cannot be read ({reason}){REMEDY}"
                ) from None
            size, time = -1, -1
        # by slicing: pathlib's relative_to takes seconds for the 60,000 files of CIFAR-100
        line = f"{str(path)[name_start:]}\0{size}\0{time}\0{crop}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:KEY_CHARACTERS]


def is_readable(path: Path | str) -> bool:
    try:
        open_rgb(path)
    except UnreadableImage:
        return False
    return True


class Cache:
    """The cache of ``count`` images: two files in ``folder``, named ``stem`` and ``key``."""

    def __init__(self, folder: Path, stem: str, key: str, count: int):
        self.folder, self.stem, self.key, self.count = folder, stem, key, count
        self.small = folder / f"{stem}{key}.pt"
        self.pixels = self.small.with_suffix(".npy")

    def read(self) -> Pictures | None:
        """Its content, the pixels mapped into memory; None if there is none or it is damaged."""
        if not self.small.is_file():
            return None
        try:
            content = torch.load(self.small, map_location="cpu", weights_only=True)
            if content["crc32"] is None:  # whoever wrote it was killed
                return None
            images = mapped(self.pixels)
            tensors = {name: content[name] for name in TENSORS}
            is_well_formed = (
                content["key"] == self.key
                and images.shape[0] == self.count
                and (images.dtype, images.ndim) == (torch.uint8, 4)
                and all(
                    (tensor.dtype, tuple(tensor.shape)) == (dtype, (self.count, columns))
                    for tensor, (dtype, columns) in zip(
                        tensors.values(), TENSORS.values(), strict=True
                    )
                )
            )
            # nothing else checks the bytes
            if is_well_formed and content["crc32"] == _checksum([images, *tensors.values()]):
                return Pictures(images, **tensors, unreadable=dict(content["unreadable"]))
            reason = "its content is not what was written"
        except Exception as error:  # a damaged file raises nearly anything
            reason = one_line(error)
        print(
            f"cache {printable(self.small)} is damaged ({reason[:80]}): decoding the images again",
            flush=True,
        )
        return None

    def write(
        self, paths: Sequence[Path | str], decoding: Decoding, **options: Any
    ) -> Pictures | None:
        """Decode the images into it, and remove the caches that it replaces. If it cannot be
        written, print that and return None.

        Options and errors as of decoded_chunks."""
        made, chunks = [], []
        shape = (self.count, *decoding.size, 3)

        def write_pixels(file: BinaryIO) -> None:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            crc = 0
            for chunk in decoded_chunks(paths, decoding, **options):
                file.write(chunk.images.data)
                crc = zlib.crc32(chunk.images.data, crc)
                chunks.append(chunk._replace(images=None))
            content["crc32"] = crc

        content = {"key": self.key, "crc32": None}
        try:
            made = make_folders(self.folder)
            remove_leftovers(self.folder)
            free = shutil.disk_usage(self.folder).free
            if free < np.prod(shape, dtype=np.int64):  # else this would show after hours
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            # first, so that no pixels are ever left without the key that tells whose they are
            replace_file(self.small, functools.partial(save, content))
            replace_file(self.pixels, write_pixels)
            rest = joined(torch.empty(0), chunks)
            tensors = {name: getattr(rest, name) for name in TENSORS}
            content["crc32"] = _checksum(tensors.values(), content["crc32"])
            content |= {**tensors, "unreadable": rest.unreadable}
            replace_file(self.small, functools.partial(save, content))
            self._remove_replaced()
            return self.read()
        except BaseException as error:
            for path in (self.pixels, self.small):
                with contextlib.suppress(OSError):
                    path.unlink()
            remove_made(made)
            if not isinstance(error, OSError):
                raise
            reason = one_line(error)[:100]
            print_once(
                f"no cache in {printable(self.folder)} ({reason}): "
                f"images are decoded again at every start"
            )
            return None

    def _remove_replaced(self) -> None:
        """Remove the caches of other keys and of the same stem, those of earlier versions too."""
        for old in self.folder.glob(f"{glob.escape(self.stem)}{'[0-9a-f]' * KEY_CHARACTERS}.pt"):
            if old != self.small and _holds_key(old, old.stem[-KEY_CHARACTERS:]):
                old.unlink(missing_ok=True)  # another run may be faster
                old.with_suffix(".npy").unlink(missing_ok=True)


def save(content: dict, file: BinaryIO) -> None:
    """torch.save, which raises a RuntimeError for a full disk. Raises OSError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, one_line(error)) from error


def mapped(path: Path) -> Tensor:
    """The array of a .npy file, mapped into memory. It must not be changed: a mapping that may be
    changed cannot be larger than the machine's memory."""
    array = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that it must not be changed
        return torch.from_numpy(array)


def _checksum(tensors: Iterable[Tensor], value: int = 0) -> int:
    for tensor in tensors:
        content = memoryview(tensor.numpy()).cast("B")
        for first in range(0, len(content), CHECKSUM_BYTES):
            value = zlib.crc32(content[first : first + CHECKSUM_BYTES], value)
    return value


def _holds_key(path: Path, key: str) -> bool:
    """Whether a file is a cache with that key, rather than a user's file with such a name."""
    mapped = printable(path) == str(path)  # PyTorch cannot map a file whose name is not UTF-8
    try:
        # mapped: in an earlier version all pixels are in this file
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)["key"] == key
    except Exception:  # a file that is not a cache raises nearly anything
        return False
