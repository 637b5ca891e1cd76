"""Load pretrained weights (--init-from)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from attention_model import ConvBNReLU, Network
from common.checkpoint import inference_weights, read_checkpoint
from common.errors import UserError, one_line
from common.hub import hub_file, hub_weights

# torchvision's VGG16_BN_Weights.IMAGENET1K_V1; the name ends in the first digits of its sha256
IMAGENET_URL = "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Source:
    """Trained weights by this project's names, and the input that they were trained on."""

    description: str
    weights: dict[str, torch.Tensor]
    mean: tuple[float, ...]  # per channel, in [0, 1] units
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


def imagenet_file() -> Path:
    """Where torch keeps the ImageNet weights."""
    return hub_file(IMAGENET_URL)


def source_of(init_from: str, model: Network) -> Source | None:
    """The Source of --init-from: None for "none", ImageNet's (downloaded if missing), or a
    checkpoint's.

    Raises UserError where it cannot be read or does not fit the model's trunk."""
    if init_from == "none":
        return None
    if init_from == "imagenet":
        return Source(
            "ImageNet (torchvision's vgg16_bn)",
            trunk_weights(imagenet_weights(), model),
            IMAGENET_MEAN,
            IMAGENET_STD,
        )
    saved = read_checkpoint(init_from)
    config = saved["config"]
    return Source(
        f"{init_from} ({config['model']}, width {config['width']:g}, {config['dataset']})",
        inference_weights(saved),
        tuple(saved["mean"]),
        tuple(saved["std"]),
        tuple(saved["class_names"]),
    )


def imagenet_weights() -> dict[str, torch.Tensor]:
    """The state dict of torchvision's vgg16_bn, downloaded if missing. Raises UserError."""
    return hub_weights(
        IMAGENET_URL,
        "or start from a checkpoint of train_cifar100.py (--init-from RUN/last.pt) or from "
        "nothing (--init-from none)",
    )


def trunk_weights(weights: dict[str, torch.Tensor], model: Network) -> dict[str, torch.Tensor]:
    """The features of torchvision's vgg16_bn under the names of the pooled trunk, which has the
    same layers.

    Raises UserError where they do not fit."""
    if not model.is_pooled:
        raise UserError(
            "ImageNet weights fit the pooled trunk: add --set trunk=pooled, or use another "
            "--init-from",
            2,
        )
    units = [name for name, module in model.trunk.named_modules() if isinstance(module, ConvBNReLU)]
    named = {}
    try:
        convs = {
            int(name.split(".")[1])
            for name, value in weights.items()
            if name.startswith("features.") and value.ndim == 4
        }
        for unit, number in zip(units, sorted(convs), strict=True):
            for leaf in ("weight", "bias"):
                conv = f"{model.TRUNK}.{unit}.conv.{leaf}"
                named[conv] = weights[f"features.{number}.{leaf}"]
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                norm = f"{model.TRUNK}.{unit}.norm.{leaf}"
                named[norm] = weights[f"features.{number + 1}.{leaf}"]
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{imagenet_file()} does not hold torchvision's vgg16_bn ({one_line(error)[:80]}). "
            f"Move it away and start again, to have it downloaded"
        ) from None
    return named


def transfer(model: Network, source: Source, class_names: tuple[str, ...]) -> frozenset[str]:
    """Copy every weight that has the same name and shape, and print what was copied and what was
    not. Returns the names. The layers of the classes are only copied for the same classes.

    Raises UserError where no filter fits."""
    own = model.state_dict()
    head = {id(p) for layer in model.class_layers() for p in layer.parameters()}
    of_classes = {name for name, p in model.named_parameters() if id(p) in head}
    same_classes = source.class_names == class_names
    loaded = {
        name: value
        for name, value in source.weights.items()
        if (same_classes or name not in of_classes)
        and name in own
        and own[name].shape == value.shape
    }
    if not any(value.ndim > 1 for value in loaded.values()):
        raise UserError(
            f"--init-from: no filter of {source.description} fits this network "
            f"(--width {model.width:g} here)"
        )
    model.load_state_dict(loaded, strict=False)
    fresh = {}
    for name, value in own.items():
        if name not in loaded and not name.endswith("num_batches_tracked"):
            fresh.setdefault(layer_of(name), why_fresh(value, source.weights.get(name)))
    reasons = [f"{layer} ({reason})" for layer, reason in sorted(fresh.items())]
    unused = [n for n in source.weights if n not in loaded]
    print(
        f"--init-from {source.description}: {len(loaded)} of {len(own)} tensors loaded; "
        f"starting fresh: {', '.join(reasons) or 'nothing'}; "
        f"not used: {', '.join(layers(unused)) or 'nothing'}"
    )
    return frozenset(loaded)


def why_fresh(own: torch.Tensor, given: torch.Tensor | None) -> str:
    """Why a weight of the network was not taken from the source, which has ``given``."""
    if given is None:
        return "not there"
    if given.shape != own.shape:
        return f"{' x '.join(map(str, given.shape))} there, {' x '.join(map(str, own.shape))} here"
    return "other classes"


def layers(names: Iterable[str]) -> list[str]:
    """The layers of these parameters by name, sorted, once each."""
    return sorted({layer_of(name) for name in names})


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]
