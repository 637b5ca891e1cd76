"""Classifiers of torchvision, with its weights or with those of a file."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.errors import UserError, printable
from common.hub import hub_weights
from explain.layers import nearest_names
from explain.state_dicts import chosen, read_state_dicts

# What torchvision's builders need to make the network that its own trained weights belong to.
# transform_input: the weights expect another normalization, which the network computes itself.
OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": False, "transform_input": True},
    "inception_v3": {"aux_logits": False, "init_weights": False, "transform_input": True},
}
# Heads that only training uses: a file may hold them.
TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
TRIED = 12  # networks that a file is compared with, if it does not fit the one that was named
SHOWN = 3  # names in a message


class Classifier(NamedTuple):
    """A network of torchvision, in evaluation mode, and what belongs to it."""

    model: nn.Module
    class_names: tuple[str, ...]
    size: tuple[int, int]  # (height, width) of its input in pixels
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    description: str


def from_torchvision(arch: str, weights: str) -> Classifier:
    """A classifier of torchvision, with its weights of the name ``weights`` or with a state dict
    from a file. Input size and normalization are those of torchvision's weights; the size of a
    vision transformer is that of the file. Raises UserError."""
    # imported here: it takes a second, and the networks of this project do without
    from torchvision import models

    known = models.list_models(module=models)
    if arch not in known:
        near = nearest_names(arch, known)
        raise UserError(f"arch {arch}: torchvision has no such classifier; nearest: {near}", 2)
    available = models.get_model_weights(arch)
    entry, taken = available["DEFAULT"], ""
    class_names = tuple(entry.meta["categories"])
    if weights in available.__members__:
        entry = available[weights]
        # downloaded and checked here; torchvision then finds the file in the cache
        hub_weights(entry.url, "or name a file with weights of yours")
        model = models.get_model(arch, weights=entry)
        class_names = tuple(entry.meta["categories"])
    elif Path(weights).exists():
        model, classes, taken = load_classifier(arch, weights)
        if classes != len(class_names):
            class_names = tuple(f"class {i}" for i in range(classes))
    else:
        raise UserError(
            f"weights {printable(weights)}: neither a file nor weights of torchvision's {arch}, "
            f"which are {', '.join(available.__members__)}",
            2,
        )
    preset = entry.transforms()
    side = getattr(model, "image_size", preset.crop_size[0])
    return Classifier(
        model=model.float().eval(),
        class_names=class_names,
        size=(side, side),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        description=f"torchvision's {arch}, weights {printable(weights)}, "
        f"{len(class_names)} classes, {side}x{side} px{taken}",
    )


# ---- weights from a file ------------------------------------------------------------------------


def load_classifier(arch: str, path: str) -> tuple[nn.Module, int, str]:
    """A classifier of torchvision with a state dict from a file, its number of classes, and what
    was taken of the file, as an ending of the description. Raises UserError."""
    states = read_state_dicts(path)
    try:
        model, taken = fitted(arch, path, states)
    except ValueError as error:
        other = arch_that_fits(path, states)
        reason = f"it fits {other}. Give that as the arch" if other else error
        raise UserError(f"{printable(path)} does not fit torchvision's {arch}: {reason}") from None
    classes = len(head_of(model)[1].weight)
    return model, classes, f"; {', '.join(taken)}" if taken else ""


def fitted(
    arch: str, path: str, states: dict[str, dict[str, Tensor]]
) -> tuple[nn.Module, list[str]]:
    """The network with the weights of a file, and what was taken of it, in words. Raises
    ValueError, which says what differs, and UserError if the file holds the network twice."""
    model = blank(arch)
    found = chosen(path, states, model.state_dict().keys())
    state = {
        name: value
        for name, value in found.state.items()
        if not name.startswith(TRAINING_HEADS.get(arch, ()))
    }
    left_out, taken = found.left_out + len(found.state) - len(state), found.origin
    model = resized(arch, model, state)
    state, replaced = match_head(model, state)
    wrong = differences(model, state)
    if wrong:
        raise ValueError(wrong)
    fill(model, state)
    if left_out:
        taken.append(f"{left_out} entr{'ies' if left_out > 1 else 'y'} left out")
    if getattr(model, "transform_input", False):
        taken.append("with transform_input")
    if replaced:
        taken.append(f"head: the linear layer {replaced} alone")
    return model, taken


def arch_that_fits(path: str, states: dict[str, dict[str, Tensor]]) -> str | None:
    """The classifier of torchvision that a file is of, among those with the most similar number of
    parameters."""
    from torchvision import models

    size = max(sum(value.numel() for value in state.values()) for state in states.values())
    distance = {}
    for arch in models.list_models(module=models):
        parameters = models.get_model_weights(arch)["DEFAULT"].meta["num_params"]
        distance[arch] = abs(math.log(max(size, 1) / parameters))
    for arch in sorted(distance, key=distance.get)[:TRIED]:
        with contextlib.suppress(ValueError, UserError):
            fitted(arch, path, states)
            return arch
    return None


def differences(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What keeps a state dict from being the model's, in one line; empty if nothing does."""
    own, unused = model.state_dict(), counters(model)
    missing = [name for name in own if name not in state and name not in unused]
    unknown = [f"{name} ({shape_of(state[name])})" for name in state if name not in own]
    both = [(name, state[name], own[name]) for name in own if name in state]
    other = [
        f"{name} ({shape_of(value)}, not {shape_of(right)})"
        for name, value, right in both
        if value.shape != right.shape
    ]
    whole = [
        name
        for name, value, right in both
        if right.is_floating_point() and not value.is_floating_point()
    ]
    parts = {
        "missing": missing,
        "not in the network": unknown,
        "of another shape": other,
        "not in floating point": whole,
    }
    return "; ".join(f"{what}: {few(names)}" for what, names in parts.items() if names)


