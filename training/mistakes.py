"""What a network gets wrong, as pictures: the most confused pairs of classes, and the surest
mistakes with their attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from common.errors import printable
from common.fonts import TextFont, draw_text, drawable_names, font_for, shorten, wrap
from explain.pictures import (
    BLOCK_GAP,
    FAINT_INK,
    FRAME,
    GAP,
    HEAD_LINE,
    INK,
    MARGIN,
    PAPER,
    attention_sheet,
    shown,
)
from training.attention_monitor import AttentionMonitor, maps_of
from training.evaluation import EvaluatedCheckpoint, interval_95

PAIRS = 10  # of classes, at most
EXAMPLES = 5  # images of each direction, at most
SUREST = 16  # images on the sheet of the surest mistakes, at most
NUMBER = "its number in the test set (for cam.py --index)"

MIN_WIDTH = 640  # pixels of a picture: its heading has to fit
TITLE_SIZE, CAPTION_SIZE, TEXT_SIZE, NOTE_SIZE = 22, 15, 14, 12  # of fonts, in pixels
CAPTION_HEIGHT, NOTE_HEIGHT = 26, 18  # pixels above and below the examples
EXAMPLE_SIDES = 96, 128  # pixels of an example, see explain.pictures.shown
MIN_CELL = 72  # pixels for an example: the note below it has to fit
MIN_HALF = 480  # pixels for the examples of a direction: its caption has to fit
# Sides of the pictures on the sheet, by how many stand side by side for each image: its title has
# to fit above them.
SHEET_SIDES = {1: (256, 288), 2: (192, 224)}
OTHER_SHEET_SIDES = 128, 160


# ---- the most confused pairs --------------------------------------------------------------------


@dataclass(frozen=True)
class Direction:
    """Images of one class that are seen as one other."""

    truth: str
    seen: str
    times: int
    images: int  # of the true class
    examples: list[int]  # the surest first


def confused_pairs(evaluated: EvaluatedCheckpoint) -> np.ndarray | None:
    """The PAIRS pairs of classes that are most often mistaken for each other, in both directions
    together, with example images: (H, W, 3) uint8. None without mistakes."""
    confusions = evaluated.predictions.confusions(len(evaluated.test.class_names))
    pairs = most_confused(confusions, PAIRS)
    if not pairs:
        return None
    mistakes = evaluated.predictions.mistakes()
    rows = [
        tuple(direction_of(evaluated, mistakes, *classes) for classes in ((a, b), (b, a)))
        for a, b in pairs
    ]
    return with_heading(
        draw_pairs(evaluated, rows),
        "The most confused pairs of classes",
        [
            *describe(evaluated),
            "Ranked by the mistakes in both directions together. The images are those with "
            "the highest probability of the wrong class; below each: "
            f"{NUMBER}, and this probability.",
        ],
    )


def most_confused(confusions: Tensor, count: int) -> list[tuple[int, int]]:
    """The ``count`` unordered pairs of classes (a, b) with the most mistakes in both directions
    together, of those that have any; a is more often seen as b than b as a.

    confusions: (classes, classes) int64, see Predictions.confusions."""
    together = (confusions + confusions.T).triu(diagonal=1)
    pairs = sorted(together.nonzero().tolist(), key=lambda pair: -together[tuple(pair)].item())
    return [(a, b) if confusions[a, b] >= confusions[b, a] else (b, a) for a, b in pairs[:count]]


def direction_of(
    evaluated: EvaluatedCheckpoint, mistakes: Tensor, truth: int, seen: int
) -> Direction:
    """Images of class ``truth`` that are seen as ``seen``, of ``mistakes`` (M,)."""
    predictions, names = evaluated.predictions, names_of(evaluated)
    found = (predictions.labels[mistakes] == truth) & (predictions.predicted[mistakes] == seen)
    indices = mistakes[found].tolist()
    return Direction(
        names[truth],
        names[seen],
        len(indices),
        evaluated.result.class_counts[truth],
        indices[:EXAMPLES],
    )


def draw_pairs(
    evaluated: EvaluatedCheckpoint, pairs: Sequence[tuple[Direction, Direction]]
) -> np.ndarray:
    """A row per pair, its two directions side by side: (H, W, 3) uint8."""
    height, width = tile(evaluated, 0).shape[:2]
    half = max(MIN_HALF, EXAMPLES * (max(MIN_CELL, width) + GAP) - GAP)
    row = CAPTION_HEIGHT + height + NOTE_HEIGHT
    size = (
        2 * MARGIN + 2 * half + BLOCK_GAP,
        MARGIN + len(pairs) * (row + BLOCK_GAP) - BLOCK_GAP + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, directions in enumerate(pairs):
        top = MARGIN + number * (row + BLOCK_GAP)
        line = top - BLOCK_GAP // 2
        if number:
            draw.line((MARGIN, line, size[0] - MARGIN - 1, line), FRAME)
        for place, each in enumerate(directions):
            left = MARGIN + place * (half + BLOCK_GAP)
            draw_direction(evaluated, each, sheet, left, top, half)
    return np.asarray(sheet)


def draw_direction(
    evaluated: EvaluatedCheckpoint,
    direction: Direction,
    sheet: Image.Image,
    left: int,
    top: int,
    room: int,
) -> None:
    """The caption of a direction, at most ``room`` pixels wide, and below it the examples."""
    draw, font = ImageDraw.Draw(sheet), TextFont(CAPTION_SIZE)
    count = f": {direction.times:,} of {direction.images:,}"
    caption = fitted("{} seen as {}" + count, direction.truth, direction.seen, font, room)
    ink = INK if direction.times else FAINT_INK
    draw_text(draw, (left, top + CAPTION_HEIGHT - 10), caption, ink, font, "ls")
    note_font = TextFont(NOTE_SIZE)
    for place, index in enumerate(direction.examples):
        picture = tile(evaluated, index)
        height, width = picture.shape[:2]
        x, y = left + place * (max(MIN_CELL, width) + GAP), top + CAPTION_HEIGHT
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        sheet.paste(Image.fromarray(picture), (x, y))
        note = f"{index}: {percent(evaluated, index)}"
        draw_text(draw, (x, y + height + NOTE_HEIGHT - 4), note, FAINT_INK, note_font, "ls")


def tile(evaluated: EvaluatedCheckpoint, index: int) -> np.ndarray:
    """A test image at the size of an example, (H, W, 3) uint8."""
    return shown(evaluated.test.take(slice(index, index + 1))[0].cpu().numpy(), *EXAMPLE_SIDES)


# ---- the surest mistakes ------------------------------------------------------------------------


def surest_mistakes(evaluated: EvaluatedCheckpoint) -> np.ndarray | None:
    """The SUREST mistakes of the highest probability, with their attention maps if the network has
    any: (H, W, 3) uint8. None without mistakes."""
    mistakes = evaluated.predictions.mistakes()
    indices = mistakes[:SUREST]
    if not len(indices):
        return None
    model, monitor = evaluated.model, monitor_of(evaluated)
    seen = monitor.look(model, evaluated.precision, indices)
    maps, pixels = maps_of(model, seen), seen.images.numpy()
    # The titles are of the evaluation's logits, not of these: the rounding of a batch of another
    # size may differ.
    min_side, max_side = SHEET_SIDES.get(1 + len(maps), OTHER_SHEET_SIDES)
    width = (1 + len(maps)) * (shown(pixels[0], min_side, max_side).shape[1] + GAP) - GAP
    sheet = attention_sheet(
        pixels,
        maps,
        [sheet_title(evaluated, index, width) for index in indices.tolist()],
        min_side=min_side,
        max_side=max_side,
        legend=bool(maps),
    )
    title = f"The {len(indices)} surest mistakes" if len(indices) > 1 else "The only mistake"
    return with_heading(
        sheet,
        title,
        [
            *describe(evaluated),
            "The mistakes that the network was most confident of. Above each image: "
            f"{NUMBER}, its class, and the class that was seen, with its probability.",
            *([] if maps else ["There are no attention maps: this network has no attention."]),
        ],
    )


def monitor_of(evaluated: EvaluatedCheckpoint) -> AttentionMonitor:
    """Draws test images with their maps."""
    saved, device = evaluated.saved, evaluated.precision.device
    return AttentionMonitor(
        evaluated.test, device, saved["mean"], saved["std"], saved["input_size"]
    )


def sheet_title(evaluated: EvaluatedCheckpoint, index: int, width: float) -> str:
    """The title of a mistake, at most ``width`` pixels wide: both names, the image's number, and
    the probability, as explain.pictures.title_of has them."""
    predictions, names = evaluated.predictions, names_of(evaluated)
    return fitted(
        f"{index}: {{}}, seen: {{}} {percent(evaluated, index)}",
        names[predictions.labels[index]],
        names[predictions.predicted[index]],
        TextFont(TEXT_SIZE),
        width,
    )


def names_of(evaluated: EvaluatedCheckpoint) -> list[str]:
    """The names of the classes, as pictures can show them."""
    return drawable_names(evaluated.test.class_names)[0]


def percent(evaluated: EvaluatedCheckpoint, index: int) -> str:
    """The probability of an image's predicted class."""
    return f"{100 * evaluated.predictions.probabilities[index, 0].item():.0f} %"


