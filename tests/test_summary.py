"""A run's summary.png: what it says, and that nothing is cut off."""

import json
import math
import time

import numpy as np
import pytest
from PIL import ImageFont

from attention_model import MODEL_NAMES, build_model
from common.fonts import wrap
from explain.charts import AXIS, GRID
from explain.pictures import MARGIN, PAPER
from tests.helpers.environment import ROOT
from training import summary
from training.evaluation import Evaluation
from training.report import read_metrics
from training.summary import (
    EDGE,
    EVALUATED,
    WIDTH,
    WITHOUT_ATTENTION,
    command_panel,
    commands_of,
    comparison_note,
    data_name,
    facts,
    headline,
    monospaced,
    numbers,
    summary_picture,
    train_name,
)

REFERENCE = ROOT / "runs" / "reference"
RUNS = sorted(path.parent.name for path in REFERENCE.glob("*/config.json"))
GPU_RUN = "gpu-cifar100-pc-0"
SHEET = np.random.default_rng(0).integers(0, 256, (200, 1330, 3), dtype=np.uint8)


def _run(name):
    """(config.json's content, the rows of metrics.csv) of a reference run."""
    record = json.loads((REFERENCE / name / "config.json").read_text())
    return record, read_metrics(REFERENCE / name / "metrics.csv")


def _result(top1=78.44, top5=95.18, loss=0.86, classes=100):
    return Evaluation(loss, top1, top5, [100] * classes, [78] * classes)


def _picture(record, rows, result=None, **changes):
    options = {"eval_name": "test", "curve_name": "test", "images": 10_000, "epoch": 30}
    options |= {"sheet": SHEET, "config": record.get("config", {})} | changes
    config = options.pop("config")
    return summary_picture(config, record, rows, result or _result(), **options)


