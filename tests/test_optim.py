"""The optimizer's side: schedules, parameter groups, Muon, moving average, against independent
few-line references."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from attention_model import build_model
from tests.helpers.makers import orthogonalized
from tests.helpers.trainers import CONFIG, Batches, make_trainer
from train_cifar100 import FAST, PAPER
from training import optim
from training.optim import EMA, input_size_at, lr_at, parameter_groups


def test_paper_schedule_halves_every_25_epochs():
    rates = [lr_at(PAPER, epoch * 390 + 17, 390) for epoch in (0, 24, 25, 49, 50, 299)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.1 * 0.5**11]


def test_linear_schedule_warms_up_and_ends_near_zero():
    config = FAST | {"epochs": 10, "warmup": 0.2, "lr": 0.4}
    rates = [lr_at(config, step, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.004) and max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) in (98, 99, 100)
    steps = [b - a for a, b in zip(rates, rates[1:], strict=True)]
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
            optim.parse_progressive(wrong)


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


# ---- Muon ---------------------------------------------------------------------------------------


def test_newton_schulz_is_its_polynomial_of_the_singular_values():
    """Matrices of several shapes at once: wide and high ones, with Gram matrices that are filled up
    and ones that are not."""
    torch.manual_seed(8)
    shapes = ((8, 30), (30, 8), (90, 70), (16, 27), (8, 30), (70, 90), (16, 27), (8, 30), (64, 64))
    matrices = [torch.randn(shape) for shape in shapes]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        for matrix, found in zip(matrices, optim.newton_schulz(matrices, dtype), strict=True):
            assert found.shape == matrix.shape and found.dtype == dtype
            torch.testing.assert_close(
                found.double(), orthogonalized(matrix), atol=tolerance, rtol=0
            )
            assert torch.linalg.svdvals(found.float()).max() < 1.3
    nothing = [torch.zeros(shape) for shape in shapes]  # no gradient, no step, no 0 / 0
    assert not any(found.any() for found in optim.newton_schulz(nothing, torch.float32))


def test_filters_move_by_muon_and_all_else_by_sgd():
    """Three steps of the trainer, layer by layer in float64."""
    config = {"lr": 0.01, "muon": 0.4, "ema_decay": 0.0}
    ours, batches = make_trainer(**config), Batches()
    model = copy.deepcopy(ours.model).train()
    named = {name: p for name, p in model.named_parameters()}
    filters = {name for name, p in named.items() if name.endswith(".conv.weight")}
    decaying = {
        name for name, p in named.items() if p.ndim > 1 and not name.endswith(".u.weight")
    } - filters
    optimizer = torch.optim.SGD(
        [
            {"params": [named[name] for name in decaying], "weight_decay": 5e-4},
            {"params": [named[name] for name in named.keys() - decaying - filters]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    momenta = {name: torch.zeros_like(named[name], dtype=torch.float64) for name in filters}
    norms = {name: named[name].detach().norm() for name in filters}
    for step, (images, labels) in enumerate(batches.all):
        rate = lr_at(CONFIG | config, step, 3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
        with torch.no_grad():
            for name in filters:
                p, gradient = named[name], named[name].grad.double()
                momenta[name] = 0.9 * momenta[name] + gradient
                direction = orthogonalized((gradient + 0.9 * momenta[name]).flatten(1)).view(
                    p.shape
                )
                size = norms[name] / math.sqrt(min(direction.flatten(1).shape))
                p.copy_(p * norms[name] / p.norm() - 0.4 * rate * size * direction)
    ours.train_epoch()
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, named[name], atol=2e-4, rtol=1e-3, msg=name)
        if name in filters:
            assert p.norm().item() == pytest.approx(norms[name].item(), rel=0.02)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_are_the_same_in_any_layout_of_memory(colours, layout):
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, colours, 3, 3), torch.randn(4, colours, 3, 3)
    p = torch.nn.Parameter(weight.clone(memory_format=layout))
    p.grad = gradient.clone(memory_format=layout)
    group = {"params": [p], "momentum": 0.0, "nesterov": False, "filter_momentum": 0.9}
    optim.Muon([group], torch.float32, lr=0.1, fused=True).step()
    direction = orthogonalized(gradient.flatten(1)).view(weight.shape)
    expected = weight - 0.1 * weight.norm() / math.sqrt(min(4, 9 * colours)) * direction
    torch.testing.assert_close(p.double(), expected, atol=1e-4, rtol=1e-4)


def test_muon_leaves_frozen_filters_alone_and_goes_on_from_its_state():
    def stepped(optimizer, filters, seed):
        torch.manual_seed(seed)
        for p in filters[1:]:
            p.grad = torch.randn_like(p)
        optimizer.step()

    torch.manual_seed(0)
    filters = [torch.nn.Parameter(torch.randn(4, 3, 3, 3)) for _ in range(3)]
    frozen = filters[0].detach().clone()

    def make(filters):
        group = {"params": filters, "momentum": 0.0, "nesterov": False, "filter_momentum": 0.9}
        return optim.Muon([group], torch.float32, lr=0.1)

    one = make(filters)
    stepped(one, filters, 1)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in filters]
    two = make(copies)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, each in ((one, filters), (two, copies)):
        stepped(optimizer, each, 2)
    for p in filters:
        p.grad = None
    one.step()  # all frozen
    assert torch.equal(filters[0], frozen) and all(
        torch.equal(p, q) for p, q in zip(filters, copies, strict=True)
    )
    assert not torch.equal(filters[1], filters[2])
