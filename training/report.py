"""Everything a run tells: metrics.csv and TensorBoard events in the run directory, and the health
of its attention.

Events are written in the calling thread and synced at once, not by SummaryWriter's background
thread: a full disk or a vanished folder is an OSError with the file's name at the call that met it,
and a killed run loses nothing it wrote.
"""

import errno
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import printable
from common.files import identity, replace_file, set_aside
from training.health import LevelHealth

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

FILE_VERSION = "brain.Event:2"  # in the first event of every file
# in the first event of every file of ours: others may lie beside them
WRITER = "learn-to-pay-attention"
# Tags by which the files of our first version, which lack that, are known.
OUR_TAGS = re.compile("command/text_summary|peak_memory_mib|attention/conv")
# ends the name of an event file that holds all that the files before it (by name) are to keep
MERGED = ".merged"


def _append(path: Path, data: bytes) -> None:
    """Append to a file and see it to the disk. On failure the file is as it was, and the OSError
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


def _event_files(run_dir: Path) -> list[Path]:
    """The event files that we have written, in the order in which TensorBoard reads them."""
    return sorted(
        path
        for path in run_dir.iterdir()
        if "tfevents" in path.name and path.is_file() and _is_ours(path)
    )


def _is_ours(path: Path) -> bool:
    for event in _events(path):
        if event.HasField("source_metadata"):
            return event.source_metadata.writer == WRITER
        merged = path.name.endswith(MERGED) and event.HasField("session_log")
        if merged or any(OUR_TAGS.match(value.tag) for value in event.summary.value):
            return True
    return False


def _events(path: Path) -> Iterator:
    """The events of a file, up to a broken last record. TensorBoard takes no name that is not in
    UTF-8: then it gets that of the open file."""
    from tensorboard.backend.event_processing.event_file_loader import (
        LegacyEventFileLoader,
    )

    with open(path, "rb") as file:
        name = str(path) if printable(path) == str(path) else f"/dev/fd/{file.fileno()}"
        yield from LegacyEventFileLoader(name).Load()


def _new_event_path(run_dir: Path, ending: str = "") -> Path:
    """A name that nothing has, and that sorts after every event file of ours, even if the clock
    went back or two are made in one second."""
    stamps = [path.name.split("tfevents.")[-1].split(".")[0] for path in _event_files(run_dir)]
    first = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])
    names = (
        f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}{ending}"
        for stamp in count(first)
    )
    return next(run_dir / name for name in names if not os.path.lexists(run_dir / name))


def _records(events: list) -> bytes:
    """TensorBoard Event protocol buffers as the bytes of an event file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _first_event():
    from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata

    return Event(
        wall_time=time.time(),
        file_version=FILE_VERSION,
        source_metadata=SourceMetadata(writer=WRITER),
    )


def _plain(value):
    """A value as the hparams tab can show it: number or text (a bool would be shown as 1 or 0, so
    it is text)."""
    return (
        value
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
        else str(value)
    )


