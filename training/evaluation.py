"""Evaluation: loss and accuracy of a network on a set of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_model import Network, fuse_conv_bn
from common.device import Precision
from common.errors import Interrupted
from training.ranks import ALONE, Ranks


@dataclasses.dataclass
class Evaluation:
    """Loss (cross-entropy in nats), top-1 and top-5 in percent; images and correct answers per
    class."""

    loss: float
    top1: float
    top5: float
    class_counts: list[int]
    class_correct: list[int]


@torch.no_grad()
def evaluate(
    model: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    precision: Precision,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Loss and accuracy over all batches (images (N, 3, H, W), labels (N,)). The network runs in
    evaluation mode; its mode is restored. Each of several ranks has its own batches and gets the
    result of all.

    Raises Interrupted (on a single rank) when ``should_stop``."""
    was_training, device = model.training, precision.device
    model.eval()
    network = fuse_conv_bn(model) if device.type == "cpu" else model
    try:
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        correct = torch.zeros_like(counts)
        for images, labels in batches:
            if ranks.world_size == 1 and should_stop():
                raise Interrupted
            with precision.context():
                logits = network(images)
            logits = logits.float()
            hits = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            top1, top5 = hits[:, 0].sum(), hits.any(1).sum()
            sums += torch.stack([loss.double(), top1.double(), top5.double()])
            counts.index_add_(0, labels, torch.ones_like(labels))
            correct.index_add_(0, labels, hits[:, 0].long())
    finally:
        model.train(was_training)
    ranks.all_reduce(sums, counts, correct)
    total = max(1, int(counts.sum()))
    loss, top1, top5 = (sums / total).tolist()
    return Evaluation(loss, 100 * top1, 100 * top5, counts.tolist(), correct.tolist())
