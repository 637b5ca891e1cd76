"""training/sanity.py: the sanity pass as people use it, what it finds, and what TensorBoard shows
of it."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from common.errors import Interrupted
from tests.helpers.tensorboard_http import tensorboard_over
from training import run as run_module
from training import sanity
from training.report import read_metrics
from training.trainer import Trainer


def test_sanity_pass_and_what_tensorboard_shows_of_it(cli, tmp_path):
    status, out, _ = cli(
        "--sanity", "--sample", "--width", 0.0625, "--run-dir", "s", "--device", "cpu"
    )
    assert status == 0 and re.search(r"Sanity pass passed in \d+ s", out)
    for word in (
        "one epoch",
        "gradients",
        "reload",
        "resume",
        "per epoch of 50,000 images",
        "Peak memory",
    ):
        assert word in out
    assert re.search(r"largest difference of a weight 0$", out, re.MULTILINE)
    with tensorboard_over(tmp_path) as board:
        assert board.runs() == ["s", "s/train"]
        row = read_metrics(tmp_path / "s" / "metrics.csv")[0]
        for run, tag, name in (
            ("s/train", "results/loss", "train_loss"),
            ("s", "results/loss", "eval_loss"),
            ("s", "results/accuracy, top-1 %", "eval_top1"),
            ("s", "results/top-5 accuracy, %", "eval_top5"),
            ("s", "run/learning rate", "lr"),
        ):
            assert board.scalars(run, tag) == [(1, pytest.approx(row[name], rel=1e-5))]
        by_step = board.scalars("s/train", "results/loss by step")
        assert [step for step, _ in by_step] == [1, 2, 3, 4]
        for level in ("conv7", "conv10", "conv13"):
            for what in ("score_sd", "entropy", "gate_gradient"):
                assert len(board.scalars("s", f"spatial attention/{level}/{what}")) == 1
        assert len(board.images("s", "spatial attention/Test images 1")) == 1
        assert "vgg-att3-concat-pc" in str(board.hparams())
        assert "vgg-att3-concat-pc" in str(board.text("s", "configuration/text_summary"))


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda m: m.gates["conv10"].compatibility.u.weight.register_hook(torch.zeros_like),
            "no gradient reached gates.conv10.compatibility.u.weight",
        ),
        (
            lambda m: m.gates["conv7"].compatibility.u.weight.data.zero_(),
            "attention level conv7 is dead",
        ),
    ],
)
def test_sanity_pass_fails_and_names_it(cli, monkeypatch, harm, message):
    class Harmed(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            harm(self.model)
            if "dead" in message:
                self.model.gates["conv7"].compatibility.u.weight.requires_grad_(False)
                self.ema.model.load_state_dict(self.model.state_dict())

    monkeypatch.setattr(run_module, "Trainer", Harmed)
    status, out, _ = cli("--sanity", "--sample", "--width", 0.0625, "--device", "cpu")
    assert status == 1 and f"FAILED: {message}" in out and "Sanity pass FAILED" in out


def test_a_pass_leaves_no_checkpoints_unless_asked_to(cli, monkeypatch):
    words = "--sanity --sample --model vgg --width 0.0625 --device cpu".split()
    status, out, _ = cli(*words)
    [folder] = Path("runs/sanity").iterdir()
    assert status == 0 and not Path("runs/cifar100").exists()
    assert re.search(
        rf"^Everything it wrote is in {folder}; its checkpoints \(\d+ MiB\) are removed "
        r"\(--keep keeps them\)$",
        out,
        re.MULTILINE,
    )
    left = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert left == {"config.json", "metrics.csv", "summary.png", "train"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**20

    status, out, _ = cli(*words, "--keep", "--run-dir", "kept")
    assert status == 0 and Path("kept/last.pt").exists()
    assert out.endswith("Everything it wrote is in kept\n")

    monkeypatch.setattr(sanity, "CHECKS", (lambda run: sanity.Outcome("x", "", ("broken",)),))
    status, out, _ = cli(*words, "--run-dir", "failed")
    assert status == 1 and Path("failed/last.pt").exists()  # to look at


def test_sanity_without_data_uses_the_sample_and_says_so(cli):
    status, out, _ = cli("--sanity", "--model", "vgg", "--width", 0.0625, "--device", "cpu")
    assert status == 0 and "built-in sample (seed 0) (no cifar100 in data)" in out
    assert not Path("data").exists()


def test_sanity_with_a_validation_split(cli):
    status, out, _ = cli(
        "--sanity", "--sample", "--model", "vgg", "--width", 0.0625, "--val-fraction", 0.25
    )
    assert status == 0 and "Sanity pass passed" in out


def test_sanity_with_one_image_at_a_time(cli):
    status, out, err = cli(
        *"--sanity --sample --width 0.0625 --device cpu --micro-batch 1 --batch-size 2".split()
    )
    assert status == 0 and "Sanity pass passed" in out, err


def test_what_is_left_of_a_run_is_told_by_its_image_sizes():
    config = {
        "epochs": 10,
        "progressive": "0.5:0.4 0.75:0.8",
        "progressive_from": 100,
        "batch_size": 100,
    }
    cost = (0.01, 0.001)  # seconds of an image, trained on and evaluated
    evaluated = 0.612  # 100 test images, and 512 for batch norm's statistics
    whole = 10 * (0.4 * 0.25 + 0.4 * 0.5625 + 0.2) * 1000 * 0.01 + 10 * evaluated
    assert sanity.run_seconds(config, cost, 1000, 100) == pytest.approx(whole)
    assert sanity.run_seconds(config, cost, 1000, 100, 0.65) == pytest.approx(
        10 * (0.15 * 0.5625 + 0.2) * 1000 * 0.01 + 4 * evaluated
    )
    assert sanity.run_seconds(config, cost, 1000, 100, 0.9) == pytest.approx(
        10 * 0.1 * 1000 * 0.01 + evaluated
    )
    # all of them at full size
    few = sanity.run_seconds(config | {"progressive_from": 101}, cost, 1000, 100)
    assert few == pytest.approx(10 * 1000 * 0.01 + 10 * evaluated)


def test_a_signal_in_the_sanity_pass(cli, monkeypatch):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted

    monkeypatch.setattr(run_module, "evaluate", signalled)
    assert (
        cli("--sanity", "--sample", "--model", "vgg", "--width", 0.0625, "--device", "cpu")[0]
        == 143
    )


def test_a_bare_resume_never_takes_a_sanity_pass(cli):
    assert (
        cli("--sanity", "--sample", "--model", "vgg", "--width", 0.0625, "--device", "cpu")[0] == 0
    )
    status, _, err = cli("--resume")
    assert status == 2 and "there is no unfinished run in runs/cifar100" in err
