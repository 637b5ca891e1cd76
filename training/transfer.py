"""--init-from: where a new run's weights come from, and which of them go over."""
from __future__ import annotations

import dataclasses
import http.client
import os
import pickle
import socket
import sys
from pathlib import Path

import torch
from torch import nn

from attention_model import ConvUnit
from download import SOCKET_TIMEOUT
from image_files import one_line
from training import checkpoint
from training.options import UserError

# torchvision's VGG16_BN_Weights.IMAGENET1K_V1; the name ends in the first digits of its sha256
IMAGENET_URL = "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = ("classifier.linears.", "classifier.weight", "classifier.bias")     # the layers that end in the classes


@dataclasses.dataclass(frozen=True)
class Source:
    """Trained weights by the names they have here, and the input that they were trained on."""
    what: str
    weights: dict[str, torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


def imagenet_file() -> Path:
    return hub_file(IMAGENET_URL)


def source_of(init_from: str, model: nn.Module) -> Source | None:
    """The Source that --init-from names: None for "none", ImageNet's (fetched when it isn't there), or a checkpoint's.

    Raises UserError."""
    if init_from == "none":
        return None
    if init_from == "imagenet":
        return Source("ImageNet (torchvision's vgg16_bn)", trunk_weights(imagenet_weights(), model), IMAGENET_MEAN,
                      IMAGENET_STD)
    content = checkpoint.read_checkpoint(init_from)
    config = content["config"]
    return Source(f"{init_from} ({config['model']}, width {config['width']:g}, {config['dataset']})",
                  checkpoint.best_weights(content), tuple(content["mean"]), tuple(content["std"]),
                  tuple(content["class_names"]))


def imagenet_weights() -> dict[str, torch.Tensor]:
    """torchvision's vgg16_bn. Raises UserError."""
    return hub_weights(IMAGENET_URL, "or start from a checkpoint of train_cifar100.py (--init-from RUN/last.pt) or from "
                                     "nothing (--init-from none)")


def hub_file(url: str) -> Path:
    """Where torch keeps the weights of that address (TORCH_HOME moves it)."""
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(name) == "":  # not set, by accident; torch would take the current folder
            del os.environ[name]
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def hub_weights(url: str, otherwise: str) -> dict[str, torch.Tensor]:
    """A state dict from torch's cache or its server, whose code never runs. The cache holds whole files only.

    Raises UserError, which ends in what else can be done."""
    path, timeout = hub_file(url), socket.getdefaulttimeout()
    by_hand = f"Fetch {url} yourself and put it at {path}, {otherwise}"
    there = path.is_file()
    if not there:
        print(f"downloading {url} to {path}", flush=True)
    try:
        socket.setdefaulttimeout(SOCKET_TIMEOUT)    # torch.hub sets none: a silent server would hold us for ever
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True,
                                                  progress=sys.stderr is not None and sys.stderr.isatty())
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError,
            http.client.HTTPException) as error:
        if there:
            raise UserError(f"{path} is damaged ({one_line(error)[:100]}). Move it away and start again, to have it "
                            f"downloaded. {by_hand}") from None
        raise UserError(f"the ImageNet weights could not be downloaded ({one_line(error)[:100]}). {by_hand}") from None
    finally:
        socket.setdefaulttimeout(timeout)


def trunk_weights(weights: dict, model: nn.Module) -> dict[str, torch.Tensor]:
    """torchvision's vgg16_bn features under the names of our pooled trunk, whose layers are the same one for one.

    Raises UserError where they don't fit."""
    if "block2" not in model.trunk.pools:
        raise UserError("ImageNet weights fit the pooled trunk: add --set trunk=pooled, or use another --init-from", 2)
    units = [name for name, module in model.trunk.named_modules() if isinstance(module, ConvUnit)]
    try:
        places = sorted({int(name.split(".")[1]) for name, value in weights.items()
                         if name.startswith("features.") and value.ndim == 4})
        named = {}
        for unit, place in zip(units, places, strict=True):
            for ours, theirs in ((f"trunk.{unit}.conv", place), (f"trunk.{unit}.norm", place + 1)):
                named |= {f"{ours}.{leaf}": weights[f"features.{theirs}.{leaf}"] for leaf in ("weight", "bias")}
                if ours.endswith("norm"):
                    named |= {f"{ours}.{leaf}": weights[f"features.{theirs}.{leaf}"]
                              for leaf in ("running_mean", "running_var")}
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{imagenet_file()} does not hold torchvision's vgg16_bn ({one_line(error)[:80]}). Move it away "
                        f"and start again, to have it downloaded") from None
    return named


def transfer(model: nn.Module, source: Source, class_names: tuple[str, ...]) -> frozenset[str]:
    """Copy every weight that has the same name and shape, say what was copied and what wasn't, and return the names. The
    head goes over only when the classes are the same ones.

    Raises UserError when nothing fits."""
    own = model.state_dict()
    given = {name: value for name, value in source.weights.items()
             if source.class_names == class_names or not name.startswith(HEADS)}
    fits = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not any(value.ndim > 1 for value in fits.values()):
        raise UserError(f"--init-from: no filter of {source.what} fits this network (--width {width_of(model):g} here)")
    model.load_state_dict(fits, strict=False)
    fresh = layers(name for name in own if name not in fits and not name.endswith("num_batches_tracked"))
    unused = layers(name for name in source.weights if name not in fits)
    print(f"--init-from {source.what}: {len(fits)} of {len(own)} tensors loaded; starting fresh: "
          f"{', '.join(fresh) or 'nothing'}; not used: {', '.join(unused) or 'nothing'}")
    return frozenset(fits)


def layers(names) -> list[str]:
    """Parameter names -> the names of their layers, sorted, once each."""
    return sorted({name.rpartition(".")[0] for name in names})


def width_of(model: nn.Module) -> float:
    return next(p for p in model.parameters() if p.ndim > 1).shape[0] / 64
