"""CIFAR-10 and CIFAR-100 as two uint8 image tensors, from class folders (decoded once, into a
cache), the official archive, or its unpacked folder.

docs/data.md, "CIFAR-100" and "CIFAR-10", says where to put which.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from dataclasses import dataclass
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

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Archive:
    """An official archive, what is read from it, and the names by which its data are found."""

    title: str  # the data set's name in messages
    class_folders: str  # the folder that holds train/<class>/ and test/<class>/ instead
    url: str
    md5: str
    mib: int  # approximate size
    name: str
    folder: str  # the one inside the archive, of these files: {name: md5}
    train: dict[str, str]  # in the order of the images
    test: dict[str, str]
    meta: dict[str, str]
    in_words: str  # these files, in a message
    labels: str  # the key of the labels in a file of images
    class_names: str  # the key of the class names in the file of metadata

    @property
    def files(self) -> dict[str, str]:
        """The md5 of each file by its name."""
        return {**self.train, **self.test, **self.meta}

    @property
    def names(self) -> tuple[str, str, str]:
        """What is looked for, the first first. All of them are in lower case."""
        return self.class_folders, self.folder, self.name

    @property
    def script(self) -> str:
        """The script that trains on it."""
        return f"train_{self.class_folders}.py"


CIFAR100_ARCHIVE = Archive(
    title="CIFAR-100",
    class_folders="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    mib=161,
    name="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    in_words="three official files train, test and meta",
    labels="fine_labels",
    class_names="fine_label_names",
)
CIFAR10_ARCHIVE = Archive(
    title="CIFAR-10",
    class_folders="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    mib=163,
    name="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    in_words="seven official files data_batch_1 to data_batch_5, test_batch and batches.meta",
    labels="labels",
    class_names="label_names",
)


def cifar100_present(data_dir: str | os.PathLike) -> bool:
    """Whether load_cifar100 would find data without the network. Cheap: looks at names only.

    Raises UserError for a ~ in ``data_dir`` without a home folder.
    """
    return _find(data_folder(data_dir), CIFAR100_ARCHIVE) is not None


def cifar10_present(data_dir: str | os.PathLike) -> bool:
    """Whether load_cifar10 would find data without the network. Cheap: looks at names only.

    Raises UserError for a ~ in ``data_dir`` without a home folder.
    """
    return _find(data_folder(data_dir), CIFAR10_ARCHIVE) is not None


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
    return _load(CIFAR100_ARCHIVE, data_dir, image_size, num_workers, download, progress)


def load_cifar10(
    data_dir: str | os.PathLike,
    *,
    image_size: int | None = None,
    num_workers: int = 0,
    download: bool = True,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 (train, test), as load_cifar100 loads CIFAR-100: the class folders are at
    ``<data_dir>/cifar10/{train,test}/<class>/*``. The training images of the official files are
    those of their five batches, in order.

    Args:
        image_size, num_workers, download, progress: see load_cifar100.

    Raises:
        UserError: anything the user can fix.
    """
    return _load(CIFAR10_ARCHIVE, data_dir, image_size, num_workers, download, progress)


def _load(
    archive: Archive,
    data_dir: str | os.PathLike,
    image_size: int | None,
    num_workers: int,
    download: bool,
    progress: bool,
) -> tuple[ImageSet, ImageSet]:
    root = data_folder(data_dir)
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"--image-size {image_size} is too small: at least {MIN_IMAGE_SIZE} pixels are needed"
        )
    kind, path = _find(root, archive) or ("archive", root / archive.name)
    if kind == "folders":
        _check_splits(path, archive)
        return load_class_folders(
            path,
            root / ".cache",
            image_size,
            num_workers,
            progress,
            name=archive.class_folders,
            title=archive.title,
        )
    if not path.exists():
        _check_data_dir(root, archive, download)
        fetch(
            archive.url,
            archive.md5,
            path,
            size_mib=archive.mib,
            what=archive.title,
            by_hand=_by_hand(root, archive),
            progress=progress,
        )
    files = _read_unpacked(path, archive) if kind == "unpacked" else _read_archive(path, archive)
    return _official_sets(files, archive, image_size, path)


# ---- where it is --------------------------------------------------------------------------------


def _find(root: Path, archive: Archive) -> tuple[str, Path] | None:
    """("folders", "unpacked" or "archive", its path): in ``root``, in one of its folders, or
    ``root`` itself."""
    for kind, name in (("folders", archive.class_folders), ("unpacked", archive.folder)):
        folder = root / name
        if folder.is_dir():  # if it is incomplete, the reader will say what is missing
            path = _first([folder, *find_named(folder, archive.names)], archive) or folder
            return _kind_of(path, archive) or kind, path
    path = _first(find_below(root, archive.names), archive) or root
    kind = _kind_of(path, archive)
    # train/ and test/ alone may be anything
    return (kind, path) if kind and (kind != "folders" or _is_named(path, archive)) else None


def _first(paths: list[Path], archive: Archive) -> Path | None:
    """The first path that holds the data set."""
    return next((path for path in paths if _kind_of(path, archive)), None)


