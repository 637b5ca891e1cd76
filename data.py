"""Data sets as the scripts see them: images and labels in memory, and batches of them.

    from data import load_cifar100
    train, test = load_cifar100("data")         # downloads CIFAR-100 if it is missing
    train.images, train.labels                  # (50000, 32, 32, 3) uint8, (50000,) int64

Sources, decoding and augmentation are in datasets/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, printable
from datasets.augmentation import Augmentation, normalize, resize
from datasets.cifar import cifar10_present, cifar100_present, load_cifar10, load_cifar100
from datasets.cifar_sample import cifar_sample
from datasets.cub import cub_present, load_cub
from datasets.cub_sample import cub_sample
from datasets.folder import load_folder
from datasets.folder_layout import folder_present
from datasets.image_files import as_rgb, center_box, images_and_others, open_rgb, passed_over
from datasets.image_set import ImageSet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CUB",
    "FOLDER",
    "SOURCES",
    "Augmentation",
    "DataSource",
    "ImageSet",
    "TrainBatches",
    "as_rgb",
    "center_box",
    "channel_statistics",
    "cifar100_present",
    "cifar10_present",
    "cifar_sample",
    "cub_present",
    "cub_sample",
    "folder_present",
    "eval_batch_size",
    "eval_batches",
    "evenly_spread",
    "images_and_others",
    "input_size",
    "load_cifar10",
    "load_cifar100",
    "load_cub",
    "load_folder",
    "open_rgb",
    "passed_over",
    "place_on",
    "resize",
    "split",
    "split_validation",
    "stable_seed",
    "to_input",
]

# Pixels of an evaluation batch: 256 or 512 images of 32x32. A training batch of 128 leaves room for
# that.
EVAL_PIXELS = {"cpu": 2**18, "cuda": 2**19}
STATISTICS_BYTES = 2**26  # of images whose values are counted at a time
# with a zoom, pictures are stored this much larger than the network's input (256 px for 224)
ZOOM_ROOM = 8 / 7
TAKEN = {
    "cam",
    "experiments",
    "reference",
    "sanity",
}  # folders in runs/ that hold no runs of a data set


# ---- data sets by a run's config ----------------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """How to load a data set, given the config of a run (see training/options.py)."""

    name: str  # "cifar100"
    # (config, may it download?) -> train, test
    load: Callable[[dict, bool], tuple[ImageSet, ImageSet]]
    # (config) -> train, test of the built-in sample
    sample: Callable[[dict], tuple[ImageSet, ImageSet]]
    present: Callable[[str | None], bool]  # are there images in this data folder?
    train_images: int  # of the full data set, for estimates without it
    test_images: int
    has_boxes: bool = False  # whether the place of the object is known
    is_own: bool = False  # the user's: the data folder has to be named, and names the runs

    @property
    def default_dir(self) -> str | None:
        """The data folder unless another is named."""
        return None if self.is_own else "data"

    def runs_name(self, data_dir: str | None) -> str:
        """The name of the folder of all runs on these images, below runs/."""
        if not self.is_own or data_dir is None:
            return self.name
        name = printable(Path(data_dir).resolve().name).strip(". ") or self.name
        taken = {*TAKEN, *SOURCES} - {self.name}
        return f"{name}-{self.name}" if name.casefold() in taken else name

    def sets(self, config: dict, *, download: bool) -> tuple[ImageSet, ImageSet]:
        """(train, test): the sample, or the data set.

        Raises:
            UserError: without ``download``, the images of the run are no longer there; or any error
                of loading.
        """
        if config["sample"]:
            return self.sample(config)
        if not download and not self.present(config["data_dir"]):
            folder = Path(config["data_dir"] or "").absolute()
            raise UserError(
                f"the images that this was trained on are not in {folder}: "
                f"give --data-dir, the folder that holds them now"
            )
        return self.load(config, download)

    def sets_or_sample(self, config: dict) -> tuple[ImageSet, ImageSet, bool]:
        """(train, test, whether they are the sample): the data set if present, else the sample. No
        download. The user's own images are not replaced if their folder is named."""
        is_named = self.is_own and config["data_dir"] is not None
        if config["sample"] or not (is_named or self.present(config["data_dir"])):
            return *self.sample(config), True
        return *self.load(config, False), False


