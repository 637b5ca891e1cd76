"""explain/metrics.py: the measures by hand and against brute force."""

import numpy as np
import pytest
from PIL import Image

from explain.metrics import (
    CENTER,
    IOUS,
    THRESHOLDS,
    UNIFORM,
    Measures,
    best_ious,
    component_boxes,
    energy_in_box,
    nearest_parts,
    pointing_game,
)


def flood_boxes(mask):
    """Components by walking from pixel to pixel: the boxes as a sorted list."""
    left, boxes = {(y, x) for y, x in np.argwhere(mask)}, []
    while left:
        stack, part = [left.pop()], []
        while stack:
            y, x = stack.pop()
            part.append((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    stack.append(near)
        ys, xs = zip(*part, strict=True)
        boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return sorted(boxes)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0])
def test_component_boxes_are_those_of_a_flood_fill(density):
    random = np.random.default_rng(int(10 * density))
    for height, width in ((1, 1), (1, 9), (9, 1), (12, 17), (30, 30)):
        masks = random.random((5, height, width)) < density
        boxes, owner = component_boxes(masks)
        for i, mask in enumerate(masks):
            assert sorted(map(tuple, boxes[owner == i].tolist())) == flood_boxes(mask)


def test_component_boxes_of_long_winding_parts():
    spiral, snake = np.zeros((2, 41, 41), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    for ring in range(0, 20, 2):
        spiral[ring, ring : 41 - ring] = spiral[40 - ring, ring : 41 - ring] = True
        spiral[ring : 41 - ring, ring] = spiral[ring : 41 - ring, 40 - ring] = True
    for mask in (snake, spiral):
        assert sorted(map(tuple, component_boxes(mask[None])[0].tolist())) == flood_boxes(mask)


def test_measures_by_hand():
    maps = np.zeros((3, 8, 10))
    maps[0, 2, 3] = maps[0, 7, 9] = 1  # two peaks, one in the box
    maps[1, 4:6, 1:4] = 1  # the box, and a little one outside of it
    maps[1, 0, 9] = 1
    # the third map is empty: a uniform one
    boxes = np.array([[2, 1, 5, 4], [1, 4, 4, 6], [0, 0, 5, 4]], float)
    assert pointing_game(maps, boxes) == pytest.approx([0.5, 6 / 7, 0.25])
    assert energy_in_box(maps, boxes) == pytest.approx([0.5, 6 / 7, 0.25])
    ious = best_ious(maps, boxes, [0.0, 0.5])
    assert ious == pytest.approx(np.array([[9 / 80, 1 / 9], [6 / 80, 1], [0.25, 0.25]]))


def test_max_box_acc_v2_against_brute_force():
    random = np.random.default_rng(3)
    maps = np.stack(
        [
            np.asarray(
                Image.fromarray(random.random((4, 4)).astype(np.float32)).resize((12, 10), 2)
            )
            for _ in range(6)
        ]
    )
    peak = np.array([divmod(each.argmax(), 12)[::-1] for each in maps])
    boxes = (
        np.concatenate([peak - 2, peak + random.integers(1, 4, (6, 2))], 1)
        .clip(0, (12, 10, 12, 10))
        .astype(float)
    )
    measures = Measures()
    for some in (slice(0, 4), slice(4, 6)):
        measures.add({"random": maps[some]}, boxes[some], None)
    row = measures.table()[0]
    expected = []
    for least in IOUS:
        accuracy = []
        for threshold in THRESHOLDS:
            right = 0
            for values, box in zip(maps.astype(float), boxes, strict=True):
                values = (values - values.min()) / (values.max() - values.min())
                filled = np.zeros((10, 12), int)
                filled[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 1
                best = 0
                for x0, y0, x1, y1 in flood_boxes(values >= threshold):
                    found = np.zeros((10, 12), int)
                    found[y0:y1, x0:x1] = 1
                    best = max(best, (found & filled).sum() / (found | filled).sum())
                right += best >= least
            accuracy.append(right / 6)
        assert row[f"box_acc_iou_{least}"] == pytest.approx(max(accuracy))
        assert accuracy[list(THRESHOLDS).index(row[f"threshold_iou_{least}"])] == max(accuracy)
        expected.append(max(accuracy))
    assert (
        row["max_box_acc_v2"] == pytest.approx(np.mean(expected))
        and 0.1 < row["max_box_acc_v2"] < 1
    )


def test_chance_is_the_boxs_share_of_the_area_and_parts_share_the_picture():
    boxes = np.array([[2, 0, 6, 5], [0, 0, 10, 4]], float)
    parts = np.array([[[1, 4, 1], [9, 4, 1], [5, 4, 0]], [[0, 0, 0], [0, 0, 0], [5, 4, 1]]], float)
    measures, peak = Measures(), np.zeros((2, 8, 10))
    peak[0, 4, 7] = peak[1, 0, 0] = 1
    measures.add({"peak": peak}, boxes, parts)
    rows = {row["map"]: row for row in measures.table()}
    assert (
        rows[UNIFORM]["pointing_game"]
        == rows[UNIFORM]["energy_in_box"]
        == pytest.approx((0.25 + 0.5) / 2)
    )
    # of the four pixels in the middle
    assert rows[CENTER]["pointing_game"] == pytest.approx((1 + 0.5) / 2)
    assert rows["peak"]["images"] == 2
    shares = {
        row["map"]: [row[name] for name in ("left", "right", "middle")]
        for row in measures.part_table(("left", "right", "middle"))
    }
    assert shares["peak"] == [0, 0.5, 0.5] and shares[UNIFORM] == pytest.approx([0.25, 0.25, 0.5])
    blind = nearest_parts(np.ones((1, 8, 10)), np.zeros((1, 3, 3)))
    assert not np.any(blind)
