"""The layers of a network that a map can be made at: their names, and how their outputs lie over
the image.

A layer has an extent if its output is one of these, with more than one position:

- (N, C, h, w), as convolutions have it;
- (N, h, w, C), channels last, as in Swin and inside ConvNeXt's blocks;
- (N, T, C), the tokens of a vision transformer: a grid of patches in rows, with or without a class
  token before them. (h, w) follows from the shape of the images.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention_model import LEVEL_OF_BLOCK, Network
from explain.inference import at_least_float32, eval_no_grad, logits_of, to_model_dtype

POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.FractionalMaxPool2d,
    nn.LPPool2d,
)
CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, *POOLING)
# by which the shape of a map may differ from that of the images: unpadded convolutions, rounding
SHAPE_RATIO, POSITIONS = 1.1, 1.5


# ---- grids --------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """How the output of a layer lies over the image."""

    height: int
    width: int
    channels_last: bool = False
    tokens_before: int | None = None  # in front of the grid; None: the output is no tokens

    def features(self, output: Tensor) -> Tensor:
        """The output, or its gradient, as (N, C, h, w); a view."""
        if self.tokens_before is not None:
            patches = output[:, self.tokens_before :]
            return patches.unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)
        return output.permute(0, 3, 1, 2) if self.channels_last else output

    def has_extent(self) -> bool:
        return self.height * self.width > 1


def possible_grids(output: object, images: Sequence[int], tokens: bool = True) -> list[Grid]:
    """The grids that the output of a layer may be, by its shape and that (N, 3, H, W) of the
    images. Two, channels first and last, if C is near h and w. tokens: whether three dimensions
    may be tokens; in this project's networks they are scores."""
    if not torch.is_tensor(output) or not output.is_floating_point():
        return []
    if not output.ndim or len(output) != images[0] or not output.numel():
        return []
    height, width = images[2:]
    if output.ndim == 3 and tokens:
        for before in (0, 1):
            grid = token_grid(output.shape[1] - before, height, width)
            if grid is not None:
                return [Grid(*grid, tokens_before=before)]
    if output.ndim != 4:
        return []
    first, last = Grid(*output.shape[2:]), Grid(*output.shape[1:3], channels_last=True)
    return [grid for grid in (first, last) if is_like(grid.height, grid.width, height, width)]


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The (h, w) of that many square patches of an image, or None."""
    rows = round(math.sqrt(tokens * height / width)) if tokens > 0 else 0
    if rows and tokens % rows == 0 and is_like(rows, tokens // rows, height, width):
        return rows, tokens // rows
    return None


def is_like(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a map has the shape of an image, but for rounding."""
    ratio = rows * width / (columns * height)
    return (
        1 / SHAPE_RATIO <= ratio <= SHAPE_RATIO
        or abs(rows - columns * height / width) < POSITIONS
        or abs(columns - rows * width / height) < POSITIONS
    )


def grid_at(model: nn.Module, images: Tensor, name: str, output: object) -> Grid:
    """The grid of the output of the layer ``name``; where its shape does not decide, a forward pass
    of one image does. Raises ValueError for a layer without one."""
    grids = possible_grids(output, images.shape, tokens=not isinstance(model, Network))
    if isinstance(model, Network) and torch.is_tensor(output) and output.ndim == 4:
        grids = [Grid(*output.shape[2:])]
    if len(grids) != 1:
        layers = hooked(model, images).layers
        grids = [layers[name][1]] if name in layers else []
    if grids and grids[0].has_extent():
        return grids[0]
    found = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
    module = type(model.get_submodule(name)).__name__
    raise ValueError(
        "a map needs a layer whose output lies over the image, in several positions: (N, C, h, w), "
        f"(N, h, w, C), or tokens (N, T, C) of a grid of patches; this {module} gives {found}"
    )


class ChannelOrder:
    """Follows module by module whether the channels are last, for outputs whose shape does not
    decide."""

    def __init__(self) -> None:
        self.last = False
        self.convolved: Sequence[int] | None = None  # (h, w) of the last convolution, norm or pool

    def follow(self, module: nn.Module, output: object) -> None:
        dims = getattr(module, "dims", None)  # of torchvision's Permute
        if isinstance(module, CHANNELS_FIRST) and torch.is_tensor(output):
            self.last, self.convolved = False, output.shape[2:]
        elif isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
            self.last = True
        elif dims in ([0, 3, 1, 2], [0, 2, 3, 1]):
            self.last = dims[-1] == 1

    def grid_of(self, output: object, images: Sequence[int], tokens: bool) -> Grid | None:
        """The grid of the output of the module that has just finished, or None."""
        grids = possible_grids(output, images, tokens)
        if len(grids) == 2:
            return grids[self.last]
        # a network may pool height and width differently
        if not grids and torch.is_tensor(output) and output.shape[2:] == self.convolved:
            return Grid(*self.convolved)
        return grids[0] if grids else None


