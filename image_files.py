"""Image files decoded once, into a cache that names what it was made from, by worker processes whose errors are told as
what they are; and files that are written whole or not at all."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

MIN_IMAGE_SIZE = 16     # pixels
CACHE_VERSION = 2       # raise it when decoding changes: caches of an older version are made again
CHUNK = 512             # images decoded by one call of a worker, at most ...
CHUNK_BYTES = 2**22     # ... and fewer when they are large: about so many bytes of pixels
CHECKSUM_BYTES = 2**26  # of a tensor looked at in one go
LEFTOVER_AGE = 3600.0   # seconds until a temporary file counts as left over by a run that was killed


class DataError(Exception):
    """One line for people: what is wrong, which file or folder, what to do next."""


class Pictures(NamedTuple):
    """Decoded images, and which part of the file's picture each one shows."""
    images: torch.Tensor    # (N, H, W, 3) uint8
    crops: torch.Tensor     # (N, 4) int32, x0 y0 x1 y1 in pixels of the file's picture
    sizes: torch.Tensor     # (N, 2) int32, width and height of the file's picture


Crop = tuple[int, int, int, int]    # x0 y0 x1 y1 in pixels of the file's picture; it may hang over the picture's edge


def decoded(paths: list[Path], cache_dir: Path, name: str, root: Path, size: tuple[int, int] | None, resize: bool,
            num_workers: int, progress: bool, crops: list[Crop] | None = None) -> Pictures:
    """The images of `paths`, from the cache when it was made from the same files and crops.

    A cache is mapped into memory, not read: it costs no memory that the system could not take back.
    """
    stem = f"{name}-{size[0]}px-" if resize else f"{name}-"
    key = _cache_key(paths, root, size if resize else None, crops)
    cache = cache_dir / f"{stem}{key}.pt"
    pictures = _read_cache(cache, key, len(paths))
    if pictures is None:
        size = size or _size_of(paths[0])
        pictures = decode_images(paths, size, resize, num_workers, progress, name, crops)
        if _write_cache(cache, stem, key, pictures):
            pictures = _read_cache(cache, key, len(paths)) or pictures
    elif size and tuple(pictures.images.shape[1:3]) != size:
        _open_rgb(paths[0], size, False, None)      # raises, naming the file and both sizes
    return pictures


def _cache_key(paths: list[Path], root: Path, size: tuple[int, int] | None, crops: list[Crop] | None) -> str:
    """What the cache was made from: format, size, and every file's name, length in bytes, time of change and crop."""
    digest, beginning = hashlib.sha256(f"{CACHE_VERSION} {size}".encode()), len(str(root)) + 1
    for path, crop in _with_crops(paths, crops):
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({one_line(error)}). Replace or remove it") from None
        # a name as text: pathlib's relative_to takes seconds for the 60,000 files of CIFAR-100
        line = f"{str(path)[beginning:]}\0{stat.st_size}\0{stat.st_mtime_ns}\0{crop}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:20]


def _with_crops(paths: list[Path], crops: list[Crop] | None) -> list[tuple[Path, Crop | None]]:
    return [(path, None) for path in paths] if crops is None else list(zip(paths, crops, strict=True))


def _read_cache(path: Path, key: str, count: int) -> Pictures | None:
    """What the cache holds, mapped into memory, or None when there is nothing that can be believed."""
    if not path.is_file():
        return None
    try:
        cached = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        pictures = Pictures(*(cached[name] for name in Pictures._fields))
        right = (cached["key"] == key and [len(tensor) for tensor in pictures] == [count] * 3
                 and [(tensor.dtype, tensor.ndim) for tensor in pictures]
                 == [(torch.uint8, 4), (torch.int32, 2), (torch.int32, 2)])
        if right and cached["crc32"] == _checksum(pictures):    # torch.load does not check the bytes itself
            return pictures
        reason = "its content is not what was written"
    except Exception as error:      # a damaged file raises nearly anything
        reason = one_line(error)
    print(f"cache {path} is damaged ({reason[:80]}): decoding the images again", flush=True)
    return None


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        content = memoryview(tensor.numpy()).cast("B")
        for start in range(0, len(content), CHECKSUM_BYTES):
            value = zlib.crc32(content[start:start + CHECKSUM_BYTES], value)
    return value


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, temporary: Path | None = None,
                 previous: Path | None = None) -> None:
    """Write a file under a temporary name in its folder, see it to the disk, and only then give it its name: there is
    never half a file. What `path` held before stays under the name `previous`, if one is given.

    Raises what `write` raises (the file there before is untouched), and OSError naming the file."""
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:     # a file system without links: for a moment there is only the one before
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


