"""Image files: which files are images, and one way to open them. Errors name the file."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from common.errors import UserError, one_line, printable

MIN_IMAGE_SIZE = 16  # pixels
# of an image. A larger one is refused before it is decoded: a small file can claim any size
MAX_PIXELS = 300_000_000
REDUCED_ABOVE = 2**26  # pixels; larger images are decoded smaller where the format can (JPEG), ...
REDUCED_SIDE = 2048  # ... but not below this many pixels per side
# Formats that Pillow lists but hands to other programs (Ghostscript among them), or cannot decode
# to colors.
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


# x0 y0 x1 y1 in pixels of the file's picture; it may extend beyond the picture
Crop = tuple[int, int, int, int]


REMEDY = ". Replace or remove it"


class UnreadableImage(UserError):
    """An image file that cannot be read, is too large, or not an image."""


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


def open_rgb(path: Path | str, *, upright: bool = True, reduce: bool = True) -> Image.Image:
    """Open an image file of any mode as an RGB image, as viewers show it: transparency on white.

    Args:
        upright: apply the EXIF orientation.
        reduce: decode an image of over REDUCED_ABOVE pixels smaller, if its format can.

    Raises:
        UnreadableImage: naming the file: it cannot be read, or is of over MAX_PIXELS (found before
            it is decoded).
    """
    with sane_sizes(path), _opened(path) as image:
        if reduce and image.width * image.height > REDUCED_ABOVE:
            image.draft(None, (min(image.width, REDUCED_SIDE), min(image.height, REDUCED_SIDE)))
        check_mode(image)
        image.load()  # for a TIFF this applies the orientation and removes it from the EXIF data
        return as_rgb(_turned_upright(image) if upright else image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, transparency on white. Raises ValueError for more than 8 bits a
    channel."""
    check_mode(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises ValueError for more than 8 bits a channel, which PIL would clip to white."""
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of type {image.mode}, more than 8 bits a channel")


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


class PillowGuard:
    """Pillow's guard against small files that claim to be enormous, at MAX_PIXELS, while any thread
    reads an image: its settings belong to the whole process."""

    def __init__(self) -> None:
        self.lock, self.readers = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.readers:
                self.settings = contextlib.ExitStack()
                self.settings.enter_context(warnings.catch_warnings())
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
            self.readers += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                Image.MAX_IMAGE_PIXELS = self.limit
                self.settings.close()


GUARD = PillowGuard()


@contextlib.contextmanager
def sane_sizes(path: Path | str) -> Iterator[None]:
    """GUARD for one file. Raises UnreadableImage with the size."""
    try:
        with GUARD:
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnreadableImage(
            f"{printable(path)} has {claimed_size(path)} pixels: more than "
            f"{MAX_PIXELS / 1e6:,.0f} megapixels are not read{REMEDY}"
        ) from None


def claimed_size(path: Path | str) -> str:
    """The size that a file's header says, for messages: from Pillow's readers themselves, as
    Image.open refuses a large one."""
    with contextlib.suppress(Exception), open(path, "rb") as file:
        start = file.read(16)
        for name in image_formats():
            reader, accepts = Image.OPEN[name]
            # a text says why the file is not accepted
            if accepts is None or accepts(start) and not isinstance(accepts(start), str):
                file.seek(0)
                with contextlib.suppress(Exception):
                    width, height = reader(file, os.fsdecode(path)).size
                    return f"{width}x{height}"
    return "too many"


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
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
        raise UnreadableImage(
            f"{printable(path)} cannot be read as an image ({reason}){REMEDY}"
        ) from None


def center_box(width: int, height: int) -> Crop:
    """x0 y0 x1 y1 of the centered square of a picture's shorter side."""
    side = min(width, height)
    x0, y0 = (width - side) // 2, (height - side) // 2
    return x0, y0, x0 + side, y0 + side


def resized(image: Image.Image, size: int) -> np.ndarray:
    """The image as (size, size, 3) uint8. PIL's bilinear antialiases."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def size_of(path: Path | str, upright: bool) -> tuple[int, int]:
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
def print_once(message: str) -> None:
    print(message, flush=True)
