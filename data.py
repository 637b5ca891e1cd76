"""Every data set as the scripts see it: images and labels in memory, and batches of them.

    from data import load_cifar100
    train, test = load_cifar100("data")         # downloads CIFAR-100 where it is not there
    train.images, train.labels                  # (50000, 32, 32, 3) uint8, (50000,) int64

Where the images come from, and how they are decoded and augmented, is in datasets/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from datasets.augmentation import Augmentation, normalize, resize
from datasets.cifar100 import cifar100_present, load_cifar100
from datasets.cifar_sample import cifar_sample
from datasets.cub import cub_present, load_cub
from datasets.cub_sample import cub_sample
from datasets.image_files import images_and_others, open_rgb, passed_over
from datasets.image_set import ImageSet

__all__ = [
    "CIFAR100",
    "CUB",
    "SOURCES",
    "Augmentation",
    "DataSource",
    "ImageSet",
    "TrainBatches",
    "channel_statistics",
    "cifar100_present",
    "cifar_sample",
    "cub_present",
    "cub_sample",
    "eval_batch_size",
    "eval_batches",
    "evenly_spread",
    "images_and_others",
    "input_size",
    "load_cifar100",
    "load_cub",
    "open_rgb",
    "passed_over",
    "place_on",
    "resize",
    "split",
    "stable_seed",
    "to_input",
]

# Of all images of an evaluation batch: 256 or 512 images of 32x32, for which training a batch of
# 128 leaves room.
EVAL_PIXELS = {"cpu": 2**18, "cuda": 2**19}
# with a zoom, pictures are kept so much larger than the network sees them (256 px for 224)
ZOOM_ROOM = 8 / 7


# ---- data sets by the config of a run -----------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """Where the images of a data set come from, given the config of a run (see
    training/options.py)."""

    name: str  # "cifar100": names the runs' folder
    # (config, may it download?) -> train, test
    load: Callable[[dict, bool], tuple[ImageSet, ImageSet]]
    sample: Callable[[dict], tuple[ImageSet, ImageSet]]  # (config) -> the built-in one
    present: Callable[[str], bool]  # are there images in this data folder?
    train_images: int  # of the full data set, for estimates without it
    test_images: int

    def sets(self, config: dict, *, download: bool) -> tuple[ImageSet, ImageSet]:
        """(train, test): the sample, or the data set. Raises UserError where a run's images are not
        there any more (without ``download``)."""
        if config["sample"]:
            return self.sample(config)
        if not download and not self.present(config["data_dir"]):
            raise UserError(
                f"the images that this was trained on are not in {Path(config['data_dir']).absolute()} any more: "
                f"give --data-dir, the folder that holds them now"
            )
        return self.load(config, download)

    def sets_or_sample(self, config: dict) -> tuple[ImageSet, ImageSet, bool]:
        """(train, test, whether they are the sample): the data set where it is there, else the
        sample. No download."""
        if config["sample"] or not self.present(config["data_dir"]):
            return *self.sample(config), True
        return *self.load(config, False), False


def _load_cifar100(config: dict, download: bool) -> tuple[ImageSet, ImageSet]:
    return load_cifar100(
        config["data_dir"],
        image_size=config["image_size"],
        num_workers=config["num_workers"],
        download=download,
    )


def _cub_options(config: dict) -> dict:
    """How birds are to be cut out and kept, for load_cub and cub_sample."""
    side = config["image_size"]
    return {
        "image_size": round(side * ZOOM_ROOM) if config["zoom"] else side,
        "crop": config["crop"],
        "margin": config["margin"],
        "num_workers": config["num_workers"],
    }


CIFAR100 = DataSource(
    "cifar100", _load_cifar100, lambda config: cifar_sample(), cifar100_present, 50_000, 10_000
)
CUB = DataSource(
    "cub",
    lambda config, download: load_cub(
        config["data_dir"], **_cub_options(config), download=download
    ),
    lambda config: cub_sample(**_cub_options(config)),
    cub_present,
    5_994,
    5_794,
)
SOURCES = {source.name: source for source in (CIFAR100, CUB)}


# ---- sets ---------------------------------------------------------------------------------------


def split(config: dict, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """What is trained on and what is evaluated: the two sets, or with --val-fraction two parts of
    the first."""
    return (
        split_validation(train, config["val_fraction"], config["seed"])
        if config["val_fraction"]
        else (train, test)
    )


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` (integers and strings) alone, the same in every process
    and machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def split_validation(train: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, validation): `fraction` of each class, drawn by `seed`; a class keeps at least one
    training image."""
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction} is not between 0 and 1")
    generator = torch.Generator().manual_seed(stable_seed("validation", seed))
    labels, chosen = train.labels.cpu(), torch.zeros(len(train), dtype=torch.bool)
    for label in range(len(train.class_names)):
        members = (labels == label).nonzero().flatten()
        count = min(int(len(members) * fraction + 0.5), len(members) - 1)
        if count > 0:
            chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not chosen.any():
        raise UserError(
            f"--val-fraction {fraction} takes no image of any class of {train.source}. Give a larger one"
        )
    return train.subset((~chosen).nonzero().flatten()), train.subset(chosen.nonzero().flatten())


