"""Attention maps as pictures: color maps, overlays, contact sheets. TensorBoard, the pictures of a
run and cam.py show the same ones.

Images are uint8 arrays (H, W, 3), maps are float arrays (h, w) of any range. Neither a GPU nor
matplotlib is needed.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

# Nine anchor colors each, evenly spaced from low to high. Lightness rises monotonically, so that
# everyone can see which of two values is higher, also printed in gray (jet, the usual choice, is
# brightest in the middle).
# fmt: off
COLOR_MAPS = {
    "inferno": (
        (0, 0, 4), (33, 12, 74), (87, 16, 110), (136, 34, 106), (188, 55, 84), (227, 89, 51),
        (249, 142, 9), (249, 201, 50), (252, 255, 164),
    ),
    "viridis": (
        (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128),
        (94, 201, 98), (173, 220, 48), (253, 231, 37),
    ),
}
# fmt: on

# A map whose values differ by less than this fraction of the largest is shown flat: they would be
# amplified rounding.
FLAT = 1e-4

PAPER, INK, FAINT_INK, FRAME = (246, 246, 244), (28, 28, 30), (92, 92, 96), (205, 205, 203)
# pixels: around the sheet, between the pictures of an image, between images
MARGIN, GAP, BLOCK_GAP = 20, 6, 28
HEAD_LINE = 20  # pixels per line of a heading
TITLE_HEIGHT = 22  # pixels
MIN_SHEET_WIDTH = 320  # pixels: the legend has to fit
# written into every PNG file, which a later one may replace
SOFTWARE = "learn-to-pay-attention"


# ---- colors and sizes ---------------------------------------------------------------------------


def colorize(values: np.ndarray, color_map: str = "inferno") -> np.ndarray:
    """(H, W) floats in [0, 1] -> (H, W, 3) uint8. Values outside are clipped, NaN is 0. Raises
    ValueError for an unknown color map."""
    if color_map not in COLOR_MAPS:
        raise ValueError(f"unknown color map {color_map!r}: choose one of {', '.join(COLOR_MAPS)}")
    anchors = np.array(COLOR_MAPS[color_map], dtype=np.float64)
    values = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0), 0.0, 1.0)
    positions = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(values, positions, anchors[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def unit_range(attention_map: np.ndarray) -> np.ndarray:
    """(H, W) any floats -> (H, W) float64 in [0, 1] for display: the lowest value at 0, the highest
    at 1.

    A flat map (see ``FLAT``) becomes 0.5 everywhere, an even medium color that no healthy map
    consists of. Non-finite values count as the lowest finite one; the result is never NaN.
    """
    values = np.asarray(attention_map, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(values.shape, 0.5)
    lowest, highest = values[finite].min(), values[finite].max()
    if highest - lowest <= FLAT * max(abs(lowest), abs(highest)):
        return np.full(values.shape, 0.5)
    return (np.where(finite, values, lowest) - lowest) / (highest - lowest)


def overlay(
    image: np.ndarray, attention_map: np.ndarray, opacity: float = 0.5, color_map: str = "inferno"
) -> np.ndarray:
    """Blend a map over an image: (H, W, 3) uint8 and (h, w) floats -> (H, W, 3) uint8.

    The map is scaled to its own unit range, resized to the image and colored. ``opacity`` 0 gives
    the image, 1 the colors alone. Raises ValueError for an image of another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
    colors = colorize(_resized(unit_range(attention_map), *image.shape[:2]), color_map)
    blend = (1.0 - opacity) * image.astype(np.float64) + opacity * colors
    return np.round(blend).astype(np.uint8)


def _resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) float64 -> (height, width), bilinear; each value is the center of its cell
    (align_corners=False)."""
    batch = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    resized = F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False)
    return resized[0, 0].numpy()


def enlarge(image: np.ndarray, min_side: int = 128) -> np.ndarray:
    """Enlarge a small image (H, W, 3) by an integer factor, each pixel a sharp square, until its
    shorter side has at least ``min_side`` pixels; a larger image is returned unchanged."""
    factor = math.ceil(min_side / min(image.shape[:2]))
    if factor <= 1:
        return image
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def shown(image: np.ndarray, min_side: int, max_side: int) -> np.ndarray:
    """An image (H, W, 3) at a size for display, at most ``max_side`` pixels on the longer side.
    Large ones are shrunk, small ones enlarged by an integer factor towards ``min_side`` pixels on
    the shorter side."""
    room = max_side // max(image.shape[:2])
    image = enlarge(image, min(min_side, max(1, room) * min(image.shape[:2])))
    scale = max_side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


# ---- text ---------------------------------------------------------------------------------------


def title_of(truth: str, predicted: str, probability: float) -> str:
    """The title of an image: its class, and the predicted class with its probability."""
    return f"{truth}, seen: {predicted} {100 * probability:.0f} %"


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, its end replaced by "..." if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep and font.getlength(text[:keep].rstrip() + "...") > width:
        keep -= 1
    return text[:keep].rstrip() + "..."


def wrap(
    text: str, font: ImageFont.FreeTypeFont, width: float, most: int | None = None
) -> list[str]:
    """A text in lines of at most ``width`` pixels, at most ``most`` of them. They end after a
    space, or within a word that is wider. Together they are the text, or its beginning and
    "..."."""
    lines: list[str] = []
    while text:
        count = _fitting(text, font, width)
        if count < len(text):
            if len(lines) + 1 == most:
                count = _fitting(text, font, width - font.getlength("..."))
                return [*lines, text[:count].rstrip() + "..."]
            count = text.rfind(" ", 0, count + 1) + 1 or count
        lines.append(text[:count])
        text = text[count:]
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters of a text fit into ``width`` pixels, at least 1."""
    counts = range(1, min(len(text), int(width)) + 1)  # a character has at least a pixel
    return max(1, bisect_right(counts, width, key=lambda n: font.getlength(text[:n].rstrip())))


