"""Attention maps as pictures: a colour map, overlays, contact sheets. TensorBoard and cam.py show
the same ones.

Images are uint8 arrays (H, W, 3), maps are float arrays (h, w) of any range; nothing here needs a
GPU or matplotlib.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# Nine anchor colors each, evenly spaced from low to high. Lightness rises all the way, so the
# order of two values can be seen by anyone, printed in grey too (jet, the usual choice, is
# brightest in its middle).
COLOR_MAPS = {
    "inferno": (
        (0, 0, 4),
        (33, 12, 74),
        (87, 16, 110),
        (136, 34, 106),
        (188, 55, 84),
        (227, 89, 51),
        (249, 142, 9),
        (249, 201, 50),
        (252, 255, 164),
    ),
    "viridis": (
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ),
}

# a map whose values differ by less than this part of the largest is shown flat, not as amplified
# rounding
FLAT = 1e-4

PAPER, INK, FAINT_INK, FRAME = (246, 246, 244), (28, 28, 30), (92, 92, 96), (205, 205, 203)
# pixels: around the sheet, between the pictures of an image, between images
MARGIN, GAP, BLOCK_GAP = 20, 6, 28
HEAD_LINE = 20  # pixels from one line of a heading to the next


def colorize(values: np.ndarray, name: str = "inferno") -> np.ndarray:
    """(H, W) floats in [0, 1] -> (H, W, 3) uint8 by the colour map `name`; values outside are
    clipped, NaN is 0."""
    if name not in COLOR_MAPS:
        raise ValueError(f"unknown colour map {name!r}: choose one of {', '.join(COLOR_MAPS)}")
    anchors = np.array(COLOR_MAPS[name], dtype=np.float64)
    values = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0), 0.0, 1.0)
    places = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(values, places, anchors[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def unit_range(attention_map: np.ndarray) -> np.ndarray:
    """(H, W) any floats -> (H, W) float64 in [0, 1], the lowest value at 0 and the highest at 1,
    for showing.

    A flat map (see FLAT) has no lowest and highest worth showing: it becomes 0.5 everywhere, one
    even mid colour that no healthy map has all over. Non-finite values are taken for the lowest
    finite one; the result is never NaN.
    """
    values = np.asarray(attention_map, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(values.shape, 0.5)
    lowest, highest = values[finite].min(), values[finite].max()
    if highest - lowest <= FLAT * max(abs(lowest), abs(highest)):
        return np.full(values.shape, 0.5)
    return (np.where(finite, values, lowest) - lowest) / (highest - lowest)


def _resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) float64 -> (height, width), bilinear; each value is the middle of its cell
    (align_corners=False)."""
    batch = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()


