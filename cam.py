"""See where a network looks, as pictures and in numbers: the attention maps of this project's
networks, class activation maps and Grad-CAM of these and of torchvision's.

    python cam.py --checkpoint runs/cifar100/RUN/last.pt photo.jpg folder/
    python cam.py --checkpoint runs/cifar100/RUN/last.pt --dataset cifar100 --index 0-15
    python cam.py --checkpoint runs/cub/RUN/last.pt --dataset cub --measure
    python cam.py --arch resnet50 --weights DEFAULT --top-k 3 photo.jpg
    python cam.py --help

In your own code, on any thread:

    from cam import load_network
    network = load_network("runs/cifar100/RUN/last.pt")   # or arch="resnet50", weights="DEFAULT"
    network.predict("photo.jpg")                          # [("dog", 0.93), ...]

Its methods are documented in explain/networks.py: predict, attention, cam, preprocess. For any
module that gives logits, explain/maps.py has attention_maps(model, images),
class_activation_map(model, images, targets) and grad_cam(model, images, targets, layer=None).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

import numpy as np
import torch
from torch import Tensor

from common.arguments import (
    MAX_WORKERS,
    ArgumentParser,
    expanded_path,
    int_at_least,
    one_of,
    parse,
)
from common.errors import UserError, exit_status, print_error, printable
from common.files import make_folders
from common.process import open_standard_streams, unbreakable_pipes
from data import SOURCES, ImageSet, open_rgb
from explain.images import cut
from explain.maps import attention_maps, class_activation_map, grad_cam
from explain.methods import METHODS, Methods, applicable, list_layers, maps_of
from explain.metrics import Measures, part_lines, table_lines
from explain.networks import TrainedNetwork, class_index, load_network
from explain.output import (
    MAX_SIDE,
    Overview,
    Picture,
    Writer,
    list_files,
    parse_index,
    write_csv,
)
from explain.pictures import COLOR_MAPS, shown, title_of

__all__ = ["attention_maps", "class_activation_map", "grad_cam", "load_network", "main"]

FIRST_IMAGES = 16  # images of a data set that get pictures without --index
OVERVIEW = 64  # images on the sheet of a whole selection, at most
PHOTOS_AT_ONCE = 16  # files per batch: each is in memory at the size of its picture
PREDICTIONS = 3  # classes printed per image, at least

EXAMPLES = """examples (RUN: the folder of a run):
  python %(prog)s --checkpoint RUN/last.pt photo.jpg folder/
      photos of yours: a picture per map, and a sheet per photo
  python %(prog)s --checkpoint RUN/last.pt --dataset cifar100 --index 0-15
      the first 16 test images of a data set
  python %(prog)s --checkpoint RUN/last.pt --dataset cub --measure
      how well the maps find the birds, in numbers
  python %(prog)s --arch resnet50 --weights DEFAULT --top-k 3 photo.jpg
      a network of torchvision, with its weights: the three best classes
"""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Where a network looks, as pictures and as localisation measures.",
        epilog=EXAMPLES,
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="a last.pt of a training script",
    )
    network.add_argument(
        "--arch",
        metavar="NAME",
        help="a torchvision classifier (resnet50, ...), for cam and gradcam",
    )
    network.add_argument(
        "--weights",
        type=expanded_path,
        metavar="{DEFAULT,NAME,FILE}",
        help="of --arch: torchvision's by name (downloaded), or a state dict of yours",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "images", nargs="*", type=expanded_path, metavar="IMAGE", help="files, and folders of files"
    )
    images.add_argument(
        "--dataset",
        **one_of((*SOURCES, "sample")),
        help="instead: images of a data set, or the sample",
    )
    images.add_argument(
        "--split",
        **one_of(("test", "train")),
        default="test",
        help="which images of the data set",
    )
    images.add_argument(
        "--index",
        metavar="LIST",
        help=f"which of them, as 3,7,9-12 (default: the first {FIRST_IMAGES}; for --measure all)",
    )
    images.add_argument(
        "--crop",
        **one_of(("box", "whole")),
        help="of birds: the box or the whole picture (default: as trained; whole for --measure)",
    )
    images.add_argument(
        "--data-dir",
        type=expanded_path,
        help="folder that holds the data set (default: the checkpoint's, else data)",
    )
    images.add_argument(
        "--num-workers",
        type=int_at_least(0, MAX_WORKERS),
        default=2,
        help="processes that decode a data set's images into the cache",
    )
    maps = parser.add_argument_group("maps")
    maps.add_argument(
        "--method",
        **one_of((*METHODS, "all")),
        default="all",
        help="which maps; all: those that the network has",
    )
    maps.add_argument(
        "--layer", metavar="NAME", help="of gradcam (default: the last with an extent)"
    )
    maps.add_argument(
        "--list-layers", action="store_true", help="print the layers that gradcam can be made at"
    )
    target = maps.add_mutually_exclusive_group()
    target.add_argument(
        "--target", metavar="CLASS", help="name or number (default: the one that the network sees)"
    )
    target.add_argument(
        "--top-k", type=int_at_least(1), default=1, metavar="K", help="the K best, side by side"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=expanded_path,
        default="runs/cam",
        metavar="FOLDER",
        help="folder for the pictures and tables",
    )
    output.add_argument("--raw", action="store_true", help="also the maps as .npy")
    output.add_argument(
        "--measure",
        action="store_true",
        help="no pictures but how well the maps find the object, as a table and CSV: "
        "for birds and the sample",
    )
    output.add_argument(
        "--colours",
        dest="colors",
        **one_of(COLOR_MAPS),
        default="inferno",
        help="colors of the map",
    )
    output.add_argument(
        "--opacity",
        type=opacity,
        default=0.5,
        help="of the map over the image, 0 to 1",
    )
    output.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    return parser


def opacity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 a failure or an image that could not be read, 2 bad use, 130
    stopped by Ctrl-C."""
    open_standard_streams()
    with unbreakable_pipes():
        try:
            args = parse(make_parser(), sys.argv[1:] if argv is None else argv)
        except SystemExit as stop:  # argparse has printed the help (0) or an error (2)
            return stop.code
        with exit_status("Stopped. The files written so far are complete.") as status:
            status.code = dispatch(args)
        return status.code


