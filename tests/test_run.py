"""The accuracy that a run reports is that of its weights: in runs of a few steps, and while it
trains on small images; and what it tells and leaves."""

import errno
import json
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import cifar_sample
from tests.helpers.runs import DRAWN, NARROW, content_of, with_sample
from tests.helpers.tensorboard_http import tensorboard_over
from train_cifar100 import SHORT, TASK
from training import commands, run, run_folder
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


# ---- what a run tells and leaves ----------------------------------------------------------------


def test_a_run_ends_with_its_summary_and_says_what_to_open(cli):
    status, out, _ = cli(*DRAWN, "--epochs", 1, "--run-dir", "r/one")
    assert status == 0
    assert "Summary in a picture: r/one/summary.png\n" in out
    assert "--logdir r, then open http://localhost:6006" in out
    assert re.search(r"^Took \d+ s\.$", out, re.MULTILINE)
    first = np.asarray(Image.open("r/one/summary.png"))

    status, out, _ = cli("--resume", "r/one", "--epochs", 2)
    assert status == 0
    assert re.search(r"^Took \d+ s since it was resumed; \d+ s of training in all\.$", out, re.M)
    second = np.asarray(Image.open("r/one/summary.png"))
    assert second.shape[1] == first.shape[1] and not np.array_equal(second, first)
    assert not Path("r/one/summary-2.png").exists()


def test_the_end_of_a_run_is_foretold_after_its_first_epoch_once(cli):
    _, out, _ = cli(*NARROW, "--epochs", 3, "--run-dir", "r")
    lines = out.splitlines()
    [told] = [line for line in lines if "the run will end at about" in line]
    assert lines[lines.index(told) - 1].startswith("epoch 1/3  train")
    assert re.fullmatch(
        r"About \d+ s more: the run will end at about (\w+ \d+ \w+ )?\d\d:\d\d "
        r"\(from this epoch's speed\)\.",
        told,
    )
    _, out, _ = cli("--resume", "r", "--epochs", 5)
    assert out.count("the run will end at about") == 1
    _, out, _ = cli("--resume", "r", "--epochs", 6)  # its only epoch is its last
    assert "the run will end at about" not in out


def test_somebody_elses_summary_png_stays(cli):
    assert cli(*NARROW, "--epochs", 1, "--run-dir", "r")[0] == 0
    assert not Path("r/summary.png").exists()  # --overlay-every 0
    Image.new("RGB", (8, 8)).save("r/summary.png")
    before = Path("r/summary.png").read_bytes()
    status, out, _ = cli("--resume", "r", "--epochs", 2, "--overlay-every", 1)
    assert status == 0 and "Summary in a picture: r/summary-2.png\n" in out
    assert Path("r/summary.png").read_bytes() == before

    status, _, err = cli(*DRAWN, "--epochs", 1, "--run-dir", "r2")
    assert status == 0
    os.mkdir("r3")
    shutil.copy("r2/summary.png", "r3")
    status, _, err = cli(*DRAWN, "--epochs", 1, "--run-dir", "r3")
    assert status == 2 and "r3 holds summary.png, which a run writes too" in err


def test_a_folder_of_training_images_is_no_runs_folder(cli):
    os.makedirs("photos/train/apple")
    status, _, err = cli(*NARROW, "--epochs", 1, "--run-dir", "photos")
    assert status == 2 and "photos holds train, which a run writes too" in err
    assert [path.name for path in Path("photos").iterdir()] == ["train"]


def test_a_summary_that_cannot_be_written_is_drawn_when_the_run_is_resumed(cli, monkeypatch):
    def full(sheet):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "r/summary.png")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "png_bytes", full)
        status, _, err = cli(*DRAWN, "--epochs", 1, "--run-dir", "r")
    assert status == 1 and err == "error: r/summary.png: No space left on device\n"
    assert not json.loads(Path("r/config.json").read_text())["finished"]
    status, out, _ = cli("--resume", "r")
    assert status == 0 and "Summary in a picture: r/summary.png\n" in out
    assert [row["epoch"] for row in read_metrics(Path("r/metrics.csv"))] == [1]


def test_the_summary_of_a_network_without_attention_has_no_maps(cli):
    status, _, _ = cli(*DRAWN, "--model", "vgg-gap", "--epochs", 1, "--run-dir", "gap")
    assert status == 0
    status, _, _ = cli(*DRAWN, "--model", "vgg-att1-pc", "--epochs", 1, "--run-dir", "att")
    assert status == 0
    # eight images in a row or two, without maps beside them
    assert Image.open("gap/summary.png").height < Image.open("att/summary.png").height


def test_hparams_are_the_usual_ones_and_what_differs_from_the_recipe(cli):
    words = ["--epochs", 1, "--set", "dropout=0.5", "--val-fraction", 0.25, "--run-dir", "r"]
    assert cli(*NARROW, *words)[0] == 0
    assert cli("--resume", "r", "--epochs", 2)[0] == 0
    with tensorboard_over(Path()) as board:
        [group] = board.hparams()
    always = {"batch_size": 16, "epochs": 2, "lr": 0.05, "model": "vgg-att3-concat-pc"}
    always |= {"recipe": "fast", "seed": 0, "width": 0.0625}
    changed = {"dropout": 0.5, "val_fraction": 0.25, "sample": "True"}
    short = SHORT | {"trivial_augment": "False"}  # also differs from the recipe's
    assert group["hparams"] == always | changed | short
