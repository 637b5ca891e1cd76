"""Image files to pixels of one size, in parallel. Errors name the file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, one_line, printable
from common.process import total_memory
from datasets.image_files import (
    Crop,
    UnreadableImage,
    center_box,
    open_rgb,
    print_once,
    resized,
    sane_sizes,
    shows_progress,
)

CHUNK = 512  # images decoded by one call of a worker, at most ...
CHUNK_BYTES = 2**22  # ... and fewer when they are large: about this many bytes of pixels
THUMBNAIL = 8  # pixels per side of a thumbnail

Result = TypeVar("Result")


@dataclass(frozen=True)
class Decoding:
    """How a file becomes a picture."""

    size: tuple[int, int]  # (H, W) of the result
    resize: bool  # to ``size`` (square), instead of an error where a picture differs
    center: bool = False  # first cut to the centered square of the shorter side
    upright: bool = True  # apply the EXIF orientation
    skip_unreadable: bool = False  # a black picture and the text of the error, instead of an error


class Pictures(NamedTuple):
    """Decoded images, and what is known of their files."""

    images: Tensor  # (N, H, W, 3) uint8
    crops: Tensor  # (N, 4) int32, the part shown: x0 y0 x1 y1 in pixels of the file's picture
    sizes: Tensor  # (N, 2) int32, width and height of the file's picture
    thumbnails: Tensor  # (N, THUMBNAIL ** 2) uint8, gray, of ``images``
    unreadable: dict[int, str]  # the error by index


class Chunk(NamedTuple):
    """The same of a few images, as arrays."""

    images: np.ndarray
    places: np.ndarray  # (n, 6) int32: crop, width and height
    thumbnails: np.ndarray
    unreadable: dict[int, str]


def decode_images(paths: Sequence[Path | str], decoding: Decoding, **options: Any) -> Pictures:
    """Decode the images of ``paths`` into memory. Options and errors as of ``decoded_chunks``; also
    raises UserError where the memory is too small for all of them."""
    height, width = decoding.size
    gib = len(paths) * height * width * 3 / 2**30
    try:
        if gib * 2**30 > total_memory():
            raise MemoryError
        images = np.empty((len(paths), height, width, 3), np.uint8)
    except (MemoryError, ValueError):
        raise UserError(
            f"{len(paths):,} images of {width}x{height} pixels take {gib:,.0f} GiB of memory, "
            f"more than is available. Give a smaller --image-size"
        ) from None
    done, others = 0, []
    for chunk in decoded_chunks(paths, decoding, **options):
        images[done : done + len(chunk.images)] = chunk.images
        done += len(chunk.images)
        others.append(chunk._replace(images=None))
    return joined(torch.from_numpy(images), others)


def joined(images: Tensor, chunks: list[Chunk]) -> Pictures:
    """Pictures from all images, and what their chunks hold besides."""
    places = torch.from_numpy(np.concatenate([chunk.places for chunk in chunks]))
    unreadable, first = {}, 0
    for chunk in chunks:
        unreadable |= {first + i: reason for i, reason in chunk.unreadable.items()}
        first += len(chunk.places)
    return Pictures(
        images,
        places[:, :4].contiguous(),
        places[:, 4:].contiguous(),
        torch.from_numpy(np.concatenate([chunk.thumbnails for chunk in chunks])),
        unreadable,
    )


def decoded_chunks(
    paths: Sequence[Path | str],
    decoding: Decoding,
    num_workers: int = 0,
    progress: bool = True,
    title: str = "images",
    crops: list[Crop] | None = None,
) -> Iterator[Chunk]:
    """The images of ``paths``, a few at a time, in their order.

    A chunk whose worker raises or dies is decoded again in this process, so that the user sees the
    real error, with the file's name.

    Args:
        num_workers: processes; 0 decodes in this process.
        progress, title: whether to show a progress bar, and its name.
        crops: the part of each picture to decode, clipped to the picture; None for whole pictures.

    Raises:
        UserError: an image cannot be read or is not of the size.
    """
    height, width = decoding.size
    files = with_crops(paths, crops)
    step = min(CHUNK, max(1, CHUNK_BYTES // (height * width * 3)))
    chunks = [files[start : start + step] for start in range(0, len(files), step)]
    # one chunk is decoded sooner than a process starts
    workers = min(num_workers, len(chunks)) if len(chunks) > 1 else 0
    pool = None
    if workers > 0:
        # spawn, because forking a process that runs torch's threads can hang the child
        pool = _attempt(lambda: ProcessPoolExecutor(workers, get_context("spawn")))
    bar = tqdm(
        total=len(paths),
        desc=f"decoding {title}",
        unit="img",
        leave=False,
        disable=not shows_progress(progress),
    )
    tasks, waiting = deque(), iter(chunks)
    try:
        for chunk in chunks:
            # a few chunks ahead, not all: their pixels would fill the memory
            while pool and len(tasks) < 2 * workers and (later := next(waiting, None)):
                tasks.append(_attempt(lambda: pool.submit(_decode_chunk, later, decoding)))
            task = tasks.popleft() if tasks else None
            result = _attempt(task.result) if task else None
            yield _decode_chunk(chunk, decoding) if result is None else result
            bar.update(len(chunk))
    finally:
        bar.close()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)


def with_crops(
    paths: Sequence[Path | str], crops: list[Crop] | None
) -> list[tuple[Path | str, Crop | None]]:
    if crops is None:
        return [(path, None) for path in paths]
    return list(zip(paths, crops, strict=True))


def _attempt(call: Callable[[], Result]) -> Result | None:
    """call(), or None if it fails: an image's error, out of memory, a worker that died
    (BrokenProcessPool)."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, UserError):
            reason = "it was killed" if isinstance(error, BrokenExecutor) else one_line(error)[:100]
            print_once(f"a decoding worker failed ({reason}): continuing in the main process")
        return None


