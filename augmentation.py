"""Augmentation of whole batches of uint8 images on the device they are on, and the training set as such batches.

No worker processes: a batch is an index into the set, cropped, flipped, recoloured and normalised in one go.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import ImageSet, stable_seed


class Draw(NamedTuple):
    """What one batch's augmentation is made of, a value for each image; each tensor is (N,)."""
    top: torch.Tensor       # int64, first row of the crop in the padded image, 0 to 2 pad
    left: torch.Tensor      # int64, first column of it
    flip: torch.Tensor      # bool
    cut_y: torch.Tensor     # int64, centre of the cutout square in the crop, in pixels
    cut_x: torch.Tensor
    area: torch.Tensor      # float, 0 to 1: how much of the picture the zoom shows, from the least to all
    aspect: torch.Tensor    # float, 0 to 1: its shape, from 3:4 to 4:3
    place_y: torch.Tensor   # float, 0 to 1: its place, from the top edge to the bottom edge
    place_x: torch.Tensor
    light: torch.Tensor     # float (N, 3), 0 to 1: brightness, contrast and saturation, from the least to the most


class Augmentation:
    """Random zoom or random crop, horizontal flip, TrivialAugment, colour jitter, cutout and normalisation of a whole batch,
    each image with values of its own, on the device it is on, without waiting for that device.

    mean, std: of each channel, in [0, 1] units.
    pad: pixels of reflection around the image for the random crop, 0 for none.
    zoom: least share of the picture that a random resized crop shows (scale and aspect as in arXiv 1409.4842), 0 for none.
    jitter: brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, 0 for none.
    trivial_augment: one operation of OPERATIONS for each image (TrivialAugment, arXiv 2103.10158), after crop and flip.
    cutout: side of the square in pixels, 0 for none; it is clipped at the border and filled with 0, the mean.
    size: (height, width) of what comes out; None for the images' own.
    """

    def __init__(self, *, mean, std, pad: int = 4, flip: bool = True, cutout: int = 0, zoom: float = 0.0,
                 jitter: float = 0.0, trivial_augment: bool = False, size: tuple[int, int] | None = None):
        self.mean, self.std, self.size = tuple(mean), tuple(std), size and tuple(size)
        self.trivial_augment = trivial_augment
        self.pad, self.flip, self.cutout, self.zoom, self.jitter = pad, flip, cutout, zoom, jitter

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draw:
        """Everything is drawn, used or not, so that crops stay the same when the cutout is switched off."""
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 2, height, width)
        drawn = torch.rand(count, len(ends) + 7, generator=generator, device=generator.device)     # at once: a GPU is quick
        top, left, flip, cut_y, cut_x = (drawn[:, :len(ends)] * _constants(ends, drawn.device)).long().unbind(1)
        area, aspect, place_y, place_x = drawn[:, len(ends):-3].unbind(1)
        return Draw(top, left, flip.bool(), cut_y, cut_x, area, aspect, place_y, place_x, drawn[:, -3:])

    def __call__(self, images: torch.Tensor, generator: torch.Generator, part: slice | None = None,
                 total: int | None = None) -> torch.Tensor:
        """(N, H, W, 3) uint8 to (N, 3, *size) float32 in channels_last memory. `generator` is on the images' device.
        Where the images are a `part` of a batch of `total`, they look as they would in the whole batch."""
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
        batch = normalise(images, self.mean, self.std)
        batch = _zoom(batch, draw, self.zoom, (height, width)) if self.zoom else resize(batch, (height, width))
        if self.jitter:
            batch = _jitter(batch, draw.light, self.jitter, self.mean, self.std)
        if self.cutout:
            _cut_out(batch, draw.cut_y, draw.cut_x, self.cutout)
        return batch

    def _trivially_augmented(self, images: torch.Tensor, generator: torch.Generator, part: slice | None,
                             total: int | None) -> torch.Tensor:
        """Each operation goes to every 14th image, so that it is calculated for those alone, and the host need not wait for
        the device to learn which they are. The batch is shuffled, so an image's place says nothing about it; which operation
        comes first changes from batch to batch."""
        strength = torch.rand(total or len(images), 2, generator=generator, device=images.device)
        amounts, signs = strength[part or slice(None), :, None, None, None].unbind(1)
        signs = torch.where(signs < 0.5, -1.0, 1.0)
        first, count = generator.initial_seed() + (part.start if part else 0), len(OPERATIONS)
        batch = images.permute(0, 3, 1, 2) / 255
        for place in range(min(count, len(batch))):
            chosen = batch[place::count]
            chosen.copy_(OPERATIONS[(first + place) % count](chosen, amounts[place::count], signs[place::count], self.mean))
        return batch.mul_(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)


