"""Watch the attention maps of the same images after every epoch: health, warnings, overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention_model import Network
from common.device import Precision
from common.fonts import drawable_names
from data import ImageSet, evenly_spread, to_input
from explain.pictures import attention_sheet, title_of
from training.attention_health import LevelHealth, attention_health, health_warnings
from training.report import Report

# TensorBoard shows a picture in a card of about 365 x 215 pixels and drops rows of a larger one,
# which text does not survive: two images with their maps fit.
CARDS = 4
CARD = {"min_side": 64, "max_side": 72, "sheet_width": 360, "margin": 2, "legend": False}


class Seen(NamedTuple):
    """N images and what a network sees in them, on the CPU."""

    images: Tensor  # (N, H, W, 3) uint8
    labels: Tensor  # (N,) int64
    logits: Tensor  # (N, classes)
    scores: dict[str, Tensor]  # of each level, (N, h, w)

    def subset(self, indices: Tensor) -> Seen:
        scores = {level: score[indices] for level, score in self.scores.items()}
        return Seen(self.images[indices], self.labels[indices], self.logits[indices], scores)


def maps_of(model: Network, seen: Seen) -> dict[str, np.ndarray]:
    """The maps of each level, (N, h, w)."""
    return {level: model.map_of(level, score).numpy() for level, score in seen.scores.items()}


class AttentionMonitor:
    """Reports the attention maps of IMAGES images, evenly spread over the evaluation set.

    ``mean``, ``std`` and ``size`` (height, width): of the network's input."""

    IMAGES = 16

    def __init__(
        self,
        eval_set: ImageSet,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int],
    ):
        self.eval_set = eval_set
        self.device = device
        self.mean, self.std, self.size = mean, std, size
        self.health: dict[str, LevelHealth] = {}  # of the last epoch, per attention level
        self.warned: set[str] = set()  # keys of the last epoch's warnings
        # of the classes, as the pictures have them; and what to print with the first ones
        self.names, self.note_on_names = drawable_names(eval_set.class_names)

    def observe(
        self,
        model: Network,
        precision: Precision,
        gate_gradients: Mapping[str, float | None],
        report: Report,
        epoch: int,
        *,
        overlays: bool,
    ) -> None:
        """Report the health and, with ``overlays``, the pictures. Prints the warnings that the
        epoch before did not have, and once a note on letters that no font has. The model's mode
        is restored."""
        if not model.levels:
            return
        seen = self.look(model, precision, evenly_spread(self.IMAGES, len(self.eval_set)))
        self.health = attention_health(seen.scores, gate_gradients, model.sigmoid_levels)
        report.health(epoch, self.health)
        self.warn()
        if overlays:
            if self.note_on_names:
                print(f"note: {self.note_on_names}")
                self.note_on_names = None
            pairs = evenly_spread(2 * CARDS, len(seen.labels)).split(2)
            sheets = [self.draw(model, seen.subset(pair), **CARD) for pair in pairs]
            report.overlays(epoch, sheets)

    def sheet(
        self, model: Network, precision: Precision, indices: Tensor, **options: object
    ) -> np.ndarray:
        """A contact sheet, (H, W, 3) uint8, of the evaluation set's images ``indices`` (N,) with
        their maps, if the network has any. ``options``: of attention_sheet. The model's mode is
        restored."""
        return self.draw(model, self.look(model, precision, indices), **options)

    @torch.no_grad()
    def look(self, model: Network, precision: Precision, indices: Tensor) -> Seen:
        """What the network sees in the evaluation set's images ``indices`` (N,). Its mode is
        restored."""
        indices = indices.to(self.eval_set.device)
        images, labels = self.eval_set.take(indices), self.eval_set.labels[indices]
        was_training = model.training
        model.eval()
        with precision.context():
            inputs = to_input(images.to(self.device), self.mean, self.std, self.size)
            logits, scores = model.logits_and_scores(inputs)
        model.train(was_training)
        scores = {level: score.cpu() for level, score in scores.items()}
        return Seen(images.cpu(), labels.cpu(), logits.cpu(), scores)

    def draw(self, model: Network, seen: Seen, **options: object) -> np.ndarray:
        """A contact sheet, (H, W, 3) uint8."""
        maps = maps_of(model, seen)
        titles = self.titles(seen.labels.tolist(), seen.logits)
        options = {"legend": bool(maps), **options}
        return attention_sheet(seen.images.numpy(), maps, titles, **options)

    def warn(self) -> None:
        """Print the warnings that are new since the last epoch."""
        warnings = dict(health_warnings(self.health))
        for key, text in warnings.items():
            if key not in self.warned:
                print(f"warning: {text}")
        self.warned = set(warnings)

    def titles(self, labels: list[int], logits: Tensor) -> list[str]:
        """The title of each image: its class, and the network's answer with its probability."""
        probability, predicted = logits.float().softmax(1).max(1)
        return [
            title_of(self.names[label], self.names[answer], p)
            for label, answer, p in zip(
                labels, predicted.tolist(), probability.tolist(), strict=True
            )
        ]
