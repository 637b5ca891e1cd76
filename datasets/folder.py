"""Class folders of the user's own images, as torchvision's ImageFolder has them.

docs/data.md, "Your own images", has the layouts.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, printable
from datasets.decoding import Pictures
from datasets.download import data_folder
from datasets.folder_layout import check_classes, check_same_classes, find_layout, list_files
from datasets.folder_report import lines_on
from datasets.image_cache import load_or_decode
from datasets.image_files import MIN_IMAGE_SIZE, REMEDY, preview_names
from datasets.image_set import ImageSet
from datasets.near_duplicates import groups_of

CROPS = ("center", "whole")


def load_folder(
    data_dir: str | os.PathLike,
    *,
    image_size: int,
    crop: str = "center",
    test_share: float = 0.2,
    split_seed: int = 0,
    near_duplicates: bool = True,
    skip_unreadable: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the class folders in ``data_dir``: a folder train/ beside test/ or val/, or
    else one folder of classes, which is split. Prints what was found.

    The split is drawn by ``split_seed`` from the names of the files, so it is the same at every
    start. A class has a test image if it has two images, of which one is not a near-duplicate.

    Args:
        image_size: side in pixels of every picture.
        crop: "center", the centered square of the shorter side, or "whole", the whole picture,
            which becomes a square whatever its shape.
        test_share: share of each class in the test set, above 0 and below 1.
        near_duplicates: look for them, and keep them on one side of the split.
        skip_unreadable: leave images out that cannot be read, instead of an error.
        num_workers: processes that decode; 0 decodes in this process.
        progress: show progress bars on a terminal.

    Raises:
        UserError: anything the user can fix.
        ValueError: an unknown crop, or a share out of range.
    """
    if crop not in CROPS or not 0 < test_share < 1:
        raise ValueError(f"crop {crop!r} is not of {CROPS}, or test_share {test_share} not in 0-1")
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"--image-size {image_size} is too small: at least {MIN_IMAGE_SIZE} pixels are needed"
        )
    root = Path(os.path.abspath(data_folder(data_dir)))
    layout = find_layout(root)
    listings = [list_files(folder, progress) for folder in layout[:2] if folder]
    for listing in listings:
        check_classes(listing)
    check_same_classes(*listings)
    names = tuple(listings[0].classes)
    paths = [
        os.path.join(listing.folder, file)
        for listing in listings
        for files in listing.classes.values()
        for file in files
    ]
    counts = [len(files) for listing in listings for files in listing.classes.values()]
    labels = np.repeat(np.tile(np.arange(len(names)), len(listings)), counts)
    # all are tried, so that an error can name every one that is unreadable
    pictures = load_or_decode(
        paths,
        root / ".cache",
        f"folder-{crop}",
        root,
        size=(image_size, image_size),
        resize=True,
        num_workers=num_workers,
        progress=progress,
        center=crop == "center",
        skip_unreadable=True,
    )
    start = len(os.path.join(root, ""))
    found = Found(root, names, labels, [path[start:] for path in paths], pictures, near_duplicates)
    if not skip_unreadable:
        found.check_readable()
    split = None
    if layout.test:
        found.in_train[sum(counts[: len(names)]) :] = False
    else:
        split = test_share, split_seed
        found.in_train = ~found.chosen_for_test(*split)
    print("\n".join(lines_on(found, data_dir, layout, listings, split)), flush=True)
    found.check_sides()
    return found.image_sets(f"class folders in {data_dir}")


class Found:
    """The images of all class folders: those of one set after those of the other."""

    def __init__(
        self,
        root: Path,
        names: tuple[str, ...],
        labels: np.ndarray,
        files: list[str],
        pictures: Pictures,
        near_duplicates: bool,
    ):
        self.root, self.names, self.labels = root, names, labels
        self.files, self.pictures = files, pictures
        self.usable = np.ones(len(files), bool)
        self.usable[list(pictures.unreadable)] = False
        self.in_train = np.ones(len(files), bool)
        self.groups = np.arange(len(files))  # the first near-duplicate of each
        rows = self.usable.nonzero()[0]
        if near_duplicates:
            self.groups[rows] = rows[groups_of(pictures.thumbnails.numpy()[rows])]

    def chosen_for_test(self, share: float, seed: int) -> np.ndarray:
        """(N,) bool: ``share`` of each class, at least one image of it and not all. Groups of
        near-duplicates are whole, in an order that ``seed`` and the files' names decide."""
        counts = Counter(self.labels[self.usable].tolist())
        room = {
            label: min(max(1, int(count * share + 0.5)), count - 1)
            for label, count in counts.items()
        }
        members: dict[int, list[int]] = {}
        for row in self.usable.nonzero()[0].tolist():
            members.setdefault(int(self.groups[row]), []).append(row)
        chosen = np.zeros(len(self.files), bool)
        for first in sorted(members, key=lambda row: drawn(seed, self.files[row])):
            wanted = Counter(self.labels[members[first]].tolist())
            if all(count <= room[label] for label, count in wanted.items()):
                chosen[members[first]] = True
                for label, count in wanted.items():
                    room[label] -= count
        return chosen

    def check_readable(self) -> None:
        """Raises UserError for images that cannot be read."""
        if not self.pictures.unreadable:
            return
        (_, reason), *more = self.pictures.unreadable.items()
        others = ""
        if more:
            names = preview_names([self.files[row] for row, _ in more])
            others = f" ({len(more):,} more images cannot be read: {names})"
        raise UserError(
            f"{reason.removesuffix(REMEDY)}{others}{REMEDY}, or leave such images out with "
            f"--skip-unreadable"
        )

    def check_sides(self) -> None:
        """Raises UserError where a class has no training image left, or the test set no image."""
        counts = np.bincount(self.labels[self.usable & self.in_train], minlength=len(self.names))
        if not counts.all():
            name = self.names[int(counts.argmin())]
            raise UserError(
                f"class {printable(name)} in {printable(self.root)} has no training image: add "
                f"some, or move the class away"
            )
        if not (self.usable & ~self.in_train).any():
            raise UserError(
                f"{printable(self.root)} leaves no image for the test set: each class has one "
                f"image, or near-duplicates only (--set near_duplicates=false splits them, too)"
            )

    def image_sets(self, source: str) -> tuple[ImageSet, ImageSet]:
        """The usable images for training and for the test."""
        content, sets = self.content(), []
        for side in (self.in_train, ~self.in_train):
            rows = torch.from_numpy((self.usable & side).nonzero()[0])
            sets.append(
                ImageSet(
                    self.pictures.images,
                    torch.from_numpy(self.labels)[rows],
                    self.names,
                    source,
                    rows=rows,
                    files=tuple(self.files[row] for row in rows.tolist()),
                    content=content,
                )
            )
        return sets[0], sets[1]

    def content(self) -> int:
        """A checksum of the usable files' names and lengths: not of their pixels, which another
        version of a decoder rounds otherwise."""
        checksum = 0
        for row in self.usable.nonzero()[0].tolist():
            length = os.stat(os.path.join(self.root, self.files[row])).st_size
            line = f"{self.files[row]}\0{length}\n"
            checksum = zlib.crc32(line.encode(errors="surrogateescape"), checksum)
        return checksum


def drawn(seed: int, file: str) -> bytes:
    """Random bytes for a file, the same everywhere."""
    name = f"{seed}/{file}".encode(errors="surrogateescape")
    return hashlib.blake2b(name, digest_size=8).digest()
