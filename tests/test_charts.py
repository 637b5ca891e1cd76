"""Line charts: where points lie, ticks, labels, gaps, outliers."""

import math

import numpy as np
import pytest

from explain.charts import (
    AXIS,
    GRID,
    Line,
    dashes,
    highest_shown,
    label,
    line_chart,
    place_labels,
    tick_texts,
    ticks,
    widened,
)
from explain.pictures import PAPER

RED, BLUE = (200, 0, 0), (0, 0, 200)
SIZE = (600, 300)


def _chart(*columns, colors=(RED, BLUE), dashed=(False, False), **options):
    """A chart of lines of the epochs 1, 2, ..."""
    lines = [
        Line(f"line {number}", list(enumerate(column, start=1)), color, dashed=dash)
        for number, (column, color, dash) in enumerate(zip(columns, colors, dashed, strict=False))
    ]
    return line_chart(lines, size=SIZE, title="Accuracy", **options)


def _is(picture, color, tolerance=60):
    return np.abs(picture.astype(int) - color).max(axis=2) <= tolerance


def _axes(picture):
    """(left, right, top, bottom) of the plot: the ends of the x axis, the highest grid line and
    the row of the axis, in whole pixels."""
    axis = _is(picture, AXIS, 2)
    bottom = int(axis.sum(axis=1).argmax())
    left, right = np.flatnonzero(axis[bottom])[[0, -1]]
    top = int(np.flatnonzero(_is(picture, GRID, 14).sum(axis=1) > 0.7 * (right - left))[0])
    return left, right, top, bottom


def _center(mask):
    rows, columns = np.nonzero(mask)
    return columns.mean(), rows.mean()


# ---- where points lie ---------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "value"), [(2, 25.0), (5, 90.0), (9, 60.0)])
def test_a_point_lies_where_the_scale_says(epoch, value):
    # the red line is a dot; the blue one decides the scale, 0 to 100 over the epochs 0 to 10
    dot = [value if number == epoch else None for number in range(1, 11)]
    picture = _chart(dot, [0.0, *[None] * 8, 100.0])
    left, right, top, bottom = _axes(picture)
    x = left + epoch / 10 * (right - left)
    y = bottom + value / 100 * (top - bottom)
    # besides the dot there are its label and the thin line to it
    around = np.zeros(picture.shape[:2], bool)
    around[:, round(x) - 8 : round(x) + 4] = True
    found_x, found_y = _center(_is(picture, RED) & around)
    assert found_x == pytest.approx(x, abs=1) and found_y == pytest.approx(y, abs=1)


def test_a_line_runs_straight_between_two_points():
    picture = _chart([0.0, 100.0])
    left, right, top, bottom = _axes(picture)
    for share in (0.25, 0.5, 0.75):  # from epoch 1, in the middle, to epoch 2
        column = round(left + (1 + share) / 2 * (right - left))
        rows = np.flatnonzero(_is(picture, RED)[:, column])
        assert rows.mean() == pytest.approx(bottom + share * (top - bottom), abs=1.5)


def test_a_single_epoch_is_a_dot_at_the_right_end():
    picture = _chart([40.0])
    left, right, *_ = _axes(picture)
    rows, columns = np.nonzero(_is(picture, RED, 90)[:, : right + 5])
    assert len(columns) == pytest.approx(math.pi * 3.5**2, rel=0.3)
    assert columns.mean() == pytest.approx(right, abs=1)
    assert np.ptp(rows) <= 8 and np.ptp(columns) <= 8


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_missing_value_leaves_a_gap(missing):
    whole, broken = _chart([50.0] * 10), _chart([50.0] * 4 + [missing] + [50.0] * 5)
    left, right, *_ = _axes(broken)
    columns = [round(left + epoch / 10 * (right - left)) for epoch in (4.1, 5, 5.9)]
    assert _is(whole, RED)[:, columns].any(axis=0).all()
    assert not _is(broken, RED)[:, columns].any()
    others = [round(left + epoch / 10 * (right - left)) for epoch in (2, 3.5, 6.5, 9)]
    assert _is(broken, RED)[:, others].any(axis=0).all()


def test_a_line_that_ends_early_is_led_to_its_label():
    picture = _chart([50.0] * 6 + [None] * 4, [0.0] * 9 + [100.0])
    left, right, *_ = _axes(picture)
    column = _is(picture, RED, 2)[:, round(left + 0.8 * (right - left))]
    assert column.sum() == 1  # thinner than the line
    assert _is(picture, RED, 90)[:, round(left + 0.5 * (right - left))].sum() >= 2


