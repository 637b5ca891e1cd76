"""What a run takes."""

import re
import types

import pytest
import torch

from tests.helpers.trainers import staged
from train_cifar100 import FAST
from training import estimate, sanity


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_peak_rate_that_is_told_is_the_peak(epochs):
    config = FAST | {"epochs": epochs, "batch_size": 64, "lr": 0.02, "width": 0.5}
    trainer = types.SimpleNamespace(config=config, batches=range(781), transferred=())
    told = re.fullmatch(
        r"Peak learning rate (.*) for batches of 64: 0.00062 per image; 0.006 for the 3x3 filters, "
        r"by Muon",
        estimate.rate_in_words(trainer),
    )
    assert float(told[1]) == pytest.approx(0.04, rel=0.005)


@pytest.mark.parametrize(
    "durations, least", [((0.3, 0.1, 0.15), 0.1), ((0.1, 0.2, 0.1), 0.1), ((0.6,), 0.6)]
)
def test_on_a_cpu_that_others_use_too_the_fastest_of_a_few_calls_counts(
    monkeypatch, durations, least
):
    clock, calls = [0.0], iter(durations)

    def work():
        clock[0] += next(calls)

    monkeypatch.setattr(estimate, "synced_time", lambda device: clock[0])
    assert estimate.timed(work, torch.device("cpu")) == pytest.approx(least)
    assert not list(calls)


@pytest.mark.parametrize(
    "start, limit, found", [(8, 40, 32), (8, 5, 4), (8, 0, 0), (16, 9999, 1024)]
)
def test_the_largest_micro_batch_is_found_by_doubling(monkeypatch, start, limit, found):
    ours, tried = staged(), []

    def scarce(self, images):
        tried.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.level(images.mean((2, 3))[:, :1])

    monkeypatch.setattr(type(ours.model), "forward", scarce)
    ours.model.level = torch.nn.Linear(1, 4)
    state = torch.get_rng_state()
    assert sanity.most_that_fit(ours, start) == found
    assert torch.equal(torch.get_rng_state(), state) and max(tried) <= 1024
    assert all(p.grad is None for p in ours.model.parameters())
