"""The health of attention levels: do their scores vary, are their maps spread out, do their gates
learn?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# scores that vary less than this over the positions of every image: the level is dead
DEAD_SD = 1e-6


UNIFORM_ENTROPY, COLLAPSED_ENTROPY = 0.999, 0.01  # of the map, over the largest possible


@dataclass(frozen=True)
class LevelHealth:
    """How an attention level does. Scores are its compatibility scores, before the softmax or
    sigmoid."""

    score_sd: float  # standard deviation of the scores over an image's positions, mean over images
    # the same, largest over images: a level is dead when it is small on every image
    score_sd_max: float
    # of the map over its maximum log(H*W), mean over images: 1 is uniform, 0 one position
    entropy: float
    # norm of the gradient of the gate's parameters; None where it has none (dp)
    gate_gradient: float | None


def attention_health(
    scores: Mapping[str, Tensor],
    gate_gradients: Mapping[str, float | None],
    sigmoid_levels: tuple[str, ...] = (),
) -> dict[str, LevelHealth]:
    """Health of each level from its scores (N, H, W), in float64.

    The entropy is that of softmax(scores) over the positions. For one of `sigmoid_levels`, whose
    map does not sum to 1, it is that of sigmoid(scores) divided by its sum: how evenly the gate is
    open, whatever its height.
    """
    health = {}
    for level, score in scores.items():
        flat = score.detach().double().flatten(1)
        attention_map = (
            torch.nn.functional.logsigmoid(flat) if level in sigmoid_levels else flat
        ).softmax(dim=1)
        entropy = torch.special.entr(attention_map).sum(dim=1) / math.log(max(flat.shape[1], 2))
        sd = flat.std(dim=1, correction=0)
        health[level] = LevelHealth(
            sd.mean().item(), sd.max().item(), entropy.mean().item(), gate_gradients.get(level)
        )
    return health


def health_warnings(health: Mapping[str, LevelHealth]) -> list[tuple[str, str]]:
    """What is wrong with the attention: (key, text) for each thing, with what to try next; [] when
    all is well. The key names level and fault, and stays the same while the numbers in the text
    change."""
    look, found = '(README, "Reading the maps")', []
    for level, each in health.items():
        name = f"attention level {level}"
        if not all(map(math.isfinite, (each.score_sd_max, each.entropy))):
            found.append(
                (
                    f"{level}/non-finite",
                    f"{name} has non-finite scores: try a lower --lr or --precision fp32 {look}",
                )
            )
        elif each.score_sd_max < DEAD_SD:
            found.append(
                (
                    f"{level}/dead",
                    f"{name} is dead: its scores do not vary (sd {each.score_sd_max:.1e} < {DEAD_SD:.0e} "
                    f"on every image), so its map is flat; try less weight decay on the gate or a lower --lr {look}",
                )
            )
        elif each.entropy > UNIFORM_ENTROPY:
            found.append(
                (
                    f"{level}/uniform",
                    f"{name} is nearly uniform (entropy {each.entropy:.4f} of 1): usual in the first "
                    f"epochs; if it stays, its scores are too small: try less weight decay on the gate {look}",
                )
            )
        elif each.entropy < COLLAPSED_ENTROPY:
            found.append(
                (
                    f"{level}/collapsed",
                    f"{name} looks at one position only (entropy {each.entropy:.4f} of 1): its scores "
                    f"are too large; try a smaller initial gate or a lower --lr {look}",
                )
            )
        if each.gate_gradient == 0:
            found.append(
                (
                    f"{level}/no-gradient",
                    f"{name} has a zero gate gradient, so it does not learn: look for a frozen "
                    f"gate, or a classifier that does not use this level {look}",
                )
            )
    return found
