"""Attention maps as pictures: color maps, overlays, contact sheets. TensorBoard, the pictures of a
run and cam.py show the same ones.

Images are uint8 arrays (H, W, 3), maps are float arrays (h, w) of any range. Neither a GPU nor
matplotlib is needed.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin

from common.errors import UserError
from common.fonts import TextFont, draw_text, shorten

# Evenly spaced anchor colors, from low to high. In between, a color is at most 2 of 255 from
# matplotlib's of that name. jet is exact, but as MATLAB and OpenCV define it: matplotlib's corners
# lie at other places.
#
# In inferno and viridis lightness rises all the way, so that everyone can see which of two values
# is higher, also printed in gray. turbo and jet do not have it: they are brightest in the middle.
COLOR_MAPS = {
    "inferno": (
        "000004 040312 0b0724 150b37 210c4a 2e0a5a 3c0965 4a0c6b 57106d 63146e 70196e "
        "7d1e6d 89226a 962766 a32b61 af315c bb3755 c63e4d d14644 db4f3b e35932 eb6528 "
        "f1711e f67f14 f98d0a fb9c06 fcab0f fbba1f f9ca32 f5d949 f2e865 f3f586 fcffa4"
    ),
    "viridis": (
        "440154 470d60 48186a 482374 472d7b 453681 424086 3f4989 3b528b 375a8d 33638d "
        "2f6a8e 2c728e 297a8e 26818e 23898e 21908c 1f988b 1f9f88 21a685 28ae80 31b57b "
        "3ebc74 4cc26c 5dc963 6ece58 82d34c 96d83f abdc32 c0df24 d5e21a eae51a fde725"
    ),
    "turbo": (
        "30123b 392a73 4040a1 4456c7 466be3 467ff6 4293ff 37a7fa 29bbec 1dcdd8 18dcc3 "
        "1ee8b0 31f299 4cf97e 6bfd64 8aff4d a3fd3c b8f735 cced34 dee037 edd03a f8c03a "
        "fdae35 fe982c fb8022 f56817 ec520f e04009 d23105 c02302 ac1701 950d01 7a0403"
    ),
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
}

# A map whose values differ by less than this fraction of the largest is shown flat: they would be
# amplified rounding.
FLAT = 1e-4

# How a map lies over its image: evenly, or the more opaque the higher it is.
BLENDS = ("even", "map")
# Below an even map the image loses this share of its colors: they would mix with those of the map.
# What is left tells a red apple from a green one.
GRAY = 0.75
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's
# With blend="map": the height up to which a map is transparent, as most maps are noise there, and
# from which it has its whole opacity.
CLEAR, OPAQUE = 0.1, 0.6
# The peak of such a map is more opaque than an even one, as 1 - (1 - opacity) ** PEAK: the bright
# colors have to stand out from an image in its own.
PEAK = 1.5

# The outline of a map runs at half its height: that gives a peak the width that is usually quoted.
OUTLINE_LEVEL = 0.5
OUTLINE_SIDE = 400  # pixels of an image's longer side per pixel of its outline's width, at least 1
# Light with dark edges, to be seen on any color. The dark ones let the map shine through.
OUTLINE_INK, OUTLINE_EDGE, EDGE_OPACITY = 255.0, 20.0, 0.75

PAPER, INK, FAINT_INK, FRAME = (246, 246, 244), (28, 28, 30), (92, 92, 96), (205, 205, 203)
# pixels: around the sheet, between the pictures of an image, between images
MARGIN, GAP, BLOCK_GAP = 20, 6, 28
HEAD_LINE = 20  # pixels per line of a heading
TITLE_HEIGHT = 22  # pixels
TITLE_SIZE, HEAD_SIZE = 14, 15  # pixels, of fonts
MIN_SHEET_WIDTH = 320  # pixels: the legend has to fit

# written into every picture, which a later one may replace
SOFTWARE = "learn-to-pay-attention"
MARK_BYTES = 1024  # it lies in so many bytes at a picture's beginning, of a PDF at its end
FORMATS = ("png", "jpg", "pdf")
# Pixels per inch of a sheet: 1,400 pixels are as wide as a page of paper, its text of 14 pixels
# has 7 points.
RESOLUTION = 144
JPEG_SIDE = 65_500  # pixels: larger pictures do not fit the format
JPEG = {"quality": 95, "subsampling": 0}  # 4:4:4: text in color stays sharp


# ---- colors and sizes ---------------------------------------------------------------------------


def colorize(values: np.ndarray, color_map: str = "inferno") -> np.ndarray:
    """(H, W) floats in [0, 1] -> (H, W, 3) uint8. Values outside are clipped, NaN is 0. Raises
    ValueError for an unknown color map."""
    if color_map not in COLOR_MAPS:
        raise ValueError(f"unknown color map {color_map!r}: choose one of {', '.join(COLOR_MAPS)}")
    anchors = np.array([tuple(bytes.fromhex(color)) for color in COLOR_MAPS[color_map].split()])
    values = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0), 0.0, 1.0)
    positions = np.linspace(0.0, 1.0, len(anchors))
    channels = (np.interp(values, positions, anchors[:, channel]) for channel in range(3))
    return np.stack([np.round(each).astype(np.uint8) for each in channels], axis=-1)


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
    image: np.ndarray,
    attention_map: np.ndarray,
    opacity: float = 0.5,
    color_map: str = "inferno",
    blend: str = "even",
    outline: float | None = None,
) -> np.ndarray:
    """A map over an image: (H, W, 3) uint8 and (h, w) floats -> (H, W, 3) uint8.

    The map is scaled to its own unit range, resized to the image and colored. A line runs where it
    has half its height; a flat map has none.

    opacity: 0 gives the image; 1 gives with "even" the colors alone, with "map" those of the peak.
    blend: with "even" all of the map is as opaque, over an image that is nearly gray; with "map"
        it is transparent where it is low (see CLEAR, PEAK), over an image in its own colors.
    outline: width of the line in pixels, 0 for none; by default see ``outline_width``.

    Raises ValueError for an image of another type or shape, and an unknown color map or blend.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
    if blend not in BLENDS:
        raise ValueError(f"unknown blend {blend!r}: choose one of {', '.join(BLENDS)}")
    unit = unit_range(attention_map)
    heights = _resized(unit, *image.shape[:2])
    below, alpha = image.astype(np.float32), np.float32(opacity)
    if blend == "even":
        below = _grayer(below, GRAY * min(1.0, 2 * opacity))
    else:
        share = np.clip((heights - CLEAR) / (OPAQUE - CLEAR), 0, 1)
        alpha = (share * (1 - (1 - opacity) ** PEAK))[..., None].astype(np.float32)
    blended = (1 - alpha) * below + alpha * colorize(heights, color_map)
    width = outline_width(*image.shape[:2]) if outline is None else outline
    if width and np.ptp(unit):
        _draw_outline(blended, heights, width, _outline_opacity(opacity, blend))
    return np.round(blended).astype(np.uint8)


