"""How much memory a network takes, checked before it is built: the system kills a process that
takes too much, without a message."""

from __future__ import annotations

import torch
from torch import nn

from common.errors import UserError
from common.process import total_memory


def check_memory(model: nn.Module, config: dict, device: torch.device) -> None:
    """Check the network of a config, on the meta device. Raises UserError where the machine lacks
    the memory for its weights or, on a CPU, for training on two images at a time. (A full GPU
    raises an error of its own.)"""
    memory = total_memory()
    weights = sum(p.nbytes for p in model.parameters())
    if device.type == "cpu":
        weights *= 4  # with gradients, momentum and moving average
    if weights > memory:
        raise UserError(
            f"--width {config['width']:g}: the network's weights and what the optimizer keeps of "
            f"them take {weights / 2**30:,.0f} GiB of memory, and this machine has "
            f"{memory / 2**30:,.0f}",
            2,
        )
    if device.type == "cpu" and config["image_size"]:
        model.checkpoint_activations = config["checkpoint_activations"]
        kept = weights + bytes_kept(model, config["image_size"])
        if kept > memory:
            raise UserError(
                f"--image-size {config['image_size']}: to train on two images at a time takes "
                f"over {kept / 2**30:,.0f} GiB of memory, and this machine has "
                f"{memory / 2**30:,.0f}",
                2,
            )


def bytes_kept(model: nn.Module, size: int, images: int = 2) -> int:
    """Bytes that a forward pass on the meta device keeps for the backward pass, in float32: the
    storages of all saved tensors, weights among them, each counted once."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    batch = torch.empty(images, 3, size, size, device="meta")
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(batch)
    return sum(storage.nbytes() for storage in storages.values())
