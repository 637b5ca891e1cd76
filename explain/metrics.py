"""How well maps find the object: pointing game, energy in the box, MaxBoxAccV2, and the part
nearest to the peak.

Maps are (N, H, W) floats of 0 or more, boxes (N, 4) x0 y0 x1 y1 and parts (N, P, 3) x y visible, in
pixels of the map. A pixel is where its centre is. A map without a largest value points everywhere
at once, so that it scores what chance does, and not what the corner does in which a search for the
maximum would begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

IOUS = (0.3, 0.5, 0.7)  # that MaxBoxAccV2 averages over
# Of the map between its lowest (0) and highest value (1). The small ones are for attention maps,
# which are so peaked that an object's outline may lie below a hundredth of the peak.
THRESHOLDS = np.concatenate([[0], np.logspace(-6, -2, 17), np.arange(2, 100) / 100])
UNIFORM, CENTER = "chance (uniform map)", "centre of the picture"
CENTER_SD = 0.25  # of the centre map, a Gaussian, as a share of the sides


# ---- the measures, image by image ---------------------------------------------------------------


def inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) -> (N, H, W) bool: the pixels whose centre the box holds."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def peaks(maps: np.ndarray) -> np.ndarray:
    """(N, H, W) -> (N, H, W) that sum to 1: the highest pixels, each an equal share."""
    highest = maps == maps.max((1, 2), keepdims=True)
    return highest / highest.sum((1, 2), keepdims=True)


def pointing_game(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,): 1 where the highest pixel lies in the box, else 0; between them where several are
    highest (arXiv 1608.00507, without its tolerance of 15 pixels)."""
    return (peaks(maps) * inside(boxes, *maps.shape[1:])).sum((1, 2))


def energy_in_box(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,): the share of the map's sum that lies in the box (arXiv 1910.01279); a map of zeros
    counts as a uniform one."""
    maps = maps.astype(np.float64)
    sums = maps.sum((1, 2), keepdims=True)
    shares = np.where(sums > 0, maps, 1.0) / np.where(sums > 0, sums, maps[0].size)
    return (shares * inside(boxes, *maps.shape[1:])).sum((1, 2))


def best_ious(
    maps: np.ndarray, boxes: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> np.ndarray:
    """(N, T): for each image and threshold the IoU between its box and the best of the boxes around
    the connected parts of the map that reach the threshold (what MaxBoxAccV2 compares, arXiv
    2007.04178). A threshold is a share of the way from the map's lowest value to its highest."""
    result = np.zeros((len(maps), len(thresholds)))
    levels = np.asarray(thresholds)[:, None, None]
    for row, values, box in zip(result, maps.astype(np.float64), boxes, strict=True):
        values = values - values.min()
        found, owner = component_boxes(values[None] >= levels * values.max())
        np.maximum.at(row, owner, iou(found, box))
    return result


def iou(found: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (K, 4) and a box (4,) -> (K,)."""
    corner, end = np.maximum(found[:, :2], box[:2]), np.minimum(found[:, 2:], box[2:])
    common = (end - corner).clip(0).prod(1)
    return common / ((found[:, 2:] - found[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - common)


def component_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tightest box around each connected part (8 neighbours) of masks (M, H, W) bool: boxes (K,
    4) int64 x0 y0 x1 y1, and (K,) the mask that each is from.

    All masks at once: rows of pixels are cut into runs, runs of neighbouring rows that touch are
    joined, and each run takes the smallest number among its neighbours until nothing changes."""
    count, height, width = masks.shape
    # an empty row and columns keep apart what is apart
    padded = np.zeros((count, height + 1, width + 2), np.int8)
    padded[:, :height, 1:-1] = masks
    steps = np.diff(padded.reshape(-1))
    # of each run, in padded pixels
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    below = width + 2  # from a pixel to the one under it
    # of the runs in the row below that touch, corners too
    first = np.searchsorted(ends, starts + below, "left")
    last = np.searchsorted(starts, ends + below, "right")
    touching = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching - first, touching)
    part = np.arange(len(starts))
    while True:
        smallest, before = np.minimum(part[upper], part[lower]), part.copy()
        np.minimum.at(part, before[upper], smallest)
        np.minimum.at(part, before[lower], smallest)
        while not np.array_equal(part, part[part]):
            part = part[part]
        if np.array_equal(part, before):
            break
    names, part = np.unique(part, return_inverse=True)
    mask, place = np.divmod(starts, (height + 1) * below)
    y, x0 = np.divmod(place, below)
    x1 = x0 + ends - starts
    boxes = np.stack(
        [np.full(len(names), width), np.full(len(names), height), *np.zeros((2, len(names)), int)],
        1,
    )
    for column, (join, values) in enumerate(
        ((np.minimum, x0), (np.minimum, y), (np.maximum, x1), (np.maximum, y + 1))
    ):
        join.at(boxes[:, column], part, values)
    return boxes, mask[names]