def _grayer(pixels: np.ndarray, share: float) -> np.ndarray:
    """(H, W, 3) float32 with this share of gray."""
    gray = pixels @ np.array(GRAY_WEIGHTS, np.float32)
    return (1 - share) * pixels + share * gray[..., None]


def outline_width(height: int, width: int) -> float:
    """The width of the outline in an image of this size, in pixels."""
    return max(1.0, max(height, width) / OUTLINE_SIDE)


def _outline_opacity(opacity: float, blend: str) -> float:
    """Of the outline over a map of this opacity: none where only the image, or only the colors are
    wanted."""
    return min(1.0, 4 * opacity * (1 - opacity) if blend == "even" else 2 * opacity)


def _draw_outline(pixels: np.ndarray, heights: np.ndarray, width: float, opacity: float) -> None:
    """Draw the outline of a map into pixels (H, W, 3) floats: ``width`` pixels wide, with dark
    edges as wide on both sides. heights: (H, W), of the map at each pixel."""
    # only near a line: a flat ridge that just misses its height has none
    near = np.nonzero(_near_changes(heights >= OUTLINE_LEVEL, math.ceil(1.5 * width + 0.5)))
    # how far away the line is, in pixels, by the steepest way from each pixel
    padded, steepest = np.pad(heights, 1, mode="edge"), np.full(len(near[0]), 1e-9)
    for down, right in itertools.product(range(3), repeat=2):
        rise = np.abs(padded[near[0] + down, near[1] + right] - heights[near])
        steepest = np.maximum(steepest, rise / max(1.0, math.hypot(down - 1, right - 1)))
    distance = np.abs(heights[near] - OUTLINE_LEVEL) / steepest
    colors = pixels[near]
    for ink, half, share in (
        (OUTLINE_EDGE, 1.5 * width, EDGE_OPACITY),
        (OUTLINE_INK, 0.5 * width, 1.0),
    ):
        alpha = (opacity * share * np.clip(half + 0.5 - distance, 0, 1))[:, None]
        colors = (1 - alpha) * colors + alpha * ink
    pixels[near] = colors


