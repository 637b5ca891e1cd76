"""How well maps find the object: pointing game, energy in the box, MaxBoxAccV2, and the part
nearest to the peak.

Maps are (N, H, W) non-negative floats, boxes (N, 4) x0 y0 x1 y1 and parts (N, P, 3) x y visible, in
pixels of the map. A pixel is located at its center. A constant map points everywhere at once: its
score is that of chance, not that of the corner where a search for the maximum would start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

IOUS = (0.3, 0.5, 0.7)  # averaged by MaxBoxAccV2
# From the map's lowest (0) to its highest value (1). The small ones are for attention maps, which
# are so peaked that an object's outline may lie below a hundredth of the peak.
THRESHOLDS = np.concatenate([[0], np.logspace(-6, -2, 17), np.arange(2, 100) / 100])
UNIFORM, CENTER = "chance (uniform map)", "center of the picture"
CENTER_SD = 0.25  # of the center map, a Gaussian, as a fraction of each side


# ---- the measures of a set ----------------------------------------------------------------------


class Measures:
    """Collects the measures of a set of images, batch by batch, and of two baseline maps that do
    not depend on the image."""

    def __init__(self) -> None:
        self.scores: dict[str, list[tuple[np.ndarray, ...]]] = {}
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(
        self, maps: Mapping[str, np.ndarray], boxes: np.ndarray, parts: np.ndarray | None
    ) -> None:
        """Add a batch: maps of each kind (N, H, W), boxes (N, 4), parts (N, P, 3) or None."""
        height, width = next(iter(maps.values())).shape[1:]
        baselines = {UNIFORM: np.ones((height, width)), CENTER: center_map(height, width)}
        everywhere = (len(boxes), height, width)
        maps = dict(maps) | {
            name: np.broadcast_to(baseline, everywhere) for name, baseline in baselines.items()
        }
        for name, batch in maps.items():
            self.scores.setdefault(name, []).append(
                (pointing_game(batch, boxes), energy_in_box(batch, boxes), best_ious(batch, boxes))
            )
            if parts is not None:
                self.parts.setdefault(name, []).append(nearest_parts(batch, parts)[0])

    def table(self) -> list[dict[str, object]]:
        """A row per kind of map: its name, scores in [0, 1], and the thresholds that were best on
        this set."""
        rows = []
        for name, batches in self.scores.items():
            pointing, energy, ious = map(np.concatenate, zip(*batches, strict=True))
            # accuracy at each threshold
            accuracies = {min_iou: (ious >= min_iou).mean(0) for min_iou in IOUS}
            row = {
                "map": name,
                "images": len(pointing),
                "pointing_game": pointing.mean(),
                "energy_in_box": energy.mean(),
                "max_box_acc_v2": np.mean([accuracy.max() for accuracy in accuracies.values()]),
            }
            for min_iou, accuracy in accuracies.items():
                row[f"box_acc_iou_{min_iou}"] = accuracy.max()
                row[f"threshold_iou_{min_iou}"] = THRESHOLDS[accuracy.argmax()]
            rows.append(row)
        return rows

    def part_table(self, part_names: Sequence[str]) -> list[dict[str, object]]:
        """A row per kind of map: the fraction of images whose peak is nearest to each part."""
        rows = []
        for name, batches in self.parts.items():
            votes = np.concatenate(batches)
            votes = votes[votes.sum(1) > 0]
            fractions = votes.mean(0) if len(votes) else np.zeros(len(part_names))
            by_part = dict(zip(part_names, fractions, strict=True))
            rows.append({"map": name, "images": len(votes), **by_part})
        return rows


def center_map(height: int, width: int) -> np.ndarray:
    """(H, W): a Gaussian in the middle, all that is known of photographs without seeing them."""
    y, x = ((np.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    return np.exp(-(y[:, None] ** 2 + x**2) / (2 * CENTER_SD**2))


# ---- as text ------------------------------------------------------------------------------------


def table_lines(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The rows of ``Measures.table`` as text, in per cent."""
    ious = " ".join(f"{min_iou:>15}" for min_iou in IOUS)
    lines = [
        f"{'':<22} {'pointing':>8} {'energy':>7} {'MaxBox-':>8}   {'box right at IoU':^47}",
        f"{'%':<22} {'game':>8} {'in box':>7} {'AccV2':>8}   {ious}",
    ]
    for row in rows:
        pointing, energy = 100 * row["pointing_game"], 100 * row["energy_in_box"]
        average = 100 * row["max_box_acc_v2"]
        accuracies = (
            f"{100 * row[f'box_acc_iou_{min_iou}']:.1f} ({row[f'threshold_iou_{min_iou}']:.2g})"
            for min_iou in IOUS
        )
        lines.append(
            f"{row['map']:<22} {pointing:8.1f} {energy:7.1f} {average:8.1f}   "
            + " ".join(f"{accuracy:>15}" for accuracy in accuracies)
        )
    lines.append(
        "In brackets the threshold (0 to 1) that is best on these same images: "
        "chosen with their boxes."
    )
    return lines