def channel_statistics(
    train: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, std) of each channel over all pixels, in [0, 1] units; counted in integers, so exact
    on any device."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(train.images[..., channel].flatten(), minlength=256).cpu().double()
        mean.append((counts @ levels / counts.sum()).item())
        variance = counts @ (levels - mean[-1]) ** 2 / counts.sum()
        std.append(max(variance.item() ** 0.5, 1 / 255))  # a constant channel must not divide by 0
    return tuple(mean), tuple(std)


def place_on(image_set: ImageSet, device: torch.device | str) -> ImageSet:
    """The set on `device`; as it is for a GPU of whose free memory it would take over a tenth.
    (Each batch then goes through page-locked memory; to lock the whole set would take twice its
    size from the machine.)"""
    device = torch.device(device)
    fits = (
        device.type != "cuda" or image_set.images.nbytes * 10 <= torch.cuda.mem_get_info(device)[0]
    )
    return image_set.to(device) if fits else image_set


def evenly_spread(count: int, total: int) -> Tensor:
    """(min(count, total),) int64 indices, evenly spread over 0 to total - 1: class folders come
    sorted by class."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


# ---- batches ------------------------------------------------------------------------------------


def to_input(
    images: Tensor, mean: Sequence[float], std: Sequence[float], size: Sequence[int]
) -> Tensor:
    """Images (N, H, W, 3) uint8 -> the network's input (N, 3, *size): the whole picture,
    normalized, then resized."""
    return resize(normalize(images, mean, std), size)


class TrainBatches:
    """The training set of one run, as shuffled and augmented batches on `device`.

    The order of an epoch depends on (seed, epoch) alone and a step's augmentation on (seed, epoch,
    step) alone, so a run that goes on in mid-epoch sees what it would have seen. torch's global
    random state is neither read nor moved.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        seed: int,
        augmentation: Augmentation,
        device: torch.device | str,
        share: Callable[[int], slice] = lambda total: slice(0, total),
    ):
        self.share = share  # which of so many images of a batch this process gets
        self.image_set, self.batch_size, self.seed, self.augmentation = (
            image_set,
            batch_size,
            seed,
            augmentation,
        )
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"

    def __len__(self) -> int:
        """Steps in an epoch, a last partial batch dropped; one, with all images, when there are
        fewer than a batch."""
        return max(1, len(self.image_set) // self.batch_size)

    @property
    def images_per_step(self) -> int:
        """Of all processes together."""
        return min(self.batch_size, len(self.image_set))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images (N, 3, H, W) float32 channels_last, labels (N,) int64) of the steps from
        `start_step` on."""
        shuffle = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        # drawn on the CPU: every device, and every rank, must get the same order, wherever its
        # images are
        order = torch.randperm(len(self.image_set), generator=shuffle).to(
            self.image_set.images.device
        )
        generator = torch.Generator(self.device)
        for step in range(start_step, len(self)):
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            part, total = self.share(len(indices)), len(indices)
            indices = indices[part]
            images, labels = (
                self._take(tensor, indices)
                for tensor in (self.image_set.images, self.image_set.labels)
            )
            generator.manual_seed(stable_seed("augmentation", self.seed, epoch, step))
            yield self.augmentation(images, generator, part, total), labels

    def _take(self, tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor.index_select(0, indices)
        # Gathered in page-locked memory, the copy runs beside the GPU's work; PyTorch hands that
        # memory out again only when the copy is done.
        shape, pin = (len(indices), *tensor.shape[1:]), self.device.type == "cuda"
        gathered = torch.empty(shape, dtype=tensor.dtype, pin_memory=pin)
        torch.index_select(tensor, 0, indices, out=gathered)
        return gathered.to(self.device, non_blocking=True)


def input_size(config: dict, train: ImageSet) -> list[int]:
    """[height, width] that the network sees: --image-size, or that of the images."""
    return [config["image_size"]] * 2 if config["image_size"] else list(train.image_size)


def eval_batch_size(size: Sequence[int], device: torch.device) -> int:
    """Images of (height, width) in a batch of an evaluation."""
    return max(1, EVAL_PIXELS[device.type] // (size[0] * size[1]))


def eval_batches(
    image_set: ImageSet,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    size: Sequence[int],
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The set (or a part of it) in order, as large normalised batches on the device; the whole
    picture, resized to `size`."""
    count = eval_batch_size(size, device)
    start, end, _ = part.indices(len(image_set))
    for first in range(start, end, count):
        chosen = slice(first, min(first + count, end))
        images, labels = (
            t[chosen].to(device, non_blocking=True) for t in (image_set.images, image_set.labels)
        )
        yield to_input(images, mean, std, size), labels
