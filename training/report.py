"""Run outputs: metrics.csv and TensorBoard events in the run directory.

Events are written in the calling thread and synced at once, not by SummaryWriter's background
thread: a full disk or a vanished folder is an OSError with the file's name at the call that met it,
and a killed run loses nothing it wrote.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.errors import printable
from common.files import identity, replace_file, set_aside
from training.attention_health import LevelHealth
from training.event_files import (
    ATTENTION,
    BY_STEP,
    LOSS,
    RESULTS,
    RUN,
    TOP1,
    TOP5,
    TRAIN,
    append_synced,
    first_event,
    new_event_path,
    results_of,
    to_records,
    truncate_events,
)
from training.trainer import StepPoint

if TYPE_CHECKING:  # TensorBoard takes seconds to import and prints
    from tensorboard.compat.proto.summary_pb2 import Summary

METRIC_FIELDS = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "eval_loss",
    "eval_top1",
    "eval_top5",
    "images_per_second",
    "seconds",
    "peak_memory_mib",
)
# measured; the rest is written in full
DECIMALS = {"images_per_second": 1, "seconds": 2, "peak_memory_mib": 1}
HEALTH_FIELDS = ("score_sd", "entropy", "gate_gradient")
LOSS_BY_STEP, LR_BY_STEP = f"{LOSS}{BY_STEP}", f"learning rate{BY_STEP}"


def for_hparams(values: Mapping[str, object]) -> dict[str, int | float | str]:
    """Values as the hparams tab can show them: numbers and text. A bool becomes text, as it would
    be shown as 1 or 0."""
    return {
        name: value
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
        else str(value)
        for name, value in values.items()
    }


# ---- the report of a run ------------------------------------------------------------------------


class Report:
    """Writes metrics.csv and TensorBoard events in ``run_dir`` (made if missing): the training
    curves in the folder TRAIN below it, all else in the folder itself.

    ``eval_name`` is the evaluation set's name: "test" or "val". After a resume call truncate_after
    first; the new Report then continues in other event files, which TensorBoard shows as the same
    run. Every method writes to the disk before it returns.

    Raises OSError with the file's name where that fails, and ValueError once the report is closed.
    """

    def __init__(self, run_dir: Path, *, eval_name: str = "test"):
        # here, not above: importing it takes seconds and prints
        from torch.utils.tensorboard import summary

        self.summary = summary
        self.run_dir, self.eval_name = Path(run_dir), eval_name
        self.results = results_of(eval_name)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / "metrics.csv"
        self.events_paths = {
            folder: new_event_path(self.run_dir / folder) for folder in ("", TRAIN)
        }
        self.begun = {path for path in (self.metrics_path,) if path.exists()}
        self.folder = identity(self.run_dir)
        self.closed = False

    def append(self, path: Path, data: bytes) -> None:
        """Append to a file of the run.

        Raises FileNotFoundError for a file that was there and is gone (its folder was moved away,
        and made again by a checkpoint), or half a curve would begin where the whole one was; and
        for another folder in place of the run's."""
        if path in self.begun and not path.exists() or identity(self.run_dir) != self.folder:
            raise FileNotFoundError(
                errno.ENOENT, "it was there and is gone: bring the run's folder back", str(path)
            )
        append_synced(path, data)
        self.begun.add(path)

    def write(self, summaries: Sequence[Summary], steps: Sequence[int], folder: str = "") -> None:
        """Write an event per summary, each at its step, in the run's folder or TRAIN."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self.closed:
            raise ValueError(f"the report of {self.run_dir} is closed")
        now, path = time.time(), self.events_paths[folder]
        events = [
            Event(wall_time=now, step=step, summary=summary)
            for summary, step in zip(summaries, steps, strict=True)
        ]
        if not path.exists():
            events.insert(0, first_event())
            if identity(self.run_dir) == self.folder:
                path.parent.mkdir(exist_ok=True)
        self.append(path, to_records(events))

    def write_scalars(
        self, values: Mapping[str, float | None], step: int, folder: str = ""
    ) -> None:
        """Write the scalars that are not None, by tag."""
        present = {tag: value for tag, value in values.items() if value is not None}
        summaries = [self.summary.scalar(tag, value) for tag, value in present.items()]
        self.write(summaries, [step] * len(summaries), folder)

    def start(self, command: str, config: Mapping[str, object]) -> None:
        """Write, once per run, the command and the config as text."""
        bar = "&#124;"  # "|" would end a cell
        rows = [
            f"| {name} | {json.dumps(value, default=str).replace('|', bar)} |"
            for name, value in config.items()
        ]
        table = "\n".join(["| option | value |", "|---|---|", *rows])
        texts = [
            self.summary.text("command", f"    {printable(command)}"),
            self.summary.text("configuration", table),
        ]
        self.write(texts, [0, 0])

    def tabs(self, hparams: Mapping[str, object]) -> None:
        """Write, at the start and at each resume, the hyperparameters for the hparams tab, and the
        charts of the custom scalars tab. The metrics of the first are TensorBoard's last values of
        all scalars, sorted by name."""
        _, session_start, _ = self.summary.hparams(for_hparams(hparams), {})
        results, attention = re.escape(self.results), re.escape(ATTENTION)
        charts = {
            RESULTS: {
                name: ["Multiline", [f"^{results}/{re.escape(name)}$"]]
                for name in (TOP1, LOSS, LOSS_BY_STEP, TOP5)
            },
            ATTENTION: {
                name: ["Multiline", [f"^{attention}/.*/{name}$"]] for name in HEALTH_FIELDS
            },
        }
        self.write([session_start, self.summary.custom_scalars(charts)], [0, 0])

    def epoch(self, row: Mapping[str, float | None]) -> None:
        """Write a finished epoch: a line of metrics.csv and the scalars of TensorBoard, at step
        ``row["epoch"]`` (from 1).

        None is an empty cell and no scalar. Raises ValueError where the row does not have exactly
        the METRIC_FIELDS.
        """
        if set(row) != set(METRIC_FIELDS):
            raise ValueError(
                f"an epoch's row has the fields {', '.join(METRIC_FIELDS)}; "
                f"not these: {', '.join(sorted(set(row) ^ set(METRIC_FIELDS)))}"
            )
        numbers = {name: None if row[name] is None else float(row[name]) for name in METRIC_FIELDS}
        epoch = int(row["epoch"])
        line = to_line(epoch, numbers)
        if not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0:
            line = ",".join(METRIC_FIELDS) + "\n" + line
        self.append(self.metrics_path, line.encode())
        tags = {
            f"{self.results}/{TOP1}": "eval_top1",
            f"{self.results}/{LOSS}": "eval_loss",
            f"{self.results}/{TOP5}": "eval_top5",
            f"{RUN}/learning rate": "lr",
            f"{RUN}/images per second": "images_per_second",
            f"{RUN}/peak memory, MiB": "peak_memory_mib",
            f"{RUN}/seconds": "seconds",
        }
        self.write_scalars({tag: numbers[name] for tag, name in tags.items()}, epoch)
        training = {TOP1: numbers["train_top1"], LOSS: numbers["train_loss"]}
        self.write_scalars(
            {f"{self.results}/{name}": value for name, value in training.items()}, epoch, TRAIN
        )

    def steps(self, points: Sequence[StepPoint]) -> None:
        """Write points of the curves by step."""
        steps = [point.step for point in points]
        losses = [self.summary.scalar(f"{self.results}/{LOSS_BY_STEP}", p.loss) for p in points]
        rates = [self.summary.scalar(f"{RUN}/{LR_BY_STEP}", p.lr) for p in points]
        if points:
            self.write(losses, steps, TRAIN)
            self.write(rates, steps)

    def health(self, epoch: int, health: Mapping[str, LevelHealth]) -> None:
        """Write the attention health of an epoch: spatial attention/<level>/ with the
        HEALTH_FIELDS."""
        scalars = {
            f"{ATTENTION}/{level}/{name}": getattr(level_health, name)
            for level, level_health in health.items()
            for name in HEALTH_FIELDS
        }
        self.write_scalars(scalars, epoch)

    def overlays(self, epoch: int, sheets: Sequence[np.ndarray]) -> None:
        """Write contact sheets, (H, W, 3) uint8 each, at step ``epoch``. The capital in their tags
        sorts them before the curves.

        As JPEGs of high quality: TensorBoard computes its checksums in Python, up to half a second
        for a megabyte, and a lossless file has several."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summaries = []
        for number, sheet in enumerate(sheets, start=1):
            encoded = io.BytesIO()
            Image.fromarray(sheet).save(encoded, "JPEG", quality=92, subsampling=0)
            height, width, _ = sheet.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
            )
            tag = f"{ATTENTION}/{self.eval_name.capitalize()} images {number}"
            summaries.append(Summary(value=[Summary.Value(tag=tag, image=image)]))
        self.write(summaries, [epoch] * len(summaries))

    def finish(self) -> None:
        """Write the end of a run: the hparams tab shows it as finished. truncate_after removes this
        again, for a run that is made longer."""
        _, _, session_end = self.summary.hparams({}, {})
        self.write([session_end], [0])

    def close(self) -> None:
        """Forbid further writing; nothing is ever pending. May be called twice."""
        self.closed = True