def dispatch(args: argparse.Namespace) -> int:
    message = misuse(args)
    if message:
        raise UserError(message, 2)
    network = load_network(
        args.checkpoint, arch=args.arch, weights=args.weights, device=args.device
    )
    print(network.description)
    if args.list_layers:
        return list_layers(network)
    methods = applicable(network, args.method, args.layer)
    if args.measure:
        return measure(args, network, methods)
    return make_pictures(args, network, methods)


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with the options that argparse accepts one by one; None if nothing is."""
    if bool(args.checkpoint) == bool(args.arch):
        return "name one network: --checkpoint FILE, or --arch NAME with --weights"
    if args.weights and not args.arch:
        return "--weights goes with --arch; a checkpoint has its own"
    if args.arch and not args.weights:
        return (
            f"--arch {args.arch} needs weights: --weights DEFAULT for torchvision's, "
            "or a FILE of yours"
        )
    if args.layer and args.method not in ("gradcam", "all"):
        return f"--layer is for gradcam, not for --method {args.method}"
    if args.list_layers:
        return None
    if Path(args.out).exists() and not Path(args.out).is_dir():
        return f"--out {args.out} is a file, not a folder"
    if args.images and args.dataset:
        return "name images (files or folders), or a --dataset, not both"
    if not args.images and not args.dataset:
        return "name images (files or folders), or a --dataset"
    if args.measure and not args.dataset:
        return (
            "--measure needs --dataset cub or --dataset sample, "
            "where the position of the object is known"
        )
    if args.measure and args.dataset in SOURCES and not SOURCES[args.dataset].has_boxes:
        return (
            f"--measure needs boxes or marks, and {args.dataset} has none: "
            "--dataset cub or --dataset sample"
        )
    if args.crop and args.dataset in SOURCES and not SOURCES[args.dataset].has_boxes:
        return f"--crop is for birds (--dataset cub), not for {args.dataset}"
    if args.measure and (args.target or args.top_k > 1):
        return "--measure takes the true class: leave --target and --top-k out"
    if args.dataset is None and (args.index or args.crop):
        return "--index and --crop are for a --dataset"
    return None


# ---- images -------------------------------------------------------------------------------------


def batches_of_files(
    network: TrainedNetwork, paths: list[Path], unusable: list[Path]
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Pictures, cut to the part that the network sees, and the batch of them for the network.
    Unreadable files are reported, appended to ``unusable`` and left out."""
    at_once = min(network.batch_size, PHOTOS_AT_ONCE)
    for first in range(0, len(paths), at_once):
        pictures, views = [], []
        for path in paths[first : first + at_once]:
            try:
                pixels = np.asarray(open_rgb(path))
            except UserError as error:
                print_error(str(error))
                unusable.append(path)
                continue
            views.append(network.view(pixels))
            seen = cut(pixels, views[-1].box)
            pictures.append(Picture(printable(path), path.stem, shown(seen, 1, MAX_SIDE)))
        if pictures:
            yield pictures, network.batch([view.pixels for view in views])


