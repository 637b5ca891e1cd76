"""A trained network with its images, and the file of what was measured on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from attention_model import Network
from common.checkpoint import load_model, read_checkpoint
from common.device import Precision, choose_device, choose_precision
from common.errors import UserError
from common.files import free_path, replace_file
from data import SOURCES, ImageSet, eval_batches
from training.environment import command_line, environment
from training.evaluate_checkpoint import precision_here


@dataclass(frozen=True)
class Trained:
    """A checkpoint's network on its device, in evaluation mode."""

    path: Path
    saved: dict  # the checkpoint's content, see common/checkpoint.py
    model: Network
    precision: Precision

    @property
    def config(self) -> dict:
        """The run's."""
        return self.saved["config"]

    def sets(self, data_dir: str) -> tuple[ImageSet, ImageSet]:
        """The run's (train, test). Raises UserError where they are not in ``data_dir``."""
        source = SOURCES[self.config["dataset"]]
        train, test = source.sets(self.config | {"data_dir": data_dir}, download=False)
        if test.class_names != tuple(self.saved["class_names"]):
            raise UserError(f"{self.path} was trained on other classes than those of {test.source}")
        return train, test

    def batches(
        self, images: ImageSet, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(input (N, 3, H, W), labels (N,)) of the images in order, normalized by the checkpoint's
        statistics and resized to its input size, or to ``size``."""
        saved, device = self.saved, self.precision.device
        size = size or saved["input_size"]
        return eval_batches(images, device, saved["mean"], saved["std"], size)


def load_trained(path: Path | str, device: str = "auto", precision: str | None = None) -> Trained:
    """precision: that of the run, where the device has it, unless another is named. Raises
    UserError."""
    saved, where = read_checkpoint(path), choose_device(device)
    name = choose_precision(precision or precision_here(saved["config"]["precision"], where), where)
    model = load_model(saved).to(where, memory_format=torch.channels_last).eval()
    return Trained(Path(path), saved, model, Precision(name, where))


def write_record(trained: Trained, name: str, results: dict) -> Path:
    """Write ``results`` and how they were made beside the checkpoint, to the file ``name``; another
    program's file of that name stays, and ours gets a number. Returns the path."""
    config = trained.config
    here = environment(trained.precision.device)
    record = {
        "experiment": name.removesuffix(".json"),
        "checkpoint": str(trained.path),
        **{key: config[key] for key in ("model", "width", "epochs", "seed")},
        "precision": trained.precision.name,
        **{key: here[key] for key in ("device", "threads", "torch", "git_commit")},
        "command": command_line(sys.argv[1:]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **results,
    }
    path = free_path(trained.path.parent / name, lambda path: is_record(path, record["experiment"]))
    content = json.dumps(record, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write(content.encode()))
    return path


def is_record(path: Path, experiment: str) -> bool:
    """Whether ``write_record`` wrote this file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("experiment") == experiment
