"""CUB-200-2011 (Caltech-UCSD Birds) in its official layout, with boxes and parts in pixels of the
stored pictures.

A folder CUB_200_2011 with only some of the classes is a valid data set: ids need not be contiguous.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, one_line
from datasets.decoding import Pictures
from datasets.download import (
    check_archive,
    check_data_dir,
    check_space,
    data_folder,
    fetch,
    find_below,
    find_beside,
    find_named,
    unpack,
)
from datasets.image_cache import load_or_decode
from datasets.image_files import MIN_IMAGE_SIZE
from datasets.image_set import ImageSet

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_MIB = 1098  # approximately
CUB_UNPACKED_MIB = 1230  # approximately
CUB_ARCHIVE = "CUB_200_2011.tgz"
CUB_FOLDER = "CUB_200_2011"
CUB_NAMES = (CUB_FOLDER, CUB_ARCHIVE)

MAX_METADATA_BYTES = 2**26
MAX_COORDINATE = 1e6  # pixels


class Bird(NamedTuple):
    """The metadata of one image."""

    path: Path
    label: int  # index into the class names
    train: bool
    # x0 y0 x1 y1 in whole pixels of the file's picture; it may extend beyond the picture
    box: tuple[int, int, int, int]
    box_line: int  # of bounding_boxes.txt, for messages


# ---- where it is --------------------------------------------------------------------------------


def cub_present(data_dir: str | os.PathLike) -> bool:
    """Whether load_cub would find data without the network. Cheap: looks at names only.

    Raises UserError for a ~ in ``data_dir`` without a home folder.
    """
    return _find_cub(data_folder(data_dir)) is not None


def _find_cub(root: Path) -> Path | None:
    """The folder or the archive in ``root`` or in one of its folders, or ``root`` itself if it is
    the folder."""
    folder = root / CUB_FOLDER
    if folder.is_dir():  # if it is incomplete, the reader will say what is missing
        return next(filter(_holds_cub, (folder, *find_named(folder, CUB_NAMES))), folder)
    candidates = find_below(root, CUB_NAMES)
    if root.is_dir():
        candidates.append(root)
    return next(filter(_holds_cub, candidates), None)


def _holds_cub(path: Path) -> bool:
    """Whether a folder is the data set, or a file has the archive's name."""
    is_archive = path.name.casefold() == CUB_ARCHIVE.casefold() and path.is_file()
    return is_archive or (path / "images.txt").is_file() and (path / "images").is_dir()


def load_cub(
    data_dir: str | os.PathLike,
    *,
    image_size: int,
    crop: str = "box",
    margin: float = 0.0,
    num_workers: int = 0,
    download: bool = True,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """CUB-200-2011 (train, test) from the first of these that exists: the folder
    ``<data_dir>/CUB_200_2011``, the official archive in ``data_dir`` (unpacked there), the official
    server.

    Names match in upper and lower case, one folder deeper, and where ``data_dir`` is itself the
    folder.

    Args:
        image_size: side in pixels that every picture is resized to.
        crop: "box", the bird's bounding box, or "whole", the whole picture.
        margin: how far the box grows on each side before the crop, as a fraction of its longer
            side, 0 to 10.
        num_workers: processes that decode the images; 0 decodes in this process.
        download: whether to use the official server.
        progress: show progress bars on a terminal.

    Raises:
        UserError: anything the user can fix.
        ValueError: an unknown crop.
    """
    root = data_folder(data_dir)
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"--image-size {image_size} is too small: at least {MIN_IMAGE_SIZE} pixels are needed"
        )
    if crop not in ("box", "whole"):
        raise ValueError(f"crop is box or whole, not {crop!r}")
    if not 0 <= margin <= 10:
        raise UserError(
            f"a crop margin of {margin} is out of range: "
            f"give a fraction of the box's longer side, from 0 to 10"
        )
    folder = _provide(root, download, progress)
    birds, parts, class_names, part_names = read_metadata(folder)
    sets = []
    for is_train in (True, False):
        chosen = [i for i, bird in enumerate(birds) if bird.train == is_train]
        split_birds = [birds[i] for i in chosen]
        crops = [_grown(bird.box, margin) for bird in split_birds] if crop == "box" else None
        try:
            pictures = load_or_decode(
                [bird.path for bird in split_birds],
                root / ".cache",
                f"cub-{'train' if is_train else 'test'}-{crop}",
                folder,
                size=(image_size, image_size),
                resize=True,
                num_workers=num_workers,
                progress=progress,
                crops=crops,
                upright=False,
            )
        except UserError as error:
            raise UserError(
                f"{error}, in that case with its rows in the .txt files of {folder}"
            ) from None
        sets.append(
            ImageSet(
                pictures.images,
                torch.tensor([bird.label for bird in split_birds]),
                class_names,
                f"CUB-200-2011 in {folder}",
                boxes=_stored_boxes(split_birds, pictures, folder),
                parts=None if parts is None else _stored_parts(parts[chosen], pictures),
                part_names=part_names,
                files=tuple(os.path.relpath(bird.path, folder) for bird in split_birds),
            )
        )
    return sets[0], sets[1]


