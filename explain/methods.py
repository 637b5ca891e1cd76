"""The methods of cam.py by name: which apply to a network, and their maps of a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from explain.layers import block_layers, default_layer, feature_layers
from explain.maps import (
    GRADIENT_METHODS,
    raw_attention,
    raw_class_activation,
    raw_gradient_maps,
    scale,
    upsample,
)
from explain.networks import TrainedNetwork
from explain.smoothing import smoothed

METHODS = ("attention", "cam", *GRADIENT_METHODS)
USUAL = ("attention", "cam", "gradcam")  # without --method
BLOCKS = "blocks"  # --layer blocks: the last layer of each


class Methods(NamedTuple):
    names: list[str]  # of METHODS
    layers: list[str]  # of the gradient methods
    smooth: bool = False  # the mean over flips and shifts
    query: Tensor | None = None  # (1, 3, H, W): attention to this image's g, beside the image's own

    def gradient_names(self) -> list[str]:
        return [name for name in self.names if name in GRADIENT_METHODS]


class BatchMaps(NamedTuple):
    values: np.ndarray  # (N, H, W)
    rank: int | None  # the column of the classes (N, K) that they are of; None: of no class
    label: str  # the level; or the method, and below it the layer where there are several


def maps_of(
    network: TrainedNetwork, methods: Methods, batch: Tensor, classes: Tensor
) -> dict[str, BatchMaps]:
    """The maps of a batch (N, 3, H, W) for its classes (N, K), by name. Attention has a map per
    level ("conv7") and depends on no class; the others have one per column ("cam", "cam-2"), and
    the gradient methods one per layer where there are several ("gradcam-layer3").
    """
    labels: dict[str, tuple[int | None, str]] = {}
    raw = functools.partial(raw_maps, network, methods, classes.T.to(batch.device), labels)
    with network.autocast():
        if methods.smooth:
            maps = smoothed(raw, batch)
        else:
            maps = {name: upsample(values, batch.shape[2:]) for name, values in raw(batch).items()}
    return {
        name: BatchMaps(scale(values).cpu().numpy(), *labels[name]) for name, values in maps.items()
    }


def raw_maps(
    network: TrainedNetwork,
    methods: Methods,
    columns: Sequence[Tensor],
    labels: dict[str, tuple[int | None, str]],
    batch: Tensor,
) -> dict[str, Tensor]:
    """{name: (N, h, w)}; the rank and the label of each are written into ``labels``."""
    model, found = network.model, {}

    def add(label: str, rank: int | None, values: Tensor) -> None:
        name = "-".join(label.split("\n")) + (f"-{rank + 1}" if rank else "")
        found[name], labels[name] = values, (rank, label)

    if "attention" in methods.names:
        asked = {} if methods.query is None else raw_attention(model, batch, methods.query)
        for level, values in raw_attention(model, batch).items():
            add(level, None, values)
            if asked:
                add(f"{level}\nquery", None, asked[level])
    if "cam" in methods.names:
        for rank, targets in enumerate(columns):
            add("cam", rank, raw_class_activation(model, batch, targets))
    names = methods.gradient_names()
    if names:
        by_layer = raw_gradient_maps(model, batch, columns, names, methods.layers)
        for method in names:
            for layer, by_method in by_layer.items():
                label = method if len(by_layer) == 1 else f"{method}\n{layer}"
                for rank, values in enumerate(by_method[method]):
                    add(label, rank, values)
    return found


def applicable(
    network: TrainedNetwork,
    asked: Sequence[str],
    layers: Sequence[str] = (),
    smooth: bool = False,
    query: Tensor | None = None,
) -> Methods:
    """The methods that apply to the network, of those of --method: the ``asked`` ones, "all", or
    without any the ``USUAL`` ones. Raises UserError if one that was asked for does not apply."""
    batch, classes = probe(network), torch.zeros(1, 1, dtype=torch.int64)
    chosen = METHODS if "all" in asked else [m for m in METHODS if m in (asked or USUAL)]
    explicit = asked and "all" not in asked
    names, given, layers = [], bool(layers), list(dict.fromkeys(layers))
    for method in chosen:
        option = f"--method {method}"
        try:
            if method in GRADIENT_METHODS:
                if given:
                    option = f"--layer {', '.join(layers)}"
                layers = expanded(network, batch, layers)
            maps_of(network, Methods([method], layers), batch, classes)
        except ValueError as error:
            if explicit or given and method in GRADIENT_METHODS:
                raise UserError(f"{option}: {error}", 2) from None
            print(f"{method} skipped: {error}")
        else:
            names.append(method)
    if not names:
        raise UserError("no method applies to this network")
    methods = Methods(names, layers, smooth, query)
    if query is not None:
        check_query(network, methods, batch)
    if methods.gradient_names():
        print(f"{', '.join(methods.gradient_names())} at {', '.join(layers)}")
    if {"gradcam", "attention"} <= set(names) and "hirescam" not in names:
        print("note: behind attention gates Grad-CAM misleads: compare it with --method hirescam")
    return methods


def check_query(network: TrainedNetwork, methods: Methods, batch: Tensor) -> None:
    """Raises UserError if --query changes nothing."""
    if "attention" not in methods.names:
        raise UserError("--query is for attention maps, which are not asked for, or not there", 2)
    try:
        raw_attention(network.model, batch, methods.query)
    except ValueError as error:
        raise UserError(f"--query: {error}", 2) from None


def expanded(network: TrainedNetwork, batch: Tensor, layers: Sequence[str]) -> list[str]:
    """The layers, "blocks" replaced by the last of each; without any, the default. Raises
    ValueError as ``default_layer`` does."""
    if not layers:
        return [default_layer(network.model, batch)]
    found = []
    for layer in layers:
        found += block_layers(network.model, batch) if layer == BLOCKS else [layer]
    return list(dict.fromkeys(found))


def list_layers(network: TrainedNetwork) -> int:
    batch = probe(network)
    default, blocks = default_layer(network.model, batch), block_layers(network.model, batch)
    for name, (channels, height, width) in feature_layers(network.model, batch).items():
        marks = [mark for mark, at in (("default", [default]), (BLOCKS, blocks)) if name in at]
        note = f"   ({', '.join(marks)})" if marks else ""
        print(f"{name:<32} {channels:>5} x {height} x {width}{note}")
    return 0


def probe(network: TrainedNetwork) -> Tensor:
    """(1, 3, H, W) noise, to find out what applies to a network before any image is read."""
    noise = torch.randn(1, 3, *network.size, generator=torch.Generator().manual_seed(0))
    return noise.to(network.device)