def test_lines_that_coincide_both_show():
    picture = _chart([10.0, 50.0], [10.0, 50.0], dashed=(False, True))
    left, right, *_ = _axes(picture)
    inside = slice(left, right - 5)
    assert _is(picture, RED)[:, inside].sum() > 100 and _is(picture, BLUE)[:, inside].sum() > 100


def test_without_a_finite_value_there_is_no_chart():
    with pytest.raises(ValueError, match="finite"):
        _chart([None, math.nan])
    assert (_chart([None, None], [1.0, 2.0]) == _chart([1.0, 2.0], colors=(BLUE,))).mean() > 0.9


def test_dashes_follow_the_line_and_leave_gaps():
    strokes = dashes([(0.0, 0.0), (10.0, 0.0), (10.0, 25.0)])
    lengths = [
        sum(math.dist(a, b) for a, b in zip(stroke, stroke[1:], strict=False)) for stroke in strokes
    ]
    assert lengths == pytest.approx([7, 7, 7, 0.5])  # every 11.5 of 35
    assert strokes[0] == [(0, 0), (7, 0)]
    # 23 of 35 is 13 down; what is between 11.5 and 18.5 lies on the second side
    assert strokes[1] == [(10, 1.5), (10, 8.5)] and strokes[2][0] == (10, 13)
    bent = dashes([(0.0, 0.0), (4.0, 0.0), (4.0, 5.0)])
    assert bent == [[(0, 0), (4, 0), (4, 3)]]


# ---- scales -------------------------------------------------------------------------------------


def test_ticks_are_round_and_cover_the_range():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        low = rng.normal() * 10 ** rng.uniform(-3, 6)
        high = low + abs(low) * 10 ** rng.uniform(-3, 3)
        found = ticks(low, high)
        step = found[1] - found[0]
        assert 4 <= len(found) <= 6
        assert found[0] <= low + 1e-5 * step and high - 1e-5 * step <= found[-1]
        assert found[0] > low - step and found[-1] < high + step  # no room that nothing needs
        assert np.diff(found) == pytest.approx(step, rel=1e-6)
        leading = float(f"{step:.6e}".split("e")[0])
        assert leading in (1, 2, 2.5, 5)
        assert found[0] / step == pytest.approx(round(found[0] / step), abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (12.7, 95.2, [0, 20, 40, 60, 80, 100]),
        (0.855, 4.02, [0, 1, 2, 3, 4, 5]),
        (0.0, 0.3, [0, 0.1, 0.2, 0.3]),
        (95.0, 100.0, [95, 96, 97, 98, 99, 100]),
    ],
)
def test_ticks_of_some_ranges(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (5, [0, 1, 2, 3, 4, 5]),
        (30, [0, 5, 10, 15, 20, 25, 30]),
        (300, [0, 50, 100, 150, 200, 250, 300]),
        (320, [0, 100, 200, 300, 400]),
    ],
)
def test_ticks_of_epochs_are_whole(epochs, expected):
    assert ticks(0, epochs, most=7, whole=True) == expected


def test_a_constant_has_a_range_within_the_bounds():
    assert widened(100.0, 100.0, (0, 100)) == (95.0, 100.0)
    assert widened(0.0, 0.0, (0, 100)) == (0.0, 0.5)
    assert widened(2.0, 2.0, (0, math.inf)) == pytest.approx((1.9, 2.1))
    assert widened(1.0, 3.0, (0, 100)) == (1.0, 3.0)
    for value in (0.0, 100.0):
        left, right, *_ = _axes(picture := _chart([value] * 5, bounds=(0, 100)))
        assert _is(picture, RED)[:, left + 100 : right].any(axis=0).all()


