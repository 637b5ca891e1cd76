"""See where a network looks, as pictures and in numbers: the attention maps of this project's
networks, class activation maps and the Grad-CAM family of these and of torchvision's.

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
class_activation_map(model, images, targets), grad_cam(model, images, targets, layer=None) and its
relatives, and gradient_maps for several of them in one pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
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
from common.device import DTYPES
from common.errors import UserError, exit_status, print_error, printable
from common.fonts import drawable_names
from common.process import open_standard_streams, unbreakable_pipes
from data import SOURCES
from explain.inputs import FIRST_IMAGES, batches_of_files, batches_of_set, load_set, selected
from explain.maps import (
    GRADIENT_METHODS,
    attention_maps,
    class_activation_map,
    grad_cam,
    grad_cam_plus_plus,
    gradient_maps,
    hires_cam,
    layer_cam,
)
from explain.measuring import MEASURED, measure
from explain.methods import METHODS, Methods, applicable, list_layers, maps_of
from explain.networks import TrainedNetwork, class_index, load_network
from explain.output import (
    MAX_SCALE,
    MAX_SIDE,
    PREDICTED,
    Overview,
    Picture,
    Prediction,
    Writer,
    list_files,
    peak_pixel,
    write_predictions,
)
from explain.pictures import BLENDS, COLOR_MAPS, FORMATS, title_of

__all__ = [
    "attention_maps",
    "class_activation_map",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_maps",
    "hires_cam",
    "layer_cam",
    "load_network",
    "main",
]

OVERVIEW = 64  # images on the sheet of a whole selection, at most
PREDICTIONS = 3  # classes printed per image, at least

EXAMPLES = """examples (RUN: the folder of a run):
  python %(prog)s --checkpoint RUN/last.pt photo.jpg folder/
      photos of yours: a picture per map, and a sheet per photo
  python %(prog)s --checkpoint RUN/last.pt --dataset cifar100 --index 0-15
      the first 16 test images of a data set
  python %(prog)s --checkpoint RUN/last.pt --dataset cub --measure
      do the maps find the birds, and does the answer need what they mark
  python %(prog)s --arch resnet50 --weights DEFAULT --top-k 3 photo.jpg
      a network of torchvision, with its weights: the three best classes
