"""What a network takes of the machine's memory, known before it is built: the system ends a process
that takes too much, and says nothing."""

from __future__ import annotations

import os

import torch
from torch import nn

from common.errors import UserError


def check_memory(model: nn.Module, config: dict, device: torch.device) -> None:
    """For the network of a config, on the meta device. Raises UserError where the machine has not
    the memory for its weights or, on a CPU, for training on two images at a time. (A GPU says
    itself that its memory is full.)"""
    memory = total_memory()
    weights = sum(p.nbytes for p in model.parameters())
    if device.type == "cpu":
        weights *= 4  # with gradients, momentum and moving average
    if weights > memory:
        raise UserError(
            f"--width {config['width']:g}: the network's weights and what the optimizer keeps of them take "
            f"{weights / 2**30:,.0f} GiB of memory, and this machine has {memory / 2**30:,.0f}",
            2,
        )
    if device.type == "cpu" and config["image_size"]:
        model.checkpoint_activations = config["checkpoint_activations"]
        kept = weights + bytes_kept(model, config["image_size"])
        if kept > memory:
            raise UserError(
                f"--image-size {config['image_size']}: to train on two images at a time takes over "
                f"{kept / 2**30:,.0f} GiB of memory, and this machine has {memory / 2**30:,.0f}",
                2,
            )


def total_memory() -> float:
    """Bytes of this machine; infinite where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no POSIX
        return float("inf")


def bytes_kept(model: nn.Module, size: int, images: int = 2) -> int:
    """What the forward pass of a network on the meta device keeps for the backward pass, in
    float32: the storages behind all saved tensors, each counted once, weights among them."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(
            torch.empty(images, 3, size, size, device="meta").contiguous(
                memory_format=torch.channels_last
            )
        )
    return sum(storage.nbytes() for storage in storages.values())