def _near_changes(mask: np.ndarray, reach: int) -> np.ndarray:
    """(H, W) bools -> where the mask changes at most ``reach`` pixels away, across and down."""
    near = np.zeros_like(mask)
    near[1:] |= mask[1:] != mask[:-1]
    near[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    for _ in range(2):  # down, then across; transposed twice
        before, length = np.pad(near, ((reach + 1, reach), (0, 0))), 2 * reach + 1
        counts = np.cumsum(before, axis=0, dtype=np.int32)
        near = (counts[length:] > counts[:-length]).T
    return near


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


def shown(image: np.ndarray, min_side: int, max_side: int, scale: int = 1) -> np.ndarray:
    """An image (H, W, 3) at a size for display, at most ``max_side`` pixels on the longer side.
    Large ones are shrunk, small ones enlarged by an integer factor towards ``min_side`` pixels on
    the shorter side. scale: the same picture with so many times the pixels, the image's own as far
    as it has them."""
    height, width = (scale * side for side in _shown_size(*image.shape[:2], min_side, max_side))
    if height % image.shape[0] == 0 and width == height // image.shape[0] * image.shape[1]:
        return enlarge(image, min(height, width))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _shown_size(height: int, width: int, min_side: int, max_side: int) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    if long > max_side:
        reduction = max_side / long
        return max(1, round(height * reduction)), max(1, round(width * reduction))
    factor = max(1, min(math.ceil(min_side / short), max_side // long))
    return factor * height, factor * width


# ---- text ---------------------------------------------------------------------------------------


def title_of(truth: str, predicted: str, probability: float) -> str:
    """The title of an image: its class, and the predicted class with its probability."""
    return f"{truth}, seen: {predicted} {100 * probability:.0f} %"


# ---- contact sheets -----------------------------------------------------------------------------


def attention_sheet(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    titles: Sequence[str] | None = None,
    *,
    headings: Mapping[str, str] | None = None,
    opacity: float = 0.5,
    blend: str = "even",
    min_side: int = 128,
    max_side: int = 160,
    sheet_width: int = 1400,
    color_map: str = "inferno",
    margin: int = MARGIN,
    legend: bool = True,
    scale: int = 1,
) -> np.ndarray:
    """A contact sheet: for each image a title, the input, and an overlay per map.

    images (N, H, W, 3) uint8, maps {level: (N, h, w) floats}, titles N texts -> (sheet height,
    sheet width, 3) uint8.
    headings: {level: text} above the pictures of a level, of one or more lines; its name by
    default. opacity, blend, color_map: see ``overlay``. min_side, max_side: of a picture, in
    pixels, see ``shown``. sheet_width: in pixels; as many images stand side by side as fit, at
    least one. margin: pixels around the sheet. legend: whether the colors are explained below.
    scale: how many times as large all of it is drawn, text included. Raises ValueError if the
    counts differ or are 0.
    """
    _check_counts(len(images), maps, titles)
    inputs = [shown(np.ascontiguousarray(image), min_side, max_side, scale) for image in images]
    heads = ["input", *((headings or {}).get(level, level) for level in maps)]
    layout = _Layout(
        count=len(images),
        picture=(inputs[0].shape[0] // scale, inputs[0].shape[1] // scale),
        in_block=len(heads),
        head_lines=max(len(head.split("\n")) for head in heads),
        titled=titles is not None,
        legend=legend,
        margin=margin,
        most=sheet_width,
        scale=scale,
    )
    sheet = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_heads(draw, layout, heads)
    if titles is not None:
        _draw_titles(draw, layout, titles)
    outline = scale * outline_width(*layout.picture)
    for index, image in enumerate(inputs):
        each = (maps[level][index] for level in maps)
        overlays = (overlay(image, m, opacity, color_map, blend, outline) for m in each)
        for place, picture in enumerate((image, *overlays)):
            _draw_picture(sheet, draw, layout.corner(index, place), picture, scale)
    if legend:
        _draw_legend(draw, sheet, color_map, legend_notes(opacity, blend), scale)
    return np.asarray(sheet).copy()


@dataclass(frozen=True)
class _Layout:
    """Where things are on a sheet. What is given is in pixels at ``scale`` 1; what is computed is
    in the sheet's own.

    One block per image: its title and, side by side, its pictures."""

    count: int  # images
    picture: tuple[int, int]  # height, width
    in_block: int  # pictures per image
    head_lines: int
    titled: bool
    legend: bool
    margin: int
    most: int  # width of the sheet that is wanted
    scale: int

    @property
    def block(self) -> int:
        """The width of a block."""
        return self.scale * (self.in_block * (self.picture[1] + GAP) - GAP)

    @property
    def block_step(self) -> int:
        return self.block + self.scale * BLOCK_GAP

    @property
    def row_step(self) -> int:
        title = TITLE_HEIGHT if self.titled else 0
        return self.scale * (title + self.picture[0] + (14 if self.legend else 6))

    @property
    def top(self) -> int:
        return self.scale * (self.margin + 6 + HEAD_LINE * self.head_lines)

    @property
    def rows(self) -> int:
        room = self.scale * (self.most - 2 * self.margin + BLOCK_GAP)
        return math.ceil(self.count / min(self.count, max(1, room // self.block_step)))

    @property
    def columns(self) -> int:
        return math.ceil(self.count / self.rows)  # the rows are filled evenly

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the sheet."""
        edges = 2 * self.scale * self.margin
        width = edges + self.columns * self.block_step - self.scale * BLOCK_GAP
        below = self.scale * (self.legend * 14 + self.margin)
        return (
            max(self.scale * MIN_SHEET_WIDTH * self.legend, width),
            self.top + self.rows * self.row_step + below,
        )

    def left(self, column: int, place: int = 0) -> int:
        """The left edge of the picture at ``place`` in a block."""
        step = self.scale * (self.picture[1] + GAP)
        return self.scale * self.margin + column * self.block_step + place * step

    def corner(self, index: int, place: int = 0) -> tuple[int, int]:
        """The upper left corner of a picture of image ``index``."""
        row, column = divmod(index, self.columns)
        title = self.scale * TITLE_HEIGHT if self.titled else 0
        return self.left(column, place), self.top + row * self.row_step + title


def _check_counts(count: int, maps: Mapping[str, np.ndarray], titles: Sequence[str] | None) -> None:
    lengths = {level: len(level_maps) for level, level_maps in maps.items()}
    if titles is not None:
        lengths["titles"] = len(titles)
    for name, length in lengths.items():
        if length != count or count == 0:
            raise ValueError(
                f"{count} images, but {length} of {name}: a sheet needs as many, and at least one"
            )


def _draw_heads(draw: ImageDraw.ImageDraw, layout: _Layout, heads: Sequence[str]) -> None:
    """A heading, centered over each column of pictures; the last lines are beside each other."""
    scale, font = layout.scale, TextFont(layout.scale * HEAD_SIZE)
    width = scale * layout.picture[1]
    for column in range(layout.columns):
        for place, head in enumerate(heads):
            center = layout.left(column, place) + width / 2
            texts = head.split("\n")
            for line, text in enumerate(texts, start=layout.head_lines - len(texts)):
                baseline = scale * (layout.margin + 14 + HEAD_LINE * line)
                short = shorten(text, font, width)
                draw_text(draw, (center, baseline), short, FAINT_INK, font, "ms")


def _draw_titles(draw: ImageDraw.ImageDraw, layout: _Layout, titles: Sequence[str]) -> None:
    font = TextFont(layout.scale * TITLE_SIZE)
    for index, title in enumerate(titles):
        left, upper = layout.corner(index)
        short = shorten(title, font, layout.block)
        draw_text(draw, (left, upper - 7 * layout.scale), short, INK, font, "ls")


def _draw_picture(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    pixels: np.ndarray,
    frame: int,
) -> None:
    """A picture (H, W, 3) and around it a frame, so many pixels wide."""
    (left, upper), (height, width) = corner, pixels.shape[:2]
    edges = (left - frame, upper - frame, left + width + frame - 1, upper + height + frame - 1)
    draw.rectangle(edges, outline=FRAME, width=frame)
    sheet.paste(Image.fromarray(pixels), corner)


def legend_notes(opacity: float, blend: str) -> list[str]:
    """What a sheet's colors mean, the shorter the later."""
    ranges = "each map from its own lowest to its own highest value"
    if blend == "map":
        ranges += ", clear where it is low"
    outline = "; outlined at half height" if _outline_opacity(opacity, blend) else ""
    return [
        f"{ranges}{outline}; flat maps in one medium color",
        f"{ranges}{outline}",
        f"each map on its own scale{outline}",
        "each map on its own scale",
    ]


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    color_map: str,
    notes: Sequence[str],
    scale: int,
) -> None:
    """In the last line of a sheet, the colors from low to high at the right edge, and at the left
    the first of the notes that fits."""
    font, edge, gap = TextFont(scale * TITLE_SIZE), scale * MARGIN, scale * 8
    length, height = scale * 120, scale * 14
    top = sheet.height - edge - height
    middle, right = top + height // 2, sheet.width - edge
    draw_text(draw, (right, middle), "high", INK, font, "rm")
    bar = round(right - font.getlength("high") - gap - length)
    colors = colorize(np.linspace(0.0, 1.0, length)[None].repeat(height, axis=0), color_map)
    sheet.paste(Image.fromarray(colors), (bar, top))
    draw_text(draw, (bar - gap, middle), "low", INK, font, "rm")
    room = bar - gap - font.getlength("low") - 3 * gap - edge
    fitting = [note for note in notes if font.getlength(note) <= room]
    draw_text(draw, (edge, middle), next(iter(fitting), ""), FAINT_INK, font, "lm")


# ---- files --------------------------------------------------------------------------------------


def png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file that ``is_own_picture`` recognizes."""
    return picture_bytes(pixels, "png")


def picture_bytes(pixels: np.ndarray, picture_format: str = "png", scale: int = 1) -> bytes:
    """(H, W, 3) uint8 as a file of one of FORMATS that ``is_own_picture`` recognizes.

    scale: how many times as large as usual it was drawn; its size on paper stays the same. JPEG,
    and the JPEG in a PDF, has little compression and colors at full resolution. Raises UserError
    for a picture that is too large for its format.
    """
    height, width = pixels.shape[:2]
    if picture_format != "png" and max(height, width) > JPEG_SIDE:
        raise UserError(
            f"a picture of {width:,} x {height:,} pixels is too large for {picture_format}: "
            "take --format png, a smaller --scale, or fewer images"
        )
    image, content = Image.fromarray(pixels), io.BytesIO()
    resolution = RESOLUTION * scale
    if picture_format == "pdf":
        # without the dates, the same picture is the same file
        about = {"producer": SOFTWARE, "title": None, "creationDate": None, "modDate": None}
        image.save(content, "PDF", resolution=resolution, **about, **JPEG)
    elif picture_format == "jpg":
        dots = (resolution, resolution)
        image.save(content, "JPEG", comment=SOFTWARE, dpi=dots, **JPEG)
    else:
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", SOFTWARE)
        image.save(content, "PNG", pnginfo=mark, dpi=(resolution, resolution))
    return content.getvalue()


def is_own_picture(path: Path) -> bool:
    """Whether this project wrote this picture, by the mark in it. It is not decoded: Pillow refuses
    very large ones."""
    if not path.is_file():  # opening a pipe would wait
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(MARK_BYTES)
            file.seek(max(0, path.stat().st_size - MARK_BYTES))
            tail = file.read()
    except OSError:
        return False
    mark = SOFTWARE.encode()
    if head.startswith(b"\x89PNG"):
        return b"tEXtSoftware\0" + mark in head
    if head.startswith(b"\xff\xd8"):  # JPEG; its comments begin with their length
        return b"\xff\xfe" + (len(mark) + 2).to_bytes(2, "big") + mark in head
    producer = b"/Producer (\xfe\xff" + SOFTWARE.encode("utf-16-be") + b")"
    return head.startswith(b"%PDF-") and producer in tail
