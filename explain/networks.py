"""Trained networks, from a checkpoint of this project or from torchvision."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import load_model, read_checkpoint, read_plain
from common.errors import UserError, one_line, printable
from common.hub import hub_weights
from data import eval_batch_size, to_input
from explain.maps import nearest_names


@dataclass
class TrainedNetwork:
    """A model with its classes, input size and normalization."""

    model: nn.Module
    class_names: tuple[str, ...]
    size: tuple[int, int]  # (height, width) of its input in pixels
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    description: str
    config: dict = field(default_factory=dict)  # of the run; empty for torchvision's
    device: torch.device = torch.device("cpu")

    def place_on(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device, memory_format=torch.channels_last)

    def batch(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, *size), the input of the network: the whole image, resized
        regardless of its aspect ratio, and normalized."""
        return to_input(images.to(self.device), self.mean, self.std, self.size)

    @property
    def batch_size(self) -> int:
        """Images per batch on its device."""
        return eval_batch_size(self.size, self.device)

    @torch.no_grad()
    def probabilities(self, batch: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes), on the CPU."""
        return self.model(batch).float().softmax(1).cpu()


# ---- sources ------------------------------------------------------------------------------------


def from_checkpoint(path: str) -> TrainedNetwork:
    """The network of a checkpoint. Raises UserError for a file that is not one of this project's
    checkpoints."""
    saved = read_checkpoint(path)
    config, class_names = saved["config"], tuple(saved["class_names"])
    height, width = map(int, saved["input_size"])
    return TrainedNetwork(
        model=load_model(saved),
        class_names=class_names,
        size=(height, width),
        mean=tuple(saved["mean"]),
        std=tuple(saved["std"]),
        description=f"{printable(path)}: {config['model']}, width {config['width']:g}, "
        f"{len(class_names)} classes, {height}x{width} px",
        config=config,
    )


def from_torchvision(arch: str, weights: str) -> TrainedNetwork:
    """A classifier of torchvision, with its weights of the name ``weights`` or with a state dict
    from a file. Input size and normalization are those of torchvision's weights. Raises UserError.
    """
    # imported here: it takes a second, and the networks of this project do without
    from torchvision import models

    known = models.list_models(module=models)
    if arch not in known:
        near = nearest_names(arch, known)
        raise UserError(f"--arch {arch}: torchvision has no such classifier; nearest: {near}", 2)
    available = models.get_model_weights(arch)
    if weights in available.__members__:
        entry = available[weights]
        # downloaded and checked here; torchvision then finds the file in the cache
        hub_weights(entry.url, "or --weights FILE takes weights of yours")
        model = models.get_model(arch, weights=entry)
        class_names = tuple(entry.meta["categories"])
    elif Path(weights).exists():
        entry = available["DEFAULT"]
        model, classes = load_classifier(arch, weights)
        class_names = tuple(entry.meta["categories"])
        if classes != len(class_names):
            class_names = tuple(f"class {i}" for i in range(classes))
    else:
        raise UserError(
            f"--weights {weights}: neither a file nor weights of torchvision's {arch}, which are "
            f"{', '.join(available.__members__)}",
            2,
        )
    preset = entry.transforms()
    side = preset.crop_size[0]
    return TrainedNetwork(
        model=model.eval(),
        class_names=class_names,
        size=(side, side),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        description=f"torchvision's {arch}, weights {weights}, {len(class_names)} classes, "
        f"{side}x{side} px",
    )


def load_classifier(arch: str, path: str) -> tuple[nn.Module, int]:
    """A classifier of torchvision with a state dict from a file, and its number of classes. Raises
    UserError."""
    from torchvision import models

    state = read_state(path)
    classes = len(list(state.values())[-1])
    try:
        model = models.get_model(arch, weights=None, num_classes=classes)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"--weights {path} does not fit torchvision's {arch}: {one_line(error)[:150]}"
        ) from None
    return model, classes


def read_state(path: str) -> dict[str, Tensor]:
    """A state dict, also one inside a checkpoint under "state_dict" or "model". Its code never
    runs. Raises UserError."""
    content = read_plain(path)
    for name in ("state_dict", "model"):
        content = content.get(name, content) if isinstance(content, dict) else content
    last = list(content.values())[-1:] if isinstance(content, dict) else []
    # the last tensor, whose length is the number of classes
    if not last or not torch.is_tensor(last[0]) or not last[0].ndim:
        raise UserError(f"{path} holds no state dict: save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in content.items()}


# ---- classes ------------------------------------------------------------------------------------


def find_class(text: str, names: tuple[str, ...]) -> int:
    """--target as a class index: a name, ignoring case, or else a number. Raises UserError with the
    nearest names."""
    wanted = folded(text.strip())
    matches = [i for i, name in enumerate(names) if folded(name) == wanted]
    if matches:
        return matches[0]
    if wanted.isascii() and wanted.isdigit():
        if len(wanted) < 20 and int(wanted) < len(names):
            return int(wanted)
        raise UserError(f"--target {text}: the classes are numbered 0 to {len(names) - 1}", 2)
    near = nearest_names(text, names)
    raise UserError(f"--target {text}: there is no such class; nearest: {near}", 2)


def folded(name: str) -> str:
    """A class name without case, its underscores as spaces."""
    return name.casefold().replace("_", " ")