# ---- contact sheets -----------------------------------------------------------------------------


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
    color_map: str = "inferno",
    margin: int = MARGIN,
    legend: bool = True,
) -> np.ndarray:
    """A contact sheet: for each image a title, the input, and an overlay per map.

    images (N, H, W, 3) uint8, maps {level: (N, h, w) floats}, titles N texts -> (sheet height,
    sheet width, 3) uint8.
    headings: {level: text} above the pictures of a level, of one or more lines; its name by
    default. min_side, max_side: of a picture, in pixels, see ``shown``. sheet_width: in pixels; as
    many images stand side by side as fit, at least one. margin: pixels around the sheet. legend:
    whether the colors are explained below. Raises ValueError if the counts differ or are 0.
    """
    count = len(images)
    _check_counts(count, maps, titles)
    title_font, head_font = ImageFont.load_default(size=14), ImageFont.load_default(size=15)
    inputs = [shown(np.ascontiguousarray(image), min_side, max_side) for image in images]
    height, width = inputs[0].shape[:2]
    heads = ["input", *((headings or {}).get(level, level) for level in maps)]
    lines = max(len(head.split("\n")) for head in heads)

    # one block per image: its title and, side by side, its pictures
    title_height = 0 if titles is None else TITLE_HEIGHT
    block = len(heads) * (width + GAP) - GAP
    block_step, row_step = block + BLOCK_GAP, title_height + height + (14 if legend else 6)
    columns = min(count, max(1, (sheet_width - 2 * margin + BLOCK_GAP) // block_step))
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)  # as many rows, filled more evenly
    top = margin + 6 + HEAD_LINE * lines
    size = (
        max(MIN_SHEET_WIDTH * legend, 2 * margin + columns * block_step - BLOCK_GAP),
        top + rows * row_step + legend * 14 + margin,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)

    for column in range(columns):
        for place, head in enumerate(heads):
            center = margin + column * block_step + place * (width + GAP) + width / 2
            _draw_head(draw, head, lines, center, margin, width, head_font)
    for index, image in enumerate(inputs):
        left = margin + index % columns * block_step
        upper = top + index // columns * row_step + title_height
        if titles is not None:
            title = shorten(titles[index], title_font, block)
            draw.text((left, upper - 7), title, INK, title_font, "ls")
        overlays = (overlay(image, maps[level][index], opacity, color_map) for level in maps)
        for place, picture in enumerate((image, *overlays)):
            x = left + place * (width + GAP)
            draw.rectangle((x - 1, upper - 1, x + width, upper + height), outline=FRAME)
            sheet.paste(Image.fromarray(picture), (x, upper))
    if legend:
        _draw_legend(draw, sheet, size[1] - MARGIN - 14, title_font, color_map)
    return np.asarray(sheet).copy()


def _check_counts(count: int, maps: Mapping[str, np.ndarray], titles: Sequence[str] | None) -> None:
    lengths = {level: len(level_maps) for level, level_maps in maps.items()}
    if titles is not None:
        lengths["titles"] = len(titles)
    for name, length in lengths.items():
        if length != count or count == 0:
            raise ValueError(
                f"{count} images, but {length} of {name}: a sheet needs as many, and at least one"
            )


def _draw_head(
    draw: ImageDraw.ImageDraw,
    head: str,
    lines: int,
    center: float,
    top: int,
    width: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    """A heading, centered over a column of pictures; the last of its lines is the last of
    ``lines``."""
    texts = head.split("\n")
    for line, text in enumerate(texts, start=lines - len(texts)):
        baseline = top + 14 + HEAD_LINE * line
        draw.text((center, baseline), shorten(text, font, width), FAINT_INK, font, "ms")


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    top: int,
    font: ImageFont.FreeTypeFont,
    color_map: str,
) -> None:
    """The colors from low to high at the right edge, one line high, and their meaning at the left
    if it fits."""
    length, height = 120, 14
    right = sheet.width - MARGIN
    middle = top + height // 2
    draw.text((right, middle), "high", INK, font, anchor="rm")
    bar = round(right - font.getlength("high") - 8 - length)
    colors = colorize(np.linspace(0.0, 1.0, length)[None].repeat(height, axis=0), color_map)
    sheet.paste(Image.fromarray(colors), (bar, top))
    draw.text((bar - 8, middle), "low", INK, font, anchor="rm")
    room = bar - 8 - font.getlength("low") - 24 - MARGIN
    for note in (
        "each map from its own lowest to its own highest value; flat maps in one mid color",
        "each map on its own scale",
    ):
        if font.getlength(note) <= room:
            draw.text((MARGIN, middle), note, FAINT_INK, font, anchor="lm")
            break


# ---- files --------------------------------------------------------------------------------------


def png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file that ``is_own_picture`` recognizes."""
    content, mark = io.BytesIO(), PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    Image.fromarray(pixels).save(content, "PNG", pnginfo=mark)
    return content.getvalue()


def is_own_picture(path: Path) -> bool:
    """Whether this project wrote this picture, by the mark in it."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # PIL raises nearly anything
        return False
