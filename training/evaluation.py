"""Evaluation: loss and accuracy of a network on a set of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_model import Network, fuse_conv_bn
from common.device import Precision
from common.errors import Interrupted
from data import ImageSet, eval_batches
from training.ranks import ALONE, Ranks

TOP = 5  # the best classes that are looked at; all of them where there are fewer
Z_95 = 1.959964  # standard deviations on each side of a normal distribution's mean that hold 95 %


# ---- evaluate -----------------------------------------------------------------------------------


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
    observe: Callable[[Tensor, Tensor, Tensor], object] = lambda logits, best, labels: None,
) -> Evaluation:
    """Loss and accuracy over all batches (images (N, 3, H, W), labels (N,)). The network runs in
    evaluation mode; its mode is restored. Each of several ranks has its own batches and gets the
    result of all.

    observe: gets of each batch, on the device, the logits (N, classes) in float32, the TOP best
    classes (N, 5), best first, and the labels (N,).

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
            best = logits.topk(min(TOP, num_classes), dim=1).indices
            hits = best == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            top1, top5 = hits[:, 0].sum(), hits.any(1).sum()
            sums += torch.stack([loss.double(), top1.double(), top5.double()])
            counts.index_add_(0, labels, torch.ones_like(labels))
            correct.index_add_(0, labels, hits[:, 0].long())
            observe(logits, best, labels)
    finally:
        model.train(was_training)
    ranks.all_reduce(sums, counts, correct)
    total = max(1, int(counts.sum()))
    loss, top1, top5 = (sums / total).tolist()
    return Evaluation(loss, 100 * top1, 100 * top5, counts.tolist(), correct.tolist())


# ---- of each image ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network sees in each of N images, as tensors on the CPU."""

    labels: Tensor  # (N,) int64, the true classes
    best: Tensor  # (N, 5) int64, the classes of the highest logits, the highest first
    probabilities: Tensor  # (N, 5) float32, of these classes
    losses: Tensor  # (N,) float32, cross-entropy in nats

    @property
    def predicted(self) -> Tensor:
        """(N,) int64."""
        return self.best[:, 0]

    def mistakes(self) -> Tensor:
        """The indices (M,) of the images that are seen as another class, the surest first."""
        wrong = (self.predicted != self.labels).nonzero().flatten()
        return wrong[self.probabilities[wrong, 0].argsort(descending=True, stable=True)]

    def confusions(self, num_classes: int) -> Tensor:
        """(classes, classes) int64: how many images of the row's class are seen as the column's."""
        cells = self.labels * num_classes + self.predicted
        return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


class PredictionRecorder:
    """Keeps of each batch what Predictions needs: give ``observe`` to ``evaluate``."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []

    def observe(self, logits: Tensor, best: Tensor, labels: Tensor) -> None:
        # all stays on the device: copying each batch would make a GPU wait
        probabilities = logits.softmax(1).gather(1, best)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.batches.append((labels, best, probabilities, losses))

    def predictions(self) -> Predictions:
        return Predictions(*(torch.cat(part).cpu() for part in zip(*self.batches, strict=True)))


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint, its network, and the test images."""

    path: Path
    saved: dict  # the checkpoint's content, see common/checkpoint.py
    config: dict  # the run's, with the folder of the images as it is now
    model: Network  # on the device
    precision: Precision  # and the device
    test: ImageSet

    @property
    def trained_for(self) -> str:
        """How long the weights were trained: "2 of 30 epochs"."""
        position = self.saved["position"]
        steps = f" and {position['step']} steps" if position["step"] else ""
        return f"{position['epoch']}{steps} of {self.config['epochs']} epochs"

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(input (N, 3, H, W), labels (N,)) of the test images, as the network wants them."""
        saved = self.saved
        device, size = self.precision.device, saved["input_size"]
        return eval_batches(self.test, device, saved["mean"], saved["std"], size)


@dataclasses.dataclass(frozen=True)
class EvaluatedCheckpoint(OpenedCheckpoint):
    """And what the network sees in the images."""

    result: Evaluation
    predictions: Predictions
    seconds: float
    command: str  # the command line


# ---- intervals ----------------------------------------------------------------------------------


def interval_95(percent: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, in percent: Wilson's score interval (E. B. Wilson,
    "Probable inference, the law of succession, and statistical inference", 1927), which stays
    between 0 and 100."""
    z, share = Z_95, percent / 100
    center = share + z * z / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 100 / (1 + z * z / images)
    # rounding would give -0.0
    return max(0.0, scale * (center - spread)), min(100.0, scale * (center + spread))


def mean_interval_95(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of independent losses (N,), by the normal distribution, but not
    below 0; NaN for a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    values = values.double()
    mean, spread = values.mean().item(), Z_95 * values.std().item() / math.sqrt(len(values))
    return max(mean - spread, 0.0), mean + spread  # in this order a NaN stays
