"""Augmentation of whole batches of uint8 images on the device they are on, and the training set as
such batches.

No worker processes: a batch is an index into the set, cropped, flipped, recoloured and normalised
in one go.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Draw(NamedTuple):
    """What one batch's augmentation is made of, a value for each image; each tensor is (N,)."""

    top: torch.Tensor  # int64, first row of the crop in the padded image, 0 to 2 pad
    left: torch.Tensor  # int64, first column of it
    flip: torch.Tensor  # bool
    cut_y: torch.Tensor  # int64, centre of the cutout square in the crop, in pixels
    cut_x: torch.Tensor
    # float, 0 to 1: how much of the picture the zoom shows, from the least to all
    area: torch.Tensor
    aspect: torch.Tensor  # float, 0 to 1: its shape, from 3:4 to 4:3
    place_y: torch.Tensor  # float, 0 to 1: its place, from the top edge to the bottom edge
    place_x: torch.Tensor
    # float (N, 3), 0 to 1: brightness, contrast and saturation, from the least to the most
    light: torch.Tensor


class Augmentation:
    """Random zoom or random crop, horizontal flip, TrivialAugment, colour jitter, cutout and
    normalisation of a whole batch, each image with values of its own, on the device it is on,
    without waiting for that device.

    mean, std: of each channel, in [0, 1] units.
    pad: pixels of reflection around the image for the random crop, 0 for none.
    zoom: least share of the picture that a random resized crop shows (scale and aspect as in arXiv
    1409.4842), 0 for none.
    jitter: brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, 0 for
    none.
    trivial_augment: one operation of OPERATIONS for each image (TrivialAugment, arXiv 2103.10158),
    after crop and flip.
    cutout: side of the square in pixels, 0 for none; it is clipped at the border and filled with 0,
    the mean.
    size: (height, width) of what comes out; None for the images' own.
    """

    def __init__(
        self,
        *,
        mean,
        std,
        pad: int = 4,
        flip: bool = True,
        cutout: int = 0,
        zoom: float = 0.0,
        jitter: float = 0.0,
        trivial_augment: bool = False,
        size: tuple[int, int] | None = None,
    ):
        self.mean, self.std, self.size = tuple(mean), tuple(std), size and tuple(size)
        self.trivial_augment = trivial_augment
        self.pad, self.flip, self.cutout, self.zoom, self.jitter = pad, flip, cutout, zoom, jitter

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draw:
        """Everything is drawn, used or not, so that crops stay the same when the cutout is switched
        off."""
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 2, height, width)
        # at once: a GPU is quick
        drawn = torch.rand(count, len(ends) + 7, generator=generator, device=generator.device)
        top, left, flip, cut_y, cut_x = (
            (drawn[:, : len(ends)] * _constants(ends, drawn.device)).long().unbind(1)
        )
        area, aspect, place_y, place_x = drawn[:, len(ends) : -3].unbind(1)
        return Draw(
            top, left, flip.bool(), cut_y, cut_x, area, aspect, place_y, place_x, drawn[:, -3:]
        )

    def __call__(
        self,
        images: torch.Tensor,
        generator: torch.Generator,
        part: slice | None = None,
        total: int | None = None,
    ) -> torch.Tensor:
        """(N, H, W, 3) uint8 to (N, 3, *size) float32 in channels_last memory. `generator` is on
        the images' device. Where the images are a `part` of a batch of `total`, they look as they
        would in the whole batch."""
        height, width = self.size or images.shape[1:3]
        draw = self.draw(total or len(images), height, width, generator)
        if part:
            draw = Draw(*(values[part] for values in draw))
        if self.pad:
            images = _crop(images, draw.top, draw.left, self.pad)
        if self.flip:
            images = _flip(images, draw.flip)
        if self.trivial_augment:
            images = self._trivially_augmented(images, generator, part, total)
        batch = normalize(images, self.mean, self.std)
        batch = (
            _zoom(batch, draw, self.zoom, (height, width))
            if self.zoom
            else resize(batch, (height, width))
        )
        if self.jitter:
            batch = _jitter(batch, draw.light, self.jitter, self.mean, self.std)
        if self.cutout:
            _cut_out(batch, draw.cut_y, draw.cut_x, self.cutout)
        return batch

    def _trivially_augmented(
        self,
        images: torch.Tensor,
        generator: torch.Generator,
        part: slice | None,
        total: int | None,
    ) -> torch.Tensor:
        """Each operation goes to every 14th image, so that it is calculated for those alone, and
        the host need not wait for the device to learn which they are. The batch is shuffled, so an
        image's place says nothing about it; which operation comes first changes from batch to
        batch. The images of an operation are brought together, and back at the end."""
        strength = torch.rand(total or len(images), 2, generator=generator, device=images.device)
        first = generator.initial_seed() + (part.start if part else 0)
        order, back, counts = _by_operation(len(images), first % len(OPERATIONS), images.device)
        amounts, signs = (
            strength[part or slice(None), :, None, None, None].index_select(0, order).unbind(1)
        )
        batch = images.index_select(0, order).permute(0, 3, 1, 2) / 255
        _operate(batch, amounts, torch.copysign(amounts, signs - 0.5), counts, self.mean)
        return (
            batch.mul_(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).index_select(0, back)
        )


