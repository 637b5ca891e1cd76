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
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from common.errors import printable
from common.files import identity, replace_file, set_aside
from training.attention_health import LevelHealth

if TYPE_CHECKING:  # TensorBoard takes seconds to import and prints
    from tensorboard.compat.proto.event_pb2 import Event
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

FILE_VERSION = "brain.Event:2"  # in the first event of every file
# in the first event of every file that a Report writes: other programs' may lie beside them
WRITER = "learn-to-pay-attention"
# Tags that identify the files of the first version, which did not write that.
OUR_TAGS = re.compile("command/text_summary|peak_memory_mib|attention/conv")
# ends the name of an event file that holds everything to keep of the files before it (by name)
MERGED = ".merged"


# ---- event files --------------------------------------------------------------------------------


def append_synced(path: Path, data: bytes) -> None:
    """Append to a file and sync it to the disk. On failure the file is as it was, and the OSError
    names it."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def event_files(run_dir: Path) -> list[Path]:
    """The event files that a Report has written, in the order in which TensorBoard reads them."""
    return sorted(
        path
        for path in run_dir.iterdir()
        if "tfevents" in path.name and path.is_file() and is_ours(path)
    )


def is_ours(path: Path) -> bool:
    """Whether a Report has written this event file."""
    for event in read_events(path):
        if event.HasField("source_metadata"):
            return event.source_metadata.writer == WRITER
        merged = path.name.endswith(MERGED) and event.HasField("session_log")
        if merged or any(OUR_TAGS.match(value.tag) for value in event.summary.value):
            return True
    return False


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file, up to a broken last record."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    with open(path, "rb") as file:
        # TensorBoard takes no name that is not UTF-8: then it gets that of the open file
        name = str(path) if printable(path) == str(path) else f"/dev/fd/{file.fileno()}"
        yield from LegacyEventFileLoader(name).Load()


def read_summaries(path: Path) -> Iterator[Event]:
    """The events of a file that have a summary, up to a broken last record or the end of a finished
    run."""
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG

    for event in read_events(path):
        # the first thing that finish() writes
        if any(value.tag == EXPERIMENT_TAG for value in event.summary.value):
            return
        if event.summary.value:
            yield event


def new_event_path(run_dir: Path, ending: str = "") -> Path:
    """An unused name that sorts after all event files of the run, even if the clock was set back or
    two are made in one second."""
    stamps = [path.name.split("tfevents.")[-1].split(".")[0] for path in event_files(run_dir)]
    first = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])
    names = (
        f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}{ending}"
        for stamp in count(first)
    )
    return next(run_dir / name for name in names if not os.path.lexists(run_dir / name))


def to_records(events: Iterable[Event]) -> bytes:
    """Events as the bytes of an event file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def first_event() -> Event:
    """The first event of a file, which names its writer."""
    from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata

    return Event(
        wall_time=time.time(),
        file_version=FILE_VERSION,
        source_metadata=SourceMetadata(writer=WRITER),
    )


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
    """Writes metrics.csv and one TensorBoard event file in ``run_dir`` (made if missing).

    ``eval_name`` is the evaluation set's name in the tags: "test" or "val". After a resume call
    truncate_after first; the new Report then continues in another event file, which TensorBoard
    shows as the same run. Every method writes to the disk before it returns.

    Raises OSError with the file's name where that fails, and ValueError once the report is closed.
    """

    def __init__(self, run_dir: Path, *, eval_name: str = "test"):
        # here, not above: importing it takes seconds and prints
        from torch.utils.tensorboard import summary

        self.summary = summary
        self.run_dir, self.eval_name = Path(run_dir), eval_name
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / "metrics.csv"
        self.events_path = new_event_path(self.run_dir)
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

    def write(self, summaries: Sequence[Summary], step: int) -> None:
        """Write an event per summary, at ``step``."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self.closed:
            raise ValueError(f"the report of {self.run_dir} is closed")
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        if not self.events_path.exists():
            events.insert(0, first_event())
        self.append(self.events_path, to_records(events))

    def write_scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Write the scalars that are not None, by tag."""
        present = {tag: value for tag, value in values.items() if value is not None}
        self.write([self.summary.scalar(tag, value) for tag, value in present.items()], step)

    def start(
        self, command: str, config: Mapping[str, object], hparams: Mapping[str, object]
    ) -> None:
        """Write, once per run, the command and the config as text and the hyperparameters for the
        hparams tab."""
        bar = "&#124;"  # "|" would end a cell
        rows = [
            f"| {name} | {json.dumps(value, default=str).replace('|', bar)} |"
            for name, value in config.items()
        ]
        table = "\n".join(["| option | value |", "|---|---|", *rows])
        _, session_start, _ = self.summary.hparams(for_hparams(hparams), {})
        texts = [
            self.summary.text("command", f"    {printable(command)}"),
            self.summary.text("configuration", table),
        ]
        self.write([*texts, session_start], step=0)

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
            "loss/train": "train_loss",
            f"loss/{self.eval_name}": "eval_loss",
            "top1/train": "train_top1",
            f"top1/{self.eval_name}": "eval_top1",
            f"top5/{self.eval_name}": "eval_top5",
            "learning_rate": "lr",
            "images_per_second": "images_per_second",
            "peak_memory_mib": "peak_memory_mib",
        }
        self.write_scalars({tag: numbers[name] for tag, name in tags.items()}, epoch)

    def health(self, epoch: int, health: Mapping[str, LevelHealth]) -> None:
        """Write the attention health of an epoch: attention/<level>/ with the HEALTH_FIELDS."""
        scalars = {
            f"attention/{level}/{name}": getattr(level_health, name)
            for level, level_health in health.items()
            for name in HEALTH_FIELDS
        }
        self.write_scalars(scalars, epoch)

    def overlays(self, epoch: int, sheet: np.ndarray) -> None:
        """Write a contact sheet, (H, W, 3) uint8, at step ``epoch``.

        As a JPEG of high quality: TensorBoard computes its checksums in Python, up to half a second
        for a megabyte, and a lossless file has several."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        encoded = io.BytesIO()
        Image.fromarray(sheet).save(encoded, "JPEG", quality=92, subsampling=0)
        height, width, _ = sheet.shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        value = Summary.Value(tag=f"attention/{self.eval_name} images", image=image)
        self.write([Summary(value=[value])], epoch)

    def finish(
        self, epoch: int, hparams: Mapping[str, object], metrics: Mapping[str, float]
    ) -> None:
        """Write the end of a run, after ``epoch``: the hparams tab shows it as finished, with
        ``metrics`` and the last values of the curves as its columns.

        ``hparams`` are those of start; ``metrics`` are final values by name, also written as
        scalars final/<name> at that step. truncate_after removes all of this again, for a run that
        is made longer.
        """
        final = {f"final/{name}": float(value) for name, value in metrics.items()}
        columns = [f"top1/{self.eval_name}", f"loss/{self.eval_name}", "top1/train", "loss/train"]
        # hparams() makes the columns (experiment), the start and the end of the session; start()
        # has written the second
        experiment, _, session_end = self.summary.hparams(
            for_hparams(hparams), final | dict.fromkeys(columns, 0.0)
        )
        self.write([experiment, session_end], step=0)
        self.write_scalars(final, epoch)

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


def truncate_after(run_dir: Path, epoch: int) -> None:
    """On resume: remove everything after ``epoch`` from metrics.csv and the event files, and repair
    what a crash left.

    With epoch -1 what start() wrote is removed too, for a run that starts over. The event files
    become one. It sorts after those it replaces and ends in MERGED, so if the process is stopped
    before they are removed, the next call knows that they are contained in it. Calling this twice
    is harmless, and so is calling it on a folder without a run. A running TensorBoard follows,
    except under --load_fast=false, where it has to be restarted.

    Event files of other programs stay as they are. A metrics.csv that cannot be read is set aside.
    """
    run_dir = Path(run_dir)
    truncate_metrics(run_dir / "metrics.csv", epoch)
    files = event_files(run_dir)
    merged_before = [index for index, path in enumerate(files) if path.name.endswith(MERGED)]
    live = files[merged_before[-1] :] if merged_before else files
    if live:
        replace_file(new_event_path(run_dir, MERGED), lambda file: merge(live, epoch, file))
    for path in files:
        path.unlink(missing_ok=True)


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


def merge(paths: Sequence[Path], epoch: int, file: BinaryIO) -> None:
    """Write the summaries of several event files up to step ``epoch`` as one event file, one record
    at a time."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # START makes TensorBoard drop what it read from the files before, should a crash have left them
    start = Event(step=0, session_log=SessionLog(status=SessionLog.START))
    file.write(to_records([first_event(), start]))
    for path in paths:
        for event in read_summaries(path):
            if event.step <= epoch:
                file.write(to_records([event]))
