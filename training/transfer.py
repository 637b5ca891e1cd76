"""Load pretrained weights (--init-from)."""

from __future__ import annotations

import dataclasses
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
    """Trained weights by the names they have here, and the input that they were trained on."""

    description: str
    weights: dict[str, torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


def imagenet_file() -> Path:
    return hub_file(IMAGENET_URL)


def source_of(init_from: str, model: Network) -> Source | None:
    """The Source that --init-from names: None for "none", ImageNet's (fetched when it isn't there),
    or a checkpoint's.

    Raises UserError."""
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
    """torchvision's vgg16_bn. Raises UserError."""
    return hub_weights(
        IMAGENET_URL,
        "or start from a checkpoint of train_cifar100.py (--init-from RUN/last.pt) or from "
        "nothing (--init-from none)",
    )


def trunk_weights(weights: dict, model: Network) -> dict[str, torch.Tensor]:
    """torchvision's vgg16_bn features under the names of our pooled trunk, whose layers are the
    same one for one.

    Raises UserError where they don't fit."""
    if not model.is_pooled:
        raise UserError(
            "ImageNet weights fit the pooled trunk: add --set trunk=pooled, or use another --init-from",
            2,
        )
    units = [name for name, module in model.trunk.named_modules() if isinstance(module, ConvBNReLU)]
    try:
        places = sorted(
            {
                int(name.split(".")[1])
                for name, value in weights.items()
                if name.startswith("features.") and value.ndim == 4
            }
        )
        named = {}
        for unit, place in zip(units, places, strict=True):
            for ours, theirs in (
                (f"{model.TRUNK}.{unit}.conv", place),
                (f"{model.TRUNK}.{unit}.norm", place + 1),
            ):
                named |= {
                    f"{ours}.{leaf}": weights[f"features.{theirs}.{leaf}"]
                    for leaf in ("weight", "bias")
                }
                if ours.endswith("norm"):
                    named |= {
                        f"{ours}.{leaf}": weights[f"features.{theirs}.{leaf}"]
                        for leaf in ("running_mean", "running_var")
                    }
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{imagenet_file()} does not hold torchvision's vgg16_bn ({one_line(error)[:80]}). Move it away "
            f"and start again, to have it downloaded"
        ) from None
    return named


def transfer(model: Network, source: Source, class_names: tuple[str, ...]) -> frozenset[str]:
    """Copy every weight that has the same name and shape, say what was copied and what wasn't, and
    return the names. The head goes over only when the classes are the same ones.

    Raises UserError when nothing fits."""
    own = model.state_dict()
    head = {id(p) for layer in model.class_layers() for p in layer.parameters()}
    of_classes = {name for name, p in model.named_parameters() if id(p) in head}
    given = {
        name: value
        for name, value in source.weights.items()
        if source.class_names == class_names or name not in of_classes
    }
    fits = {
        name: value
        for name, value in given.items()
        if name in own and own[name].shape == value.shape
    }
    if not any(value.ndim > 1 for value in fits.values()):
        raise UserError(
            f"--init-from: no filter of {source.description} fits this network (--width {model.width:g} here)"
        )
    model.load_state_dict(fits, strict=True)
    fresh = layers(
        name for name in own if name not in fits and not name.endswith("num_batches_tracked")
    )
    unused = layers(name for name in source.weights if name not in fits)
    print(
        f"--init-from {source.description}: {len(fits)} of {len(own)} tensors loaded; starting fresh: "
        f"{', '.join(fresh) or 'nothing'}; not used: {', '.join(unused) or 'nothing'}"
    )
    return frozenset(fits)


def layers(names) -> list[str]:
    """Parameter names -> the names of their layers, sorted, once each."""
    return sorted({name.rpartition(".")[0] for name in names})