# ---- TrivialAugment: in place, on x (N, 3, H, W) in [0, 1]; amount (N, 1, 1, 1) in [0, 1]; signed
# Strengths of the "wide" setting, but for translation by half of the picture at most: by all of it,
# nothing is left.
# A function may do several operations at once, each on counts[i] images in a row, as the host takes
# longer to start a kernel
# than a GPU to run it on so few images.


def _move(x, amount, signed, counts, fill):
    """Shears, translations and the rotation: sampled, bilinear, where an affine map (six numbers,
    row by row) from -1 to 1 over the picture leads; ``fill`` outside. Each is a rotation, by 0 but
    for the last, to which a change is added."""
    height, width = x.shape[2:]
    # for full strength: six numbers of the change, and the angle
    moves = (
        (0, 0.99 * height / width, 0, 0, 0, 0, 0),
        (0, 0, 0, 0.99 * width / height, 0, 0, 0),
        (0, 0, 1, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 1, 0),
        (0, 0, 0, 0, 0, 0, math.radians(135)),
    )
    moves = [
        _constants(move, x.device).expand(count, 7)
        for move, count in zip(moves, counts, strict=True)
    ]
    changes, turns = torch.cat(moves).split(6, 1)
    by, none, sides = (
        signed.flatten(1),
        _constants((0,), x.device).expand(len(x), 1),
        height / width,
    )
    angle = by * turns
    cos, sin = angle.cos(), angle.sin()
    theta = torch.cat([cos, sin * -sides, none, sin / sides, cos, none], 1).addcmul_(by, changes)
    grid = F.affine_grid(theta.view(-1, 2, 3), tuple(x.shape), align_corners=False)
    middle = _constants(tuple(fill), x.device)[:, None, None]
    torch.add(
        F.grid_sample(x - middle, grid, padding_mode="zeros", align_corners=False), middle, out=x
    )


def _blend(x, amount, signed, counts, fill):
    """Brightness, saturation, contrast and sharpness: a blend with black, with grey, with the mean
    grey, and with a smoothed copy. The last is Pillow's: the copy's border pixels are the picture's
    own."""
    factors = (1 + 0.99 * signed).split(counts)
    bright, colourful, rich, sharp = x.split(counts)
    bright.mul_(factors[0])
    grey, mean_grey = _grey(x[len(bright) : len(x) - len(sharp)]).split(counts[1:3])
    torch.lerp(grey, colourful, factors[1], out=colourful)
    torch.lerp(mean_grey.mean((2, 3), keepdim=True), rich, factors[2], out=rich)
    weights = _constants(
        tuple(each / 13 for each in (1, 1, 1, 1, 5, 1, 1, 1, 1)), x.device, 3
    ).view(3, 1, 3, 3)
    inner = sharp[:, :, 1:-1, 1:-1]
    torch.lerp(F.conv2d(sharp, weights, groups=3), inner, factors[3], out=inner)


def _posterize(x, amount, signed, counts, fill):
    """2 to 8 bits a channel are left."""
    steps = 255 * 2 ** (-6 * amount).round()  # so many from 0 to 1
    x.mul_(steps).add_(1e-4).floor_().div_(steps)


