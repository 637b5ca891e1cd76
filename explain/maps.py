"""Where a network looks: attention maps, class activation maps and Grad-CAM of a batch of images.

A map says how much each place counts: it is never negative, and divided by its own largest value,
so that 0 stays nothing at all. A map without a value above 0 (0/0) is 0 everywhere; a uniform one
is 1 everywhere. The network comes back as it was, also after an error: its mode, requires_grad,
hooks, and the parameters' gradients.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence

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

    images (N, 3, H, W), normalised -> {level: (N, H, W)} float32 in [0, 1], bilinearly upsampled to
    the images. Raises ValueError for a network without attention.
    """
    if not getattr(model, "levels", ()):
        raise ValueError(
            "this network has no attention levels: use gradcam, or cam where it ends in pooling"
        )
    with eval_no_grad(model), torch.no_grad():
        _, maps = model(to_model_dtype(model, images), return_attention=True)
    return {level: upsample_and_scale(each, images.shape[2:]) for level, each in maps.items()}


def class_activation_map(
    model: nn.Module, images: Tensor, targets: Sequence[int] | Tensor
) -> Tensor:
    """CAM (arXiv 1512.04150, section 2) of the classes ``targets``: sum_k w_k f_k, the last
    features f weighted as the linear layer behind the average pooling weights their means. What
    speaks against the class is 0: the paper too counts from 0, where it cuts at a share of the
    largest value.

    images (N, 3, H, W), normalised, and targets (N,) -> (N, H, W) float32 in [0, 1], upsampled to
    the images. Raises ValueError for a network that does not end in average pooling and one linear
    layer.
    """
    seen = FeatureHooks()
    logits = logits_with_hooks(model, images, seen)
    targets = checked_targets(targets, logits)
    features = seen.pooled_features(logits)
    weights = seen.linear.weight[targets].detach().to(features.dtype)
    return upsample_and_scale(torch.einsum("nchw,nc->nhw", features, weights), images.shape[2:])


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, section 3) of the classes ``targets`` at a layer: relu(sum_k a_k
    A_k), its activations A weighted by the mean gradient a_k of the class's logit over the
    positions.

    images (N, 3, H, W), normalised, and targets (N,) -> (N, H, W) float32 in [0, 1], upsampled to
    the images.
    layer: a module or its name, any whose output is (N, C, h, w); of one that runs several times,
    the last. None takes default_layer, which runs one image through the network to find it. Nothing
    before the layer is differentiated, and no parameter is, so a late layer costs hardly more than
    a forward pass. Raises ValueError for a layer that is not there, is not run, gives no such
    output, or that the logit does not see.
    """
    module = find_layer(model, default_layer(model, images[:1]) if layer is None else layer)
    kept: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple, output: object) -> Tensor:
        if not is_map(output):
            raise ValueError(
                f"Grad-CAM needs a layer that gives (N, C, H, W); this {type(module).__name__} gives "
                f"{tuple(output.shape) if torch.is_tensor(output) else type(output).__name__}"
            )
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()  # an in-place ReLU behind the layer may write into the copy

    # inference_mode(False): whoever calls us may be in inference mode, where there are no gradients
    # to be had
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
            score = logits.gather(1, checked_targets(targets, logits)[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, activations, allow_unused=True)
    if gradient is None:
        raise ValueError("no logit depends on this layer: choose another")
    activations, gradient = at_least_float32(activations.detach()), at_least_float32(gradient)
    weights = gradient.mean((2, 3))
    return upsample_and_scale(torch.einsum("nchw,nc->nhw", activations, weights), images.shape[2:])


# ---- layers -------------------------------------------------------------------------------------


def feature_layers(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int, int]]:
    """Every layer that Grad-CAM can be made at: its name and the (C, h, w) of its output, in the
    order they finish."""
    seen = FeatureHooks()
    logits_with_hooks(model, images, seen)
    return {name: shape for name, shape in seen.shapes.items() if shape[1] * shape[2] > 1}


def default_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer with the last features: conv13's block in our networks, else the last
    module before the global pooling whose output still has an extent. Raises ValueError for a
    network without one."""
    if isinstance(model, Network):
        return model.LAST_FEATURES
    seen = FeatureHooks()
    logits_with_hooks(model, images, seen)
    if seen.last is None:
        raise ValueError(
            "no layer of this network gives a map (N, C, H, W) for images of this size"
        )
    return seen.last


