"""When a run will end, from its first epoch."""

import types
from datetime import datetime

import pytest
import torch

from data import cifar_sample
from tests.helpers.runs import NARROW, config_of, with_sample
from train_cifar100 import TASK
from training import time_left
from training.progress import Progress
from training.run import Run
from training.time_left import (
    EpochCost,
    end_in_words,
    epoch_cost,
    seconds_left,
    seconds_of_forward,
    stage_at,
)

# ten epochs of ten steps: four of a quarter of the pixels, four of 9/16, two of all
CONFIG = {
    "epochs": 10,
    "input_size": [32, 32],
    "progressive": "0.5:0.4 0.75:0.8",
    "progressive_from": 0,
    "freeze_epochs": 0.0,
}


def test_stages_are_those_of_the_steps():
    assert [stage_at(CONFIG, 10, epoch)[0] for epoch in range(10)] == (
        4 * [0.25] + 4 * [0.5625] + 2 * [1.0]
    )
    frozen = CONFIG | {"freeze_epochs": 1.25}
    assert [stage_at(frozen, 10, epoch)[1] for epoch in (0, 1, 1.25, 2)] == [1, 1, 0, 0]


def test_the_image_size_may_change_within_an_epoch():
    config = CONFIG | {"epochs": 5, "progressive": "0.5:0.5"}  # until 2.5
    cost = EpochCost(step=1.0, setup=0.0, forward=0.0, rest=0.0)
    assert seconds_left(config, 12, 1, cost, on_gpu=False) == pytest.approx(12 * (1.5 + 2.5 * 4))


def test_on_a_cpu_steps_take_their_share_of_the_pixels():
    cost = EpochCost(step=1.0, setup=0.0, forward=9.9, rest=7.0)
    expected = 10 * (3 * 1 + 4 * 2.25 + 2 * 4) + 9 * 7
    assert seconds_left(CONFIG, 10, 1, cost, on_gpu=False) == pytest.approx(expected)
    # after the sixth epoch, at 9/16
    expected = 10 * (2 * 1 + 2 / 0.5625) + 4 * 7
    assert seconds_left(CONFIG, 10, 6, cost, on_gpu=False) == pytest.approx(expected)
    assert seconds_left(CONFIG, 10, 10, cost, on_gpu=False) == 0


def test_a_step_of_a_frozen_trunk_takes_a_third():
    config = CONFIG | {"freeze_epochs": 2.0, "progressive": "none"}
    cost = EpochCost(step=1.0, setup=0.0, forward=0.0, rest=0.0)
    assert seconds_left(config, 10, 1, cost, on_gpu=False) == pytest.approx(10 * (1 + 8 * 3))
    assert seconds_left(config, 10, 3, cost, on_gpu=False) == pytest.approx(10 * 7)


def test_on_a_gpu_a_small_image_takes_as_long_until_there_is_enough_work():
    fast = EpochCost(step=1.0, setup=20.0, forward=0.2, rest=0.0)  # 0.6 at full size: not enough
    # each later image size is compiled once
    assert seconds_left(CONFIG, 10, 1, fast, on_gpu=True) == pytest.approx(10 * 9 + 2 * 20)
    slow = EpochCost(step=1.0, setup=0.0, forward=1.0, rest=0.0)
    expected = 10 * (3 * 1 + 4 * 3 * 0.5625 + 2 * 3)
    assert seconds_left(CONFIG, 10, 1, slow, on_gpu=True) == pytest.approx(expected)


def test_the_clock_tells_the_day_if_it_is_another():
    evening = datetime(2026, 11, 26, 23, 44)
    assert end_in_words(600, evening) == (
        "About 10 min 00 s more: the run will end at about 23:54 (from this epoch's speed)."
    )
    assert "will end at about Fri 27 Nov 03:44 (" in end_in_words(4 * 3600, evening)


def test_timing_the_network_changes_nothing(tmp_path):
    task = with_sample(TASK, lambda config: cifar_sample(train_per_class=8, test_per_class=2))
    config = config_of(task, *NARROW)
    sets = task.data.sets(config, download=False)
    ours = Run(task, config, tmp_path, *sets)
    ours.trainer.model.train()
    before = {name: value.clone() for name, value in ours.trainer.eval_model.state_dict().items()}
    states = torch.get_rng_state()
    assert 0 < seconds_of_forward(ours.trainer) < 60
    assert ours.trainer.model.training and torch.equal(torch.get_rng_state(), states)
    after = ours.trainer.eval_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_cost_of_an_epoch_leaves_out_the_compiler_at_its_begin(monkeypatch):
    trainer = types.SimpleNamespace(
        run_model="compiled", parallel="plain", device=torch.device("cpu")
    )
    progress = Progress.__new__(Progress)
    # compiled for 20 s, then 2 s per step; the last 8 of 10 steps of an epoch that was resumed
    progress.steps, progress.start, progress.began = 10, 2, 100.0
    progress.checks = [(100.0, 2), (122.0, 3), (128.0, 6), (136.0, 10)]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: 141.0)
    assert epoch_cost(trainer, progress, 99.0) == EpochCost(2.0, 20.0, 0.0, 6.0)
    trainer.run_model = trainer.parallel
    assert epoch_cost(trainer, progress, 99.0).setup == 0