# ---- metrics.csv --------------------------------------------------------------------------------


def to_line(epoch: int, numbers: Mapping[str, float | None]) -> str:
    """A line of metrics.csv, with its end."""
    cells = [str(epoch)]
    for name in METRIC_FIELDS[1:]:
        number = numbers[name]
        if number is None:
            cells.append("")
        else:
            cells.append(repr(round(number, DECIMALS[name]) if name in DECIMALS else number))
    return ",".join(cells) + "\n"


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.csv as numbers: epoch an int, the others floats, None for an empty
    cell.

    An unfinished last line (a killed run) is left out, unless it can be read: editors leave out the
    last line's end. Raises ValueError naming the line that cannot be read."""
    return [row for _, row in lines_and_rows(path)]


def rows_of(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.csv; [] where it is lost or damaged."""
    try:
        return read_metrics(run_dir / "metrics.csv")
    except (OSError, ValueError):
        return []


def lines_and_rows(path: Path) -> list[tuple[str, dict]]:
    """Each row of a metrics.csv as it is written, and as read_metrics returns it. Spreadsheets
    begin the file with a byte-order mark, and end it with blank lines."""
    text = path.read_bytes().decode("utf-8-sig", "replace")
    names = ",".join(METRIC_FIELDS)
    header, *lines = text.split("\n")
    unfinished_header = not lines and header in names
    if header.strip() != names and not unfinished_header:
        raise ValueError(f"{path}, line 1: not the names of the columns, {names}")
    rows = []
    for number, line in enumerate(lines, start=2):
        if not line.replace(",", "").strip():
            continue
        try:
            rows.append((line.strip(), parse_line(line)))
        except ValueError:
            if number <= len(lines):  # else it is the unfinished one
                raise ValueError(f"{path}, line {number}: not a row of numbers") from None
    return rows


def parse_line(line: str) -> dict[str, int | float | None]:
    """The numbers of a line of metrics.csv by field. Raises ValueError."""
    cells = dict(zip(METRIC_FIELDS, line.strip().split(","), strict=True))
    row: dict[str, int | float | None] = {"epoch": int(cells.pop("epoch"))}
    for name, cell in cells.items():
        row[name] = None if cell == "" else float(cell)
    return row


# ---- resuming -----------------------------------------------------------------------------------


def truncate_after(run_dir: Path, epoch: int, step: int = 0, *, eval_name: str = "test") -> None:
    """On resume: remove everything after ``epoch``, and after optimizer step ``step`` of the run,
    from metrics.csv and the event files, and repair what a crash left.

    With epoch -1 what start() wrote is removed too, for a run that starts over. Calling this twice
    is harmless, and so is calling it on a folder without a run. A running TensorBoard follows,
    except under --load_fast=false, where it has to be restarted.

    Event files of other programs stay as they are. A metrics.csv that cannot be read is set aside.
    """
    run_dir = Path(run_dir)
    truncate_metrics(run_dir / "metrics.csv", epoch)
    truncate_events(run_dir, epoch, step, eval_name)


def truncate_metrics(path: Path, epoch: int) -> None:
    """Keep the header and the rows up to ``epoch``, as they are."""
    if not os.path.lexists(path):
        return
    try:
        kept = [line for line, row in lines_and_rows(path) if row["epoch"] <= epoch]
    except (ValueError, IsADirectoryError) as error:
        reason = str(error).partition(", ")[2] or error
        set_aside(path, f"cannot be read ({reason}), so a new one begins")
        return
    text = "".join(f"{line}\n" for line in [",".join(METRIC_FIELDS), *kept])
    replace_file(path, lambda file: file.write(text.encode()))