def _provide(root: Path, download: bool, progress: bool) -> Path:
    """The data set's folder, downloaded and unpacked if necessary."""
    found = _find_cub(root)
    if found and found.is_dir():
        return found
    archive = found or root / CUB_ARCHIVE
    if not found:
        by_hand = (
            f"Fetch {CUB_URL} (md5 {CUB_MD5}) yourself and put it at {archive}, or unpacked at "
            f"{root / CUB_FOLDER}/, or use --sample for the built-in sample"
        )
        other = next(filter(_holds_cub, find_beside(root, CUB_NAMES)), None)
        check_data_dir(root, download, "CUB-200-2011", CUB_FOLDER, other, by_hand)
        check_space(root, CUB_MIB + CUB_UNPACKED_MIB, "CUB-200-2011")
        fetch(
            CUB_URL,
            CUB_MD5,
            archive,
            size_mib=CUB_MIB,
            what="CUB-200-2011",
            by_hand=by_hand,
            progress=progress,
        )
    check_archive(archive, CUB_MD5, CUB_URL)
    check_space(archive.parent, CUB_UNPACKED_MIB, f"unpacking {archive}")
    unpack(archive, CUB_FOLDER, archive.parent, progress=progress)
    return archive.parent / CUB_FOLDER


# ---- boxes and parts ----------------------------------------------------------------------------


def _grown(box: tuple[int, int, int, int], margin: float) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    more = round(margin * max(x1 - x0, y1 - y0))
    return x0 - more, y0 - more, x1 + more, y1 + more


def _scale(pictures: Pictures) -> Tensor:
    """(N, 2): pixels of the stored picture per pixel of the file's, across and down."""
    return pictures.images.shape[1] / (pictures.crops[:, 2:] - pictures.crops[:, :2]).double()


def _stored_boxes(birds: list[Bird], pictures: Pictures, folder: Path) -> Tensor:
    """(N, 4) float32 x0 y0 x1 y1 in pixels of the stored picture, clipped to the file's picture.
    Raises UserError for a box outside it."""
    boxes = torch.tensor([bird.box for bird in birds])
    boxes = torch.minimum(boxes.clamp(min=0), pictures.sizes.repeat(1, 2))
    for i in (boxes[:, 2:] <= boxes[:, :2]).any(1).nonzero().flatten().tolist():
        width, height = pictures.sizes[i].tolist()
        raise _wrong(
            folder / "bounding_boxes.txt",
            birds[i].box_line,
            f"the box lies outside of {birds[i].path}, which is {width}x{height} pixels",
        )
    return ((boxes - pictures.crops[:, :2].repeat(1, 2)) * _scale(pictures).repeat(1, 2)).float()


def _stored_parts(parts: np.ndarray, pictures: Pictures) -> Tensor:
    """(N, P, 3) float32: x y in pixels of the stored picture, and 1 where the part is visible and
    in the crop; all 0 where it is not. ``parts`` has x y in pixels of the file's picture."""
    in_crop = torch.from_numpy(parts[..., :2]) - pictures.crops[:, None, :2]
    places = in_crop * _scale(pictures)[:, None]
    inside = ((places >= 0) & (places < pictures.images.shape[1])).all(-1)
    visible = (inside & torch.from_numpy(parts[..., 2] == 1))[..., None]
    return torch.cat([places, visible], -1).masked_fill(~visible, 0).float()


# ---- metadata -----------------------------------------------------------------------------------


