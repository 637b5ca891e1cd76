"""Class folders of the user's own images, as torchvision's ImageFolder has them.

docs/data.md, "Your own images", has the layouts.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError, printable
from common.files import identity
from datasets.decoding import Pictures
from datasets.download import data_folder
from datasets.image_cache import load_or_decode
from datasets.image_files import (
    MIN_IMAGE_SIZE,
    REMEDY,
    UnreadableImage,
    image_endings,
    passed_over,
    preview_names,
    shows_progress,
)
from datasets.image_set import ImageSet
from datasets.near_duplicates import groups_of

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there
NO_CLASSES = {"__MACOSX"}  # which an archive made on a Mac adds
FEW = 5  # images: classes with fewer are named
CROPS = ("center", "whole")


class Layout(NamedTuple):
    """Where the classes are: in ``train`` and ``test``, or in ``train`` alone, which is split."""

    train: Path
    test: Path | None
    unused: Path | None = None  # a second folder of test images


class Listing(NamedTuple):
    """The image files of some class folders."""

    folder: Path
    classes: dict[str, list[str]]  # class name -> its files below ``folder``, both sorted
    others: list[str]  # files that are no images
    loose: list[str]  # images in no class folder


def load_folder(
    data_dir: str | os.PathLike,
    *,
    image_size: int,
    crop: str = "center",
    test_share: float = 0.2,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the class folders in ``data_dir``: a folder train/ beside test/ or val/, or
    else one folder of classes, which is split. Prints what was found.

    The split is drawn by ``split_seed`` from the names of the files, so it is the same at every
    start. Near-duplicates are on one side. A class has a test image if it has two that differ.

    Args:
        image_size: side in pixels of every picture.
        crop: "center", the centered square of the shorter side, or "whole", the whole picture,
            which becomes a square whatever its shape.
        test_share: share of each class in the test set, above 0 and below 1.
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
    root = data_folder(data_dir)
    layout = find_layout(root)
    listings = [list_files(folder, progress) for folder in layout[:2] if folder]
    for listing in listings:
        check_classes(listing)
    check_same_classes(*listings)
    names = tuple(listings[0].classes)
    files = [
        os.path.join(listing.folder, file)
        for listing in listings
        for class_files in listing.classes.values()
        for file in class_files
    ]
    counts = [len(class_files) for listing in listings for class_files in listing.classes.values()]
    labels = np.repeat(np.tile(np.arange(len(names)), len(listings)), counts)
    try:
        pictures = load_or_decode(
            files,
            root / ".cache",
            f"folder-{crop}",
            root,
            size=(image_size, image_size),
            resize=True,
            num_workers=num_workers,
            progress=progress,
            center=crop == "center",
            skip_unreadable=skip_unreadable,
        )
    except UnreadableImage as error:
        raise UserError(f"{error}, or leave such images out with --skip-unreadable") from None
    start = len(os.path.join(root, ""))
    found = Found(names, labels, [file[start:] for file in files], pictures)
    if layout.test:
        in_train = np.arange(len(files)) < sum(counts[: len(names)])
    else:
        in_train = ~found.chosen_for_test(test_share, split_seed)
    lines = found.describe(root, layout, listings, in_train, (test_share, split_seed))
    print("\n".join(lines), flush=True)
    found.check(root, in_train)
    content = found.content(root)
    return found.image_set(in_train, root, content), found.image_set(~in_train, root, content)


# ---- where it is --------------------------------------------------------------------------------


def folder_present(data_dir: str | os.PathLike | None) -> bool:
    """Whether there may be class folders. Cheap: looks at a few names only. Raises UserError for a
    ~ in ``data_dir`` without a home folder."""
    return data_dir is not None and bool(folders_in(data_folder(data_dir)))


def find_layout(root: Path) -> Layout:
    """The folders of classes in ``root``, or in its only folder. Raises UserError where it holds no
    folder at all."""
    if not root.is_dir():
        state = "a file, not a folder" if root.exists() else "missing"
        raise UserError(f"--data-dir {printable(root)} is {state}. {EXPECTED}")
    folders = folders_in(root)
    if not folders:
        raise UserError(f"--data-dir {printable(root)} holds no folders. {EXPECTED}")
    by_name = {folder.name.casefold(): folder for folder in folders}
    tests = [by_name[name] for name in TEST_NAMES if name in by_name]
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)
    if train and folders_in(train):
        return Layout(train, *tests[:2]) if tests else Layout(train, None)
    if len(folders) == 1 and len(folders_in(folders[0])) > 1:  # an archive's own folder
        return find_layout(folders[0])
    return Layout(root, None)


EXPECTED = (
    "Class folders are expected: FOLDER/<class>/*, or FOLDER/train/<class>/* and "
    "FOLDER/test/<class>/*"
)


def folders_in(folder: Path) -> list[Path]:
    """The folders that may be classes or hold them, sorted; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in NO_CLASSES
    )


