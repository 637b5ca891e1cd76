"""The images that cam.py is asked about, in batches: files, and images of a data set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError, print_error, printable
from data import SOURCES, ImageSet, open_rgb
from explain.images import cut
from explain.networks import TrainedNetwork
from explain.output import MAX_SIDE, Picture, parse_index
from explain.pictures import shown

FIRST_IMAGES = 16  # images of a data set that get pictures without --index
PHOTOS_AT_ONCE = 16  # files per batch, fewer of a larger size: each is in memory as its picture


def batches_of_files(
    network: TrainedNetwork, paths: list[Path], unusable: list[Path], max_side: int = MAX_SIDE
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Pictures, cut to the part that the network sees and at most ``max_side`` pixels large, and
    the batch of them for the network. Unreadable files are reported, appended to ``unusable`` and
    left out."""
    at_once = max(1, min(network.batch_size, PHOTOS_AT_ONCE * MAX_SIDE**2 // max_side**2))
    for first in range(0, len(paths), at_once):
        pictures, views = [], []
        for path in paths[first : first + at_once]:
            try:
                pixels = np.asarray(open_rgb(path))
            except UserError as error:
                print_error(str(error))
                unusable.append(path)
                continue
            views.append(network.view(pixels))
            seen = cut(pixels, views[-1].box)
            pixels = shown(seen, 1, max_side)
            pictures.append(Picture(printable(path), path.stem, pixels, box=views[-1].box))
        if pictures:
            yield pictures, network.batch([view.pixels for view in views])


def batches_of_set(
    network: TrainedNetwork, images: ImageSet, indices: list[int], set_name: str
) -> Iterator[tuple[list[Picture], Tensor]]:
    """The same of a data set's images."""
    for first in range(0, len(indices), network.batch_size):
        chosen = indices[first : first + network.batch_size]
        subset = images.subset(chosen)
        labels = subset.labels.tolist()
        pictures = [
            Picture(f"{set_name} {i}", f"{set_name}-{i:05d}", pixels, images.class_names[label])
            for i, pixels, label in zip(chosen, subset.images.numpy(), labels, strict=True)
        ]
        yield pictures, network.batch(subset.images)


def load_set(args: argparse.Namespace, network: TrainedNetwork) -> ImageSet:
    """The split of --dataset, loaded and cropped as for the network's training (whole pictures for
    --measure)."""
    own = network.config.get("dataset")
    name = args.dataset
    if name == "sample":
        name = own if own in SOURCES else "cifar100"
    source, config = SOURCES[name], set_defaults(name, network)
    if own == name:
        config |= network.config
    data_dir = args.data_dir or config.get("data_dir") or source.default_dir
    if data_dir is None and args.dataset == name:
        raise UserError(f"--dataset {name} needs --data-dir, the folder of the class folders", 2)
    config |= {
        "data_dir": data_dir,
        "num_workers": args.num_workers,
        "sample": args.dataset == "sample",
    }
    if source.has_boxes:
        config["crop"] = args.crop or ("whole" if args.measure else config["crop"])
    train, test = source.sets(config, download=own != name)
    return {"train": train, "test": test}[args.split]


def set_defaults(name: str, network: TrainedNetwork) -> dict:
    """How a data set is read for a network that was not trained on it: whole birds, and the
    centered squares of class folders, for the network's size; CIFAR's images at their own."""
    return {
        "crop": "center" if name == "folder" else "whole",
        "margin": 0.1,
        "zoom": 0.5,
        "image_size": None if name in ("cifar10", "cifar100") else max(network.size),
        "test_share": 0.2,
        "split_seed": 0,
        "near_duplicates": True,
        "skip_unreadable": False,
    }


def selected(args: argparse.Namespace, images: ImageSet) -> list[int]:
    """The images that --index selects, by default the first ones. Raises UserError."""
    if args.index:
        return parse_index(args.index, len(images))
    return list(range(min(FIRST_IMAGES, len(images))))
