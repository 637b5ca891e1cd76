"""explain/faithfulness.py: deletion and insertion against a few-line reference in float64."""

import gc
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explain import faithfulness
from explain.faithfulness import (
    BASELINES,
    BLUR,
    EDGE_BLUR,
    EDGES,
    RANDOM,
    SCORES,
    Faithfulness,
    blurred,
    edge_map,
    pixel_ranks,
    random_orders,
    table_lines,
)
from explain.faithfulness_picture import curve_lines, curves_picture
from explain.metrics import CENTER, center_map
from explain.networks import TrainedNetwork
from explain.pictures import PAPER

SIZE = HEIGHT, WIDTH = 9, 14
STEPS = 4  # 126 pixels: steps are no whole numbers of them
STD = (0.2, 0.3, 0.25)


def small_model():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(48, 4),
    )
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model(torch.randn(16, 3, *SIZE).double())  # batch norm normalizes by something
        model[-1].weight *= 20  # probabilities that move
    return model.eval()


def network_of(model, size=SIZE):
    return TrainedNetwork(model, tuple("abcd"), size, (0.5,) * 3, STD, "a test")


def images(count=5):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)).double()


def random_maps(count=5, seed=2):
    return np.random.default_rng(seed).random((count, *SIZE))


def measured(network, batch, maps, steps=STEPS, at_once=None):
    found = Faithfulness(steps)
    for first in range(0, len(batch), at_once or len(batch)):
        part = slice(first, first + (at_once or len(batch)))
        found.add(network, batch[part], {name: values[part] for name, values in maps.items()})
    return found


def row_of(found, name):
    return next(row for row in found.table() if row["map"] == name)


def curve_of(found, name, game, fill):
    wanted = (name, game, fill)
    rows = [row for row in found.curve_rows() if (row["map"], row["game"], row["fill"]) == wanted]
    assert [row["share"] for row in rows] == [k / (len(rows) - 1) for k in range(len(rows))]
    return np.array([row["probability"] for row in rows])


# ---- the reference ------------------------------------------------------------------------------


def slow_blur(plane, sigma):
    """A plane (H, W): the mean over all neighbors, weighted by a Gaussian."""
    radius = math.ceil(3 * sigma)
    at = np.arange(-radius, radius + 1)
    kernel = np.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))
    padded = np.pad(plane, radius, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape)
    return (windows * kernel).sum((2, 3)) / kernel.sum()


def reference(model, image, values, steps=STEPS):
    """The curves of an image (3, H, W) for a map without ties, pixel by pixel: {game_fill}."""
    order = sorted(np.ndindex(*SIZE), key=lambda pixel: -values[pixel])
    predicted = int(model(image[None]).argmax())
    blur = torch.from_numpy(np.stack([slow_blur(plane, BLUR * HEIGHT) for plane in image.numpy()]))
    fills, curves = {"mean": torch.zeros_like(image), "blurred": blur}, {}
    for fill_name, fill in fills.items():
        for game, start, end in (("deletion", image, fill), ("insertion", fill, image)):
            curve = []
            for step in range(steps + 1):
                changed = start.clone()
                for y, x in order[: math.ceil(step * len(order) / steps)]:
                    changed[:, y, x] = end[:, y, x]
                curve.append(float(model(changed[None]).softmax(1)[0, predicted]))
            curves[f"{game}_{fill_name}"] = np.array(curve)
    return curves


def area_of(curve):
    return sum((a + b) / 2 for a, b in zip(curve, curve[1:], strict=False)) / (len(curve) - 1)


