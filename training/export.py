"""--export: the trained network of a checkpoint as one file that runs without this project: .pt2
for PyTorch, .onnx for other runtimes.

The network in it takes RGB images in [0, 1], any number at a time: normalization is inside. It is
written in float32 and on the CPU, whatever the run used: the same file on every machine, and an
exact one. The file is loaded again and compared with the network before it gets its name.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from common.arguments import as_option, was_given
from common.checkpoint import load_model, read_checkpoint
from common.errors import UserError, is_oom_error, one_line, printable
from common.files import make_folders, remove_made, replace_file
from explain.pictures import SOFTWARE
from training.environment import command_line, git_commit
from training.export_formats import FORMATS, INPUT, Format, NormalizingNetwork

ALLOWED = ("evaluate", "export")  # the options that --export takes
BATCHES = (1, 3)  # of the comparison: sizes of the batches of random images
TOLERANCE = 1e-4  # of the comparison; for logits beyond 1, relative to the largest one


def export_checkpoint(args: argparse.Namespace, argv: list[str]) -> int:
    """Write the network of --evaluate's checkpoint to the file of --export, and print how to use
    it. Returns the exit status.

    Raises UserError for another ending, a file that --export did not write, an option without
    effect, a missing package, and a file that differs from the network; OSError where it cannot be
    written."""
    path = Path(args.export)
    check_path(path)
    check_options(args, argv)
    file_format = FORMATS[path.suffix]
    file_format.require()
    check_existing(path, file_format)
    saved = read_checkpoint(args.evaluate)
    network = NormalizingNetwork(load_model(saved), saved["mean"], saved["std"])
    print_network(args.evaluate, saved)
    sample = sample_of(network, saved["input_size"])
    metadata = metadata_of(network, saved, sample) | {
        "checkpoint": printable(Path(args.evaluate).absolute()),
        "command": printable(command_line(argv)),
    }
    content = file_format.content(network, saved["input_size"], metadata)
    comparison = write_compared(path, content, file_format, sample)
    print_export(path, file_format, metadata, comparison)
    return 0


# ---- checks -------------------------------------------------------------------------------------


def check_path(path: Path) -> None:
    """Raises UserError for another ending, and for a parent that is no folder."""
    if path.suffix not in FORMATS:
        raise UserError(
            f"--export {path}: the name must end in .pt2 (PyTorch's torch.export) or .onnx", 2
        )
    for folder in path.parents:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"--export {path}: {folder} is not a folder", 2)


def check_options(args: argparse.Namespace, argv: list[str]) -> None:
    """Raises UserError for an option that would have no effect."""
    ignored = [name for name in vars(args) if was_given(name, argv) and name not in ALLOWED]
    if ignored:
        raise UserError(
            "--export takes all settings from the checkpoint, and writes float32 on the CPU: "
            f"leave out {', '.join(map(as_option, ignored))}",
            2,
        )


def check_existing(path: Path, file_format: Format) -> None:
    """Raises UserError where the name is taken by anything but an earlier export."""
    if not os.path.lexists(path):
        return
    # not through a link: what it points to has a name that was not given
    if path.is_symlink() or not path.is_file() or not is_own(path, file_format):
        raise UserError(
            f"--export {path} is there already, and not written by --export: give another name", 2
        )


def is_own(path: Path, file_format: Format) -> bool:
    """Whether --export has written this file."""
    try:
        return file_format.metadata(path).get("software") == SOFTWARE
    except Exception:  # of any class: it may be any file
        return False


# ---- what the network does ----------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Random images, the same every time, and the network's outputs for them."""

    batches: list[Tensor]  # (N, 3, H, W) in [0, 1] each
    outputs: list[dict[str, Tensor]]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each output, without the batch."""
        return {name: output.shape[1:] for name, output in self.outputs[0].items()}


@torch.no_grad()
def sample_of(network: NormalizingNetwork, size: Sequence[int]) -> Sample:
    """Random images of (height, width) in batches of BATCHES.

    Raises UserError where an output is not finite: nothing equals it."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, 3, *size, generator=generator) for count in BATCHES]
    outputs = [network(images) for images in batches]
    if not all(output.isfinite().all() for each in outputs for output in each.values()):
        raise UserError(
            "the network's outputs are not finite numbers, so its training diverged: "
            "export another checkpoint"
        )
    return Sample(batches, outputs)


