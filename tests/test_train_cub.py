"""train_cub.py as people use it: the sanity pass, transfer in stages, resuming in each of them, and
wrong use."""

import re

import pytest
import torch

import train_cifar100
import train_cub
from data import cifar_sample
from datasets.cub_sample import write_cub_sample
from tests.helpers.runs import assert_runs_equal, config_of, content_of, signal_after, with_sample
from training import commands, transfer
from training.report import read_metrics

SMALL = "--width 0.0625 --image-size 32 --batch-size 8 --device cpu --precision fp32".split()
STAGED = [*SMALL, "--epochs", "4", "--freeze-epochs", "2", "--overlay-every", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with 3 classes of 8 training and 4 test birds, and a CIFAR-100 network of the
    same width."""
    root = tmp_path_factory.mktemp("birds")
    write_cub_sample(root / "data", seed=1, classes=3, train_per_class=8, test_per_class=4)
    sets = cifar_sample(classes=4, train_per_class=6, test_per_class=4)
    task = with_sample(train_cifar100.TASK, lambda config: sets)
    assert (
        commands.main(
            task,
            [
                *(
                    "--sample --width 0.0625 --epochs 1 --batch-size 8 --device cpu "
                    "--precision fp32 --run-dir"
                ).split(),
                str(root / "cifar"),
            ],
        )
        == 0
    )
    return root


@pytest.fixture
def cli(folder, tmp_path, monkeypatch, capsys):
    """cli("--epochs", 2) -> (exit status, standard output, standard error), beside the data folder;
    no cached weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder / "data")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(transfer, "IMAGENET_URL", "http://127.0.0.1:9/vgg16_bn-6c64b313.pth")

    def call(*words):
        capsys.readouterr()
        return commands.main(train_cub.TASK, [str(word) for word in words]), *capsys.readouterr()

    return call


def test_sanity_pass(cli, tmp_path):
    status, out, err = cli("--sanity", *SMALL, "--run-dir", "s")
    assert status == 0, out + err
    assert "CUB_200_2011" in out and f"no ImageNet weights in {transfer.imagenet_file()}" in out
    assert "frozen trunk and all" in out and "The trunk trains from here on" in out
    assert (
        re.search(r"largest difference of a weight 0$", out, re.MULTILINE)
        and "epoch of 24 images" in out
    )
    assert not (tmp_path / "torch").exists()  # nothing was downloaded


def test_sanity_pass_of_the_papers_recipe_without_data(cli, monkeypatch):
    sets = cifar_sample(classes=3, train_per_class=16, test_per_class=4, size=80)
    monkeypatch.setattr(train_cub, "TASK", with_sample(train_cub.TASK, lambda config: sets))
    status, out, _ = cli(
        *"--sanity --recipe paper --data-dir nothing --width 0.0625 --device cpu".split()
    )
    assert status == 0 and "(no cub in nothing)" in out and "the real run needs --init-from" in out
    assert "of 80x80 px" in out and "epoch of 5,994 images" in out