# ---- equality -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_curves_and_areas_are_those_of_replacing_pixel_by_pixel(steps):
    model, batch, maps = small_model(), images(), random_maps()
    found = measured(network_of(model), batch, {"map": maps}, steps)
    expected = [reference(model, *pair, steps) for pair in zip(batch, maps, strict=True)]
    row = row_of(found, "map")
    assert row["images"] == 5
    for score in SCORES:
        curves = np.stack([curves[score] for curves in expected])
        assert np.ptp(curves.mean(0)) > 0.05  # something happens
        ours = curve_of(found, "map", *score.split("_"))
        np.testing.assert_allclose(ours, curves.mean(0), atol=1e-12)
        areas = np.array([area_of(curve) for curve in curves])
        assert row[score] == pytest.approx(areas.mean(), abs=1e-12)
        assert row[f"{score}_se"] == pytest.approx(areas.std(ddof=1) / 5**0.5, abs=1e-12)


@torch.no_grad()
def test_the_difference_to_the_random_order_is_paired_by_image():
    model, batch, maps = small_model(), images(), random_maps()
    row = row_of(measured(network_of(model), batch, {"map": maps}), "map")
    by_chance = -random_orders(0, 5, HEIGHT * WIDTH).argsort(1).view(5, *SIZE).numpy()
    for score in SCORES:
        areas, random = (
            np.array(
                [area_of(reference(model, *pair)[score]) for pair in zip(batch, m, strict=True)]
            )
            for m in (maps, by_chance)
        )
        difference = areas - random
        assert row[f"{score}_vs_random"] == pytest.approx(difference.mean(), abs=1e-12)
        error = difference.std(ddof=1) / 5**0.5
        assert row[f"{score}_vs_random_se"] == pytest.approx(error, abs=1e-12)


@torch.no_grad()
def test_the_edges_are_the_smoothed_gradient_of_the_luminance():
    batch = images(2)
    red, green, blue = (batch[:, c].numpy() * STD[c] for c in range(3))
    luminance = np.pad(0.299 * red + 0.587 * green + 0.114 * blue, ((0, 0), (1, 1), (1, 1)), "edge")
    across = luminance[:, 1:-1, 2:] - luminance[:, 1:-1, :-2]
    down = luminance[:, 2:, 1:-1] - luminance[:, :-2, 1:-1]
    gradient = np.sqrt(across**2 + down**2)
    expected = [slow_blur(plane, EDGE_BLUR * HEIGHT) for plane in gradient]
    np.testing.assert_allclose(edge_map(batch, STD), np.stack(expected), atol=1e-12)


def test_baselines_are_the_maps_that_they_name():
    batch = images()
    center = np.broadcast_to(center_map(*SIZE), (5, *SIZE)).copy()
    maps = {"center": center, "edges": edge_map(batch, STD), "none": np.zeros((5, *SIZE))}
    rows = {row["map"]: row for row in measured(network_of(small_model()), batch, maps).table()}
    assert list(rows) == [*maps, *BASELINES]
    for ours, baseline in zip(maps, (CENTER, EDGES, RANDOM), strict=True):
        assert rows[ours] == rows[baseline] | {"map": ours}


@pytest.mark.parametrize("side", [1, 2, 5, 32, 224])
def test_the_blurred_fill_hides_a_checkerboard_at_any_size(side):
    squares = torch.arange(side) * 4 // max(side, 4) % 2
    board = (squares[:, None] ^ squares).double().expand(1, 3, -1, -1)
    assert blurred(board, BLUR).shape == board.shape
    if side >= 32:
        middle = blurred(board, BLUR)[..., side // 4 : -side // 4, side // 4 : -side // 4]
        # of 1: what a Gaussian leaves of the first wave of a square one, across and down
        left = (4 / math.pi * math.exp(-2 * (math.pi * BLUR / 0.5) ** 2)) ** 2
        assert float(middle.max() - middle.min()) == pytest.approx(left, abs=0.01) and left < 0.14
        assert float(blurred(board, 5 / 224).max()) > 0.9  # the paper's leaves it


# ---- order --------------------------------------------------------------------------------------


def test_equal_values_are_taken_in_the_order_given_and_nan_last():
    ties = torch.tensor([[3, 0, 5, 1, 4, 2], [5, 4, 3, 2, 1, 0]])
    nan = math.nan
    maps = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 1.0, 0.0]], [[nan, 2.0, nan], [-1.0, 0.0, 2.0]]])
    # of the first: 1 and 4 at 1.0, then 3 at 0.5, then 0, 5, 2; of the second: 5, 1, 4, 3, 2, 0
    expected = torch.tensor([[3, 0, 5, 2, 1, 4], [5, 1, 4, 3, 2, 0]])
    for values in (maps, maps.double(), maps.numpy(), maps.half()):
        assert torch.equal(pixel_ranks(values, ties), expected.int())


