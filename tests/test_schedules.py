"""Schedules of the learning rate and of the image size."""

import itertools

import pytest

from train_cifar100 import FAST, PAPER
from training.schedules import input_size_at, lr_at, parse_progressive


def test_paper_schedule_halves_every_25_epochs():
    rates = [lr_at(PAPER, epoch * 390 + 17, 390) for epoch in (0, 24, 25, 49, 50, 299)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.1 * 0.5**11]


def test_linear_schedule_warms_up_and_ends_near_zero():
    config = FAST | {"epochs": 10, "warmup": 0.2, "lr": 0.4}
    rates = [lr_at(config, step, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.004) and max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) in (98, 99, 100)
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert all(s > 0 for s in steps[:98]) and all(s < 0 for s in steps[101:])
    assert 0 < rates[-1] < 0.4 / 300
    assert steps[300] == pytest.approx(steps[450])


def test_every_schedule_can_warm_up():
    rates = [lr_at(PAPER | {"warmup": 0.1}, step, 10) for step in range(3000)]
    assert rates[0] == pytest.approx(0.1 / 300) and rates[149] == pytest.approx(0.05)
    # halved after 25 epochs of 10 steps
    assert rates[299] == pytest.approx(0.05) == rates[499] and rates[500] == 0.025


def test_progressive_resizing_follows_the_share_of_the_run():
    config = {
        "progressive": "0.5:0.6 0.75:0.8",
        "input_size": [32, 48],
        "epochs": 5,
        "progressive_from": 100,
    }
    assert [input_size_at(config, step, 20) for step in (0, 59, 60, 79, 80, 99)] == [
        (16, 24),
        (16, 24),
        (24, 36),
        (24, 36),
        None,
        None,
    ]
    # fewer steps than it needs
    assert {input_size_at(config, step, 19) for step in range(95)} == {None}
    for wrong in ("0.5", "2:0.5", "0.5:x", "0.5:0.9 0.75:0.3"):
        with pytest.raises(ValueError):
            parse_progressive(wrong)
