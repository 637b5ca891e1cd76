"""Class folders: a folder of images for each class, under train/ and test/."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError, printable
from datasets.image_cache import load_or_decode
from datasets.image_files import images_and_others, passed_over, preview_names
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

    ``image_size``: side in pixels to resize to; None keeps the images as they are, which must then
    be of one size. ``name`` is that of the cache files, ``title`` that of the source. Raises
    UserError.
    """
    listings = {split: list_classes(folder / split) for split in ("train", "test")}
    train_names, test_names = (tuple(listings[split]) for split in ("train", "test"))
    if train_names != test_names:
        raise UserError(
            f"the classes of {folder / 'train'} and {folder / 'test'} differ: only in train "
            f"{_only(train_names, test_names)}, only in test {_only(test_names, train_names)}. "
            f"Give both the same class folders"
        )
    source = f"{title} class folders in {folder}"
    size = (image_size, image_size) if image_size else None
    sets = []
    for split, classes in listings.items():
        paths = [path for files in classes.values() for path in files]
        images = load_or_decode(
            paths,
            cache_dir,
            f"{name}-{split}",
            folder,
            size=size,
            resize=image_size is not None,
            num_workers=num_workers,
            progress=progress,
        ).images
        size = size or images.shape[1:3]  # the test images must be of the train images' size
        labels = torch.repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
        files = tuple(os.path.relpath(path, folder) for path in paths)
        sets.append(ImageSet(images, labels, train_names, source, files=files))
    return sets[0], sets[1]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted. Hidden names are skipped, and so are files that
    are not images, with a printed note."""
    if not folder.is_dir():
        state = "a file, not a folder" if folder.exists() else "missing"
        raise UserError(
            f"{folder} is {state}: class folders are expected at "
            f"{folder.parent}/{{train,test}}/<class>/"
        )
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{folder} holds no class folders. Put one folder of images for each class into it"
        )
    loose, _ = images_and_others(folder)
    if loose:
        count = f"{len(loose):,} image{'s' * (len(loose) != 1)}"
        print(
            f"{printable(folder)}: passed over {count} in no class folder: {preview_names(loose)}",
            flush=True,
        )
    classes, others, total = {}, [], 0
    for name in names:
        files, skipped = images_and_others(folder / name)
        if not files:
            found = f", only {preview_names(skipped)}" if skipped else ""
            raise UserError(
                f"class folder {printable(folder / name)} holds no images{found}. "
                f"Put images into it, or remove it from both train and test"
            )
        classes[name] = [folder / name / file for file in files]
        others += [f"{name}/{file}" for file in skipped]
        total += len(files) + len(skipped)
    if others:
        print(passed_over(folder, others, total), flush=True)
    return classes


def _only(names: Sequence[str], others: Sequence[str]) -> str:
    return preview_names([name for name in names if name not in others]) or "none"
