"""train_cifar10.py: the recipes of CIFAR-100, and a run on official files of CIFAR-10."""

import pytest

import train_cifar10
import train_cifar100
from tests.helpers.cifar import Cifar
from tests.helpers.runs import config_of, content_of

SMALL = "--model vgg --width 0.015625 --device cpu --epochs 1 --batch-size 6 --overlay-every 0"


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "fast"],
        ["--recipe", "fast", "--epochs", 5],
        ["--recipe", "paper"],
        ["--sample"],
    ],
)
def test_the_recipes_are_those_of_cifar_100(words):
    config = config_of(train_cifar10.TASK, *words)
    expected = config_of(train_cifar100.TASK, *words) | {"dataset": "cifar10"}
    assert config == expected


def test_a_network_trains_on_the_official_files(tmp_path, monkeypatch, cli):
    Cifar("cifar10", monkeypatch).write_official(tmp_path / "files")
    words = [*SMALL.split(), "--data-dir", tmp_path / "files"]
    status, out, err = cli(*words, task=train_cifar10.TASK)
    assert status == 0, err
    [run_dir] = (tmp_path / "runs" / "cifar10").iterdir()
    content = content_of(run_dir)
    assert content["config"]["dataset"] == "cifar10"
    assert tuple(content["class_names"]) == ("ant", "bee", "cow")
    assert content["position"]["epoch"] == 1
    for command in (["--resume", run_dir], ["--evaluate", run_dir / "last.pt"]):
        status, _, err = cli(*command, task=train_cifar100.TASK)
        assert status == 2 and "of train_cifar10.py" in err