def find_layer(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """The module that ``layer`` is or names. Raises ValueError, with the nearest names."""
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        if not any(layer is module for module in modules.values()):
            raise ValueError(f"the layer {type(layer).__name__} is not part of this network")
        return layer
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules, 3, 0.4) or list(modules)[-3:]
        raise ValueError(
            f"this network has no layer {layer!r}; it has {', '.join(near)} and others"
        )
    return modules[layer]


class FeatureHooks:
    """Sees every module finish, and remembers the layers, the last features and the last linear
    layer."""

    def __init__(self):
        # by name, in the order in which the layers finish
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.last: str | None = None  # the layer with the last features, and these
        self.features: Tensor | None = None
        self.pooled: Tensor | None = None
        self.linear: nn.Linear | None = None
        self.linear_input = self.linear_output = None

    def __call__(self, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, nn.Linear):
            self.linear, self.linear_input, self.linear_output = module, inputs[0], output
        if not is_map(output):
            return
        self.shapes.pop(name, None)
        self.shapes[name] = tuple(output.shape[1:])
        if isinstance(module, POOLING):
            self.pooled = output
        elif output is not self.pooled and output.shape[2] * output.shape[3] > 1:
            # a block that ends in a pooling gives the pooling's output
            self.last, self.features = name, output

    def pooled_features(self, logits: Tensor) -> Tensor:
        """The features (N, C, h, w) whose means over the positions the last linear layer turned
        into the logits. The numbers tell, so no list of architectures is needed. Raises ValueError
        where it isn't so."""
        if (
            self.features is not None
            and self.linear is not None
            and torch.equal(self.linear_output, logits)
        ):
            features, means = at_least_float32(self.features), at_least_float32(self.linear_input)
            # DenseNets have a ReLU that is no module in between
            for candidate in (features, features.relu()):
                found = candidate.mean((2, 3))
                tolerance = 2e-2 if self.features.dtype in (torch.bfloat16, torch.float16) else 1e-4
                if found.shape == means.shape and torch.allclose(
                    found, means, rtol=tolerance, atol=tolerance * float(means.abs().max())
                ):
                    return candidate
        raise ValueError(
            "this network does not end in average pooling over a map and one linear layer: use gradcam"
        )


def logits_with_hooks(model: nn.Module, images: Tensor, watch: Callable) -> Tensor:
    """The logits; ``watch(name, module, inputs, output)`` is called when a module has finished."""
    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(functools.partial(watch, name)))
        with torch.no_grad(), eval_no_grad(model):
            return logits_of(model, images)
    finally:
        for handle in handles:
            handle.remove()


# ---- what they share ----------------------------------------------------------------------------


@contextlib.contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and with parameters that ask for no gradient; both are put back, module by
    module."""
    modes = [(module, module.training) for module in model.modules()]
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in asking:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in asking:
            p.requires_grad_(True)


def to_model_dtype(model: nn.Module, images: Tensor) -> Tensor:
    """The images in the network's own floating-point type."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"expected images of shape (N, 3, H, W) with N of 1 or more, got {tuple(images.shape)}"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.detach().to(dtype)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(to_model_dtype(model, images))
    if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(
            f"expected a classifier that gives logits (N, classes), not "
            f"{tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__}"
        )
    return logits


def checked_targets(targets: Sequence[int] | Tensor, logits: Tensor) -> Tensor:
    """Targets as a tensor (N,) of class indices. Raises ValueError for another count, or a class
    that isn't there."""
    targets = torch.as_tensor(targets, device=logits.device)
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"expected {len(logits)} class indices as targets, got {tuple(targets.shape)} {targets.dtype}"
        )
    wrong = targets[(targets < 0) | (targets >= logits.shape[1])]
    if len(wrong):
        raise ValueError(
            f"there is no class {int(wrong[0])}: the network has classes 0 to {logits.shape[1] - 1}"
        )
    return targets.long()


def is_map(output: object) -> bool:
    return torch.is_tensor(output) and output.ndim == 4 and output.is_floating_point()


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 as float32: sums over positions and channels need the digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def upsample_and_scale(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) of any range -> (N, H, W) float32 in [0, 1]: negative values are 0, upsampled, over
    the largest."""
    maps = F.interpolate(
        maps.clamp(min=0)[:, None], size=tuple(size), mode="bilinear", align_corners=False
    )[:, 0]
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), maps / largest, 0.0).float()
