"""CIFAR-100 as two tensors, decoded once (into a cache) and kept as uint8.

CIFAR-100 comes from class folders, from the official archive, or from its unpacked folder;
README.md says where to put which. Batches of it are made in augmentation.py.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError, one_line, printable
from datasets.download import (
    around,
    check_archive,
    check_data_dir,
    data_folder,
    fetch,
    named,
    near,
)
from datasets.image_files import (
    MIN_IMAGE_SIZE,
    decoded,
    images_and_others,
    passed_over,
    resized,
    some,
)
from datasets.image_set import ImageSet

# The official archive. md5 sums of the archive and of the three files in it that are read.
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
CIFAR100_MIB = 161
CIFAR100_FILES = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
CIFAR100_ARCHIVE = "cifar-100-python.tar.gz"
CIFAR100_UNPACKED = "cifar-100-python"
CIFAR100_FOLDERS = "cifar100"


# ----------------------------------------------------------------------------------------------
# CIFAR-100: where from


def cifar100_present(data_dir: str | os.PathLike) -> bool:
    """Whether load_cifar100 would find something without the network. Looks at names only, so it is
    cheap."""
    return _find_cifar100(data_folder(data_dir)) is not None


CIFAR100_NAMES = (CIFAR100_FOLDERS, CIFAR100_UNPACKED, CIFAR100_ARCHIVE)


def _find_cifar100(root: Path) -> tuple[str, Path] | None:
    """("folders", "unpacked" or "archive", where it is), of what is in `root`, in one of its
    folders, or `root` itself."""
    for kind, name in (("folders", CIFAR100_FOLDERS), ("unpacked", CIFAR100_UNPACKED)):
        if (root / name).is_dir():  # if it is not whole, the reader will say what is missing
            path = next(
                filter(_kind_of, (root / name, *named(root / name, CIFAR100_NAMES))), root / name
            )
            return _kind_of(path) or kind, path
    path = next(filter(_kind_of, around(root, CIFAR100_NAMES)), root)
    kind = _kind_of(path)
    # train/ and test/ alone may be anything
    is_named_so = path.resolve().name.casefold() in CIFAR100_NAMES
    return (kind, path) if kind == "unpacked" or kind and is_named_so else None


def _kind_of(path: Path) -> str | None:
    """What a file or folder holds, by the names in it; None for anything else."""
    if all((path / name).is_file() for name in CIFAR100_FILES):
        return "unpacked"
    if (path / "train").is_dir() and (path / "test").is_dir():
        return "folders"
    return "archive" if path.name.casefold() == CIFAR100_ARCHIVE and path.is_file() else None


def load_cifar100(
    data_dir: str | os.PathLike,
    *,
    image_size: int | None = None,
    num_workers: int = 0,
    download: bool = True,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """CIFAR-100 (train, test) from the first of these that is there: class folders
    `<data_dir>/cifar100/{train,test}/<class>/*` (any number of classes), the unpacked official
    folder, the official archive, the official server (only with `download`). They are found in
    capital letters, too, one folder deeper, and where data_dir is itself the folder.

    image_size: side in pixels to resize to; None keeps the images as they are, which must then be
    of one size.
    num_workers: processes that decode class folders; 0 decodes in this process. Raises UserError
    for whatever a person can mend.
    """
    root = data_folder(data_dir)
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"--image-size {image_size} is too small: at least {MIN_IMAGE_SIZE} pixels are needed"
        )
    kind, path = _find_cifar100(root) or ("archive", root / CIFAR100_ARCHIVE)
    if kind == "folders":
        return _load_class_folders(path, root / ".cache", image_size, num_workers, progress)
    if not path.exists():
        _check_data_dir(root, download)
        fetch(
            CIFAR100_URL,
            CIFAR100_MD5,
            path,
            size_mib=CIFAR100_MIB,
            what="CIFAR-100",
            by_hand=_by_hand(root),
            progress=progress,
        )
    files = _read_unpacked(path) if kind == "unpacked" else _read_archive(path)
    source = f"official CIFAR-100 files in {path}"
    class_names = tuple(pickle.loads(files["meta"], encoding="latin1")["fine_label_names"])
    return (
        _official_set(files["train"], class_names, image_size, source),
        _official_set(files["test"], class_names, image_size, source),
    )


def _by_hand(root: Path) -> str:
    return (
        f"Fetch {CIFAR100_URL} (md5 {CIFAR100_MD5}) yourself and put it at {root / CIFAR100_ARCHIVE}, or put class"
        f" folders at {root / 'cifar100'}/{{train,test}}/<class>/, or use --sample for the built-in sample"
    )


def _check_data_dir(root: Path, download: bool) -> None:
    """Refuse what looks like a mistyped --data-dir rather than download into it."""
    if _kind_of(root) == "folders":
        raise UserError(
            f"{root} holds train/ and test/ itself: if they are CIFAR-100, move them into a folder named"
            f" cifar100, and give the folder that holds cifar100 as --data-dir"
        )
    other = next(filter(_kind_of, near(root, CIFAR100_NAMES)), None)
    check_data_dir(root, download, "CIFAR-100", "cifar100", other, _by_hand(root))


def _read_archive(path: Path) -> dict[str, bytes]:
    """The three pickles of the official archive, by name. They are read in memory: nothing is
    unpacked to disk, so nothing can be left half-unpacked, and no member's path matters."""
    check_archive(path, CIFAR100_MD5, CIFAR100_URL)
    try:
        with tarfile.open(path, "r:gz") as archive:
            return {
                name: archive.extractfile(f"{CIFAR100_UNPACKED}/{name}").read()
                for name in CIFAR100_FILES
            }
    except (OSError, EOFError, tarfile.TarError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). Move it away and start again"
        ) from None


