"""The accuracy that a run reports is that of its weights: in runs of a few steps, and while it
trains on small images."""

import re
import types

import pytest
import torch

from data import cifar_sample
from tests.helpers.runs import NARROW, content_of, with_sample
from train_cifar100 import TASK
from training import commands, run
from training.report import read_metrics
from training.run import recalibration_count

CHANCE = 10  # per cent


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train on 1,500 sample images; returns the run's folder and what was printed."""
    monkeypatch.chdir(tmp_path)
    task = with_sample(TASK, lambda config: cifar_sample(train_per_class=150, test_per_class=20))

    def run(*options):
        assert commands.main(task, [*NARROW, "--run-dir", "run", *map(str, options)]) == 0
        return tmp_path / "run", capsys.readouterr().out

    return run


def weights_are_the_averages(folder) -> bool:
    content = content_of(folder)
    [same] = {
        torch.equal(content["ema"][name], value)
        for name, value in content["model"].items()
        if name.startswith("trunk.") and name.endswith("weight")
    }
    return same


def test_a_run_of_100_steps_is_never_at_chance_while_it_learns(train):
    """It was at 8 % where training was at 97 %, when the images were small at first and the
    statistics the average's."""
    folder, _ = train("--batch-size", 60, "--epochs", 4)
    rows = read_metrics(folder / "metrics.csv")
    assert len(rows) == 4 and rows[-1]["train_top1"] > 90
    for row in rows:
        assert row["train_top1"] <= 3 * CHANCE or row["eval_top1"] > 2 * CHANCE, row
        assert row["eval_top1"] > row["train_top1"] - 5, row  # the epoch's mean is behind its end
    assert not weights_are_the_averages(folder)  # which look back over 2 steps, 2 % of the run
    groups = content_of(folder)["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups if "filter_momentum" not in g] == 2 * [
        pytest.approx(rows[-1]["lr"], rel=1e-6)
    ]


def test_small_images_are_said(train):
    folder, out = train(
        "--batch-size",
        150,
        "--epochs",
        4,
        "--set",
        "progressive_from=0",
        "--set",
        "progressive=0.5:0.5",
    )
    lines = [line for line in out.splitlines() if re.match(r"epoch \d/4", line)]
    assert len(lines) == 4
    for line in lines[:2]:
        assert (
            "train (16 px) loss" in line
            and "test (32 px, moving average) loss" in line
            and "(lags while training images are smaller)" in line
        ), line
    for line in lines[2:]:
        assert "train (32 px) loss" in line and "lags" not in line, line
    assert read_metrics(folder / "metrics.csv")[-1]["eval_top1"] > 50


def test_the_average_of_a_run_of_a_few_steps_is_the_weights_themselves(train):
    folder, out = train("--batch-size", 100, "--epochs", 1)  # 2 % of 15 steps are less than one
    assert weights_are_the_averages(folder) and "lags" not in out


def test_statistics_are_of_a_twelfth_of_the_images_within_bounds():
    assert [recalibration_count(n) for n in (50_000, 12_288, 9_000, 5_994, 1_500, 100)] == [
        1024,
        1024,
        750,
        512,
        512,
        100,
    ]


@pytest.mark.parametrize("save_takes, due", [(0.2, 50), (1.0, 50), (3.0, 150)])
def test_how_often_a_run_saves(monkeypatch, save_takes, due):
    """Every 50 seconds; where that would cost over 2 % of the time, as often as costs 2 %."""
    saved, clock = [], [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    state = types.SimpleNamespace(
        saved_at=0.0, save_seconds=save_takes, save=lambda: saved.append(clock[0])
    )
    for clock[0] in (0.0, due - 0.1, due):
        run.Run.save_when_due(state)
    assert saved == [due] and save_takes / due <= 0.02
