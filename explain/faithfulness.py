"""Whether the network needs what a map shows: deletion and insertion (Petsiuk et al., RISE, arXiv
1806.07421).

The pixels of the input are taken in the order of the map, the highest first. Deletion replaces the
first of them by a fill, insertion starts from the fill alone and puts the first of them back. The
probability of a class is recorded at equal steps of the share of pixels; the score is the area
under this curve. A map that shows what the network needs has a low area under deletion and a high
one under insertion.

The class is the one that the network predicts on the untouched image, right or wrong: the question
is what this prediction rests on. Maps of a class should be of that one.

An image with pixels replaced is none that the network was trained on, and the score depends on the
fill as well as on the map. Hence two fills: the mean color, whose edges the network sees, and the
blurred image, which has none. The order matters by itself, too: pixels scattered over the image
usually disturb a network more than as many in one place. The random order then does well at
deletion and badly at insertion, so a map is to be compared with all three baselines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from explain.inference import at_least_float32, eval_no_grad, logits_of
from explain.metrics import CENTER, center_map
from explain.networks import TrainedNetwork
from explain.pictures import GRAY_WEIGHTS

GAMES = ("deletion", "insertion")
FILLS = ("mean", "blurred")
SCORES = tuple(f"{game}_{fill}" for game in GAMES for fill in FILLS)
STEPS = 10  # of a curve: 11 points

RANDOM, EDGES = "random order", "edges of the picture"
BASELINES = (RANDOM, CENTER, EDGES)

# Standard deviation of the blurred fill, as a share of the shorter side: 4 px of 32, 28 px of 224.
# On CIFAR-100, and on birds at 64 px, it leaves little more of the predicted class's probability
# than the image's mean color does. The paper's 5 px of 224 leave half of it: insertion would start
# from an image that still shows the object. A class that has a color of its own, such as the sea,
# survives any blur.
BLUR = 1 / 8
EDGE_BLUR = 1 / 32  # of the edges: one that is a pixel wide has its sides, too


# ---- the curves of a set ------------------------------------------------------------------------


class Faithfulness:
    """Collects the curves of a set of images, batch by batch, of its maps and of three orders that
    know nothing of the network: random, from the center outward, and the image's own edges first.

    Args:
        steps: of a curve; it has a point more.

    Raises:
        ValueError: fewer than 1 step.

    Example:
        >>> found = Faithfulness()
        >>> for batch in batches:  # (N, 3, H, W) each, as network.preprocess gives them
        ...     found.add(network, batch, {"conv7": attention_maps(network.model, batch)["conv7"]})
        >>> print("\\n".join(table_lines(found.table())))
    """

    def __init__(self, steps: int = STEPS) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}: a curve has 1 or more")
        self.steps = steps
        self.images = 0
        self.areas: dict[str, list[Tensor]] = {}  # (N, games, fills) per batch
        self.sums: dict[str, Tensor] = {}  # of the curves, (games, fills, steps + 1)

    def add(
        self, network: TrainedNetwork, batch: Tensor, maps: Mapping[str, np.ndarray | Tensor]
    ) -> None:
        """Add a batch (N, 3, H, W), normalized, with its maps of each kind (N, H, W), at the cost
        of 4 * (steps - 1) forward passes per image and map, the three baselines included.

        Maps may have any range; pixels of one value are taken in random order, the same on every
        run, and NaN comes last. The network is left as it was.

        Raises ValueError for maps of another shape than the batch, or other names than before.
        """
        if batch.ndim != 4 or not len(batch):
            raise ValueError(f"expected a batch (N, 3, H, W), not {tuple(batch.shape)}")
        batch = batch.detach().to(network.device)
        ties = random_orders(self.images, len(batch), math.prod(batch.shape[2:])).to(batch.device)
        maps = self._checked(maps, batch) | baseline_maps(network, batch)
        ranks = torch.stack([pixel_ranks(values, ties) for values in maps.values()])
        curves = probability_curves(network, batch, ranks, self.steps).double().cpu()
        areas = torch.trapezoid(curves, dx=1 / self.steps)
        for name, area, curve in zip(maps, areas, curves, strict=True):
            self.areas.setdefault(name, []).append(area)
            self.sums[name] = self.sums.get(name, 0) + curve.sum(0)
        self.images += len(batch)

    def _checked(
        self, maps: Mapping[str, np.ndarray | Tensor], batch: Tensor
    ) -> dict[str, np.ndarray | Tensor]:
        expected = (len(batch), *batch.shape[2:])
        for name, values in maps.items():
            if tuple(values.shape) != expected:
                raise ValueError(f"map {name}: expected {expected}, got {tuple(values.shape)}")
            if name in BASELINES:
                raise ValueError(f"map {name}: a baseline has this name")
        before = [name for name in self.areas if name not in BASELINES]
        if self.images and list(maps) != before:
            raise ValueError(f"maps {', '.join(maps)}: earlier batches had {', '.join(before)}")
        return dict(maps)

    def table(self) -> list[dict[str, object]]:
        """A row per map: its name, the number of images, and four scores, such as deletion_mean:
        the mean area under the curve, in [0, 1]. To each its standard error over the images
        (..._se), its difference to the random order (..._vs_random), and the standard error of this
        (..._vs_random_se), paired by image. NaN where a single image has no standard error."""
        if not self.images:
            return []
        random = torch.cat(self.areas[RANDOM]).flatten(1)
        rows = []
        for name, batches in self.areas.items():
            row: dict[str, object] = {"map": name, "images": self.images}
            areas = torch.cat(batches).flatten(1)
            for score, area, by_chance in zip(SCORES, areas.T, random.T, strict=True):
                row[score], row[f"{score}_se"] = mean_and_error(area)
                difference = mean_and_error(area - by_chance)
                row[f"{score}_vs_random"], row[f"{score}_vs_random_se"] = difference
            rows.append(row)
        return rows

    def curve_rows(self) -> list[dict[str, object]]:
        """The mean curves: map, fill, game, the share of pixels that are replaced (deletion) or
        back (insertion), and the probability, both in [0, 1]."""
        return [
            {
                "map": name,
                "fill": fill,
                "game": game,
                "share": step / self.steps,
                "probability": value / self.images,
            }
            for name, curves in self.sums.items()
            for game, by_fill in zip(GAMES, curves.tolist(), strict=True)
            for fill, curve in zip(FILLS, by_fill, strict=True)
            for step, value in enumerate(curve)
        ]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of (N,), and its standard error; NaN for a single value."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


# ---- the order of pixels ------------------------------------------------------------------------


def random_orders(first: int, count: int, pixels: int) -> Tensor:
    """(count, pixels) int64: an order of the pixels for each image of a set from number ``first``
    on, the same on every run and in batches of any size."""
    seeds = range(first, first + count)
    return torch.stack(
        [torch.randperm(pixels, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def pixel_ranks(values: np.ndarray | Tensor, ties: Tensor) -> Tensor:
    """(N, H, W), the place of each pixel in the order of its map, 0 for the highest -> (N, H * W)
    int32. Equal values are taken in the order ``ties`` (N, H * W), never row by row: half of a map
    may be 0. NaN comes last."""
    if isinstance(values, np.ndarray):
        values = np.ascontiguousarray(values)  # torch knows no negative strides
    flat = torch.as_tensor(values, device=ties.device).detach().flatten(1)
    flat = torch.where(flat.isnan(), -math.inf, flat)
    order = flat.gather(1, ties).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(flat.shape[1], dtype=torch.int32, device=ties.device)
    ranks = torch.empty_like(ties, dtype=torch.int32)
    return ranks.scatter_(1, ties.gather(1, order), places.expand_as(ranks))


def baseline_maps(network: TrainedNetwork, batch: Tensor) -> dict[str, Tensor]:
    """Maps (N, H, W) that do not depend on the network."""
    count, _, height, width = batch.shape
    center = torch.from_numpy(center_map(height, width))
    return {
        RANDOM: torch.zeros(count, height, width),
        CENTER: center.expand(count, -1, -1),
        EDGES: edge_map(batch, network.std),
    }


def edge_map(batch: Tensor, std: Sequence[float]) -> Tensor:
    """(N, 3, H, W) normalized by ``std`` -> (N, H, W): the gradient of the luminance, its magnitude
    lightly smoothed."""
    weights = [share * deviation for share, deviation in zip(GRAY_WEIGHTS, std, strict=True)]
    luminance = torch.einsum("nchw,c->nhw", batch, batch.new_tensor(weights))[:, None]
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return blurred(torch.hypot(across, down), EDGE_BLUR)[:, 0]


def blurred(images: Tensor, share: float) -> Tensor:
    """(N, C, H, W) blurred by a Gaussian with a standard deviation of ``share`` of the shorter
    side; the image goes on in the mirror beyond its edges."""
    # imported here: it takes a second or two, and the rest of cam.py does without
    from torchvision.transforms.functional import gaussian_blur

    side = min(images.shape[2:])
    sigma = share * side
    length = 2 * min(math.ceil(3 * sigma), side - 1) + 1  # the mirror is a side deep
    # across, then down: an 80th of the work at 224 px
    across = gaussian_blur(images, [length, 1], [sigma, sigma])
    return gaussian_blur(across, [1, length], [sigma, sigma])


# ---- the probabilities --------------------------------------------------------------------------


def probability_curves(network: TrainedNetwork, batch: Tensor, ranks: Tensor, steps: int) -> Tensor:
    """The curves (M, N, games, fills, steps + 1) of the orders ``ranks`` (M, N, H * W) of a batch
    (N, 3, H, W): at step k of K, k/K of the pixels, rounded up, are replaced or back. On the
    network's device, with ``network.batch_size`` changed images per forward pass."""
    # in a normalized image the mean color is 0
    fills = torch.stack([torch.zeros_like(batch), blurred(batch, BLUR)])
    with eval_no_grad(network.model), torch.no_grad():
        parts = batch.split(network.batch_size)
        untouched, classes = torch.cat([probabilities(network, part) for part in parts]).max(1)
        filled = [class_probabilities(network, fill, classes) for fill in fills]
        between = perturbed(network, batch, fills, classes, ranks, steps)
    shape = between.shape[:-1]
    untouched = untouched[None, :, None].expand(shape[0], -1, len(FILLS))
    filled = torch.stack(filled, 1).expand(shape[0], -1, -1)
    # deletion, then insertion
    first, last = torch.stack([untouched, filled], 2), torch.stack([filled, untouched], 2)
    return torch.cat([first[..., None], between, last[..., None]], -1)


