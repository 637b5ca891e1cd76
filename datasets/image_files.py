"""Image files: one way to open them, and parallel decoding into a verified cache. Errors name the
file."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import sys
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, one_line, printable
from common.files import make_folders, remove_leftovers, remove_made, replace_file

MIN_IMAGE_SIZE = 16  # pixels
CACHE_VERSION = 3  # raise it when decoding changes: caches of an older version are made again
CHUNK = 512  # images decoded by one call of a worker, at most ...
CHUNK_BYTES = 2**22  # ... and fewer when they are large: about this many bytes of pixels
CHECKSUM_BYTES = 2**26  # of a tensor, per call of the checksum
# of an image. A larger one is refused before it is decoded: a small file can claim any size
MAX_PIXELS = 300_000_000
REDUCED_ABOVE = 2**26  # pixels; larger images are decoded smaller where the format can (JPEG), ...
REDUCED_SIDE = 2048  # ... but not below this many pixels per side
# Formats that Pillow lists but hands to other programs (Ghostscript among them), or cannot decode
# to colors.
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

Result = TypeVar("Result")


class Pictures(NamedTuple):
    """Decoded images, and which part of the file's picture each one shows."""

    images: Tensor  # (N, H, W, 3) uint8
    crops: Tensor  # (N, 4) int32, x0 y0 x1 y1 in pixels of the file's picture
    sizes: Tensor  # (N, 2) int32, width and height of the file's picture


# x0 y0 x1 y1 in pixels of the file's picture; it may extend beyond the picture
Crop = tuple[int, int, int, int]


# ---- cache --------------------------------------------------------------------------------------


def load_or_decode(
    paths: list[Path],
    cache_dir: Path,
    name: str,
    root: Path,
    size: tuple[int, int] | None,
    resize: bool,
    num_workers: int,
    progress: bool,
    crops: list[Crop] | None = None,
    upright: bool = True,
) -> Pictures:
    """The images of ``paths``, from the cache if it was made from the same files and crops, else
    decoded and cached.

    The cache is mapped into memory, not read: the system can take that memory back.

    Args:
        cache_dir, name: the cache is <cache_dir>/<name>-...pt.
        root: the folder that holds all paths; the cache key has names relative to it.
        size: (H, W) of the result; None: that of the first image.
        resize: resize to ``size`` (square), instead of an error where an image differs.
        num_workers, progress, crops: see decode_images.
        upright: apply the EXIF orientation. False where crops or boxes are in the file's own
            pixels.

    Raises:
        UserError: as decode_images, and where an image is smaller than MIN_IMAGE_SIZE.
    """
    stem = f"{name}-{size[0]}px-" if resize else f"{name}-"
    key = _cache_key(paths, root, size if resize else None, crops, upright)
    cache = cache_dir / f"{stem}{key}.pt"
    pictures = _read_cache(cache, key, len(paths))
    if pictures is None:
        size = size or _size_of(paths[0], upright)
        pictures = decode_images(paths, size, resize, num_workers, progress, name, crops, upright)
        if _write_cache(cache, stem, key, pictures):
            pictures = _read_cache(cache, key, len(paths)) or pictures
    elif size and tuple(pictures.images.shape[1:3]) != size:
        _decode(paths[0], size, False, None, upright)  # raises, naming the file and both sizes
    return pictures


