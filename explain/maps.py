"""Where a network looks: attention maps, class activation maps and Grad-CAM of a batch of images.

Maps are non-negative and divided by their maximum. A map without a positive value (0/0) is 0
everywhere; a uniform one is 1 everywhere. The network is left as it was, also after an error: its
mode, requires_grad, hooks, and the gradients of its parameters.

Several threads may ask for maps of one network: it serves one call at a time. Until a call has
ended, the network must not run elsewhere, as in ``model(images)`` in another thread.

The raw_... functions give the maps before they are upsampled and scaled, (N, h, w) at the positions
of their layer, for whoever needs them at another size than that of the images.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_model import Network

POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.FractionalMaxPool2d,
    nn.LPPool2d,
)


# ---- the methods --------------------------------------------------------------------------------


def attention_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The attention map of every level (arXiv 1804.02391, section 3).

    images (N, 3, H, W), normalized -> {level: (N, H, W)} float32 in [0, 1], upsampled bilinearly to
    the size of the images. Raises ValueError for a network without attention.
    """
    raw = raw_attention(model, images)
    return {level: upsample_and_scale(maps, images.shape[2:]) for level, maps in raw.items()}


def raw_attention(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    if not getattr(model, "levels", ()):
        raise ValueError(
            "this network has no attention levels: use gradcam, or cam where it ends in pooling"
        )
    with eval_no_grad(model), torch.no_grad():
        _, maps = model(to_model_dtype(model, images), return_attention=True)
    return maps


def class_activation_map(
    model: nn.Module, images: Tensor, targets: Sequence[int] | Tensor
) -> Tensor:
    """CAM (arXiv 1512.04150, section 2) of the classes ``targets``: sum_k w_k f_k, the last
    features f weighted as the linear layer after the average pooling weights their means. Evidence
    against the class is 0: the paper, too, counts from 0 when it thresholds at a fraction of the
    maximum.

    images (N, 3, H, W), normalized, and targets (N,) -> (N, H, W) float32 in [0, 1], upsampled to
    the size of the images. Raises ValueError for a network that does not end in average pooling and
    one linear layer.
    """
    return upsample_and_scale(raw_class_activation(model, images, targets), images.shape[2:])


def raw_class_activation(
    model: nn.Module, images: Tensor, targets: Sequence[int] | Tensor
) -> Tensor:
    hooks = FeatureHooks()
    logits = logits_with_hooks(model, images, hooks)
    targets = checked_targets(targets, logits)
    features = hooks.pooled_features(logits)
    return weighted_sum(features, hooks.linear.weight[targets].detach().to(features.dtype))


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, section 3) of the classes ``targets`` at a layer: relu(sum_k a_k
    A_k), its activations A weighted by the mean gradient a_k of the class's logit over the
    positions.

    images (N, 3, H, W), normalized, and targets (N,) -> (N, H, W) float32 in [0, 1], upsampled to
    the size of the images.
    layer: a module or its name, any with an output (N, C, h, w); if it runs several times, the last
    output counts. None takes ``default_layer``, at the cost of a forward pass of one image.
    No parameter is differentiated and nothing before the layer is, so a late layer costs hardly
    more than a forward pass. Raises ValueError for a layer that does not exist, does not run, has
    another output, or does not reach the logit.
    """
    return upsample_and_scale(raw_grad_cam(model, images, targets, layer), images.shape[2:])


def raw_grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    module = find_layer(model, default_layer(model, images[:1]) if layer is None else layer)
    kept: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple, output: object) -> Tensor:
        if not is_map(output):
            found = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
            raise ValueError(
                "Grad-CAM needs a layer that gives (N, C, H, W); "
                f"this {type(module).__name__} gives {found}"
            )
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()  # an in-place ReLU after the layer may overwrite the copy

    # inference_mode(False): the caller may be in inference mode, which has no gradients
    with torch.inference_mode(False), torch.enable_grad(), eval_no_grad(model):
        handle = module.register_forward_hook(cut)
        try:
            logits = logits_of(model, images)
        finally:
            handle.remove()
        if not kept:
            raise ValueError(
                "this layer is not run when the network classifies an image: choose another"
            )
        activations, gradient = kept[0], None
        if logits.requires_grad:
            # a copy: targets from inference mode could not be kept for the backward pass
            targets = checked_targets(targets, logits).clone()
            score = logits.gather(1, targets[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, activations, allow_unused=True)
    if gradient is None:
        raise ValueError("no logit depends on this layer: choose another")
    activations, gradient = at_least_float32(activations.detach()), at_least_float32(gradient)
    return weighted_sum(activations, gradient.mean((2, 3)))


# ---- layers -------------------------------------------------------------------------------------


def feature_layers(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int, int]]:
    """The layers that Grad-CAM applies to: {name: (C, h, w) of the output}, in the order in which
    they finish."""
    hooks = FeatureHooks()
    logits_with_hooks(model, images, hooks)
    return {name: shape for name, shape in hooks.shapes.items() if shape[1] * shape[2] > 1}


def default_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer with the last features: the block of conv13 in this project's networks,
    else the last module before the global pooling whose output has more than one position. Raises
    ValueError for a network without one."""
    if isinstance(model, Network):
        return model.LAST_FEATURES
    hooks = FeatureHooks()
    logits_with_hooks(model, images, hooks)
    if hooks.last is None:
        raise ValueError(
            "no layer of this network gives a map (N, C, H, W) for images of this size"
        )
    return hooks.last


