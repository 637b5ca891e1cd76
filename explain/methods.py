"""The methods of cam.py by name: which apply to a network, and their maps of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from explain.maps import (
    attention_maps,
    class_activation_map,
    default_layer,
    feature_layers,
    grad_cam,
)
from explain.networks import TrainedNetwork

METHODS = ("attention", "cam", "gradcam")


class Methods(NamedTuple):
    names: list[str]  # of METHODS
    layer: str | None  # of gradcam


class BatchMaps(NamedTuple):
    values: np.ndarray  # (N, H, W)
    rank: int | None  # the column of the classes (N, K) that they are of; None: of no class


def maps_of(
    network: TrainedNetwork, methods: Methods, batch: Tensor, classes: Tensor
) -> dict[str, BatchMaps]:
    """The maps of a batch (N, 3, H, W) for its classes (N, K), by name. Attention has a map per
    level ("conv7") and depends on no class; cam and gradcam have one per column ("cam", "cam-2").
    """
    found = {}
    with network.autocast():
        for method in methods.names:
            if method == "attention":
                for level, maps in attention_maps(network.model, batch).items():
                    found[level] = BatchMaps(maps.cpu().numpy(), None)
                continue
            for rank, targets in enumerate(classes.T.to(batch.device)):
                if method == "cam":
                    maps = class_activation_map(network.model, batch, targets)
                else:
                    maps = grad_cam(network.model, batch, targets, methods.layer)
                name = f"{method}-{rank + 1}" if rank else method
                found[name] = BatchMaps(maps.cpu().numpy(), rank)
    return found


def applicable(network: TrainedNetwork, asked: str, layer: str | None) -> Methods:
    """The methods that apply to the network, of those of --method. Raises UserError if one that was
    asked for does not apply."""
    batch, classes = probe(network), torch.zeros(1, 1, dtype=torch.int64)
    names = []
    for method in METHODS if asked == "all" else (asked,):
        try:
            if method == "gradcam":
                layer = layer or default_layer(network.model, batch)
            maps_of(network, Methods([method], layer), batch, classes)
        except ValueError as error:
            if asked != "all" or method == "gradcam" and layer:
                option = f"--method {method}" if method == asked else f"--layer {layer}"
                raise UserError(f"{option}: {error}", 2) from None
            print(f"{method} skipped: {error}")
        else:
            names.append(method)
    if not names:
        raise UserError("no method applies to this network")
    if "gradcam" in names:
        print(f"gradcam at {layer}")
    return Methods(names, layer)


def list_layers(network: TrainedNetwork) -> int:
    batch = probe(network)
    default = default_layer(network.model, batch)
    for name, (channels, height, width) in feature_layers(network.model, batch).items():
        mark = "   (default)" if name == default else ""
        print(f"{name:<32} {channels:>5} x {height} x {width}{mark}")
    return 0


def probe(network: TrainedNetwork) -> Tensor:
    """(1, 3, H, W) noise, to find out what applies to a network before any image is read."""
    noise = torch.randn(1, 3, *network.size, generator=torch.Generator().manual_seed(0))
    return noise.to(network.device)
