"""Files of cam.py: the images that it reads, and the overlays, sheets and tables that it writes."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError, print_error, printable
from common.files import free_path, make_folders, replace_file
from data import images_and_others, passed_over
from explain.pictures import (
    FLAT,
    FORMATS,
    PAPER,
    attention_sheet,
    is_own_picture,
    overlay,
    picture_bytes,
    shown,
)

# pixels of an overlay: smaller images are enlarged, larger ones shrunk
MIN_SIDE, MAX_SIDE = 224, 1024
SHEET_SIDE = 288  # pixels of the longer side of a picture on an image's own sheet, at most
SHEET_MAPS = 6  # in a row of it, beside the input
MAX_SCALE = 4  # an overlay of 4,096 x 4,096 pixels takes 1 GiB while it is drawn

# Bytes of the parts of a file name. With a number and an ending, it stays below the 255 of file
# systems.
MAX_STEM, MAX_MAP = 190, 50

PREDICTED = 5  # classes per image in predictions.csv
PREDICTION_FIELDS = (
    "file",
    "class",
    *(f"predicted_{place}" for place in range(1, PREDICTED + 1)),
    *(f"probability_{place}" for place in range(1, PREDICTED + 1)),
)
# Values within this fraction of a map's range count as its highest: enlarging a map rounds them.
PEAK_TOLERANCE = 1e-6


# ---- in -----------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image for display, and what is known of it."""

    name: str  # in messages
    stem: str  # of the files that are written
    pixels: np.ndarray  # (H, W, 3) uint8, at most MAX_SIDE * scale pixels large
    truth: str | None = None  # class name
    # the part of the image that ``pixels`` show, x0 y0 x1 y1 in its own pixels; None: all of it,
    # pixel by pixel
    box: tuple[int, int, int, int] | None = None

    @property
    def shown_box(self) -> tuple[int, int, int, int]:
        return self.box or (0, 0, self.pixels.shape[1], self.pixels.shape[0])


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
    total = len(images) + len(others)
    found = [folder / name for name in images if not is_own_picture(folder / name)]
    foreign = [name for name in others if not is_own_picture(folder / name)]
    own = total - len(found) - len(foreign)
    if foreign:
        print(passed_over(folder, foreign, total), flush=True)
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
        self.headings: dict[str, str] = {}  # of the maps, where they are not their names

    def add(self, picture: Picture, maps: Mapping[str, np.ndarray], title: str) -> None:
        """Add an image with its maps {name: (H, W)}."""
        self.pixels.append(picture.pixels)
        self.titles.append(title)
        for name, values in maps.items():
            self.maps.setdefault(name, []).append(values)


class Writer:
    """Writes files into a folder, each whole or not at all. None takes the name of an input, of
    another file of this writer, or of an existing file unless an earlier run wrote that one.

    raw: also write the maps as .npy. opacity, colors, blend, scale: see explain/pictures.py.
    picture_format: one of FORMATS.
    """

    def __init__(
        self,
        out: Path,
        inputs: Sequence[Path],
        *,
        raw: bool,
        opacity: float,
        colors: str,
        blend: str = "even",
        picture_format: str = "png",
        scale: int = 1,
    ):
        if picture_format not in FORMATS:
            raise ValueError(f"unknown format {picture_format!r}: choose one of {FORMATS}")
        self.out, self.raw, self.picture_format, self.scale = out, raw, picture_format, scale
        self.look = {"opacity": opacity, "color_map": colors, "blend": blend}
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
        parts = {name: file_name_part(name, MAX_MAP) for name in maps}
        raw = {}
        if self.raw:
            raw = {f"{parts[name]}.npy": npy_bytes(values) for name, values in maps.items()}
        stem = self.free_stem(
            picture.stem, [*map(self.as_picture, parts.values()), self.as_picture("sheet")], raw
        )
        large = shown(picture.pixels, MIN_SIDE, MAX_SIDE, self.scale)
        for name, values in maps.items():
            pixels = overlay(large, values, **self.look)
            self.write_picture(f"{stem}-{self.as_picture(parts[name])}", pixels)
        for ending, content in raw.items():
            self.write_file(f"{stem}-{ending}", content)
        sheet = self.image_sheet(picture, maps, headings, title)
        self.write_picture(f"{stem}-{self.as_picture('sheet')}", sheet)
        return stem

    def image_sheet(
        self,
        picture: Picture,
        maps: Mapping[str, np.ndarray],
        headings: Mapping[str, str],
        title: str,
    ) -> np.ndarray:
        """The input beside the overlays, in rows of at most ``SHEET_MAPS``."""
        names = list(maps)
        rows = math.ceil(len(names) / SHEET_MAPS)
        in_row = math.ceil(len(names) / rows)
        strips = []
        for first in range(0, len(names), in_row):
            strip = attention_sheet(
                picture.pixels[None],
                {name: maps[name][None] for name in names[first : first + in_row]},
                None if first else [title],
                headings=headings,
                min_side=MIN_SIDE,
                max_side=SHEET_SIDE,
                legend=first + in_row >= len(names),
                scale=self.scale,
                **self.look,
            )
            strips.append(strip)
        return stacked(strips)

    def write_overview(self, stem: str, overview: Overview) -> None:
        """Write one sheet of a whole selection."""
        ending = self.as_picture("sheet")
        stem = self.free_stem(stem, [ending], {})
        sheet = attention_sheet(
            np.stack(overview.pixels),
            {name: np.stack(values) for name, values in overview.maps.items()},
            overview.titles,
            headings=overview.headings,
            scale=self.scale,
            **self.look,
        )
        self.write_picture(f"{stem}-{ending}", sheet)

    def as_picture(self, name: str) -> str:
        """The name with the ending of the pictures' format."""
        return f"{name}.{self.picture_format}"

    def free_stem(self, wanted: str, pictures: Sequence[str], raw: Mapping[str, bytes]) -> str:
        """``wanted``, with a number if needed, so that each file STEM-ENDING may be written, for
        the endings of pictures and of ``raw`` {ending: content}. Cut to a length that file systems
        take; names that begin alike stay different."""
        contents: dict[str, bytes | None] = dict.fromkeys(pictures) | dict(raw)
        base = file_name_part(wanted, MAX_STEM)
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

    def write_picture(self, name: str, pixels: np.ndarray) -> None:
        self.write_file(name, picture_bytes(pixels, self.picture_format, self.scale))

    def write_file(self, name: str, content: bytes) -> None:
        make_folders(self.out)
        replace_file(self.out / name, lambda file: file.write(content))
        self.written += 1