class Report:
    """Writes metrics.csv and one TensorBoard event file in `run_dir` (made if missing).

    `eval_name` is what the evaluation set is called in the tags: "test" or "val". After a resume
    call truncate_after first; the new Report then goes on in a further event file, which
    TensorBoard shows as the same run. Every method writes to the disk before it returns, and raises
    OSError with the file's name where it cannot.
    """

    def __init__(self, run_dir: Path, *, eval_name: str = "test"):
        from torch.utils.tensorboard import (
            summary,  # here, not above: importing it takes seconds and prints
        )

        self._summary = summary
        self.run_dir, self.eval_name = Path(run_dir), eval_name
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / "metrics.csv"
        self.events_path = _new_event_path(self.run_dir)
        self.begun = {path for path in (self.metrics_path,) if path.exists()}
        self.folder = identity(self.run_dir)
        self.closed = False

    def _add(self, path: Path, data: bytes) -> None:
        """Append. A file that was there and is gone (its folder was moved away, and made again by a
        checkpoint) is an error, or half a curve would begin where the whole one was. So is another
        folder in the place of the run's."""
        if path in self.begun and not path.exists() or identity(self.run_dir) != self.folder:
            raise FileNotFoundError(
                errno.ENOENT, "it was there and is gone: bring the run's folder back", str(path)
            )
        _append(path, data)
        self.begun.add(path)

    def _write(self, summaries: list, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self.closed:
            raise ValueError(f"the report of {self.run_dir} is closed")
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        if not self.events_path.exists():
            events.insert(0, _first_event())
        self._add(self.events_path, _records(events))

    def start(self, command: str, config: Mapping, hparams: Mapping) -> None:
        """Once, on a new run: the command and the configuration as text, the hyperparameters for
        the hparams tab."""
        bar = "&#124;"  # "|" would end a cell
        rows = [
            f"| {name} | {json.dumps(value, default=str).replace('|', bar)} |"
            for name, value in config.items()
        ]
        table = "\n".join(["| option | value |", "|---|---|", *rows])
        _, session_start, _ = self._summary.hparams(
            {name: _plain(value) for name, value in hparams.items()}, {}
        )
        texts = [
            self._summary.text("command", f"    {printable(command)}"),
            self._summary.text("configuration", table),
        ]
        self._write([*texts, session_start], step=0)

    def epoch(self, row: Mapping[str, float | None]) -> None:
        """One finished epoch: a line of metrics.csv and the scalars of TensorBoard, at step
        `row["epoch"]` (from 1).

        The row has the METRIC_FIELDS, no others (ValueError); None is an empty cell and no scalar.
        """
        if set(row) != set(METRIC_FIELDS):
            raise ValueError(
                f"an epoch's row has the fields {', '.join(METRIC_FIELDS)}; "
                f"not these: {', '.join(sorted(set(row) ^ set(METRIC_FIELDS)))}"
            )
        numbers = {name: None if row[name] is None else float(row[name]) for name in METRIC_FIELDS}
        epoch = int(row["epoch"])
        cells = [
            ""
            if number is None
            else repr(round(number, DECIMALS[name]) if name in DECIMALS else number)
            for name, number in numbers.items()
        ]
        line = ",".join([str(epoch), *cells[1:]]) + "\n"
        new = not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0
        self._add(
            self.metrics_path, ((",".join(METRIC_FIELDS) + "\n" if new else "") + line).encode()
        )
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
        self._scalars({tag: numbers[name] for tag, name in tags.items()}, epoch)

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        self._write(
            [
                self._summary.scalar(tag, value)
                for tag, value in values.items()
                if value is not None
            ],
            step,
        )

    def health(self, epoch: int, health: Mapping[str, "LevelHealth"]) -> None:
        """The attention health of an epoch as scalars attention/<level>/score_sd, entropy,
        gate_gradient."""
        self._scalars(
            {
                f"attention/{level}/{name}": getattr(each, name)
                for level, each in health.items()
                for name in ("score_sd", "entropy", "gate_gradient")
            },
            epoch,
        )

    def overlays(self, epoch: int, sheet: np.ndarray) -> None:
        """A contact sheet, (H, W, 3) uint8, at step `epoch`: a JPEG of high quality, as TensorBoard
        takes its checksums in Python, up to half a second for a megabyte, and a lossless file has
        several."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        encoded = io.BytesIO()
        Image.fromarray(sheet).save(encoded, "JPEG", quality=92, subsampling=0)
        image = Summary.Image(
            height=sheet.shape[0],
            width=sheet.shape[1],
            colorspace=3,
            encoded_image_string=encoded.getvalue(),
        )
        self._write(
            [Summary(value=[Summary.Value(tag=f"attention/{self.eval_name} images", image=image)])],
            epoch,
        )

    def finish(self, epoch: int, hparams: Mapping, metrics: Mapping[str, float]) -> None:
        """The end of a run, after `epoch`: the hparams tab shows it as finished, with `metrics` and
        the last curves as its columns.

        hparams are those of start; metrics are final values by name, also written as scalars
        final/<name> at that step. truncate_after takes all of this away again, for a run that is
        made longer.
        """
        final = {f"final/{name}": float(value) for name, value in metrics.items()}
        columns = [f"top1/{self.eval_name}", f"loss/{self.eval_name}", "top1/train", "loss/train"]
        # hparams() makes the columns (experiment), the start and the end of the session; start()
        # has written the second
        experiment, _, session_end = self._summary.hparams(
            {name: _plain(value) for name, value in hparams.items()},
            final | dict.fromkeys(columns, 0.0),
        )
        self._write([experiment, session_end], step=0)
        self._scalars(final, epoch)

    def close(self) -> None:
        """Nothing is pending at any time, so this only forbids further writing; it may be called
        twice."""
        self.closed = True


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.csv as numbers: epoch an int, the others floats, None for an empty
    cell.

    An unfinished last line (a killed run) is left out, unless it reads well: editors leave out the
    last line's end. Raises ValueError naming the line that cannot be read."""
    return [row for _, row in _lines_and_rows(path)]


def _lines_and_rows(path: Path) -> list[tuple[str, dict]]:
    """Each row of a metrics.csv as it is written, and as read_metrics returns it. Spreadsheets
    begin it with a mark of its encoding, and end it with blank lines."""
    text = path.read_bytes().decode("utf-8-sig", "replace")
    header, *lines = text.split("\n")
    if header.strip() != ",".join(METRIC_FIELDS) and (
        lines or header not in ",".join(METRIC_FIELDS)
    ):
        raise ValueError(f"{path}, line 1: not the names of the columns, {','.join(METRIC_FIELDS)}")
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            if line.replace(",", "").strip():
                cells = dict(zip(METRIC_FIELDS, line.strip().split(","), strict=True))
                rows.append(
                    (
                        line.strip(),
                        {
                            name: int(cell)
                            if name == "epoch"
                            else None
                            if cell == ""
                            else float(cell)
                            for name, cell in cells.items()
                        },
                    )
                )
        except ValueError:
            if number <= len(lines):  # else it is the unfinished one
                raise ValueError(f"{path}, line {number}: not a row of numbers") from None
    return rows


def truncate_after(run_dir: Path, epoch: int) -> None:
    """On resume: take everything after `epoch` out of metrics.csv and the event files, and heal
    what a crash left.

    With epoch -1 what start() wrote goes too, for a run that starts over. The event files become
    one. It sorts after those it replaces and ends in MERGED, so if we are stopped before they are
    removed, the next call knows that they are contained in it. Calling this twice is harmless, and
    so is calling it on a folder without a run. A TensorBoard that is running follows, except under
    --load_fast=false, where it has to be started anew.

    Event files that we did not write stay as they are. A metrics.csv that cannot be read is set
    aside.
    """
    run_dir = Path(run_dir)
    _cut_metrics(run_dir / "metrics.csv", epoch)
    files = _event_files(run_dir)
    merged_before = [index for index, path in enumerate(files) if path.name.endswith(MERGED)]
    live = files[merged_before[-1] :] if merged_before else files
    if live:
        replace_file(_new_event_path(run_dir, MERGED), lambda file: _merge(live, epoch, file))
    for path in files:
        path.unlink(missing_ok=True)


def _cut_metrics(path: Path, epoch: int) -> None:
    """Keep the header and the rows up to `epoch`, as they are."""
    if not os.path.lexists(path):
        return
    try:
        kept = [line for line, row in _lines_and_rows(path) if row["epoch"] <= epoch]
    except (ValueError, IsADirectoryError) as error:
        set_aside(
            path, f"cannot be read ({str(error).partition(', ')[2] or error}), so a new one begins"
        )
        return
    replace_file(
        path,
        lambda file: file.write(
            "".join(f"{line}\n" for line in [",".join(METRIC_FIELDS), *kept]).encode()
        ),
    )


def _merge(paths: list[Path], epoch: int, file: io.BufferedIOBase) -> None:
    """Write the summaries of several event files up to step `epoch` as one event file, one record
    at a time."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # The START has TensorBoard drop what it read from the files before, should a crash have left
    # them there
    file.write(
        _records([_first_event(), Event(step=0, session_log=SessionLog(status=SessionLog.START))])
    )
    for path in paths:
        for event in _summaries(path):
            if event.step <= epoch:
                file.write(_records([event]))


def _summaries(path: Path) -> Iterator:
    """The summary events of a file up to the end of the run, if it was finished there, or to a
    broken last record."""
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG

    for event in _events(path):
        # the first thing that finish() writes
        if any(value.tag == EXPERIMENT_TAG for value in event.summary.value):
            return
        if event.summary.value:
            yield event
