"""Wrong use of train_cifar100.py, and what a user can mend: the message and the exit status."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.checkpoint import read_checkpoint
from common.errors import UserError
from tests.helpers.environment import ROOT
from tests.helpers.runs import NARROW
from training import run_folder
from training.trainer import Trainer

TINY = ["--sample", "--model", "vgg", "--width", 1 / 64, "--epochs", 1, "--device", "cpu"]


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epocs", "3"], "unrecognized option --epocs (did you mean --epochs?)"),
        # no abbreviations
        (["--epoch", "3"], "unrecognized option --epoch (did you mean --epochs?)"),
        (["--epochs", "0"], "0 is below 1"),
        (["--epochs", "many"], "invalid whole number value: 'many'"),
        (["--lr", "-1"], "-1 is not above 0"),
        (["--val-fraction", "1.5"], "1.5 is not between 0 and 1"),
        (["--model", "resnet"], "invalid choice 'resnet'"),
        (["--set", "momentun=0.8"], "no constant is called momentun (did you mean momentum?)"),
        (["--set", "momentum"], "--set momentum: expected NAME=VALUE"),
        (["--set", "momentum=fast"], "expected a number, as in the default 0.9"),
        (["--set", "momentum=nan"], "expected a finite number"),
        (["--set", "epochs=3"], "use --epochs 3 for this one"),
        (["--set", "progressive=0.5"], "expected SCALE:UNTIL pairs"),
        (["--set", "progressive=half"], "expected SCALE:UNTIL pairs"),
        (["--freeze-epochs", "x"], "invalid number of 0 or more value: 'x'"),
        (["--set", "schedule=cosine"], "choose linear or halve"),
        (["--device", "tpu"], "expected auto, cpu, cuda, or cuda:N"),
        (
            ["--sample", "--model", "vgg", "--set", "trunk=full"],
            "vgg-gap is the baseline that has one",
        ),
        (["--set", "momentum=0", "--set", "nesterov=true"], "Nesterov needs a momentum"),
        (["--set", "label_smoothing=2"], "expected a number below 1"),
        (["--set", "crop_pad=40"], "expected a number below 16"),
        (["--recipe", "paper", "--set", "halve_every=0"], "expected 1 epoch or more"),
        (["--resume", "nowhere"], "there is no run in this folder"),
    ],
)
def test_wrong_use_exits_with_2(cli, words, message):
    status, _, err = cli(*words)
    assert status == 2 and message in err and "Traceback" not in err


TEXT_OPTIONS = (
    "--evaluate",
    "--resume",
    "--run-dir",
    "--data-dir",
    "--json",
    "--init-from",
    "--set",
    "--device",
    "--epochs",
    "--seed",
    "--model",
    "--benchmark",
    "--val-fraction",
)


@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_an_empty_word_is_no_value(cli, option):
    """What a shell makes of a variable that is not set."""
    for words in ([option, ""], [f"{option}="], [option, " "]):
        status, _, err = cli(*words)
        assert status == 2 and f"error: {option} is empty\n" in err
    for words in (["--sample", "--width", "0.0625", "", "--epochs", 1], [""]):
        status, _, err = cli(*words)
        assert status == 2 and "error: an argument is empty" in err
    assert not list(Path().iterdir())


def test_home_folders_are_expanded_everywhere(cli, unhurt, monkeypatch, tmp_path):
    """A shell leaves ~ alone behind an =."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert (
        cli(
            *NARROW,
            *"--model vgg --epochs 1 --run-dir=~/x".split(),
            f"--init-from={unhurt}/last.pt",
        )[0]
        == 0
    )
    status, out, err = cli("--evaluate=~/x/last.pt", "--device", "cpu")
    assert status == 0 and out.startswith(f"{home}/x/last.pt: vgg"), err
    assert cli("--resume=~/x")[0] == 0
    assert (
        cli(*NARROW, "--model", "vgg", "--epochs", 1, "--init-from=~/x/last.pt", "--run-dir=~/y")[0]
        == 0
    )
    status, _, err = cli("--data-dir=~/data", "--width", 0.0625, "--sanity", "--model", "vgg")
    assert status == 0, err
    assert (
        cli(
            *(
                "--benchmark 1 --sample --model vgg --width 0.03125 --num-workers 0 --json=~/b.json"
            ).split()
        )[0]
        == 0
    )
    assert not Path("~").exists() and {path.name for path in home.iterdir()} == {"x", "y", "b.json"}