def list_files(folder: Path, progress: bool) -> Listing:
    """The images in the class folders of ``folder``, also in folders within them. Links are
    followed; hidden names are skipped."""
    hide = not shows_progress(progress)
    bar = tqdm(desc=f"listing {folder.name}", unit=" files", leave=False, disable=hide, delay=2)
    with bar:
        classes, others = {}, []
        for path in folders_in(folder):
            images, rest = files_below(path, len(str(folder)) + 1, bar)
            classes[path.name] = sorted(images, key=lambda name: name.split(os.sep))
            others += rest
    loose = [entry.name for entry in os.scandir(folder) if entry.is_file() and is_image(entry.name)]
    return Listing(folder, classes, sorted(others), sorted(loose))


def files_below(folder: Path, start: int, bar: tqdm) -> tuple[list[str], list[str]]:
    """(images, other files) in a folder and those within it: their paths from character ``start``
    on."""
    images, others, waiting = [], [], [str(folder)]
    seen = {identity(above) for above in folder.absolute().parents}
    while waiting:
        path = waiting.pop()
        if identity(path) in seen:  # a link to a folder above, or a second one to the same folder
            continue
        seen.add(identity(path))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                    continue
                bar.update()
                # a link that leads nowhere is an image that cannot be read; a pipe is none
                is_file = entry.is_file() or not os.path.exists(entry.path)
                (images if is_file and is_image(entry.name) else others).append(entry.path[start:])
    return images, others


def is_image(name: str) -> bool:
    """Whether a file name has an image's ending, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_endings()


# ---- checks -------------------------------------------------------------------------------------


def check_classes(listing: Listing) -> None:
    """Raises UserError for fewer than two classes, an empty one, and names that look alike."""
    folder, classes = printable(listing.folder), listing.classes
    if len(classes) < 2:
        only = f"one class folder only, {printable(next(iter(classes)))}" if classes else "none"
        raise UserError(f"two classes or more are needed, and {folder} has {only}. {EXPECTED}")
    alike = {}
    for name in classes:
        other = alike.setdefault(folded(name), name)
        if other != name:
            raise UserError(
                f"the class folders {shown(other)} and {shown(name)} in {folder} differ only in "
                f"{difference(other, name)}: rename one, or put all images into one of them"
            )
    for name, files in classes.items():
        if not files:
            others = [file for file in listing.others if file.split(os.sep)[0] == name]
            found = f", only {preview_names(others)}" if others else ""
            raise UserError(
                f"class folder {printable(listing.folder / name)} holds no images{found}. "
                f"Put images into it, or move it away"
            )


def check_same_classes(train: Listing, test: Listing | None = None) -> None:
    """Raises UserError where two splits have other classes."""
    if test is None or train.classes.keys() == test.classes.keys():
        return
    only_train = [name for name in train.classes if name not in test.classes]
    only_test = [name for name in test.classes if name not in train.classes]
    of_train = {folded(name): name for name in only_train}
    for name in only_test:
        if folded(name) in of_train:
            other = of_train[folded(name)]
            raise UserError(
                f"the class folders {shown(other)} in {printable(train.folder)} and {shown(name)} "
                f"in {printable(test.folder)} differ only in {difference(other, name)}: "
                f"give them the same name"
            )
    raise UserError(
        f"the classes of {printable(train.folder)} and {printable(test.folder)} differ: only in "
        f"{train.folder.name} {preview_names(only_train) or 'none'}, only in {test.folder.name} "
        f"{preview_names(only_test) or 'none'}. Give both the same class folders"
    )


def folded(name: str) -> str:
    """A name without case and in one Unicode form, as some file systems compare names."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def difference(first: str, second: str) -> str:
    """In what two names differ that look alike."""
    same_case = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)
    return "their Unicode form" if same_case else "case"


