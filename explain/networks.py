"""A trained network with all that is needed to show it a picture, from a checkpoint of ours or from
torchvision."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import load_model, read_checkpoint, read_plain
from common.errors import UserError, one_line, printable
from common.hub import hub_weights
from data import eval_batch_size, to_input


@dataclass
class TrainedNetwork:
    """A trained network with all that is needed to show it a picture."""

    model: nn.Module
    class_names: tuple[str, ...]
    size: tuple[int, int]  # (height, width) in pixels that it sees
    mean: tuple[float, ...]  # of each channel, in [0, 1] units
    std: tuple[float, ...]
    description: str
    config: dict = field(default_factory=dict)  # of the run, for our networks
    device: torch.device = torch.device("cpu")

    def place_on(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device, memory_format=torch.channels_last)

    def batch(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, *size) as the network takes it: the whole picture, squashed
        to its size."""
        return to_input(images.to(self.device), self.mean, self.std, self.size)

    @property
    def batch_size(self) -> int:
        return eval_batch_size(self.size, self.device)

    @torch.no_grad()
    def probabilities(self, batch: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes), on the CPU."""
        return self.model(batch).float().softmax(1).cpu()


def from_checkpoint(path: str) -> TrainedNetwork:
    """Raises UserError for a file that is not a checkpoint of ours."""
    content = read_checkpoint(path)
    config = content["config"]
    height, width = map(int, content["input_size"])
    return TrainedNetwork(
        load_model(content),
        tuple(content["class_names"]),
        (height, width),
        tuple(content["mean"]),
        tuple(content["std"]),
        f"{printable(path)}: {config['model']}, width {config['width']:g}, "
        f"{len(content['class_names'])} classes, {height}x{width} px",
        config,
    )


def from_torchvision(arch: str, weights: str) -> TrainedNetwork:
    """A classifier of torchvision's with its weights of that name, or with a state dict from a
    file; the input is as of torchvision's own weights. Raises UserError."""
    from torchvision import (
        models,  # here, not above: it takes a second, and our own networks do without
    )

    known = models.list_models(module=models)
    if arch not in known:
        raise UserError(
            f"--arch {arch}: torchvision has no such classifier; near it: {nearest(arch, known)}", 2
        )
    kinds = models.get_model_weights(arch)
    named = weights in kinds.__members__
    kind = kinds[weights] if named else kinds["DEFAULT"]
    categories, preset = tuple(kind.meta["categories"]), kind.transforms()
    if named:
        # checked; torchvision then finds them there
        hub_weights(kind.url, "or --weights FILE takes weights of yours")
        model = models.get_model(arch, weights=kind)
    elif not Path(weights).exists():
        raise UserError(
            f"--weights {weights}: neither a file nor weights of torchvision's {arch}, which are "
            f"{', '.join(kinds.__members__)}",
            2,
        )
    else:
        state = read_state(weights)
        classes = len(list(state.values())[-1])
        if classes != len(categories):
            categories = tuple(f"class {i}" for i in range(classes))
        try:
            model = models.get_model(arch, weights=None, num_classes=classes)
            model.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"--weights {weights} does not fit torchvision's {arch}: {one_line(error)[:150]}"
            ) from None
    side = preset.crop_size[0]
    return TrainedNetwork(
        model.eval(),
        categories,
        (side, side),
        tuple(preset.mean),
        tuple(preset.std),
        f"torchvision's {arch}, weights {weights}, {len(categories)} classes, {side}x{side} px",
    )


def read_state(path: str) -> dict[str, Tensor]:
    """A state dict, also one inside a checkpoint under "state_dict" or "model". Raises UserError;
    code never runs."""
    content = read_plain(path)
    for name in ("state_dict", "model"):
        content = content.get(name, content) if isinstance(content, dict) else content
    if (
        not isinstance(content, dict)
        or not content
        or not all(torch.is_tensor(value) and value.ndim for value in list(content.values())[-1:])
    ):
        raise UserError(f"{path} holds no state dict: save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in content.items()}


def nearest(word: str, words: Iterable[str]) -> str:
    """The most similar of the words, whatever their case, for an error message."""
    plain = {each.casefold(): each for each in reversed(list(words))}
    found = difflib.get_close_matches(word.casefold(), plain, 3, 0.4) or list(plain)[-3:]
    return ", ".join(plain[each] for each in found)


def find_class(text: str, names: tuple[str, ...]) -> int:
    """--target as a class index: a name in whatever case, or else a number. Raises UserError with
    the nearest names."""
    plain = text.strip().casefold().replace("_", " ")
    found = [i for i, name in enumerate(names) if name.casefold().replace("_", " ") == plain]
    if found:
        return found[0]
    if plain.isascii() and plain.isdigit():
        if len(plain) < 20 and int(plain) < len(names):
            return int(plain)
        raise UserError(f"--target {text}: the classes are numbered 0 to {len(names) - 1}", 2)
    raise UserError(f"--target {text}: there is no such class; near it: {nearest(text, names)}", 2)
