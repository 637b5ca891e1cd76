"""How good are a trained network's features for classes that it was not trained on?

The network stays frozen. What it hands over to its class layers is computed once for each image of
the new classes, and a linear classifier learns from that, as in the cross-domain section of "Learn
to Pay Attention" (arXiv 1804.02391). Here it is a multinomial logistic regression.

    link_classes("data", "data-50", first_classes("data", 50))
    # python train_cifar100.py --data-dir data-50 --run-dir RUN
    precision = Precision("fp32", torch.device("cpu"))
    transfer("RUN/last.pt", "cifar100-last", "data", 32, precision)["top1"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_model import SMALLEST_IMAGE, Network, fuse_conv_bn
from common.checkpoint import load_model, read_checkpoint
from common.device import Precision
from common.errors import UserError, printable
from common.files import identity, make_folders
from data import ImageSet, eval_batches, load_cifar100, load_cub, split_validation
from explain.inference import eval_no_grad
from training.evaluation import interval_95

TARGETS = ("birds", "cifar100-last")
BIRD_MARGIN = 0.1  # of the box's longer side, as train_cub.py has it
# The grid, the largest first: the logistic regression of each starts at the one before.
WEIGHT_DECAYS = tuple(10 ** (-i / 2) for i in range(11))  # 1 to 1e-5
VALIDATION_SHARE = 0.2  # of the training images of each class
FEWEST_IMAGES = 3  # of a class, so that one of them is held out
ROUNDING = 1e-5  # of a feature's largest value: a smaller deviation is float32's rounding
SEED = 0  # of the images held out
GRADIENT_TOLERANCE = 1e-6  # on its largest entry; with it, the start does not matter
MAX_ITERATIONS = 1000
SPLITS = ("train", "test")


# ---- features -----------------------------------------------------------------------------------


def handed_over(
    model: Network, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> tuple[Tensor, Tensor]:
    """The features that a network hands over to its class layers, in evaluation mode.

    Args:
        batches: (images (N, 3, H, W), labels (N,)) on the device of ``precision``, normalized.

    Returns:
        Features (N, C) float32 and labels (N,) int64 of all batches, on the CPU. With several class
        layers (``indep``) C counts the inputs of all, in their order.

    Raises:
        UserError: features that are not finite.
    """
    network = fuse_conv_bn(model) if precision.device.type == "cpu" else model
    features, labels = [], []
    with eval_no_grad(network), _inputs_of(network.class_layers()) as inputs:
        for images, targets in batches:
            inputs.clear()
            with precision.context():
                network(images)
            features.append(torch.cat(inputs, dim=1).float().cpu())
            labels.append(targets.cpu())
    joined = torch.cat(features)
    if not joined.isfinite().all():
        raise UserError(
            f"the network's features are not finite in {precision.name}. Use fp32, "
            f"or a checkpoint of a run that did not diverge"
        )
    return joined, torch.cat(labels)


@contextlib.contextmanager
def _inputs_of(layers: list[nn.Linear]) -> Iterator[list[Tensor]]:
    """A list to which each layer adds its input when it runs."""
    inputs: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            hooks.callback(handle.remove)
        yield inputs


# ---- linear classifier --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of a linear classifier. Accuracies are in percent."""

    weight_decay: float  # the best on the training images that were held out
    validation_top1: float  # on these, of the classifier that did not see them
    top1: float  # on the test images, of the classifier that learned from all training images
    correct: int  # test images
    images: int  # test images


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    seed: int,
) -> Probe:
    """A multinomial logistic regression on standardized features. Its weight decay is chosen from
    WEIGHT_DECAYS by the accuracy on a fifth of the training images of each class, drawn by
    ``seed``; of equally good ones it is the largest. The test images choose nothing.

    Args:
        train_features, test_features: (N, C) and (M, C), on the CPU.
        train_labels, test_labels: (N,) and (M,) int64, from 0 to ``classes`` - 1.

    Raises:
        UserError: no class has FEWEST_IMAGES training images.
    """
    if train_labels.bincount().max() < FEWEST_IMAGES:
        raise UserError(
            f"no class has {FEWEST_IMAGES} training images, so none can be held out to choose the "
            f"weight decay. Use a data set with more images"
        )
    mean, sd = _mean_and_sd(train_features)
    train, test = (train_features.double() - mean) / sd, (test_features.double() - mean) / sd
    weight_decay, validation_top1 = choose_weight_decay(train, train_labels, classes, seed)
    layer = zero_layer(train.shape[1], classes)
    fit(layer, train, train_labels, weight_decay)
    correct, images = _correct(layer, test, test_labels), len(test)
    return Probe(weight_decay, validation_top1, 100 * correct / images, correct, images)


