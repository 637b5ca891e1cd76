"""Where the network looks while it trains: the same images after every epoch, their health and
their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attention_model import Network
from common.device import Precision
from data import ImageSet, evenly_spread, to_input
from explain.pictures import attention_sheet, title_of
from training.health import LevelHealth, attention_health, health_warnings
from training.report import Report


class AttentionMonitor:
    """Looks at the maps of the same images of the evaluation set after every epoch: their health,
    warnings, and overlays."""

    IMAGES = 16

    def __init__(
        self,
        eval_set: ImageSet,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int],
    ):
        self.eval_set, self.device, self.mean, self.std, self.size = (
            eval_set,
            device,
            mean,
            std,
            size,
        )
        self.health: dict[str, LevelHealth] = {}  # of the last epoch, per attention level
        self.warned: set[str] = set()  # keys of the warnings that the last epoch gave

    @torch.no_grad()
    def look(
        self,
        model: Network,
        precision: Precision,
        gate_gradients: Mapping[str, float | None],
        report: Report,
        epoch: int,
        *,
        overlays: bool,
    ) -> None:
        """Report the health and, with ``overlays``, the pictures; a warning is printed when it is
        new."""
        if not model.levels:
            return
        chosen = evenly_spread(self.IMAGES, len(self.eval_set)).to(self.eval_set.images.device)
        images, labels = self.eval_set.images[chosen], self.eval_set.labels[chosen].tolist()
        was_training = model.training
        model.eval()
        with precision.context():
            logits, scores = model.logits_and_scores(
                to_input(images.to(self.device), self.mean, self.std, self.size)
            )
        model.train(was_training)
        self.health = attention_health(scores, gate_gradients, model.sigmoid_levels)
        report.health(epoch, self.health)
        warnings = dict(health_warnings(self.health))
        for key, text in warnings.items():
            if key not in self.warned:
                print(f"warning: {text}")
        self.warned = set(warnings)
        if overlays:
            maps = {level: model.map_of(level, s).cpu().numpy() for level, s in scores.items()}
            probability, predicted = logits.float().softmax(1).max(1)
            names = self.eval_set.class_names
            titles = [
                title_of(names[t], names[s], p)
                for t, s, p in zip(labels, predicted.tolist(), probability.tolist(), strict=True)
            ]
            report.overlays(epoch, attention_sheet(images.cpu().numpy(), maps, titles))
