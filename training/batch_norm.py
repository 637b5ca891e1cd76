"""Batch norm during a run: what is frozen, what sees too few images, and the statistics used in an
evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from attention_model import Network
from common.device import Precision
from training.ranks import Ranks

MIN_BN_BATCH = 8  # images; batch norm's mean and variance of fewer are mostly noise


class BatchNormPolicy:
    """Decides which batch norms of a network in training use their running statistics, and which
    weights of its trunk are frozen.

    While it is frozen (for ``freeze_steps``), the transferred trunk neither trains nor updates its
    batch-norm statistics. Batch norm that sees fewer than MIN_BN_BATCH images at a time (a small
    batch or micro-batch) uses its running statistics, without updating them, where these came with
    transferred weights, and everywhere when it sees one image.

    Args:
        transferred: names of the weights that came from another network.
        images_per_step: of all ranks together."""

    def __init__(
        self,
        model: Network,
        transferred: frozenset[str],
        *,
        freeze_steps: float,
        images_per_step: int,
        device: torch.device,
        ranks: Ranks,
    ):
        self.model, self.transferred, self.freeze_steps = model, transferred, freeze_steps
        self.images_per_step, self.device, self.ranks = images_per_step, device, ranks
        self.mode: tuple | None = None  # what the network was last set to; None: unknown

    def batch_size(self, micro_batch: int | None) -> int:
        """How many images batch norm sees at a time, at most."""
        ranks = self.ranks.world_size
        per_rank = min(micro_batch or self.images_per_step, math.ceil(self.images_per_step / ranks))
        return per_rank * ranks if self.device.type == "cuda" else per_rank  # SyncBatchNorm

    def set_train_mode(self, step: int, micro_batch: int | None) -> None:
        """Put the network into training mode for optimizer step ``step`` (from 0, over the whole
        run)."""
        frozen, images = step < self.freeze_steps, self.batch_size(micro_batch)
        too_few = images < MIN_BN_BATCH
        mode = frozen, images if too_few else None
        if mode == self.mode:
            return
        self.mode = mode
        self.model.train()
        for name, p in self.model.trunk.named_parameters(prefix=self.model.TRUNK):
            p.requires_grad_(not (frozen and name in self.transferred))
        trunk = set(self.model.trunk.modules())
        for name, module in self.model.named_modules():
            if isinstance(module, BatchNorm):
                is_transferred = f"{name}.running_mean" in self.transferred
                is_frozen = is_transferred and frozen and module in trunk
                module.train(not (is_frozen or too_few and (is_transferred or images == 1)))

    @torch.no_grad()
    def recalibrate(
        self,
        model: Network,
        images: Iterable[Tensor],
        precision: Precision,
        step: int,
        micro_batch: int | None,
    ) -> None:
        """Recompute the statistics of ``model`` (the network, or its moving average) from training
        images, batches (N, 3, H, W).

        The running ones do not fit its weights: they are of smaller images (progressive resizing),
        of the weights before they were averaged (arXiv 1803.05407), and of activations that dropout
        had widened (arXiv 1801.05134; a convolution that starts as the identity averages none of
        that out). Norms that kept theirs in ``step`` keep them here."""
        self.mode = None
        self.set_train_mode(step, micro_batch)
        updating = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, BatchNorm) and module.training
        }
        norms = [module for name, module in model.named_modules() if name in updating]
        before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for batch in images:
            with precision.context():
                model(batch)
        for norm, (momentum, state) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # pc does not run the global branch
                norm.load_state_dict(state)
        model.eval()
        self.mode = None

    def note(self, micro_batch: int | None) -> str:
        """What batch norm does at this micro-batch, in a sentence."""
        count = self.batch_size(micro_batch)
        if count >= MIN_BN_BATCH:
            return f"Batch norm sees {count} images at a time."
        if count == 1:
            return (
                "Batch norm uses its running statistics as they are, since one image has none "
                "worth using: good for fine-tuning, not for training from scratch."
            )
        if self.transferred:
            return (
                "Batch norm uses the running statistics that came with the transferred weights, "
                "as they are."
            )
        if micro_batch and micro_batch < self.images_per_step:
            advice = "--checkpoint-activations or a smaller --image-size would allow"
        else:
            advice = "--batch-size gives it"
        return (
            f"Batch norm sees {count} images at a time, whose statistics are noisy: {advice} more."
        )