def counters(model: nn.Module) -> set[str]:
    """The names of the batch counters, which evaluation does not use: old files lack them."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        f"{name}.num_batches_tracked"
        for name, module in model.named_modules()
        if isinstance(module, norms)
    }


def shape_of(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def few(names: Collection[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(list(names)[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# ---- networks without weights -------------------------------------------------------------------


class WeightsOnMeta(TorchFunctionMode):
    """Modules made under it have weights without memory: what ``torch.empty`` makes is on the meta
    device. Everything else is real, as RegNet computes its widths with tensors."""

    def __torch_function__(
        self, function: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def blank(arch: str, **options: object) -> nn.Module:
    """A classifier of torchvision, without the heads that only training uses, to be filled."""
    from torchvision import models

    with WeightsOnMeta():
        return models.get_model(arch, weights=None, **OPTIONS.get(arch, {}), **options)


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a blank network its weights, in float32."""
    complete = model.state_dict()  # keeps the version of each module, which state dicts can lack
    for name in complete.keys() & state.keys():
        value = state[name].detach()
        floating = complete[name].is_floating_point()
        complete[name] = value.float() if floating else value.to(complete[name].dtype)
    model.load_state_dict(complete, assign=True)


def resized(arch: str, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The same network for the image size of a state dict, if it is bound to one: a vision
    transformer has an embedding for each patch and one more."""
    embedding = state.get("encoder.pos_embedding")
    if not hasattr(model, "image_size") or embedding is None or embedding.ndim != 3:
        return model
    across = math.isqrt(max(embedding.shape[1] - 1, 0))
    size = across * model.patch_size
    return blank(arch, image_size=size) if size not in (0, model.image_size) else model


# ---- the head -----------------------------------------------------------------------------------


def head_of(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The last layer, which gives the logits, and its name; SqueezeNet's is a 1x1 convolution."""
    layers = (nn.Linear, nn.Conv2d)
    return [each for each in model.named_modules() if isinstance(each[1], layers)][-1]


def match_head(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Give the model the head of a state dict: its number of classes, and where the head was
    replaced by one linear layer, that layer.

    Returns the state dict with the model's names, and the name of such a layer in the file. A head
    of another kind stays as it is.
    """
    name, layer = head_of(model)
    weight = state.get(f"{name}.weight")
    if weight is not None:
        if weight.ndim and len(weight) and weight.shape[1:] == layer.weight.shape[1:]:
            replace(model, name, blank_layer(weight, bias=f"{name}.bias" in state))
        return state, ""
    for place in outwards(name):
        found = only_linear(state, place)
        shape = input_shape(model, place) if found else ()
        if shape and math.prod(shape) == state[f"{found}.weight"].shape[1]:
            linear = blank_layer(state[f"{found}.weight"], bias=f"{found}.bias" in state)
            flat = len(shape) > 1
            replace(model, place, nn.Sequential(nn.Flatten(), linear) if flat else linear)
            new = f"{place}.1" if flat else place
            return {renamed(each, found, new): value for each, value in state.items()}, found
    return state, ""


def outwards(name: str) -> list[str]:
    """A module and those around it: classifier.6, classifier."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def only_linear(state: dict[str, Tensor], place: str) -> str | None:
    """The name of the linear layer that is all that a state dict has of a module; None if it has
    more or less."""
    names = {name for name in state if name.startswith(f"{place}.")}
    layer = min(names, key=len, default="").rpartition(".")[0]
    weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
    if (
        weight is None
        or weight.ndim != 2
        or not len(weight)
        or not names <= {f"{layer}.weight", f"{layer}.bias"}
    ):
        return None
    return layer if bias is None or bias.shape == weight.shape[:1] else None


class Arrived(Exception):
    """The forward pass has reached the module that it was made for."""


def input_shape(model: nn.Module, place: str) -> tuple[int, ...]:
    """The shape (C,) or (C, h, w) of what a module of the network is given for images of the usual
    size; () if that cannot be found out."""
    model = copy.deepcopy(model).to("meta").eval()
    shape = ()

    def arrive(module: nn.Module, args: tuple) -> None:
        nonlocal shape
        shape = tuple(args[0].shape[1:])
        raise Arrived

    model.get_submodule(place).register_forward_pre_hook(arrive)
    side = getattr(model, "image_size", 224)
    with contextlib.suppress(Arrived, RuntimeError), torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return shape


def blank_layer(weight: Tensor, bias: bool) -> nn.Linear | nn.Conv2d:
    """A layer to be filled with this weight, (classes, C) or (classes, C, h, w)."""
    classes, channels, *kernel = weight.shape
    with WeightsOnMeta():
        if kernel:
            return nn.Conv2d(channels, classes, tuple(kernel), bias=bias)
        return nn.Linear(channels, classes, bias)


def replace(model: nn.Module, place: str, layer: nn.Module) -> None:
    around, _, name = place.rpartition(".")
    setattr(model.get_submodule(around), name, layer)


def renamed(name: str, old: str, new: str) -> str:
    """A name with another beginning, if it has the old one."""
    return new + name.removeprefix(old) if name.startswith(f"{old}.") else name