def read_metadata(
    folder: Path,
) -> tuple[list[Bird], np.ndarray | None, tuple[str, ...], tuple[str, ...]]:
    """The birds by image id, their parts (N, P, 3) float64 as written (x, y, visible; None without
    parts/), the class names by class id, and the part names by part id.

    Raises:
        UserError: naming the file and line of what is wrong.
    """
    classes = _read_names(folder / "classes.txt")
    for name, line in classes.values():
        if "/" in name or "\\" in name:
            raise _wrong(folder / "classes.txt", line, f"class name {_shown(name)} holds a / or \\")
    images = _read_names(folder / "images.txt")
    labels = _read_columns(folder / "image_class_labels.txt", 1, images)
    splits = _read_columns(folder / "train_test_split.txt", 1, images)
    boxes = _read_columns(folder / "bounding_boxes.txt", 4, images)
    index = {number: i for i, number in enumerate(sorted(classes))}
    birds = [
        Bird(
            path=_image_path(folder, *images[number]),
            label=index[_class_id(folder, classes, *labels[number])],
            train=_is_train(folder, *splits[number]),
            box=_box(folder, *boxes[number]),
            box_line=boxes[number][1],
        )
        for number in sorted(images)
    ]
    names = [classes[number][0] for number in index]
    _check_splits(folder, birds, names)
    parts, part_names = _read_parts(folder / "parts", images)
    return birds, parts, _class_names(names), part_names


def _wrong(path: Path, line: int, problem: str) -> UserError:
    """The error for a line of a metadata file."""
    remedy = "Correct it, or take the file from the official archive"
    return UserError(one_line(f"{path}, line {line}: {problem}. {remedy}"))


