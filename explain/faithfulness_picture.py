"""The curves of deletion and insertion as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from common.fonts import TextFont, draw_text, shorten
from explain.charts import Line, line_chart
from explain.faithfulness import BASELINES, FILLS, GAMES
from explain.pictures import FAINT_INK, INK, PAPER

CHART_WIDTH, CHART_GAP, EDGE = 650, 40, 40  # pixels
# at least; room for a label per map, and for what is above and below the curves
CHART_HEIGHT, LABEL_ROOM, OTHER_ROOM = 340, 20, 80
HEADER, FOOTER = 72, 64  # pixels
# dark enough for thin lines and text on paper; neighbors differ in lightness, too
COLORS = (
    (31, 87, 164),
    (210, 95, 20),
    (24, 120, 70),
    (176, 30, 60),
    (122, 70, 170),
    (20, 150, 165),
    (120, 75, 35),
    (205, 70, 150),
    (125, 130, 15),
    (60, 60, 120),
)
BASELINE_COLORS = ((40, 40, 40), (95, 95, 95), (135, 135, 135))
BASELINE_WIDTHS = (2.2, 1.7, 1.2)  # pixels
TITLES = {
    "deletion": "Deletion: the lower, the better",
    "insertion": "Insertion: the higher, the better",
}
FILL_TITLES = {"mean": "mean color", "blurred": "blurred image"}
SHARES = {"deletion": "% of pixels replaced", "insertion": "% of pixels back"}
NOTES = (
    "Probability of the class that the network predicts on the untouched image, in %, against the "
    "share of pixels, the map's highest first; mean over the images.",
    "At each name the area under its curve, in %. Dashed: orders that know nothing of the network.",
)


def curves_picture(rows: Sequence[Mapping[str, object]], title: str = "") -> np.ndarray:
    """The mean curves of ``Faithfulness.curve_rows`` as one sheet, (H, W, 3) uint8: a chart per
    game and fill, and in it the maps with their areas in per cent, the best first. title: what was
    measured. Raises ValueError without a finite probability."""
    maps = {row["map"] for row in rows}
    size = (CHART_WIDTH, max(CHART_HEIGHT, LABEL_ROOM * len(maps) + OTHER_ROOM))
    width = 2 * (EDGE + size[0]) + CHART_GAP
    height = HEADER + 2 * size[1] + CHART_GAP + FOOTER
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = TextFont(20), TextFont(15)
    draw_text(draw, (EDGE, 40), "Deletion and insertion", INK, large, "ls")
    beside = EDGE + large.getlength("Deletion and insertion") + 16
    title = shorten(title, small, width - EDGE - beside)
    draw_text(draw, (beside, 40), title, FAINT_INK, small, "ls")
    for across, game in enumerate(GAMES):
        for down, fill in enumerate(FILLS):
            chart = line_chart(
                curve_lines(rows, game, fill),
                size=size,
                title=f"{TITLES[game]} ({FILL_TITLES[fill]})",
                x_name=SHARES[game],
                bounds=(0, 100),
                decimals=1,
            )
            left, top = across * (size[0] + CHART_GAP), down * (size[1] + CHART_GAP)
            sheet.paste(Image.fromarray(chart), (EDGE + left, HEADER + top))
    for line, text in enumerate(NOTES):
        draw_text(draw, (EDGE, height - FOOTER + 28 + 20 * line), text, FAINT_INK, small, "ls")
    return np.asarray(sheet).copy()


def curve_lines(rows: Sequence[Mapping[str, object]], game: str, fill: str) -> list[Line]:
    """The curves of a chart, in per cent, the best first. A map has one color in all charts."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = curves.setdefault(row["map"], [])
        if (row["game"], row["fill"]) == (game, fill):
            points.append((100 * row["share"], 100 * row["probability"]))
    maps = [name for name in curves if name not in BASELINES]
    lines = []
    for name, points in curves.items():
        share, probability = np.array(points).T
        area = float(np.sum(np.diff(share) * (probability[1:] + probability[:-1])) / 200)
        if name in BASELINES:
            number = BASELINES.index(name)
            color, thickness = BASELINE_COLORS[number], BASELINE_WIDTHS[number]
            lines.append(Line(name, points, color, thickness, dashed=True, value=area))
        else:
            color = COLORS[maps.index(name) % len(COLORS)]
            lines.append(Line(name, points, color, value=area))
    return sorted(lines, key=lambda line: line.value, reverse=game == "insertion")
