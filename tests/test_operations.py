"""How many operations a step asks of the device, counted on the CPU. A fast GPU waits for the host
to start them (docs/hardware.md, "What a step costs")."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_cifar100
import train_cub
from attention_model import build_model
from data import ImageSet
from tests.helpers.runs import config_of
from training.optim import make_optimizer
from training.run import Run
from training.trainer import Trainer

NOTHING_TO_DO = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "scalar_tensor",
    "_record_function_enter_new",
    "_record_function_exit",
)
CASTS = "_to_copy"  # to another type; autocast's casts of the weights among them


class Operations(TorchDispatchMode):
    """``names``: how many operations of each name there were, without views and allocations. A
    _foreach operation is one, though CUDA starts a kernel for each tensor where their shapes
    differ. ``cast``: the addresses of what was cast."""

    def __init__(self):
        super().__init__()
        self.names, self.cast = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not is_view and name not in NOTHING_TO_DO:
            self.names[name] += 1
        if name == CASTS:
            self.cast[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def counted(work) -> tuple[int, int]:
    """(operations but casts, casts)"""
    with Operations() as seen:
        work()
    return seen.names.total() - seen.names[CASTS], seen.names[CASTS]


def sample_trainer(task, *words, batch=128) -> Trainer:
    config = config_of(
        task,
        *"--device cpu --precision bf16 --no-compile --batch-size".split(),
        batch,
        *"--width 0.0625 --init-from none --set progressive=none".split(),
        *words,
    )
    images = ImageSet(
        torch.zeros(3 * batch, 32, 32, 3, dtype=torch.uint8),
        torch.arange(3 * batch) % 4,
        tuple("abcd"),
        "",
    )
    return Run(task, config, None, images, images).trainer


def operations(task, *words) -> tuple[dict, dict]:
    """Operations but casts, and casts, of a step's parts."""
    trainer = sample_trainer(task, *words)
    # what is kept from step to step is there from now on
    for images, labels in trainer.batches.epoch(0):
        trainer.step(images, labels)
    batches, found = trainer.batches.epoch(0), {}
    next(batches)
    found["data"] = counted(lambda: found.setdefault("batch", next(batches)))
    images, labels = found.pop("batch")
    found["step"] = counted(lambda: trainer.step(images, labels))
    trainer.optimizer.zero_grad()

    def network():
        with trainer.precision.context():
            logits = trainer.run_model(images)
        F.cross_entropy(
            logits.float(), labels, label_smoothing=trainer.config["label_smoothing"]
        ).backward()

    found["network"] = counted(network)  # and the loss
    found["optimizer"] = counted(trainer.optimizer.step)
    return {part: count for part, (count, _) in found.items()}, {
        part: casts for part, (_, casts) in found.items()
    }


@pytest.mark.parametrize(
    "task, words, data, optimizer",
    [
        (train_cifar100.TASK, ("--epochs", "30"), 72, 44),
        (train_cifar100.TASK, ("--epochs", "5"), 14, 44),
        (train_cub.TASK, ("--image-size", "32"), 48, 2),
    ],
    ids=["cifar100", "cifar100-short", "cub"],
)
def test_what_a_step_asks_for_outside_the_network(task, words, data, optimizer):
    """It was 144, 25 and 61 for the data, 101 for Muon, and 19 for sums and checks."""
    found, casts = operations(task, *words)
    print(found, casts)
    average = 2
    sums = found["step"] - found["network"] - found["optimizer"] - average
    assert found["data"] <= data and found["optimizer"] <= optimizer and sums <= 9
    assert casts["step"] == casts["network"] and casts["data"] <= 3


def test_what_muon_asks_for_at_full_width():
    """Its Gram matrices have four sizes there. It was 141."""
    model = build_model("vgg-att3-concat-pc", 100).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, train_cifar100.FAST | {"width": 1.0}, "bf16")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    found, casts = counted(optimizer.step)
    print(found, casts)
    assert found <= 71 and casts == 0


@pytest.mark.parametrize("words", [(), ("--checkpoint-activations",)])
def test_each_weight_is_cast_once_a_step(words):
    """Also when the batch comes in parts, and when the backward pass runs a block once more."""
    trainer = sample_trainer(
        train_cifar100.TASK, "--epochs", "5", "--micro-batch", "6", *words, batch=16
    )
    with Operations() as seen:
        trainer.step(*next(trainer.batches.epoch(0)))
    weights = {
        name: seen.cast[p.data_ptr()]
        for name, p in trainer.model.named_parameters()
        # a gate's u goes in as a view, which autocast does not keep
        if p.grad is not None and ".u." not in name
    }
    assert {count for name, count in weights.items() if ".conv." in name} == {1}
    assert max(weights.values()) == 1
