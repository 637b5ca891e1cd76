"""train_cifar100.py as people use it: runs that are hurt and resumed, evaluation, and data that
move or change."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cifar100
import train_cub
from common.checkpoint import read_checkpoint
from data import cifar_sample
from tests.helpers.makers import make_folders
from tests.helpers.runs import (
    NARROW,
    assert_runs_equal,
    config_of,
    content_of,
    scalars_of,
    signal_after,
    with_sample,
)
from training import commands, run_folder
from training import run as run_module
from training.ranks import Ranks
from training.report import read_metrics
from training.signals import Signals
from training.trainer import Trainer

# ---- runs that are stopped ----------------------------------------------------------------------


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize(
    "after_step, number", [(3, signal.SIGTERM), (12, signal.SIGINT), (15, signal.SIGHUP)]
)
def test_stopped_by_a_signal_and_resumed_equals_the_unhurt_run(
    cli, monkeypatch, unhurt, after_step, number
):
    steps = signal_after(monkeypatch, after_step, number)
    status, out, _ = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert status == 128 + number and len(steps) == after_step
    assert "everything is saved" in out and "--resume hurt" in out
    assert (
        content_of("hurt")["position"]["epoch"] * 6 + content_of("hurt")["position"]["step"]
        == after_step
    )
    assert cli("--resume")[0] == 2  # it is not under runs/
    if number == signal.SIGHUP:  # the checkpoint alone is enough
        Path("hurt/config.json").unlink()
    assert cli("--resume", "hurt")[0] == 0 and len(steps) == 24
    assert_runs_equal("hurt", unhurt)


class Killed(BaseException):
    """Ends a run where nothing can be saved, as SIGKILL does."""


def test_the_curves_by_step_of_a_run_killed_twice_equal_the_unhurt_runs(tmp_path, monkeypatch):
    """One epoch of 200 steps: a point every 4. Points are on the disk that are newer than the last
    checkpoint, and the first ones after it begin in the middle of four steps."""
    monkeypatch.chdir(tmp_path)
    images = cifar_sample(classes=4, train_per_class=200, test_per_class=2)
    task = with_sample(train_cifar100.TASK, lambda config: images)
    words = [*NARROW, "--model", "vgg-gap", "--batch-size", "4", "--epochs", "1", "--run-dir"]
    monkeypatch.setattr(run_module, "POINTS_EVERY", 0.0)

    def save_every_19(run):
        if run.trainer.position.step % 19 == 0:
            run.save()

    monkeypatch.setattr(run_module.Run, "save_when_due", save_every_19)
    assert commands.main(task, [*words, "unhurt"]) == 0
    step = Trainer.step
    for kill_at, command in ((71, [*words, "hurt"]), (145, ["--resume", "hurt"])):

        def killed(trainer, *batch, kill_at=kill_at):
            if trainer.position.step == kill_at:
                raise Killed
            step(trainer, *batch)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "step", killed)
            commands.main(task, command)
        saved, reported = content_of("hurt")["position"], scalars_of("hurt")
        newest = reported["train/results/loss by step"][-1][0]
        assert saved["step"] == kill_at // 19 * 19 < newest == kill_at // 4 * 4
        assert saved["step"] > saved["point"][0]
    assert commands.main(task, ["--resume", "hurt"]) == 0
    assert_runs_equal("hurt", "unhurt")
    curves = scalars_of("hurt")
    for tag in ("train/results/loss by step", "run/learning rate by step"):
        assert [at for at, _ in curves[tag]] == list(range(4, 201, 4))
    # the mean over all points is the epoch's
    losses = [loss for _, loss in curves["train/results/loss by step"]]
    assert np.mean(losses) == pytest.approx(curves["train/results/loss"][0][1], rel=1e-5)
    assert curves["run/learning rate by step"][-1][1] == curves["run/learning rate"][0][1]


def test_stopped_in_an_evaluation(cli, monkeypatch, unhurt):
    evaluate, calls = run_module.evaluate, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(run_module, "evaluate", signalled)
    assert cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")[0] == 143
    assert cli("--resume", "hurt")[0] == 0
    assert_runs_equal("hurt", unhurt)


@pytest.mark.parametrize("when, place", [(1, (0, 6)), (2, (1, 6))])
def test_a_pipe_that_nobody_reads_saves_and_ends_the_run(cli, monkeypatch, unhurt, when, place):
    def broken(*words, file=None, **options):
        if file:
            print(*words, file=file)
        elif words[0].startswith((f"epoch {when}/", "\nStopped")):
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        for module in (run_module, commands):
            patch.setattr(module, "print", broken, raising=False)
        patch.setattr(Signals, "nobody_reads", staticmethod(lambda: None))
        status, _, err = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert status == 128 + signal.SIGPIPE and "everything is saved" in err
    position = content_of("hurt")["position"]
    assert (position["epoch"], position["step"]) == place
    assert cli("--resume", "hurt")[0] == 0
    assert_runs_equal("hurt", unhurt)


def test_killed_before_the_first_checkpoint_starts_over(cli, monkeypatch, unhurt):
    def killed(self):
        # where SIGKILL would leave the folder: config and events, no checkpoint
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "train", killed)
        assert cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")[0] == 130
    assert not Path("hurt/last.pt").exists()
    status, out, _ = cli("--resume", "hurt")
    assert status == 0 and "has no checkpoint yet: starting over with its settings" in out
    assert_runs_equal("hurt", unhurt)


def test_a_finished_run_without_its_config(cli, unhurt):
    shutil.copytree(unhurt, "r")
    Path("r/config.json").unlink()
    status, out, err = cli("--resume", "r")
    assert status == 0 and "r is finished: 4 epochs" in out, err
    Path("r/last.pt").unlink()
    status, _, err = cli("--resume", "r")
    assert status == 0  # last.prev.pt: the fourth epoch's last step, evaluated anew
    shutil.rmtree("r")
    Path("r").mkdir()
    assert cli("--resume", "r")[::2] == (
        2,
        "error: --resume r: there is no run in this folder (no config.json, no last.pt, "
        "no last.prev.pt)\n",
    )


def test_a_bare_resume_takes_the_newest_unfinished_run(cli, monkeypatch):
    step = Trainer.step

    def signalled(self, *batch):
        step(self, *batch)
        os.kill(os.getpid(), signal.SIGTERM)

    for name in ("older", "newer"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", signalled)
            assert (
                cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", f"runs/cifar100/{name}")[
                    0
                ]
                == 143
            )
    for path in Path("runs/cifar100/older").iterdir():
        os.utime(path, (1e9, 1e9))
    with run_folder.lock(Path("runs/cifar100/newer")), run_folder.lock(Path("runs/cifar100/older")):
        status, _, err = cli("--resume")
    assert status == 2 and "every unfinished run in runs/cifar100 is being trained" in err
    for name in ("older", "newer"):  # the older one while the newer one is being trained
        with (
            run_folder.lock(Path("runs/cifar100/newer"))
            if name == "older"
            else contextlib.nullcontext()
        ):
            status, out, _ = cli("--resume")
        assert status == 0 and f"Run directory runs/cifar100/{name};" in out
    status, _, err = cli("--resume")
    assert status == 2 and "there is no unfinished run" in err


def test_a_longer_run_and_a_finished_one(cli):
    assert cli(*NARROW, "--epochs", 1, "--run-dir", "r")[0] == 0
    status, out, _ = cli("--resume", "r")
    assert status == 0 and "r is finished: 1 epochs" in out
    status, out, _ = cli("--resume", "r", "--epochs", 3)
    assert status == 0 and "--epochs 3 instead of 1: the schedule is that of the new length" in out
    assert [row["epoch"] for row in read_metrics(Path("r/metrics.csv"))] == [1, 2, 3]
    assert [step for step, _ in scalars_of("r")["results/accuracy, top-1 %"]] == [1, 2, 3]


def test_a_diverged_run_keeps_the_last_good_checkpoint(cli, monkeypatch):
    step = Trainer.step

    def poisoned(self, images, labels):
        if self.position.epoch == 1 and self.position.step == 2:
            with torch.no_grad():
                self.model.classifier.linears[0].weight.fill_(float("inf"))
        step(self, images, labels)

    monkeypatch.setattr(Trainer, "step", poisoned)
    status, _, err = cli(*NARROW, "--epochs", 4, "--run-dir", "r")
    assert status == 1 and "the loss is not finite at epoch 2, step 3 of 6" in err
    content = content_of("r")
    assert content["position"]["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in content["model"].values())


def test_weights_that_diverged_are_not_saved(cli, monkeypatch):
    """The loss of the last step was finite; the update after it was not."""
    update = torch.optim.SGD.step

    def poisoned(self, *args, **kwargs):
        result = update(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 12:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    calls = []
    monkeypatch.setattr(torch.optim.SGD, "step", poisoned)
    status, _, err = cli(*NARROW, "--epochs", 4, "--run-dir", "r")
    assert status == 1 and "a weight is not finite at epoch 2, step 6 of 6" in err
    assert content_of("r")["position"]["epoch"] == 1


def test_bad_data_leaves_no_run_folder(cli):
    status, _, err = cli("--data-dir", "nowhere/at/all", "--run-dir", "runs/r")
    assert (
        status == 1
        and err.startswith("error: ")
        and "Traceback" not in err
        and not Path("runs/r").exists()
    )


@pytest.mark.parametrize(
    "words",
    [["--sanity", "--val-fraction", 0.001], ["--val-fraction", 0.001], ["--resume", "none"]],
)
def test_what_fails_at_the_start_leaves_no_folder(cli, words):
    status, _, err = cli(*(words if "--resume" in words else [*NARROW, *words]))
    assert (
        status in (1, 2)
        and "error: " in err
        and not list(Path().glob("runs/*/*"))
        and not Path("none").exists()
    )


def test_a_validation_split_keeps_the_best(cli):
    status, out, _ = cli(*NARROW, "--epochs", 2, "--val-fraction", 0.25, "--run-dir", "r")
    assert (
        status == 0
        and "72 training and 24 val images" in out
        and "The test set has not been looked at" in out
    )
    assert "results, val/accuracy, top-1 %" in scalars_of("r")
    rows = read_metrics(Path("r/metrics.csv"))
    best = read_checkpoint("r/best.pt")["best"]
    assert best["top1"] == max(row["eval_top1"] for row in rows)


# ---- evaluation, transfer -----------------------------------------------------------------------


def test_init_from_a_checkpoint(cli, unhurt):
    status, out, _ = cli(
        *NARROW, "--epochs", 1, "--model", "vgg-att2-concat-gate", "--init-from", unhurt / "last.pt"
    )
    assert status == 0 and re.search(
        r"--init-from .*last.pt \(vgg-att3-concat-pc, width 0.0625, "
        r"cifar100\): \d+ of \d+ tensors loaded; starting fresh: classifier",
        out,
    )


def test_the_folder_to_go_on_in(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        status, out, _ = cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "mine")
    assert status == 143 and "python train_cifar100.py --resume mine\n" in out
    assert cli("--resume", "other", "--run-dir", "mine")[0] == 2
    status, out, _ = cli(
        "--run-dir", "mine", "--resume", "--precision", "auto", "--no-checkpoint-activations"
    )
    assert status == 0 and "Run directory mine;" in out
    status, out, _ = cli("--resume", "mine/last.pt")
    assert status == 0 and out.startswith("mine is finished")


def test_every_run_has_a_folder_of_its_own(small_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        folders = {
            stack.enter_context(
                run_folder.new_folder(
                    commands.new_run_dirs("cifar100", argparse.Namespace(), "vgg")
                )
            )
            for _ in range(3)
        }
        assert len(folders) == 3 and all(folder.is_dir() for folder in folders)
    assert not Path("runs").exists()  # nothing came into them


def test_the_command_that_goes_on_is_the_one_it_was_started_by(small_task, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["code of mine/train_cifar100.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(commands, "program", lambda name, module=None: name)
    run = types.SimpleNamespace(task=small_task, run_dir=Path("a run"), ranks=Ranks(0, 4, 0))
    assert commands.how_to_resume(run) == (
        "torchrun --nproc-per-node=2 'code of mine/train_cifar100.py' --resume 'a run'"
    )


def test_same_seed_same_run_and_another_seed_another(cli, unhurt):
    for seed in (0, 1):
        assert (
            cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--seed", seed, "--run-dir", seed)[
                0
            ]
            == 0
        )
    assert_runs_equal("0", unhurt)
    a, b = (content_of(name)["model"]["trunk.block1.0.conv.weight"] for name in "01")
    assert not torch.equal(a, b)


# ---- data that is not where it was --------------------------------------------------------------


def test_nothing_is_downloaded_for_what_was_made_before(cli, monkeypatch, tmp_path):
    def refuse(*words, **options):
        raise AssertionError("a download began")

    monkeypatch.setattr("datasets.cifar.fetch", refuse)
    make_folders(tmp_path / "photos", size=(16, 16), per_class=8)
    words = (
        "--data-dir photos --model vgg --width 0.015625 --device cpu --epochs 1 "
        "--batch-size 4 --num-workers 0 --run-dir r"
    ).split()
    assert cli(*words)[0] == 0
    Path("photos").rename("moved")
    for place in ([], ["--data-dir", "elsewhere"]):
        where = tmp_path / (place[1] if place else "photos")
        for command in (["--resume", "r", "--epochs", 2], ["--evaluate", "r/last.pt"]):
            status, _, err = cli(*command, *place, "--device", "cpu")
            assert status == 1 and err == (
                f"error: the images that this was trained on are not in {where}: give "
                f"--data-dir, the folder that holds them now\n"
            )
    assert not Path("photos").exists() and not Path("elsewhere").exists()
    assert cli("--evaluate", "r/last.pt", "--data-dir", "moved", "--device", "cpu")[0] == 0
    assert cli("--resume", "r", "--epochs", 2, "--data-dir", "moved", "--device", "cpu")[0] == 0


def test_names_in_any_encoding_go_through_everything(cli, tmp_path, capsys):
    """Latin-1 in a UTF-8 locale: class, file, run and data folder."""
    photos = tmp_path / os.fsdecode(b"donn\xe9es")
    make_folders(photos, classes=(os.fsdecode(b"caf\xe9"), "plain"), size=(16, 16), per_class=8)
    for path in list(photos.rglob("0*.png"))[:3]:
        path.rename(path.with_name(os.fsdecode(b"\xe9t\xe9") + path.name))
    run = os.fsdecode(b"ex\xe9cution")
    words = [
        "--data-dir",
        photos,
        *(
            "--model vgg-att1-pc --width 0.015625 --device cpu --batch-size 4 "
            "--num-workers 1 --run-dir"
        ).split(),
        run,
    ]
    for more in (["--sanity"], ["--epochs", 1]):
        status, out, err = cli(*words, *more)
        assert status == 0 and "decoding images" not in out and "damaged" not in out, err
        if more == ["--sanity"]:
            shutil.rmtree(run)
    assert cli("--resume", run, "--epochs", 2, "--device", "cpu")[0] == 0
    status, out, err = cli("--evaluate", f"{run}/last.pt", "--device", "cpu")
    assert status == 0 and "caf\\xe9" in out, err
    assert content_of(run)["class_names"] == [os.fsdecode(b"caf\xe9"), "plain"]


def test_changed_data_is_noticed(cli, small_task, unhurt):
    from data import cifar_sample

    shutil.copytree(unhurt, "r")
    for classes, each, message in (
        (5, 24, "its classes are not"),
        (4, 20, "it had 96 training images and has 80 now"),
    ):
        sets = cifar_sample(classes=classes, train_per_class=each, test_per_class=8)
        task = with_sample(small_task, lambda config, sets=sets: sets)
        status, _, err = cli("--resume", "r", "--epochs", 6, task=task)
        assert status == 1 and "the data set has changed" in err and message in err


def test_config_json_says_what_was_run(cli, unhurt):
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "r")[0] == 0
    assert cli("--resume", "r", "--epochs", 2)[0] == 0
    commands_run = json.loads(Path("r/config.json").read_text())["commands"]
    assert (
        len(commands_run) == 2
        and "--epochs 1" in commands_run[0]
        and "--resume r --epochs 2" in commands_run[1]
    )
    record = json.loads((unhurt / "config.json").read_text())
    assert (
        record["finished"]
        and record["config"]["width"] == 0.0625
        and record["config"]["dropout"] == 0.5
    )
    assert (
        record["environment"]["torch"] == torch.__version__ and record["environment"]["threads"] > 0
    )


# ---- the built-in sample ------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_cifar100, train_cub])
def test_the_sample_has_a_size_of_its_own_which_options_change(script):
    task = script.TASK
    config = config_of(task, "--sample")
    sample = task.sample["fast"]
    assert {name: config[name] for name in sample} == sample
    assert config["lr"] == config_of(task)["lr"]
    assert config_of(task, "--sample", "--width", 1, "--epochs", 7)["width"] == 1
    assert config_of(task, "--sample", "--epochs", 7)["epochs"] == 7
    assert config_of(task)["width"] == 1


def test_a_short_sample_run_has_the_recipe_of_short_runs():
    config = config_of(train_cifar100.TASK, "--sample")
    assert config["epochs"] < 10 and config["muon"] == train_cifar100.SHORT["muon"]
    assert not config["trivial_augment"]


@pytest.mark.parametrize("mode, function", [("sanity", "sanity_pass"), ("benchmark", "benchmark")])
def test_sanity_and_benchmark_of_the_sample_keep_the_real_size(cli, monkeypatch, mode, function):
    seen = []
    monkeypatch.setattr(commands, function, lambda task, config, *_, **__: seen.append(config) or 0)
    assert cli(f"--{mode}", "--sample")[0] == 0
    assert seen[0]["sample"] and (seen[0]["width"], seen[0]["epochs"]) == (1, 30)
