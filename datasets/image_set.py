"""A data set in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set in memory. Channels are last, so that a batch permuted to (N, 3, H, W) is in
    channels_last format."""

    images: torch.Tensor  # (N, H, W, 3) uint8
    labels: torch.Tensor  # (N,) int64
    class_names: tuple[str, ...]
    source: str  # for people: where the images came from
    # (N, 4) float32, x0 y0 x1 y1 in pixels, where the deciding object is known
    boxes: torch.Tensor | None = None
    # (N, P, 3) float32, x y in pixels and 1 visible / 0 not (then x = y = 0)
    parts: torch.Tensor | None = None
    part_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1], self.images.shape[2]

    def to(self, device: torch.device | str) -> ImageSet:
        return self._with(lambda tensor: tensor.to(device))

    def subset(self, indices) -> ImageSet:
        """The images of `indices` (a sequence or an int64 tensor), in that order; classes stay as
        they are."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._with(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def _with(self, change) -> ImageSet:
        boxes, parts = (
            None if known is None else change(known) for known in (self.boxes, self.parts)
        )
        return replace(
            self, images=change(self.images), labels=change(self.labels), boxes=boxes, parts=parts
        )