def test_random_orders_differ_between_images_and_not_between_batches():
    orders = random_orders(0, 6, 50)
    assert torch.equal(torch.cat([random_orders(0, 4, 50), random_orders(4, 2, 50)]), orders)
    assert torch.equal(orders.sort(1).values, torch.arange(50).expand(6, -1))
    assert len({tuple(order) for order in orders.tolist()}) == 6
    raster = torch.arange(50.0)
    assert all(abs(np.corrcoef(raster, order)[0, 1]) < 0.4 for order in orders)


@pytest.mark.parametrize("value", [0.0, 0.7, math.nan, -math.inf])
def test_a_map_of_one_value_is_the_random_order_exactly(value):
    maps = {"flat": np.full((5, *SIZE), value, np.float32)}
    found = measured(network_of(small_model()), images(), maps)
    assert row_of(found, "flat") == row_of(found, RANDOM) | {"map": "flat"}
    assert all(row_of(found, RANDOM)[f"{score}_vs_random"] == 0 for score in SCORES)


def test_nan_in_a_map_counts_as_its_lowest_value():
    maps = random_maps()
    holes, low = maps.copy(), maps.copy()
    holes[:, 2:5], low[:, 2:5] = math.nan, -1.0
    found = measured(network_of(small_model()), images(), {"holes": holes, "low": low})
    row = row_of(found, "holes")
    assert row == row_of(found, "low") | {"map": "holes"}
    assert all(0 <= row[score] <= 1 for score in SCORES)


# ---- meaning ------------------------------------------------------------------------------------


PATCH = np.s_[:, 4:8, 6:10]  # of 32x48 pixels


