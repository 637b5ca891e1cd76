"""A run's own picture, summary.png: on one sheet its result, settings, command and curves, and test
images with their maps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from attention_model import MODEL_NAMES
from common.errors import printable
from common.fonts import TextFont, draw_text, named_face, shorten, wrap
from explain.charts import Line, is_finite, line_chart, number_text
from explain.pictures import FAINT_INK, FRAME, INK, MARGIN, PAPER
from training.environment import short_commit
from training.evaluation import Evaluation, interval_95
from training.optim import width_factor
from training.progress import format_duration, in_pixels
from training.schedules import stages

WIDTH, EDGE = 1400, 40  # pixels: of the sheet, and free at its left and right
CHART_HEIGHT, CHART_GAP = 330, 48  # pixels
PANEL = (237, 237, 234)  # behind the command
COMMAND_LINES, COMMAND_LINE_HEIGHT = 3, 21
# Dark and solid against lighter and dashed or thin: told apart in gray print, too. The colors are
# of the maps' color scale.
EVALUATED, TRAINED, TOP5 = (87, 16, 110), (196, 84, 20), (150, 116, 164)

PROJECT = "Learn to Pay Attention, arXiv 1804.02391"
SET_NAMES = {"val": "validation"}
DATA_NAMES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "cub": "CUB-200-2011"}
CIFAR_CLASSES = {"cifar100": 100, "cifar10": 10}
AUGMENTATIONS = ("crop_pad", "flip", "zoom", "jitter", "trivial_augment", "cutout")
WITHOUT_ATTENTION = ("vgg", "vgg-gap", *(m for m in MODEL_NAMES if m.endswith("-uniform")))
# Monospaced fonts that Linux distributions have; PIL brings none.
MONOSPACED = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf")


# of the sheet: two images with three maps beside each other
SHEET = {"min_side": 160, "max_side": 160}


def summary_picture(
    config: Mapping[str, object],
    record: Mapping[str, object],
    rows: Sequence[Mapping[str, float | None]],
    result: Evaluation,
    *,
    eval_name: str,
    curve_name: str,
    images: int,
    epoch: int,
    steps: int = 0,
    sheet: np.ndarray,
) -> np.ndarray:
    """A sheet about a run, (H, W, 3) uint8, 1,400 pixels wide, or more if ``sheet`` needs it.

    Args:
        config: of the run.
        record: what config.json holds; what it lacks is left out.
        rows: of metrics.csv; without any there are no charts.
        result: of the evaluation of ``images`` images of ``eval_name``, "test" or "val", with the
            weights after ``epoch`` epochs and ``steps`` optimizer steps.
        curve_name: "test" or "val": what the eval_ columns of ``rows`` are of.
        sheet: images with their maps, (h, w, 3) uint8, MARGIN free around them (see
            attention_sheet).
    """
    classes = len(result.class_counts)
    width = max(WIDTH, sheet.shape[1] + 2 * (EDGE - MARGIN))
    name = SET_NAMES.get(eval_name, eval_name)
    strips = [
        heading(width, config, record, classes),
        results(width, headline(result, name, images), numbers(config, rows, result, epoch, steps)),
        fact_table(width, facts(config, record, rows)),
        command_panel(width, commands_of(record)),
        *charts(width, config, record, rows, SET_NAMES.get(curve_name, curve_name), classes),
        caption(width, str(config.get("model")), name),
        beside_paper(width, sheet),
    ]
    return np.concatenate([np.asarray(strip) for strip in strips if strip is not None])


# ---- what it says -------------------------------------------------------------------------------


def data_name(config: Mapping[str, object], classes: int) -> str:
    """The data set by its usual name. Class folders of the user's own may stand in for CIFAR's:
    those of another number of classes are not it."""
    if config.get("sample"):
        return "the built-in sample"
    name = str(config.get("dataset"))
    if name == "folder":
        return Path(str(config.get("data_dir"))).absolute().name or "class folders"
    if classes != CIFAR_CLASSES.get(name, classes):
        return "class folders"
    return DATA_NAMES.get(name, name)


def headline(result: Evaluation, name: str, images: int) -> tuple[str, str, str]:
    """The accuracy, what it is of, and how sure it is."""
    below = ""
    if images > 0:
        low, high = interval_95(result.top1, images)
        below = f"95 % interval {low:.2f} to {high:.2f} %"
    return f"{result.top1:.2f} %", f"top-1 on {images:,} {name} images", below


def numbers(
    config: Mapping[str, object],
    rows: Sequence[Mapping[str, float | None]],
    result: Evaluation,
    epoch: int,
    steps: int = 0,
) -> dict[str, str]:
    """The smaller numbers of the result: {what it is: number}."""
    found = {}
    if len(result.class_counts) > 5:  # else it is 100 %
        found["top-5"] = f"{result.top5:.2f} %"
    found["cross-entropy loss"] = number_text(result.loss, 3)
    found["epochs"] = f"{epoch} of {config.get('epochs', epoch)}"
    if steps:  # the statistics of batch norm are not recalibrated there
        found["epochs"] += f", and {steps} steps"
    seconds = [row.get("seconds") for row in rows]
    # of a metrics.csv that was lost and began again, the sum is not that of the run
    if rows and rows[0]["epoch"] == 1 and all(map(is_finite, seconds)):
        found["training time"] = format_duration(sum(seconds))
    return found


def facts(
    config: Mapping[str, object],
    record: Mapping[str, object],
    rows: Sequence[Mapping[str, float | None]],
) -> dict[str, str]:
    """Settings and surroundings of the run, as far as they are known: {name: value}."""
    resolved, environment = part(record, "resolved"), part(record, "environment")
    size = config.get("input_size")
    # older records lack it; the rows have the last rate of each epoch, which is about the peak
    rates = [row.get("lr") or 0 for row in rows]
    if rows and config.get("lr"):
        rates.append(config["lr"] * width_factor({"width": 1, "lr_by_width": 0, **config}))
    peak = resolved.get("peak_lr") or max(rates, default=None)
    init_from, ranks = config.get("init_from"), resolved.get("ranks")
    device, commit = environment.get("device"), environment.get("git_commit")
    if device and isinstance(ranks, int) and ranks > 1:
        device = f"{ranks} x {device}"
    found = {
        "recipe": config.get("recipe"),
        "seed": config.get("seed"),
        "image size": in_pixels(size) if size else None,
        "batch": config.get("batch_size"),
        "peak learning rate": f"{peak:.3g}" if is_finite(peak) else None,
        "initial weights": None if init_from == "none" else init_from,
        "precision": resolved.get("precision"),
        "device": device,
        "PyTorch": environment.get("torch"),
        "commit": short_commit(commit) if isinstance(commit, str) else None,
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A table of the record; {} where it is lost."""
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def commands_of(record: Mapping[str, object]) -> list[str]:
    """The command lines that started and resumed the run; [] where they are lost."""
    found = record.get("commands")
    return [str(command) for command in found] if isinstance(found, list) else []