def shown(name: str) -> str:
    """A name with everything beyond ASCII escaped where its Unicode form is not the usual one."""
    usual = unicodedata.normalize("NFC", name) == name
    return printable(name) if usual else name.encode("unicode_escape").decode()


# ---- what is in it ------------------------------------------------------------------------------


class Found:
    """The images of all class folders: those of one split after those of the other."""

    def __init__(
        self, names: tuple[str, ...], labels: np.ndarray, files: list[str], pictures: Pictures
    ):
        self.names, self.labels, self.files, self.pictures = names, labels, files, pictures
        self.usable = np.ones(len(files), bool)
        self.usable[list(pictures.unreadable)] = False
        rows = self.usable.nonzero()[0]
        self.groups = np.arange(len(files))  # the first near-duplicate of each
        if len(rows):
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

    def check(self, root: Path, in_train: np.ndarray) -> None:
        """Raises UserError where a class has no training image left, or the test set no image."""
        counts = np.bincount(self.labels[self.usable & in_train], minlength=len(self.names))
        if not counts.all():
            name = self.names[int(counts.argmin())]
            raise UserError(
                f"class {printable(name)} in {printable(root)} has no training image: add some, or "
                f"move the class away"
            )
        if not (self.usable & ~in_train).any():
            raise UserError(
                f"{printable(root)} leaves no image for the test set: each class has one image, or "
                f"near-duplicates only"
            )

    def image_set(self, side: np.ndarray, root: Path, content: int) -> ImageSet:
        """The usable images of one side, (N,) bool."""
        rows = torch.from_numpy((self.usable & side).nonzero()[0])
        return ImageSet(
            self.pictures.images,
            torch.from_numpy(self.labels)[rows],
            self.names,
            f"class folders in {root}",
            rows=rows,
            files=tuple(self.files[row] for row in rows.tolist()),
            content=content,
        )

    def content(self, root: Path) -> int:
        """A checksum of the usable files' names and lengths: not of their pixels, which another
        version of a decoder rounds otherwise."""
        checksum = 0
        for row in self.usable.nonzero()[0].tolist():
            length = os.stat(os.path.join(root, self.files[row])).st_size
            line = f"{self.files[row]}\0{length}\n"
            checksum = zlib.crc32(line.encode(errors="surrogateescape"), checksum)
        return checksum

    def describe(
        self,
        root: Path,
        layout: Layout,
        listings: Sequence[Listing],
        in_train: np.ndarray,
        split: tuple[float, int],
    ) -> list[str]:
        """What was found, in lines."""
        counts = np.bincount(self.labels[self.usable], minlength=len(self.names))
        sizes = self.pictures.sizes.numpy()[self.usable]
        lines = [
            f"{printable(root)}: {self.usable.sum():,} images in {len(self.names):,} classes, "
            f"{span(counts)} per class; {extent(sizes)}"
        ]
        train, test = (int((self.usable & side).sum()) for side in (in_train, ~in_train))
        if layout.test:
            lines.append(
                f"  {train:,} for training in {layout.train.name}, {test:,} for the test in "
                f"{layout.test.name}{self.shared(in_train)}"
            )
        else:
            lines.append(
                f"  split: {train:,} for training, {test:,} for the test (test_share "
                f"{split[0]:g}, split_seed {split[1]}; --set changes them){self.kept_together()}"
            )
        if layout.unused:
            lines.append(
                f"  not used: {printable(layout.unused)} (--val-fraction holds out training images)"
            )
        few = [
            f"{name} ({count})"
            for name, count in zip(self.names, counts, strict=True)
            if count < FEW
        ]
        if few:
            lines.append(f"  classes with fewer than {FEW} images: {preview_names(few)}")
        untested = set(range(len(self.names))) - set(self.labels[self.usable & ~in_train].tolist())
        if untested:
            names = [self.names[label] for label in sorted(untested)]
            lines.append(f"  classes without a test image: {preview_names(names)}")
        lines += self.of_two_classes() + left_out(listings)
        for reason in list(self.pictures.unreadable.values())[:MAX_NAMED]:
            lines.append(f"  skipped: {reason.removesuffix(REMEDY)}")
        more = len(self.pictures.unreadable) - MAX_NAMED
        return lines + ([f"  and {more:,} more that cannot be read"] if more > 0 else [])

    def shared(self, in_train: np.ndarray) -> str:
        """How many test images are near-duplicates of training images, with examples."""
        first = {}
        for row in (self.usable & in_train).nonzero()[0].tolist():
            first.setdefault(int(self.groups[row]), row)
        pairs = [
            f"{self.files[row]} = {self.files[first[int(self.groups[row])]]}"
            for row in (self.usable & ~in_train).nonzero()[0].tolist()
            if int(self.groups[row]) in first
        ]
        if not pairs:
            return ""
        return (
            f"\n  {len(pairs):,} test images are near-duplicates of training images, so the "
            f"accuracy will be too high: {preview_names(pairs)}"
        )

    def kept_together(self) -> str:
        """How many near-duplicates there are."""
        sizes = Counter(self.groups[self.usable].tolist())
        count = sum(size for size in sizes.values() if size > 1)
        return f"; {count:,} near-duplicates are kept on one side" if count else ""

    def of_two_classes(self) -> list[str]:
        """A line where near-duplicates have different classes."""
        pairs = [
            f"{self.files[row]} = {self.files[self.groups[row]]}"
            for row in self.usable.nonzero()[0].tolist()
            if self.labels[row] != self.labels[self.groups[row]]
        ]
        if not pairs:
            return []
        return [f"  near-duplicates of different classes ({len(pairs):,}): {preview_names(pairs)}"]