# ---- TrivialAugment: operations on images (N, 3, H, W) in [0, 1], amount (N, 1, 1, 1) in [0, 1], sign -1 or 1 --------------
# Strengths of the "wide" setting, but for translation by half of the picture at most: by all of it, nothing is left.

def _as_it_is(x, amount, sign, fill):
    return x


def _moved(x: torch.Tensor, theta: torch.Tensor, fill) -> torch.Tensor:
    """Sampled, bilinear, where the affine map ``theta`` (N, 6), row by row, from -1 to 1 over the picture, leads; ``fill``
    outside."""
    middle = _constants(tuple(fill), x.device)[:, None, None]
    grid = F.affine_grid(theta.view(-1, 2, 3), tuple(x.shape), align_corners=False)
    return F.grid_sample(x - middle, grid, padding_mode="zeros", align_corners=False) + middle


def _shifted(x: torch.Tensor, by: torch.Tensor, direction: tuple[float, ...], fill) -> torch.Tensor:
    """_moved by the identity and ``by`` (N, 1, 1, 1) times ``direction`` (six numbers)."""
    identity, direction = (_constants(values, x.device) for values in ((1, 0, 0, 0, 1, 0), direction))
    return _moved(x, torch.addcmul(identity, by.flatten(1), direction), fill)


def _shear_x(x, amount, sign, fill):
    return _shifted(x, amount * sign, (0, 0.99 * x.shape[2] / x.shape[3], 0, 0, 0, 0), fill)    # theta counts in half sides


def _shear_y(x, amount, sign, fill):
    return _shifted(x, amount * sign, (0, 0, 0, 0.99 * x.shape[3] / x.shape[2], 0, 0), fill)


def _translate_x(x, amount, sign, fill):
    return _shifted(x, amount * sign, (0, 0, 1, 0, 0, 0), fill)


def _translate_y(x, amount, sign, fill):
    return _shifted(x, amount * sign, (0, 0, 0, 0, 0, 1), fill)


def _rotate(x, amount, sign, fill):
    angle = math.radians(135) * (amount * sign).flatten()
    sides, cos, sin = x.shape[2] / x.shape[3], angle.cos(), angle.sin()
    none = torch.zeros_like(angle)
    return _moved(x, torch.stack([cos, -sin * sides, none, sin / sides, cos, none], 1), fill)


def _brightness(x, amount, sign, fill):
    return x * (1 + 0.99 * amount * sign)


def _saturation(x, amount, sign, fill):
    return torch.lerp(_grey(x), x, 1 + 0.99 * amount * sign)


def _contrast(x, amount, sign, fill):
    return torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, 1 + 0.99 * amount * sign)


def _sharpness(x, amount, sign, fill):
    """Pillow's: blended with a smoothed copy, whose border pixels are the picture's own."""
    weights = _constants((1, 1, 1, 1, 5, 1, 1, 1, 1), x.device).view(1, 1, 3, 3).expand(3, 1, 3, 3) / 13
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, weights, groups=3)
    return torch.lerp(smooth, x, 1 + 0.99 * amount * sign)


def _posterize(x, amount, sign, fill):
    """2 to 8 bits a channel are left."""
    step = 2 ** (6 * amount).round()
    return (255 * x / step + 1e-4).floor() * step / 255


def _solarize(x, amount, sign, fill):
    return torch.where(x >= 1 - amount, 1 - x, x)


def _autocontrast(x, amount, sign, fill):
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1 / 255), x)


