"""A network run as it is: evaluation mode, no parameter differentiated, everything restored."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

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
    # recomputed in a backward pass, activations would not go through the hooks of the forward pass
    saving = [m for m in model.modules() if getattr(m, "checkpoint_activations", False)]
    try:
        model.eval()
        for module in saving:
            module.checkpoint_activations = False
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in saving:
            module.checkpoint_activations = True
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


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 as float32: sums over positions and channels need the precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