@pytest.mark.parametrize(
    "option", ["--run-dir", "--resume", "--data-dir", "--evaluate", "--json", "--init-from"]
)
def test_a_home_folder_that_is_not_there(cli, monkeypatch, option):
    status, _, err = cli(f"{option}=~nosuchuser/x")
    assert (
        status == 2
        and f"error: {option}: ~nosuchuser/x: there is no home folder for ~nosuchuser" in err
    )
    monkeypatch.setenv("HOME", "")
    status, _, err = cli(f"{option}=~/x")
    assert status == 2 and "there is no home folder for ~ (a file of that name is ./~)" in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--seed", "99999999999999999999"],
            "error: --seed: 99999999999999999999 is above 9223372036854775807",
        ),
        (["--seed", "-1"], "error: --seed: -1 is below 0"),
        (["--seed", "9" * 5000], "9999... is not between 0 and 9223372036854775807"),
        (
            ["--epochs", "9" * 30],
            "error: --epochs: 999999999999999999999999999999 is above 1000000",
        ),
        (["--num-workers", "999999999"], "error: --num-workers: 999999999 is above 256"),
        (["--batch-size", "1" + "0" * 20], "is above 1000000"),
        (["--image-size", "100000"], "is above 4096"),
        (["--width", "1e300"], "1e300 is above 16"),
        (["--width", "1e999"], "1e999 is above 16"),
        (["--width", "nan"], "nan is not above 0"),
        (["--lr", "1e300"], "1e300 is above 1e+06"),
        (["--micro-batch", "9" * 40], "is above 2147483647"),
        (["--overlay-every", "9" * 40], "is above 2147483647"),
        (["--benchmark", "9" * 12], "is above 100000"),
        (["--freeze-epochs", "1e308"], "--freeze-epochs 1e+308: fewer than the 5 epochs"),
        (["--device", "cuda:300"], "expected auto, cpu, cuda, or cuda:N"),
        (["--device", "cuda:99999999999999999999"], "expected auto, cpu, cuda, or cuda:N"),
        (["--set", "cutout=9999999999999999999999"], "expected a number below 4096"),
        (["--set", "pool4=9999999999999999999999"], "expected a number below 4096"),
        (["--set", "dropout=1e308"], "out of range"),
        (["--set", "halve_every=" + "9" * 5000], "expected a whole number"),
        (["--set", "progressive=0.5:1e400"], "expected SCALE:UNTIL pairs"),
    ],
)
def test_numbers_beyond_their_range(cli, words, message):
    status, _, err = cli("--sample", *words)
    assert (
        status == 2
        and message in err
        and "Traceback" not in err
        and max(map(len, err.splitlines())) < 400
    )
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", 2**63 - 1],
        ["--lr", 1e-300],
        ["--batch-size", 10**6],
        ["--micro-batch", 2**31 - 1],
        ["--width", 1e-300],
        ["--overlay-every", 2**31 - 1],
        ["--set", "halve_every=" + "9" * 40],
        ["--set", "cutout=4095"],
        ["--set", "muon=1e-320"],
        ["--set", "weight_decay=1e-320"],
        ["--set", "warmup=0.9999999999999999"],
        ["--num-workers", 256],
        ["--set", "zoom=1e-300"],
        ["--set", "jitter=0.999999999"],
        ["--set", "ema_decay=0.9999999999999999"],
        ["--set", "pool4=4095"],
        ["--set", "progressive=1e-300:1e-300"],
    ],
)
def test_numbers_at_the_end_of_their_range(cli, words):
    status, _, err = cli(
        *TINY,
        "--run-dir",
        "r",
        *words,
    )
    assert status == 0 and "Traceback" not in err


def test_numbers_that_only_diverge(cli):
    for words in (
        ["--lr", 1e6],
        ["--set", "muon=1e308"],
        ["--set", "weight_decay=1e308"],
        ["--set", "transfer_lr=1e308"],
    ):
        status, _, err = cli(
            *TINY,
            *words,
        )
        assert status in (0, 1) and (status == 0 or "the training diverged" in err), (words, err)