def _decode_chunk(files: list[tuple[Path | str, Crop | None]], decoding: Decoding) -> Chunk:
    images = np.zeros((len(files), *decoding.size, 3), np.uint8)
    places, unreadable = np.zeros((len(files), 6), np.int32), {}
    for i, (path, crop) in enumerate(files):
        try:
            images[i], places[i] = decode(path, decoding, crop)
        except UnreadableImage as error:
            if not decoding.skip_unreadable:
                raise
            unreadable[i] = str(error)
    return Chunk(images, places, thumbnails(images), unreadable)


def decode(
    path: Path | str, decoding: Decoding, crop: Crop | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """One image as (H, W, 3) uint8, and its crop, width and height. Raises UserError if it cannot
    be read or, without ``resize``, is not of the size."""
    image = open_rgb(path, upright=decoding.upright, reduce=crop is None)
    width, height = image.size
    if not decoding.resize and (height, width) != decoding.size:
        raise UserError(
            f"{printable(path)} is {width}x{height} pixels, the images before it are "
            f"{decoding.size[1]}x{decoding.size[0]}. Give --image-size to resize them all"
        )
    box = (0, 0, width, height)
    if crop:
        box = _clipped(crop, width, height)
    elif decoding.center:
        box = center_box(width, height)
    if box != (0, 0, width, height):
        with sane_sizes(path):  # PIL checks a crop's pixels too
            image = image.crop(box)
    pixels = resized(image, decoding.size[0]) if decoding.resize else np.asarray(image)
    return pixels, (*box, width, height)


def _clipped(crop: Crop, width: int, height: int) -> Crop:
    """The part of a crop inside the picture; for a crop outside, the picture's nearest pixel."""
    x0, y0, x1, y1 = crop
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, 3) uint8 -> (n, THUMBNAIL ** 2) uint8: the mean brightness in each cell of a
    grid."""
    red, green, blue = np.moveaxis(images, -1, 0).astype(np.uint32)
    gray = (77 * red + 150 * green + 29 * blue) >> 8
    for axis in (1, 2):
        gray = np.add.reduceat(gray, cell_starts(images.shape[axis]), axis)
    rows, columns = (np.diff([*cell_starts(side), side]) for side in images.shape[1:3])
    pixels = rows[:, None] * columns
    return (gray // pixels).astype(np.uint8).reshape(len(images), -1)


def cell_starts(side: int) -> list[int]:
    return [i * side // THUMBNAIL for i in range(THUMBNAIL)]
