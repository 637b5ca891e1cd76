"""The built-in sample: generated pictures whose class depends on one small mark at a known place.

A picture is a textured background with distractor shapes of random colors and, on top, a small
square tile with one of the MARKS in two contrasting colors. Only the pattern of the mark tells the
class: background, distractors, colors and place are drawn independently of it. A network that
learns the sample has learned where to look, and ``boxes`` lets a test measure that.

The bytes are the same on every machine: raw words of a counter-based generator, and integer
arithmetic on them.
"""

from __future__ import annotations

import numpy as np
import torch

from datasets.image_set import ImageSet

# 5 rows of 5 cells. Each is its own mirror image, so that horizontal flips keep the class. None is
# the negative of another, so that light on dark and dark on light mean the same.
MARKS = {
    "ring": "##### #...# #...# #...# #####",
    "plus": "..#.. ..#.. ##### ..#.. ..#..",
    "cross": "#...# .#.#. ..#.. .#.#. #...#",
    "rows": "##### ..... ##### ..... #####",
    "columns": "#.#.# #.#.# #.#.# #.#.# #.#.#",
    "checks": "#.#.# .#.#. #.#.# .#.#. #.#.#",
    "diamond": "..#.. .###. ##### .###. ..#..",
    "letter-t": "##### ..#.. ..#.. ..#.. ..#..",
    "letter-h": "#...# #...# ##### #...# #...#",
    "letter-u": "#...# #...# #...# #...# #####",
    "arrow": "..#.. .###. #.#.# ..#.. ..#..",
    "dots": "#.#.# ..... #.#.# ..... #.#.#",
}
CELLS = 7  # per side of a mark: the pattern's 5 and a frame of 1
DISTRACTORS = 5  # shapes per picture
GRID = 4  # cells per side of the background's texture
CHUNK = 256  # pictures drawn at a time, to limit memory