def _mean_and_sd(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of features (N, C), in float64. The deviation of a feature
    that is constant but for rounding is 1: divided by its own, rounding would be a feature."""
    features = features.double()
    sd = features.std(dim=0, correction=0)
    is_constant = sd <= ROUNDING * features.abs().amax(dim=0)
    return features.mean(dim=0), sd.masked_fill(is_constant, 1.0)


def choose_weight_decay(
    features: Tensor, labels: Tensor, classes: int, seed: int
) -> tuple[float, float]:
    """(weight decay, its accuracy in percent on the held-out images) for features (N, C) float64
    and labels (N,)."""
    # split_validation looks at labels only: rows of features do as images
    names = tuple(map(str, range(classes)))
    whole = ImageSet(features, labels, names, "the features")
    part, held_out = split_validation(whole, VALIDATION_SHARE, seed)
    inputs, held_out_inputs = part.images, held_out.images
    layer = zero_layer(features.shape[1], classes)
    counts = []
    for weight_decay in WEIGHT_DECAYS:
        fit(layer, inputs, part.labels, weight_decay)
        counts.append(_correct(layer, held_out_inputs, held_out.labels))
    best = counts.index(max(counts))  # the first: the largest weight decay
    return WEIGHT_DECAYS[best], 100 * counts[best] / len(held_out)


def zero_layer(features: int, classes: int) -> nn.Linear:
    """A linear layer of zeros in float64: in float32, the loss is too coarse for the last steps."""
    layer = nn.utils.skip_init(nn.Linear, features, classes, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def fit(layer: nn.Linear, features: Tensor, labels: Tensor, weight_decay: float) -> None:
    """Minimize over W and b, from the layer's present values:
    mean cross-entropy of W x + b (nats) + weight_decay * ||W||^2.

    The loss is convex, and its minimum in W is unique. ``features``: (N, C) in the layer's type;
    ``labels``: (N,) int64.
    """
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), labels)
        loss = loss + weight_decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_and_gradient)


@torch.no_grad()
def _correct(layer: nn.Linear, features: Tensor, labels: Tensor) -> int:
    return int((layer(features).argmax(dim=1) == labels).sum())


# ---- transfer -----------------------------------------------------------------------------------


def transfer(
    checkpoint_path: str | os.PathLike,
    target: str,
    data_dir: str | os.PathLike,
    image_size: int,
    precision: Precision,
) -> dict:
    """The accuracy of a linear classifier for new classes on the features of a frozen network.

    Args:
        checkpoint_path: RUN/last.pt.
        target: "birds", the classes of CUB-200-2011 in ``data_dir``, cropped to their boxes with a
            margin of 0.1; or "cifar100-last", the classes of CIFAR-100 that the network was not
            trained on. Training and test images are the official ones.
        image_size: side of the network's input in pixels.
        precision: of the network, and its device.

    Returns:
        Plain values: target, image_size, classes, features (C per image), weight_decay,
        validation_top1 (%), train_images, test_images, correct, top1 (%), top1_95 (its 95 %
        interval, %).

    Raises:
        UserError: an unknown target, images too small or missing, no checkpoint, or a network that
            was trained on all classes of CIFAR-100.
    """
    _check(target, image_size)
    saved = read_checkpoint(checkpoint_path)
    train, test = _target_sets(target, data_dir, image_size, saved["class_names"])
    model = load_model(saved).to(precision.device, memory_format=torch.channels_last)

    def features_and_labels(images: ImageSet) -> tuple[Tensor, Tensor]:
        size = (image_size, image_size)
        batches = eval_batches(images, precision.device, saved["mean"], saved["std"], size)
        return handed_over(model, batches, precision)

    features, labels = features_and_labels(train)
    classes = len(train.class_names)
    probe = linear_probe(features, labels, *features_and_labels(test), classes, SEED)
    return {
        "target": target,
        "image_size": image_size,
        "classes": classes,
        "features": features.shape[1],
        "weight_decay": probe.weight_decay,
        "validation_top1": probe.validation_top1,
        "train_images": len(train),
        "test_images": probe.images,
        "correct": probe.correct,
        "top1": probe.top1,
        "top1_95": list(interval_95(probe.top1, probe.images)),
    }


def _check(target: str, image_size: int) -> None:
    if target not in TARGETS:
        raise UserError(f"target {printable(target)}: expected {' or '.join(TARGETS)}", 2)
    if image_size < SMALLEST_IMAGE:
        raise UserError(
            f"an image size of {image_size} is too small: give {SMALLEST_IMAGE} pixels or more", 2
        )


def _target_sets(
    target: str, data_dir: str | os.PathLike, image_size: int, known: Iterable[str]
) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a target, for a network that was trained on the classes ``known``."""
    if target == "birds":
        return load_cub(
            data_dir, image_size=image_size, crop="box", margin=BIRD_MARGIN, download=False
        )
    sets = load_cifar100(data_dir, download=False)
    unknown = [name for name in sets[0].class_names if name not in set(known)]
    if len(unknown) < 2:
        raise UserError(
            f"the network was trained on all classes of {sets[0].source} but {len(unknown)}, and "
            f"two new ones are needed. Train one on fewer classes (link_classes)"
        )
    train, test = (_of_classes(images, unknown) for images in sets)
    return train, test


def _of_classes(images: ImageSet, names: list[str]) -> ImageSet:
    """The images of these classes alone, labeled in the order of ``names``."""
    indices = [names.index(name) if name in names else -1 for name in images.class_names]
    new = torch.tensor(indices)[images.labels]
    rows = (new >= 0).nonzero().flatten()
    return dataclasses.replace(images.subset(rows), labels=new[rows], class_names=tuple(names))


# ---- some of the classes ------------------------------------------------------------------------


def first_classes(data_dir: str | os.PathLike, count: int) -> tuple[str, ...]:
    """The names of the first ``count`` classes of CIFAR-100, in the data set's order.

    Raises:
        UserError: fewer classes, or no class folders.
    """
    names = sorted(_classes_in(_class_folders(data_dir) / "train"))
    if not 1 <= count <= len(names):
        raise UserError(f"{count} classes asked for: {data_dir} has 1 to {len(names)}", 2)
    return tuple(names[:count])


def link_classes(
    data_dir: str | os.PathLike, folder: str | os.PathLike, classes: Iterable[str]
) -> None:
    """Make ``folder``/cifar100/{train,test}/<class> symbolic links to the class folders of
    ``data_dir``, so that ``train_cifar100.py --data-dir folder`` trains on these classes alone.
    Links that are there already are kept.

    Raises:
        UserError: no class folders, an unknown class, or anything else in ``folder``/cifar100.
            Nothing is made then.
        OSError: a link cannot be made.
    """
    source, made, classes = _class_folders(data_dir), Path(folder) / "cifar100", tuple(classes)
    for split in SPLITS:
        if missing := sorted(set(classes) - _classes_in(source / split)):
            raise UserError(
                f"{source / split} has no class folder {printable(missing[0])}: "
                f"check the names of the classes"
            )
    links = {made / split / name: source / split / name for split in SPLITS for name in classes}
    _check_only(made, links)
    for link, original in links.items():
        if not link.is_symlink():
            make_folders(link.parent)
            link.symlink_to(original, target_is_directory=True)


def _check_only(made: Path, links: dict[Path, Path]) -> None:
    """Raises UserError for anything in ``made``/{train,test} or beside them that is not one of the
    links {link: folder that it leads to}."""
    splits = [made / split for split in SPLITS]
    for folder in (made, *splits):
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise UserError(f"{folder} is not a plain folder: move it away, or name another folder")
    present = [path for folder in (made, *splits) if folder.is_dir() for path in folder.iterdir()]
    for path in present:
        is_right = path.is_symlink() and path in links and identity(path) == identity(links[path])
        if path not in splits and not is_right:
            raise UserError(
                f"{printable(path)} is not a link to one of the {len(links) // 2} classes: "
                f"move it away, or name another folder"
            )


def _class_folders(data_dir: str | os.PathLike) -> Path:
    """The folder that holds the class folders of CIFAR-100. Raises UserError where there are
    none."""
    folder = Path(data_dir).absolute() / "cifar100"
    if not all((folder / split).is_dir() for split in SPLITS):
        raise UserError(
            f"class folders are needed at {folder}/{{train,test}}/<class>/, and they are not "
            f"there. The official archive has none: write its images to such folders"
        )
    return folder


def _classes_in(folder: Path) -> set[str]:
    """The names of the class folders in a folder."""
    return {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