def test_tick_texts_have_the_decimals_of_the_step():
    assert tick_texts([0.0, 0.1, 0.2, 0.1 * 3]) == ["0.0", "0.1", "0.2", "0.3"]
    assert tick_texts([0, 2.5, 5.0]) == ["0.0", "2.5", "5.0"]
    assert tick_texts([3.7, 3.75, 3.8]) == ["3.70", "3.75", "3.80"]
    assert tick_texts([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert tick_texts([0, 2.5e6, 5e6]) == ["0", "2.5e+06", "5e+06"]


# ---- outliers -----------------------------------------------------------------------------------


def test_a_decay_has_no_outliers_and_a_spike_is_one():
    decay = [0.7 + 4 * 0.8**epoch for epoch in range(60)]
    assert highest_shown(decay) == max(decay)
    assert highest_shown([*decay, 1e6]) == max(decay)
    assert highest_shown([*decay, 1e6, 3e4, 20.0]) == max(decay)
    assert highest_shown([*decay, *[20.0] * 10]) == 20  # too many
    assert highest_shown([1.0, 1.1, 1e6]) == 1e6  # too few to tell


def test_a_spike_leaves_the_scale_as_it_is_and_is_marked():
    values = [4.0 - epoch / 10 for epoch in range(30)]
    spiky = [*values[:9], 1e6, *values[10:]]
    without, clipped = _chart(values, outliers=False), _chart(spiky, outliers=False)
    left, right, top, _ = _axes(without)
    assert _axes(clipped) == (left, right, top, _axes(without)[3])
    after = slice(round(left + 12 / 30 * (right - left)), right)
    assert (without[30:, after] == clipped[30:, after]).all()
    x = round(left + 10 / 30 * (right - left))
    assert not _is(without, RED)[top - 6 : top, x - 4 : x + 4].any()
    assert _is(clipped, RED)[top - 6 : top, x - 4 : x + 4].sum() > 8  # the arrowhead
    note = slice(0, 25), slice(SIZE[0] - 150, SIZE[0])
    assert (without[note] == PAPER).all() and (clipped[note] != PAPER).any()
    # where the scale has to reach it, the rest is squeezed
    whole = _chart(spiky)
    heights = [np.nonzero(_is(chart, RED)[:, 300:450])[0] for chart in (whole, clipped)]
    assert np.ptp(heights[0]) < 5 < 40 < np.ptp(heights[1])


# ---- labels -------------------------------------------------------------------------------------


def test_labels_never_overlap_and_lie_as_near_as_they_can():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = rng.integers(1, 6)
        wanted = rng.uniform(0, 200, count) if rng.random() < 0.5 else rng.normal(100, 8, count)
        placed = np.array(place_labels(wanted, 20, 0, 200))
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(placed[order]) >= 20 - 1e-9).all()
        assert placed.min() >= 0 and placed.max() <= 200
        cost = ((placed - wanted) ** 2).sum()
        # no other places are better: labels with random room between them
        room = rng.dirichlet(np.ones(count + 1), 200)[:, :-1].cumsum(1) * (200 - 20 * (count - 1))
        others = room + 20 * np.arange(count)
        assert (((others - wanted[order]) ** 2).sum(1) >= cost - 1e-9).all()
        nearby = placed[order] + rng.normal(0, 1, (200, count))
        allowed = (np.diff(nearby) >= 20).all(1) & (nearby.min(1) >= 0) & (nearby.max(1) <= 200)
        assert (((nearby[allowed] - wanted[order]) ** 2).sum(1) >= cost - 1e-9).all()


def test_a_label_has_the_last_value_or_the_one_given():
    points = [(0, 1.0), (1, 2.25), (2, None)]
    assert label(Line("a", points, RED), 2) == "2.25  a"
    assert label(Line("a", points, RED, value=0.0), 1) == "0.0  a"


def test_labels_stay_where_there_is_room():
    assert place_labels([90.0, 10.0, 50.0], 20, 0, 100) == [90, 10, 50]
    assert place_labels([50.0, 54.0], 20, 0, 100) == [42, 62]
    assert place_labels([3.0, 1.0], 20, 0, 100) == [20, 0]
    assert place_labels([99.0, 99.0, 99.0], 20, 0, 100) == [60, 80, 100]
    assert place_labels([5.0, 5.0, 5.0], 20, 0, 30) == [0, 20, 40]  # no room for three


def test_the_labels_of_lines_with_one_end_stand_apart():
    picture = _chart([10.0, 50.0], [20.0, 50.1])
    right = _axes(picture)[1]
    rows = [np.flatnonzero(_is(picture, c, 90)[:, right + 20 :].any(axis=1)) for c in (RED, BLUE)]
    assert len(rows[0]) > 5 and len(rows[1]) > 5
    assert rows[1].max() < rows[0].min()  # the higher value is higher


def test_no_text_is_cut_off_at_the_edges():
    for columns in ([[1e9, 5e9]], [[99.9, 100.0]] * 2, [[0.0001, 0.0002]], [[1.0] * 1500]):
        picture = _chart(*columns)
        assert picture.shape == (300, 600, 3)
        assert (picture[:, -1] == PAPER).all() and (picture[-1] == PAPER).all()
