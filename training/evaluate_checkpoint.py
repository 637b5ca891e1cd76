"""--evaluate: loss, top-1, top-5 and the accuracy of each class, from a checkpoint alone; printed,
and as files."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from common.arguments import as_option, was_given
from common.checkpoint import load_model, read_checkpoint
from common.device import Precision, choose_device, choose_precision, device_name
from common.errors import UserError, printable
from common.fonts import drawable_names
from data import DataSource
from training.environment import command_line
from training.evaluation import (
    EvaluatedCheckpoint,
    OpenedCheckpoint,
    PredictionRecorder,
    evaluate,
    interval_95,
    mean_interval_95,
)
from training.evaluation_files import FILES, write_files
from training.task import Task

# The options that --evaluate takes; all else is the checkpoint's.
ALLOWED = (
    "data_dir",
    "num_workers",
    "device",
    "precision",
    "evaluate",
    "out",
    "sort",
    "attack",
    "attack_images",
)


def evaluate_checkpoint(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """Evaluate the checkpoint of --evaluate on the test set, print the results, then write them.
    Returns the exit status.

    Raises UserError for an option that contradicts the checkpoint, for other images, and for a
    folder that cannot be written to."""
    check_options(args, argv)
    opened = opened_checkpoint(task, args, argv)
    evaluated = evaluated_checkpoint(opened, command_line(argv))
    print_network(evaluated)
    print_result(evaluated)
    result, names = evaluated.result, evaluated.test.class_names
    sort = getattr(args, "sort", "accuracy")
    print_classes(names, result.class_counts, result.class_correct, sort)
    folder = Path(getattr(args, "out", evaluated.path.parent))
    print_files(folder, write_files(evaluated, folder))
    _, note = drawable_names(names)
    if note:
        print(f"note: {note}")
    return 0


def check_options(args: argparse.Namespace, argv: list[str]) -> None:
    """Raises UserError for an option that the checkpoint decides, and for an --out that is no
    folder."""
    ignored = [name for name in vars(args) if was_given(name, argv) and name not in ALLOWED]
    if ignored:
        options = ", ".join(map(as_option, ignored))
        raise UserError(
            f"--evaluate takes the run's settings from the checkpoint: leave out {options}", 2
        )
    if hasattr(args, "out"):
        folder = Path(args.out)
        for path in (folder, *folder.parents):
            if os.path.lexists(path) and not path.is_dir():
                raise UserError(f"--out {args.out}: {path} is not a folder", 2)


def opened_checkpoint(task: Task, args: argparse.Namespace, argv: list[str]) -> OpenedCheckpoint:
    """The checkpoint of --evaluate. Raises UserError."""
    given = ("data_dir", "num_workers")
    changes = {name: getattr(args, name) for name in given if was_given(name, argv)}
    precision = getattr(args, "precision", None)
    return open_checkpoint(task.data, args.evaluate, args.device, precision, changes)


def open_checkpoint(
    source: DataSource,
    path: str,
    device: str = "auto",
    precision: str | None = None,
    changes: Mapping[str, object] | None = None,
) -> OpenedCheckpoint:
    """A checkpoint of a network for the images of ``source``, the network on the device, and the
    test images.

    precision: the run's, where the device has it, unless one is named. changes: of the run's
    config, for where the images are. Raises UserError.
    """
    saved = read_checkpoint(path)
    config = saved["config"] | (changes or {})
    if config["dataset"] != source.name:
        raise UserError(f"{path} is a checkpoint of train_{config['dataset']}.py", 2)
    place = choose_device(device)
    torch.backends.cudnn.benchmark = True  # as in training
    asked = precision or precision_here(config["precision"], place)
    chosen = Precision(choose_precision(asked, place), place)
    model = load_model(saved).to(place, memory_format=torch.channels_last)
    _, test = source.sets(config, download=False)
    if tuple(saved["class_names"]) != test.class_names:
        raise UserError(f"{path} was trained on other classes than those of {test.source}")
    return OpenedCheckpoint(Path(path), saved, config, model, chosen, test)


def evaluated_checkpoint(opened: OpenedCheckpoint, command: str) -> EvaluatedCheckpoint:
    """Evaluate a checkpoint on its test images."""
    started, recorder = time.perf_counter(), PredictionRecorder()
    classes = len(opened.test.class_names)
    result = evaluate(
        opened.model, opened.batches(), classes, opened.precision, observe=recorder.observe
    )
    seconds = time.perf_counter() - started
    return EvaluatedCheckpoint(
        **vars(opened),
        result=result,
        predictions=recorder.predictions(),
        seconds=seconds,
        command=command,
    )


def precision_here(trained_in: str, device: torch.device) -> str:
    """A run's precision where this device has it, else "auto": emulated bf16 would seem to hang."""
    if trained_in == "fp16" and device.type == "cuda":
        return trained_in
    native = trained_in in ("fp32", choose_precision("auto", device))
    return trained_in if native else "auto"


