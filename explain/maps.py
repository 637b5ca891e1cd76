"""Where a network looks: attention maps, and five maps of the evidence for a class.

=========================== ============================================= ====================
``class_activation_map``    last features, weighted by the linear layer   arXiv 1512.04150
``grad_cam``                features, weighted by their mean gradient     arXiv 1610.02391
``grad_cam_plus_plus``      by a mean of the positive gradients           arXiv 1710.11063
``hires_cam``               features times gradient, position by position arXiv 2011.08891
``layer_cam``               features times positive gradient              Jiang et al. 2021
=========================== ============================================= ====================

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
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_model import Network
from explain.inference import (
    at_least_float32,
    checked_targets,
    eval_no_grad,
    logits_of,
    to_model_dtype,
)
from explain.layers import (
    FeatureHooks,
    LayerRun,
    default_layer,
    find_layer,
    grid_at,
    logits_with_hooks,
)

# ---- attention ----------------------------------------------------------------------------------


def attention_maps(
    model: nn.Module, images: Tensor, query: Tensor | None = None
) -> dict[str, Tensor]:
    """The attention map of every level (arXiv 1804.02391, section 3).

    images (N, 3, H, W), normalized -> {level: (N, H, W)} float32 in [0, 1], upsampled bilinearly to
    the size of the images.
    query (1 or N, 3, H, W): other images, whose global feature g takes the place of the images' own
    (the paper's query-driven maps).

    Raises ValueError for a network without attention, and with a query for one whose maps do not
    depend on g.
    """
    raw = raw_attention(model, images, query)
    return {level: upsample_and_scale(maps, images.shape[2:]) for level, maps in raw.items()}


def raw_attention(
    model: nn.Module, images: Tensor, query: Tensor | None = None
) -> dict[str, Tensor]:
    """``attention_maps`` at the positions of each level, {level: (N, h, w)}."""
    if not getattr(model, "levels", ()):
        raise ValueError(
            "this network has no attention levels: use gradcam, or cam where it ends in pooling"
        )
    if query is not None and len(query) not in (1, len(images)):
        raise ValueError(f"{len(query)} queries for {len(images)} images: expected one, or as many")
    asked = contextlib.nullcontext() if query is None else global_feature_of(model, query)
    with eval_no_grad(model), torch.no_grad(), asked:
        _, maps = model(to_model_dtype(model, images), return_attention=True)
    return maps


@contextlib.contextmanager
def global_feature_of(model: Network, query: Tensor) -> Iterator[None]:
    """The network with the global feature g of other images (1 or N, 3, H, W), whatever it is given
    meanwhile. Raises ValueError for a network whose maps do not depend on g."""
    if not model.global_branches:
        raise ValueError(
            "a query changes nothing in this network: its score is u·(l + g), where u·g is the "
            "same at every position, and the softmax ignores it. Train one with -dp or -gate"
        )
    kept: dict[str, Tensor] = {}
    branches = {name: model.get_submodule(name) for name in model.global_branches}

    def keep(name: str, output: Tensor) -> None:
        kept[name] = output

    def replace(name: str, output: Tensor) -> Tensor:
        return kept[name].expand_as(output)

    def hooks(act: object) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for name, branch in branches.items():
            hook = branch.register_forward_hook(lambda m, i, out, name=name: act(name, out))
            stack.callback(hook.remove)
        return stack

    with hooks(keep):
        logits_of(model, query)
    with hooks(replace):
        yield


# ---- the evidence for a class -------------------------------------------------------------------


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
    """``class_activation_map`` at the positions of the last features, (N, h, w), with a sign."""
    hooks = FeatureHooks(images.shape)
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
    layer: a module or its name, any with an extent (see explain/layers.py); if it runs several
    times, the last output counts. None takes ``default_layer``, at the cost of a forward pass of
    two images.
    No parameter is differentiated and nothing before the layer is, so a late layer costs hardly
    more than a forward pass. Raises ValueError for a layer that does not exist, does not run, has
    no extent, or does not reach the logit.
    """
    return at_one_layer("gradcam", model, images, targets, layer)


def grad_cam_plus_plus(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    """Grad-CAM++ (arXiv 1710.11063, section 3.2) for exp(logit) as the class's score: the weight of
    a channel is sum_ij alpha_ij relu(g_ij), with alpha = g² / (2 g² + g³ sum_ab A_ab). It is made
    for features behind a ReLU: with signed ones, weights can be negative or large.

    Arguments, result and errors are those of ``grad_cam``.
    """
    return at_one_layer("gradcam++", model, images, targets, layer)


def hires_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    """HiResCAM (arXiv 2011.08891, section 3.3): relu(sum_k g_k A_k), position by position. Where
    all that follows the layer is linear it is what each position adds to the logit, which Grad-CAM
    is only with average pooling. Behind an attention gate it counts what attention takes.

    Arguments, result and errors are those of ``grad_cam``.
    """
    return at_one_layer("hirescam", model, images, targets, layer)


def layer_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None = None,
) -> Tensor:
    """LayerCAM (Jiang et al., IEEE TIP 2021, equation 6): relu(sum_k relu(g_k) A_k), made for early
    layers, whose positions differ more than their channels.

    Arguments, result and errors are those of ``grad_cam``.
    """
    return at_one_layer("layercam", model, images, targets, layer)


def at_one_layer(
    method: str,
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    layer: nn.Module | str | None,
) -> Tensor:
    """The map (N, H, W) of a gradient method; see ``grad_cam``."""
    found = gradient_maps(model, images, targets, [method], [layer])
    return next(iter(found.values()))[method]


def gradient_maps(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | Tensor,
    methods: Sequence[str] = ("gradcam", "gradcam++", "hirescam", "layercam"),
    layers: Sequence[nn.Module | str | None] = (None,),
) -> dict[str, dict[str, Tensor]]:
    """Several maps at several layers from one forward and one backward pass: {name of the layer:
    {method: (N, H, W)}}, each as its own function gives it. Raises ValueError as ``grad_cam``."""
    columns = raw_gradient_maps(model, images, [targets], methods, layers)
    return {
        name: {
            method: upsample_and_scale(maps[0], images.shape[2:]) for method, maps in found.items()
        }
        for name, found in columns.items()
    }


def raw_gradient_maps(
    model: nn.Module,
    images: Tensor,
    columns: Sequence[Sequence[int] | Tensor],
    methods: Sequence[str],
    layers: Sequence[nn.Module | str | None],
) -> dict[str, dict[str, list[Tensor]]]:
    """``gradient_maps`` of several targets per image, a list of maps (N, h, w): one per column (N,)
    of targets. One forward pass, and a backward pass per column."""
    for method in methods:
        if method not in GRADIENT_METHODS:
            raise ValueError(
                f"method {method!r}: expected {', '.join(GRADIENT_METHODS)}, in a list"
            )
    found = dict(
        find_layer(model, default_layer(model, images[:1]) if layer is None else layer)
        for layer in layers
    )
    run = LayerRun(model, images, list(found.values()))
    grids = {}
    for name, output in zip(found, run.outputs, strict=True):
        if output is None:
            raise ValueError(
                f"the layer {name} is not run when the network classifies an image: choose another"
            )
        grids[name] = grid_at(model, images, name, output)
    result = {name: {method: [] for method in methods} for name in found}
    for number, column in enumerate(columns, start=1):
        targets = checked_targets(column, run.logits)
        gradients = run.gradients(targets, retain_graph=number < len(columns))
        for name, output, gradient in zip(found, run.outputs, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"no logit depends on the layer {name}: choose another")
            grid = grids[name]
            if grid.tokens_before and gradient.any() and not grid.features(gradient).any():
                raise ValueError(
                    f"of the layer {name} only the class token reaches the logits, and no patch: "
                    f"choose {default_layer(model, images)} or one before it"
                )
            features = grid.features(at_least_float32(output.detach()))
            gradient = grid.features(at_least_float32(gradient))
            for method in methods:
                result[name][method].append(GRADIENT_METHODS[method](features, gradient))
    return result


# ---- activations and gradients (N, C, h, w) -> maps (N, h, w) -----------------------------------


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """(N, C, h, w) and (N, C) -> (N, h, w), in the precision of the features also where the caller
    has turned on autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("nchw,nc->nhw", features, weights)


def by_mean_gradient(features: Tensor, gradient: Tensor) -> Tensor:
    return weighted_sum(features, gradient.mean((2, 3)))


def by_positive_gradients(features: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++. Where the gradient is not positive, its term is 0; elsewhere alpha g = g / (2 + g
    sum_ab A_ab). Signed features can make a denominator of 0, which leaves the position out."""
    positive = gradient.clamp(min=0)
    denominator = 2 + positive * features.sum((2, 3), keepdim=True)
    terms = torch.where(denominator != 0, positive / denominator, 0.0)
    return weighted_sum(features, terms.sum((2, 3)))


def by_position(features: Tensor, gradient: Tensor) -> Tensor:
    return (features * gradient).sum(1)


def by_positive_position(features: Tensor, gradient: Tensor) -> Tensor:
    return (features * gradient.clamp(min=0)).sum(1)


GRADIENT_METHODS = {
    "gradcam": by_mean_gradient,
    "gradcam++": by_positive_gradients,
    "hirescam": by_position,
    "layercam": by_positive_position,
}


def upsample_and_scale(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) of any range -> (N, H, W) float32 in [0, 1]: negative values set to 0, upsampled,
    divided by the maximum."""
    return scale(upsample(maps, size))


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h, w) -> (N, H, W), negative values set to 0."""
    return F.interpolate(
        maps.clamp(min=0)[:, None], size=tuple(size), mode="bilinear", align_corners=False
    )[:, 0]


def scale(maps: Tensor) -> Tensor:
    """(N, H, W) divided by their maximum, float32; 0 where there is none."""
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), maps / largest, 0.0).float()
