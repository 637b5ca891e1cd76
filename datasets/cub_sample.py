"""The built-in sample in the form of CUB-200-2011: photo-sized pictures on disk, with boxes, parts
and a split.

A picture is the clutter of cifar_sample.py with one "bird" on it: an ellipse with an eye, a tail,
and a tile with one of the MARKS. Only the pattern of the mark tells the class. The box is the
bird's, and the parts are the centers of eye, mark and tail, so that a test can measure where a
network looks. The pixels are the same on every machine, before JPEG.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.cifar_sample import (
    CELLS,
    DISTRACTORS,
    MARKS,
    Words,
    background,
    distractor,
    mark_tiles,
    words_per_picture,
)
from datasets.cub import CUB_FOLDER, load_cub
from datasets.image_set import ImageSet

CANVAS = 280  # pixels; a picture is cropped from a square of this side
MARK_CELL = 5  # pixels
WORDS = words_per_picture(CANVAS) + 32  # random 64-bit words per picture
PART_NAMES = ("eye", "mark", "tail")


def cub_sample(
    *,
    image_size: int = 224,
    crop: str = "box",
    margin: float = 0.0,
    num_workers: int = 0,
    seed: int = 0,
    classes: int = 8,
    train_per_class: int = 12,
    test_per_class: int = 6,
) -> tuple[ImageSet, ImageSet]:
    """(train, test), written to a temporary folder and loaded from it like CUB-200-2011.

    Args:
        image_size, crop, margin, num_workers: see load_cub.
        seed, classes, train_per_class, test_per_class: see write_cub_sample.

    Raises:
        ValueError, UserError: as those two do.
    """
    with tempfile.TemporaryDirectory(prefix="cub-sample-", ignore_cleanup_errors=True) as folder:
        write_cub_sample(
            folder,
            seed=seed,
            classes=classes,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
        )
        train, test = load_cub(
            folder,
            image_size=image_size,
            crop=crop,
            margin=margin,
            num_workers=num_workers,
            download=False,
            progress=False,
        )
        # cloned: the loaded images are mapped from the cache, which is deleted with the folder
        source = f"built-in sample (seed {seed})"
        train, test = (
            replace(image_set, stored=image_set.images.clone(), source=source)
            for image_set in (train, test)
        )
    return train, test


def write_cub_sample(
    folder: str | os.PathLike, *, seed: int, classes: int, train_per_class: int, test_per_class: int
) -> None:
    """Write <folder>/CUB_200_2011 in the official layout, balanced. Train and test share no
    drawing.

    Raises:
        ValueError: fewer than 2 classes, or more than MARKS.
    """
    if not 2 <= classes <= len(MARKS):
        raise ValueError(f"the sample has 2 to {len(MARKS)} classes, not {classes}")
    root = Path(folder) / CUB_FOLDER
    (root / "parts").mkdir(parents=True)
    streams = [
        np.random.Philox(key=np.array([seed % 2**64, 2 + split], dtype=np.uint64))
        for split in (0, 1)
    ]
    tables = {
        "classes": [],
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
        "bounding_boxes": [],
        "parts/part_locs": [],
    }
    for label, mark in enumerate(list(MARKS)[:classes]):
        name = f"{label + 1:03d}.{mark}"
        (root / "images" / name).mkdir(parents=True)
        tables["classes"].append(f"{label + 1} {name}")
        for i in range(train_per_class + test_per_class):
            is_train = i < train_per_class
            image = len(tables["images"]) + 1
            words = streams[not is_train].random_raw(WORDS)
            picture, (x0, y0, x1, y1), parts = draw_bird(words, label)
            path = f"{name}/{mark}_{i + 1:04d}.jpg"
            Image.fromarray(picture).save(root / "images" / path, quality=95)
            tables["images"].append(f"{image} {path}")
            tables["image_class_labels"].append(f"{image} {label + 1}")
            tables["train_test_split"].append(f"{image} {is_train:d}")
            box = f"{x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}"
            tables["bounding_boxes"].append(f"{image} {box}")
            tables["parts/part_locs"] += [
                f"{image} {part} {x:.1f} {y:.1f} 1" for part, (x, y) in enumerate(parts, 1)
            ]
    tables["parts/parts"] = [f"{part} {name}" for part, name in enumerate(PART_NAMES, 1)]
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def draw_bird(words: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture from WORDS random words: (H, W, 3) uint8, one side from 224 to 248 pixels and the
    other from 256 to 280; the bird's box (4,) int64 x0 y0 x1 y1; and the centers of PART_NAMES (3,
    2) float64 x y. Only the mark's pixels depend on the label."""
    draw = Words(words[None])
    sides = _one(draw, 224, 249), _one(draw, 256, 281)
    height, width = sides[:: 1 - 2 * _one(draw, 0, 2)]
    plain = background(draw, CANVAS)
    clutter = plain.copy()
    for _ in range(DISTRACTORS):
        distractor(draw, clutter)
    picture = clutter[0, :height, :width]
    texture = (plain[0, :height, :width] - 128) // 3

    long, high = _one(draw, 54, 73), _one(draw, 40, 53)  # half the body
    tail = long * 7 // 5  # from the body's center to the tail's end
    facing = 1 - 2 * _one(draw, 0, 2)  # to the right: 1
    before, after = (tail, long) if facing == 1 else (long, tail)
    x = _one(draw, before + 4, width - after - 4)
    y = _one(draw, high + 4, height - high - 4)
    rows, columns = np.ogrid[:height, :width]
    down, ahead = rows - y, (columns - x) * facing
    body, feathers = draw.integers(50, 206, 3)[0], draw.integers(30, 226, 3)[0]
    wedge = (ahead >= -tail) & (ahead < 0) & (abs(down) * 2 <= -ahead - long * 3 // 5)
    picture[wedge] = (feathers + texture)[wedge]
    ellipse = down**2 * long**2 + ahead**2 * high**2 <= (long * high) ** 2
    picture[ellipse] = (body + texture)[ellipse]

    eye_x = x + facing * (long * 13 // 20)
    eye_y = y - high * 3 // 10
    distance = (rows - eye_y) ** 2 + (columns - eye_x) ** 2
    picture[distance <= 64] = 240
    picture[distance <= 25] = 10

    side = CELLS * MARK_CELL
    left = x + facing * _one(draw, -long * 2 // 5, long // 8) - side // 2
    top = y + _one(draw, -high // 5, high // 5 + 1) - side // 2
    tiles = mark_tiles(draw, np.array([label]), MARK_CELL)
    picture[top : top + side, left : left + side] = tiles[0]

    box = np.array([x - before, y - high, x + after + 1, y + high + 1])
    eye = [eye_x, eye_y]
    mark = [left + side // 2, top + side // 2]
    tail_center = [x - facing * (long * 6 // 5), y]
    parts = np.array([eye, mark, tail_center]) + 0.5
    return np.ascontiguousarray(picture.clip(0, 255), dtype=np.uint8), box, parts


def _one(draw: Words, low: int, high: int) -> int:
    """An integer from low to high - 1."""
    return int(draw.integers(low, high)[0, 0])
