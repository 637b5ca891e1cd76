"""Image files, opened in one way wherever they are needed, and decoded once, into a cache that
names what it was made from, by worker processes whose errors are told as what they are."""

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
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from common.errors import UserError, one_line, printable
from common.files import make_folders, remove_leftovers, remove_made, replace_file

MIN_IMAGE_SIZE = 16  # pixels
CACHE_VERSION = 3  # raise it when decoding changes: caches of an older version are made again
CHUNK = 512  # images decoded by one call of a worker, at most ...
CHUNK_BYTES = 2**22  # ... and fewer when they are large: about so many bytes of pixels
CHECKSUM_BYTES = 2**26  # of a tensor looked at in one go
# of an image. A larger one is refused before it is decoded: a small file can claim any size
MAX_PIXELS = 300_000_000
REDUCED_ABOVE = 2**26  # pixels; larger images are decoded smaller where the format can (JPEG), ...
REDUCED_SIDE = 2048  # ... but not below so many pixels a side
# Formats that Pillow lists but hands to other programs (Ghostscript among them), or cannot decode
# to colours.
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class Pictures(NamedTuple):
    """Decoded images, and which part of the file's picture each one shows."""

    images: torch.Tensor  # (N, H, W, 3) uint8
    crops: torch.Tensor  # (N, 4) int32, x0 y0 x1 y1 in pixels of the file's picture
    sizes: torch.Tensor  # (N, 2) int32, width and height of the file's picture


# x0 y0 x1 y1 in pixels of the file's picture; it may hang over the picture's edge
Crop = tuple[int, int, int, int]


def decoded(
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
    """The images of `paths`, from the cache when it was made from the same files and crops. With
    crops, or boxes that are known in the file's own pixels, the orientation that a camera has
    written down is not heeded: `upright=False`.

    A cache is mapped into memory, not read: it costs no memory that the system could not take back.
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
    """What the cache was made from: format, size, and every file's name, length in bytes, time of
    change and crop."""
    digest, beginning = (
        hashlib.sha256(f"{CACHE_VERSION} {size} {upright}".encode()),
        len(str(root)) + 1,
    )
    for path, crop in _with_crops(paths, crops):
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}). Replace or remove it"
            ) from None
        # a name as text: pathlib's relative_to takes seconds for the 60,000 files of CIFAR-100
        line = f"{str(path)[beginning:]}\0{stat.st_size}\0{stat.st_mtime_ns}\0{crop}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:20]


def _with_crops(paths: list[Path], crops: list[Crop] | None) -> list[tuple[Path, Crop | None]]:
    return (
        [(path, None) for path in paths] if crops is None else list(zip(paths, crops, strict=True))
    )


def _read_cache(path: Path, key: str, count: int) -> Pictures | None:
    """What the cache holds, mapped into memory, or None when there is nothing that can be believed."""
    if not path.is_file():
        return None
    try:
        cached = _load_mapped(path)
        pictures = Pictures(*(cached[name] for name in Pictures._fields))
        right = (
            cached["key"] == key
            and [len(tensor) for tensor in pictures] == [count] * 3
            and [(tensor.dtype, tensor.ndim) for tensor in pictures]
            == [(torch.uint8, 4), (torch.int32, 2), (torch.int32, 2)]
        )
        # torch.load does not check the bytes itself
        if right and cached["crc32"] == _checksum(pictures):
            return pictures
        reason = "its content is not what was written"
    except Exception as error:  # a damaged file raises nearly anything
        reason = one_line(error)
    print(f"cache {path} is damaged ({reason[:80]}): decoding the images again", flush=True)
    return None


def _load_mapped(path: Path) -> dict:
    """What torch.save wrote, mapped into memory; read, where PyTorch cannot take the name, which is
    not in UTF-8."""
    mapped = printable(path) == str(path)
    return torch.load(
        str(path) if mapped else path, map_location="cpu", weights_only=True, mmap=mapped
    )


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        content = memoryview(tensor.numpy()).cast("B")
        for start in range(0, len(content), CHECKSUM_BYTES):
            value = zlib.crc32(content[start : start + CHECKSUM_BYTES], value)
    return value


def _write_cache(path: Path, stem: str, key: str, pictures: Pictures) -> bool:
    """Write the cache, then remove what it replaces. Without a place to write, say so and go on
    without a cache (False)."""
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
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        remove_made(made)
        _say_once(
            f"no cache in {path.parent} ({one_line(error)[:100]}): images are decoded anew at every start"
        )
        return False


def _holds_key(path: Path, key: str) -> bool:
    """Whether a file is a cache of that key: one of ours, whatever else has such a name."""
    try:
        return _load_mapped(path)["key"] == key
    except Exception:  # a file of somebody else's raises nearly anything
        return False


# -------------------------------------------------------------------------------------------------
# decoding


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
    """The images of `paths`; `size` is (H, W): resized to it, or (resize=False) an error where one
    differs. Of a picture with a crop only that part is shown; a crop is clipped to the picture.

    A chunk whose worker raises or dies is decoded again in this process, so that the error a person
    sees is the real one, with the file's name.
    """
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except (MemoryError, ValueError):
        gib = len(paths) * size[0] * size[1] * 3 / 2**30
        raise UserError(
            f"{len(paths):,} images of {size[1]}x{size[0]} pixels take {gib:,.0f} GiB of memory, more than there"
            f" is. Give a smaller --image-size"
        ) from None
    places = np.empty((len(paths), 6), np.int32)  # crop and size
    files = _with_crops(paths, crops)
    step = min(CHUNK, max(1, CHUNK_BYTES // (size[0] * size[1] * 3)))
    chunks = [files[start : start + step] for start in range(0, len(files), step)]
    workers = min(num_workers, len(chunks))
    # spawn, because forking a process that runs torch's threads can hang the child
    pool = (
        _attempt(lambda: ProcessPoolExecutor(workers, get_context("spawn")))
        if workers > 0
        else None
    )
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
            # never all: pixels add up
            while pool and len(tasks) < 2 * workers and (later := next(waiting, None)):
                tasks.append(
                    _attempt(lambda: pool.submit(_decode_chunk, later, size, resize, upright))
                )
            task = tasks.popleft() if tasks else None
            part = _attempt(task.result) if task else None
            end = done + len(chunk)
            images[done:end], places[done:end] = part or _decode_chunk(chunk, size, resize, upright)
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


def _attempt(call):
    """call(), or None when it fails: an image's error, no memory, a worker that died
    (BrokenProcessPool)."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, UserError):
            reason = "it was killed" if isinstance(error, BrokenExecutor) else one_line(error)[:100]
            _say_once(f"a decoding worker failed ({reason}): going on in the main process")
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
    """One image as (H, W, 3) uint8, and its crop, width and height. UserError when it cannot be
    read or, without `resize`, is not of `size`."""
    image = open_rgb(path, upright=upright, reduce=crop is None)
    if not resize and (image.height, image.width) != size:
        raise UserError(
            f"{printable(path)} is {image.width}x{image.height} pixels, the images before it are"
            f" {size[1]}x{size[0]}. Give --image-size to resize them all"
        )
    place = (*(_clipped(crop, *image.size) if crop else (0, 0, *image.size)), *image.size)
    if crop:
        with _sane_sizes(path):  # a crop, too, counts its pixels
            image = image.crop(place[:4])
    return resized(image, size[0]) if resize else np.asarray(image), place


def _clipped(crop: Crop, width: int, height: int) -> Crop:
    """The part of a crop that is in the picture; of a crop beyond its edge, the pixel next to it."""
    x0, y0, x1, y1 = crop
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


# -------------------------------------------------------------------------------------------------
# opening


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of the files that the Pillow of this machine can decode, in lower case with their
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
    return tuple(
        sorted(
            Image.OPEN.keys() - NOT_PICTURES, key=lambda name: (name not in ("JPEG", "PNG"), name)
        )
    )


def images_and_others(folder: Path) -> tuple[list[str], list[str]]:
    """The names in a folder that end as an image's, and the others, sorted; a folder's ends in a
    slash and is no image. Hidden ones are left out."""
    images, others = [], []
    for name in sorted(
        e.name + "/" * e.is_dir() for e in os.scandir(folder) if not e.name.startswith(".")
    ):
        (images if os.path.splitext(name)[1].lower() in image_endings() else others).append(name)
    return images, others


def some(names: list[str]) -> str:
    """The first names of a list, for people."""
    return ", ".join(map(printable, names[:3])) + (
        f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    )


def passed_over(folder: Path, names: list[str], total: int) -> str:
    """A line about what in a folder is not taken for images, by the names in it; a folder's ends in
    a slash."""
    kinds = Counter(
        "a folder" if name.endswith("/") else os.path.splitext(name)[1].lower() or "no ending"
        for name in names
    )
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) + (
        ", ..." if len(kinds) > 5 else ""
    )
    return (
        f"{printable(folder)}: passed over {len(names):,} of {total:,} names, which do not end as those of images that "
        f"Pillow reads here ({counts}): {some(names)}"
    )