def _solarize(x, amount, signed, counts, fill):
    torch.where(x >= 1 - amount, 1 - x, x, out=x)


def _autocontrast(x, amount, signed, counts, fill):
    values = x.view(len(x), 3, -1)
    low, high = values.aminmax(dim=2, keepdim=True)
    # 0 / 0 is never chosen
    torch.where(high > low, (values - low) / (high - low), values, out=values)


def _equalize(x, amount, signed, counts, fill):
    """A pixel becomes the share of its channel's pixels that are darker, stretched to [0, 1]."""
    values = x.flatten(2).contiguous()
    below = torch.searchsorted(values.sort(2).values, values)
    most = below.amax(2, keepdim=True)
    torch.where(most > 0, below / most, values, out=x.view(values.shape))


OPERATIONS = {
    "as_it_is": None,
    "shear_x": _move,
    "shear_y": _move,
    "translate_x": _move,
    "translate_y": _move,
    "rotate": _move,
    "brightness": _blend,
    "saturation": _blend,
    "contrast": _blend,
    "sharpness": _blend,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


def _operate(x, amount, signed, counts, fill):
    """All of OPERATIONS, the i-th on the next counts[i] images."""
    counts, end = iter(counts), 0
    for function, names in itertools.groupby(OPERATIONS.values()):
        of_each = [next(counts) for _ in names]
        here = slice(end, end + sum(of_each))
        end = here.stop
        if function and any(of_each):
            function(x[here], amount[here], signed[here], of_each, fill)


@functools.lru_cache(maxsize=64)
def _by_operation(
    count: int, first: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """For so many images, to which the operations go in turn from number ``first`` on: an order
    that puts those of each operation in a row, the order that undoes it, and how many each
    operation has. Kept, as they take a few kernels."""
    every = len(OPERATIONS)
    order = ((torch.arange(count, device=device) + first) % every).argsort(stable=True)
    return (
        order,
        order.argsort(),
        [len(range((i - first) % every, count, every)) for i in range(every)],
    )


@functools.lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, times: int = 1) -> torch.Tensor:
    """The values, so many times over, in float32. Kept, and filled on the device: to copy numbers
    to a GPU is to wait for it."""
    return torch.stack([torch.full((), float(value), device=device) for value in values]).repeat(
        times
    )


_arange = functools.lru_cache(maxsize=64)(torch.arange)  # kept as well


def _zoom(batch: torch.Tensor, draw: Draw, least: float, size: tuple[int, int]) -> torch.Tensor:
    """(N, 3, H, W) to (N, 3, *size): a part of each picture that holds `least` to all of its area,
    bilinear."""
    area = least + (1 - least) * draw.area
    aspect = torch.exp((draw.aspect - 0.5) * (2 * math.log(4 / 3)))
    sides = torch.stack([area * aspect, area / aspect], 1).sqrt().clamp(max=1)  # width and height
    # affine_grid counts from -1 to 1 over the picture
    middle = (1 - sides) * (2 * torch.stack([draw.place_x, draw.place_y], 1) - 1)
    none = _constants((0,), batch.device).expand(len(batch))
    theta = torch.stack([sides[:, 0], none, middle[:, 0], none, sides[:, 1], middle[:, 1]], 1).view(
        -1, 2, 3
    )
    grid = F.affine_grid(theta, (len(batch), 3, *size), align_corners=False)
    batch = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return batch.contiguous(memory_format=torch.channels_last)


def _jitter(batch: torch.Tensor, light: torch.Tensor, most: float, mean, std) -> torch.Tensor:
    """Brightness, contrast and saturation of a normalised batch (N, 3, H, W), in this order, as
    torchvision defines them. On values in [0, 1], to which each step clips."""
    mean, std = (_constants(tuple(values), batch.device)[:, None, None] for values in (mean, std))
    brightness, contrast, saturation = (
        1 + 2 * most * (light[:, :, None, None, None] - 0.5)
    ).unbind(1)
    batch = ((batch * std + mean) * brightness).clamp_(0, 1)
    batch = torch.lerp(_grey(batch).mean((2, 3), keepdim=True), batch, contrast).clamp_(0, 1)
    batch = torch.lerp(_grey(batch), batch, saturation).clamp_(0, 1)
    return (batch - mean) / std


def _grey(batch: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) to (N, 1, H, W): luma after ITU-R BT.601."""
    red, green, blue = batch.split(1, 1)
    one = _constants((1,), batch.device)  # as a factor, so that one kernel multiplies and adds
    return torch.addcmul(
        torch.addcmul(0.2989 * red, green, one, value=0.587), blue, one, value=0.114
    )


def _crop(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, pad: int) -> torch.Tensor:
    """Crops of the images' own size out of their reflect-padded copies. A crop is rows of 3W bytes
    that lie in one piece in an image whose columns are padded, so all of them are one gather; rows
    are padded by their numbers."""
    n, h, w, _ = images.shape
    if pad >= min(h, w):
        raise ValueError(
            f"a reflect padding of {pad} px needs images larger than that, not {w}x{h}"
        )
    before = [images[:, :, i : i + 1] for i in range(pad, 0, -1)]
    after = [images[:, :, i : i + 1] for i in range(w - 2, w - 2 - pad, -1)]
    padded, wide = torch.cat([*before, images, *after], 2).contiguous(), w + 2 * pad
    starts = _row_starts(h, pad, wide, images.device).index_select(0, top)
    starts = starts + (left + _arange(0, n * h * wide, h * wide, device=images.device))[:, None]
    # every run of w pixels, overlapping
    windows = padded.as_strided((n * h * wide - w + 1, 3 * w), (3, 1))
    return windows.index_select(0, starts.flatten()).view(n, h, w, 3)


@functools.lru_cache(maxsize=64)
def _row_starts(height: int, pad: int, wide: int, device: torch.device) -> torch.Tensor:
    """(2 pad + 1, height): where the rows of a crop start in an image of rows so wide, by the
    crop's first row."""
    rows = torch.arange(-pad, height + pad, device=device).abs()
    return (wide * ((height - 1) - ((height - 1) - rows).abs())).unfold(0, height, 1)


def _flip(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirror the images whose `flip` is true. Choosing from both is faster than torch.where on
    bytes."""
    both = torch.stack([images, images.flip(2)], 1).flatten(0, 1)
    return both.index_select(0, _arange(0, 2 * len(images), 2, device=images.device) + flip)


def _cut_out(batch: torch.Tensor, cut_y: torch.Tensor, cut_x: torch.Tensor, side: int) -> None:
    """Fill a square of each image with 0, in place. What lies outside is moved onto the border,
    which is in the square then: the number of pixels written stays fixed, so nobody waits for a
    count."""
    n, _, h, w = batch.shape
    side = min(side, 2 * max(h, w))  # which covers all of it already
    offsets = _arange(-(side // 2), side - side // 2, device=batch.device)
    rows = (cut_y[:, None] + offsets).clamp(0, h - 1) + _arange(0, n * h, h, device=batch.device)[
        :, None
    ]
    columns = (cut_x[:, None] + offsets).clamp(0, w - 1)
    pixels = batch.permute(0, 2, 3, 1).view(n * h * w, 3)
    pixels.index_fill_(0, (rows[:, :, None] * w + columns[:, None, :]).flatten(), 0.0)


def normalize(images: torch.Tensor, mean, std) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in channels_last memory: (x / 255 - mean) / std.
    The transform of evaluation."""
    n, h, w, _ = images.shape
    # (3W,): whole rows are multiplied, as a last dimension of 3 is slow
    shift, scale = (
        _constants(tuple(values), images.device, w)
        for values in (
            [-m / s for m, s in zip(mean, std, strict=True)],
            [1 / (255 * s) for s in std],
        )
    )
    return (
        torch.addcmul(shift, images.reshape(n * h, w * 3), scale)
        .view(n, h, w, 3)
        .permute(0, 3, 1, 2)
    )


def resize(batch: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """(N, 3, H, W) to (N, 3, *size) in channels_last memory, bilinear and antialiased; None leaves
    it as it is."""
    if size is None or tuple(size) == tuple(batch.shape[2:]):
        return batch
    batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
    return batch.contiguous(memory_format=torch.channels_last)