def _cache_key(
    paths: list[Path],
    root: Path,
    size: tuple[int, int] | None,
    crops: list[Crop] | None,
    upright: bool,
) -> str:
    """What the cache is made from: format, size, and the name, length in bytes, modification time
    and crop of every file."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {size} {upright}".encode())
    name_start = len(str(root)) + 1
    for path, crop in _with_crops(paths, crops):
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}). Replace or remove it"
            ) from None
        # by slicing: pathlib's relative_to takes seconds for the 60,000 files of CIFAR-100
        line = f"{str(path)[name_start:]}\0{stat.st_size}\0{stat.st_mtime_ns}\0{crop}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:20]


def _with_crops(paths: list[Path], crops: list[Crop] | None) -> list[tuple[Path, Crop | None]]:
    if crops is None:
        return [(path, None) for path in paths]
    return list(zip(paths, crops, strict=True))


def _read_cache(path: Path, key: str, count: int) -> Pictures | None:
    """The cache's content, mapped into memory, or None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        cached = _load_mapped(path)
        pictures = Pictures(*(cached[name] for name in Pictures._fields))
        kinds = [(torch.uint8, 4), (torch.int32, 2), (torch.int32, 2)]
        is_well_formed = (
            cached["key"] == key
            and [len(tensor) for tensor in pictures] == [count] * 3
            and [(tensor.dtype, tensor.ndim) for tensor in pictures] == kinds
        )
        # torch.load does not check the bytes itself
        if is_well_formed and cached["crc32"] == _checksum(pictures):
            return pictures
        reason = "its content is not what was written"
    except Exception as error:  # a damaged file raises nearly anything
        reason = one_line(error)
    print(f"cache {path} is damaged ({reason[:80]}): decoding the images again", flush=True)
    return None


def _load_mapped(path: Path) -> dict:
    """Load a file of torch.save, mapped into memory. Read instead if its name is not UTF-8, which
    PyTorch cannot map."""
    mapped = printable(path) == str(path)
    return torch.load(
        str(path) if mapped else path, map_location="cpu", weights_only=True, mmap=mapped
    )