def batches_of_set(
    network: TrainedNetwork, images: ImageSet, indices: list[int], set_name: str
) -> Iterator[tuple[list[Picture], Tensor]]:
    """The same of a data set's images."""
    for first in range(0, len(indices), network.batch_size):
        chosen = indices[first : first + network.batch_size]
        subset = images.subset(chosen)
        labels = subset.labels.tolist()
        pictures = [
            Picture(f"{set_name} {i}", f"{set_name}-{i:05d}", pixels, images.class_names[label])
            for i, pixels, label in zip(chosen, subset.images.numpy(), labels, strict=True)
        ]
        yield pictures, network.batch(subset.images)


def load_set(args: argparse.Namespace, network: TrainedNetwork) -> ImageSet:
    """The split of --dataset, loaded and cropped as for the network's training (whole pictures for
    --measure)."""
    own = network.config.get("dataset")
    name = args.dataset
    if name == "sample":
        name = own if own in SOURCES else "cifar100"
    source, config = SOURCES[name], set_defaults(name, network)
    if own == name:
        config |= network.config
    data_dir = args.data_dir or config.get("data_dir") or source.default_dir
    if data_dir is None and args.dataset == name:
        raise UserError(f"--dataset {name} needs --data-dir, the folder of the class folders", 2)
    config |= {
        "data_dir": data_dir,
        "num_workers": args.num_workers,
        "sample": args.dataset == "sample",
    }
    if source.has_boxes:
        config["crop"] = args.crop or ("whole" if args.measure else config["crop"])
    train, test = source.sets(config, download=own != name)
    return {"train": train, "test": test}[args.split]


def set_defaults(name: str, network: TrainedNetwork) -> dict:
    """How a data set is read for a network that was not trained on it: whole birds, and the
    centered squares of class folders, for the network's size; CIFAR's images at their own."""
    return {
        "crop": "center" if name == "folder" else "whole",
        "margin": 0.1,
        "zoom": 0.5,
        "image_size": None if name in ("cifar10", "cifar100") else max(network.size),
        "test_share": 0.2,
        "split_seed": 0,
        "near_duplicates": True,
        "skip_unreadable": False,
    }


# ---- pictures -----------------------------------------------------------------------------------


def make_pictures(args: argparse.Namespace, network: TrainedNetwork, methods: Methods) -> int:
    """Write an overlay per map and a sheet per image, and for a data set one sheet of all images.
    Returns the exit status."""
    target = asked_target(args.target, network)
    paths, unusable = list_files(args.images)
    set_name = f"{args.dataset}-{args.split}"
    if args.dataset:
        batches = selected_batches(args, network, set_name)
    else:
        batches = batches_of_files(network, paths, unusable)
    writer = Writer(Path(args.out), paths, raw=args.raw, opacity=args.opacity, colors=args.colors)
    overview, done = Overview(), 0
    for pictures, batch in batches:
        for result in explain_batch(network, methods, pictures, batch, target, args.top_k):
            picture = result.picture
            stem = writer.write_image(picture, result.maps, result.headings, result.title)
            renamed = "" if stem == picture.stem else f"   (written as {printable(stem)})"
            print(f"{picture.name}: {result.predictions}{renamed}", flush=True)
            if args.dataset and done < OVERVIEW:
                overview.add(picture, result.first_maps, result.title)
            done += 1
    if len(overview.pixels) > 1:
        writer.write_overview(set_name, overview)
    print(f"{done} image{'s' * (done != 1)} done, {writer.written} files in {printable(args.out)}")
    if unusable:
        print_error(f"{len(unusable)} of the inputs could not be used: see above")
    return 1 if unusable else 0


def asked_target(text: str | None, network: TrainedNetwork) -> int | None:
    """--target as a class index. Raises UserError."""
    try:
        return None if text is None else class_index(text, network.class_names)
    except ValueError as error:
        raise UserError(f"--{error}", 2) from None


def selected_batches(
    args: argparse.Namespace, network: TrainedNetwork, set_name: str
) -> Iterator[tuple[list[Picture], Tensor]]:
    """The images of --dataset that --index selects, by default the first ones, in batches."""
    images = load_set(args, network)
    indices = list(range(min(FIRST_IMAGES, len(images))))
    if args.index:
        indices = parse_index(args.index, len(images))
    print(f"{len(indices)} of {len(images):,} {args.split} images ({images.source})")
    return batches_of_set(network, images, indices, set_name)


class Explained(NamedTuple):
    """An image with its maps (H, W) by name, and the texts that go with them."""

    picture: Picture
    maps: dict[str, np.ndarray]
    first_maps: dict[str, np.ndarray]  # without those of the second class of --top-k and on
    headings: dict[str, str]  # by name of the map
    title: str
    predictions: str


