"""Line charts drawn with PIL: thin axes, a light grid, and at the end of each line its last value
and its name. They know nothing of runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from common.fonts import TextFont, draw_text, shorten
from explain.pictures import FAINT_INK, INK, PAPER

Color = tuple[int, int, int]
Point = tuple[float, float]

GRID, AXIS = (228, 228, 225), (150, 150, 148)
SCALE = 3  # lines are drawn this much larger and reduced, which smooths their edges
TITLE_SIZE, TEXT_SIZE = 17, 14  # pixels
TITLE_HEIGHT, TICKS_HEIGHT, LABEL_HEIGHT = 36, 26, 20  # pixels
TICK_GAP, LABEL_GAP = 8, 16  # pixels: from the plot to its ticks, and to the labels of its lines
DOT = 3.5  # pixels: radius at the end of a line
DASH, DASH_GAP = 7.0, 4.5  # pixels

# Values are left out of a scale that need not reach them if they are at most so many of all, and
# above a gap of so many times the range of the others.
OUTLIERS, OUTLIER_GAP = 0.1, 3.0


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart: ``points`` (x, y) from left to right. Where y is None, NaN or infinite, it
    has a gap. ``width`` in pixels. ``value``: the number at its name, by default its last one."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: Color
    width: float = 2.0
    dashed: bool = False
    value: float | None = None

    def parts(self) -> list[list[Point]]:
        """The points between the gaps."""
        groups = itertools.groupby(self.points, key=lambda point: is_finite(point[1]))
        return [list(group) for finite, group in groups if finite]


@dataclasses.dataclass(frozen=True)
class Plot:
    """The area of the curves, in pixels, and the values at its edges."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def at(self, point: Point) -> Point:
        """Where a point lies, in pixels. One above the scale lies at the upper edge."""
        (x, y), (x_low, x_high), (y_low, y_high) = point, self.x_range, self.y_range
        across = (x - x_low) / (x_high - x_low)
        up = min(1.0, (y - y_low) / (y_high - y_low))
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )


def line_chart(
    lines: Sequence[Line],
    *,
    size: tuple[int, int],
    title: str,
    x_name: str = "epoch",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    decimals: int = 2,
    outliers: bool = True,
) -> np.ndarray:
    """A chart of lines over whole numbers from 0, the last one on top, (height, width, 3) uint8.

    Args:
        size: (width, height) in pixels.
        bounds: of the y axis: no tick lies outside.
        decimals: of the last values.
        outliers: whether the scale has to reach the highest values; if not, single high ones are
            left out (see ``highest_shown``), marked at the upper edge, and named beside the title.

    Raises ValueError where no line has a finite value.
    """
    lines = [line for line in lines if line.parts()]
    if not lines:
        raise ValueError("a chart needs a line with a finite value")
    values = [y for line in lines for part in line.parts() for _, y in part]
    highest = max(values) if outliers else highest_shown(values)
    y_ticks = ticks(*widened(min(values), highest, bounds))
    x_high = max(1, max(x for line in lines for x, _ in line.points))
    x_ticks = [tick for tick in ticks(0, x_high, most=7, whole=True) if tick <= x_high]

    font = TextFont(TEXT_SIZE)
    labels = [label(line, decimals) for line in lines]
    plot = Plot(
        left=math.ceil(max(map(font.getlength, tick_texts(y_ticks)))) + TICK_GAP,
        top=TITLE_HEIGHT,
        right=size[0] - LABEL_GAP - math.ceil(max(map(font.getlength, labels))) - 2,
        bottom=size[1] - TICKS_HEIGHT,
        x_range=(0, x_high),
        y_range=(y_ticks[0], y_ticks[-1]),
    )
    image = draw_lines(plot, lines, size, x_ticks, y_ticks)
    draw = ImageDraw.Draw(image)
    draw_ticks(draw, plot, x_ticks, y_ticks, x_name)
    draw_labels(draw, plot, lines, labels)
    draw_title(draw, size[0], title, note_on([y for y in values if y > y_ticks[-1]], decimals))
    return np.asarray(image).copy()