def _equalize(x, amount, sign, fill):
    """A pixel becomes the share of its channel's pixels that are darker, stretched to [0, 1]."""
    values = x.flatten(2)
    in_order = values.sort(2).values.contiguous()
    below = torch.searchsorted(in_order, values.contiguous()).float()
    varies, most = in_order[:, :, -1:] > in_order[:, :, :1], below.amax(2, keepdim=True).clamp(min=1)
    return torch.where(varies, below / most, values).view_as(x)


OPERATIONS = (_as_it_is, _shear_x, _shear_y, _translate_x, _translate_y, _rotate, _brightness, _saturation, _contrast,
              _sharpness, _posterize, _solarize, _autocontrast, _equalize)


@functools.lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, times: int = 1) -> torch.Tensor:
    """The values, so many times over, in float32. Kept, and filled on the device: to copy numbers to a GPU is to wait for
    it."""
    return torch.stack([torch.full((), float(value), device=device) for value in values]).repeat(times)


def _zoom(batch: torch.Tensor, draw: Draw, least: float, size: tuple[int, int]) -> torch.Tensor:
    """(N, 3, H, W) to (N, 3, *size): a part of each picture that holds `least` to all of its area, bilinear."""
    area = least + (1 - least) * draw.area
    aspect = torch.exp((2 * draw.aspect - 1) * math.log(4 / 3))
    wide, high = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
    # affine_grid counts from -1 to 1 over the picture
    middle_x, middle_y = ((1 - part) * (2 * place - 1) for part, place in ((wide, draw.place_x), (high, draw.place_y)))
    none = torch.zeros_like(wide)
    theta = torch.stack([wide, none, middle_x, none, high, middle_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(batch), 3, *size), align_corners=False)
    batch = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return batch.contiguous(memory_format=torch.channels_last)


def _jitter(batch: torch.Tensor, light: torch.Tensor, most: float, mean, std) -> torch.Tensor:
    """Brightness, contrast and saturation of a normalised batch (N, 3, H, W), in this order, as torchvision defines
    them. On values in [0, 1], to which each step clips."""
    mean, std = (_constants(tuple(values), batch.device)[:, None, None] for values in (mean, std))
    brightness, contrast, saturation = (1 + most * (2 * light[:, :, None, None, None] - 1)).unbind(1)
    batch = ((batch * std + mean) * brightness).clamp_(0, 1)
    batch = torch.lerp(_grey(batch).mean((2, 3), keepdim=True), batch, contrast).clamp_(0, 1)
    batch = torch.lerp(_grey(batch), batch, saturation).clamp_(0, 1)
    return (batch - mean) / std


def _grey(batch: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) to (N, 1, H, W): luma after ITU-R BT.601."""
    return 0.2989 * batch[:, :1] + 0.587 * batch[:, 1:2] + 0.114 * batch[:, 2:]


def _crop(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, pad: int) -> torch.Tensor:
    """Crops of the images' own size out of their reflect-padded copies. A crop is rows of 3W bytes that lie in one
    piece in an image whose columns are padded, so all of them are one gather; rows are padded by their numbers."""
    n, h, w, _ = images.shape
    if pad >= min(h, w):
        raise ValueError(f"a reflect padding of {pad} px needs images larger than that, not {w}x{h}")
    before = [images[:, :, i:i + 1] for i in range(pad, 0, -1)]
    after = [images[:, :, i:i + 1] for i in range(w - 2, w - 2 - pad, -1)]
    padded, wide = torch.cat([*before, images, *after], 2).contiguous(), w + 2 * pad
    rows = (top[:, None] - pad + torch.arange(h, device=images.device)).abs()
    rows = (h - 1) - ((h - 1) - rows).abs() + h * torch.arange(n, device=images.device)[:, None]
    windows = padded.as_strided((n * h * wide - w + 1, 3 * w), (3, 1))     # every run of w pixels, overlapping
    return windows.index_select(0, (rows * wide + left[:, None]).flatten()).view(n, h, w, 3)


def _flip(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirror the images whose `flip` is true. Choosing from both is faster than torch.where on bytes."""
    both = torch.stack([images, images.flip(2)], 1).flatten(0, 1)
    return both.index_select(0, 2 * torch.arange(len(images), device=images.device) + flip)