def part_lines(rows: Sequence[Mapping[str, object]], part_names: Sequence[str]) -> list[str]:
    """The rows of ``Measures.part_table`` as text, in per cent: a line per part, a column per kind
    of map."""
    corner = "peak nearest to, %"
    first_width = max(len(name) for name in (*part_names, corner))
    widths = [max(7, len(row["map"])) for row in rows]

    def line(first: str, cells: Sequence[str]) -> str:
        columns = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{first:<{first_width}}  " + "  ".join(columns)

    lines = [line(corner, [row["map"] for row in rows])]
    lines += [line(name, [f"{100 * row[name]:.1f}" for row in rows]) for name in part_names]
    return [*lines, f"Of {rows[0]['images']:,} images, visible parts only."]


# ---- the measures, image by image ---------------------------------------------------------------


def pointing_game(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,): 1 if the highest pixel lies in the box, else 0; a fraction if several are highest
    (arXiv 1608.00507, without its tolerance of 15 pixels)."""
    return (peaks(maps) * inside(boxes, *maps.shape[1:])).sum((1, 2))


def energy_in_box(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,): the fraction of the map's sum that lies in the box (arXiv 1910.01279); a map of zeros
    counts as a uniform one."""
    maps = maps.astype(np.float64)
    sums = maps.sum((1, 2), keepdims=True)
    energy = np.where(sums > 0, maps, 1.0) / np.where(sums > 0, sums, maps[0].size)
    return (energy * inside(boxes, *maps.shape[1:])).sum((1, 2))


def best_ious(
    maps: np.ndarray, boxes: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> np.ndarray:
    """(N, T): for each image and threshold the IoU between its box and the best of the boxes around
    the connected components of the map at the threshold (what MaxBoxAccV2 compares, arXiv
    2007.04178). Thresholds go from 0, the map's lowest value, to 1, its highest."""
    result = np.zeros((len(maps), len(thresholds)))
    levels = np.asarray(thresholds)[:, None, None]
    for row, values, box in zip(result, maps.astype(np.float64), boxes, strict=True):
        values = values - values.min()
        found, threshold = component_boxes(values[None] >= levels * values.max())
        np.maximum.at(row, threshold, iou(found, box))
    return result


def nearest_parts(maps: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which visible part the peak is nearest to: (N, P) that sum to 1 over the parts, and the same
    for a peak at a random pixel. All 0 for an image without a visible part."""
    height, width = maps.shape[1:]
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    found, chance = np.zeros(parts.shape[:2]), np.zeros(parts.shape[:2])
    for i, peak in enumerate(peaks(maps)):
        visible = np.flatnonzero(parts[i, :, 2] > 0)
        if len(visible):
            distances = [(x - px) ** 2 + (y - py) ** 2 for px, py, _ in parts[i, visible]]
            nearest = visible[np.argmin(distances, 0)].reshape(-1)
            found[i] = np.bincount(nearest, peak.reshape(-1), parts.shape[1])
            chance[i] = np.bincount(nearest, minlength=parts.shape[1]) / nearest.size
    return found, chance


def peaks(maps: np.ndarray) -> np.ndarray:
    """(N, H, W) -> (N, H, W) that sum to 1: equal values at the highest pixels, else 0."""
    highest = maps == maps.max((1, 2), keepdims=True)
    return highest / highest.sum((1, 2), keepdims=True)


def inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) -> (N, H, W) bool: the pixels whose center lies in the box."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def iou(found: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (K, 4) and a box (4,) -> (K,)."""
    corner, end = np.maximum(found[:, :2], box[:2]), np.minimum(found[:, 2:], box[2:])
    common = (end - corner).clip(0).prod(1)
    return common / ((found[:, 2:] - found[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - common)


def component_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tightest box around each connected component (8 neighbors) of masks (M, H, W) bool: boxes
    (K, 4) int64 x0 y0 x1 y1, and (K,) the index of each one's mask.

    All masks at once: rows of pixels are cut into runs, and runs that touch in adjacent rows are
    joined: each takes the smallest label among its neighbors until nothing changes."""
    count, height, width = masks.shape
    # an empty row and columns separate the rows and masks
    padded = np.zeros((count, height + 1, width + 2), np.int8)
    padded[:, :height, 1:-1] = masks
    steps = np.diff(padded.reshape(-1))
    # of each run, in padded pixels
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    below = width + 2  # from a pixel to the one below it
    # the runs in the row below that touch, corners included: from first to before last
    first = np.searchsorted(ends, starts + below, "left")
    last = np.searchsorted(starts, ends + below, "right")
    touching = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching - first, touching)
    roots, component = np.unique(_joined(len(starts), upper, lower), return_inverse=True)

    mask, position = np.divmod(starts, (height + 1) * below)
    y, x0 = np.divmod(position, below)
    x1 = x0 + ends - starts
    boxes = np.zeros((len(roots), 4), int)
    boxes[:, :2] = width, height
    np.minimum.at(boxes[:, 0], component, x0)
    np.minimum.at(boxes[:, 1], component, y)
    np.maximum.at(boxes[:, 2], component, x1)
    np.maximum.at(boxes[:, 3], component, y + 1)
    return boxes, mask[roots]


def _joined(count: int, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The smallest index that each of ``count`` runs is connected to, by pairs (E,) that touch."""
    label = np.arange(count)
    while True:
        smallest, before = np.minimum(label[upper], label[lower]), label.copy()
        np.minimum.at(label, before[upper], smallest)
        np.minimum.at(label, before[lower], smallest)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(label, before):
            return label