def overlay(
    image: np.ndarray, attention_map: np.ndarray, opacity: float = 0.5, name: str = "inferno"
) -> np.ndarray:
    """Lay a map over an image: (H, W, 3) uint8 and (h, w) floats -> (H, W, 3) uint8.

    The map is brought to its own unit range, to the image's size, and into colour; `opacity` 0
    gives the image, 1 the colors alone.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
    colors = colorize(_resized(unit_range(attention_map), *image.shape[:2]), name)
    blend = (1.0 - opacity) * image.astype(np.float64) + opacity * colors
    return np.round(blend).astype(np.uint8)


def enlarge(image: np.ndarray, min_side: int = 128) -> np.ndarray:
    """Show a small image (H, W, 3) larger by a whole factor, each pixel a clean square, until its
    shorter side has `min_side` pixels or more; an image that already has them comes back as it
    is."""
    factor = math.ceil(min_side / min(image.shape[:2]))
    if factor <= 1:
        return image
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def shown(image: np.ndarray, min_side: int, max_side: int) -> np.ndarray:
    """An image (H, W, 3) at a size to look at: small ones enlarged by a whole factor towards
    `min_side` pixels on the shorter side, but no longer than `max_side`; big ones shrunk to
    that."""
    room = max_side // max(image.shape[:2])
    image = enlarge(image, min(min_side, max(1, room) * min(image.shape[:2])))
    scale = max_side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, its end replaced by "..." where it would be wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep and font.getlength(text[:keep].rstrip() + "...") > width:
        keep -= 1
    return text[:keep].rstrip() + "..."


def title_of(truth: str, seen: str, chance: float) -> str:
    """What stands over an image: what it is, and what the network takes it for with which
    probability."""
    return f"{truth}, seen: {seen} {100 * chance:.0f} %"


def _legend(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, top: int, font: ImageFont.FreeTypeFont, name: str
) -> None:
    """The colors from low to high at the right edge, one line high, and at the left what they mean
    if it fits."""
    length, height = 120, 14
    right = sheet.width - MARGIN
    middle = top + height // 2
    draw.text((right, middle), "high", INK, font, anchor="rm")
    bar = round(right - font.getlength("high") - 8 - length)
    colors = colorize(np.linspace(0.0, 1.0, length)[None].repeat(height, axis=0), name)
    sheet.paste(Image.fromarray(colors), (bar, top))
    draw.text((bar - 8, middle), "low", INK, font, anchor="rm")
    room = bar - 8 - font.getlength("low") - 24 - MARGIN
    for note in (
        "each map from its own lowest to its own highest value; flat maps in one mid colour",
        "each map on its own scale",
    ):
        if font.getlength(note) <= room:
            draw.text((MARGIN, middle), note, FAINT_INK, font, anchor="lm")
            break


def attention_sheet(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    titles: Sequence[str] | None = None,
    *,
    headings: Mapping[str, str] | None = None,
    opacity: float = 0.5,
    min_side: int = 128,
    max_side: int = 160,
    sheet_width: int = 1400,
    name: str = "inferno",
) -> np.ndarray:
    """A contact sheet: for each image a title, the input, and an overlay for every map.

    images (N, H, W, 3) uint8, maps {level: (N, h, w) floats}, titles N texts -> (sheet height,
    sheet width, 3) uint8.
    headings: what to write over a level's pictures, on one or more lines, instead of its name. As
    many images stand side by side as fit in `sheet_width` pixels, at least one; sides are in pixels
    too. Raises ValueError when the counts differ.
    """
    count = len(images)
    lengths = {level: len(each) for level, each in maps.items()} | (
        {} if titles is None else {"titles": len(titles)}
    )
    for what, length in lengths.items():
        if length != count or count == 0:
            raise ValueError(
                f"{count} images, but {length} of {what}: a sheet needs as many, and at least one"
            )
    title_font, head_font = ImageFont.load_default(size=14), ImageFont.load_default(size=15)

    inputs = [shown(np.ascontiguousarray(image), min_side, max_side) for image in images]
    height, width = inputs[0].shape[:2]
    heads = [
        head.split("\n")
        for head in ("input", *((headings or {}).get(level, level) for level in maps))
    ]
    lines = max(len(head) for head in heads)
    block = len(heads) * (width + GAP) - GAP
    columns = min(count, max(1, (sheet_width - 2 * MARGIN + BLOCK_GAP) // (block + BLOCK_GAP)))
    # the same number of rows, filled more evenly
    columns = math.ceil(count / math.ceil(count / columns))
    title_height = 0 if titles is None else 22
    top, row = MARGIN + 6 + HEAD_LINE * lines, title_height + height + 14
    # 320: the legend has to fit
    size = (
        max(320, 2 * MARGIN + columns * (block + BLOCK_GAP) - BLOCK_GAP),
        top + math.ceil(count / columns) * row + 14 + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)

    for index, image in enumerate(inputs):
        left = MARGIN + index % columns * (block + BLOCK_GAP)
        upper = top + index // columns * row
        if titles is not None:
            title = shorten(titles[index], title_font, block)
            draw.text((left, upper + title_height - 7), title, INK, title_font, "ls")
        pictures = [image, *(overlay(image, maps[level][index], opacity, name) for level in maps)]
        for place, picture in enumerate(pictures):
            x = left + place * (width + GAP)
            draw.rectangle(
                (x - 1, upper + title_height - 1, x + width, upper + title_height + height),
                outline=FRAME,
            )
            sheet.paste(Image.fromarray(picture), (x, upper + title_height))
            if index < columns:
                for line, text in enumerate(heads[place], start=lines - len(heads[place])):
                    place_of_text = x + width / 2, MARGIN + 14 + HEAD_LINE * line
                    draw.text(
                        place_of_text, shorten(text, head_font, width), FAINT_INK, head_font, "ms"
                    )
    _legend(draw, sheet, size[1] - MARGIN - 14, title_font, name)
    return np.asarray(sheet).copy()
