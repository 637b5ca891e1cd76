"""See where a network looks, as pictures and in numbers: the attention maps of our networks, class
activation maps and Grad-CAM of ours and of torchvision's.

    python cam.py --checkpoint runs/cifar100/RUN/last.pt photo.jpg folder/
    python cam.py --checkpoint runs/cifar100/RUN/last.pt --dataset cifar100 --index 0-15
    python cam.py --checkpoint runs/cub/RUN/last.pt --dataset cub --measure
    python cam.py --arch resnet50 --weights DEFAULT --top-k 3 photo.jpg
    python cam.py --help

The methods as functions: attention_maps(model, images), class_activation_map(model, images,
targets) and grad_cam(model, images, targets, layer=None), which training/explain.py documents.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.arguments import MAX_WORKERS, expanded_path, int_at_least, parse
from common.device import choose_device
from common.errors import UserError, exit_status, print_error, printable
from common.files import free_path, make_folders, replace_file
from common.process import open_standard_streams, unbreakable_pipes
from data import SOURCES, ImageSet, open_rgb
from explain.maps import (
    attention_maps,
    class_activation_map,
    default_layer,
    feature_layers,
    grad_cam,
)
from explain.metrics import Measures, part_lines, table_lines
from explain.networks import (
    TrainedNetwork,
    find_class,
    from_checkpoint,
    from_torchvision,
)
from explain.output import (
    MAX_SIDE,
    Overview,
    Picture,
    Writer,
    list_files,
    parse_index,
)
from explain.pictures import COLOR_MAPS, shown, title_of

METHODS = ("attention", "cam", "gradcam")
FIRST_IMAGES = 16  # of a data set, when pictures are made and --index is not given
OVERVIEW = 64  # images on the sheet of a whole selection, at most
PHOTOS_AT_ONCE = 16  # of files: they wait in memory, large as they are shown
PREDICTIONS = 3  # told for an image, at least


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Where a network looks, as pictures and as localisation measures.",
        allow_abbrev=False,
    )
    which = parser.add_argument_group("network")
    which.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="a last.pt of train_cifar100.py or train_cub.py",
    )
    which.add_argument(
        "--arch",
        metavar="NAME",
        help="a torchvision classifier (resnet50, ...), for cam and gradcam",
    )
    which.add_argument(
        "--weights",
        type=expanded_path,
        metavar="{DEFAULT,NAME,FILE}",
        help="of --arch: torchvision's by name (downloaded), or a state dict of yours",
    )
    what = parser.add_argument_group("images")
    what.add_argument(
        "images", nargs="*", type=expanded_path, metavar="IMAGE", help="files, and folders of files"
    )
    what.add_argument(
        "--dataset",
        choices=(*SOURCES, "sample"),
        help="instead: images of a data set, or the sample",
    )
    what.add_argument("--split", choices=("test", "train"), default="test", help="(default: test)")
    what.add_argument(
        "--index",
        metavar="LIST",
        help=f"which of them, as 3,7,9-12 (default: the first {FIRST_IMAGES}; for --measure all)",
    )
    what.add_argument(
        "--crop",
        choices=("box", "whole"),
        help="of birds: the box or the whole picture (default: as trained; whole for --measure)",
    )
    what.add_argument(
        "--data-dir",
        type=expanded_path,
        help="folder that holds the data set (default: the checkpoint's, else data)",
    )
    what.add_argument(
        "--num-workers",
        type=int_at_least(0, MAX_WORKERS),
        default=2,
        help="processes that decode a data set's images into the cache (default: 2)",
    )
    how = parser.add_argument_group("maps")
    how.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="all",
        help="(default: all that the network has)",
    )
    how.add_argument(
        "--layer", metavar="NAME", help="of gradcam (default: the last with an extent)"
    )
    how.add_argument(
        "--list-layers", action="store_true", help="print the layers that gradcam can be made at"
    )
    target = how.add_mutually_exclusive_group()
    target.add_argument(
        "--target", metavar="CLASS", help="name or number (default: the one that the network sees)"
    )
    target.add_argument(
        "--top-k", type=int_at_least(1), default=1, metavar="K", help="the K best, side by side"
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        type=expanded_path,
        default="runs/cam",
        metavar="FOLDER",
        help="(default: runs/cam)",
    )
    out.add_argument("--raw", action="store_true", help="also the maps as .npy")
    out.add_argument(
        "--measure",
        action="store_true",
        help="no pictures but how well the maps find the object, as a "
        "table and CSV: for birds and the sample",
    )
    out.add_argument(
        "--colours",
        dest="colors",
        choices=tuple(COLOR_MAPS),
        default="inferno",
        help="(default: inferno)",
    )
    out.add_argument(
        "--opacity",
        type=opacity,
        default=0.5,
        help="of the map over the image, 0 to 1 (default: 0.5)",
    )
    out.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N (default: auto)")
    return parser


def opacity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 a failure or an image that could not be read, 2 bad use, 130
    stopped."""
    open_standard_streams()
    with unbreakable_pipes():
        try:
            args = parse(make_parser(), sys.argv[1:] if argv is None else argv)
        except SystemExit as stop:  # argparse has printed the help (0) or what is wrong (2)
            return stop.code
        with exit_status("Stopped. What was written so far is whole.") as status:
            status.code = dispatch(args)
        return status.code