@pytest.fixture(scope="module")
def unhurt(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unhurt") / "run"
    assert (
        commands.main(
            train_cub.TASK,
            [
                *STAGED,
                "--data-dir",
                str(folder / "data"),
                "--init-from",
                str(folder / "cifar" / "last.pt"),
                "--run-dir",
                str(run_dir),
            ],
        )
        == 0
    )
    return run_dir


@pytest.mark.parametrize("after_step", [4, 8])
def test_stopped_in_a_stage_and_resumed_equals_the_unhurt_run(
    cli, monkeypatch, folder, unhurt, after_step
):
    """Three steps an epoch; the trunk is frozen for six of them."""
    signal_after(monkeypatch, after_step)
    status, out, _ = cli(
        *STAGED,
        "--data-dir",
        folder / "data",
        "--init-from",
        folder / "cifar" / "last.pt",
        "--run-dir",
        "hurt",
    )
    assert status == 143 and "python train_cub.py --resume hurt" in out
    assert re.search(
        r"Peak learning rate [\d.]+ for batches of 8: 0.00[\d.]+ per image; transferred layers at "
        r"0.5 times their rate,"
        r" whose trunk trains after 2 epochs",
        out,
    )
    status, out, _ = cli("--resume", "hurt")
    assert status == 0 and ("The trunk trains" in out) == (after_step < 6)
    assert_runs_equal("hurt", unhurt)


def test_the_run_starts_from_the_cifar_network_and_keeps_its_normalisation(folder, unhurt):
    ours, theirs = content_of(unhurt), content_of(folder / "cifar")
    assert list(ours["mean"]) == list(theirs["mean"]) and ours["input_size"] == [32, 32]
    assert "trunk.block1.0.conv.weight" in ours["transferred"]
    assert not [name for name in ours["transferred"] if name.startswith("classifier.linears")]
    assert ours["config"]["trunk"] == "pooled" and len(ours["class_names"]) == 3


def test_evaluate_and_init_from_birds(cli, unhurt):
    status, out, _ = cli("--evaluate", unhurt / "last.pt", "--device", "cpu")
    row = read_metrics(unhurt / "metrics.csv")[-1]
    assert status == 0 and "of 4" in out
    assert (
        f"loss {row['eval_loss']:.4f}   top-1 {row['eval_top1']:.2f} %   top-5 "
        f"{row['eval_top5']:.2f} %" in out
    )
    status, out, _ = cli(
        *SMALL,
        *"--epochs 1 --freeze-epochs 0 --init-from".split(),
        unhurt / "last.pt",
        "--run-dir",
        "more",
    )
    # the same classes: the head goes over too
    assert status == 0 and "starting fresh: nothing" in out


def test_from_scratch_nothing_is_frozen(cli):
    status, out, _ = cli(*SMALL, "--epochs", 1, "--init-from", "none", "--run-dir", "scratch")
    assert status == 0 and "transferred" not in out
    content = content_of("scratch")
    assert content["config"]["freeze_epochs"] == 0 and content["transferred"] == []


@pytest.mark.parametrize("epochs, frozen", [(1, 0.25), (2, 0.5), (8, 2), (60, 2)])
def test_a_short_run_freezes_for_a_quarter_at_most(epochs, frozen):
    config = config_of(train_cub.TASK, "--epochs", epochs)
    assert config["freeze_epochs"] == frozen
    commands.check_recipe(config | {"image_size": 64})


def test_defaults_follow_what_was_asked_for(cli, unhurt):
    """--epochs below the frozen epochs, and no momentum where Nesterov's is the default: neither is
    the user's mistake."""
    status, out, err = cli(
        *SMALL,
        "--epochs",
        2,
        "--init-from",
        unhurt / "last.pt",
        *"--set momentum=0 --run-dir short".split(),
    )
    assert status == 0 and "whose trunk trains after 0.5 epochs" in out, err
    assert content_of("short")["config"]["nesterov"] is False


def test_out_of_memory_is_told_with_the_options_that_help(cli, monkeypatch):
    def none(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("attention_model.Network.forward", none)
    monkeypatch.setattr("training.estimate.guess_seconds", lambda run, images: 0.0)
    monkeypatch.setattr("training.config_checks.check_memory", lambda *words: None)
    status, out, err = cli(*SMALL, "--init-from", "none", "--run-dir", "r")
    assert (
        status == 1
        and "continuing with --micro-batch 1 " in out
        and "one image has none worth using" in out
    )
    assert re.search(
        r"out of memory at 1 image at once \(peak \d+ MiB\).*\nTry, in this order: "
        r"--checkpoint-activations, a "
        r"smaller --image-size, a smaller --width\n",
        err,
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--recipe", "paper"], "this recipe starts from a CIFAR-100 network"),
        (
            ["--init-from", "none", "--freeze-epochs", "1"],
            "--freeze-epochs keeps a transferred trunk",
        ),
        (
            ["--init-from", "x.pt", "--epochs", "2", "--freeze-epochs", "2"],
            "fewer than the 2 epochs",
        ),
        (["--set", "crop=boxes"], "choose box or whole"),
        (["--set", "zoom=1.5"], "expected a number below 1"),
        (["--set", "init_from=none"], "use --init-from none"),
        (["--freeze-epochs", "-1"], "-1 is not 0 or more"),
        (
            ["--recipe", "paper", "--model", "vgg", "--set", "trunk=full", "--init-from", "none"],
            "it has no full trunk",
        ),
    ],
)
def test_wrong_use_exits_with_2_and_leaves_nothing(cli, words, message, tmp_path):
    status, _, err = cli(*words)
    assert status == 2 and message in err
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_exits_with_1(cli, tmp_path):
    status, _, err = cli("--init-from", "gone.pt")
    assert status == 1 and "gone.pt: there is no such file" in err
    status, _, err = cli(*SMALL, "--run-dir", "r")
    assert (
        status == 2 and "ImageNet weights fit --width 1, not 0.0625: give --init-from none" in err
    )
    status, _, err = cli(*SMALL, "--width", 1, "--run-dir", "r")
    assert (
        status == 1
        and "ImageNet weights could not be downloaded" in err
        and str(transfer.imagenet_file()) in err
    )
    status, _, err = cli(*SMALL, "--init-from", "none", "--data-dir", "gone/data")
    assert status == 1 and "gone/data does not exist" in err
    assert not list(tmp_path.glob("r/*")) and not list(tmp_path.glob("runs/*/*"))
