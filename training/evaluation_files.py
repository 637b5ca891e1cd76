"""The files of --evaluate: the result as JSON, each image and each class as CSV, and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, printable
from common.files import free_path, make_folders, replace_file
from data import evenly_spread
from explain.pictures import SOFTWARE, is_own_picture, png_bytes
from training import run_folder
from training.environment import environment
from training.evaluation import (
    TOP,
    EvaluatedCheckpoint,
    OpenedCheckpoint,
    interval_95,
    mean_interval_95,
)
from training.mistakes import confused_pairs, monitor_of, surest_mistakes
from training.report import rows_of
from training.summary import SHEET, summary_picture

CLASS_FIELDS = (
    "class",
    "images",
    "correct",
    "top1",
    "low_95",
    "high_95",
    "predicted",
    "mistaken_for",
    "times",
)
MAX_RECORD = 2**20  # bytes; an evaluation.json has about one thousand, an attack 250


# ---- evaluation.json ----------------------------------------------------------------------------


def record(opened: OpenedCheckpoint, command: str) -> dict:
    """What was evaluated on what, and how: plain values."""
    config, position = opened.config, opened.saved["position"]
    here = environment(opened.precision.device)
    return {
        "software": SOFTWARE,
        "checkpoint": str(opened.path.absolute()),
        "model": config["model"],
        "width": config["width"],
        "seed": config["seed"],
        "epoch": position["epoch"],
        "steps_into_next_epoch": position["step"],
        "epochs": config["epochs"],
        "moving_average": bool(opened.saved["ema"]),
        "data": opened.test.source,
        "images": len(opened.test),
        "classes": len(opened.test.class_names),
        "precision": opened.precision.name,
        "device": here["device"],
        "torch": here["torch"],
        "git_commit": here["git_commit"],
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def results(evaluated: EvaluatedCheckpoint) -> dict:
    """Loss in nats, accuracies in percent, each with its 95 % interval; None for a number that is
    not finite."""
    result, images = evaluated.result, len(evaluated.test)
    return {
        "loss": rounded(result.loss),
        "loss_95": [rounded(end) for end in mean_interval_95(evaluated.predictions.losses)],
        "top1": rounded(result.top1),
        "top1_95": [rounded(end) for end in interval_95(result.top1, images)],
        "top5": rounded(result.top5),
        "top5_95": [rounded(end) for end in interval_95(result.top5, images)],
    }


def rounded(number: float) -> float | None:
    """Six decimals; None for a number that JSON does not have."""
    return round(number, 6) if math.isfinite(number) else None


def json_bytes(content: dict) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def record_json(evaluated: EvaluatedCheckpoint) -> bytes:
    return json_bytes(record(evaluated, evaluated.command) | results(evaluated))


def has_key(name: str) -> Callable[[Path], bool]:
    """A test of a path: is it a record of ours with this key?"""

    def is_own(path: Path) -> bool:
        try:
            # RecursionError: of thousands of brackets
            content = json.loads(first_bytes(path, MAX_RECORD))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.get("software") == SOFTWARE and name in content

    return is_own


# ---- tables -------------------------------------------------------------------------------------


def prediction_fields(count: int, files: bool = False) -> list[str]:
    """The columns of predictions.csv, with the ``count`` best classes, and with the names of the
    ``files`` where the images have any."""
    others = (f"{name}_{i}" for i in range(2, count + 1) for name in ("predicted", "probability"))
    file = ["file"] if files else []
    return ["image", *file, "true", "predicted", "probability", *others, "loss"]


def predictions_csv(evaluated: EvaluatedCheckpoint) -> bytes:
    """A line per test image, in the order of the set."""
    predictions, names = evaluated.predictions, class_names(evaluated)
    files = list(map(printable, evaluated.test.files))
    columns = (predictions.labels, predictions.best, predictions.probabilities, predictions.losses)
    rows = []
    for image, (label, best, probabilities, loss) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        row = [image, *files[image : image + 1], names[label]]
        for answer, probability in zip(best, probabilities, strict=True):
            row += [names[answer], f"{probability:.6f}"]
        rows.append([*row, f"{loss:.6f}"])
    return csv_bytes(prediction_fields(predictions.best.shape[1], bool(files)), rows)


def classes_csv(evaluated: EvaluatedCheckpoint) -> bytes:
    """A line per class, in the order of the set. Accuracies in percent; empty for a class without
    test images."""
    names = class_names(evaluated)
    confusions = evaluated.predictions.confusions(len(names))
    correct = confusions.diagonal()
    columns = (
        names,
        confusions.sum(1).tolist(),
        correct.tolist(),
        confusions.sum(0).tolist(),
        *(part.tolist() for part in (confusions - torch.diag(correct)).max(1)),
    )
    rows = []
    for name, images, right, predicted, times, other in zip(*columns, strict=True):
        accuracy = ["", "", ""]
        if images:
            percent = 100 * right / images
            accuracy = [f"{value:.2f}" for value in (percent, *interval_95(percent, images))]
        mistaken_for = names[other] if times else ""
        rows.append([name, images, right, *accuracy, predicted, mistaken_for, times])
    return csv_bytes(CLASS_FIELDS, rows)


def class_names(evaluated: EvaluatedCheckpoint) -> list[str]:
    """The names of the classes, each on one line: they are names of folders, where a line break
    and bytes that are no text are possible."""
    return list(map(printable, evaluated.test.class_names))


def csv_bytes(fields: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([fields, *rows])
    return text.getvalue().encode()


def has_header(*headers: Sequence[str]) -> Callable[[Path], bool]:
    """A test of a path: is it a table that begins with the line of one of these headers?"""
    lines = {csv_bytes(fields, []) for fields in headers}

    def is_own(path: Path) -> bool:
        try:
            start = first_bytes(path, max(map(len, lines)))
        except OSError:
            return False
        return any(start.startswith(line) for line in lines)

    return is_own


def first_bytes(path: Path, count: int) -> bytes:
    """The beginning of a regular file, of anything else b"": opening a pipe would wait. Raises
    OSError."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(count)


