"""A data set in memory, or mapped into it from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set. Channels are last, so that a batch permuted to (N, 3, H, W) is in channels_last
    format.

    ``stored`` may be mapped from a file larger than the memory. Subsets share it: each names the
    ``rows`` that it has, and ``take`` reads those of a batch.
    """

    stored: Tensor  # (M, H, W, 3) uint8
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]
    source: str  # where the images came from, for messages
    # (N, 4) float32, x0 y0 x1 y1 in pixels: the object that decides the class, where known
    boxes: Tensor | None = None
    # (N, P, 3) float32, x y in pixels and 1 visible / 0 not (then x = y = 0)
    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()
    rows: Tensor | None = None  # (N,) int64, of ``stored``; None: all, in their order
    files: tuple[str, ...] = ()  # the N names of the image files below their folder, where known
    content: int = 0  # a checksum of the files of the whole data set, where known

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.stored.shape[1], self.stored.shape[2]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes of the set's images."""
        return len(self) * self.stored[:1].nbytes

    @property
    def images(self) -> Tensor:
        """(N, H, W, 3) uint8, all at once: a copy in memory unless the set is all of ``stored``."""
        return self.stored if self.rows is None else self.stored.index_select(0, self.rows)

    def take(self, indices: Tensor | slice) -> Tensor:
        """The images (B, H, W, 3) of ``indices``: int64 (B,) on the set's device, or a slice."""
        if self.rows is not None:
            indices = self.rows[indices]
        if isinstance(indices, slice):
            return self.stored[indices]
        return self.stored.index_select(0, indices)

    def to(self, device: torch.device | str) -> ImageSet:
        """The set on a device; on another one than before, with its own images only."""
        device = torch.device(device)
        if torch.empty(0, device=device).device == self.device:  # "cuda" is "cuda:0"
            return self
        return self._with(
            lambda tensor: tensor.to(device), self.images.to(device), None, self.files
        )

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images of ``indices`` (a sequence or an int64 tensor), in that order. Classes stay as
        they are."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        here = indices.to(self.device)
        return self._with(
            lambda tensor: tensor.index_select(0, indices.to(tensor.device)),
            self.stored,
            here if self.rows is None else self.rows.index_select(0, here),
            tuple(self.files[i] for i in indices.tolist()) if self.files else (),
        )

    def _with(
        self,
        change: Callable[[Tensor], Tensor],
        stored: Tensor,
        rows: Tensor | None,
        files: tuple[str, ...],
    ) -> ImageSet:
        return replace(
            self,
            stored=stored,
            rows=rows,
            files=files,
            labels=change(self.labels),
            boxes=None if self.boxes is None else change(self.boxes),
            parts=None if self.parts is None else change(self.parts),
        )
