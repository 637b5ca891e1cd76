"""Files of cam.py: the images that it reads, and the overlays and sheets that it writes."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError, print_error, printable
from common.files import free_path, make_folders, replace_file
from data import images_and_others, passed_over
from explain.pictures import attention_sheet, is_own_picture, overlay, png_bytes, shown

# pixels of an overlay: smaller images are enlarged, larger ones shrunk
MIN_SIDE, MAX_SIDE = 224, 1024
MAX_STEM_BYTES = 200  # with the name of the map, a file name stays below a file system's 255
SHEET_SIDE = 288  # pixels of the longer side of a picture on an image's own sheet, at most


# ---- in -----------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image for display, and what is known of it."""

    name: str  # in messages
    stem: str  # of the files that are written
    pixels: np.ndarray  # (H, W, 3) uint8
    truth: str | None = None  # class name


def list_files(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files that the command line names, a folder's images sorted by name; and the folders
    without images, which are reported."""
    paths, without_images = [], []
    for path in map(Path, words):
        found = images_in(path) if path.is_dir() else [path]
        if not found:
            print_error(f"{printable(path)} holds no images; its folders are not searched")
            without_images.append(path)
        paths += found
    return list(dict.fromkeys(paths)), without_images


def images_in(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name. Files of other types and cam.py's own pictures are
    left out, and reported."""
    images, others = images_and_others(folder)
    if others:
        print(passed_over(folder, others, len(images) + len(others)), flush=True)
    found = [folder / name for name in images if not is_own_picture(folder / name)]
    own = len(images) - len(found)
    if own:
        print(f"{printable(folder)}: passed over {own:,} of cam.py's own pictures", flush=True)
    return found


def parse_index(text: str, count: int) -> list[int]:
    """Parse --index: "3,7,9-12" -> [3, 7, 9, 10, 11, 12]. Raises UserError for any other text, or a
    number that is not below ``count``."""
    indices = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-", 1)]
        are_numbers = all(end.isascii() and end.isdigit() and len(end) < 20 for end in ends)
        if not are_numbers or int(ends[0]) > int(ends[-1]):
            raise UserError(f"--index {text}: expected numbers and ranges, as in 3,7,9-12", 2)
        if int(ends[-1]) >= count:
            raise UserError(f"--index {text}: there are {count:,} images, numbered from 0", 2)
        indices += range(int(ends[0]), int(ends[-1]) + 1)
    return list(dict.fromkeys(indices))


# ---- out ----------------------------------------------------------------------------------------


class Overview:
    """The content of the sheet of a whole selection: images of one size with their maps."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.titles: list[str] = []
        self.maps: dict[str, list[np.ndarray]] = {}

    def add(self, picture: Picture, maps: Mapping[str, np.ndarray], title: str) -> None:
        """Add an image with its maps {name: (H, W)}."""
        self.pixels.append(picture.pixels)
        self.titles.append(title)
        for name, values in maps.items():
            self.maps.setdefault(name, []).append(values)


class Writer:
    """Writes files into a folder, each whole or not at all. None takes the name of an input, of
    another file of this writer, or of an existing file unless an earlier run wrote that one.

    raw: also write the maps as .npy. opacity, colors: see explain/pictures.py.
    """

    def __init__(
        self, out: Path, inputs: Sequence[Path], *, raw: bool, opacity: float, colors: str
    ):
        self.out, self.raw, self.opacity, self.colors = out, raw, opacity, colors
        self.inputs = {identity for path in inputs for identity in identities(path)}
        self.taken: set[str] = set()  # names of this writer's files, case folded
        self.written = 0

    def write_image(
        self,
        picture: Picture,
        maps: Mapping[str, np.ndarray],
        headings: Mapping[str, str],
        title: str,
    ) -> str:
        """Write an overlay per map {name: (H, W)}, and a sheet of the input and the overlays.
        Returns the stem of the files."""
        raw = {}
        if self.raw:
            raw = {f"{name}.npy": npy_bytes(values) for name, values in maps.items()}
        stem = self.free_stem(picture.stem, [*(f"{name}.png" for name in maps), "sheet.png"], raw)
        large = shown(picture.pixels, MIN_SIDE, MAX_SIDE)
        for name, values in maps.items():
            self.write_png(f"{stem}-{name}.png", overlay(large, values, self.opacity, self.colors))
        for ending, content in raw.items():
            self.write_file(f"{stem}-{ending}", content)
        sheet = attention_sheet(
            picture.pixels[None],
            {name: values[None] for name, values in maps.items()},
            [title],
            headings=headings,
            opacity=self.opacity,
            min_side=MIN_SIDE,
            max_side=SHEET_SIDE,
            color_map=self.colors,
        )
        self.write_png(f"{stem}-sheet.png", sheet)
        return stem

    def write_overview(self, stem: str, overview: Overview) -> None:
        """Write one sheet of a whole selection."""
        stem = self.free_stem(stem, ["sheet.png"], {})
        sheet = attention_sheet(
            np.stack(overview.pixels),
            {name: np.stack(values) for name, values in overview.maps.items()},
            overview.titles,
            opacity=self.opacity,
            color_map=self.colors,
        )
        self.write_png(f"{stem}-sheet.png", sheet)

    def free_stem(self, wanted: str, pictures: Sequence[str], raw: Mapping[str, bytes]) -> str:
        """``wanted``, with a number if needed, so that each file STEM-ENDING may be written, for
        the endings of pictures and of ``raw`` {ending: content}. Cut to a length that file systems
        take."""
        contents: dict[str, bytes | None] = dict.fromkeys(pictures) | dict(raw)
        base = cut_to_bytes(wanted, MAX_STEM_BYTES)
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        for stem in itertools.chain([base], numbered):
            names = {f"{stem}-{ending}": content for ending, content in contents.items()}
            if all(self.may_write(name, content) for name, content in names.items()):
                break
        self.taken |= {name.casefold() for name in names}
        return stem

    def may_write(self, name: str, content: bytes | None) -> bool:
        """Whether this name is free, or that of an earlier run's file: of the same ``content``, or,
        with None, a picture with our mark."""
        path = self.out / name
        if name.casefold() in self.taken:
            return False
        if not os.path.lexists(path):
            return True
        if self.inputs.intersection(identities(path)) or not path.is_file():
            return False
        if content is not None:
            return path.stat().st_size == len(content) and path.read_bytes() == content
        return is_own_picture(path)

    def write_png(self, name: str, pixels: np.ndarray) -> None:
        self.write_file(name, png_bytes(pixels))

    def write_file(self, name: str, content: bytes) -> None:
        make_folders(self.out)
        replace_file(self.out / name, lambda file: file.write(content))
        self.written += 1


def npy_bytes(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def cut_to_bytes(text: str, count: int) -> str:
    """As much of a file name as fits into ``count`` bytes."""
    encoded = os.fsencode(text)
    return text if len(encoded) <= count else encoded[:count].decode("utf-8", "ignore")


def identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of a file, and of the link if it is one; empty if it does not exist."""
    try:
        return {(stat.st_dev, stat.st_ino) for stat in (os.stat(path), os.lstat(path))}
    except OSError:
        return set()


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a table, over an earlier one with the same columns, or else under a free name. Returns
    the path."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow(
            {
                name: round(float(value), 4) if isinstance(value, float) else value
                for name, value in row.items()
            }
        )
    content = text.getvalue().encode()
    header = content[: content.index(b"\n") + 1]
    path = free_path(path, lambda old: old.is_file() and old.read_bytes().startswith(header))
    replace_file(path, lambda file: file.write(content))
    return path