def dispatch(args: argparse.Namespace) -> int:
    check_use(args)
    network = (
        from_checkpoint(args.checkpoint)
        if args.checkpoint
        else from_torchvision(args.arch, args.weights)
    )
    network.place_on(choose_device(args.device))
    print(network.description)
    if args.list_layers:
        return list_layers(network)
    methods, layer = applicable(network, args.method, args.layer)
    if args.measure:
        return measure(args, network, methods, layer)
    return make_pictures(args, network, methods, layer)


def check_use(args: argparse.Namespace) -> None:
    """What argparse does not see. Raises UserError."""
    if bool(args.checkpoint) == bool(args.arch):
        raise UserError("name one network: --checkpoint FILE, or --arch NAME with --weights", 2)
    if args.weights and not args.arch:
        raise UserError("--weights goes with --arch; a checkpoint has its own", 2)
    if args.arch and not args.weights:
        raise UserError(
            f"--arch {args.arch} needs weights: --weights DEFAULT for torchvision's, or a FILE of yours",
            2,
        )
    if args.layer and args.method not in ("gradcam", "all"):
        raise UserError(f"--layer is for gradcam, not for --method {args.method}", 2)
    if args.list_layers:
        return
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file, not a folder", 2)
    if bool(args.images) == bool(args.dataset):
        raise UserError(
            "name images (files or folders), or a --dataset"
            + (", not both" if args.images else ""),
            2,
        )
    if args.measure and not args.dataset:
        raise UserError(
            "--measure needs --dataset cub or --dataset sample, where the place of the object is known",
            2,
        )
    if args.measure and args.dataset == "cifar100":
        raise UserError(
            "--measure needs boxes or marks, and cifar100 has none: --dataset cub or --dataset sample",
            2,
        )
    if args.measure and (args.target or args.top_k > 1):
        raise UserError("--measure takes the true class: leave --target and --top-k out", 2)
    if args.dataset is None and (args.index or args.crop):
        raise UserError("--index and --crop are for a --dataset", 2)


# ---- methods ------------------------------------------------------------------------------------


def probe(network: TrainedNetwork) -> Tensor:
    """(1, 3, H, W): noise, to ask what a network can do before any image is read."""
    return torch.randn(1, 3, *network.size, generator=torch.Generator().manual_seed(0)).to(
        network.device
    )


def list_layers(network: TrainedNetwork) -> int:
    default = default_layer(network.model, probe(network))
    for name, (channels, height, width) in feature_layers(network.model, probe(network)).items():
        print(
            f"{name:<32} {channels:>5} x {height} x {width}{'   (default)' if name == default else ''}"
        )
    return 0


def applicable(
    network: TrainedNetwork, asked: str, layer: str | None
) -> tuple[list[str], str | None]:
    """The methods to use, and the layer of gradcam. Raises UserError for one that was asked for and
    cannot be."""
    methods = []
    for method in METHODS if asked == "all" else (asked,):
        try:
            if method == "gradcam":
                layer = layer or default_layer(network.model, probe(network))
            maps_of(network, method, probe(network), torch.zeros(1, 1, dtype=torch.int64), layer)
            methods.append(method)
        except ValueError as error:
            if asked != "all" or method == "gradcam" and layer:
                option = f"--method {method}" if method == asked else f"--layer {layer}"
                raise UserError(f"{option}: {error}", 2) from None
            print(f"{method} skipped: {error}")
    if not methods:
        raise UserError("no method applies to this network")
    if "gradcam" in methods:
        print(f"gradcam at {layer}")
    return methods, layer


