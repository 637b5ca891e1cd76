"""TensorBoard's event files in a run's folder: append, read, cut back to a checkpoint."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.errors import printable
from common.files import replace_file

if TYPE_CHECKING:  # TensorBoard takes seconds to import and prints
    from tensorboard.compat.proto.event_pb2 import Event

FILE_VERSION = "brain.Event:2"  # in the first event of every file
# in the first event of every file that a Report writes: other programs' may lie beside them
WRITER = "learn-to-pay-attention"
# Tags that identify the files of the first version, which did not write that.
FIRST_TAGS = re.compile("command/text_summary|peak_memory_mib|attention/conv")
# ends the name of an event file that holds everything to keep of the files before it (by name)
MERGED = ".merged"

# TensorBoard draws one tag of several runs in one chart: the training curves are those of a run of
# their own, in this folder of the run's.
TRAIN = "train"
# Groups of tags, which TensorBoard sorts by name and of which it opens the first two.
RESULTS, RUN, ATTENTION = "results", "run", "spatial attention"
TOP1, TOP5, LOSS = "accuracy, top-1 %", "top-5 accuracy, %", "loss"  # in RESULTS
# ends the tags whose step is an optimizer step; that of all others is an epoch
BY_STEP = " by step"


def results_of(eval_name: str) -> str:
    """The group of accuracy and loss. Held-out images are not compared with the test set."""
    return RESULTS if eval_name == "test" else f"{RESULTS}, {eval_name}"


# ---- write --------------------------------------------------------------------------------------


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


def new_event_path(folder: Path, ending: str = "") -> Path:
    """An unused name that sorts after all event files of the folder, even if the clock was set back
    or two are made in one second."""
    stamps = [path.name.split("tfevents.")[-1].split(".")[0] for path in event_files(folder)]
    first = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])
    names = (
        f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}{ending}"
        for stamp in count(first)
    )
    return next(folder / name for name in names if not os.path.lexists(folder / name))


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


# ---- read ---------------------------------------------------------------------------------------


def event_files(folder: Path) -> list[Path]:
    """The event files that a Report has written, in the order in which TensorBoard reads them; none
    in a folder that does not exist."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if "tfevents" in path.name and path.is_file() and is_ours(path)
    )


def is_ours(path: Path) -> bool:
    """Whether a Report has written this event file."""
    for event in read_events(path):
        if event.HasField("source_metadata"):
            return event.source_metadata.writer == WRITER
        merged = path.name.endswith(MERGED) and event.HasField("session_log")
        if merged or any(FIRST_TAGS.match(value.tag) for value in event.summary.value):
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
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG

    for event in read_events(path):
        # what finish() writes; in older runs the columns of the hparams tab came first
        if any(
            value.tag in (EXPERIMENT_TAG, SESSION_END_INFO_TAG) for value in event.summary.value
        ):
            return
        if event.summary.value:
            yield event


# ---- cut back -----------------------------------------------------------------------------------


def truncate_events(run_dir: Path, epoch: int, step: int, eval_name: str) -> None:
    """Keep what the event files tell up to ``epoch``, and curves by step up to optimizer step
    ``step`` of the run.

    Those of a folder become one. It sorts after those it replaces and ends in MERGED, so if the
    process is stopped before they are removed, the next call knows that they are contained in it.
    The tags of an older run get the names and places of today."""
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG

    anew = (CONFIG_SUMMARY_TAG, SESSION_START_INFO_TAG)  # a resumed run writes them again
    places = old_places(eval_name)
    files = {folder: event_files(run_dir / folder) for folder in ("", TRAIN)}

    def kept(folder: str) -> Iterator[Event]:
        """What is to stay of a folder's events."""
        sources = [(folder, path) for path in since_merged(files[folder])]
        if not sources:  # an older run has its training curves among the others
            sources = [("", path) for path in since_merged(files[""])]
        for source, path in sources:
            for event in read_summaries(path):
                value = event.summary.value[0]  # a Report writes no more
                place, value.tag = places.get((source, value.tag), (source, value.tag))
                end = step if value.tag.endswith(BY_STEP) else epoch
                if place == folder and event.step <= end and value.tag not in anew:
                    yield event

    for folder in (TRAIN, ""):
        events = kept(folder)
        first = next(events, None)
        if first or files[folder]:
            (run_dir / folder).mkdir(exist_ok=True)
            merge(chain([first] if first else [], events), run_dir / folder)
    for path in [*files[TRAIN], *files[""]]:
        path.unlink(missing_ok=True)


def since_merged(paths: Sequence[Path]) -> Sequence[Path]:
    """The event files of a folder whose content counts: the last merged one and those after it."""
    merged = [index for index, path in enumerate(paths) if path.name.endswith(MERGED)]
    return paths[merged[-1] :] if merged else paths


def merge(events: Iterable[Event], folder: Path) -> None:
    """Write a merged event file, one record at a time."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # START makes TensorBoard drop what it read from the files before, should a crash have left them
    start = Event(step=0, session_log=SessionLog(status=SessionLog.START))

    def write(file: BinaryIO) -> None:
        file.write(to_records([first_event(), start]))
        for event in events:
            file.write(to_records([event]))

    replace_file(new_event_path(folder, MERGED), write)


def old_places(eval_name: str) -> dict[tuple[str, str], tuple[str, str]]:
    """{(folder, tag) of an older run: its folder and tag of today}."""
    names = {
        "learning_rate": f"{RUN}/learning rate",
        "images_per_second": f"{RUN}/images per second",
        "peak_memory_mib": f"{RUN}/peak memory, MiB",
        f"attention/{eval_name} images": f"{ATTENTION}/{eval_name.capitalize()} images",
    }
    for level in ("conv7", "conv10", "conv13"):
        for name in ("score_sd", "entropy", "gate_gradient"):
            names[f"attention/{level}/{name}"] = f"{ATTENTION}/{level}/{name}"
    places = {("", old): ("", new) for old, new in names.items()}
    for old, new in (("top1", TOP1), ("top5", TOP5), ("loss", LOSS)):
        tag = f"{results_of(eval_name)}/{new}"
        places |= {("", f"{old}/{eval_name}"): ("", tag), ("", f"{old}/train"): (TRAIN, tag)}
    return places