def _load_cifar100(config: dict, download: bool) -> tuple[ImageSet, ImageSet]:
    return load_cifar100(config["data_dir"], **_cifar_options(config), download=download)


def _load_cifar10(config: dict, download: bool) -> tuple[ImageSet, ImageSet]:
    return load_cifar10(config["data_dir"], **_cifar_options(config), download=download)


def _cifar_options(config: dict) -> dict:
    return {"image_size": config["image_size"], "num_workers": config["num_workers"]}


def _load_folder(config: dict, download: bool) -> tuple[ImageSet, ImageSet]:
    return load_folder(
        config["data_dir"],
        image_size=_stored_side(config),
        crop=config["crop"],
        test_share=config["test_share"],
        split_seed=config["split_seed"],
        near_duplicates=config["near_duplicates"],
        skip_unreadable=config["skip_unreadable"],
        num_workers=config["num_workers"],
    )


def _folder_sample(config: dict) -> tuple[ImageSet, ImageSet]:
    if config["image_size"] <= 32:
        return cifar_sample()
    return cub_sample(**_cub_options(config | {"crop": "box", "margin": 0.1}))


def _load_cub(config: dict, download: bool) -> tuple[ImageSet, ImageSet]:
    return load_cub(config["data_dir"], **_cub_options(config), download=download)


def _cub_options(config: dict) -> dict:
    """How birds are cropped and stored, for load_cub and cub_sample."""
    return {
        "image_size": _stored_side(config),
        "crop": config["crop"],
        "margin": config["margin"],
        "num_workers": config["num_workers"],
    }


def _stored_side(config: dict) -> int:
    """Pixels per side of a stored picture."""
    return round(config["image_size"] * ZOOM_ROOM) if config["zoom"] else config["image_size"]


CIFAR100 = DataSource(
    name="cifar100",
    load=_load_cifar100,
    sample=lambda config: cifar_sample(),
    present=cifar100_present,
    train_images=50_000,
    test_images=10_000,
)
CIFAR10 = DataSource(
    name="cifar10",
    load=_load_cifar10,
    sample=lambda config: cifar_sample(),
    present=cifar10_present,
    train_images=50_000,
    test_images=10_000,
)
CUB = DataSource(
    name="cub",
    load=_load_cub,
    sample=lambda config: cub_sample(**_cub_options(config)),
    present=cub_present,
    train_images=5_994,
    test_images=5_794,
    has_boxes=True,
)
FOLDER = DataSource(
    name="folder",
    load=_load_folder,
    sample=_folder_sample,
    present=folder_present,
    train_images=1_000,
    test_images=250,
    is_own=True,
)
SOURCES = {source.name: source for source in (CIFAR100, CIFAR10, CUB, FOLDER)}


# ---- sets ---------------------------------------------------------------------------------------


def split(config: dict, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """(training set, evaluation set): ``train`` and ``test``, or with --val-fraction two parts of
    ``train``."""
    if config["val_fraction"]:
        return split_validation(train, config["val_fraction"], config["seed"])
    return train, test


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from ``parts`` (integers and strings), the same in every process and on every
    machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def split_validation(train: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, validation): ``fraction`` of each class, drawn by ``seed``. A class keeps at least
    one training image.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, or too small to take an image of any class.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction} is not between 0 and 1")
    generator = torch.Generator().manual_seed(stable_seed("validation", seed))
    labels = train.labels.cpu()
    chosen = torch.zeros(len(train), dtype=torch.bool)
    for label in range(len(train.class_names)):
        members = (labels == label).nonzero().flatten()
        count = min(int(len(members) * fraction + 0.5), len(members) - 1)
        if count > 0:
            chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not chosen.any():
        raise UserError(
            f"--val-fraction {fraction} takes no image of any class of {train.source}. "
            f"Give a larger one"
        )
    return train.subset((~chosen).nonzero().flatten()), train.subset(chosen.nonzero().flatten())


