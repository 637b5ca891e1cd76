"""Every test runs from the repository's root or elsewhere alike: the modules are found by path."""
import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def small_task():
    """train_cifar100.py's task on a sample of 96 training and 32 test pictures."""
    from sample_data import cifar_sample
    from train_cifar100 import TASK
    return dataclasses.replace(TASK, sample=lambda config: cifar_sample(classes=4, train_per_class=24, test_per_class=8))


@pytest.fixture
def cli(small_task, tmp_path, monkeypatch, capsys):
    """cli("--epochs", 2) -> (exit status, standard output, standard error), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words, task=small_task):
        from training import commands
        status = commands.main(task, [str(word) for word in words])
        return status, *capsys.readouterr()
    return call