# ---- headings -----------------------------------------------------------------------------------


def describe(evaluated: EvaluatedCheckpoint) -> list[str]:
    """The network, the images and the number of mistakes, for somebody who has only the picture."""
    config, path = evaluated.config, evaluated.path.absolute()
    total, mistakes = len(evaluated.test), len(evaluated.predictions.mistakes())
    low, high = interval_95(evaluated.result.top1, total)
    return [
        f"{config['model']}, width {config['width']:g}, after {evaluated.trained_for} "
        f"({printable(path.parent.name)}/{printable(path.name)})",
        f"{mistakes:,} mistake{'s' if mistakes != 1 else ''} in {total:,} test images: "
        f"top-1 {evaluated.result.top1:.2f} %, 95 % interval {low:.2f} to {high:.2f} %",
        f"Images: {printable(evaluated.test.source)}",
    ]


def with_heading(pixels: np.ndarray, title: str, paragraphs: Sequence[str]) -> np.ndarray:
    """A picture (H, W, 3) uint8 below a title and paragraphs, which are wrapped to its width."""
    font = TextFont(TEXT_SIZE)
    width = max(MIN_WIDTH, pixels.shape[1])
    lines = [line for text in paragraphs for line in wrap(text, font, width - 2 * MARGIN)]
    top = MARGIN + TITLE_SIZE + 8
    sheet = Image.new("RGB", (width, top + HEAD_LINE * len(lines) + len(pixels)), PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font = TextFont(TITLE_SIZE)
    draw_text(draw, (MARGIN, MARGIN + TITLE_SIZE - 4), title, INK, title_font, "ls")
    for number, line in enumerate(lines):
        draw_text(draw, (MARGIN, top + HEAD_LINE * number + 14), line, FAINT_INK, font, "ls")
    sheet.paste(Image.fromarray(pixels), (0, top + HEAD_LINE * len(lines)))
    return np.asarray(sheet)


def fitted(template: str, first: str, second: str, font: TextFont, width: float) -> str:
    """The template with two names in its {}, cut as far as the line has to be to fit ``width``
    pixels: the longer name first."""
    whole = font_for(template.format(first, second), font.size)
    lengths = [whole.getlength(name) for name in (first, second)]
    room = width - whole.getlength(template.format("", ""))
    rooms = [max(room / 2, room - other) for other in reversed(lengths)]
    names = [shorten(*each) for each in zip((first, second), (whole, whole), rooms, strict=True)]
    # what is left may have other fonts; a pixel more, as the spaces between parts are rounded
    return shorten(template.format(*names), font, width + 1)
