"""train_cifar100.py as people use it: runs that are hurt and resumed, evaluation, and wrong use."""
import argparse
import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from files import TEMPORARY
from image_files import DataError
from tests.conftest import ROOT
from tests.makers import first_lines, make_folders
from train_cifar100 import FAST, TASK
from training import checkpoint, commands, options, run as run_module
from training.loop import Interrupted, Trainer
from training.options import UserError
from training.ranks import Ranks
from training.report import read_metrics

NARROW = ["--sample", "--width", "0.0625", "--batch-size", "16", "--device", "cpu", "--precision", "fp32",
          "--overlay-every", "0"]     # tensorboard takes a picture's checksum in Python: it would be half of a test's time
MEASURED = ("images_per_second", "seconds", "peak_memory_mib")  # differ from run to run


def content_of(run_dir) -> dict:
    return checkpoint.read_checkpoint(Path(run_dir) / "last.pt")


def assert_equal(a, b, where=""):
    """Deep equality, bit for bit, of what a checkpoint holds."""
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), (where, a, b)


def scalars_of(run_dir) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
            if tag not in MEASURED}


def assert_runs_equal(hurt, unhurt):
    """Checkpoint, metrics.csv and TensorBoard curves, but for time and memory."""
    a, b = content_of(hurt), content_of(unhurt)
    for content in (a, b):
        content["position"].pop("seconds")
    assert_equal(a, b)
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(Path(d) / "metrics.csv")]
            for d in (hurt, unhurt)]
    assert rows[0] == rows[1]
    assert scalars_of(hurt) == scalars_of(unhurt)
    epochs = list(range(1, len(rows[0]) + 1))
    assert [step for step, _ in scalars_of(hurt)["loss/train"]] == epochs
    assert not [p.name for p in Path(hurt).iterdir() if TEMPORARY.fullmatch(p.name)]


# ---- runs that are stopped -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def unhurt(small_task, tmp_path_factory):
    """Four epochs of six steps, never disturbed, with dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("unhurt") / "run"
    assert commands.main(small_task, [*NARROW, "--epochs", "4", "--set", "dropout=0.5", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def without_nohup():
    """The tests may themselves run under nohup, where SIGHUP is ignored and so does not end a run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("after_step, number", [(3, signal.SIGTERM), (12, signal.SIGINT), (15, signal.SIGHUP)])
def test_stopped_by_a_signal_and_resumed_equals_the_unhurt_run(cli, monkeypatch, unhurt, after_step, number):
    step, steps = Trainer.step, []

    def signalled(self, *batch):
        step(self, *batch)
        steps.append(1)
        if len(steps) == after_step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(Trainer, "step", signalled)
    status, out, _ = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert status == 128 + number and len(steps) == after_step
    assert "everything is saved" in out and "--resume hurt" in out
    assert content_of("hurt")["position"]["epoch"] * 6 + content_of("hurt")["position"]["step"] == after_step
    assert cli("--resume")[0] == 2  # it is not under runs/
    if number == signal.SIGHUP:     # the checkpoint alone is enough
        Path("hurt/config.json").unlink()
    assert cli("--resume", "hurt")[0] == 0 and len(steps) == 24
    assert_runs_equal("hurt", unhurt)


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


def test_a_second_interrupt_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    with run_module.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals() and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("numbers", [[signal.SIGHUP], [signal.SIGINT, signal.SIGHUP]])    # Ctrl-C ends `| tee` as well
@pytest.mark.parametrize("channel", [pty.openpty, os.pipe])
def test_a_closed_terminal_ends_the_run_and_no_line_written_after_it_does_harm(channel, numbers):
    here, there = channel()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(there, 1)
        os.dup2(there, 2)
        with run_module.Signals() as signals:
            os.close(here)
            with pytest.raises(OSError):
                os.write(1, b"nobody reads this")
            for number in numbers:
                os.kill(os.getpid(), number)
            assert signals.received == numbers[0]
            assert os.write(1, b"nor this") == os.write(2, b"nor that") == 8
    finally:
        for number, copy in zip((1, 2), kept):
            os.dup2(copy, number)
            os.close(copy)
        os.close(there)


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
        patch.setattr(run_module.Signals, "nobody_reads", staticmethod(lambda: None))
        status, _, err = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert status == 128 + signal.SIGPIPE and "everything is saved" in err
    position = content_of("hurt")["position"]
    assert (position["epoch"], position["step"]) == place
    assert cli("--resume", "hurt")[0] == 0
    assert_runs_equal("hurt", unhurt)


