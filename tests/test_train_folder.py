"""train_folder.py as people use it: beside train_cifar100.py on the same images, and on folders
that change."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cam
import train_cifar100
import train_cub
import train_folder
from data import load_folder
from tests.helpers.makers import make_folders
from tests.helpers.runs import assert_equal, assert_runs_equal, config_of, content_of, signal_after
from training.report import read_metrics

SMALL = "--width 0.0625 --batch-size 8 --device cpu --precision fp32 --overlay-every 0".split()
OWN_CONSTANTS = {"test_share", "split_seed", "near_duplicates", "skip_unreadable"}
OWN = ["--data-dir", "photos", "--recipe", "small", *SMALL]


@pytest.fixture
def own(cli, tmp_path):
    """own("--epochs", 2) -> (exit status, standard output, standard error), beside photos/."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(12):
            path = tmp_path / "photos" / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return lambda *words: cli(*words, task=train_folder.TASK)


# ---- recipes ------------------------------------------------------------------------------------


def test_class_folders_of_cifar_train_as_in_train_cifar100(cli, tmp_path):
    """The same pixels, labels and options: the same run, bit for bit."""
    make_folders(tmp_path, classes=("ant", "bee", "cow"), per_class=12, size=(32, 32))
    shutil.copytree(tmp_path / "cifar100", tmp_path / "three")
    words = [*SMALL, "--epochs", 2, "--set", "dropout=0.5", "--set", "progressive_from=0"]
    assert cli(*words, "--data-dir", ".", "--run-dir", "a")[0] == 0
    words += ["--recipe", "small", "--data-dir", "three"]
    assert cli(*words, "--run-dir", "b", task=train_folder.TASK)[0] == 0
    a, b = content_of("a"), content_of("b")
    for name in ("model", "ema", "optimizer", "class_names", "mean", "std", "input_size"):
        assert_equal(a[name], b[name], name)
    measured = ("images_per_second", "seconds", "peak_memory_mib")
    rows = [
        [{k: v for k, v in row.items() if k not in measured} for row in read_metrics(path)]
        for path in (tmp_path / "a/metrics.csv", tmp_path / "b/metrics.csv")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2


@pytest.mark.parametrize(
    "words, task, of_task",
    [
        (["--recipe", "small"], train_cifar100.TASK, []),
        (["--recipe", "small", "--epochs", 5], train_cifar100.TASK, ["--epochs", 5]),
        ([], train_cub.TASK, []),
        (["--sample"], train_cub.TASK, ["--sample"]),
    ],
)
def test_the_recipes_are_those_of_the_other_scripts(words, task, of_task):
    config, other = config_of(train_folder.TASK, *words), config_of(task, *of_task)
    own = {"dataset", "recipe", "data_dir", "crop", *OWN_CONSTANTS}
    same = {name for name in config if name in other and config[name] == other[name]}
    assert set(config) - same == own | ({"image_size"} if task is train_cifar100.TASK else set())
    assert config["crop"] == "center" and config["data_dir"] is None


# ---- a run --------------------------------------------------------------------------------------


def test_a_run_from_its_start_to_its_pictures(own, tmp_path):
    status, out, _ = own(*OWN, "--epochs", 1)
    assert status == 0 and "24 images in 2 classes (cat, dog), 12 per class; 40x36 pixels" in out
    assert "split: 20 for training, 4 for the test" in out
    [run_dir] = (tmp_path / "runs/photos").iterdir()
    assert own("--evaluate", run_dir / "last.pt")[0] == 0
    _, test = load_folder("photos", image_size=32, progress=False)
    with open(run_dir / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == list(test.files)
    assert [row["true"] for row in rows] == [name.split("/")[0] for name in test.files]
    words = ["--checkpoint", run_dir / "last.pt", "--dataset", "folder", "--out", "pictures"]
    assert cam.main([*map(str, words), "--index", "0-3", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "pictures").glob("folder-test-0000?-sheet.png"))) == 4


def test_a_run_is_stopped_and_resumed_by_its_bare_name(own, tmp_path, monkeypatch):
    words = [*OWN, "--epochs", 2, "--val-fraction", 0.2]
    assert own(*words, "--run-dir", "unhurt")[0] == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        status, out, _ = own(*words)
    assert status == 143 and "train_folder.py --resume runs/photos/" in out
    assert own("--resume")[0] == 0
    [run_dir] = (tmp_path / "runs/photos").iterdir()
    assert_runs_equal(run_dir, "unhurt")
    assert own("--resume")[0] == 2
    assert own("--resume", "--data-dir", "photos")[1:] == (
        "",
        "error: --resume: there is no unfinished run in runs/photos; name the run's folder\n",
    )


def add(folder):
    Image.new("RGB", (40, 36), "red").save(folder / "cat/zz.png")


def replace(folder):
    Image.new("RGB", (40, 36), "red").save(folder / "cat/03.png")


@pytest.mark.parametrize(
    "change, message",
    [
        (add, "it had 4 test images and has 5 now"),
        (replace, "it had 20 training images and has 20 others now"),
        (lambda folder: (folder / "cat").rename(folder / "cow"), "its classes are not those"),
        (lambda folder: folder.rename(folder.with_name("away")), "are not in"),
    ],
)
def test_a_folder_that_changes_between_start_and_resume(
    own, tmp_path, monkeypatch, change, message
):
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        assert own(*OWN, "--epochs", 2)[0] == 143
    change(tmp_path / "photos")
    status, _, err = own("--resume")
    assert status == 1 and message in err and err.count("\n") == 1


def test_a_folder_may_move_between_start_and_resume(own, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        assert own(*OWN, "--epochs", 1)[0] == 143
    [run_dir] = (tmp_path / "runs/photos").iterdir()
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")  # with other times
    shutil.rmtree(tmp_path / "photos")
    assert own("--resume", run_dir, "--data-dir", "moved")[0] == 0


# ---- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--recipe", "small"], "--data-dir FOLDER is needed"),
        ([*OWN, "--set", "crop=box"], "choose center or whole"),
        ([*OWN, "--set", "test_share=0"], "expected a share above 0"),
        ([*OWN, "--set", "test_share=1"], "expected a number below 1"),
        ([*OWN, "--init-from", "none", "--freeze-epochs", 1], "leave one of them out"),
    ],
)
def test_wrong_use_is_told_before_an_image_is_read(own, tmp_path, words, message):
    status, out, err = own(*words, "--epochs", 2)
    assert status == 2 and message in err and not out
    assert not (tmp_path / "runs").exists() and not (tmp_path / "photos/.cache").exists()


def test_a_named_folder_that_is_missing_is_not_replaced_by_the_sample(own):
    for mode in ("--sanity", "--benchmark"):
        status, _, err = own(mode, "--data-dir", "fotos", "--recipe", "small", *SMALL)
        assert status == 1 and "fotos is missing" in err


def test_a_pass_without_a_folder_takes_the_sample(own, tmp_path):
    status, out, _ = own("--sanity", "--recipe", "small", *SMALL, "--image-size", 32)
    assert status == 0 and "built-in sample" in out and "--data-dir names your images" in out
    assert [path.name.split("-")[-1] for path in (tmp_path / "runs/sanity").iterdir()] == ["folder"]


def test_the_centered_square_is_what_training_sees(own, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("training.commands.Run", lambda *args, **_: seen.append(args) or exit())
    with pytest.raises(SystemExit):
        own(*OWN, "--epochs", 1)
    train = seen[0][3]
    picture = Image.open(tmp_path / "photos" / train.files[0])
    expected = picture.crop((2, 0, 38, 36)).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(train.take(slice(0, 1))[0], torch.from_numpy(np.asarray(expected).copy()))