def _shown(text: str) -> str:
    """A text from a file, quoted and shortened for messages."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _read_rows(path: Path, fields: int) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank. The last field may contain blanks."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(MAX_METADATA_BYTES + 1)
        if len(content) > MAX_METADATA_BYTES:
            raise ValueError(f"it is larger than {MAX_METADATA_BYTES // 2**20} MiB")
        content = content.removeprefix(codecs.BOM_UTF8)  # some editors add one
        lines = [line.decode() for line in content.split(b"\n")]
    except UnicodeDecodeError:
        line = next(i for i, line in enumerate(content.split(b"\n"), 1) if not _decodes(line))
        raise _wrong(path, line, "it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). Take it from the official archive"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = line.split(maxsplit=fields - 1)
            if len(row) != fields:
                problem = f"expected {fields} fields, found {len(row)}: {_shown(line.strip())}"
                raise _wrong(path, number, problem)
            rows.append((number, [*row[:-1], row[-1].strip()]))
    if not rows:
        raise UserError(f"{path} is empty. Take it from the official archive")
    return rows


def _decodes(line: bytes) -> bool:
    try:
        return line.decode() is not None
    except UnicodeDecodeError:
        return False


def _whole(path: Path, line: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise _wrong(path, line, f"{_shown(text)} is not a whole number")
    return int(text)


def _pixels(path: Path, line: int, texts: list[str]) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [math.nan]
    if not all(abs(value) <= MAX_COORDINATE for value in values):  # also false for nan
        raise _wrong(path, line, f"{_shown(' '.join(texts))} are not numbers of pixels")
    return values


def _read_names(path: Path) -> dict[int, tuple[str, int]]:
    """Id -> (name, line) of a file of ids and names. Ids and names are unique, names printable."""
    names, line_of_name = {}, {}
    for line, (identity, name) in _read_rows(path, 2):
        number = _whole(path, line, identity)
        if number in names:
            raise _wrong(path, line, f"id {number} is already on line {names[number][1]}")
        if not name.isprintable():
            problem = f"the name {_shown(name)} holds characters that cannot be printed"
            raise _wrong(path, line, problem)
        if name in line_of_name:
            raise _wrong(path, line, f"{_shown(name)} is already on line {line_of_name[name]}")
        names[number] = (name, line)
        line_of_name[name] = line
    return names


def _read_columns(path: Path, columns: int, images: dict) -> dict[int, tuple[list[str], int]]:
    """Image id -> (columns, line), exactly once for each image of images.txt."""
    values = {}
    for line, (identity, *row) in _read_rows(path, 1 + columns):
        number = _whole(path, line, identity)
        if number in values:
            raise _wrong(path, line, f"image id {number} is already on line {values[number][1]}")
        if number not in images:
            raise _wrong(path, line, f"image id {number} is not in images.txt")
        values[number] = (row, line)
    missing = sorted(images.keys() - values.keys())
    if missing:
        raise UserError(
            f"{path} has no row for image id {missing[0]}, which is in images.txt "
            f"({len(missing):,} missing in all). Add it, or take the file from the official archive"
        )
    return values


def _image_path(folder: Path, name: str, line: int) -> Path:
    # the Windows anchor covers / and C:
    if PureWindowsPath(name).anchor or "\\" in name or ".." in name.split("/"):
        problem = f"{_shown(name)} is not the path of a file inside images/"
        raise _wrong(folder / "images.txt", line, problem)
    return folder / "images" / name


def _class_id(folder: Path, classes: dict, row: list[str], line: int) -> int:
    path = folder / "image_class_labels.txt"
    number = _whole(path, line, row[0])
    if number not in classes:
        raise _wrong(path, line, f"class id {number} is not in classes.txt")
    return number


def _is_train(folder: Path, row: list[str], line: int) -> bool:
    if row[0] not in ("0", "1"):
        problem = f"{_shown(row[0])} is neither 1 (train) nor 0 (test)"
        raise _wrong(folder / "train_test_split.txt", line, problem)
    return row[0] == "1"


def _box(folder: Path, row: list[str], line: int) -> tuple[int, int, int, int]:
    path = folder / "bounding_boxes.txt"
    x, y, width, height = _pixels(path, line, row)
    x0, y0, x1, y1 = round(x), round(y), round(x + width), round(y + height)
    if x1 <= max(x0, 0) or y1 <= max(y0, 0):
        shown = _shown(" ".join(row))
        problem = f"the box {shown} (x y width height) holds no pixel of the picture"
        raise _wrong(path, line, problem)
    return x0, y0, x1, y1


def _check_splits(folder: Path, birds: list[Bird], names: list[str]) -> None:
    path = folder / "train_test_split.txt"
    for is_train, word in ((True, "training"), (False, "test")):
        if not any(bird.train == is_train for bird in birds):
            raise UserError(f"{path} names no {word} images. Take it from the official archive")
    untrained = sorted(set(range(len(names))) - {bird.label for bird in birds if bird.train})
    if untrained:
        raise UserError(
            f"{path} names no training image of class {_shown(names[untrained[0]])} "
            f"({len(untrained):,} such classes). Remove it from classes.txt with its images, "
            f"or make one of them a training image"
        )


def _class_names(names: list[str]) -> tuple[str, ...]:
    """Readable names: "001.Black_footed_Albatross" -> "Black footed Albatross", if all names are
    unique without their numbers."""
    plain = tuple(re.sub(r"^\d+\.", "", name).replace("_", " ").strip() for name in names)
    return plain if len(set(plain)) == len(names) and all(plain) else tuple(names)


def _read_parts(folder: Path, images: dict) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Parts (N, P, 3) float64 (x, y, visible) by image id and part id, and their names; (None, ())
    without files."""
    if not any(os.path.exists(folder / name) for name in ("parts.txt", "part_locs.txt")):
        return None, ()
    path = folder / "part_locs.txt"
    names = _read_names(folder / "parts.txt")
    columns = {number: i for i, number in enumerate(sorted(names))}
    index = {number: i for i, number in enumerate(sorted(images))}
    parts = np.zeros((len(index), len(columns), 3))
    lines = {}
    for line, row in _read_rows(path, 5):
        image, part = (_whole(path, line, text) for text in row[:2])
        if image not in index:
            raise _wrong(path, line, f"image id {image} is not in images.txt")
        if part not in columns:
            raise _wrong(path, line, f"part id {part} is not in parts.txt")
        if (image, part) in lines:
            problem = f"part {part} of image id {image} is already on line {lines[image, part]}"
            raise _wrong(path, line, problem)
        if row[4] not in ("0", "1"):
            raise _wrong(path, line, f"{_shown(row[4])} is neither 1 (visible) nor 0 (not)")
        parts[index[image], columns[part]] = *_pixels(path, line, row[2:4]), row[4] == "1"
        lines[image, part] = line
    pairs = ((image, part) for image in index for part in columns)
    missing = next((pair for pair in pairs if pair not in lines), None)
    if missing:
        image, part = missing
        raise UserError(
            f"{path} has no row for part {part} of image id {image}. "
            f"Add it, or take the file from the official archive"
        )
    return parts, tuple(names[number][0] for number in columns)