def nearest_parts(maps: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which visible part the peak is nearest to: (N, P) that sum to 1 over the parts, and the same
    for a peak that may be anywhere with equal chance. All 0 for an image without a visible part."""
    height, width = maps.shape[1:]
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    found, chance = (np.zeros(parts.shape[:2]) for _ in range(2))
    for i, peak in enumerate(peaks(maps)):
        visible = np.flatnonzero(parts[i, :, 2] > 0)
        if len(visible):
            distances = [(x - px) ** 2 + (y - py) ** 2 for px, py, _ in parts[i, visible]]
            nearest = visible[np.argmin(distances, 0)].reshape(-1)
            found[i] = np.bincount(nearest, peak.reshape(-1), parts.shape[1])
            chance[i] = np.bincount(nearest, minlength=parts.shape[1]) / nearest.size
    return found, chance


# ---- the measures of a set ----------------------------------------------------------------------


class Measures:
    """Collects the measures of a set of images, a batch at a time, and of two maps that have not
    looked at them."""

    def __init__(self):
        self.scores: dict[str, list[tuple[np.ndarray, ...]]] = {}
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(
        self, maps: Mapping[str, np.ndarray], boxes: np.ndarray, parts: np.ndarray | None
    ) -> None:
        """A batch: maps of each kind (N, H, W), boxes (N, 4), parts (N, P, 3) or None."""
        height, width = next(iter(maps.values())).shape[1:]
        blind = {UNIFORM: np.ones((height, width)), CENTER: center_map(height, width)}
        maps = dict(maps) | {
            name: np.broadcast_to(each, (len(boxes), height, width)) for name, each in blind.items()
        }
        for name, each in maps.items():
            self.scores.setdefault(name, []).append(
                (pointing_game(each, boxes), energy_in_box(each, boxes), best_ious(each, boxes))
            )
            if parts is not None:
                self.parts.setdefault(name, []).append(nearest_parts(each, parts)[0])

    def table(self) -> list[dict[str, object]]:
        """A row for each kind of map: its name, shares from 0 to 1, and the thresholds that were
        best on this set."""
        rows = []
        for name, batches in self.scores.items():
            pointing, energy, ious = (
                np.concatenate(column) for column in zip(*batches, strict=True)
            )
            row = {
                "map": name,
                "images": len(pointing),
                "pointing_game": pointing.mean(),
                "energy_in_box": energy.mean(),
            }
            best = {least: (ious >= least).mean(0) for least in IOUS}
            row["max_box_acc_v2"] = np.mean([right.max() for right in best.values()])
            for least, right in best.items():
                row |= {
                    f"box_acc_iou_{least}": right.max(),
                    f"threshold_iou_{least}": THRESHOLDS[right.argmax()],
                }
            rows.append(row)
        return rows

    def part_table(self, part_names: Sequence[str]) -> list[dict[str, object]]:
        """A row for each kind of map: the share of images whose peak is nearest to each part."""
        rows = []
        for name, batches in self.parts.items():
            votes = np.concatenate(batches)
            votes = votes[votes.sum(1) > 0]
            shares = votes.mean(0) if len(votes) else np.zeros(len(part_names))
            rows.append(
                {"map": name, "images": len(votes), **dict(zip(part_names, shares, strict=True))}
            )
        return rows


def center_map(height: int, width: int) -> np.ndarray:
    """(H, W): a Gaussian in the middle, what one knows of photographs without looking at them."""
    y, x = ((np.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    return np.exp(-(y[:, None] ** 2 + x**2) / (2 * CENTER_SD**2))


# ---- as text ------------------------------------------------------------------------------------


def table_lines(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The table of Measures.table for people, in per cent."""
    lines = [
        f"{'':<22} {'pointing':>8} {'energy':>7} {'MaxBox-':>8}   {'box right at IoU':^47}",
        f"{'%':<22} {'game':>8} {'in box':>7} {'AccV2':>8}   "
        + " ".join(f"{least:>15}" for least in IOUS),
    ]
    for row in rows:
        boxes = (
            f"{100 * row[f'box_acc_iou_{least}']:.1f} ({row[f'threshold_iou_{least}']:.2g})"
            for least in IOUS
        )
        lines.append(
            f"{row['map']:<22} {100 * row['pointing_game']:8.1f} {100 * row['energy_in_box']:7.1f} "
            f"{100 * row['max_box_acc_v2']:8.1f}   " + " ".join(f"{each:>15}" for each in boxes)
        )
    return [
        *lines,
        "In brackets the threshold (0 to 1) that is best on these same images: chosen with their boxes.",
    ]


def part_lines(rows: Sequence[Mapping[str, object]], part_names: Sequence[str]) -> list[str]:
    """The table of Measures.part_table for people, in per cent, parts downwards."""
    wide = max(len(name) for name in (*part_names, "peak nearest to, %"))
    columns = [max(7, len(row["map"])) for row in rows]
    lines = [
        f"{'peak nearest to, %':<{wide}}  "
        + "  ".join(f"{row['map']:>{c}}" for row, c in zip(rows, columns, strict=True))
    ]
    for name in part_names:
        lines.append(
            f"{name:<{wide}}  "
            + "  ".join(f"{100 * row[name]:{c}.1f}" for row, c in zip(rows, columns, strict=True))
        )
    return [*lines, f"Of {rows[0]['images']:,} images, visible parts only."]