def perturbed(
    network: TrainedNetwork,
    batch: Tensor,
    fills: Tensor,
    classes: Tensor,
    ranks: Tensor,
    steps: int,
) -> Tensor:
    """The probabilities at the steps between the first and the last, (M, N, games, fills,
    steps - 1). The changed images, of any maps, games, fills and steps, are made a forward batch at
    a time."""
    pixels, device = ranks.shape[2], batch.device
    counts = torch.tensor([-(-step * pixels // steps) for step in range(1, steps)], device=device)
    shape = (*ranks.shape[:2], len(GAMES), len(FILLS), steps - 1)
    total, size = math.prod(shape), network.batch_size
    found = [at_least_float32(batch.new_empty(0))]  # all that there is of a single step
    for start in range(0, total, size):
        indices = torch.arange(start, min(start + size, total), device=device)
        order, image, game, fill, step = torch.unravel_index(indices, shape)
        first = ranks[order, image] < counts[step][:, None]
        insertion = game == GAMES.index("insertion")
        replaced = (first ^ insertion[:, None]).view(-1, 1, *batch.shape[2:])
        changed = torch.where(replaced, fills[fill, image], batch[image])
        found.append(class_probabilities(network, changed, classes[image]))
    return torch.cat(found).view(shape)


def class_probabilities(network: TrainedNetwork, images: Tensor, classes: Tensor) -> Tensor:
    """(N, 3, H, W) and a class of each (N,) -> (N,), in forward passes of the network's batch
    size."""
    parts = images.split(network.batch_size)
    found = torch.cat([probabilities(network, part) for part in parts])
    return found.gather(1, classes[:, None])[:, 0]


def probabilities(network: TrainedNetwork, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, classes), on the device. The caller sees to the network's mode."""
    with network.autocast():
        logits = logits_of(network.model, images)
    return at_least_float32(logits).softmax(1)


# ---- as text ------------------------------------------------------------------------------------


TABLE_NOTES = (
    "Deletion: the lower, the better. Insertion: the higher, the better. ± one standard error.",
    "To random: the difference to the random order, image by image. Scattered pixels usually",
    "disturb a network more than as many in one place: compare with the other baselines, too.",
    "The probability is that of the class that the network predicts on the untouched image.",
)
ATTENTION_NOTE = "Attention knows no class: its maps are the same whatever class is asked for."


def table_lines(rows: Sequence[Mapping[str, object]], attention: bool = True) -> list[str]:
    """The rows of ``Faithfulness.table`` as text, in per cent, in 110 columns unless a map has a
    longer name than the baselines. attention: whether to say what attention knows of a class."""
    if not rows:
        return []
    images, name_width = rows[0]["images"], max(len(row["map"]) for row in rows)
    counted = f"{images:,} image{'s' * (images != 1)}"
    titles = ("deletion (low is better)", "insertion (high is better)")
    fills = ("mean color", "blurred")
    lines = [
        f"{counted:<{name_width}} " + " ".join(f"{title:^43}" for title in titles).rstrip(),
        f"{'%':<{name_width}} " + " ".join(f"{fill:^21}" for fill in fills * 2).rstrip(),
        f"{'':<{name_width}} " + " ".join([f"{'area':>10} {'to random':>10}"] * 4),
    ]
    for row in rows:
        cells = " ".join(score_text(row, score) for score in SCORES)
        lines.append(f"{row['map']:<{name_width}} {cells}".rstrip())
    return [*lines, *TABLE_NOTES, *[ATTENTION_NOTE] * attention]


def score_text(row: Mapping[str, object], score: str) -> str:
    """A score and its difference to the random order, each with its standard error."""
    area = with_error(f"{100 * row[score]:.1f}", row[f"{score}_se"])
    difference = ""
    if row["map"] != RANDOM:
        change = row[f"{score}_vs_random"]
        difference = with_error(f"{100 * change:+.1f}", row[f"{score}_vs_random_se"])
    return f"{area:>10} {difference:>10}"


def with_error(text: str, error: float) -> str:
    """A number and its standard error in per cent, in one place; none for a single image."""
    if math.isnan(error):
        return text + " " * 5
    percent = f"{100 * error:.1f}" if 100 * error < 9.95 else f"{100 * error:.0f}"
    return f"{text} ±{percent:<3}"
