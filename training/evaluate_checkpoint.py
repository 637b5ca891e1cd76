"""--evaluate: loss, top-1, top-5 and the accuracy of each class, from a checkpoint alone."""

from __future__ import annotations

import argparse
import time

import torch

from common.arguments import as_option, was_given
from common.checkpoint import load_model, read_checkpoint
from common.device import Precision, choose_device, choose_precision, device_name
from common.errors import UserError, printable
from data import eval_batches
from training.evaluation import evaluate
from training.task import Task


def evaluate_checkpoint(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """Evaluate the checkpoint of --evaluate on the test set and print the results. Returns the exit
    status.

    Raises UserError for an option that contradicts the checkpoint, and for other images."""
    allowed = ("data_dir", "num_workers", "device", "precision", "evaluate")
    ignored = [name for name in vars(args) if was_given(name, argv) and name not in allowed]
    if ignored:
        options = ", ".join(map(as_option, ignored))
        raise UserError(
            f"--evaluate takes the run's settings from the checkpoint: leave out {options}", 2
        )
    saved = read_checkpoint(args.evaluate)
    config = saved["config"] | {
        name: getattr(args, name) for name in ("data_dir", "num_workers") if was_given(name, argv)
    }
    if config["dataset"] != task.dataset:
        raise UserError(f"{args.evaluate} is a checkpoint of train_{config['dataset']}.py", 2)
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True  # as in training
    asked = getattr(args, "precision", precision_here(config["precision"], device))
    precision = choose_precision(asked, device)
    model = load_model(saved).to(device, memory_format=torch.channels_last)
    _, test = task.data.sets(config, download=False)
    if tuple(saved["class_names"]) != test.class_names:
        raise UserError(f"{args.evaluate} was trained on other classes than those of {test.source}")
    started = time.perf_counter()
    batches = eval_batches(test, device, saved["mean"], saved["std"], saved["input_size"])
    result = evaluate(model, batches, len(test.class_names), Precision(precision, device))
    seconds = time.perf_counter() - started
    average = ", moving average of the weights" if saved["ema"] else ""
    print(
        f"{args.evaluate}: {config['model']}, width {config['width']:g}, "
        f"after epoch {saved['position']['epoch']} of {config['epochs']}{average}"
    )
    if saved["position"]["step"]:
        print(
            "It was saved in the middle of an epoch, so batch norm's statistics are not "
            "recalibrated yet: --resume to the epoch's end gives its accuracy."
        )
    print(
        f"{len(test):,} test images ({test.source}), {device_name(device)}, {precision}, "
        f"{seconds:.1f} s"
    )
    print(f"loss {result.loss:.4f}   top-1 {result.top1:.2f} %   top-5 {result.top5:.2f} %\n")
    print_classes(test.class_names, result.class_counts, result.class_correct)
    return 0


def precision_here(trained_in: str, device: torch.device) -> str:
    """A run's precision where this device has it, else "auto": emulated bf16 would seem to hang."""
    if trained_in == "fp16" and device.type == "cuda":
        return trained_in
    native = trained_in in ("fp32", choose_precision("auto", device))
    return trained_in if native else "auto"


def print_classes(names: tuple[str, ...], counts: list[int], correct: list[int]) -> None:
    """Top-1 of each class, worst first, in as many columns as fit 100 characters."""
    names = tuple(map(printable, names))
    longest = max(len(name) for name in names)
    order = sorted(range(len(names)), key=lambda i: (correct[i] / max(1, counts[i]), names[i]))
    cells = []
    for i in order:
        percent, images = 100 * correct[i] / max(1, counts[i]), f"of {counts[i]}"
        cells.append(f"{names[i]:<{longest}} {percent:5.1f} % {images:<7}")
    columns = max(1, 100 // (longest + 16))
    print("top-1 of each class, worst first")
    for first in range(0, len(cells), columns):
        print("  ".join(cells[first : first + columns]).rstrip())
