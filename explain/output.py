"""Images in, pictures out: what cam.py reads from files, and the overlays and sheets that it
writes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from common.errors import UserError, print_error, printable
from common.files import make_folders, replace_file
from data import images_and_others, passed_over
from explain.pictures import attention_sheet, overlay, shown

# pixels of an overlay: smaller images are enlarged, larger ones shrunk
MIN_SIDE, MAX_SIDE = 224, 1024
MAX_STEM_BYTES = 200  # bytes: with the map's name it has to stay below a file system's 255
SHEET_SIDE = 288  # pixels of the longer side of a picture on an image's own sheet, at most


# ---- in -----------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image as a person sees it, and what is known of it."""

    name: str  # for people
    stem: str  # of the files that are written
    pixels: np.ndarray  # (H, W, 3) uint8
    truth: str | None = None  # class name


def list_files(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files that the command line names, a folder's images sorted by name; and the folders
    without any, which are told, as is what is passed over in the others."""
    paths, bad = [], []
    for path in map(Path, words):
        found = [path]
        if path.is_dir():
            images, others = images_and_others(path)
            if others:
                print(passed_over(path, others, len(images) + len(others)), flush=True)
            found = [path / name for name in images if not is_ours(path / name)]
            if len(found) < len(images):
                print(
                    f"{printable(path)}: passed over {len(images) - len(found):,} of cam.py's own pictures",
                    flush=True,
                )
            if not found:
                print_error(f"{printable(path)} holds no images; its folders are not searched")
                bad.append(path)
        paths += found
    return list(dict.fromkeys(paths)), bad


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that we made: it says so."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # PIL raises nearly anything
        return False


def parse_index(text: str, count: int) -> list[int]:
    """ "3,7,9-12" -> [3, 7, 9, 10, 11, 12]. Raises UserError for what is no such list, or beyond
    ``count`` images."""
    indices = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-", 1)]
        if not all(end.isascii() and end.isdigit() and len(end) < 20 for end in ends) or int(
            ends[0]
        ) > int(ends[-1]):
            raise UserError(f"--index {text}: expected numbers and ranges, as in 3,7,9-12", 2)
        if int(ends[-1]) >= count:
            raise UserError(f"--index {text}: there are {count:,} images, numbered from 0", 2)
        indices += range(int(ends[0]), int(ends[-1]) + 1)
    return list(dict.fromkeys(indices))


# ---- out ----------------------------------------------------------------------------------------


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


# is written into a picture of ours, which may be replaced by a later one
SOFTWARE = "learn-to-pay-attention"


class Writer:
    """Writes files into a folder, each whole or not at all. None takes the name of an input, of
    another of its own, or of a file that was there before and is not an earlier one of ours.

    raw: the maps as .npy too. opacity, colors: see training/pictures.py.
    """

    def __init__(
        self, out: Path, inputs: Sequence[Path], *, raw: bool, opacity: float, colors: str
    ):
        self.out, self.raw, self.opacity, self.colors = out, raw, opacity, colors
        self.inputs = {identity for path in inputs for identity in identities(path)}
        self.taken: set[str] = set()
        self.written = 0

    def image(
        self,
        picture: Picture,
        maps: Mapping[str, np.ndarray],
        headings: Mapping[str, str],
        title: str,
    ) -> str:
        """An overlay for each map {name: (H, W)}, and a sheet with the input and them. Returns the
        files' stem."""
        raw = {f"{name}.npy": npy(each) for name, each in maps.items()} if self.raw else {}
        stem = self.free_stem(picture.stem, [*(f"{name}.png" for name in maps), "sheet.png"], raw)
        large = shown(picture.pixels, MIN_SIDE, MAX_SIDE)
        for name, each in maps.items():
            self.png(f"{stem}-{name}.png", overlay(large, each, self.opacity, self.colors))
        for ending, content in raw.items():
            self.write(f"{stem}-{ending}", content)
        self.png(
            f"{stem}-sheet.png",
            attention_sheet(
                picture.pixels[None],
                {name: each[None] for name, each in maps.items()},
                [title],
                headings=headings,
                opacity=self.opacity,
                min_side=MIN_SIDE,
                max_side=SHEET_SIDE,
                name=self.colors,
            ),
        )
        return stem

    def overview(self, stem: str, overview: Overview) -> None:
        """One sheet of a whole selection."""
        stem = self.free_stem(stem, ["sheet.png"], {})
        self.png(
            f"{stem}-sheet.png",
            attention_sheet(
                np.stack(overview.pixels),
                {name: np.stack(each) for name, each in overview.maps.items()},
                overview.titles,
                opacity=self.opacity,
                name=self.colors,
            ),
        )

    def free_stem(self, wanted: str, pictures: list[str], raw: Mapping[str, bytes]) -> str:
        """``wanted``, or with a number behind it, so that each file STEM-ENDING, a picture or one
        with that content, may be written. Cut to a length that file systems take."""
        stem, number = in_bytes(wanted, MAX_STEM_BYTES), 1
        while any(
            f"{stem}-{ending}".casefold() in self.taken
            or not self.may_write(self.out / f"{stem}-{ending}", raw.get(ending))
            for ending in (*pictures, *raw)
        ):
            number += 1
            stem = f"{in_bytes(wanted, MAX_STEM_BYTES)}-{number}"
        self.taken |= {f"{stem}-{ending}".casefold() for ending in (*pictures, *raw)}
        return stem

    def may_write(self, path: Path, content: bytes | None) -> bool:
        """Whether nothing has that name, or an earlier file of ours: a picture that says so, or one
        of the same content."""
        if not os.path.lexists(path):
            return True
        if self.inputs.intersection(identities(path)) or not path.is_file():
            return False
        if content is not None:
            return path.stat().st_size == len(content) and path.read_bytes() == content
        return is_ours(path)

    def png(self, name: str, pixels: np.ndarray) -> None:
        content, mark = io.BytesIO(), PngImagePlugin.PngInfo()
        mark.add_text("Software", SOFTWARE)
        Image.fromarray(pixels).save(content, "PNG", pnginfo=mark)
        self.write(name, content.getvalue())

    def write(self, name: str, content: bytes) -> None:
        make_folders(self.out)
        replace_file(self.out / name, lambda file: file.write(content))
        self.written += 1


def npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def in_bytes(text: str, count: int) -> str:
    """As much of a file's name as fits so many bytes."""
    return (
        os.fsencode(text)[:count].decode("utf-8", "ignore")
        if len(os.fsencode(text)) > count
        else text
    )


def identities(path: Path) -> set[tuple[int, int]]:
    """What a file is on its disk, and what it is a link to; empty where there is none."""
    try:
        return {(stat.st_dev, stat.st_ino) for stat in (os.stat(path), os.lstat(path))}
    except OSError:
        return set()