def stacked(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (h, w, 3) below each other, the narrower ones with paper at their right."""
    width = max(strip.shape[1] for strip in strips)
    sheet = np.full((sum(map(len, strips)), width, 3), PAPER, np.uint8)
    top = 0
    for strip in strips:
        sheet[top : top + len(strip), : strip.shape[1]] = strip
        top += len(strip)
    return sheet


def npy_bytes(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def file_name_part(text: str, count: int) -> str:
    """A text as a part of a file name, in at most ``count`` bytes: a longer one is cut, and ends in
    a digest of all of it, so that no two become the same."""
    text = text.replace("/", "_").replace(os.sep, "_")
    encoded = os.fsencode(text)
    if len(encoded) <= count:
        return text
    digest = "-" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: count - len(digest)].decode("utf-8", "ignore") + digest


def identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of a file, and of the link if it is one; empty if it does not exist."""
    try:
        return {(stat.st_dev, stat.st_ino) for stat in (os.stat(path), os.lstat(path))}
    except OSError:
        return set()


# ---- tables -------------------------------------------------------------------------------------


def write_csv(
    path: Path,
    rows: list[dict[str, object]],
    is_ours: Callable[[list[str]], bool] | None = None,
) -> Path:
    """Write a table, over an earlier one with the same columns, or with some that ``is_ours``
    knows; else under a free name. Returns the path."""
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
    is_ours = is_ours or list(rows[0]).__eq__
    path = free_path(path, lambda old: is_ours(columns_of(old)))
    replace_file(path, lambda file: file.write(content))
    return path


def columns_of(path: Path) -> list[str]:
    """The names in the first line of a table; [] of any other file."""
    if not path.is_file():  # opening a pipe would wait
        return []
    try:
        with open(path, "rb") as file:
            line = file.readline(2**20)
        return next(csv.reader([line.decode()]), []) if line.endswith(b"\n") else []
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


class Prediction(NamedTuple):
    """What a network sees in an image: a line of predictions.csv."""

    file: str
    truth: str | None  # the class, where it is known
    best: Sequence[tuple[str, float]]  # classes and their probabilities, the best first
    peaks: Mapping[str, tuple[int, int] | None]  # x, y of the peak of each map, see ``peak_pixel``


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> Path:
    """Write predictions.csv, a line per image, over an earlier one (also one with other maps), or
    else under a free name. Returns the path. What an image lacks is empty. There is at least one
    image."""
    maps = list(dict.fromkeys(name for each in predictions for name in each.peaks))
    rows = []
    for each in predictions:
        row: dict[str, object] = dict.fromkeys(PREDICTION_FIELDS, "")
        row |= {"file": printable(each.file), "class": printable(each.truth or "")}
        for place, (name, probability) in enumerate(each.best[:PREDICTED], start=1):
            row[f"predicted_{place}"] = printable(name)
            row[f"probability_{place}"] = float(probability)
        for name in maps:
            x_y = each.peaks.get(name) or ("", "")
            row |= dict(zip((f"peak_{name}_x", f"peak_{name}_y"), x_y, strict=True))
        rows.append(row)
    return write_csv(path, rows, are_prediction_fields)


def are_prediction_fields(columns: list[str]) -> bool:
    """Whether these are columns of predictions.csv, of whatever maps. One of the user's among them
    makes the table the user's."""
    count = len(PREDICTION_FIELDS)
    return tuple(columns[:count]) == PREDICTION_FIELDS and all(
        re.fullmatch(r"peak_.+_[xy]", column, re.DOTALL) for column in columns[count:]
    )


def peak_pixel(values: np.ndarray, box: Sequence[int]) -> tuple[int, int] | None:
    """Where a map is highest: x, y of a pixel of the picture.

    values: (H, W) floats. box: the part of the picture that the map covers, x0 y0 x1 y1 in pixels
    of the picture. Of several highest values, the one nearest to the mean of their positions: the
    mean itself may lie where the map is low. None for a map without a peak: a flat one (see
    explain.pictures.FLAT), or one that is not finite anywhere.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    lowest, highest = finite.min(), finite.max()
    if highest - lowest <= FLAT * max(abs(lowest), abs(highest)):
        return None
    near = np.isfinite(values) & (values >= highest - PEAK_TOLERANCE * (highest - lowest))
    positions = np.argwhere(near)
    distances = np.square(positions - positions.mean(axis=0)).sum(axis=1)
    row, column = positions[distances.argmin()] + 0.5  # the center of its cell
    (height, width), (x0, y0, x1, y1) = values.shape, box
    return int(x0 + column / width * (x1 - x0)), int(y0 + row / height * (y1 - y0))