def _read_unpacked(folder: Path) -> dict[str, bytes]:
    """The three pickles of the unpacked archive. The md5 sums come first: unpickling an unknown
    file runs its code."""
    files = {}
    for name, md5 in CIFAR100_FILES.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read ({one_line(error)}). Move {folder} away and start again, to"
                f" use {CIFAR100_ARCHIVE} or download it"
            ) from None
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(
                f"{folder / name} is damaged (its md5 is not {md5}). Move {folder} away and start again, to"
                f" use {CIFAR100_ARCHIVE} or download it"
            )
    return files


def _official_set(
    pickled: bytes, class_names: tuple[str, ...], image_size: int | None, source: str
) -> ImageSet:
    entry = pickle.loads(pickled, encoding="latin1")
    images = np.ascontiguousarray(entry["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    if image_size not in (None, 32):
        images = np.stack([resized(Image.fromarray(image), image_size) for image in images])
    return ImageSet(
        torch.from_numpy(images), torch.tensor(entry["fine_labels"]), class_names, source
    )


# ----------------------------------------------------------------------------------------------
# class folders, cache


def _load_class_folders(
    folder: Path, cache_dir: Path, image_size: int | None, num_workers: int, progress: bool
) -> tuple[ImageSet, ImageSet]:
    listings = {split: _list_classes(folder / split) for split in ("train", "test")}
    train_names, test_names = (tuple(listings[split]) for split in ("train", "test"))
    if train_names != test_names:
        raise UserError(
            f"the classes of {folder / 'train'} and {folder / 'test'} differ: only in train"
            f" {_only(train_names, test_names)}, only in test {_only(test_names, train_names)}."
            f" Give both the same class folders"
        )
    source = f"CIFAR-100 class folders in {folder}"
    size, sets = (image_size, image_size) if image_size else None, []
    for split, classes in listings.items():
        paths = [path for files in classes.values() for path in files]
        images = decoded(
            paths,
            cache_dir,
            f"cifar100-{split}",
            folder,
            size,
            image_size is not None,
            num_workers,
            progress,
        ).images
        size = size or images.shape[1:3]  # the test images must be of the train images' size
        labels = torch.repeat_interleave(torch.tensor([len(files) for files in classes.values()]))
        sets.append(ImageSet(images, labels, train_names, source))
    return sets[0], sets[1]


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted. Hidden names are passed over; so is what is no
    image, and that is said."""
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "missing"
        raise UserError(
            f"{folder} is {what}: class folders are expected at {folder.parent}/{{train,test}}/<class>/ (or the"
            f" three official files train, test and meta)"
        )
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{folder} holds no class folders. Put one folder of images for each class into it"
        )
    loose, _ = images_and_others(folder)
    if loose:
        print(
            f"{printable(folder)}: passed over {len(loose):,} image{'s' * (len(loose) != 1)} in no class folder: {some(loose)}",
            flush=True,
        )
    classes, others, total = {}, [], 0
    for name in names:
        files, missed = images_and_others(folder / name)
        if not files:
            found = f", only {some(missed)}" if missed else ""
            raise UserError(
                f"class folder {printable(folder / name)} holds no images{found}. Put images into it, or remove"
                f" it from both train and test"
            )
        classes[name] = [folder / name / file for file in files]
        others += [f"{name}/{file}" for file in missed]
        total += len(files) + len(missed)
    if others:
        print(passed_over(folder, others, total), flush=True)
    return classes


def _only(names: Sequence[str], others: Sequence[str]) -> str:
    return some([name for name in names if name not in others]) or "none"


# -------------------------------------------------------------------------------------------------
# sets of images