def explain_batch(
    network: TrainedNetwork,
    methods: Methods,
    pictures: list[Picture],
    batch: Tensor,
    target: int | None,
    top_k: int,
) -> Iterator[Explained]:
    """The maps of each image of a batch (N, 3, H, W), of the class ``target``, or of the ``top_k``
    most probable ones."""
    probabilities = network.probabilities(batch)
    classes = probabilities.topk(min(top_k, probabilities.shape[1])).indices
    if target is not None:
        classes = torch.full((len(pictures), 1), target)
    maps = maps_of(network, methods, batch, classes)
    for i, picture in enumerate(pictures):
        probability, predicted = probabilities[i].max(0)
        headings = {}
        for name, (_, rank) in maps.items():
            target_class = None if rank is None else int(classes[i, rank])
            headings[name] = heading(network, name, probabilities[i], target_class)
        yield Explained(
            picture,
            maps={name: values[i] for name, (values, _) in maps.items()},
            first_maps={name: values[i] for name, (values, rank) in maps.items() if not rank},
            headings=headings,
            title=title_of(
                picture.truth or Path(picture.name).name,
                network.class_names[predicted],
                float(probability),
            ),
            predictions=predictions(network, probabilities[i], classes[i]),
        )


def predictions(network: TrainedNetwork, probabilities: Tensor, classes: Tensor) -> str:
    """The best classes with their probabilities, and those that were asked for."""
    count = min(max(PREDICTIONS, len(classes)), len(probabilities))
    best = probabilities.topk(count).indices.tolist()
    asked = [c for c in classes.tolist() if c not in best]
    return ", ".join(
        f"{network.class_names[c]} {100 * probabilities[c]:.1f} %" for c in best + asked
    )


def heading(network: TrainedNetwork, name: str, probabilities: Tensor, target: int | None) -> str:
    """The heading of a map: level, or method and class. The probability comes first, as long names
    are cut off."""
    if target is None:
        return name
    method = name.split("-")[0]
    return f"{method}\n{100 * probabilities[target]:.0f} % {network.class_names[target]}"


# ---- measures -----------------------------------------------------------------------------------


def measure(args: argparse.Namespace, network: TrainedNetwork, methods: Methods) -> int:
    """Print how well the maps find the object, and write it to measures.csv (and parts.csv) in
    --out. Returns the exit status."""
    images = load_set(args, network)
    if images.boxes is None:
        raise UserError(f"--measure needs boxes or marks, and {images.source} has none", 2)
    chosen = images.subset(parse_index(args.index, len(images))) if args.index else images
    same_classes = chosen.class_names == network.class_names
    measures = measure_set(network, methods, chosen, same_classes)
    target = "the true class"
    if not same_classes:
        target = "the predicted class, as the network has other classes"
    print(f"{len(chosen):,} {args.split} images ({chosen.source}); cam and gradcam of {target}")
    out = Path(args.out)
    make_folders(out)
    rows, part_rows = measures.table(), measures.part_table(chosen.part_names)
    print("\n" + "\n".join(table_lines(rows)))
    written = [write_csv(out / "measures.csv", rows)]
    if part_rows:
        print("\n" + "\n".join(part_lines(part_rows, chosen.part_names)))
        written.append(write_csv(out / "parts.csv", part_rows))
    print(f"\nWritten to {' and '.join(map(printable, written))}")
    return 0


def measure_set(
    network: TrainedNetwork, methods: Methods, images: ImageSet, same_classes: bool
) -> Measures:
    """The measures of a set with boxes. cam and gradcam are of the true class if the network has
    the ``same_classes`` as the set, else of the predicted one."""
    # from pixels of the stored images to pixels of the network's input: x, y
    sides = zip(network.size, images.image_size, strict=True)
    scale = torch.tensor([side / stored for side, stored in sides]).flip(0)
    measures = Measures()
    for first in range(0, len(images), network.batch_size):
        part = images.subset(range(first, min(first + network.batch_size, len(images))))
        batch = network.batch(part.images)
        targets = part.labels if same_classes else network.probabilities(batch).argmax(1)
        maps = maps_of(network, methods, batch, targets[:, None])
        object_parts = None
        if part.parts is not None:
            xy, visible = part.parts[..., :2] * scale, part.parts[..., 2:]
            object_parts = torch.cat([xy, visible], -1).numpy()
        boxes = (part.boxes * scale.repeat(2)).numpy()
        measures.add({name: values for name, (values, _) in maps.items()}, boxes, object_parts)
    return measures


if __name__ == "__main__":
    sys.exit(main())