def cifar_sample(
    seed: int = 0,
    classes: int = 10,
    train_per_class: int = 200,
    test_per_class: int = 40,
    size: int = 32,
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of ``size`` x ``size`` pictures, balanced, with the marks' boxes. Train and
    test share no drawing.

    Raises:
        ValueError: fewer than 2 classes, or more than MARKS.
    """
    if not 2 <= classes <= len(MARKS):
        raise ValueError(f"the sample has 2 to {len(MARKS)} classes, not {classes}")
    names = tuple(MARKS)[:classes]
    sets = []
    for stream, per_class in enumerate((train_per_class, test_per_class)):
        generator = np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64))
        labels = np.arange(classes * per_class) % classes
        chunks = []
        for chunk in np.array_split(labels, range(CHUNK, len(labels), CHUNK)):
            words = generator.random_raw(len(chunk) * words_per_picture(size))
            chunks.append(draw_pictures(words.reshape(len(chunk), -1), chunk, size))
        images, boxes = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*chunks, strict=True)
        )
        source = f"built-in sample (seed {seed})"
        sets.append(ImageSet(images, torch.from_numpy(labels), names, source, boxes))
    return sets[0], sets[1]


def words_per_picture(size: int) -> int:
    """Random 64-bit words per picture of ``size`` x ``size`` pixels."""
    texture = 4 + 3 * (GRID + 1) ** 2
    mark = 9
    grain = -(-3 * size * size // 8)  # rounded up
    return texture + 8 * DISTRACTORS + mark + grain


def draw_pictures(
    words: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures from random words (N, words_per_picture(size)) uint64 and labels (N,): images (N,
    size, size, 3) uint8 and boxes (N, 4) float32 x0 y0 x1 y1. Only pixels inside the box depend on
    the label."""
    draw = Words(words)
    images = background(draw, size)
    for _ in range(DISTRACTORS):
        distractor(draw, images)
    boxes = _mark(draw, images, labels)
    return np.ascontiguousarray(images.clip(0, 255), dtype=np.uint8), boxes


class Words:
    """Random integers from the columns of ``words`` (N, W) uint64, one column after the other."""

    def __init__(self, words: np.ndarray):
        self.words = words
        self.used = 0

    def integers(self, low: int, high: int, count: int = 1) -> np.ndarray:
        """(N, count) int64 from low to high - 1."""
        columns = self.words[:, self.used : self.used + count]
        self.used += count
        return low + (columns % np.uint64(high - low)).astype(np.int64)

    def octets(self, count: int) -> np.ndarray:
        """(N, count) int64 from 0 to 255, eight per word. By shifts: a view would depend on the
        byte order."""
        columns = self.words[:, self.used : self.used - (-count // 8)]
        self.used += columns.shape[1]
        shifted = columns[:, :, None] >> (8 * np.arange(8, dtype=np.uint64)) & np.uint64(255)
        return shifted.reshape(len(columns), -1)[:, :count].astype(np.int64)


def background(draw: Words, size: int) -> np.ndarray:
    """(N, size, size, 3) int64: a color, with smooth blotches (a coarse grid, interpolated) and
    grain on it."""
    n = len(draw.words)
    color = draw.integers(70, 186, 3).reshape(n, 1, 1, 3)
    strength = draw.integers(8, 33).reshape(n, 1, 1, 1)
    grid = draw.integers(-40, 41, 3 * (GRID + 1) ** 2).reshape(n, GRID + 1, GRID + 1, 3)
    place = np.arange(size) * GRID
    cell, right = place // size, place % size  # weights in units of 1 / size
    left = size - right
    rows = grid[:, cell] * left[:, None, None] + grid[:, cell + 1] * right[:, None, None]
    blotches = rows[:, :, cell] * left[:, None] + rows[:, :, cell + 1] * right[:, None]
    grain = draw.octets(3 * size * size).reshape(n, size, size, 3) - 128
    return color + blotches // size**2 + grain * strength // 128


def distractor(draw: Words, images: np.ndarray) -> None:
    """Paint one disc, diamond or rectangle of one color into each picture, in place. It may extend
    beyond the edge."""
    n, size = images.shape[:2]
    kind = draw.integers(0, 3)[:, :, None]
    center_y, center_x = (draw.integers(0, size)[:, :, None] for _ in range(2))
    radius_y, radius_x = (draw.integers(size // 16, size // 6 + 1)[:, :, None] for _ in range(2))
    color = draw.integers(30, 226, 3)
    steps = np.arange(size)
    down = abs(steps[None, :, None] - center_y)
    across = abs(steps[None, None, :] - center_x)
    inside = np.select(
        [kind == 0, kind == 1],
        [down**2 + across**2 <= radius_y**2, down + across <= radius_y],
        (down <= radius_y) & (across <= radius_x),
    )
    np.copyto(images, color[:, None, None, :], where=inside[..., None])


def _mark(draw: Words, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Paint the marks of the labels, in place. Returns their boxes, (N, 4) float32 x0 y0 x1 y1."""
    n, size = images.shape[:2]
    cell = max(1, size // 32)  # pixels
    side, margin = CELLS * cell, size // 8  # a margin, so that a shifted crop keeps the mark
    top, left = (draw.integers(margin, size - margin - side + 1)[:, 0] for _ in range(2))
    steps = np.arange(side)
    rows = top[:, None, None] + steps[:, None]
    columns = left[:, None, None] + steps
    images[np.arange(n)[:, None, None], rows, columns] = mark_tiles(draw, labels, cell)
    return np.stack([left, top, left + side, top + side], 1).astype(np.float32)


def mark_tiles(draw: Words, labels: np.ndarray, cell: int) -> np.ndarray:
    """(N, side, side, 3) int64: the marks of the labels in two contrasting colors. A cell is
    ``cell`` pixels wide."""
    light, dark = draw.integers(176, 256, 3), draw.integers(0, 80, 3)
    swap = draw.integers(0, 2) == 1
    ink, paper = np.where(swap, dark, light), np.where(swap, light, dark)
    patterns = np.array([[list(row) for row in text.split()] for text in MARKS.values()]) == "#"
    tiles = np.pad(patterns, ((0, 0), (1, 1), (1, 1))).repeat(cell, 1).repeat(cell, 2)[labels]
    return np.where(tiles[..., None], ink[:, None, None, :], paper[:, None, None, :])
