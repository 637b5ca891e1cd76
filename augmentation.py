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
    """Random zoom or random crop, horizontal flip, colour jitter, cutout and normalisation of a whole batch, each image
    with values of its own, on the device it is on, without waiting for that device.

    mean, std: of each channel, in [0, 1] units.
    pad: pixels of reflection around the image for the random crop, 0 for none.
    zoom: least share of the picture that a random resized crop shows (scale and aspect as in arXiv 1409.4842), 0 for none.
    jitter: brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, 0 for none.
    cutout: side of the square in pixels, 0 for none; it is clipped at the border and filled with 0, the mean.
    size: (height, width) of what comes out; None for the images' own.
    """

    def __init__(self, *, mean, std, pad: int = 4, flip: bool = True, cutout: int = 0, zoom: float = 0.0,
                 jitter: float = 0.0, size: tuple[int, int] | None = None, trivial: float = 0.0):
        self.mean, self.std, self.size, self.trivial = tuple(mean), tuple(std), size and tuple(size), trivial
        self.pad, self.flip, self.cutout, self.zoom, self.jitter = pad, flip, cutout, zoom, jitter

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Draw:
        """Everything is drawn, used or not, so that crops stay the same when the cutout is switched off."""
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 2, height, width)
        drawn = torch.rand(count, len(ends) + 7, generator=generator, device=generator.device)     # at once: a GPU is quick
        top, left, flip, cut_y, cut_x = (drawn[:, :len(ends)] * _constants(ends, drawn.device)).long().unbind(1)
        area, aspect, place_y, place_x = drawn[:, len(ends):-3].unbind(1)
        return Draw(top, left, flip.bool(), cut_y, cut_x, area, aspect, place_y, place_x, drawn[:, -3:])

    def __call__(self, images: torch.Tensor, generator: torch.Generator, part: slice | None = None,
                 total: int | None = None, flip: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H, W, 3) uint8 to (N, 3, *size) float32 in channels_last memory. `generator` is on the images' device.
        Where the images are a `part` of a batch of `total`, they look as they would in the whole batch."""
        height, width = self.size or images.shape[1:3]
        draw = self.draw(total or len(images), height, width, generator)
        if part is not None:
            draw = Draw(*(values[part] for values in draw))
        if flip is not None:
            draw = draw._replace(flip=flip)
        if self.pad:
            images = _crop(images, draw.top, draw.left, self.pad)
        if self.flip:
            images = _flip(images, draw.flip)
        batch = normalise(images, self.mean, self.std)
        batch = _zoom(batch, draw, self.zoom, (height, width)) if self.zoom else resize(batch, (height, width))
        if self.trivial:
            batch = _trivial(batch, generator, self.trivial, self.mean, self.std)
        if self.jitter:
            batch = _jitter(batch, draw.light, self.jitter, self.mean, self.std)
        if self.cutout:
            _cut_out(batch, draw.cut_y, draw.cut_x, self.cutout)
        return batch


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


def _trivial(batch, generator, share, mean, std):
    """TrivialAugment (arXiv 2103.10158), wide, one operation an image, on [0, 1] values."""
    n, _, h, w = batch.shape
    dev = batch.device
    u = torch.rand(n, 4, generator=generator, device=dev)
    op = torch.where(u[:, 0] < share, (u[:, 1] * 14).long(), 13)   # 13: identity
    m = u[:, 2]                                     # magnitude 0 to 1
    sign = (u[:, 3] < 0.5).float() * 2 - 1
    mean_t, std_t = (_constants(tuple(v), dev)[:, None, None] for v in (mean, std))
    zero, one = torch.zeros_like(m), torch.ones_like(m)
    is_ = lambda k: (op == k)
    angle = torch.where(is_(4), m * sign * (135 * math.pi / 180), zero)
    shx = torch.where(is_(0), m * sign * 0.99, zero)
    shy = torch.where(is_(1), m * sign * 0.99, zero)
    tx = torch.where(is_(2), m * sign, zero)
    ty = torch.where(is_(3), m * sign, zero)
    c, s_ = angle.cos(), angle.sin()
    theta = torch.stack([c, -s_ + shx, tx, s_ + shy, c, ty], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (n, 3, h, w), align_corners=False)
    moved = F.grid_sample(batch, grid, padding_mode="zeros", align_corners=False)    # the mean outside
    geometric = (op < 5)[:, None, None, None]
    x = (torch.where(geometric, moved, batch) * std_t + mean_t).clamp_(0, 1)
    f = (1 + m * sign * 0.99)[:, None, None, None]
    grey = _grey(x)
    pick = lambda k, new: torch.where(is_(k)[:, None, None, None], new, x)
    x = pick(5, (x * f).clamp(0, 1))                                    # brightness
    x = pick(6, torch.lerp(grey, x, f).clamp(0, 1))                     # colour
    x = pick(7, torch.lerp(grey.mean((2, 3), keepdim=True), x, f).clamp(0, 1))  # contrast
    kernel = _constants((1., 1., 1., 1., 5., 1., 1., 1., 1.), dev).view(1, 1, 3, 3).expand(3, 1, 3, 3) / 13
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = pick(8, torch.lerp(smooth, x, f).clamp(0, 1))                   # sharpness
    bits = (8 - (m * 6).round())[:, None, None, None]
    levels = 2 ** bits
    x = pick(9, torch.floor(x * 255 / 256 * levels) / levels)           # posterize
    t = (1 - m)[:, None, None, None]
    x = pick(10, torch.where(x >= t, 1 - x, x))                         # solarize
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = pick(11, (x - low) / (high - low).clamp(min=1 / 255))           # autocontrast
    # 12: equalize, by ranks of 8 bit values
    flat = x.flatten(2)
    order = flat.argsort(2).argsort(2).float() / (h * w - 1)
    x = pick(12, order.view_as(x))
    return ((x - mean_t) / std_t).contiguous(memory_format=torch.channels_last)


def mix(images: torch.Tensor, labels: torch.Tensor, classes: int, draws: torch.Tensor, cutmix: float, mixup: float,
        alpha: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N + 1, 3, H, W), each but the first mixed with the one before it: (N, 3, H, W) and soft targets (N, C)."""
    (n, _, h, w), dev = images.shape, images.device
    n -= 1
    one_hot = F.one_hot(labels, classes).float()
    other, images = images[:-1], images[1:]
    other_hot, one_hot = one_hot[:-1], one_hot[1:]
    chosen, area, cy, cx = draws.unbind(1)
    lam = torch.ones(n, device=dev)
    if cutmix:
        half = area.sqrt() / 2                    # of the pasted box, as a share of the side
        y, x = ((torch.arange(side, device=dev) + 0.5) / side for side in (h, w))
        inside_y, inside_x = ((at - centre[:, None]).abs() < half[:, None] for at, centre in ((y, cy), (x, cx)))
        mask = (inside_y[:, :, None] & inside_x[:, None, :] & (chosen < cutmix)[:, None, None])[:, None]
        images = torch.where(mask, other, images)
        lam = 1 - mask.float().mean((1, 2, 3))
    if mixup:
        a = torch.full((n,), alpha, device=dev)
        g1, g2 = (torch._standard_gamma(a, generator=generator) for _ in range(2))
        l = g1 / (g1 + g2 + 1e-20)
        l = torch.where((chosen >= 1 - mixup) & (lam == 1), torch.maximum(l, 1 - l), torch.ones_like(l))
        images = torch.lerp(other, images, l[:, None, None, None])
        lam = torch.minimum(lam, l)
    return images.contiguous(memory_format=torch.channels_last), torch.lerp(other_hot, one_hot, lam[:, None])


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
                 device: torch.device | str, share: Callable[[int], slice] = lambda total: slice(0, total),
                 cutmix: float = 0.0, mixup: float = 0.0, mixup_alpha: float = 1.0, alternate: bool = False):
        self.cutmix, self.mixup, self.mixup_alpha, self.alternate = cutmix, mixup, mixup_alpha, alternate
        bits = torch.Generator().manual_seed(stable_seed("flips", seed))
        self.first_flips = torch.randint(2, (len(image_set),), generator=bits).to(image_set.images.device)
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
            mixed = self.cutmix or self.mixup
            if mixed:   # and in front the one before the first, which is mixed with it
                part = torch.arange(part.start - 1, part.stop) % total
            indices = indices[part.to(indices.device) if mixed else part]
            images, labels = (self._take(tensor, indices) for tensor in (self.image_set.images, self.image_set.labels))
            generator.manual_seed(stable_seed("augmentation", self.seed, epoch, step))
            flip = None
            if self.alternate:
                flip = ((self.first_flips[indices] + epoch) % 2).bool().to(self.device)
            images = self.augmentation(images, generator, part.to(self.device) if mixed else part, total, flip)
            if mixed:
                draws = torch.rand(total, 4, generator=generator, device=self.device)[part[1:].to(self.device)]
                images, labels = mix(images, labels, len(self.image_set.class_names), draws, self.cutmix, self.mixup,
                                     self.mixup_alpha, generator)
            yield images, labels

    def _take(self, tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor.index_select(0, indices)
        # Gathered in page-locked memory, the copy runs beside the GPU's work; PyTorch hands that memory out again
        # only when the copy is done.
        shape, pin = (len(indices), *tensor.shape[1:]), self.device.type == "cuda"
        gathered = torch.empty(shape, dtype=tensor.dtype, pin_memory=pin)
        torch.index_select(tensor, 0, indices, out=gathered)
        return gathered.to(self.device, non_blocking=True)