def _kind_of(path: Path, archive: Archive) -> str | None:
    """What a file or folder holds, by the names in it; None for anything else."""
    if all((path / name).is_file() for name in archive.files):
        return "unpacked"
    if _holds_splits(path):
        is_other = _is_named(path, _other(archive)) and not _is_named(path, archive)
        return None if is_other else "folders"
    return "archive" if path.name.casefold() == archive.name and path.is_file() else None


def _holds_splits(path: Path) -> bool:
    return all((path / split).is_dir() for split in SPLITS)


def _is_named(path: Path, archive: Archive) -> bool:
    """Whether a path, or what it links to, has one of the data set's names."""
    return any(name.casefold() in archive.names for name in (path.name, path.resolve().name))


def _other(archive: Archive) -> Archive:
    """CIFAR-100 for CIFAR-10, and the other way round."""
    is_cifar10 = archive.class_folders == CIFAR10_ARCHIVE.class_folders
    return CIFAR100_ARCHIVE if is_cifar10 else CIFAR10_ARCHIVE


def _by_hand(root: Path, archive: Archive) -> str:
    return (
        f"Fetch {archive.url} (md5 {archive.md5}) yourself and put it at "
        f"{root / archive.name}, or put class folders at "
        f"{root / archive.class_folders}/{{train,test}}/<class>/, or use --sample for the "
        f"built-in sample"
    )


def _check_data_dir(root: Path, archive: Archive, download: bool) -> None:
    """Refuse what looks like a mistyped --data-dir instead of downloading into it."""
    if _kind_of(root, archive) == "folders":
        raise UserError(
            f"{root} holds train/ and test/ itself: if they are {archive.title}, move them into "
            f"a folder named {archive.class_folders}, and give the folder that holds "
            f"{archive.class_folders} as --data-dir"
        )
    beside = _first(find_beside(root, archive.names), archive)
    other = _other(archive)
    if not beside:
        _check_not_inside(root, archive, other)
    by_hand = _by_hand(root, archive)
    if found := _find(root, other):
        by_hand = f"{other.title} at {found[1]} is for {other.script}. {by_hand}"
    check_data_dir(root, download, archive.title, archive.class_folders, beside, by_hand)


def _check_not_inside(root: Path, archive: Archive, other: Archive) -> None:
    """Refuse a folder that is the other data set, or in it."""
    for path in (root, *root.absolute().parents[:2]):
        is_other = _kind_of(path, other) in ("unpacked", "folders")
        if is_other and (path == root or _is_named(path, other)):
            raise UserError(
                f"no {archive.title} in {root}: {path} is {other.title}, which {other.script} "
                f"trains on. Give the folder that holds {archive.title}, or will hold it, as "
                f"--data-dir"
            )


def _check_splits(folder: Path, archive: Archive) -> None:
    """Raises UserError unless a folder with the data set's name holds train/ and test/."""
    for split in SPLITS:
        path = folder / split
        if not path.is_dir():
            state = "a file, not a folder" if path.exists() else "missing"
            raise UserError(
                f"{path} is {state}: class folders are expected at "
                f"{folder}/{{train,test}}/<class>/ (or the {archive.in_words})"
            )


# ---- official files -----------------------------------------------------------------------------


def _read_archive(path: Path, archive: Archive) -> dict[str, bytes]:
    """The pickles of the official archive, by name. Read in memory: nothing is unpacked to disk,
    so nothing can be left half-unpacked, and members' paths do not matter."""
    check_archive(path, archive.md5, archive.url)
    wanted = {f"{archive.folder}/{name}": name for name in archive.files}
    try:
        with tarfile.open(path, "r:gz") as tar:
            # in the archive's order: each step back would unpack it from its beginning
            found = {
                wanted[member.name]: tar.extractfile(member).read()
                for member in tar
                if member.name in wanted
            }
        return {name: found[name] for name in archive.files}
    except (OSError, EOFError, tarfile.TarError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). Move it away and start again"
        ) from None


def _read_unpacked(folder: Path, archive: Archive) -> dict[str, bytes]:
    """The pickles of the unpacked archive. The md5 is checked first: unpickling an unknown file
    runs its code."""
    remedy = f"Move {folder} away and start again, to use {archive.name} or download it"
    files = {}
    for name, md5 in archive.files.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read ({one_line(error)}). {remedy}"
            ) from None
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{folder / name} is damaged (its md5 is not {md5}). {remedy}")
    return files


def _official_sets(
    files: dict[str, bytes], archive: Archive, image_size: int | None, path: Path
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the official files, which were read from ``path``."""
    [meta] = archive.meta
    class_names = tuple(pickle.loads(files[meta], encoding="latin1")[archive.class_names])
    source = f"official {archive.title} files in {path}"
    sets = []
    for names in (archive.train, archive.test):
        batches = [pickle.loads(files[name], encoding="latin1") for name in names]
        images = _images(np.concatenate([batch["data"] for batch in batches]), image_size)
        labels = torch.tensor([label for batch in batches for label in batch[archive.labels]])
        sets.append(ImageSet(images, labels, class_names, source))
    return sets[0], sets[1]


def _images(rows: np.ndarray, image_size: int | None) -> torch.Tensor:
    """Rows of 3,072 values (red, green, blue planes of 32x32 px) -> (N, H, W, 3) uint8."""
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    if image_size not in (None, 32):
        images = np.stack([resized(Image.fromarray(image), image_size) for image in images])
    return torch.from_numpy(images)