def _checksum(tensors: Iterable[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        content = memoryview(tensor.numpy()).cast("B")
        for start in range(0, len(content), CHECKSUM_BYTES):
            value = zlib.crc32(content[start : start + CHECKSUM_BYTES], value)
    return value


def _write_cache(path: Path, stem: str, key: str, pictures: Pictures) -> bool:
    """Write the cache, then remove the caches it replaces. If it cannot be written, print that and
    return False."""
    made = []
    try:
        made = make_folders(path.parent)
        remove_leftovers(path.parent)
        content = {"key": key, "crc32": _checksum(pictures), **pictures._asdict()}
        replace_file(path, functools.partial(torch.save, content))
        for old in path.parent.glob(f"{glob.escape(stem)}{'[0-9a-f]' * len(key)}.pt"):
            if old != path and _holds_key(old, old.stem[-len(key) :]):
                old.unlink()
        return True
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        remove_made(made)
        reason = one_line(error)[:100]
        _print_once(
            f"no cache in {path.parent} ({reason}): images are decoded again at every start"
        )
        return False


def _holds_key(path: Path, key: str) -> bool:
    """Whether a file is a cache with that key, rather than a user's file with such a name."""
    try:
        return _load_mapped(path)["key"] == key
    except Exception:  # a file that is not a cache raises nearly anything
        return False


# ---- decoding -----------------------------------------------------------------------------------


def decode_images(
    paths: list[Path],
    size: tuple[int, int],
    resize: bool,
    num_workers: int = 0,
    progress: bool = True,
    title: str = "images",
    crops: list[Crop] | None = None,
    upright: bool = True,
) -> Pictures:
    """Decode the images of ``paths``.

    A chunk whose worker raises or dies is decoded again in this process, so that the user sees the
    real error, with the file's name.

    Args:
        size: (H, W) of the result.
        resize: resize to ``size`` (square), instead of an error where an image differs.
        num_workers: processes; 0 decodes in this process.
        progress, title: whether to show a progress bar, and its name.
        crops: the part of each picture to decode, clipped to the picture; None for whole pictures.
        upright: apply the EXIF orientation.

    Raises:
        UserError: an image cannot be read or is not of ``size``, or memory is too small for all.
    """
    height, width = size
    image_bytes = height * width * 3
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except (MemoryError, ValueError):
        gib = len(paths) * image_bytes / 2**30
        raise UserError(
            f"{len(paths):,} images of {width}x{height} pixels take {gib:,.0f} GiB of memory, "
            f"more than is available. Give a smaller --image-size"
        ) from None
    places = np.empty((len(paths), 6), np.int32)  # crop and size
    files = _with_crops(paths, crops)
    step = min(CHUNK, max(1, CHUNK_BYTES // image_bytes))
    chunks = [files[start : start + step] for start in range(0, len(files), step)]
    workers = min(num_workers, len(chunks))
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
    tasks, waiting, done = deque(), iter(chunks), 0
    try:
        for chunk in chunks:
            # a few chunks ahead, not all: their pixels would fill the memory
            while pool and len(tasks) < 2 * workers and (later := next(waiting, None)):
                tasks.append(
                    _attempt(lambda: pool.submit(_decode_chunk, later, size, resize, upright))
                )
            task = tasks.popleft() if tasks else None
            result = _attempt(task.result) if task else None
            if result is None:
                result = _decode_chunk(chunk, size, resize, upright)
            end = done + len(chunk)
            images[done:end], places[done:end] = result
            bar.update(len(chunk))
            done = end
    finally:
        bar.close()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    places = torch.from_numpy(places)
    return Pictures(
        torch.from_numpy(images), places[:, :4].contiguous(), places[:, 4:].contiguous()
    )


def _attempt(call: Callable[[], Result]) -> Result | None:
    """call(), or None if it fails: an image's error, out of memory, a worker that died
    (BrokenProcessPool)."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, UserError):
            reason = "it was killed" if isinstance(error, BrokenExecutor) else one_line(error)[:100]
            _print_once(f"a decoding worker failed ({reason}): continuing in the main process")
        return None


def _decode_chunk(
    files: list[tuple[Path, Crop | None]], size: tuple[int, int], resize: bool, upright: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, H, W, 3) uint8, and (n, 6) int32: crop, width and height."""
    pixels, places = zip(
        *(_decode(path, size, resize, crop, upright) for path, crop in files), strict=True
    )
    return np.stack(pixels), np.array(places, np.int32)


def _decode(
    path: Path, size: tuple[int, int], resize: bool, crop: Crop | None, upright: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """One image as (H, W, 3) uint8, and its crop, width and height. Raises UserError if it cannot
    be read or, without ``resize``, is not of ``size``."""
    image = open_rgb(path, upright=upright, reduce=crop is None)
    width, height = image.size
    if not resize and (height, width) != size:
        raise UserError(
            f"{printable(path)} is {width}x{height} pixels, the images before it are "
            f"{size[1]}x{size[0]}. Give --image-size to resize them all"
        )
    box = (0, 0, width, height)
    if crop:
        box = _clipped(crop, width, height)
        with _sane_sizes(path):  # PIL checks a crop's pixels too
            image = image.crop(box)
    pixels = resized(image, size[0]) if resize else np.asarray(image)
    return pixels, (*box, width, height)


def _clipped(crop: Crop, width: int, height: int) -> Crop:
    """The part of a crop inside the picture; for a crop outside, the picture's nearest pixel."""
    x0, y0, x1, y1 = crop
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


# ---- opening ------------------------------------------------------------------------------------


@functools.cache
def image_endings() -> frozenset[str]:
    """The file name endings that this machine's Pillow can decode, in lower case with their
    dots."""
    Image.init()
    formats = {*image_formats(), "MPO"}  # phones' JPEG with several pictures, opened as a JPEG
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in formats
    )


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that are decoded, whatever a file is called, the frequent ones first."""
    Image.init()
    names = Image.OPEN.keys() - NOT_PICTURES
    return tuple(sorted(names, key=lambda name: (name not in ("JPEG", "PNG"), name)))


def images_and_others(folder: Path) -> tuple[list[str], list[str]]:
    """(names with an image's ending, other names) in a folder, sorted. A folder's name ends in a
    slash and is never an image's. Hidden names are left out."""
    images, others = [], []
    entries = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    for name in sorted(entry.name + "/" * entry.is_dir() for entry in entries):
        is_image = os.path.splitext(name)[1].lower() in image_endings()
        (images if is_image else others).append(name)
    return images, others


def preview_names(names: list[str]) -> str:
    """The first three names of a list, and how many more there are, for messages."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more


def passed_over(folder: Path, names: list[str], total: int) -> str:
    """A line on the names in a folder that are not taken for images; a folder's ends in a slash."""
    kinds = Counter(
        "a folder" if name.endswith("/") else os.path.splitext(name)[1].lower() or "no ending"
        for name in names
    )
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    if len(kinds) > 5:
        counts += ", ..."
    return (
        f"{printable(folder)}: passed over {len(names):,} of {total:,} names without an ending of "
        f"an image format that Pillow reads here ({counts}): {preview_names(names)}"
    )


def open_rgb(path: Path, *, upright: bool = True, reduce: bool = True) -> Image.Image:
    """Open an image file of any mode as an RGB image, as viewers show it: transparency on white.

    Args:
        upright: apply the EXIF orientation.
        reduce: decode an image of over REDUCED_ABOVE pixels smaller, if its format can.

    Raises:
        UserError: naming the file: it cannot be read, or is of over MAX_PIXELS (found before it is
            decoded).
    """
    with _sane_sizes(path), _opened(path) as image:
        if reduce and image.width * image.height > REDUCED_ABOVE:
            image.draft(None, (min(image.width, REDUCED_SIDE), min(image.height, REDUCED_SIDE)))
        if image.mode[0] in "IF":
            # PIL would clip them to white
            raise ValueError(f"pixels of type {image.mode}, more than 8 bits a channel")
        image.load()  # for a TIFF this applies the orientation and removes it from the EXIF data
        if upright:
            image = _turned_upright(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return image.convert("RGB")


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's Orientation


def _turned_upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data; the picture itself can still be shown
        return image
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _sane_sizes(path: Path) -> Iterator[None]:
    """PIL's guard against small files that claim to be enormous, at MAX_PIXELS. Raises UserError
    with the size."""
    before = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        Image.MAX_IMAGE_PIXELS = None
        size = "too many"
        with contextlib.suppress(Exception), Image.open(path, formats=image_formats()) as image:
            size = f"{image.width}x{image.height}"
        raise UserError(
            f"{printable(path)} has {size} pixels: more than {MAX_PIXELS / 1e6:,.0f} megapixels "
            f"are not read. Replace or remove it"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image; every error of reading it becomes a UserError that names the file."""
    try:
        with Image.open(path, formats=image_formats()) as image:
            yield image
    except (UserError, MemoryError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise
    # PIL raises OSError, SyntaxError, ValueError, struct.error and more for bad files
    except Exception as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = strerror or one_line(error)
        raise UserError(
            f"{printable(path)} cannot be read as an image ({reason}). Replace or remove it"
        ) from None


def resized(image: Image.Image, size: int) -> np.ndarray:
    """The image as (size, size, 3) uint8. PIL's bilinear antialiases."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _size_of(path: Path, upright: bool) -> tuple[int, int]:
    """(height, width) of an image. Raises UserError for one below MIN_IMAGE_SIZE."""
    image = open_rgb(path, upright=upright)
    if min(image.size) < MIN_IMAGE_SIZE:
        raise UserError(
            f"{printable(path)} is only {image.width}x{image.height} pixels. "
            f"Give --image-size, at least {MIN_IMAGE_SIZE}"
        )
    return image.height, image.width


# ---- messages -----------------------------------------------------------------------------------


def shows_progress(progress: bool) -> bool:
    """Whether to show a progress bar: on a terminal only."""
    return progress and sys.stderr is not None and sys.stderr.isatty()


@functools.cache
def _print_once(message: str) -> None:
    print(message, flush=True)
