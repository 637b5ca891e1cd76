"""Pictures as a network sees them: files, PIL images, arrays and tensors; the part that it sees, at
the size of its input.

Pixels are arrays (H, W, 3) of levels from 0 to 255: uint8, or float32 where the caller gave floats.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import one_line
from common.files import expand_user
from data import as_rgb, center_box, open_rgb, resize

OVERSHOOT = 0.1  # by which floats may leave [0, 1], as after bicubic resizing; they are clipped
LAYOUTS = "(H, W), (H, W, 3) or (3, H, W)"


class View(NamedTuple):
    """What a network sees of a picture."""

    pixels: np.ndarray  # (h, w, 3), at the size of its input
    box: tuple[int, int, int, int]  # the part of the picture: x0 y0 x1 y1 in its pixels
    size: tuple[int, int]  # (height, width) of the picture


def view_of(pixels: np.ndarray, size: Sequence[int], center: bool) -> View:
    """The view of a picture (H, W, 3) at the ``size`` (height, width) of a network's input: of its
    centered square with ``center``, else of all of it, regardless of its aspect ratio. Bilinear and
    antialiased; uint8 stays uint8."""
    height, width = pixels.shape[:2]
    box = center_box(width, height) if center else (0, 0, width, height)
    return View(_resized(cut(pixels, box), tuple(size)), box, (height, width))


def cut(pixels: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """The part of the box x0 y0 x1 y1."""
    x0, y0, x1, y1 = box
    return pixels[y0:y1, x0:x1]


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    if pixels.dtype == np.uint8:  # as the data sets' images are resized
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return resize(batch, size)[0].permute(1, 2, 0).numpy()


# ---- what a caller may give ---------------------------------------------------------------------


def is_one(images: object) -> bool:
    """Whether this is one image, rather than several: a list, or a batch of four dimensions."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return True
    return isinstance(images, (np.ndarray, Tensor)) and images.ndim != 4


def each_pixels(images: object) -> Iterator[np.ndarray]:
    """The pixels of each image, read one at a time. What a caller may give is described at
    TrainedNetwork. Raises ValueError for anything else, and UserError for a file that cannot be
    read."""
    if is_one(images):
        yield pixels_of(images, "the image")
        return
    # a set has no order; text and mappings are iterable, too, but no lists of images
    if not isinstance(images, Iterable) or isinstance(images, (bytes, Mapping, set, frozenset)):
        raise ValueError(
            f"expected a file name, a PIL image, an array or a tensor, or a list of them, "
            f"got {type(images).__name__}"
        )
    number = -1
    for number, image in enumerate(images):
        if not is_one(image):
            raise ValueError(f"image {number} is {described(image)}: expected one image")
        yield pixels_of(image, f"image {number}")
    if number < 0:
        raise ValueError("there are no images: the list is empty")


def pixels_of(image: object, name: str) -> np.ndarray:
    """The pixels of one image; errors call it ``name``."""
    if isinstance(image, (str, os.PathLike)):
        return np.asarray(open_rgb(expand_user(image)))
    if isinstance(image, Image.Image):
        return np.asarray(_rgb(image, name))
    values = _channels_last(image, name)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f":
        raise ValueError(
            f"{name} has values of type {values.dtype}: expected uint8, or floats from 0 to 1"
        )
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT):  # so that NaN is refused
        raise ValueError(
            f"{name} has values from {lowest:g} to {highest:g}: floats must be from 0 to 1 "
            "(the network normalizes them itself), levels from 0 to 255 must be uint8"
        )
    return np.clip(values.astype(np.float32), 0, 1) * 255


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode as RGB, transparency on white, as open_rgb makes it of a file."""
    try:
        return as_rgb(image)
    # PIL decodes late: it raises these, and struct.error and more, for a damaged file
    except Exception as error:
        raise ValueError(f"{name} cannot be read ({one_line(error)})") from None


def _channels_last(image: np.ndarray | Tensor, name: str) -> np.ndarray:
    """An array or tensor in one of LAYOUTS as an array (H, W, 3). Where both ends have three
    entries, the channels are the first dimension of a tensor, and the last of an array."""
    first, last = (0, 2) if torch.is_tensor(image) else (2, 0)
    three = [axis for axis in (first, last) if image.ndim == 3 and image.shape[axis] == 3]
    if 0 in image.shape or image.ndim != 2 and not three:
        raise ValueError(f"{name} is {described(image)}: expected {LAYOUTS}, or a batch of these")
    if torch.is_tensor(image):
        image = image.detach().cpu()
        # NumPy has no bfloat16
        image = (image.float() if image.is_floating_point() else image).numpy()
    image = np.asarray(image)
    if image.ndim == 2:
        return np.repeat(image[:, :, None], 3, axis=2)
    return np.moveaxis(image, three[0], 2)


def described(image: object) -> str:
    """The type of an image, and its shape if it has one, for messages."""
    if isinstance(image, (np.ndarray, Tensor)):
        kind = "a tensor" if torch.is_tensor(image) else "an array"
        return f"{kind} of shape {tuple(image.shape)}"
    return f"of type {type(image).__name__}"