def channel_statistics(
    train: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, std) of each channel over all pixels, in [0, 1] units. Counted in integers, so exact
    on any device."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.int64)
    step = max(1, STATISTICS_BYTES * len(train) // train.nbytes)
    for first in range(0, len(train), step):  # the set may be larger than the memory
        images = train.take(slice(first, min(first + step, len(train))))
        for channel in range(3):
            counts[channel] += torch.bincount(images[..., channel].flatten(), minlength=256).cpu()
    mean, std = [], []
    for channel in counts.double():
        mean.append((channel @ levels / channel.sum()).item())
        variance = channel @ (levels - mean[-1]) ** 2 / channel.sum()
        std.append(max(variance.item() ** 0.5, 1 / 255))  # a constant channel must not divide by 0
    return tuple(mean), tuple(std)


def place_on(image_set: ImageSet, device: torch.device | str) -> ImageSet:
    """The set on ``device``, or unchanged where it would take over a tenth of a GPU's free memory.

    Each batch then goes through page-locked memory. Locking the whole set would take twice its size
    of host memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
        if image_set.nbytes * 10 > free_bytes:
            return image_set
    return image_set.to(device)


def evenly_spread(count: int, total: int) -> Tensor:
    """(min(count, total),) int64 indices, evenly spread over 0 to total - 1: class folders are
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
    """The training set of a run as shuffled, augmented batches on ``device``.

    The order of an epoch depends only on (seed, epoch), and a step's augmentation only on (seed,
    epoch, step), so a run resumed in mid-epoch sees the same batches. torch's global random state
    is neither read nor changed.
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
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.share = share  # (images in the batch) -> the slice of them for this process

    def __len__(self) -> int:
        """Steps per epoch. A last partial batch is dropped; with fewer images than a batch there is
        one step with all of them."""
        return max(1, len(self.image_set) // self.batch_size)

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return min(self.batch_size, len(self.image_set))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (N, 3, H, W) float32 channels_last, labels (N,) int64) of each step from
        ``start_step`` on."""
        shuffle = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        # on the CPU: every device and rank must draw the same order, wherever its images are
        order = torch.randperm(len(self.image_set), generator=shuffle)
        order = order.to(self.image_set.device)
        generator = torch.Generator(self.device)
        for step in range(start_step, len(self)):
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            total = len(indices)
            part = self.share(total)
            rows = self.image_set.rows
            rows = indices[part] if rows is None else rows[indices[part]]
            images = self._take(self.image_set.stored, rows)
            labels = self._take(self.image_set.labels, indices[part])
            generator.manual_seed(stable_seed("augmentation", self.seed, epoch, step))
            yield self.augmentation(images, generator, part, total), labels

    def _take(self, tensor: Tensor, indices: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor.index_select(0, indices)
        # From page-locked memory the copy overlaps the GPU's work; PyTorch reuses that memory only
        # after the copy is done.
        shape, pin = (len(indices), *tensor.shape[1:]), self.device.type == "cuda"
        gathered = torch.empty(shape, dtype=tensor.dtype, pin_memory=pin)
        torch.index_select(tensor, 0, indices, out=gathered)
        return gathered.to(self.device, non_blocking=True)


def input_size(config: dict, train: ImageSet) -> list[int]:
    """[height, width] of the network's input: --image-size, or that of the images."""
    return [config["image_size"]] * 2 if config["image_size"] else list(train.image_size)


def eval_batch_size(size: Sequence[int], device: torch.device) -> int:
    """Images of (height, width) per evaluation batch."""
    return max(1, EVAL_PIXELS[device.type] // (size[0] * size[1]))


def eval_batches(
    image_set: ImageSet,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    size: Sequence[int],
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input (N, 3, *size) float32, labels (N,) int64) of the set, or of a part of it, in order and
    in large batches on the device. Whole pictures, normalized and resized to ``size``."""
    batch_size = eval_batch_size(size, device)
    start, end, _ = part.indices(len(image_set))
    for first in range(start, end, batch_size):
        batch = slice(first, min(first + batch_size, end))
        images = image_set.take(batch).to(device, non_blocking=True)
        labels = image_set.labels[batch].to(device, non_blocking=True)
        yield to_input(images, mean, std, size), labels