MAX_NAMED = 20  # unreadable files that are listed


def drawn(seed: int, file: str) -> bytes:
    """Random bytes for a file, the same everywhere."""
    name = f"{seed}/{file}".encode(errors="surrogateescape")
    return hashlib.blake2b(name, digest_size=8).digest()


def span(values: Iterable[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def extent(sizes: np.ndarray) -> str:
    """The sizes (N, 2) of pictures, in words."""
    if not len(sizes):
        return "none can be read"
    pixels = sizes.prod(1, dtype=np.int64)
    ends = [f"{w:,}x{h:,}" for w, h in (sizes[pixels.argmin()], sizes[pixels.argmax()])]
    return f"{' to '.join(dict.fromkeys(ends))} pixels"


def left_out(listings: Sequence[Listing]) -> list[str]:
    """Lines on the files that are no images of a class."""
    lines = []
    for listing in listings:
        images = sum(map(len, listing.classes.values()))
        if listing.others:
            total = images + len(listing.others)
            lines.append(f"  {passed_over(listing.folder, listing.others, total)}")
        if listing.loose:
            count = f"{len(listing.loose):,} image{'s' * (len(listing.loose) != 1)}"
            lines.append(
                f"  {printable(listing.folder)}: passed over {count} in no class folder: "
                f"{preview_names(listing.loose)}"
            )
    return lines
