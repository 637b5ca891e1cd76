"""Where class folders are, which files are in them, and whether they can be a data set.

docs/data.md, "Your own images", has the layouts.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.errors import UserError, printable
from common.files import identity
from datasets.download import data_folder
from datasets.image_files import image_endings, preview_names, shows_progress

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there
NO_CLASSES = {"__MACOSX"}  # which an archive made on a Mac adds
EXPECTED = (
    "Class folders are expected: FOLDER/<class>/*, or FOLDER/train/<class>/* and "
    "FOLDER/test/<class>/*"
)


class Layout(NamedTuple):
    """Where the classes are: in ``train`` and ``test``, or in ``train`` alone, which is split."""

    train: Path
    test: Path | None
    unused: list[Path]  # folders beside them


class Listing(NamedTuple):
    """The image files of some class folders."""

    folder: Path
    classes: dict[str, list[str]]  # class name -> its files below ``folder``, both sorted
    others: list[str]  # files that are no images
    loose: list[str]  # images in no class folder


# ---- where it is --------------------------------------------------------------------------------


def folder_present(data_dir: str | os.PathLike | None) -> bool:
    """Whether there may be class folders. Cheap: looks at a few names only. Raises UserError for a
    ~ in ``data_dir`` without a home folder."""
    return data_dir is not None and bool(folders_in(data_folder(data_dir)))


def find_layout(root: Path) -> Layout:
    """The folders of classes in ``root``, or in its only folder. Raises UserError where it holds no
    folder at all, and where it may be meant in two ways."""
    if not root.is_dir():
        state = "a file, not a folder" if root.exists() else "missing"
        raise UserError(f"--data-dir {printable(root)} is {state}. {EXPECTED}")
    folders = folders_in(root)
    if not folders:
        raise UserError(f"--data-dir {printable(root)} holds no folders. {EXPECTED}")
    by_name = {folder.name.casefold(): folder for folder in folders if holds_classes(folder)}
    tests = [by_name[name] for name in TEST_NAMES if name in by_name]
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)
    others = [folder for folder in folders if folder not in (train, *tests)]
    if train and (tests or not others):
        return Layout(train, *(tests[:1] or [None]), [*tests[1:], *others])
    if train or tests:
        split = train or tests[0]
        beside = preview_names([folder.name for folder in others]) or "nothing"
        raise UserError(
            f"{printable(root)} holds {split.name}/ with folders in it, and beside it {beside}: "
            f"name the other set {'test or val' if train else 'train'}, or move {split.name}/ away"
        )
    if len(folders) == 1 and holds_classes(folders[0]):  # an archive's own folder
        return find_layout(folders[0])
    return Layout(root, None, [])


def holds_classes(folder: Path) -> bool:
    """Whether a folder holds folders, and no images itself."""
    with os.scandir(folder) as entries:
        has_images = any(is_image(entry.name) and entry.is_file() for entry in entries)
    return not has_images and bool(folders_in(folder))


def folders_in(folder: Path) -> list[Path]:
    """The folders that may be classes or hold them, sorted; empty where there is no such folder.
    Not those of runs, which may have begun in this one."""
    if not folder.is_dir():
        return []
    runs = identity("runs")
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.is_dir()
        and not entry.name.startswith(".")
        and entry.name not in NO_CLASSES
        and identity(entry.path) != runs
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
