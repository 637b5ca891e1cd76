"""Maps averaged over flips and small shifts of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from explain.inference import at_least_float32
from explain.maps import upsample

# of the shorter side: less than a position of most last layers, where a map jumps by whole ones
SHIFT = 1 / 16


def smoothed(raw: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """The mean of the maps over ten views of each image (N, 3, H, W): as it is and flipped left to
    right, each in place and shifted by ``SHIFT`` up, down, left and right. Every map is moved back
    before the mean is taken, over the views that show the pixel.

    raw: images -> {name: (N, h, w)}, as raw_attention gives them. The result is (N, H, W), not
    negative, before it is scaled.
    """
    size = images.shape[2:]
    step = max(1, round(SHIFT * min(size)))
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(1, *size, device=images.device)
    for flip in (False, True):
        for dy, dx in ((0, 0), (-step, 0), (step, 0), (0, -step), (0, step)):
            maps = raw(shifted(images.flip(3) if flip else images, dy, dx, "replicate"))
            shown = torch.ones_like(counts)
            counts += moved_back(shown, flip, dy, dx)
            for name, values in maps.items():
                back = moved_back(upsample(at_least_float32(values), size), flip, dy, dx)
                sums[name] = sums[name] + back if name in sums else back
    return {name: total / counts for name, total in sums.items()}


def moved_back(maps: Tensor, flip: bool, dy: int, dx: int) -> Tensor:
    """(N, H, W) of a view at the place of the image; 0 where the view does not show it."""
    back = shifted(maps[:, None], -dy, -dx, "constant")[:, 0]
    return back.flip(2) if flip else back


def shifted(images: Tensor, dy: int, dx: int, border: str) -> Tensor:
    """(N, C, H, W) moved down by ``dy`` and right by ``dx`` pixels."""
    height, width = images.shape[2:]
    pad = max(abs(dy), abs(dx))
    padded = F.pad(images, (pad,) * 4, mode=border)
    return padded[:, :, pad - dy : pad - dy + height, pad - dx : pad - dx + width]