def open_rgb(path: Path, *, upright: bool = True, reduce: bool = True) -> Image.Image:
    """An image file of any mode as an RGB image, the way that every viewer shows it: the way up
    that its EXIF data say (unless `upright` is false), and white where it is transparent. With
    `reduce`, one of over REDUCED_ABOVE pixels comes smaller where its format can be decoded so.

    Raises UserError, which names the file; also for one of over MAX_PIXELS, before it is decoded.
    """
    with _sane_sizes(path), _opened(path) as image:
        if reduce and image.width * image.height > REDUCED_ABOVE:
            image.draft(None, (min(image.width, REDUCED_SIDE), min(image.height, REDUCED_SIDE)))
        if image.mode[0] in "IF":
            # PIL would clip them to white
            raise ValueError(f"pixels of type {image.mode}, more than 8 bits a channel")
        image.load()  # of a TIFF this heeds the orientation, and takes it out of the EXIF data
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
    except Exception:  # damaged EXIF data, of a picture that can be seen all the same
        return image
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _sane_sizes(path: Path) -> Iterator[None]:
    """PIL's guard against small files that claim to be enormous, at our limit. Raises UserError,
    which says the size."""
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
            f"{printable(path)} has {size} pixels: more than {MAX_PIXELS / 1e6:,.0f} megapixels are not read."
            f" Replace or remove it"
        ) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, with every error of reading it turned into a UserError that names the file."""
    try:
        with Image.open(path, formats=image_formats()) as image:
            yield image
    except (UserError, MemoryError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise
    # PIL raises OSError, SyntaxError, ValueError, struct.error and more for bad files
    except Exception as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        )
        raise UserError(
            f"{printable(path)} cannot be read as an image ({reason}). Replace or remove it"
        ) from None


def resized(image: Image.Image, size: int) -> np.ndarray:
    # PIL's bilinear antialiases
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _size_of(path: Path, upright: bool) -> tuple[int, int]:
    image = open_rgb(path, upright=upright)
    if min(image.size) < MIN_IMAGE_SIZE:
        raise UserError(
            f"{printable(path)} is only {image.width}x{image.height} pixels. Give --image-size, at least"
            f" {MIN_IMAGE_SIZE}"
        )
    return image.height, image.width


def shows_progress(progress: bool) -> bool:
    return progress and sys.stderr is not None and sys.stderr.isatty()


@functools.cache
def _say_once(message: str) -> None:
    print(message, flush=True)