def _cut_out(batch: torch.Tensor, cut_y: torch.Tensor, cut_x: torch.Tensor, side: int) -> None:
    """Fill a square of each image with 0, in place. What lies outside is moved onto the border, which is in the square
    then: the number of pixels written stays fixed, so nobody waits for a count."""
    n, _, h, w = batch.shape
    side = min(side, 2 * max(h, w))     # which covers all of it already
    offsets = torch.arange(side, device=batch.device) - side // 2
    rows = (cut_y[:, None] + offsets).clamp(0, h - 1) + h * torch.arange(n, device=batch.device)[:, None]
    columns = (cut_x[:, None] + offsets).clamp(0, w - 1)
    pixels = batch.permute(0, 2, 3, 1).view(n * h * w, 3)
    pixels.index_fill_(0, (rows[:, :, None] * w + columns[:, None, :]).flatten(), 0.0)


def normalise(images: torch.Tensor, mean, std) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in channels_last memory: (x / 255 - mean) / std. The transform of
    evaluation."""
    n, h, w, _ = images.shape
    batch = images.reshape(n * h, w * 3).float()
    # (3W,): whole rows are multiplied, as a last dimension of 3 is slow
    shift, scale = (_constants(tuple(values), images.device, w)
                    for values in ([-m / s for m, s in zip(mean, std)], [1 / (255 * s) for s in std]))
    torch.addcmul(shift, batch, scale, out=batch)
    return batch.view(n, h, w, 3).permute(0, 3, 1, 2)


def resize(batch: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """(N, 3, H, W) to (N, 3, *size) in channels_last memory, bilinear and antialiased; None leaves it as it is."""
    if size is None or tuple(size) == tuple(batch.shape[2:]):
        return batch
    batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
    return batch.contiguous(memory_format=torch.channels_last)


class TrainBatches:
    """The training set of one run, as shuffled and augmented batches on `device`.

    The order of an epoch depends on (seed, epoch) alone and a step's augmentation on (seed, epoch, step) alone, so a
    run that goes on in mid-epoch sees what it would have seen. torch's global random state is neither read nor moved.
    """

    def __init__(self, image_set: ImageSet, batch_size: int, *, seed: int, augmentation: Augmentation,
                 device: torch.device | str, share: Callable[[int], slice] = lambda total: slice(0, total)):
        self.share = share      # which of so many images of a batch this process gets
        self.image_set, self.batch_size, self.seed, self.augmentation = image_set, batch_size, seed, augmentation
        self.device = torch.empty(0, device=device).device      # "cuda" becomes "cuda:0"

    def __len__(self) -> int:
        """Steps in an epoch, a last partial batch dropped; one, with all images, when there are fewer than a batch."""
        return max(1, len(self.image_set) // self.batch_size)

    @property
    def images_a_step(self) -> int:
        """Of all processes together."""
        return min(self.batch_size, len(self.image_set))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images (N, 3, H, W) float32 channels_last, labels (N,) int64) of the steps from `start_step` on."""
        shuffle = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        # drawn on the CPU: every device, and every rank, must get the same order, wherever its images are
        order = torch.randperm(len(self.image_set), generator=shuffle).to(self.image_set.images.device)
        generator = torch.Generator(self.device)
        for step in range(start_step, len(self)):
            indices = order[step * self.batch_size:(step + 1) * self.batch_size]
            part, total = self.share(len(indices)), len(indices)
            indices = indices[part]
            images, labels = (self._take(tensor, indices) for tensor in (self.image_set.images, self.image_set.labels))
            generator.manual_seed(stable_seed("augmentation", self.seed, epoch, step))
            yield self.augmentation(images, generator, part, total), labels

    def _take(self, tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor.index_select(0, indices)
        # Gathered in page-locked memory, the copy runs beside the GPU's work; PyTorch hands that memory out again
        # only when the copy is done.
        shape, pin = (len(indices), *tensor.shape[1:]), self.device.type == "cuda"
        gathered = torch.empty(shape, dtype=tensor.dtype, pin_memory=pin)
        torch.index_select(tensor, 0, indices, out=gathered)
        return gathered.to(self.device, non_blocking=True)
