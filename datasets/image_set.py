"""A data set in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set in memory. Channels are last, so that a batch permuted to (N, 3, H, W) is in
    channels_last format."""

    images: Tensor  # (N, H, W, 3) uint8
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]
    source: str  # where the images came from, for messages
    # (N, 4) float32, x0 y0 x1 y1 in pixels: the object that decides the class, where known
    boxes: Tensor | None = None
    # (N, P, 3) float32, x y in pixels and 1 visible / 0 not (then x = y = 0)
    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1], self.images.shape[2]

    def to(self, device: torch.device | str) -> ImageSet:
        return self._with(lambda tensor: tensor.to(device))

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images of ``indices`` (a sequence or an int64 tensor), in that order. Classes stay as
        they are."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._with(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def _with(self, change: Callable[[Tensor], Tensor]) -> ImageSet:
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            boxes=None if self.boxes is None else change(self.boxes),
            parts=None if self.parts is None else change(self.parts),
        )