"""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Where a network looks, as pictures and in numbers.",
        epilog=EXAMPLES,
    )
    add_network_options(parser.add_argument_group("network"))
    add_image_options(parser.add_argument_group("images"))
    add_map_options(parser.add_argument_group("maps"))
    add_output_options(parser.add_argument_group("output"))
    return parser


def add_network_options(network: argparse._ArgumentGroup) -> None:
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
    network.add_argument(
        "--class-names",
        type=expanded_path,
        metavar="FILE",
        help="names of the classes, one per line or as JSON (default: the network's)",
    )


def add_image_options(images: argparse._ArgumentGroup) -> None:
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


def add_map_options(maps: argparse._ArgumentGroup) -> None:
    maps.add_argument(
        "--method",
        **one_of((*METHODS, "all")),
        action="append",
        help="which maps, several times for several "
        "(default: attention, cam and gradcam, those that the network has)",
    )
    maps.add_argument(
        "--layer",
        metavar="NAME",
        action="append",
        help="of the gradient methods, several times for several; "
        "blocks: the last of each block (default: the last with an extent)",
    )
    maps.add_argument(
        "--list-layers", action="store_true", help="print the layers that --layer can name"
    )
    maps.add_argument(
        "--smooth",
        action="store_true",
        help="the mean over flips and small shifts of the image: ten times the work",
    )
    maps.add_argument(
        "--query",
        type=expanded_path,
        metavar="IMAGE",
        help="attention to another image's global feature, beside the image's own (dp, gate)",
    )
    target = maps.add_mutually_exclusive_group()
    target.add_argument(
        "--target", metavar="CLASS", help="name or number (default: the one that the network sees)"
    )
    target.add_argument(
        "--top-k", type=int_at_least(1), default=1, metavar="K", help="the K best, side by side"
    )


def add_output_options(output: argparse._ArgumentGroup) -> None:
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
        help="no pictures but tables: how much the answer depends on what the maps mark, "
        "and for birds and the sample how well they find the object "
        f"(of at most {MEASURED:,} images without --index)",
    )
    output.add_argument(
        "--colors",
        "--colours",
        **one_of(COLOR_MAPS),
        default="inferno",
        help="colors of the map",
    )
    output.add_argument(
        "--blend",
        **one_of(BLENDS),
        default="even",
        help="map over photo: even, over a gray one; or as opaque as the map is high",
    )
    output.add_argument(
        "--opacity",
        type=opacity,
        default=0.5,
        help="of the map over the image, 0 to 1",
    )
    output.add_argument("--format", **one_of(FORMATS), default="png", help="of the pictures")
    output.add_argument(
        "--scale",
        type=int_at_least(1, MAX_SCALE),
        default=1,
        metavar="N",
        help="pictures and text N times as large, for print",
    )
    output.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    output.add_argument(
        "--precision",
        **one_of(("auto", *DTYPES)),
        default="fp32",
        help="of the forward pass: bf16 is faster where the device has it; auto: as in training",
    )


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
        args.checkpoint,
        arch=args.arch,
        weights=args.weights,
        class_names=args.class_names,
        device=args.device,
        precision=args.precision,
    )
    print(network.description)
    if args.list_layers:
        return list_layers(network)
    query = None if args.query is None else network.preprocess(args.query)
    methods = applicable(network, args.method or (), args.layer or (), args.smooth, query)
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
    if args.layer and args.method and not {*args.method} & {*GRADIENT_METHODS, "all"}:
        return f"--layer is for {', '.join(GRADIENT_METHODS)}, not for --method {args.method[0]}"
    if args.list_layers:
        return None
    if Path(args.out).exists() and not Path(args.out).is_dir():
        return f"--out {args.out} is a file, not a folder"
    if args.images and args.dataset:
        return "name images (files or folders), or a --dataset, not both"
    if not args.images and not args.dataset:
        return "name images (files or folders), or a --dataset"
    if args.crop and args.dataset in SOURCES and not SOURCES[args.dataset].has_boxes:
        return f"--crop is for birds (--dataset cub), not for {args.dataset}"
    if args.measure and (args.target or args.top_k > 1):
        return "--measure chooses the class: leave --target and --top-k out"
    if args.measure and args.class_names:
        return (
            "--measure compares the names of classes with the data set's: leave --class-names out"
        )
    if args.measure and args.query:
        return "--measure is of the image's own attention: leave --query out"
    if args.dataset is None and (args.index or args.crop):
        return "--index and --crop are for a --dataset"
    return None


# ---- pictures -----------------------------------------------------------------------------------


def make_pictures(args: argparse.Namespace, network: TrainedNetwork, methods: Methods) -> int:
    """Write an overlay per map and a sheet per image, for a data set one sheet of all images, and
    predictions.csv. Returns the exit status."""
    target = asked_target(args.target, network)
    paths, unusable = list_files(args.images)
    set_name = f"{args.dataset}-{args.split}"
    if args.dataset:
        images = load_set(args, network)
        indices = selected(args, images)
        print(f"{len(indices)} of {len(images):,} {args.split} images ({images.source})")
        batches = batches_of_set(network, images, indices, set_name)
        drawn = DrawnNames(network.class_names, images.class_names, "class")
    else:
        batches = batches_of_files(network, paths, unusable, MAX_SIDE * args.scale)
        drawn = DrawnNames(network.class_names, [path.name for path in paths], "image")
    for note in drawn.notes:
        print(f"note: {note}")
    writer = Writer(
        Path(args.out),
        paths,
        raw=args.raw,
        opacity=args.opacity,
        colors=args.colors,
        blend=args.blend,
        picture_format=args.format,
        scale=args.scale,
    )
    overview, seen = Overview(), []
    try:
        for pictures, batch in batches:
            for result in explain_batch(
                network, methods, pictures, batch, target, args.top_k, drawn
            ):
                picture = result.picture
                stem = writer.write_image(picture, result.maps, result.headings, result.title)
                renamed = "" if stem == picture.stem else f"   (written as {printable(stem)})"
                print(f"{picture.name}: {result.said()}{renamed}", flush=True)
                if args.dataset and len(seen) < OVERVIEW:
                    overview.add(picture, result.first_maps, result.title)
                    overview.headings = result.overview_headings
                seen.append(result.prediction())
    finally:  # what is done has its line, also after Ctrl-C
        if seen:
            write_predictions(Path(args.out) / "predictions.csv", seen)
    if len(overview.pixels) > 1:
        writer.write_overview(set_name, overview)
    count, files = len(seen), writer.written + bool(seen)
    print(f"{count} image{'s' * (count != 1)} done, {files} files in {printable(args.out)}")
    if unusable:
        print_error(f"{len(unusable)} of the inputs could not be used: see above")
    return 1 if unusable else 0


def asked_target(text: str | None, network: TrainedNetwork) -> int | None:
    """--target as a class index. Raises UserError."""
    try:
        return None if text is None else class_index(text, network.class_names)
    except ValueError as error:
        raise UserError(f"--{error}", 2) from None


class DrawnNames:
    """The names of the network's classes, and the titles of the images, as pictures show them;
    notes on letters that no font has."""

    def __init__(self, classes: Sequence[str], titles: Sequence[str], word: str):
        self.classes, note = drawable_names(classes)
        drawn, other = drawable_names(titles, word)
        self.titles = dict(zip(titles, drawn, strict=True))
        self.titles |= {printable(title): text for title, text in self.titles.items()}
        self.notes = list(dict.fromkeys(each for each in (note, other) if each))


class Explained(NamedTuple):
    """An image with its maps (H, W) by name, and what is said of it."""

    picture: Picture
    maps: dict[str, np.ndarray]
    first_maps: dict[str, np.ndarray]  # without those of the second class of --top-k and on
    headings: dict[str, str]  # by name of the map
    overview_headings: dict[str, str]  # the same for all images: with the class of --target
    title: str
    best: list[tuple[str, float]]  # classes with their probabilities, the best first
    asked: list[tuple[str, float]]  # the classes of the maps

    def prediction(self) -> Prediction:
        peaks = {
            name: peak_pixel(values, self.picture.shown_box) for name, values in self.maps.items()
        }
        return Prediction(self.picture.name, self.picture.truth, self.best, peaks)

    def said(self) -> str:
        """The best classes, and those that were asked for."""
        shown = self.best[: max(PREDICTIONS, len(self.asked))]
        shown += [each for each in self.asked if each not in shown]
        return ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in shown)


def explain_batch(
    network: TrainedNetwork,
    methods: Methods,
    pictures: list[Picture],
    batch: Tensor,
    target: int | None,
    top_k: int,
    drawn: DrawnNames,
) -> Iterator[Explained]:
    """The maps of each image of a batch (N, 3, H, W), of the class ``target``, or of the ``top_k``
    most probable ones."""
    probabilities = network.probabilities(batch)
    classes = probabilities.topk(min(top_k, probabilities.shape[1])).indices
    if target is not None:
        classes = torch.full((len(pictures), 1), target)
    maps = maps_of(network, methods, batch, classes)
    best = probabilities.topk(min(max(PREDICTED, top_k), probabilities.shape[1]))
    for i, picture in enumerate(pictures):
        headings, for_all = {}, {}
        for name, (_, rank, label) in maps.items():
            headings[name] = for_all[name] = label
            if rank is not None and target is not None:
                for_all[name] += f"\n{drawn.classes[target]}"
            if rank is not None:
                seen = int(classes[i, rank])
                # the probability comes first, as long names are cut off
                headings[name] += f"\n{100 * probabilities[i, seen]:.0f} % {drawn.classes[seen]}"
            if not maps[name].values[i].any():
                headings[name] += "\n(0 everywhere)"
        names = [(network.class_names[c], float(probabilities[i, c])) for c in best.indices[i]]
        yield Explained(
            picture,
            maps={name: each.values[i] for name, each in maps.items()},
            first_maps={name: each.values[i] for name, each in maps.items() if not each.rank},
            headings=headings,
            overview_headings=for_all,
            title=title_of(
                drawn.titles[picture.truth or printable(Path(picture.name).name)],
                drawn.classes[int(best.indices[i, 0])],
                float(best.values[i, 0]),
            ),
            best=names,
            asked=[(network.class_names[c], float(probabilities[i, c])) for c in classes[i]],
        )


if __name__ == "__main__":
    sys.exit(main())
