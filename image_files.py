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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

MIN_IMAGE_SIZE = 16     # pixels
CACHE_VERSION = 1       # raise it when decoding changes: caches of an older version are made again
CHUNK = 512             # images decoded by one call of a worker
LEFTOVER_AGE = 3600.0   # seconds until a temporary file counts as left over by a run that was killed


class DataError(Exception):
    """One line for people: what is wrong, which file or folder, what to do next."""


def decoded(paths: list[Path], cache_dir: Path, name: str, root: Path, size: tuple[int, int] | None, resize: bool,
             num_workers: int, progress: bool) -> torch.Tensor:
    """The images of `paths` as one (N, H, W, 3) uint8 tensor, from the cache when it was made from the same files."""
    stem = f"{name}-{size[0]}px-" if resize else f"{name}-"
    key = _cache_key(paths, root, size if resize else None)
    cache = cache_dir / f"{stem}{key}.pt"
    images = _read_cache(cache, key, len(paths))
    if images is None:
        size = size or _size_of(paths[0])
        images = torch.from_numpy(decode_images(paths, size, resize, num_workers, progress, name))
        _write_cache(cache, stem, key, images)
    elif size and tuple(images.shape[1:3]) != size:
        _open_rgb(paths[0], size, False)    # raises, naming the file and both sizes
    return images


def _cache_key(paths: list[Path], root: Path, size: tuple[int, int] | None) -> str:
    """What the cache was made from: format, size, and every file's name, length in bytes and time of change."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {size}".encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({one_line(error)}). Replace or remove it") from None
        line = f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:20]


def _read_cache(path: Path, key: str, count: int) -> torch.Tensor | None:
    """The cached images, or None when there are none that can be believed."""
    if not path.is_file():
        return None
    try:
        cached = torch.load(path, map_location="cpu", weights_only=True)
        images = cached["images"]
        right = cached["key"] == key and images.dtype == torch.uint8 and images.ndim == 4 and len(images) == count
        if right and cached["crc32"] == zlib.crc32(images.numpy()):     # torch.load does not check the bytes itself
            return images
        reason = "its content is not what was written"
    except Exception as error:      # a damaged file raises nearly anything
        reason = one_line(error)
    print(f"cache {path} is damaged ({reason[:80]}): decoding the images again", flush=True)
    return None


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


def _write_cache(path: Path, stem: str, key: str, images: torch.Tensor) -> None:
    """Write under a temporary name, flush to disk, rename; then remove what it replaces. Without a place to write,
    go on without a cache."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path.parent, ".*.pt.*.tmp")
        content = {"key": key, "crc32": zlib.crc32(images.numpy()), "images": images}
        replace_file(path, functools.partial(torch.save, content), temporary=temporary)
        for old in path.parent.glob(f"{stem}{'[0-9a-f]' * len(key)}.pt"):
            if old != path:
                old.unlink()
    except (OSError, RuntimeError) as error:    # torch.save makes a RuntimeError of a full disk
        _say_once(f"no cache in {path.parent} ({one_line(error)[:100]}): images are decoded anew at every start")


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove our temporary files and folders that nobody has written to for an hour."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.glob("*"))) > LEFTOVER_AGE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------------- decoding

def decode_images(paths: list[Path], size: tuple[int, int], resize: bool, num_workers: int = 0, progress: bool = True,
                  title: str = "images") -> np.ndarray:
    """(N, H, W, 3) uint8 of `paths`; `size` is (H, W): resized to it, or (resize=False) an error where one differs.

    A chunk whose worker raises or dies is decoded again in this process, so that the error a person sees is the real
    one, with the file's name.
    """
    images = np.empty((len(paths), *size, 3), np.uint8)
    chunks = [paths[start:start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(num_workers, len(chunks))
    # spawn, because forking a process that runs torch's threads can hang the child
    pool = _attempt(lambda: ProcessPoolExecutor(workers, get_context("spawn"))) if workers > 0 else None
    bar = tqdm(total=len(paths), desc=f"decoding {title}", unit="img", leave=False,
               disable=not shows_progress(progress))
    try:
        tasks = [pool and _attempt(lambda: pool.submit(_decode_chunk, chunk, size, resize)) for chunk in chunks]
        done = 0
        for i, chunk in enumerate(chunks):
            decoded = _attempt(tasks[i].result) if tasks[i] else None
            images[done:done + len(chunk)] = _decode_chunk(chunk, size, resize) if decoded is None else decoded
            tasks[i] = None     # lets go of its pixels
            done += len(chunk)
            bar.update(len(chunk))
    finally:
        bar.close()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    return images


def _attempt(call):
    """call(), or None when it fails: an image's error, no memory, a worker that died (BrokenProcessPool)."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, DataError):
            _say_once(f"a decoding worker failed ({one_line(error)[:100]}): going on in the main process")
        return None


def _decode_chunk(paths: list[Path], size: tuple[int, int], resize: bool) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.stack([_open_rgb(path, size, resize) for path in paths])


def _open_rgb(path: Path, size: tuple[int, int], resize: bool) -> np.ndarray:
    """One image as (H, W, 3) uint8. DataError when it cannot be read or, without `resize`, is not of `size`."""
    with _opened(path) as image:
        if image.mode[0] in "IF":   # 16 or 32 bits a pixel: PIL would clip them to white
            raise ValueError(f"pixels of type {image.mode}, more than 8 bits a channel")
        if not resize and (image.height, image.width) != size:
            raise DataError(f"{path} is {image.width}x{image.height} pixels, the images before it are"
                            f" {size[1]}x{size[0]}. Give --image-size to resize them all")
        if "transparency" in image.info:    # a palette's transparent colours; PIL warns without this step
            image = image.convert("RGBA")
        image = image.convert("RGB")
        return resized(image, size[0]) if resize else np.asarray(image)


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