# ---- what is printed ----------------------------------------------------------------------------


def print_network(opened: OpenedCheckpoint) -> None:
    """The checkpoint, and how long it was trained."""
    saved, config = opened.saved, opened.config
    average = ", moving average of the weights" if saved["ema"] else ""
    print(
        f"{opened.path}: {config['model']}, width {config['width']:g}, "
        f"after {opened.trained_for}{average}"
    )
    if saved["position"]["step"]:
        print(
            "It was saved in the middle of an epoch, so batch norm's statistics are not "
            "recalibrated yet: --resume to the epoch's end gives its accuracy."
        )


def print_result(evaluated: EvaluatedCheckpoint) -> None:
    """The images, and the results over all classes."""
    result, images, test = evaluated.result, len(evaluated.test), evaluated.test
    print(
        f"{images:,} test images ({test.source}), {device_name(evaluated.precision.device)}, "
        f"{evaluated.precision.name}, {evaluated.seconds:.1f} s"
    )
    print(f"loss {result.loss:.4f}   top-1 {result.top1:.2f} %   top-5 {result.top5:.2f} %")
    low, high = mean_interval_95(evaluated.predictions.losses)
    intervals = [f"loss {low:.4f} to {high:.4f}"]
    for name, percent in (("top-1", result.top1), ("top-5", result.top5)):
        low, high = interval_95(percent, images)
        intervals.append(f"{name} {low:.2f} to {high:.2f} %")
    print(f"95 % intervals: {', '.join(intervals)}\n")


def print_classes(
    names: tuple[str, ...], counts: list[int], correct: list[int], sort: str = "accuracy"
) -> None:
    """Top-1 of each class, by accuracy (worst first) or by name, in as many columns as fit 100
    characters."""
    names = tuple(map(printable, names))
    longest = max(len(name) for name in names)
    shares = [right / max(1, count) for right, count in zip(correct, counts, strict=True)]
    keys = {"accuracy": lambda i: (shares[i], names[i]), "name": lambda i: names[i]}
    cells = []
    for i in sorted(range(len(names)), key=keys[sort]):
        images = f"of {counts[i]}"
        cells.append(f"{names[i]:<{longest}} {100 * shares[i]:5.1f} % {images:<7}")
    columns = max(1, 100 // (longest + 16))
    print(f"top-1 of each class, {'by name' if sort == 'name' else 'worst first'}")
    for first in range(0, len(cells), columns):
        print("  ".join(cells[first : first + columns]).rstrip())
    print(flush=True)  # what follows may fail


def print_files(folder: Path, written: Mapping[str, Path | None]) -> None:
    """What ``write_files`` has written, and what for."""
    names = {name: path.name for name, path in written.items() if path}
    longest = max(map(len, names.values()))
    print(f"In {printable(folder)}:")
    for name, actual in names.items():
        print(f"  {actual:<{longest}}  {FILES[name].purpose}")
    missing = [name for name, path in written.items() if not path]
    if missing:
        print(f"  There are no mistakes to show in {' and '.join(missing)}.")
