"""Muon against an independent reference."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.makers import orthogonalized
from tests.helpers.trainers import CONFIG, Batches, make_trainer
from training.muon import Muon, newton_schulz
from training.schedules import lr_at


def test_newton_schulz_is_its_polynomial_of_the_singular_values():
    """Matrices of several shapes at once: wide and high ones, with Gram matrices that are filled up
    and ones that are not."""
    torch.manual_seed(8)
    shapes = ((8, 30), (30, 8), (90, 70), (16, 27), (8, 30), (70, 90), (16, 27), (8, 30), (64, 64))
    matrices = [torch.randn(shape) for shape in shapes]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        for matrix, found in zip(matrices, newton_schulz(matrices, dtype), strict=True):
            assert found.shape == matrix.shape and found.dtype == dtype
            torch.testing.assert_close(
                found.double(), orthogonalized(matrix), atol=tolerance, rtol=0
            )
            assert torch.linalg.svdvals(found.float()).max() < 1.3
    nothing = [torch.zeros(shape) for shape in shapes]  # no gradient, no step, no 0 / 0
    assert not any(found.any() for found in newton_schulz(nothing, torch.float32))


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
    Muon([group], torch.float32, lr=0.1, fused=True).step()
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
        return Muon([group], torch.float32, lr=0.1)

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
