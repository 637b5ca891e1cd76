"""The optimizer's side: schedules, parameter groups, Muon, moving average, against independent
few-line references."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from attention_model import build_model
from tests.helpers.trainers import CONFIG, Batches, make_trainer
from training import optim
from training.optim import EMA, parameter_groups
from training.schedules import lr_at


def test_weight_decay_choices():
    model = build_model("vgg-att3-concat-pc", 4, width=1 / 16)
    total = sum(p.numel() for p in model.parameters())
    [everything] = parameter_groups(model, CONFIG | {"decay_all": True, "muon": 0.0})
    assert (
        sum(p.numel() for p in everything["params"]) == total and everything["weight_decay"] == 5e-4
    )
    decayed, spared = parameter_groups(model, CONFIG | {"muon": 0.0})
    assert (
        sum(p.numel() for g in (decayed, spared) for p in g["params"]) == total
        and spared["weight_decay"] == 0
    )
    u = [gate.compatibility.u.weight for gate in model.gates.values()]
    assert all(any(p is q for q in spared["params"]) for p in u)
    assert all(p.ndim > 1 for p in decayed["params"])
    filters, *others = parameter_groups(model, CONFIG | {"muon": 0.5})
    assert all(p.shape[2:] == (3, 3) for p in filters["params"]) and len(filters["params"]) == 15
    assert (filters["scale"], filters["weight_decay"], filters["filter_momentum"]) == (0.5, 0, 0.9)
    assert sum(p.numel() for g in (filters, *others) for p in g["params"]) == total


def test_in_narrow_networks_all_but_the_filters_learn_at_more():
    for width, most, expected in (
        (1 / 16, 4.0, 4),
        (1 / 16, 20.0, 16),
        (1 / 8, 20.0, 8),
        (1 / 16, 0.0, 1),
    ):
        config = CONFIG | {"width": width, "lr_by_width": most, "transfer_lr": 0.25}
        model = build_model("vgg-att3-concat-pc", 4, width=width)
        for group in parameter_groups(model, config, frozenset(["classifier.linears.0.weight"])):
            transferred = any(
                p is dict(model.named_parameters()).get("classifier.linears.0.weight")
                for p in group["params"]
            )
            rate = config["muon"] if "filter_momentum" in group else expected
            assert group["scale"] == pytest.approx(rate * (0.25 if transferred else 1))


@pytest.mark.parametrize("share, most", [(1.0, 0.5), (0.5, 0.5), (0.3, 1 / 6), (0.1, 0.0)])
def test_moving_average_is_the_recurrence(share, most):
    """Of a run of 4 steps it looks back over 4, 2, 1.2 or one at most: decay 1 - 1/4 (the config's
    0.5 is less), ..."""
    model = build_model("vgg-gap", 3, width=1 / 16)
    average = EMA(model, 0.5, share)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(4):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
        average.update(step, 4)
        decay = min(most, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = (
                expected[name] * decay + value * (1 - decay)
                if value.is_floating_point()
                else value.clone()
            )
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_one_step_is_pytorchs_nesterov_sgd():
    """The trainer's step against the plain few lines, dropout off."""
    config = CONFIG | {"lr": 0.01, "muon": 0.0}
    ours, batches = make_trainer(ema_decay=0.0, lr=0.01, muon=0.0), Batches()
    model = copy.deepcopy(ours.model).train()
    groups = parameter_groups(model, config)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for step, (images, labels) in enumerate(batches.all):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(config, step, 3)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    ours.train_epoch()
    for (name, a), b in zip(
        ours.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_a_first_step_that_the_scaler_skips_leaves_the_momentum_clean():
    """What fp16 does on most first steps. The fused kernel would leave a momentum that was never
    written."""
    model = build_model("vgg-gap", 4, width=1 / 16)
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.make_optimizer(model, CONFIG | {"weight_decay": 0.0}, "fp16")
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (math.inf, 0.0, 0.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
