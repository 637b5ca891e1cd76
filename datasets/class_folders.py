"""Class folders under train/ and test/, in the place of an official archive."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from common.errors import UserError
from datasets.folder_layout import (
    Listing,
    check_classes,
    check_same_classes,
    folders_in,
    list_files,
)
from datasets.folder_report import left_out
from datasets.image_cache import load_or_decode
from datasets.image_set import ImageSet


def load_class_folders(
    folder: Path,
    cache_dir: Path,
    image_size: int | None,
    num_workers: int,
    progress: bool,
    *,
    name: str,
    title: str,
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of ``folder``/{train,test}/<class>/*, decoded into a cache in ``cache_dir``.
    Prints what is passed over.

    ``image_size``: side in pixels to resize to; None keeps the images as they are, which must then
    be of one size. ``name`` is that of the cache files, ``title`` that of the source. Raises
    UserError.
    """
    listings = [checked_listing(folder / split, progress) for split in ("train", "test")]
    check_same_classes(*listings)
    for line in left_out(listings):
        print(line.strip(), flush=True)
    size = (image_size, image_size) if image_size else None
    sets = []
    for listing in listings:
        split = listing.folder.name
        files = [file for files in listing.classes.values() for file in files]
        images = load_or_decode(
            [os.path.join(listing.folder, file) for file in files],
            cache_dir,
            f"{name}-{split}",
            folder,
            size=size,
            resize=image_size is not None,
            num_workers=num_workers,
            progress=progress,
        ).images
        size = size or images.shape[1:3]  # the test images must be of the train images' size
        counts = torch.tensor([len(files) for files in listing.classes.values()])
        sets.append(
            ImageSet(
                images,
                torch.repeat_interleave(counts),
                tuple(listing.classes),
                f"{title} class folders in {folder}",
                files=tuple(os.path.join(split, file) for file in files),
            )
        )
    return sets[0], sets[1]


def checked_listing(folder: Path, progress: bool) -> Listing:
    """The class folders in ``folder``. Raises UserError where it is none, or they are none."""
    if not folder.is_dir():
        state = "a file, not a folder" if folder.exists() else "missing"
        raise UserError(
            f"{folder} is {state}: class folders are expected at "
            f"{folder.parent}/{{train,test}}/<class>/"
        )
    if not folders_in(folder):
        raise UserError(
            f"{folder} holds no class folders. Put one folder of images for each class into it"
        )
    listing = list_files(folder, progress)
    check_classes(listing)
    return listing