def find_layer(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """The module that ``layer`` is or names. Raises ValueError, with the nearest names."""
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        if not any(layer is module for module in modules.values()):
            raise ValueError(f"the layer {type(layer).__name__} is not part of this network")
        return layer
    if layer not in modules:
        raise ValueError(
            f"this network has no layer {layer!r}; "
            f"it has {nearest_names(layer, modules)} and others"
        )
    return modules[layer]


def nearest_names(word: str, names: Iterable[str]) -> str:
    """The names most similar to ``word``, ignoring case, for an error message; without any, the
    last three."""
    by_folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=3, cutoff=0.4)
    return ", ".join(by_folded[folded] for folded in close or list(by_folded)[-3:])


# ---- hooks --------------------------------------------------------------------------------------


class FeatureHooks:
    """A hook for every module that finishes: records the layers, the last features and the last
    linear layer."""

    def __init__(self) -> None:
        # by name, in the order in which the layers finish
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.last: str | None = None  # the layer with the last features
        self.features: Tensor | None = None  # its output
        self.pooled: Tensor | None = None
        self.linear: nn.Linear | None = None
        self.linear_input: Tensor | None = None
        self.linear_output: Tensor | None = None

    def __call__(self, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, nn.Linear):
            self.linear, self.linear_input, self.linear_output = module, inputs[0], output
        if not is_map(output):
            return
        self.shapes.pop(name, None)
        self.shapes[name] = tuple(output.shape[1:])
        if isinstance(module, POOLING):
            self.pooled = output
        # a block that ends in pooling has the output of the pooling
        elif output is not self.pooled and output.shape[2] * output.shape[3] > 1:
            self.last, self.features = name, output

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


# ---- shared by the methods ----------------------------------------------------------------------


# of each network: its hooks, modes and requires_grad are seen by every thread
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextlib.contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter that requires a gradient; both are restored, module by
    module. One thread at a time: others wait until this one is done with the network."""
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock, _evaluated(model):
        yield


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in trainable:
            p.requires_grad_(True)


def to_model_dtype(model: nn.Module, images: Tensor) -> Tensor:
    """The images in the floating-point type of the network. Raises ValueError for another shape
    than (N, 3, H, W)."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"expected images of shape (N, 3, H, W) with N of 1 or more, got {tuple(images.shape)}"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.detach().to(dtype)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, classes). Raises ValueError for a network with another output."""
    logits = model(to_model_dtype(model, images))
    if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"expected a classifier that gives logits (N, classes), not {found}")
    return logits


def checked_targets(targets: Sequence[int] | Tensor, logits: Tensor) -> Tensor:
    """Targets as a tensor (N,) of class indices. Raises ValueError for another count, or a class
    that does not exist."""
    targets = torch.as_tensor(targets, device=logits.device)
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"expected {len(logits)} class indices as targets, "
            f"got {tuple(targets.shape)} {targets.dtype}"
        )
    wrong = targets[(targets < 0) | (targets >= logits.shape[1])]
    if len(wrong):
        raise ValueError(
            f"there is no class {int(wrong[0])}: the network has classes 0 to {logits.shape[1] - 1}"
        )
    return targets.long()


def is_map(output: object) -> bool:
    """Whether the output of a module is (N, C, h, w) floats."""
    return torch.is_tensor(output) and output.ndim == 4 and output.is_floating_point()


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 as float32: sums over positions and channels need the precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """(N, C, h, w) and (N, C) -> (N, h, w), in the precision of the features also where the caller
    has turned on autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("nchw,nc->nhw", features, weights)


def upsample_and_scale(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) of any range -> (N, H, W) float32 in [0, 1]: negative values set to 0, upsampled,
    divided by the maximum."""
    maps = F.interpolate(
        maps.clamp(min=0)[:, None], size=tuple(size), mode="bilinear", align_corners=False
    )[:, 0]
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), maps / largest, 0.0).float()