def test_nohup_is_heeded(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with run_module.Signals() as signals:
        assert set(signals.before) == {signal.SIGINT, signal.SIGTERM}


def test_killed_before_the_first_checkpoint_starts_over(cli, monkeypatch, unhurt):
    def killed(self):
        raise KeyboardInterrupt  # where SIGKILL would leave the folder: config and events, no checkpoint
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
    assert status == 0      # last.prev.pt: the fourth epoch's last step, evaluated anew
    shutil.rmtree("r")
    Path("r").mkdir()
    assert cli("--resume", "r")[::2] == (2, "error: --resume r: there is no run in this folder (no config.json, no last.pt, "
                                            "no last.prev.pt)\n")


def test_a_bare_resume_takes_the_newest_unfinished_run(cli, monkeypatch):
    step = Trainer.step

    def signalled(self, *batch):
        step(self, *batch)
        os.kill(os.getpid(), signal.SIGTERM)
    for name in ("older", "newer"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", signalled)
            assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", f"runs/cifar100/{name}")[0] == 143
    for path in Path("runs/cifar100/older").iterdir():
        os.utime(path, (1e9, 1e9))
    with checkpoint.lock(Path("runs/cifar100/newer")), checkpoint.lock(Path("runs/cifar100/older")):
        status, _, err = cli("--resume")
    assert status == 2 and "every unfinished run in runs/cifar100 is being trained" in err
    for name in ("older", "newer"):     # the older one while the newer one is being trained
        with checkpoint.lock(Path("runs/cifar100/newer")) if name == "older" else contextlib.nullcontext():
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
    assert [step for step, _ in scalars_of("r")["top1/test"]] == [1, 2, 3]


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
    assert status == 1 and err.startswith("error: ") and "Traceback" not in err and not Path("runs/r").exists()


@pytest.mark.parametrize("words", [["--sanity", "--val-fraction", 0.001], ["--val-fraction", 0.001], ["--resume", "none"]])
def test_what_fails_at_the_start_leaves_no_folder(cli, words):
    status, _, err = cli(*(words if "--resume" in words else [*NARROW, *words]))
    assert status in (1, 2) and "error: " in err and not list(Path().glob("runs/*/*")) and not Path("none").exists()


def test_a_validation_split_keeps_the_best(cli):
    status, out, _ = cli(*NARROW, "--epochs", 2, "--val-fraction", 0.25, "--run-dir", "r")
    assert status == 0 and "72 training and 24 val images" in out and "The test set has not been looked at" in out
    assert "top1/val" in scalars_of("r")
    rows = read_metrics(Path("r/metrics.csv"))
    best = checkpoint.read_checkpoint("r/best.pt")["best"]
    assert best["top1"] == max(row["eval_top1"] for row in rows)


# ---- evaluation, transfer --------------------------------------------------------------------------------------------

def test_evaluate_repeats_the_last_epochs_numbers(cli, unhurt):
    status, out, _ = cli("--evaluate", unhurt / "last.pt", "--device", "cpu")
    row = read_metrics(unhurt / "metrics.csv")[-1]
    assert status == 0
    assert f"loss {row['eval_loss']:.4f}   top-1 {row['eval_top1']:.2f} %   top-5 {row['eval_top5']:.2f} %" in out
    classes = [float(x) for x in re.findall(r"(\d+\.\d) % of 8", out)]
    assert len(classes) == 4 and sum(classes) / 4 == pytest.approx(row["eval_top1"], abs=0.1)
    assert classes == sorted(classes)


def test_init_from_a_checkpoint(cli, unhurt):
    status, out, _ = cli(*NARROW, "--epochs", 1, "--model", "vgg-att2-concat-gate", "--init-from", unhurt / "last.pt")
    assert status == 0 and re.search(r"--init-from .*last.pt \(vgg-att3-concat-pc, width 0.0625, "
                                     r"cifar100\): \d+ of \d+ tensors loaded; starting fresh: classifier", out)


def test_evaluate_takes_the_settings_from_the_checkpoint(cli, unhurt, monkeypatch):
    for words in (["--sample"], ["--width", 0.5], ["--set", "dropout=0"], ["--run-dir", "x"]):
        status, _, err = cli("--evaluate", unhurt / "last.pt", *words)
        assert status == 2 and f"from the checkpoint: leave out {words[0]}" in err
    monkeypatch.setattr(options, "cpu_has_bf16", lambda: False)     # emulated, it would take hours
    here = [commands.precision_here(name, torch.device("cpu")) for name in ("bf16", "fp16", "fp32")]
    assert here == ["auto", "auto", "fp32"]
    if torch.cuda.is_available():
        assert commands.precision_here("fp16", torch.device("cuda")) == "fp16"


def test_the_folder_to_go_on_in(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        status, out, _ = cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "mine")
    assert status == 143 and "python train_cifar100.py --resume mine\n" in out
    assert cli("--resume", "other", "--run-dir", "mine")[0] == 2
    status, out, _ = cli("--run-dir", "mine", "--resume", "--precision", "auto", "--no-checkpoint-activations")
    assert status == 0 and "Run directory mine;" in out
    status, out, _ = cli("--resume", "mine/last.pt")
    assert status == 0 and out.startswith("mine is finished")


def test_every_run_has_a_folder_of_its_own(small_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        folders = {stack.enter_context(checkpoint.new_folder(commands.new_run_dirs(small_task, argparse.Namespace(), "vgg")))
                   for _ in range(3)}
        assert len(folders) == 3 and all(folder.is_dir() for folder in folders)
    assert not Path("runs").exists()    # nothing came into them


def test_the_command_that_goes_on_is_the_one_it_was_started_by(small_task, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["code of mine/train_cifar100.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(commands, "program", lambda name, module=None: name)
    assert commands.how_to_resume(small_task, Path("a run"), Ranks(0, 4, 0)) == (
        "torchrun --nproc-per-node=2 'code of mine/train_cifar100.py' --resume 'a run'")


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_peak_rate_that_is_told_is_the_peak(epochs):
    config = FAST | {"epochs": epochs, "batch_size": 64, "lr": 0.04}
    trainer = types.SimpleNamespace(config=config, batches=range(781), transferred=())
    told = re.fullmatch(r"Peak learning rate (.*) for batches of 64: 0.00062 an image; 0.15 of it for the 3x3 filters, by Muon",
                        commands.rate_in_words(trainer))
    assert float(told[1]) == pytest.approx(0.04, rel=0.005)


def test_same_seed_same_run_and_another_seed_another(cli, unhurt):
    for seed in (0, 1):
        assert cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--seed", seed, "--run-dir", seed)[0] == 0
    assert_runs_equal("0", unhurt)
    a, b = (content_of(name)["model"]["trunk.block1.0.conv.weight"] for name in "01")
    assert not torch.equal(a, b)


# ---- wrong use -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["--epocs", "3"], "unrecognized arguments: --epocs 3"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),  # no abbreviations
    (["--epochs", "0"], "0 is below 1"),
    (["--epochs", "many"], "invalid whole number value: 'many'"),
    (["--lr", "-1"], "-1 is not above 0"),
    (["--val-fraction", "1.5"], "1.5 is not between 0 and 1"),
    (["--model", "resnet"], "invalid choice: 'resnet'"),
    (["--set", "momentun=0.8"], "expected NAME=VALUE with a NAME of"),
    (["--set", "momentum=fast"], "expected a number, as in the default 0.9"),
    (["--set", "momentum=nan"], "expected a finite number"),
    (["--set", "epochs=3"], "use --epochs 3 for this one"),
    (["--set", "progressive=0.5"], "expected SCALE:UNTIL pairs"),
    (["--set", "progressive=half"], "expected SCALE:UNTIL pairs"),
    (["--freeze-epochs", "x"], "invalid number of 0 or more value: 'x'"),
    (["--set", "schedule=cosine"], "choose linear or halve"),
    (["--device", "tpu"], "expected auto, cpu, cuda, or cuda:N"),
    (["--sample", "--model", "vgg", "--set", "trunk=full"], "vgg-gap is the baseline that has one"),
    (["--set", "momentum=0", "--set", "nesterov=true"], "Nesterov needs a momentum"),
    (["--set", "label_smoothing=2"], "expected a number below 1"),
    (["--set", "crop_pad=40"], "expected a number below 16"),
    (["--recipe", "paper", "--set", "halve_every=0"], "expected 1 epoch or more"),
    (["--resume", "nowhere"], "there is no run in this folder"),
])
def test_wrong_use_exits_with_2(cli, words, message):
    status, _, err = cli(*words)
    assert status == 2 and message in err and "Traceback" not in err


TEXT_OPTIONS = ("--evaluate", "--resume", "--run-dir", "--data-dir", "--json", "--init-from", "--set", "--device", "--epochs",
                "--seed", "--model", "--benchmark", "--val-fraction")


@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_an_empty_word_is_no_value(cli, option):
    """What a shell makes of a variable that is not set."""
    for words in ([option, ""], [f"{option}="], [option, " "]):
        status, _, err = cli(*words)
        assert status == 2 and err.endswith(f"error: {option} is empty\n")
    for words in (["--sample", "--width", "0.0625", "", "--epochs", 1], [""]):
        status, _, err = cli(*words)
        assert status == 2 and "error: an argument is empty" in err
    assert not list(Path().iterdir())


def test_home_folders_are_expanded_everywhere(cli, unhurt, monkeypatch, tmp_path):
    """A shell leaves ~ alone behind an =."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir=~/x", f"--init-from={unhurt}/last.pt")[0] == 0
    status, out, err = cli("--evaluate=~/x/last.pt", "--device", "cpu")
    assert status == 0 and out.startswith(f"{home}/x/last.pt: vgg"), err
    assert cli("--resume=~/x")[0] == 0
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--init-from=~/x/last.pt", "--run-dir=~/y")[0] == 0
    status, _, err = cli("--data-dir=~/data", "--width", 0.0625, "--sanity", "--model", "vgg")
    assert status == 0, err
    assert cli("--benchmark", 1, "--sample", "--model", "vgg", "--width", 0.03125, "--num-workers", 0, "--json=~/b.json")[0] == 0
    assert not Path("~").exists() and {path.name for path in home.iterdir()} == {"x", "y", "b.json"}


@pytest.mark.parametrize("option", ["--run-dir", "--resume", "--data-dir", "--evaluate", "--json", "--init-from"])
def test_a_home_folder_that_is_not_there(cli, monkeypatch, option):
    status, _, err = cli(f"{option}=~nosuchuser/x")
    assert status == 2 and f"argument {option}: ~nosuchuser/x: there is no home folder for ~nosuchuser" in err
    monkeypatch.setenv("HOME", "")
    status, _, err = cli(f"{option}=~/x")
    assert status == 2 and "there is no home folder for ~ (a file of that name is ./~)" in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words, message", [
    (["--seed", "99999999999999999999"], "argument --seed: 99999999999999999999 is above 9223372036854775807"),
    (["--seed", "-1"], "argument --seed: -1 is below 0"),
    (["--seed", "9" * 5000], "9999... is not between 0 and 9223372036854775807"),
    (["--epochs", "9" * 30], "argument --epochs: 999999999999999999999999999999 is above 1000000"),
    (["--num-workers", "999999999"], "argument --num-workers: 999999999 is above 256"),
    (["--batch-size", "1" + "0" * 20], "is above 1000000"), (["--image-size", "100000"], "is above 4096"),
    (["--width", "1e300"], "1e300 is above 16"), (["--width", "1e999"], "1e999 is above 16"), (["--width", "nan"], "nan is not above 0"),
    (["--lr", "1e300"], "1e300 is above 1e+06"), (["--micro-batch", "9" * 40], "is above 2147483647"),
    (["--overlay-every", "9" * 40], "is above 2147483647"), (["--benchmark", "9" * 12], "is above 100000"),
    (["--freeze-epochs", "1e308"], "--freeze-epochs 1e+308: fewer than the 30 epochs"),
    (["--device", "cuda:300"], "expected auto, cpu, cuda, or cuda:N"),
    (["--device", "cuda:99999999999999999999"], "expected auto, cpu, cuda, or cuda:N"),
    (["--set", "cutout=9999999999999999999999"], "expected a number below 4096"),
    (["--set", "pool4=9999999999999999999999"], "expected a number below 4096"),
    (["--set", "dropout=1e308"], "out of range"), (["--set", "halve_every=" + "9" * 5000], "expected a whole number"),
    (["--set", "progressive=0.5:1e400"], "expected SCALE:UNTIL pairs"),
])
def test_numbers_beyond_their_range(cli, words, message):
    status, _, err = cli("--sample", *words)
    assert status == 2 and message in err and "Traceback" not in err and len(err.splitlines()[-1]) < 400
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", [
    ["--seed", 2**63 - 1], ["--lr", 1e-300], ["--batch-size", 10**6], ["--micro-batch", 2**31 - 1], ["--width", 1e-300],
    ["--overlay-every", 2**31 - 1], ["--set", "halve_every=" + "9" * 40], ["--set", "cutout=4095"], ["--set", "muon=1e-320"],
    ["--set", "weight_decay=1e-320"], ["--set", "warmup=0.9999999999999999"], ["--num-workers", 256], ["--set", "zoom=1e-300"],
    ["--set", "jitter=0.999999999"], ["--set", "ema_decay=0.9999999999999999"], ["--set", "pool4=4095"],
    ["--set", "progressive=1e-300:1e-300"]])
def test_numbers_at_the_end_of_their_range(cli, words):
    status, _, err = cli("--sample", "--model", "vgg", "--width", 1 / 64, "--epochs", 1, "--device", "cpu", "--run-dir", "r", *words)
    assert status == 0 and "Traceback" not in err


def test_numbers_that_only_diverge(cli):
    for words in (["--lr", 1e6], ["--set", "muon=1e308"], ["--set", "weight_decay=1e308"], ["--set", "transfer_lr=1e308"]):
        status, _, err = cli("--sample", "--model", "vgg", "--width", 1 / 64, "--epochs", 1, "--device", "cpu", *words)
        assert status in (0, 1) and (status == 0 or "the training diverged" in err), (words, err)


def test_a_million_epochs_begin_at_once(cli, monkeypatch):
    """What is said before the training must not count its steps."""
    monkeypatch.setattr(Trainer, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    started = time.monotonic()
    status, out, _ = cli(*NARROW, "--model", "vgg", "--epochs", 10**6, "--set", "schedule=double-halve", "--set", "warmup=0")
    assert status == 143 and "Peak learning rate 0.4 for" in out and time.monotonic() - started < 20


@pytest.mark.parametrize("words, message", [
    (["--width", 16], "--width 16: the network's weights and what the optimizer keeps of them take 76 GiB of memory, and this "
                      "machine has 24"),
    (["--image-size", 4096], "--image-size 4096: to train on two images at a time takes over"),
])
def test_what_no_memory_could_hold_is_refused_before_it_is_tried(cli, monkeypatch, words, message):
    monkeypatch.setattr("training.memory.physical_memory", lambda: 24 * 2**30)
    for more in ([], ["--sanity"]):
        status, _, err = cli("--sample", "--device", "cpu", *words, *more)
        assert status == 2 and message in err
    assert not list(Path().iterdir())


def test_the_command_that_resumes_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    """It is stopped, and its last line is given to a shell as it stands."""
    folder = b"-it's two words $HOME\ncaf\xe9"
    stop = ("import os, signal, sys; sys.argv = sys.argv[1:]; import train_cifar100 as script; "
            "from training import commands; from training.loop import Trainer; step = Trainer.step; "
            "Trainer.step = lambda *words: (step(*words), os.kill(os.getpid(), signal.SIGTERM)); "
            "sys.exit(commands.main(script.TASK))")
    script = os.path.join(ROOT, "train_cifar100.py")
    words = [script, "--sample", "--model", "vgg", "--width", "0.015625", "--image-size", "16", "--epochs", "1", "--device",
             "cpu", b"--run-dir=" + folder]
    done = subprocess.run([sys.executable, "-c", stop, *words], cwd=tmp_path, capture_output=True)
    assert done.returncode == 143, done.stderr
    line = done.stdout.splitlines()[-1]
    assert b"--resume" in line
    resumed = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True)
    assert resumed.returncode == 0, (line, resumed.stderr)
    assert checkpoint.read_checkpoint(tmp_path / os.fsdecode(folder) / "last.pt")["finished"]


def test_what_is_printed_to_be_typed_is_quoted(cli, unhurt):
    shutil.copytree(unhurt, "my run")
    assert "--resume 'my run' --epochs 8" in cli("--resume", "my run")[1]
    assert "go on with it by --resume 'my run'," in cli(*NARROW, "--run-dir", "my run")[2]
    with pytest.raises(UserError, match="then --resume 'my file'"):
        Path("my file").write_text("")
        checkpoint.save_file(Path("my file/last.pt"), {})


# ---- the process's surroundings --------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])    # SIGUSR2: in the campaign
def test_signals_of_batch_systems_save_and_end_the_run(cli, monkeypatch, unhurt, number):
    step, steps = Trainer.step, []

    def signalled(self, *batch):
        step(self, *batch)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(Trainer, "step", signalled)
    status, out, _ = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert status == 128 + number and f"Stopped by {signal.Signals(number).name}; everything is saved" in out
    assert cli("--resume", "hurt")[0] == 0
    assert_runs_equal("hurt", unhurt)


def test_the_readmes_job_for_slurm_resumes_until_the_run_is_finished(tmp_path):
    """With an srun that is signalled twice, and a scontrol that says what it was asked."""
    job = re.search(r"```\n(#!/bin/bash\n#SBATCH .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for name, body in (("srun", 'echo "$*" >> asked; mkdir -p runs/cifar100/night; touch runs/cifar100/night/config.json\n'
                                '[ $(wc -l < asked) -lt 3 ] && exit 138; exit 0'), ("scontrol", 'echo "$*" >> requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for _ in range(3):
        subprocess.run(["bash", "-c", job], cwd=tmp_path, env=environment, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    start = "--cpus-per-task=4 .venv/bin/python train_cifar100.py --device cuda"
    assert asked == [f"{start} --run-dir runs/cifar100/night"] + 2 * [f"{start} --resume runs/cifar100/night"]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2


def test_a_run_in_a_thread(cli, unhurt):
    """A notebook server, an application: Python handles signals in the main thread alone."""
    status = []
    thread = threading.Thread(target=lambda: status.append(cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "r")[0]))
    thread.start()
    thread.join()
    assert status == [0]
    assert_runs_equal("r", unhurt)
    for words in (["--sanity", "--sample", "--model", "vgg", "--width", 0.03125], ["--evaluate", "r/last.pt"]):
        thread = threading.Thread(target=lambda: status.append(cli(*words)[0]))
        thread.start()
        thread.join()
    assert status == [0, 0, 0]


def test_signal_handlers_that_are_not_pythons_come_through(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: called.append((number, handler)))
    called = []
    with run_module.Signals():
        pass
    assert {handler for _, handler in called[len(called) // 2:]} == {signal.SIG_DFL}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A checkpoint of a run on the whole built-in sample."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    assert commands.main(TASK, ["--sample", "--model", "vgg", "--width", "0.015625", "--epochs", "1", "--device", "cpu",
                                "--run-dir", str(folder)]) == 0
    return folder / "last.pt"


def test_a_closed_pipe_stops_no_files(tmp_path, sampled):
    """... | head -1; at the same time."""
    script, tiny = os.path.join(ROOT, "train_cifar100.py"), ["--sample", "--model", "vgg", "--width", "0.03125"]
    assert first_lines([[script, "--evaluate", str(sampled), "--device", "cpu"],
                        [script, "--benchmark", "1", *tiny, "--num-workers", "0", "--json", "b.json"],
                        [script, "--sanity", *tiny, "--run-dir", "s"]], tmp_path) == [(0, 1, "")] * 3
    assert all((tmp_path / name).exists() for name in ("b.json", "s/last.pt", "s/metrics.csv"))


# ---- data that is not where it was -----------------------------------------------------------------------------------

def test_nothing_is_downloaded_for_what_was_made_before(cli, monkeypatch, tmp_path):
    def refuse(*words, **options):
        raise AssertionError("a download began")
    monkeypatch.setattr("data.fetch", refuse)
    make_folders(tmp_path / "photos", size=(16, 16), per_class=8)
    words = ["--data-dir", "photos", "--model", "vgg", "--width", 0.015625, "--device", "cpu", "--epochs", 1, "--batch-size", 4,
             "--num-workers", 0, "--run-dir", "r"]
    assert cli(*words)[0] == 0
    Path("photos").rename("moved")
    for place in ([], ["--data-dir", "elsewhere"]):
        where = tmp_path / (place[1] if place else "photos")
        for command in (["--resume", "r", "--epochs", 2], ["--evaluate", "r/last.pt"]):
            status, _, err = cli(*command, *place, "--device", "cpu")
            assert status == 1 and err == (f"error: the images that this was trained on are not in {where} any more: give "
                                           f"--data-dir, the folder that holds them now\n")
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
    words = ["--data-dir", photos, "--model", "vgg-att1-pc", "--width", 0.015625, "--device", "cpu", "--batch-size", 4,
             "--num-workers", 1, "--run-dir", run]
    for more in (["--sanity"], ["--epochs", 1]):
        status, out, err = cli(*words, *more)
        assert status == 0 and "decoding images" not in out and "damaged" not in out, err
        if more == ["--sanity"]:
            shutil.rmtree(run)
    assert cli("--resume", run, "--epochs", 2, "--device", "cpu")[0] == 0
    status, out, err = cli("--evaluate", f"{run}/last.pt", "--device", "cpu")
    assert status == 0 and "caf\\xe9" in out, err
    assert content_of(run)["class_names"] == [os.fsdecode(b"caf\xe9"), "plain"]


def test_what_is_missing_exits_with_1(cli, monkeypatch):
    status, _, err = cli("--evaluate", "none.pt")
    assert status == 1 and err == "error: none.pt: there is no such file\n"
    if not torch.cuda.is_available():
        status, _, err = cli("--sample", "--device", "cuda")
        assert status == 1 and "sees no CUDA GPU" in err


def test_a_run_is_never_overwritten_nor_contradicted(cli, unhurt):
    status, _, err = cli(*NARROW, "--run-dir", unhurt)
    assert status == 2 and "holds a run already: go on with it by --resume" in err
    status, _, err = cli("--resume", unhurt, "--lr", 0.3)
    assert status == 2 and "this run has --lr 0.1, and 0.3 would make it another run" in err
    status, _, err = cli("--resume", unhurt, "--set", "momentum=0.5")
    assert status == 2 and "would make it another run" in err


def test_two_processes_never_share_a_run(cli, unhurt):
    with checkpoint.lock(unhurt):
        status, _, err = cli("--resume", unhurt)
    assert status == 1 and "is in use by another process" in err


def test_changed_data_is_noticed(cli, small_task, unhurt):
    from sample_data import cifar_sample
    shutil.copytree(unhurt, "r")
    for classes, each, message in ((5, 24, "its classes are not"), (4, 20, "it had 96 training images and has 80 now")):
        sets = cifar_sample(classes=classes, train_per_class=each, test_per_class=8)
        task = dataclasses.replace(small_task, sample=lambda config: sets)
        status, _, err = cli("--resume", "r", "--epochs", 6, task=task)
        assert status == 1 and "the data set has changed" in err and message in err


@pytest.mark.parametrize("error, status, words", [
    (UserError("no such thing", 2), 2, "error: no such thing\n"), (DataError("a.png is bad"), 1, "error: a.png is bad\n"),
    (MemoryError(), 1, "error: out of memory outside the training step: MemoryError\nIs another program"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "outside the training step: CUDA out of memory.\nIs another"),
    (PermissionError(13, "Permission denied", "runs"), 1, "error: runs: Permission denied\n"),
    (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
    (KeyboardInterrupt(), 130, "Stopped.\n"), (Interrupted(15), 143, "")])
def test_what_a_user_can_mend_is_told_without_a_traceback(capsys, error, status, words):
    def fail():
        raise error
    assert commands.exit_status(fail, "Stopped.") == status
    assert words in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        commands.exit_status(lambda: torch.zeros(2) @ torch.zeros(3), "")


def test_a_run_folder_that_cannot_be_made(cli):
    Path("file").write_text("")
    status, _, err = cli(*NARROW, "--run-dir", "file/run")
    assert status == 1 and err.startswith("error: file/run: ") and "Traceback" not in err


def test_config_json_says_what_was_run(cli, unhurt):
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "r")[0] == 0
    assert cli("--resume", "r", "--epochs", 2)[0] == 0
    commands_run = json.loads(Path("r/config.json").read_text())["commands"]
    assert len(commands_run) == 2 and "--epochs 1" in commands_run[0] and "--resume r --epochs 2" in commands_run[1]
    record = json.loads((unhurt / "config.json").read_text())
    assert record["finished"] and record["config"]["width"] == 0.0625 and record["config"]["dropout"] == 0.5
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["threads"] > 0