# ---- layers -------------------------------------------------------------------------------------


def feature_layers(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int, int]]:
    """The layers with an extent: {name: (C, h, w)}, in the order in which they finish; without
    those of which only the class token reaches the logits."""
    layers = hooked(model, images).layers
    names = list(layers)
    if any(grid.tokens_before for _, grid in layers.values()):
        names = names[: names.index(default_layer(model, images)) + 1]
    return {
        name: (layers[name][0], layers[name][1].height, layers[name][1].width)
        for name in names
        if layers[name][1].has_extent()
    }


def default_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer with the last features: the block of conv13 in this project's networks,
    else the last module before the global pooling whose output has more than one position. In a
    vision transformer the last whose patches reach the logits: behind it, the class token alone
    counts. Raises ValueError for a network without one."""
    if isinstance(model, Network):
        return model.LAST_FEATURES
    hooks = hooked(model, images)
    if hooks.last is None:
        raise ValueError(
            "no layer of this network gives a map for images of this size: neither (N, C, h, w), "
            "nor (N, h, w, C), nor tokens (N, T, C) of a grid of patches"
        )
    grid = hooks.layers[hooks.last][1]
    return last_with_patches(model, images, hooks) if grid.tokens_before else hooks.last


def last_with_patches(model: nn.Module, images: Tensor, hooks: FeatureHooks) -> str:
    """The last layer whose patches, and not its class token alone, reach the logits. Raises
    ValueError if there is none."""
    grids = {
        name: grid for name, (_, grid) in hooks.layers.items() if grid.tokens_before is not None
    }
    modules = dict(model.named_modules())
    run = LayerRun(model, images[:1], [modules[name] for name in grids])
    gradients = run.gradients(run.logits.argmax(1))
    for (name, grid), gradient in reversed(list(zip(grids.items(), gradients, strict=True))):
        if gradient is not None and grid.features(gradient).any():
            return name
    raise ValueError("no patch of this network reaches its logits, or its head is all zeros")


def block_layers(model: nn.Module, images: Tensor) -> list[str]:
    """The last layer of each block: the blocks of this project's networks, and in others the last
    layer of each resolution, the finest first. Raises ValueError as ``default_layer`` does."""
    last = default_layer(model, images)
    hooks = hooked(model, images)
    if isinstance(model, Network):
        prefix = f"{model.TRUNK}.block"
        return [
            name
            for name, (_, grid) in hooks.layers.items()
            if name.removeprefix(prefix).isdigit() and grid.has_extent()
        ]
    names = list(hooks.layers)
    found: dict[tuple[int, int], str] = {}
    smallest = math.inf
    for name in names[: names.index(last) + 1]:
        grid = hooks.layers[name][1]
        positions = grid.height * grid.width
        # what grows again are windows of attention
        if not grid.has_extent() or name in hooks.pools or positions > smallest:
            continue
        smallest = positions
        # a stage, rather than the first layer inside of the next one
        earlier = found.get((grid.height, grid.width), name)
        if name.count(".") <= earlier.count("."):
            found[grid.height, grid.width] = name
    grid = hooks.layers[last][1]
    found[grid.height, grid.width] = last
    return sorted(found.values(), key=names.index)


def find_layer(model: nn.Module, layer: nn.Module | str) -> tuple[str, nn.Module]:
    """The name and the module that ``layer`` is or names; "conv7", "conv10" and "conv13" are the
    blocks that end in them. Raises ValueError, with the nearest names."""
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if layer is module:
                return name, module
        raise ValueError(f"the layer {type(layer).__name__} is not part of this network")
    if isinstance(model, Network) and layer in LEVEL_OF_BLOCK.values():
        (number,) = (number for number, level in LEVEL_OF_BLOCK.items() if level == layer)
        layer = f"{model.TRUNK}.block{number}"
    if layer not in modules:
        raise ValueError(
            f"this network has no layer {layer!r}; "
            f"it has {nearest_names(layer, modules)} and others"
        )
    return layer, modules[layer]


def nearest_names(word: str, names: Iterable[str]) -> str:
    """The names most similar to ``word``, ignoring case, for an error message; without any, the
    last three."""
    by_folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=3, cutoff=0.4)
    return ", ".join(by_folded[folded] for folded in close or list(by_folded)[-3:])


# ---- hooks --------------------------------------------------------------------------------------


class FeatureHooks:
    """A hook for every module that finishes: records the layers, the last features and the last
    linear layer. ``images``: their shape (N, 3, H, W). ``tokens``: see ``possible_grids``."""

    def __init__(self, images: Sequence[int], tokens: bool = True) -> None:
        self.images, self.tokens = images, tokens
        self.order = ChannelOrder()
        # by name, in the order in which the layers finish: channels, and grid
        self.layers: dict[str, tuple[int, Grid]] = {}
        self.pools: set[str] = set()  # layers whose output is that of a pooling
        self.last: str | None = None  # the layer with the last features
        self.features: Tensor | None = None  # its output (N, C, h, w)
        self.pooled: Tensor | None = None
        self.linear: nn.Linear | None = None
        self.linear_input: Tensor | None = None
        self.linear_output: Tensor | None = None

    def __call__(self, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, nn.Linear) and inputs:
            self.linear, self.linear_input, self.linear_output = module, inputs[0], output
        self.order.follow(module, output)
        grid = self.order.grid_of(output, self.images, self.tokens)
        if grid is None:
            return
        features = grid.features(output)
        self.layers.pop(name, None)
        self.layers[name] = features.shape[1], grid
        # a block that ends in pooling has the output of the pooling
        if isinstance(module, POOLING) or output is self.pooled:
            self.pooled = output
            self.pools.add(name)
        elif grid.has_extent():
            self.last, self.features = name, features

    def pooled_features(self, logits: Tensor) -> Tensor:
        """The features (N, C, h, w) whose means over the positions are the input of the last linear
        layer, whose output is the logits. The values decide, so no list of architectures is needed.
        Raises ValueError if there are none."""
        if (
            self.features is not None
            and self.linear is not None
            and torch.equal(self.linear_output, logits)
        ):
            features, means = at_least_float32(self.features), at_least_float32(self.linear_input)
            tolerance = 2e-2 if self.features.dtype in (torch.bfloat16, torch.float16) else 1e-4
            absolute = tolerance * float(means.abs().max())
            # DenseNets have a ReLU in between that is no module
            for candidate in (features, features.relu()):
                found = candidate.mean((2, 3))
                if found.shape == means.shape and torch.allclose(
                    found, means, rtol=tolerance, atol=absolute
                ):
                    return candidate
        raise ValueError(
            "this network does not end in average pooling over a map and one linear layer: "
            "use gradcam"
        )


def hooked(model: nn.Module, images: Tensor) -> FeatureHooks:
    """What the hooks have recorded in a forward pass of an image. It goes through twice: what has
    a length of one is no batch."""
    twice = to_model_dtype(model, images)[:1].expand(2, -1, -1, -1)
    hooks = FeatureHooks(twice.shape, tokens=not isinstance(model, Network))
    logits_with_hooks(model, twice, hooks)
    return hooks


def logits_with_hooks(model: nn.Module, images: Tensor, hook: Callable[..., None]) -> Tensor:
    """The logits; calls ``hook(name, module, inputs, output)`` when a module has finished."""
    handles = []
    with eval_no_grad(model), torch.no_grad():
        try:
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_hook(functools.partial(hook, name)))
            return logits_of(model, images)
        finally:
            for handle in handles:
                handle.remove()


class LayerRun:
    """A forward pass that keeps the outputs of some layers, and its gradients at all of them.

    No parameter is differentiated and nothing before the first of these layers is. If a layer runs
    several times, the last output counts. Outputs that are no tensors are kept as they are.
    """

    def __init__(self, model: nn.Module, images: Tensor, modules: Sequence[nn.Module]):
        self.outputs: list[object] = [None] * len(modules)
        handles = []
        # inference_mode(False): the caller may be in inference mode, which has no gradients
        with torch.inference_mode(False), torch.enable_grad(), eval_no_grad(model):
            try:
                for place, module in enumerate(modules):
                    hook = functools.partial(self.keep, place)
                    handles.append(module.register_forward_hook(hook))
                # tensors from inference mode could not be kept for the backward pass
                self.logits = logits_of(model, images.clone() if images.is_inference() else images)
            finally:
                for handle in handles:
                    handle.remove()

    def keep(self, place: int, module: nn.Module, inputs: tuple, output: object) -> object:
        if not torch.is_tensor(output) or not output.is_floating_point():
            self.outputs[place] = output
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.outputs[place] = output
        return output.clone()  # an in-place ReLU after the layer may overwrite the copy

    def gradients(self, targets: Tensor, retain_graph: bool = False) -> list[Tensor | None]:
        """Of the logits of the classes ``targets`` (N,), at each layer; None where they do not
        depend on it. ``retain_graph``: whether they are asked for another time."""
        with torch.inference_mode(False), torch.enable_grad():
            found: list[Tensor | None] = [None] * len(self.outputs)
            places = [
                place
                for place, output in enumerate(self.outputs)
                if torch.is_tensor(output) and output.requires_grad
            ]
            if places and self.logits.requires_grad:
                # a copy: targets from inference mode could not be kept for the backward pass
                score = self.logits.gather(1, targets.clone()[:, None]).sum()
                at = [self.outputs[place] for place in places]
                gradients = torch.autograd.grad(
                    score, at, retain_graph=retain_graph, allow_unused=True
                )
                for place, gradient in zip(places, gradients, strict=True):
                    found[place] = gradient
        return found