# ---- the run's picture ---------------------------------------------------------------------------


def run_summary(evaluated: EvaluatedCheckpoint) -> np.ndarray:
    """The sheet that a run ends with, with the result of this evaluation; without the curves where
    the checkpoint is not in its run's folder."""
    folder, config = evaluated.path.parent, evaluated.config
    record, rows = run_folder.record_of(folder, evaluated.saved["config"]), []
    position = evaluated.saved["position"]
    if record:  # an earlier checkpoint has the curves up to it
        rows = [row for row in rows_of(folder) if row["epoch"] <= position["epoch"]]
    eight = evenly_spread(8, len(evaluated.test))
    return summary_picture(
        config,
        record,
        rows,
        evaluated.result,
        eval_name="test",
        curve_name="val" if config["val_fraction"] else "test",
        images=len(evaluated.test),
        epoch=position["epoch"],
        steps=position["step"],
        sheet=monitor_of(evaluated).sheet(evaluated.model, evaluated.precision, eight, **SHEET),
    )


# ---- all of them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileKind:
    """How one of the files is made."""

    content: Callable[[EvaluatedCheckpoint], bytes | None]  # None: there is nothing to show
    is_own: Callable[[Path], bool]  # did an earlier evaluation write this file?
    purpose: str


def as_png(
    draw: Callable[[EvaluatedCheckpoint], np.ndarray | None],
) -> Callable[[EvaluatedCheckpoint], bytes | None]:
    """The content of a PNG file from its pixels, (H, W, 3) uint8 or None."""

    def content(evaluated: EvaluatedCheckpoint) -> bytes | None:
        pixels = draw(evaluated)
        return None if pixels is None else png_bytes(pixels)

    return content


FILES = {
    "evaluation.json": FileKind(record_json, has_key("top1"), "the results over all classes"),
    "predictions.csv": FileKind(
        predictions_csv,
        has_header(
            *(prediction_fields(n, files) for n in range(1, TOP + 1) for files in (False, True))
        ),
        "each image: its best classes with their probabilities, and its loss",
    ),
    "classes.csv": FileKind(
        classes_csv, has_header(CLASS_FIELDS), "each class: its accuracy, and what it is taken for"
    ),
    "confused.png": FileKind(
        as_png(confused_pairs), is_own_picture, "the most confused pairs of classes"
    ),
    "mistakes.png": FileKind(as_png(surest_mistakes), is_own_picture, "the surest mistakes"),
    run_folder.SUMMARY_NAME: FileKind(as_png(run_summary), is_own_picture, "the run on one sheet"),
}


def write_files(evaluated: EvaluatedCheckpoint, folder: Path) -> dict[str, Path | None]:
    """Write FILES into a folder. Returns the path by name, None for a picture without anything to
    show. See ``write_file``."""
    written = {}
    for name, kind in FILES.items():
        content = kind.content(evaluated)
        path = write_file(folder / name, content, kind.is_own)
        written[name] = None if content is None else path
    return written


def write_file(path: Path, content: bytes | None, is_own: Callable[[Path], bool]) -> Path:
    """Write a file; None removes an earlier one. Its folder is made if it is missing. A file of an
    earlier evaluation (``is_own``) is replaced; one of somebody else's stays, and ours gets a
    number. Returns the path.

    Raises UserError where it cannot be written."""
    try:
        make_folders(path.parent)
        path = free_path(path, is_own)
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"{printable(path)} could not be written: {error.strerror or error}. The results "
            f"above are complete; --out FOLDER writes the files to another folder"
        ) from error
    return path
