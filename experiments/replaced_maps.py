"""Does it matter where a network looks? Its accuracy with other attention maps than its own, and
with the global feature g of other images.

    python -m experiments maps RUN/last.pt --data-dir data

writes replaced_maps.json beside the checkpoint: top-1 with the maps of one level, or of all, made
uniform, replaced by the average over the test images, or by another image's; and for the networks
whose maps depend on g, top-1 and how far the maps move with another image's g. Other maps change
the mean and the spread of the features that the classifier gets; top-1 is also measured with the
statistics of its batch norms taken anew, on the test images, beside the network with its own maps
and such statistics. (Those of vgg-pan's block 5, which follows its gate, stay.)
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_model import Classifier, Network, fuse_conv_bn
from common.device import Precision
from common.errors import UserError

OTHERS = ("same class", "other class")  # whose map or g it is
ALL = "all"


# ---- taking the place of maps and of g ----------------------------------------------------------


@contextlib.contextmanager
def outputs_replaced(
    modules: Mapping[str, torch.nn.Module], replace: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """The named modules, each with ``replace(name, output)`` in the place of its output."""
    hooks = [
        module.register_forward_hook(lambda m, i, output, name=name: replace(name, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def blocks_remembered(model: Network) -> Iterator[None]:
    """The network with a memory: a block that gets the tensor that it got before gives the same
    output, and does not run. A batch is then classified many times at the price of once."""
    run, memory = model.trunk.run_block, {}

    def run_block(number: int, x: Tensor) -> Tensor:
        if number not in memory or memory[number][0] is not x:
            memory[number] = (x, run(number, x))
        return memory[number][1]

    model.trunk.run_block = run_block
    try:
        yield
    finally:
        del model.trunk.run_block


def uniform_scores(scores: Tensor, is_sigmoid: bool) -> Tensor:
    """Scores (N, H, W) of a uniform map; for a sigmoid gate, of the image's mean gate."""
    if is_sigmoid:
        return scores.sigmoid().mean((1, 2), keepdim=True).logit().expand_as(scores)
    return torch.zeros_like(scores)


def average_scores(scores: Tensor, is_sigmoid: bool) -> Tensor:
    """Scores (1, H, W) of the mean map of N images, from their scores (N, H, W)."""
    if is_sigmoid:
        return scores.sigmoid().mean(0, keepdim=True).logit()
    return scores.flatten(1).softmax(1).mean(0).log().view(1, *scores.shape[1:])


