"""cam.py --measure: how much a network's answer depends on what its maps mark, and, where the
place of the object is known, how well they find it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, print_error, printable
from common.files import free_path, make_folders, replace_file
from data import ImageSet
from explain.faithfulness import SCORES, Faithfulness
from explain.faithfulness import table_lines as faithfulness_lines
from explain.faithfulness_picture import curves_picture
from explain.inputs import batches_of_files, load_set
from explain.methods import Methods, maps_of
from explain.metrics import Measures, part_lines, table_lines
from explain.networks import TrainedNetwork
from explain.output import list_files, parse_index, write_csv
from explain.pictures import is_own_picture, png_bytes

MEASURED = 1000  # images of a set whose pixels are deleted and inserted, without --index


def measure(args: argparse.Namespace, network: TrainedNetwork, methods: Methods) -> int:
    """Print both tables, and write them into --out. Returns the exit status."""
    out, status = Path(args.out), 0
    if args.dataset:
        images = load_set(args, network)
        chosen = parse_index(args.index, len(images)) if args.index else range(len(images))
        make_folders(out)
        if images.boxes is not None:
            localize(args, network, methods, images.subset(chosen), out)
            print()
        if not args.index and len(images) > MEASURED:
            chosen = np.linspace(0, len(images) - 1, MEASURED).round().astype(int).tolist()
        subset = images.subset(chosen)
        title = f"{len(subset):,} of {len(images):,} {args.split} images ({images.source})"
        pairs, count = batches_in_order(network, subset), len(subset)
    else:
        paths, unusable = list_files(args.images)
        make_folders(out)
        pairs = batches_of_files(network, paths, unusable)
        title, count = "your images", len(paths)
    delete_and_insert(network, methods, (batch for _, batch in pairs), title, count, out)
    if not args.dataset and unusable:
        print_error(f"{len(unusable)} of the inputs could not be used: see above")
        status = 1
    return status


def batches_in_order(
    network: TrainedNetwork, images: ImageSet
) -> Iterator[tuple[ImageSet, Tensor]]:
    """A set in parts, and each as a batch (N, 3, H, W) of the network's size."""
    for first in range(0, len(images), network.batch_size):
        part = images.subset(range(first, min(first + network.batch_size, len(images))))
        yield part, network.batch(part.images)


# ---- deletion and insertion ---------------------------------------------------------------------


def delete_and_insert(
    network: TrainedNetwork,
    methods: Methods,
    batches: Iterator[Tensor],
    title: str,
    count: int,
    out: Path,
) -> None:
    """Print what deletion and insertion give for every map, and write faithfulness.csv, curves.csv
    and curves.png. ``count``: of the images, for the progress bar."""
    found = Faithfulness()
    print(f"Deletion and insertion: {title}")
    with tqdm(total=count, unit=" images", leave=False, disable=None) as bar:
        for batch in batches:
            classes = network.probabilities(batch).argmax(1, keepdim=True)
            maps = maps_of(network, methods, batch, classes)
            found.add(network, batch, {name: each.values for name, each in maps.items()})
            bar.update(len(batch))
    rows = found.table()
    if not rows:
        raise UserError("there is no image to measure")
    if not all(math.isfinite(row[score]) for row in rows for score in SCORES):
        raise UserError("the network gives no finite probabilities: its weights are not usable")
    print("\n" + "\n".join(faithfulness_lines(rows, attention="attention" in methods.names)))
    written = [write_csv(out / "faithfulness.csv", rows)]
    written.append(write_csv(out / "curves.csv", found.curve_rows()))
    picture = free_path(out / "curves.png", is_own_picture)
    content = png_bytes(curves_picture(found.curve_rows(), title))
    replace_file(picture, lambda file: file.write(content))
    print_written([*written, picture])


def print_written(paths: list[Path]) -> None:
    *first, last = map(printable, paths)
    print(f"\nWritten to {', '.join(first)}{' and ' * bool(first)}{last}")


# ---- the place of the object --------------------------------------------------------------------


def localize(
    args: argparse.Namespace,
    network: TrainedNetwork,
    methods: Methods,
    images: ImageSet,
    out: Path,
) -> None:
    """Print how well the maps find the object, and write measures.csv (and parts.csv)."""
    same_classes = images.class_names == network.class_names
    measures = measure_set(network, methods, images, same_classes)
    target = "the true class"
    if not same_classes:
        target = "the predicted class, as the network has other classes"
    of_class = [name for name in methods.names if name != "attention"]
    about = f"; {' and '.join(of_class)} of {target}" if of_class else ""
    print(f"{len(images):,} {args.split} images ({images.source}){about}")
    rows, part_rows = measures.table(), measures.part_table(images.part_names)
    print("\n" + "\n".join(table_lines(rows)))
    written = [write_csv(out / "measures.csv", rows)]
    if part_rows:
        print("\n" + "\n".join(part_lines(part_rows, images.part_names)))
        written.append(write_csv(out / "parts.csv", part_rows))
    print_written(written)


def measure_set(
    network: TrainedNetwork, methods: Methods, images: ImageSet, same_classes: bool
) -> Measures:
    """The measures of a set with boxes. The maps of a class are of the true one if the network has
    the ``same_classes`` as the set, else of the predicted one."""
    # from pixels of the stored images to pixels of the network's input: x, y
    sides = zip(network.size, images.image_size, strict=True)
    scale = torch.tensor([side / stored for side, stored in sides]).flip(0)
    measures = Measures()
    for part, batch in batches_in_order(network, images):
        targets = part.labels if same_classes else network.probabilities(batch).argmax(1)
        maps = maps_of(network, methods, batch, targets[:, None])
        object_parts = None
        if part.parts is not None:
            xy, visible = part.parts[..., :2] * scale, part.parts[..., 2:]
            object_parts = torch.cat([xy, visible], -1).numpy()
        boxes = (part.boxes * scale.repeat(2)).numpy()
        values = {name: each.values for name, each in maps.items()}
        measures.add(values, boxes, object_parts)
    return measures