# ---- the picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_reference_runs_have_a_picture_with_nothing_at_its_edges(name):
    record, rows = _run(name)
    last, classes = rows[-1], record["data"]["classes"]
    result = _result(last["eval_top1"], last["eval_top5"], last["eval_loss"], classes)
    picture = _picture(record, rows, result, epoch=last["epoch"])
    height, width, _ = picture.shape
    assert picture.dtype == np.uint8 and width == WIDTH and 700 < height < 1100
    assert (picture[-len(SHEET) :, EDGE - MARGIN :][:, : SHEET.shape[1]] == SHEET).all()
    above = picture[: -len(SHEET)]
    assert (above[:, : EDGE - 3] == PAPER).all() and (above[:, 3 - EDGE :] == PAPER).all()
    charts = above[-summary.CHART_HEIGHT - 98 : -98].astype(int)
    for half in (charts[:, : WIDTH // 2], charts[:, WIDTH // 2 :]):
        assert (np.abs(half - EVALUATED).max(axis=2) < 30).sum() > 300


def test_the_picture_grows_with_a_wide_sheet():
    wide = np.zeros((50, 2000, 3), np.uint8)
    picture = _picture(*_run(GPU_RUN), sheet=wide)
    assert picture.shape[1] == 2000 + 2 * (EDGE - MARGIN)
    assert (picture[-50:, EDGE - MARGIN : MARGIN - EDGE] == 0).all()


def test_without_rows_or_record_their_parts_are_left_out():
    record, rows = _run(GPU_RUN)
    whole = len(_picture(record, rows))
    without_charts, bare = _picture(record, []), _picture({}, [], config=record["config"])
    assert whole - len(without_charts) == summary.CHART_HEIGHT + 50
    assert len(without_charts) - len(bare) == command_panel(WIDTH, record["commands"]).height
    assert (bare[-len(SHEET) :, EDGE - MARGIN :][:, : SHEET.shape[1]] == SHEET).all()
    nothing = [row | dict.fromkeys(row.keys() - {"epoch"}) for row in rows]
    assert len(_picture(record, nothing)) == len(without_charts)


def test_the_evaluated_curve_ends_where_the_last_row_says():
    """The dot at the end of the top-1 curve, between the grid lines of 0 and 100 %."""
    record, rows = _run(GPU_RUN)
    picture = _picture(record, rows).astype(int)
    top = len(picture) - len(SHEET) - 48 - 50 - summary.CHART_HEIGHT  # of the charts
    chart = picture[top : top + summary.CHART_HEIGHT, EDGE : WIDTH // 2]
    curve = np.abs(chart - EVALUATED).max(axis=2) < 40
    grid = np.flatnonzero((np.abs(chart - GRID).max(axis=2) < 3).sum(axis=1) > 250)
    axis = np.flatnonzero((np.abs(chart - AXIS).max(axis=2) < 4).sum(axis=1) > 250)[0]
    column = np.flatnonzero(curve[: axis - 5].sum(axis=0) >= 6)  # only the dot is as high there
    dot = np.flatnonzero(curve[:, column[column < 480].max() - 1])
    share = (axis - dot.mean()) / (axis - grid[0])
    assert 100 * share == pytest.approx(rows[-1]["eval_top1"], abs=0.6)


def test_strange_rows_can_be_drawn():
    record, rows = _run(GPU_RUN)
    for index, value in enumerate([None, math.nan, math.inf, -math.inf, 1e6, 1e300, 0.0]):
        for column in ("eval_loss", "train_loss", "eval_top1", "seconds"):
            rows[3 * index] = rows[3 * index] | {column: value if "top1" not in column else None}
    for some in (rows, rows[:1], rows[1:3], [rows[4]] * 2):
        picture = _picture(record, some)
        assert picture.shape[1] == WIDTH
        assert (picture[: -len(SHEET), 3 - EDGE :] == PAPER).all()


def test_drawing_takes_less_than_three_tenths_of_a_second():
    record, rows = _run(GPU_RUN)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        _picture(record, rows)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


# ---- what it says -------------------------------------------------------------------------------


def test_the_headline_has_the_interval():
    number, what, below = headline(_result(top1=78.67), "test", 10_000)
    assert (number, what) == ("78.67 %", "top-1 on 10,000 test images")
    # Wilson: the shares p at 1.96 standard deviations sqrt(p (1 - p) / n) from the one measured
    z, n, share = 1.959964, 10_000, 0.7867
    low, high = sorted(np.roots([1 + z * z / n, -2 * share - z * z / n, share * share]))
    assert below == f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    assert headline(_result(), "validation", 5000)[1] == "top-1 on 5,000 validation images"


def test_the_numbers_of_the_result():
    record, rows = _run(GPU_RUN)
    seconds = sum(row["seconds"] for row in rows)
    assert numbers(record["config"], rows, _result(), 24) == {
        "top-5": "95.18 %",
        "cross-entropy loss": "0.860",
        "epochs": "24 of 30",
        "training time": f"{seconds // 60:.0f} min {round(seconds) % 60:02d} s",
    }
    # five classes: top-5 says nothing; the first epochs are lost: the time is not known
    few = numbers(record["config"], rows[3:], _result(classes=5), 30)
    assert set(few) == {"cross-entropy loss", "epochs"}
    unknown = [*rows, rows[-1] | {"seconds": None}]
    assert "training time" not in numbers(record["config"], unknown, _result(), 30)


def test_facts_are_those_of_the_record():
    record, rows = _run(GPU_RUN)
    assert facts(record["config"], record, rows) == {
        "recipe": "fast",
        "seed": "0",
        "image size": "32 px",
        "batch": "128",
        "peak learning rate": "0.05",
        "precision": "bf16",
        "device": "NVIDIA H100 80GB HBM3",
        "PyTorch": "2.11.0+cu130",
        "commit": "e5b65af",
    }


def test_facts_that_are_lost_are_left_out():
    record, rows = _run(GPU_RUN)
    of_config = ["recipe", "seed", "image size", "batch", "peak learning rate"]
    for damaged in ({}, {"resolved": None, "environment": [1]}, {"environment": {"device": None}}):
        assert list(facts(record["config"], damaged, rows)) == of_config
    assert facts({}, {}, []) == {}
    assert [commands_of(lost) for lost in ({}, {"commands": None}, {"commands": "x"})] == [[]] * 3


def test_facts_of_other_runs():
    record, rows = _run("cub40-w0.25-64px-c-paper")
    found = facts(record["config"], record, rows)
    assert found["initial weights"] == "runs/gap-part.pt"
    assert found["peak learning rate"] == "0.01"  # lr is 0.0025, doubled twice
    environment = {"device": "NVIDIA H200", "git_commit": "0123456789abcdef+changes"}
    many = {"resolved": {"ranks": 4}, "environment": environment}
    found = facts({"input_size": [24, 36]}, many, [])
    assert found == {
        "image size": "24x36 px",
        "device": "4 x NVIDIA H200",
        "commit": "0123456+changes",
    }


def test_names_of_the_data():
    assert data_name({"dataset": "cifar100"}, 100) == "CIFAR-100"
    assert data_name({"dataset": "cub", "sample": False}, 40) == "CUB-200-2011"
    assert data_name({"dataset": "cifar100", "sample": True}, 10) == "the built-in sample"
    assert data_name({"dataset": "cifar100"}, 3) == "class folders"
    assert data_name({"dataset": "cifar10"}, 10) == "CIFAR-10"
    assert data_name({"dataset": "cifar10"}, 100) == "class folders"
    assert data_name({"dataset": "other"}, 3) == "other"


def test_the_training_curve_is_not_taken_for_the_same_measurement():
    record, _ = _run(GPU_RUN)
    assert train_name(record["config"]) == "train (augmented)"
    assert comparison_note(record["config"], record, "test") == (
        "Train: mean over the epoch, on augmented images, smaller ones at first, loss with label "
        "smoothing 0.1. Test: after the epoch, without augmentation, moving average of the weights."
    )
    # 30 epochs of 9 steps are fewer than the 300 steps from which images are smaller at first
    short = comparison_note(record["config"], record | {"data": {"images": 1200}}, "test")
    assert "smaller" not in short and "augmented" in short
    assert "smaller" not in comparison_note(record["config"], {}, "test")
    plain = {"dropout": 1.0, "flip": False}
    assert train_name(plain) == "train"
    assert comparison_note(plain, {}, "validation") == (
        "Train: mean over the epoch, with dropout. Validation: after the epoch, without "
        "augmentation."
    )


def test_the_networks_without_attention_are_those_without_levels():
    without = [name for name in MODEL_NAMES if not build_model(name, 2, width=1 / 64).levels]
    assert tuple(without) == WITHOUT_ATTENTION


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("font", [monospaced(15), ImageFont.load_default(15)])
def test_wrapping_loses_nothing(font):
    rng = np.random.default_rng(0)
    for _ in range(100):
        lengths = rng.integers(1, 60, rng.integers(1, 14))
        text = " ".join("x" * length for length in lengths)
        lines = wrap(text, font, 300, 1000)
        assert "".join(lines) == text
        assert all(font.getlength(line.rstrip()) <= 300 for line in lines)
        # a word stands on one line if it fits there, and a line takes all that fit
        words = [word for line in lines for word in line.split()]
        assert sorted(words) == sorted(text.split()) or font.getlength("x" * max(lengths)) > 300
        for line, following in zip(lines, lines[1:], strict=False):
            assert font.getlength(line + following.split(" ")[0]) > 300


@pytest.mark.parametrize(
    "text",
    [
        "python train.py --run-dir " + "x" * 500,
        "python train.py " * 100,
        "/данные/写真/photos " * 50,
        "z" * 200_000,
    ],
)
def test_a_long_command_is_cut_with_three_dots(text):
    font = monospaced(15)
    lines = wrap(text, font, 400, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert text.startswith("".join(lines).removesuffix("..."))
    assert all(font.getlength(line.rstrip()) <= 400 for line in lines)
    assert font.getlength(lines[-1]) > 360  # cut where there is no more room


def test_a_short_command_stays_as_it_is():
    font = monospaced(15)
    assert wrap("python train.py", font, 400, 3) == ["python train.py"]
    assert wrap("", font, 400, 3) == []
    exact = font.getlength("a" * 20)
    assert wrap("a" * 20 + " " + "b" * 20, font, exact, 2) == ["a" * 20 + " ", "b" * 20]


@pytest.mark.parametrize(
    "command",
    ["python x.py '/data/\udce9t\udce9/日本/фото'", "a\nb\tc", "x" * 5000, "ا ب " * 300, ""],
)
def test_any_command_can_be_drawn(command):
    panel = np.asarray(command_panel(WIDTH, [command, "resumed", "again"]))
    assert panel.shape[1] == WIDTH
    assert (panel[:, : EDGE - 1] == PAPER).all() and (panel[:, 1 - EDGE :] == PAPER).all()
    lines = (panel.shape[0] - 32 - 28) // summary.COMMAND_LINE_HEIGHT
    assert lines == 1 + min(3, len(wrap(command.replace("\n", "\\n"), monospaced(15), 1292, 9)))
