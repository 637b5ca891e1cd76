"""The health of attention levels: whether their scores vary, their maps are spread out, and their
gates learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# a level is dead when its scores vary less than this over the positions of every image
DEAD_SD = 1e-6
UNIFORM_ENTROPY, COLLAPSED_ENTROPY = 0.999, 0.01  # of the map, over the largest possible

SEE_ALSO = '(docs/maps.md, "Reading the maps")'


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

    The entropy is that of softmax(scores) over the positions. For one of ``sigmoid_levels``, whose
    map does not sum to 1, it is that of sigmoid(scores) divided by its sum: how evenly the gate is
    open, whatever its height.
    """
    health = {}
    for level, score in scores.items():
        flat = score.detach().double().flatten(1)
        logits = torch.nn.functional.logsigmoid(flat) if level in sigmoid_levels else flat
        attention_map = logits.softmax(dim=1)
        entropy = torch.special.entr(attention_map).sum(dim=1) / math.log(max(flat.shape[1], 2))
        sd = flat.std(dim=1, correction=0)
        health[level] = LevelHealth(
            score_sd=sd.mean().item(),
            score_sd_max=sd.max().item(),
            entropy=entropy.mean().item(),
            gate_gradient=gate_gradients.get(level),
        )
    return health


def health_warnings(health: Mapping[str, LevelHealth]) -> list[tuple[str, str]]:
    """(key, text) of each fault, with what to try next; [] when all is well. The key names level
    and fault; it stays the same while the numbers in the text change."""
    found = []
    for level, h in health.items():
        name = f"attention level {level}"
        fault = map_fault(h)
        if fault:
            key, text = fault
            found.append((f"{level}/{key}", f"{name} {text} {SEE_ALSO}"))
        if h.gate_gradient == 0:
            text = (
                "has a zero gate gradient, so it does not learn: look for a frozen gate, "
                "or a classifier that does not use this level"
            )
            found.append((f"{level}/no-gradient", f"{name} {text} {SEE_ALSO}"))
    return found


def map_fault(h: LevelHealth) -> tuple[str, str] | None:
    """(key, text) of what is wrong with a level's scores and map; None: nothing."""
    if not (math.isfinite(h.score_sd_max) and math.isfinite(h.entropy)):
        return "non-finite", "has non-finite scores: try a lower --lr or --precision fp32"
    if h.score_sd_max < DEAD_SD:
        return "dead", (
            f"is dead: its scores do not vary (sd {h.score_sd_max:.1e} < {DEAD_SD:.0e} on every "
            f"image), so its map is flat; try less weight decay on the gate or a lower --lr"
        )
    if h.entropy > UNIFORM_ENTROPY:
        return "uniform", (
            f"is nearly uniform (entropy {h.entropy:.4f} of 1): usual in the first epochs; "
            f"if it stays, its scores are too small: try less weight decay on the gate"
        )
    if h.entropy < COLLAPSED_ENTROPY:
        return "collapsed", (
            f"looks at one position only (entropy {h.entropy:.4f} of 1): its scores are too "
            f"large; try a smaller initial gate or a lower --lr"
        )
    return None