def maps_of(
    network: TrainedNetwork, method: str, batch: Tensor, classes: Tensor, layer: str | None
) -> dict[str, tuple[np.ndarray, int | None]]:
    """The maps that a method makes of a batch (N, 3, H, W) and of its classes (N, K): {"conv7":
    (maps (N, H, W), None)} for attention, which knows no class, and {"cam": (maps, 0), "cam-2":
    (maps, 1)} with the column for the others."""
    if method == "attention":
        return {
            level: (maps.cpu().numpy(), None)
            for level, maps in attention_maps(network.model, batch).items()
        }
    found = {}
    for rank, targets in enumerate(classes.T.to(batch.device)):
        maps = (
            class_activation_map(network.model, batch, targets)
            if method == "cam"
            else grad_cam(network.model, batch, targets, layer)
        )
        found[f"{method}-{rank + 1}" if rank else method] = maps.cpu().numpy(), rank
    return found


# ---- images -------------------------------------------------------------------------------------


def batches_of_files(
    network: TrainedNetwork, paths: list[Path], bad: list[Path]
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Pictures, and the batch that the network sees of them. What cannot be read is told, put in
    ``bad``, left out."""
    height, width = network.size
    at_once = min(network.batch_size, PHOTOS_AT_ONCE)
    for first in range(0, len(paths), at_once):
        pictures, small = [], []
        for path in paths[first : first + at_once]:
            try:
                pixels = np.asarray(open_rgb(path))
            except UserError as error:
                print_error(str(error))
                bad.append(path)
                continue
            small.append(
                np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
            )
            pictures.append(Picture(printable(path), path.stem, shown(pixels, 1, MAX_SIDE)))
        if pictures:
            yield pictures, network.batch(torch.from_numpy(np.stack(small)))


def batches_of_set(
    network: TrainedNetwork, images: ImageSet, indices: list[int], name: str
) -> Iterator[tuple[list[Picture], Tensor]]:
    """The same of a data set's images."""
    for first in range(0, len(indices), network.batch_size):
        part = indices[first : first + network.batch_size]
        some = images.subset(part)
        yield (
            [
                Picture(f"{name} {i}", f"{name}-{i:05d}", pixels, images.class_names[label])
                for i, pixels, label in zip(
                    part, some.images.numpy(), some.labels.tolist(), strict=True
                )
            ],
            network.batch(some.images),
        )


def load_set(args: argparse.Namespace, network: TrainedNetwork) -> ImageSet:
    """The split of --dataset, loaded and cut out as the network was trained with it (whole pictures
    to measure on)."""
    own = network.config.get("dataset", "cifar100")
    source = SOURCES[own if args.dataset == "sample" else args.dataset]
    # Whole birds at the network's size; CIFAR-100 as it is.
    config = {
        "crop": "whole",
        "margin": 0.1,
        "zoom": 0.5,
        "image_size": max(network.size) if source.name == "cub" else None,
    }
    if own == source.name:
        config |= network.config  # empty for torchvision's
    config |= {
        "data_dir": args.data_dir or config.get("data_dir", "data"),
        "num_workers": args.num_workers,
        "sample": args.dataset == "sample",
    }
    config["crop"] = args.crop or ("whole" if args.measure else config["crop"])
    train, test = source.sets(config, download=network.config.get("dataset") != source.name)
    return {"train": train, "test": test}[args.split]


# ---- pictures -----------------------------------------------------------------------------------


def make_pictures(
    args: argparse.Namespace, network: TrainedNetwork, methods: list[str], layer: str | None
) -> int:
    """An overlay for each map and a sheet for each image, and of a data set's images one sheet of
    all."""
    target = None if args.target is None else find_class(args.target, network.class_names)
    paths, bad = list_files(args.images)
    name = f"{args.dataset}-{args.split}"
    if args.dataset:
        images = load_set(args, network)
        indices = (
            parse_index(args.index, len(images))
            if args.index
            else list(range(min(FIRST_IMAGES, len(images))))
        )
        print(f"{len(indices)} of {len(images):,} {args.split} images ({images.source})")
        batches = batches_of_set(network, images, indices, name)
    else:
        batches = batches_of_files(network, paths, bad)
    writer = Writer(Path(args.out), paths, raw=args.raw, opacity=args.opacity, colors=args.colors)
    overview, done = Overview(), 0
    for pictures, batch in batches:
        chances = network.probabilities(batch)
        classes = chances.topk(min(args.top_k, chances.shape[1])).indices
        if target is not None:
            classes = torch.full((len(pictures), 1), target)
        maps = {}
        for method in methods:
            maps |= maps_of(network, method, batch, classes, layer)
        for i, picture in enumerate(pictures):
            chance, seen = chances[i].max(0)
            title = title_of(
                picture.truth or Path(picture.name).name, network.class_names[seen], float(chance)
            )
            stem = writer.image(
                picture,
                {name: each[i] for name, (each, _) in maps.items()},
                {
                    name: heading(
                        network, name, chances[i], None if rank is None else classes[i, rank]
                    )
                    for name, (_, rank) in maps.items()
                },
                title,
            )
            renamed = f"   (written as {printable(stem)})" if stem != picture.stem else ""
            print(
                f"{picture.name}: {predictions(network, chances[i], classes[i])}{renamed}",
                flush=True,
            )
            if args.dataset and done + i < OVERVIEW:
                overview.add(
                    picture,
                    {name: each[i] for name, (each, rank) in maps.items() if not rank},
                    title,
                )
        done += len(pictures)
    if len(overview.pixels) > 1:
        writer.overview(name, overview)
    print(f"{done} image{'s' * (done != 1)} done, {writer.written} files in {printable(args.out)}")
    if bad:
        print_error(f"{len(bad)} of the inputs could not be used: see above")
    return 1 if bad else 0


def predictions(network: TrainedNetwork, chances: Tensor, classes: Tensor) -> str:
    """The best classes with their probabilities, and those that were asked for."""
    best = chances.topk(min(max(PREDICTIONS, len(classes)), len(chances))).indices.tolist()
    asked = [c for c in classes.tolist() if c not in best]
    return ", ".join(f"{network.class_names[c]} {100 * chances[c]:.1f} %" for c in best + asked)


def heading(network: TrainedNetwork, name: str, chances: Tensor, target: Tensor | None) -> str:
    """What stands over a map: level, or method and class. The probability comes first, as long
    names are cut off."""
    if target is None:
        return name
    return f"{name.split('-')[0]}\n{100 * chances[target]:.0f} % {network.class_names[target]}"


# ---- measures -----------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, network: TrainedNetwork, methods: list[str], layer: str | None
) -> int:
    """How well the maps find the object, as a table, and as measures.csv (and parts.csv) in --out."""
    images = load_set(args, network)
    chosen = images.subset(parse_index(args.index, len(images))) if args.index else images
    same_classes = chosen.class_names == network.class_names
    # x, y
    scale = torch.tensor(
        [side / stored for side, stored in zip(network.size, chosen.image_size, strict=True)]
    ).flip(0)
    measures = Measures()
    for first in range(0, len(chosen), network.batch_size):
        part = chosen.subset(range(first, min(first + network.batch_size, len(chosen))))
        batch = network.batch(part.images)
        classes = (part.labels if same_classes else network.probabilities(batch).argmax(1))[:, None]
        maps = {}
        for method in methods:
            maps |= {
                name: each
                for name, (each, _) in maps_of(network, method, batch, classes, layer).items()
            }
        places = None
        if part.parts is not None:
            places = torch.cat([part.parts[..., :2] * scale, part.parts[..., 2:]], -1).numpy()
        measures.add(maps, (part.boxes * scale.repeat(2)).numpy(), places)
    which = (
        "the true class"
        if same_classes
        else "the class that the network sees, as its classes are others"
    )
    print(f"{len(chosen):,} {args.split} images ({chosen.source}); cam and gradcam of {which}")
    out = Path(args.out)
    make_folders(out)
    rows, parts = measures.table(), measures.part_table(chosen.part_names)
    print("\n" + "\n".join(table_lines(rows)))
    written = [write_csv(out / "measures.csv", rows)]
    if parts:
        print("\n" + "\n".join(part_lines(parts, chosen.part_names)))
        written.append(write_csv(out / "parts.csv", parts))
    print(f"\nWritten to {' and '.join(map(printable, written))}")
    return 0


def write_csv(path: Path, rows: list[dict]) -> Path:
    """Write a table, over an earlier one of ours (of the same columns), else under a name that is
    free. Returns the path."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(
        {
            name: round(float(value), 4) if isinstance(value, float) else value
            for name, value in row.items()
        }
        for row in rows
    )
    content = text.getvalue().encode()
    header = content[: content.index(b"\n") + 1]
    path = free_path(path, lambda old: old.is_file() and old.read_bytes().startswith(header))
    replace_file(path, lambda file: file.write(content))
    return path


if __name__ == "__main__":
    sys.exit(main())