def partners(labels: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """{"same class": (N,), "other class": (N,)}: for every image the index of another one, each
    once. The only image of its class is its own partner; a class may have half of the images at
    most."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    ranks = torch.randperm(int(labels.max()) + 1, generator=generator)  # of the classes
    by_class = shuffled[ranks[labels[shuffled]].argsort(stable=True)]
    counts = ranks[labels].bincount()
    same, other = torch.empty_like(by_class), torch.empty_like(by_class)
    for members in by_class.split(counts.tolist()):
        same[members] = members.roll(1)
    # beyond the end of its class, wherever an image is in it
    other[by_class] = by_class.roll(int(counts.max()))
    return dict(zip(OTHERS, (same, other), strict=True))


def divergence(maps: Tensor, others: Tensor) -> Tensor:
    """Jensen-Shannon divergence (N,) between maps (N, H, W) that sum to 1, in bits: 0 for equal
    maps, 1 for maps without a common position."""
    p, q = maps.double().flatten(1), others.double().flatten(1)
    entropy = [torch.special.entr(x).sum(1) for x in ((p + q) / 2, p, q)]
    return (entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)


# ---- the measure --------------------------------------------------------------------------------

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Variant:
    """The network with other maps, or with another g."""

    by: str  # what takes the place: own (nothing), uniform, average, same class, other class
    of: str  # what is replaced: a level, all levels, or g
    modules: Mapping[str, torch.nn.Module]
    # (name, the module's output (N, ...) for a batch, where that batch lies in the set)
    replace: Callable[[str, Tensor, slice], Tensor]


class Recording:
    """Labels, compatibility scores and global features of all images, and the correct answers."""

    def __init__(self, network: Network, batches: Batches, precision: Precision):
        scores: dict[str, list[Tensor]] = {level: [] for level in network.levels}
        g: dict[str, list[Tensor]] = {name: [] for name in network.global_branches}
        labels, hits = [], []

        def keep(name: str, output: Tensor) -> Tensor:
            g[name].append(output)
            return output

        with outputs_replaced(branches_of(network), keep):
            for images, batch_labels in batches():
                with precision.context():
                    logits, batch_scores = network.logits_and_scores(images)
                hits.append(logits.argmax(1) == batch_labels)
                labels.append(batch_labels)
                for level, values in batch_scores.items():
                    scores[level].append(values)
        self.scores = {level: torch.cat(values) for level, values in scores.items()}
        self.g = {name: torch.cat(values) for name, values in g.items()}
        self.labels = torch.cat(labels)
        self.correct = int(torch.cat(hits).sum())


def branches_of(network: Network) -> dict[str, torch.nn.Module]:
    return {name: network.get_submodule(name) for name in network.global_branches}


def variants_of(network: Network, own: Recording, partner: Mapping[str, Tensor]) -> list[Variant]:
    """All that ``measure`` tries."""

    def is_sigmoid(level: str) -> bool:
        return level in network.sigmoid_levels

    average = {level: average_scores(s, is_sigmoid(level)) for level, s in own.scores.items()}
    replacements = {
        "uniform": lambda level, scores, at: uniform_scores(scores, is_sigmoid(level)),
        "average": lambda level, scores, at: average[level].expand_as(scores),
    }
    queries = {}
    for name, other in partner.items():
        replacements[name] = lambda level, scores, at, i=other: own.scores[level][i[at]]
        queries[name] = lambda branch, g, at, i=other: own.g[branch][i[at]]
    compatibilities = network.compatibilities()
    subsets = {level: {level: module} for level, module in compatibilities.items()}
    if len(subsets) > 1:
        subsets[ALL] = compatibilities
    variants = [Variant("own", ALL, {}, lambda level, scores, at: scores)]
    variants += [
        Variant(by, of, modules, replace)
        for by, replace in replacements.items()
        for of, modules in subsets.items()
    ]
    if network.global_branches:
        variants += [Variant(by, "g", branches_of(network), r) for by, r in queries.items()]
    return variants


@torch.no_grad()
def measure(model: Network, batches: Batches, precision: Precision, seed: int = 0) -> dict:
    """Top-1 in percent with replaced maps and with another image's g, and how far maps are apart
    (mean Jensen-Shannon divergence in bits), as plain values.

    batches: gives the same (images (N, 3, H, W), labels (N,)) in the same order each time it is
    called. seed: of whose map and g an image gets. Raises UserError for a network without
    attention.
    """
    if not model.levels:
        raise UserError(
            "this network has no attention maps to replace: name a run of one that has",
            2,
        )
    network = fuse_conv_bn(model) if precision.device.type == "cpu" else model.eval()
    own = Recording(network, batches, precision)
    partner = {
        name: indices.to(own.labels.device)
        for name, indices in partners(own.labels.cpu(), seed).items()
    }
    variants = variants_of(network, own, partner)
    correct, moved, apart, first = Counter(), Counter(), Counter(), 0
    attended: dict[tuple[str, str], list[list[Tensor]]] = {(v.by, v.of): [] for v in variants}
    with blocks_remembered(network), inputs_kept(network.classifier) as inputs:
        for images, labels in batches():
            at = slice(first, first + len(images))
            first += len(images)
            maps = maps_of(network, own.scores, at)
            for name, indices in partner.items():
                for level, others in maps_of(network, own.scores, indices[at]).items():
                    apart[name, level] += divergence(maps[level], others).sum().item()
            for v in variants:
                with (
                    outputs_replaced(
                        v.modules, lambda name, out, v=v, at=at: v.replace(name, out, at)
                    ),
                    precision.context(),
                ):
                    logits, scores = network.logits_and_scores(images)
                correct[v.by, v.of] += (logits.argmax(1) == labels).sum().item()
                attended[v.by, v.of].append(inputs.pop())
                if v.of == "g":
                    for level, others in maps_of(network, scores).items():
                        moved[v.by, level] += divergence(maps[level], others).sum().item()

    def by_level(sums: Counter, by: str) -> dict[str, float]:
        return {level: round(sums[by, level] / first, 4) for level in maps}

    return {
        "images": first,
        "top1": percent(own.correct, first),
        "replaced": [
            {
                "by": v.by,
                "of": v.of,
                "top1": percent(correct[v.by, v.of], first),
                "top1_recalibrated": percent(
                    recalibrated(network.classifier, attended[v.by, v.of], own.labels), first
                ),
            }
            for v in variants
        ],
        "moved_by_g": {v.by: by_level(moved, v.by) for v in variants if v.of == "g"},
        "between_images": {name: by_level(apart, name) for name in partner},
    }


@contextlib.contextmanager
def inputs_kept(module: torch.nn.Module) -> Iterator[list]:
    """The list of the module's first arguments, of each call."""
    kept: list = []
    hook = module.register_forward_pre_hook(lambda m, arguments: kept.append(arguments[0]))
    try:
        yield kept
    finally:
        hook.remove()


def recalibrated(
    classifier: Classifier, attended: Sequence[Sequence[Tensor]], labels: Tensor
) -> int:
    """Correct answers from the attended features of each batch, one (N, C) per level, with the
    classifier's batch-norm statistics taken over all of them. The labels (N,) only count."""
    classifier = copy.deepcopy(classifier)
    features = [torch.cat(level).float() for level in zip(*attended, strict=True)]
    for level, values in zip(classifier.levels, features, strict=True):
        level.norm.running_mean.copy_(values.mean(0))
        level.norm.running_var.copy_(values.var(0, correction=0))
    return int((classifier(features).argmax(1) == labels).sum())


def maps_of(
    network: Network, scores: Mapping[str, Tensor], at: slice | Tensor = slice(None)
) -> dict[str, Tensor]:
    """The maps (N, H, W) that sum to 1, of the scores' rows ``at``."""
    return {
        level: network.map_of(level, values[at])
        for level, values in scores.items()
        if level not in network.sigmoid_levels
    }


def percent(correct: int, images: int) -> float:
    return round(100 * correct / images, 4)