def metadata_of(network: NormalizingNetwork, saved: dict, sample: Sample) -> dict:
    """What a file says about its network: plain values."""
    config, size, roles = saved["config"], list(saved["input_size"]), network.roles()
    return {
        "software": SOFTWARE,
        "model": config["model"],
        "width": config["width"],
        "dataset": config["dataset"],
        "class_names": list(saved["class_names"]),
        "input_size": size,
        "inputs": {
            INPUT: f"{shape_text((3, *size))} float32, RGB in [0, 1]: {part_seen(config)}, "
            "resized; normalization is inside"
        },
        "outputs": {
            name: f"{shape_text(shape)}, {roles[name]}" for name, shape in sample.shapes.items()
        },
        "mean": list(saved["mean"]),
        "std": list(saved["std"]),
        "epoch": saved["position"]["epoch"],
        "moving_average": bool(saved["ema"]),
        "torch": torch.__version__,
        "git_commit": git_commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def part_seen(config: dict) -> str:
    """The part of a picture that the network was trained on."""
    crop = config.get("crop", "whole")
    if crop == "box":
        return f"the object's box with a margin of {config['margin']:g} of its longer side"
    return "the centered square" if crop == "center" else "the whole picture"


def shape_text(shape: Sequence[int]) -> str:
    """(3, 32, 32) -> "(batch, 3, 32, 32)"."""
    return f"({', '.join(map(str, ('batch', *shape)))})"


# ---- write and compare --------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How the network of a file compares with the one that was exported."""

    runtime: str
    difference: float  # the largest one of all outputs


def write_compared(path: Path, content: bytes, file_format: Format, sample: Sample) -> Comparison:
    """Write a file under a temporary name, load it again and compare; only then does it get its
    name. Missing folders are made.

    Raises UserError where it differs, and OSError; nothing is left then."""
    comparison = None

    def write(file: BinaryIO) -> None:
        nonlocal comparison
        file.write(content)
        file.flush()
        comparison = compare(Path(file.name), path, file_format, sample)

    made = make_folders(path.parent)
    try:
        replace_file(path, write)
    except BaseException:
        remove_made(made)
        raise
    return comparison


@torch.no_grad()
def compare(temporary: Path, path: Path, file_format: Format, sample: Sample) -> Comparison:
    """Load the file that will be ``path`` and run it on the sample. Raises UserError where its
    outputs are not the network's."""
    try:
        loaded = file_format.load(temporary)
        outputs = [loaded.run(images) for images in sample.batches]
    except Exception as error:  # of any class: every runtime has its own
        if isinstance(error, OSError) or is_oom_error(error):
            raise
        raise UserError(
            f"{path} was not written: it could not be loaded and run again "
            f"({one_line(error)[:200]}). {file_format.advice}"
        ) from error
    differences = [
        checked_difference(name, each[name], expected[name], path, file_format)
        for each, expected in zip(outputs, sample.outputs, strict=True)
        for name in expected
    ]
    return Comparison(loaded.runtime, max(differences))


def checked_difference(
    name: str, output: Tensor, expected: Tensor, path: Path, file_format: Format
) -> float:
    """The largest difference in an output. Raises UserError where it is above TOLERANCE."""
    if output.shape == expected.shape:
        difference = (output - expected).abs().max().item()
        # rounding grows with the logits
        if difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            return difference
        what = f"differs from the network's by {difference:.2g}"
    else:
        what = f"has shape {tuple(output.shape)}, the network's {tuple(expected.shape)}"
    raise UserError(f"{path} was not written: its {name} {what}. {file_format.advice}")


# ---- what is printed ----------------------------------------------------------------------------


def print_network(checkpoint: str, saved: dict) -> None:
    """What is exported."""
    config, position = saved["config"], saved["position"]
    average = ", moving average of the weights" if saved["ema"] else ""
    print(
        f"{printable(checkpoint)}: {config['model']}, width {config['width']:g}, "
        f"after {position['epoch']} of {config['epochs']} epochs{average}"
    )
    if position["step"]:
        print(
            "It was saved in the middle of an epoch, so batch norm's statistics are not "
            "recalibrated yet: --resume to the epoch's end gives a better network."
        )


def print_export(path: Path, file_format: Format, metadata: dict, comparison: Comparison) -> None:
    """The file, its input and outputs, the comparison, and how to run it."""
    mib = path.stat().st_size / 2**20
    print(f"{printable(path)}: {mib:.1f} MiB, float32, {file_format.description}")
    for kind in ("inputs", "outputs"):
        for name, text in metadata[kind].items():
            print(f"  {kind[:-1]:<6}  {name:<{len(INPUT)}}  {text}")
    print(
        f"Loaded again and run on {sum(BATCHES)} random images ({comparison.runtime}): "
        f"the largest difference from the network is {comparison.difference:.2g}."
    )
    print("To run it without this project:")
    for line in file_format.usage(path, metadata["input_size"], list(metadata["outputs"])):
        print(f"  {line}")