def train_name(config: Mapping[str, object]) -> str:
    """The training set in the charts: its images may be harder than those evaluated."""
    augmented = any(config.get(name) for name in AUGMENTATIONS)
    return "train (augmented)" if augmented else "train"


def comparison_note(
    config: Mapping[str, object], record: Mapping[str, object], curve_name: str
) -> str:
    """Why the two curves of a chart are not of the same kind."""
    train = "Train: mean over the epoch"
    if train_name(config) != "train":
        train += ", on augmented images"
    if smaller_images(config, record):
        train += ", smaller ones at first"
    if config.get("label_smoothing"):
        train += f", loss with label smoothing {config['label_smoothing']:g}"
    if config.get("dropout"):
        train += ", with dropout"
    average = ", moving average of the weights" if config.get("ema_decay") else ""
    return f"{train}. {curve_name.capitalize()}: after the epoch, without augmentation{average}."


def smaller_images(config: Mapping[str, object], record: Mapping[str, object]) -> bool:
    """Whether the run began with smaller images; False where that is not known."""
    images, batch_size = part(record, "data").get("images"), config.get("batch_size")
    if not isinstance(images, int) or not batch_size:
        return False
    before = {"epochs": 1, "progressive": "none", "progressive_from": 0}
    return bool(stages({**before, **config}, max(1, images // batch_size)))


# ---- how it looks -------------------------------------------------------------------------------
# Strips as wide as the sheet; it is their pile.


def strip(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


@functools.cache
def font(size: int) -> TextFont:
    return TextFont(size)


@functools.cache
def monospaced(size: int) -> TextFont:
    """A monospaced font if the system has one of MONOSPACED."""
    return TextFont(size, named_face(*MONOSPACED))


def heading(
    width: int, config: Mapping[str, object], record: Mapping[str, object], classes: int
) -> Image.Image:
    """The network and its data."""
    image, draw = strip(width, 96)
    room = width - 2 * EDGE
    title = f"{config.get('model')} on {data_name(config, classes)}"
    title = shorten(title, font(30), room - font(15).getlength(PROJECT) - 24)
    draw_text(draw, (EDGE, 56), title, INK, font(30), "ls")
    draw_text(draw, (width - EDGE, 56), PROJECT, FAINT_INK, font(15), "rs")
    words = [f"{classes:,} classes"]
    trained_on = part(record, "data").get("images")
    if isinstance(trained_on, int):
        words.append(f"{trained_on:,} training images")
    words.append(f"width {config.get('width', 1):g}")
    if record.get("sanity"):
        words.append("sanity pass")
    draw_text(draw, (EDGE, 84), "  ·  ".join(words), FAINT_INK, font(17), "ls")
    return image


def results(width: int, first: tuple[str, str, str], others: Mapping[str, str]) -> Image.Image:
    """The accuracy, large, and beside it the other numbers."""
    image, draw = strip(width, 170)
    number, what, below = first
    draw_text(draw, (EDGE - 4, 92), number, EVALUATED, font(80), "ls")
    draw_text(draw, (EDGE, 124), what, INK, font(18), "ls")
    draw_text(draw, (EDGE, 148), below, FAINT_INK, font(15), "ls")
    x = EDGE + max(font(80).getlength(number), font(18).getlength(what)) + 72
    for name, value in others.items():
        draw_text(draw, (x, 92), value, INK, font(32), "ls")
        draw_text(draw, (x, 124), name, FAINT_INK, font(18), "ls")
        x += max(font(32).getlength(value), font(18).getlength(name)) + 56
    return image


def fact_table(width: int, facts: Mapping[str, str]) -> Image.Image:
    """The facts, each below its name, in as many rows as they need."""
    name_font, value_font, right = font(14), font(17), width - EDGE
    row_height, gap = 56, 40
    cells, x, row = [], EDGE, 0
    for name, value in facts.items():
        value = shorten(printable(value), value_font, 420)
        length = max(name_font.getlength(name), value_font.getlength(value))
        if x > EDGE and x + length > right:
            x, row = EDGE, row + 1
        cells.append((x, row * row_height, name, value))
        x += round(length) + gap
    image, draw = strip(width, (row + 1) * row_height + 24)
    draw.line((EDGE, 0, right, 0), FRAME)
    for x, top, name, value in cells:
        draw_text(draw, (x, top + 30), name, FAINT_INK, name_font, "ls")
        draw_text(draw, (x, top + 53), value, INK, value_font, "ls")
    return image


def command_panel(width: int, commands: Sequence[str]) -> Image.Image | None:
    """The command that started the run, how often it was resumed, and the last command that did:
    it may have made the run longer."""
    if not commands:
        return None
    padding, text_font = 14, monospaced(15)
    room = width - 2 * EDGE - 2 * padding
    lines = wrap(printable(commands[0]), text_font, room, COMMAND_LINES)
    resumed = len(commands) - 1
    if resumed:
        times = f"resumed {resumed} times, the last time" if resumed > 1 else "resumed once,"
        last = f"{times} by  {printable(commands[-1])}"
        lines.append(shorten(last, font(15), room))
    height = len(lines) * COMMAND_LINE_HEIGHT + 2 * padding
    image, draw = strip(width, height + 32)
    draw.rectangle((EDGE, 0, width - EDGE - 1, height - 1), PANEL)
    for number, line in enumerate(lines):
        baseline = padding + number * COMMAND_LINE_HEIGHT + 15
        note = resumed and number == len(lines) - 1
        line_font, color = (font(15), FAINT_INK) if note else (text_font, INK)
        draw_text(draw, (EDGE + padding, baseline), line, color, line_font, "ls")
    return image


def charts(
    width: int,
    config: Mapping[str, object],
    record: Mapping[str, object],
    rows: Sequence[Mapping[str, float | None]],
    curve_name: str,
    classes: int,
) -> list[Image.Image]:
    """Accuracy and loss side by side, and a note on them; [] where nothing was measured."""
    size = ((width - 2 * EDGE - CHART_GAP) // 2, CHART_HEIGHT)
    train, drawn = train_name(config), []
    accuracy = accuracy_lines(rows, curve_name, train, with_top5=classes > 5)  # else it is 100 %
    loss = loss_lines(rows, curve_name, train)
    if any(line.parts() for line in accuracy):
        drawn.append(line_chart(accuracy, size=size, title="Accuracy, %", bounds=(0, 100)))
    if any(line.parts() for line in loss):
        options = {"bounds": (0, math.inf), "decimals": 3, "outliers": False}
        drawn.append(line_chart(loss, size=size, title="Loss (cross-entropy)", **options))
    if not drawn:
        return []
    image, draw = strip(width, CHART_HEIGHT + 50)
    for number, chart in enumerate(drawn):
        image.paste(Image.fromarray(chart), (EDGE + number * (size[0] + CHART_GAP), 0))
    note = shorten(comparison_note(config, record, curve_name), font(14), width - 2 * EDGE)
    draw_text(draw, (EDGE, CHART_HEIGHT + 20), note, FAINT_INK, font(14), "ls")
    return [image]


def accuracy_lines(
    rows: Sequence[Mapping[str, float | None]], curve_name: str, train: str, *, with_top5: bool
) -> list[Line]:
    # the dashed line on top: where it coincides with the other, both show
    lines = [
        Line(curve_name, points(rows, "eval_top1"), EVALUATED, width=2.4),
        Line(train, points(rows, "train_top1"), TRAINED, width=1.8, dashed=True),
    ]
    if with_top5:
        lines.insert(0, Line(f"{curve_name} top-5", points(rows, "eval_top5"), TOP5, width=1.2))
    return lines


def loss_lines(
    rows: Sequence[Mapping[str, float | None]], curve_name: str, train: str
) -> list[Line]:
    return [
        Line(curve_name, points(rows, "eval_loss"), EVALUATED, width=2.4),
        Line(train, points(rows, "train_loss"), TRAINED, width=1.8, dashed=True),
    ]


def points(
    rows: Sequence[Mapping[str, float | None]], column: str
) -> list[tuple[float, float | None]]:
    """A column of metrics.csv over the epochs."""
    return [(row["epoch"], row.get(column)) for row in rows]


def caption(width: int, model: str, name: str) -> Image.Image:
    """The title of the images."""
    image, draw = strip(width, 48)
    draw.line((EDGE, 0, width - EDGE, 0), FRAME)
    title, more = (
        "Where it looks",
        f"{name} images, evenly spread over the set, and the attention map of each gate",
    )
    if model in WITHOUT_ATTENTION:
        title, more = f"{name.capitalize()} images", ""
    draw_text(draw, (EDGE, 38), title, INK, font(20), "ls")
    draw_text(draw, (EDGE + font(20).getlength(title) + 16, 38), more, FAINT_INK, font(15), "ls")
    return image


def beside_paper(width: int, sheet: np.ndarray) -> np.ndarray:
    """The images, their left edge below that of the rest, with paper up to the full width."""
    strip = np.full((sheet.shape[0], width, 3), PAPER, np.uint8)
    left = EDGE - MARGIN
    strip[:, left : left + sheet.shape[1]] = sheet
    return strip
