"""Images in, pictures out: what cam.py reads from files, and the overlays and sheets that it writes."""
from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import IMAGE_ENDINGS, DataError
from image_files import as_rgb, one_line, replace_file
from training.options import UserError
from training.pictures import attention_sheet, overlay, shown

LEAST_SIDE, GREATEST_SIDE = 224, 1024       # pixels of an overlay: smaller images are enlarged, larger ones shrunk
SHEET_SIDE = 288            # pixels of the longer side of a picture on an image's own sheet, at most


# ---- in --------------------------------------------------------------------------------------------------------------

@dataclass
class Picture:
    """An image as a person sees it, and what is known of it."""
    name: str                   # for people
    stem: str                   # of the files that are written
    pixels: np.ndarray          # (H, W, 3) uint8
    truth: str | None = None    # class name


def list_files(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files that the command line names, a folder's images sorted by name; and the folders without any, which are
    told."""
    paths, bad = [], []
    for path in map(Path, words):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir()
                           if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".") and p.is_file())
            if not found:
                complain(f"{printable(path)} holds no images ({' '.join(IMAGE_ENDINGS)}); its folders are not searched")
                bad.append(path)
        paths += found
    return list(dict.fromkeys(paths)), bad


def open_photo(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of an image file in any mode, the way up that its EXIF data say. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.array(as_rgb(ImageOps.exif_transpose(image)))
    except MemoryError:
        raise
    except Exception as error:      # PIL raises OSError, SyntaxError, ValueError, struct.error and more for bad files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataError(f"{printable(path)} cannot be read as an image ({reason})") from None


def parse_index(text: str, count: int) -> list[int]:
    """"3,7,9-12" -> [3, 7, 9, 10, 11, 12]. Raises UserError for what is no such list, or beyond ``count`` images."""
    indices = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-", 1)]
        if not all(end.isascii() and end.isdigit() for end in ends) or int(ends[0]) > int(ends[-1]):
            raise UserError(f"--index {text}: expected numbers and ranges, as in 3,7,9-12", 2)
        if int(ends[-1]) >= count:
            raise UserError(f"--index {text}: there are {count:,} images, numbered from 0", 2)
        indices += range(int(ends[0]), int(ends[-1]) + 1)
    return list(dict.fromkeys(indices))


def printable(path: Path | str) -> str:
    """A file's name on one line, bytes that are no text escaped."""
    return one_line(path).encode("utf-8", "backslashreplace").decode()


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


# ---- out -------------------------------------------------------------------------------------------------------------

class Overview:
    """What goes on the sheet of a whole selection: images of one size with their maps."""

    def __init__(self):
        self.pixels: list[np.ndarray] = []
        self.titles: list[str] = []
        self.maps: dict[str, list[np.ndarray]] = {}

    def add(self, picture: Picture, maps: Mapping[str, np.ndarray], title: str) -> None:
        self.pixels.append(picture.pixels)
        self.titles.append(title)
        for name, each in maps.items():
            self.maps.setdefault(name, []).append(each)


class Writer:
    """Writes files into a folder, each whole or not at all. None takes the name of an input, or of another of its own.

    raw: the maps as .npy too. opacity, colours: see training/pictures.py.
    """

    def __init__(self, out: Path, inputs: Sequence[Path], *, raw: bool, opacity: float, colours: str):
        self.out, self.raw, self.opacity, self.colours = out, raw, opacity, colours
        self.inputs = {identity for path in inputs for identity in identities(path)}
        self.taken: set[str] = set()
        self.written = 0
        out.mkdir(parents=True, exist_ok=True)

    def image(self, picture: Picture, maps: Mapping[str, np.ndarray], headings: Mapping[str, str], title: str) -> str:
        """An overlay for each map {name: (H, W)}, and a sheet with the input and them. Returns the files' stem."""
        endings = [f"{name}.{kind}" for name in maps for kind in ("png", "npy")[:1 + self.raw]] + ["sheet.png"]
        stem = self.free_stem(picture.stem, endings)
        large = shown(picture.pixels, LEAST_SIDE, GREATEST_SIDE)
        for name, each in maps.items():
            self.png(f"{stem}-{name}.png", overlay(large, each, self.opacity, self.colours))
            if self.raw:
                content = io.BytesIO()
                np.save(content, each)
                self.write(f"{stem}-{name}.npy", content.getvalue())
        self.png(f"{stem}-sheet.png", attention_sheet(
            picture.pixels[None], {name: each[None] for name, each in maps.items()}, [title], headings=headings,
            opacity=self.opacity, least_side=LEAST_SIDE, greatest_side=SHEET_SIDE, name=self.colours))
        return stem

    def overview(self, stem: str, overview: Overview) -> None:
        """One sheet of a whole selection."""
        stem = self.free_stem(stem, ["sheet.png"])
        self.png(f"{stem}-sheet.png", attention_sheet(
            np.stack(overview.pixels), {name: np.stack(each) for name, each in overview.maps.items()}, overview.titles,
            opacity=self.opacity, name=self.colours))

    def free_stem(self, wanted: str, endings: list[str]) -> str:
        """``wanted``, or with a number behind it: no file STEM-ENDING is an input, or written already."""
        stem, number = wanted, 1
        while any(f"{stem}-{ending}".casefold() in self.taken
                  or self.inputs.intersection(identities(self.out / f"{stem}-{ending}")) for ending in endings):
            number += 1
            stem = f"{wanted}-{number}"
        self.taken |= {f"{stem}-{ending}".casefold() for ending in endings}
        return stem

    def png(self, name: str, pixels: np.ndarray) -> None:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        self.write(name, content.getvalue())

    def write(self, name: str, content: bytes) -> None:
        replace_file(self.out / name, lambda file: file.write(content))
        self.written += 1


def identities(path: Path) -> set[tuple[int, int]]:
    """What a file is on its disk, and what it is a link to; empty where there is none."""
    try:
        return {(stat.st_dev, stat.st_ino) for stat in (os.stat(path), os.lstat(path))}
    except OSError:
        return set()