def _write_cache(path: Path, stem: str, key: str, pictures: Pictures) -> bool:
    """Write under a temporary name, flush to disk, rename; then remove what it replaces. Without a place to write,
    say so and go on without a cache (False)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path.parent, ".*.pt.*.tmp")
        content = {"key": key, "crc32": _checksum(pictures), **pictures._asdict()}
        replace_file(path, functools.partial(torch.save, content), temporary=temporary)
        for old in path.parent.glob(f"{stem}{'[0-9a-f]' * len(key)}.pt"):
            if old != path:
                old.unlink()
        return True
    except (OSError, RuntimeError) as error:    # torch.save makes a RuntimeError of a full disk
        _say_once(f"no cache in {path.parent} ({one_line(error)[:100]}): images are decoded anew at every start")
        return False


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove our temporary files and folders that nobody has written to for an hour."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.glob("*"))) > LEFTOVER_AGE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------------- decoding

def decode_images(paths: list[Path], size: tuple[int, int], resize: bool, num_workers: int = 0, progress: bool = True,
                  title: str = "images", crops: list[Crop] | None = None) -> Pictures:
    """The images of `paths`; `size` is (H, W): resized to it, or (resize=False) an error where one differs. Of a
    picture with a crop only that part is shown; a crop is clipped to the picture.

    A chunk whose worker raises or dies is decoded again in this process, so that the error a person sees is the real
    one, with the file's name.
    """
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except (MemoryError, ValueError):
        gib = len(paths) * size[0] * size[1] * 3 / 2**30
        raise DataError(f"{len(paths):,} images of {size[1]}x{size[0]} pixels take {gib:,.0f} GiB of memory, more than there"
                        f" is. Give a smaller --image-size") from None
    places = np.empty((len(paths), 6), np.int32)    # crop and size
    files = _with_crops(paths, crops)
    step = min(CHUNK, max(1, CHUNK_BYTES // (size[0] * size[1] * 3)))
    chunks = [files[start:start + step] for start in range(0, len(files), step)]
    workers = min(num_workers, len(chunks))
    # spawn, because forking a process that runs torch's threads can hang the child
    pool = _attempt(lambda: ProcessPoolExecutor(workers, get_context("spawn"))) if workers > 0 else None
    bar = tqdm(total=len(paths), desc=f"decoding {title}", unit="img", leave=False,
               disable=not shows_progress(progress))
    tasks, waiting, done = deque(), iter(chunks), 0
    try:
        for chunk in chunks:
            while pool and len(tasks) < 2 * workers and (later := next(waiting, None)):  # never all: pixels add up
                tasks.append(_attempt(lambda: pool.submit(_decode_chunk, later, size, resize)))
            task = tasks.popleft() if tasks else None
            part = _attempt(task.result) if task else None
            end = done + len(chunk)
            images[done:end], places[done:end] = _decode_chunk(chunk, size, resize) if part is None else part
            bar.update(len(chunk))
            done = end
    finally:
        bar.close()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    places = torch.from_numpy(places)
    return Pictures(torch.from_numpy(images), places[:, :4].contiguous(), places[:, 4:].contiguous())


def _attempt(call):
    """call(), or None when it fails: an image's error, no memory, a worker that died (BrokenProcessPool)."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, DataError):
            reason = "it was killed" if isinstance(error, BrokenExecutor) else one_line(error)[:100]
            _say_once(f"a decoding worker failed ({reason}): going on in the main process")
        return None


def _decode_chunk(files: list[tuple[Path, Crop | None]], size: tuple[int, int],
                  resize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, H, W, 3) uint8, and (n, 6) int32: crop, width and height."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pixels, places = zip(*(_open_rgb(path, size, resize, crop) for path, crop in files))
    return np.stack(pixels), np.array(places, np.int32)


def _open_rgb(path: Path, size: tuple[int, int], resize: bool, crop: Crop | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """One image as (H, W, 3) uint8, and its crop, width and height. DataError when it cannot be read or, without
    `resize`, is not of `size`."""
    with _opened(path) as image:
        if not resize and (image.height, image.width) != size:
            raise DataError(f"{path} is {image.width}x{image.height} pixels, the images before it are"
                            f" {size[1]}x{size[0]}. Give --image-size to resize them all")
        image = as_rgb(image)
        whole = (0, 0, *image.size)
        shown = _clipped(crop, *image.size) if crop else whole
        pixels = resized(image.crop(shown), size[0]) if resize else np.asarray(image)
        return pixels, (*shown, *image.size)


def _clipped(crop: Crop, width: int, height: int) -> Crop:
    """The part of a crop that is in the picture; of a crop beyond its edge, the pixel next to it."""
    x0, y0, x1, y1 = crop
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB. ValueError for more than 8 bits a channel, which PIL would clip to white."""
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of type {image.mode}, more than 8 bits a channel")
    if "transparency" in image.info:    # a palette's transparent colours; PIL warns without this step
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, with every error of reading it turned into a DataError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except Exception as error:      # PIL raises OSError, SyntaxError, ValueError, struct.error and more for bad files
        raise DataError(f"{path} cannot be read as an image ({one_line(error)}). Replace or remove it") from None


def resized(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))    # PIL's bilinear antialiases


def _size_of(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        if min(image.size) < MIN_IMAGE_SIZE:
            raise DataError(f"{path} is only {image.width}x{image.height} pixels. Give --image-size, at least"
                            f" {MIN_IMAGE_SIZE}")
        return image.height, image.width


def one_line(error: object) -> str:
    """An error's text in one line, without the memory address that PIL puts into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text


def shows_progress(progress: bool) -> bool:
    return progress and sys.stderr is not None and sys.stderr.isatty()


@functools.lru_cache(maxsize=None)
def _say_once(message: str) -> None:
    print(message, flush=True)