class SeesAPatch(nn.Module):
    """Class 1 where the patch is bright, else class 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        evidence = x[:, :, 4:8, 6:10].mean((1, 2, 3)) - 0.5
        return torch.stack([-self.scale * evidence, self.scale * evidence], 1)


def test_the_map_of_what_the_network_sees_wins_and_its_inverse_loses():
    batch = 0.1 * torch.randn(8, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    patch = np.zeros((8, 32, 48), np.float32)
    patch[PATCH] = 1.0
    batch += torch.from_numpy(patch)[:, None]
    network = network_of(SeesAPatch(), (32, 48))
    found = measured(network, batch, {"patch": patch, "other": 1 - patch}, 16)
    rows = {row["map"]: row for row in found.table()}
    for score in SCORES:
        better = 1 if score.startswith("insertion") else -1
        patch, other, *baselines = (
            better * rows[name][score] for name in ("patch", "other", RANDOM, CENTER)
        )
        assert min(patch - score for score in baselines) > 0.25
        assert min(score - other for score in baselines) > 0.25
        for name, sign in (("patch", better), ("other", -better)):
            error = rows[name][f"{score}_vs_random_se"]
            assert sign * rows[name][f"{score}_vs_random"] > 5 * error > 0


# ---- batches, memory, the network ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_numbers_do_not_depend_on_the_batches(monkeypatch, size):
    network, batch, maps = network_of(small_model()), images(9), {"map": random_maps(9)}
    expected = measured(network, batch, maps, 3)
    monkeypatch.setattr(TrainedNetwork, "batch_size", size)
    found = measured(network, batch, maps, 3, at_once=size)
    for ours, theirs in zip(found.table(), expected.table(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    for ours, theirs in zip(found.curve_rows(), expected.curve_rows(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


class Watched(nn.Module):
    """Keeps the sizes of the batches, and the images that are in memory meanwhile."""

    def __init__(self):
        super().__init__()
        self.inner, self.sizes, self.most = small_model(), [], 0

    def forward(self, x):
        self.sizes.append(len(x))
        if len(self.sizes) in (4, 5, 30, 300, 650):  # a look takes a while
            tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.ndim == 4]
            alive = {t.data_ptr(): t.numel() for t in tensors if tuple(t.shape[2:]) == SIZE}
            self.most = max(self.most, sum(alive.values()) / x[0].numel())
        return self.inner(x)


def test_memory_is_that_of_a_few_batches_and_they_are_full(monkeypatch):
    monkeypatch.setattr(TrainedNetwork, "batch_size", 16)
    most = []
    for count, steps in ((1, 4), (8, 16)):
        model = Watched()
        maps = {f"map {number}": random_maps(16, number) for number in range(count)}
        measured(network_of(model), images(16), maps, steps)
        # untouched, two fills, and full batches of all the others
        assert model.sizes == [16] * (3 + (count + 3) * 4 * (steps - 1))
        most.append(model.most)
    assert most[0] == most[1] and 16 < most[0] <= 6 * 16


def test_maps_and_steps_share_the_batches_of_a_few_images(monkeypatch):
    monkeypatch.setattr(TrainedNetwork, "batch_size", 64)
    model = Watched()
    measured(network_of(model), images(2), {"map": random_maps(2)}, 4)
    assert model.sizes == [2, 2, 2, 64, 32]  # 4 maps, 4 curves, 3 steps of 2 images


def state(model):
    return [
        *((module, module.training, dict(module._forward_hooks)) for module in model.modules()),
        *((p.requires_grad, p.grad is None) for p in model.parameters()),
        *(value.clone().tolist() for value in model.state_dict().values()),
    ]


def test_the_network_is_left_as_it_was_also_after_an_error():
    model = small_model().train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before, network = state(model), network_of(model)
    found = measured(network, images(), {"map": random_maps()})
    assert state(model) == before
    first = found.table()
    assert first == measured(network, images(), {"map": random_maps()}).table()  # no dropout
    model[-1].register_forward_pre_hook(lambda module, inputs: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        found.add(network, images(), {"map": random_maps()})
    assert state(model) == before and found.table() == first


def test_tensors_with_gradients_and_of_other_types_are_taken():
    batch, maps = images(), torch.from_numpy(random_maps())
    network = network_of(small_model())
    expected = measured(network, batch, {"map": maps}).table()
    found = measured(network, batch.requires_grad_(), {"map": maps.requires_grad_()})
    assert found.table() == expected and not any(t.requires_grad for t in found.sums.values())
    single = measured(network, images().float(), {"map": random_maps().astype(np.float32)})
    for ours, theirs in zip(single.table(), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_wrong_maps_are_named():
    network, found = network_of(small_model()), Faithfulness(2)
    for maps, words in (
        ({"conv7": random_maps(4)}, r"conv7: expected \(5, 9, 14\), got \(4, 9, 14\)"),
        ({"conv7": random_maps()[:, :, :7]}, r"got \(5, 9, 7\)"),
        ({RANDOM: random_maps()}, "baseline"),
    ):
        with pytest.raises(ValueError, match=words):
            found.add(network, images(), maps)
    with pytest.raises(ValueError, match="batch"):
        found.add(network, images()[0], {})
    found.add(network, images(), {"conv7": random_maps()})
    with pytest.raises(ValueError, match="maps cam: earlier batches had conv7"):
        found.add(network, images(), {"cam": random_maps()})
    assert found.images == 5
    with pytest.raises(ValueError, match="steps is 0"):
        Faithfulness(0)


# ---- text and picture ---------------------------------------------------------------------------


def made_row(name, areas, errors, changes):
    row = {"map": name, "images": 1200}
    for score, area, error, change in zip(SCORES, areas, errors, changes, strict=True):
        row |= {score: area, f"{score}_se": error}
        row |= {f"{score}_vs_random": change, f"{score}_vs_random_se": error / 2}
    return row


def test_the_table_as_text():
    rows = [
        made_row(
            "conv7", (0.1234, 1, 0.5, 0.25), (0.004, 0.25, 0.0996, 0.01), (-0.1, 0.2, 0, 0.05)
        ),
        made_row(RANDOM, (0.2234, 0.8, 0.5, 0.2), (0.004,) * 4, (0,) * 4),
        made_row(CENTER, (0.2,) * 4, (0.01,) * 4, (-0.95,) * 4),
    ]
    lines = table_lines(rows)
    assert lines[0].startswith("1,200 images ")
    conv7, random = lines[3], lines[4]
    assert (
        conv7.split()
        == (
            "conv7 12.3 ±0.4 -10.0 ±0.2 100.0 ±25 +20.0 ±12 50.0 ±10 +0.0 ±5.0 25.0 ±1.0 +5.0 ±0.5"
        ).split()
    )
    assert random.split() == [*RANDOM.split(), *"22.3 ±0.4 80.0 ±0.4 50.0 ±0.4 20.0 ±0.4".split()]
    assert max(map(len, lines)) <= 110
    # scores stand below each other
    assert [conv7.index("±0.4"), conv7.index("±25")] == [
        random.index("±"),
        random.index("80.0") + 5,
    ]
    text = " ".join(lines)
    assert "Deletion: the lower, the better. Insertion: the higher, the better." in text
    assert "class that the network predicts on the untouched image" in text
    assert "Attention knows no class" in text
    assert "Attention" not in " ".join(table_lines(rows, attention=False))


def test_a_single_image_has_no_standard_error():
    found = measured(network_of(small_model()), images(1), {"map": random_maps(1)})
    assert math.isnan(found.table()[0]["deletion_mean_se"])
    lines = table_lines(found.table())
    assert lines[0].startswith("1 image ") and "nan" not in "".join(lines)


def test_nothing_measured_is_an_empty_table():
    assert Faithfulness().table() == Faithfulness().curve_rows() == table_lines([]) == []


def test_the_charts_show_the_curves_with_their_areas_the_best_first():
    found = measured(
        network_of(small_model()), images(), {f"map {n}": random_maps(5, n) for n in range(3)}, 8
    )
    rows = {row["map"]: row for row in found.table()}
    colors = {}
    for score in SCORES:
        lines = curve_lines(found.curve_rows(), *score.split("_"))
        assert {line.name for line in lines} == set(rows)
        areas = [line.value for line in lines]
        assert areas == sorted(areas, reverse=score.startswith("insertion"))
        for line in lines:
            assert line.value == pytest.approx(100 * rows[line.name][score], abs=1e-9)
            curve = 100 * curve_of(found, line.name, *score.split("_"))
            np.testing.assert_allclose(line.points, np.stack([np.linspace(0, 100, 9), curve], 1))
            assert line.dashed == (line.name in BASELINES)
            assert colors.setdefault(line.name, line.color) == line.color
    assert len(set(colors.values())) == 6


def test_the_picture_has_room_for_the_labels_of_many_maps():
    few, many = (
        [
            {
                "map": name,
                "fill": fill,
                "game": game,
                "share": share,
                "probability": 0.5 + share / 9,
            }
            for name in (*(f"map {n}" for n in range(count)), *BASELINES)
            for game in faithfulness.GAMES
            for fill in faithfulness.FILLS
            for share in (0.0, 0.5, 1.0)
        ]
        for count in (8, 30)
    )
    small, large = curves_picture(few, "猫 " * 200), curves_picture(many)
    assert small.shape[1] == large.shape[1] and len(large) > len(small) + 500
    for picture in (small, large):
        assert picture.dtype == np.uint8
        for edge in (picture[:20], picture[-12:], picture[:, :20], picture[:, -20:]):
            assert (edge == PAPER).all()  # nothing is cut off
