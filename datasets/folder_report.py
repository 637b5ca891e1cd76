"""What was found in class folders, in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.errors import printable
from datasets.folder_layout import Layout, Listing
from datasets.image_files import REMEDY, passed_over, preview_names

if TYPE_CHECKING:
    from datasets.folder import Found

FEW = 5  # images: classes with fewer are named
LARGE_GROUP = 0.1  # of all images: near-duplicates that are suspiciously many
MAX_NAMED = 20  # unreadable files that are listed


def lines_on(
    found: Found,
    data_dir: str | os.PathLike,
    layout: Layout,
    listings: Sequence[Listing],
    split: tuple[float, int] | None,
) -> list[str]:
    """The lines that are printed. ``split``: share and seed of the split, None where there was
    none to make."""
    counts = np.bincount(found.labels[found.usable], minlength=len(found.names))
    sides = (found.in_train, ~found.in_train)
    train, test = (int((found.usable & side).sum()) for side in sides)
    lines = [
        f"{printable(data_dir)}: {found.usable.sum():,} images in {len(found.names):,} classes "
        f"({preview_names(list(found.names))}), {span(counts)} per class; "
        f"{extent(found.pictures.sizes.numpy()[found.usable])}"
    ]
    if split is None:
        lines.append(
            f"  {train:,} for training in {layout.train.name}, {test:,} for the test in "
            f"{layout.test.name}"
        )
        lines += on_both_sides(found)
    else:
        lines.append(
            f"  split: {train:,} for training, {test:,} for the test (test_share {split[0]:g}, "
            f"split_seed {split[1]}; --set changes them)"
        )
        lines += kept_together(found)
    if layout.unused:
        lines.append(f"  not used: {preview_names([folder.name for folder in layout.unused])}")
    few = [f"{n} ({count})" for n, count in zip(found.names, counts, strict=True) if count < FEW]
    if few:
        lines.append(f"  classes with fewer than {FEW} images: {preview_names(few)}")
    tested = set(found.labels[found.usable & ~found.in_train].tolist())
    untested = [name for label, name in enumerate(found.names) if label not in tested]
    if untested:
        lines.append(f"  classes without a test image: {preview_names(untested)}")
    return lines + of_two_classes(found) + left_out(listings) + skipped(found)


# ---- near-duplicates ----------------------------------------------------------------------------


def on_both_sides(found: Found) -> list[str]:
    """A line on test images that are near-duplicates of training images."""
    first = {}
    for row in (found.usable & found.in_train).nonzero()[0].tolist():
        first.setdefault(int(found.groups[row]), row)
    pairs = [
        f"{found.files[row]} = {found.files[first[int(found.groups[row])]]}"
        for row in (found.usable & ~found.in_train).nonzero()[0].tolist()
        if int(found.groups[row]) in first
    ]
    if not pairs:
        return []
    return [
        f"  near-duplicates of training images in the test set ({len(pairs):,}), which inflate "
        f"the accuracy: {preview_names(pairs)}"
    ]


def kept_together(found: Found) -> list[str]:
    """A line on near-duplicates, and one where they are so many that they may be none."""
    sizes = Counter(found.groups[found.usable].tolist())
    count = sum(size for size in sizes.values() if size > 1)
    largest = max(sizes.values(), default=0)
    lines = [f"  near-duplicates, each kept on one side: {count:,}"] if count else []
    if count and largest > max(FEW, LARGE_GROUP * found.usable.sum()):
        lines.append(
            f"  {largest:,} of them are one group. If they only share a background, "
            f"--set near_duplicates=false splits them like all others"
        )
    return lines


def of_two_classes(found: Found) -> list[str]:
    """A line on near-duplicates of different classes."""
    differ = found.usable & (found.labels != found.labels[found.groups])
    pairs = [
        f"{found.files[row]} = {found.files[found.groups[row]]}"
        for row in differ.nonzero()[0].tolist()
    ]
    if not pairs:
        return []
    return [f"  near-duplicates of different classes ({len(pairs):,}): {preview_names(pairs)}"]


# ---- what is not used ---------------------------------------------------------------------------


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


def skipped(found: Found) -> list[str]:
    """Lines on the images that cannot be read."""
    reasons = [reason.removesuffix(REMEDY) for reason in found.pictures.unreadable.values()]
    lines = [f"  skipped: {reason}" for reason in reasons[:MAX_NAMED]]
    more = len(reasons) - MAX_NAMED
    return lines + ([f"  and {more:,} more that cannot be read"] if more > 0 else [])


# ---- numbers ------------------------------------------------------------------------------------


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
