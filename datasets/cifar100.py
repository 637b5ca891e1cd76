"""CIFAR-100 as two uint8 image tensors, from class folders (decoded once, into a cache), the
official archive, or its unpacked folder.

docs/data.md, "CIFAR-100", says where to put which.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError, one_line
from datasets.class_folders import load_class_folders
from datasets.download import (
    check_archive,
    check_data_dir,
    data_folder,
    fetch,
    find_below,
    find_beside,
    find_named,
)
from datasets.image_files import MIN_IMAGE_SIZE, resized
from datasets.image_set import ImageSet

# The official archive, its md5, and those of the three files that are read from it.
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
CIFAR100_NAMES = (CIFAR100_FOLDERS, CIFAR100_UNPACKED, CIFAR100_ARCHIVE)


# ---- where it is --------------------------------------------------------------------------------


def cifar100_present(data_dir: str | os.PathLike) -> bool:
    """Whether load_cifar100 would find data without the network. Cheap: looks at names only.

    Raises UserError for a ~ in ``data_dir`` without a home folder.
    """
    return _find_cifar100(data_folder(data_dir)) is not None


def _find_cifar100(root: Path) -> tuple[str, Path] | None:
    """("folders", "unpacked" or "archive", its path): in ``root``, in one of its folders, or
    ``root`` itself."""
    for kind, name in (("folders", CIFAR100_FOLDERS), ("unpacked", CIFAR100_UNPACKED)):
        folder = root / name
        if folder.is_dir():  # if it is incomplete, the reader will say what is missing
            path = next(filter(_kind_of, (folder, *find_named(folder, CIFAR100_NAMES))), folder)
            return _kind_of(path) or kind, path
    path = next(filter(_kind_of, find_below(root, CIFAR100_NAMES)), root)
    kind = _kind_of(path)
    # train/ and test/ alone may be anything
    has_known_name = path.resolve().name.casefold() in CIFAR100_NAMES
    return (kind, path) if kind == "unpacked" or kind and has_known_name else None


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
    """CIFAR-100 (train, test) from the first of these that exists: class folders
    ``<data_dir>/cifar100/{train,test}/<class>/*`` (any number of classes), the unpacked official
    folder, the official archive, the official server.

    Names match in upper and lower case, one folder deeper, and where ``data_dir`` is itself the
    folder.

    Args:
        image_size: side in pixels to resize to; None keeps the images, which must then be of one
            size.
        num_workers: processes that decode class folders; 0 decodes in this process.
        download: whether to use the official server.
        progress: show progress bars on a terminal.

    Raises:
        UserError: anything the user can fix.
    """
    root = data_folder(data_dir)
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"--image-size {image_size} is too small: at least {MIN_IMAGE_SIZE} pixels are needed"
        )
    kind, path = _find_cifar100(root) or ("archive", root / CIFAR100_ARCHIVE)
    if kind == "folders":
        return load_class_folders(
            path,
            root / ".cache",
            image_size,
            num_workers,
            progress,
            name="cifar100",
            title="CIFAR-100",
        )
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
        f"Fetch {CIFAR100_URL} (md5 {CIFAR100_MD5}) yourself and put it at "
        f"{root / CIFAR100_ARCHIVE}, or put class folders at "
        f"{root / 'cifar100'}/{{train,test}}/<class>/, or use --sample for the built-in sample"
    )


def _check_data_dir(root: Path, download: bool) -> None:
    """Refuse what looks like a mistyped --data-dir instead of downloading into it."""
    if _kind_of(root) == "folders":
        raise UserError(
            f"{root} holds train/ and test/ itself: if they are CIFAR-100, move them into a "
            f"folder named cifar100, and give the folder that holds cifar100 as --data-dir"
        )
    other = next(filter(_kind_of, find_beside(root, CIFAR100_NAMES)), None)
    check_data_dir(root, download, "CIFAR-100", "cifar100", other, _by_hand(root))


# ---- official files -----------------------------------------------------------------------------


def _read_archive(path: Path) -> dict[str, bytes]:
    """The three pickles of the official archive, by name. Read in memory: nothing is unpacked to
    disk, so nothing can be left half-unpacked, and members' paths do not matter."""
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
    """The three pickles of the unpacked archive. The md5 is checked first: unpickling an unknown
    file runs its code."""
    remedy = f"Move {folder} away and start again, to use {CIFAR100_ARCHIVE} or download it"
    files = {}
    for name, md5 in CIFAR100_FILES.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read ({one_line(error)}). {remedy}"
            ) from None
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{folder / name} is damaged (its md5 is not {md5}). {remedy}")
    return files


def _official_set(
    pickled: bytes, class_names: tuple[str, ...], image_size: int | None, source: str
) -> ImageSet:
    entry = pickle.loads(pickled, encoding="latin1")
    images = np.ascontiguousarray(entry["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    if image_size not in (None, 32):
        images = np.stack([resized(Image.fromarray(image), image_size) for image in images])
    labels = torch.tensor(entry["fine_labels"])
    return ImageSet(torch.from_numpy(images), labels, class_names, source)