def test_a_million_epochs_begin_at_once(cli, monkeypatch):
    """What is said before the training must not count its steps."""
    monkeypatch.setattr(Trainer, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    started = time.monotonic()
    status, out, _ = cli(
        *NARROW,
        "--model",
        "vgg",
        "--epochs",
        10**6,
        *"--set schedule=double-halve --set warmup=0".split(),
    )
    assert status == 143 and "Peak learning rate 0.8 for" in out and time.monotonic() - started < 20


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--width", 16],
            "--width 16: the network's weights and what the optimizer keeps of them take 76 GiB of "
            "memory, and this "
            "machine has 24",
        ),
        (["--image-size", 4096], "--image-size 4096: to train on two images at a time takes over"),
    ],
)
def test_what_no_memory_could_hold_is_refused_before_it_is_tried(cli, monkeypatch, words, message):
    monkeypatch.setattr("training.memory.total_memory", lambda: 24 * 2**30)
    for more in ([], ["--sanity"]):
        status, _, err = cli("--sample", "--device", "cpu", *words, *more)
        assert status == 2 and message in err
    assert not list(Path().iterdir())


def test_the_command_that_resumes_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    """It is stopped, and its last line is given to a shell as it stands."""
    folder = b"-it's two words $HOME\ncaf\xe9"
    stop = (
        "import os, signal, sys; sys.argv = sys.argv[1:]; import train_cifar100 as script; "
        "from training import commands; from training.trainer import Trainer; step = Trainer.step; "
        "Trainer.step = lambda *words: (step(*words), os.kill(os.getpid(), signal.SIGTERM)); "
        "sys.exit(commands.main(script.TASK))"
    )
    script = os.path.join(ROOT, "train_cifar100.py")
    words = [
        script,
        *"--sample --model vgg --width 0.015625 --image-size 16 --epochs 1 --device cpu".split(),
        b"--run-dir=" + folder,
    ]
    done = subprocess.run([sys.executable, "-c", stop, *words], cwd=tmp_path, capture_output=True)
    assert done.returncode == 143, done.stderr
    line = done.stdout.splitlines()[-1]
    assert b"--resume" in line
    resumed = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True)
    assert resumed.returncode == 0, (line, resumed.stderr)
    assert read_checkpoint(tmp_path / os.fsdecode(folder) / "last.pt")["finished"]


def test_what_is_printed_to_be_typed_is_quoted(cli, unhurt):
    shutil.copytree(unhurt, "my run")
    assert "--resume 'my run' --epochs 8" in cli("--resume", "my run")[1]
    assert "resume it with --resume 'my run'," in cli(*NARROW, "--run-dir", "my run")[2]
    with pytest.raises(UserError, match="then --resume 'my file'"):
        Path("my file").write_text("")
        run_folder.save_file(Path("my file/last.pt"), {})


def test_what_is_missing_exits_with_1(cli, monkeypatch):
    status, _, err = cli("--evaluate", "none.pt")
    assert status == 1 and err == "error: none.pt: there is no such file\n"
    if not torch.cuda.is_available():
        status, _, err = cli("--sample", "--device", "cuda")
        assert status == 1 and "sees no CUDA GPU" in err


def test_a_run_is_never_overwritten_nor_contradicted(cli, unhurt):
    status, _, err = cli(*NARROW, "--run-dir", unhurt)
    assert status == 2 and "holds a run already: resume it with --resume" in err
    status, _, err = cli("--resume", unhurt, "--lr", 0.3)
    assert status == 2 and "this run has --lr 0.05, and 0.3 would make it another run" in err
    status, _, err = cli("--resume", unhurt, "--set", "momentum=0.5")
    assert status == 2 and "would make it another run" in err


def test_two_processes_never_share_a_run(cli, unhurt):
    with run_folder.lock(unhurt):
        status, _, err = cli("--resume", unhurt)
    assert status == 1 and "is in use by another process" in err


def test_a_run_folder_that_cannot_be_made(cli):
    Path("file").write_text("")
    status, _, err = cli(*NARROW, "--run-dir", "file/run")
    assert status == 1 and err.startswith("error: file/run: ") and "Traceback" not in err
