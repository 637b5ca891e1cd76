"""Runs that an older version began: their networks are the same here, and they can be finished.

tests/fixtures/880d17b holds two small runs on the built-in sample, as commit 880d17b left them: one
of train_cifar100.py, stopped in its second epoch, and one of train_cub.py, killed after its first.
Its expected.json says what is to come out, and with which PyTorch and on which CPU it was recorded.
There all numbers are equal to the last bit. Other CPUs round otherwise, which training magnifies:
hence the tolerances. (So do other numbers of threads: hence one.)
"""

import json
import re
import shutil

import pytest
import torch

import cam
import train_cifar100
import train_cub
from common import checkpoint
from data import eval_batches
from tests.helpers.environment import ROOT
from training import commands
from training.report import read_metrics

FIXTURES = ROOT / "tests" / "fixtures" / "880d17b"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())["runs"]
TASKS = {task.dataset: task for task in (train_cifar100.TASK, train_cub.TASK)}
IMAGES = {"cifar100": {"train": 2000, "eval": 400}, "cub": {"train": 96, "eval": 48}}
HERE = ["--device", "cpu", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def one_thread():
    """As when the numbers were recorded; for such small networks more are no faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.fixture
def run_dir(name, tmp_path, monkeypatch):
    """A copy of the run's folder; the working directory is an empty one."""
    shutil.copytree(FIXTURES / name, tmp_path / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / name


def assert_near(name, found, expected):
    """Losses within 0.2 %, and accuracies within two images."""
    assert found.keys() == expected.keys()
    for column, value in expected.items():
        part, _, what = column.partition("_")
        if what.startswith("top"):
            tolerance = pytest.approx(value, abs=2.01 * 100 / IMAGES[name][part])
        else:
            tolerance = pytest.approx(value, rel=2e-3 if what == "loss" else 1e-12)
        assert found[column] == tolerance, column


def test_the_network_gives_the_logits_that_it_gave(name, run_dir):
    """Those of 880d17b itself, for the first four test images."""
    content = checkpoint.read_checkpoint(run_dir / "last.pt")
    model = checkpoint.load_model(content)
    _, test = TASKS[name].data.sample(content["config"] | {"num_workers": 0})
    [(images, _)] = eval_batches(
        test.subset(range(4)),
        torch.device("cpu"),
        content["mean"],
        content["std"],
        content["input_size"],
    )
    with torch.no_grad():
        logits = model(images)
    expected = torch.tensor(EXPECTED[name]["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_resume_finishes_the_run(name, run_dir, capsys):
    """The training half of the new row is that of 880d17b, too. The evaluation is not: it takes the
    batch-norm statistics anew today."""
    before = (run_dir / "metrics.csv").read_bytes()
    status = commands.main(TASKS[name], ["--resume", str(run_dir), *HERE])
    out, err = capsys.readouterr()
    assert status == 0, out + err
    after = (run_dir / "metrics.csv").read_bytes()
    assert before.count(b"\n") == 2 and after.count(b"\n") == 3  # the header is one of them
    assert after.startswith(before)
    row, expected = read_metrics(run_dir / "metrics.csv")[-1], EXPECTED[name]["next_epoch"]
    assert_near(name, {column: row[column] for column in expected}, expected)
    assert checkpoint.read_checkpoint(run_dir / "last.pt")["finished"]


def test_evaluate_prints_the_accuracy(name, run_dir, capsys):
    status = commands.main(TASKS[name], ["--evaluate", str(run_dir / "last.pt"), *HERE])
    out, err = capsys.readouterr()
    assert status == 0, out + err
    found = re.search(r"^loss (\S+)   top-1 (\S+) %   top-5 (\S+) %$", out, re.MULTILINE)
    columns = ("eval_loss", "eval_top1", "eval_top5")
    assert_near(
        name,
        dict(zip(columns, map(float, found.groups()), strict=True)),
        EXPECTED[name]["evaluated"],
    )


def test_cam_draws_where_the_network_looks(name, run_dir, tmp_path, capsys):
    status = cam.main(
        [
            "--checkpoint",
            str(run_dir / "last.pt"),
            *"--dataset sample --index 0 --out".split(),
            str(tmp_path / "maps"),
            *HERE,
        ]
    )
    out, err = capsys.readouterr()
    assert status == 0, out + err
    pictures = sorted((tmp_path / "maps").glob("*.png"))
    assert f"1 image done, {len(pictures) + 1} files" in out  # and predictions.csv
    methods = {"conv7", "conv10", "conv13", "gradcam"}
    assert {path.stem.rpartition("-")[2] for path in pictures} > methods, pictures