# ---- scales -------------------------------------------------------------------------------------


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def highest_shown(values: Sequence[float]) -> float:
    """The highest of the values that is not an outlier (see OUTLIERS)."""
    ordered = sorted(values)
    for index in range(math.ceil((1 - OUTLIERS) * len(ordered)), len(ordered)):
        below = ordered[index - 1]
        if ordered[index] - below > OUTLIER_GAP * (below - ordered[0]):
            return below
    return ordered[-1]


def widened(low: float, high: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The range of an axis. That of a constant reaches a twentieth of it down and up, within
    ``bounds``."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = 0.05 * abs(low) or 0.5
        low, high = max(bounds[0], low - room), min(bounds[1], high + room)
    return low, high


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers, evenly spaced, that cover ``low`` to ``high``: at most ``most``, and at least
    4 of 6. whole: they are whole numbers."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50) if whole else (1, 2, 2.5, 5, 10, 20):
        step = max(factor * power, 1) if whole else factor * power
        # a range that ends at a tick, but for rounding, ends there
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        if last - first < most:
            break
    return [number * step for number in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, with as many decimals as the step between them needs."""
    if max(map(abs, ticks)) >= 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = next((n for n in range(9) if abs(step - round(step, n)) < 1e-6 * step), 9)
    return [f"{tick:,.{decimals}f}" for tick in ticks]


# ---- lines --------------------------------------------------------------------------------------


def draw_lines(
    plot: Plot,
    lines: Sequence[Line],
    size: tuple[int, int],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
) -> Image.Image:
    """The grid and the lines, the last one on top."""
    large = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(large)
    for tick in y_ticks:
        _, y = plot.at((0, tick))
        draw_hairline(draw, plot.left, y, plot.right, y, GRID)
    for tick in x_ticks:
        x, _ = plot.at((tick, y_ticks[0]))
        draw_hairline(draw, x, plot.bottom, x, plot.bottom + 4, AXIS)
    draw_hairline(draw, plot.left, plot.bottom, plot.right, plot.bottom, AXIS)
    for line in lines:
        draw_line(draw, plot, line)
    return large.reduce(SCALE)


def draw_hairline(
    draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, color: Color
) -> None:
    """A line across or down, exactly a pixel wide."""
    first = [SCALE * round(edge) for edge in (left, top)]
    last = [SCALE * round(edge) + SCALE - 1 for edge in (right, bottom)]
    draw.rectangle([*first, *last], color)


def draw_line(draw: ImageDraw.ImageDraw, plot: Plot, line: Line) -> None:
    parts = line.parts()
    for part in parts:
        pixels = [plot.at(point) for point in part]
        for stroke in dashes(pixels) if line.dashed else [pixels]:
            draw_stroke(draw, stroke, line.color, line.width)
        if len(part) == 1:  # between two gaps
            draw_dot(draw, pixels[0], line.width, line.color)
        for (_, y), (x, _) in zip(part, pixels, strict=True):
            if y > plot.y_range[1]:
                draw_arrowhead(draw, x, plot.top, line.color)
    draw_dot(draw, plot.at(parts[-1][-1]), DOT, line.color)


def dashes(pixels: Sequence[Point]) -> list[list[Point]]:
    """A line cut into dashes; they bend where it bends."""
    x, y = np.array(pixels).T
    along = np.concatenate([[0.0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    strokes = []
    for start in np.arange(0, along[-1], DASH + DASH_GAP):
        end = min(start + DASH, along[-1])
        at = [start, *along[(along > start) & (along < end)], end]
        strokes.append(list(zip(np.interp(at, along, x), np.interp(at, along, y), strict=True)))
    return strokes


def draw_stroke(
    draw: ImageDraw.ImageDraw, pixels: Sequence[Point], color: Color, width: float
) -> None:
    enlarged = [(x * SCALE, y * SCALE) for x, y in pixels]
    draw.line(enlarged, color, round(width * SCALE), joint="curve")


def draw_dot(draw: ImageDraw.ImageDraw, pixel: Point, radius: float, color: Color) -> None:
    x, y = pixel
    draw.ellipse([SCALE * edge for edge in (x - radius, y - radius, x + radius, y + radius)], color)


def draw_arrowhead(draw: ImageDraw.ImageDraw, x: float, y: float, color: Color) -> None:
    """A small triangle that points up, its base at (x, y)."""
    corners = [(x - 4, y), (x + 4, y), (x, y - 6)]
    draw.polygon([(SCALE * x, SCALE * y) for x, y in corners], color)


# ---- text ---------------------------------------------------------------------------------------


def label(line: Line, decimals: int) -> str:
    """The value and the name of a line."""
    value = line.parts()[-1][-1][1] if line.value is None else line.value
    return f"{number_text(value, decimals)}  {line.name}"


def number_text(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if abs(value) < 1e4 else f"{value:.3g}"


def note_on(above: Sequence[float], decimals: int) -> str:
    """What to say about the values above the scale."""
    if not above:
        return ""
    text = number_text(max(above), decimals)
    if len(above) == 1:
        return f"above the scale: {text}"
    return f"above the scale: {len(above)} values, up to {text}"


def place_labels(wanted: Sequence[float], height: float, low: float, high: float) -> list[float]:
    """The centers of labels of this height that do not overlap, in the order of ``wanted``, their
    best places: as near to these as possible (least squares). They lie between ``low`` and ``high``
    if all fit there, else they begin at ``low``."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # If the k-th label is moved up by k heights, "do not overlap" becomes "do not fall". Labels
    # that would fall share their mean.
    groups: list[list[float]] = []
    for place, index in enumerate(order):
        groups.append([wanted[index] - place * height])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    means = [float(np.mean(group)) for group in groups for _ in group]
    last = max(low, high - (len(wanted) - 1) * height)
    centers = [0.0] * len(wanted)
    for place, index in enumerate(order):
        centers[index] = min(max(means[place], low), last) + place * height
    return centers


def draw_ticks(
    draw: ImageDraw.ImageDraw,
    plot: Plot,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: str,
) -> None:
    font = TextFont(TEXT_SIZE)
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        _, y = plot.at((0, tick))
        draw_text(draw, (plot.left - TICK_GAP, y), text, FAINT_INK, font, "rm")
    baseline = plot.bottom + 20
    for tick in x_ticks:
        x, _ = plot.at((tick, y_ticks[0]))
        draw_text(draw, (x, baseline), f"{tick:,.0f}", FAINT_INK, font, "ms")
    free = x + font.getlength(f"{x_ticks[-1]:,.0f}") / 2 + TICK_GAP
    draw_text(draw, (max(free, plot.right + LABEL_GAP), baseline), x_name, FAINT_INK, font, "ls")


def draw_labels(
    draw: ImageDraw.ImageDraw, plot: Plot, lines: Sequence[Line], labels: Sequence[str]
) -> None:
    """At the end of each line its label; where they are apart, a thin line connects them."""
    font = TextFont(TEXT_SIZE)
    ends = [plot.at(line.parts()[-1][-1]) for line in lines]
    centers = place_labels([y for _, y in ends], LABEL_HEIGHT, plot.top, plot.bottom)
    for line, text, (x, y), center in zip(lines, labels, ends, centers, strict=True):
        if x < plot.right - 1:  # its last values are missing
            draw.line((x, y, plot.right, y), line.color)
        if abs(center - y) > LABEL_HEIGHT / 2 or x < plot.right - 1:
            draw.line((plot.right, y, plot.right + LABEL_GAP - 6, center), line.color)
        draw_text(draw, (plot.right + LABEL_GAP, center), text, line.color, font, "lm")


def draw_title(draw: ImageDraw.ImageDraw, width: int, title: str, note: str) -> None:
    """At the left the title, at the right a note."""
    font, small = TextFont(TITLE_SIZE), TextFont(TEXT_SIZE)
    draw_text(draw, (0, 16), title, INK, font, "ls")
    room = width - font.getlength(title) - 20
    draw_text(draw, (width - 1, 16), shorten(note, small, room), FAINT_INK, small, "rs")
