"""Estimates of a run: its time, its memory, and its learning rate in words.

Measured on copies: the run itself does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from common.device import synced_time
from common.errors import is_oom_error
from training.optim import width_factor
from training.run import Run, recalibration_count
from training.run_folder import random_states, restore_random_states
from training.schedules import peak_lr, stages
from training.trainer import Trainer

MAX_TRIED = 1024  # images at once, in the search for the largest micro-batch


def rate_in_words(trainer: Trainer) -> str:
    """The peak learning rate, also per image: what a step does to the weights depends on both rate
    and batch."""
    config = trainer.config
    at_full_width = peak_lr(config, len(trainer.batches))
    peak, batch = at_full_width * width_factor(config), config["batch_size"]
    words = f"Peak learning rate {peak:.3g} for batches of {batch}: {peak / batch:.2g} per image"
    if config["muon"]:
        words += f"; {config['muon'] * at_full_width:.2g} for the 3x3 filters, by Muon"
    if trainer.transferred:
        words += f"; transferred layers at {config['transfer_lr']:g} times their rate"
    if config["freeze_epochs"]:
        words += f", whose trunk trains after {config['freeze_epochs']:g} epochs"
    return words


def guess_seconds(run: Run, images: int) -> float:
    """Seconds of the rest of a run without a GPU, from a step on so many images."""
    cost = measure(run.trainer, images)
    position, epochs = run.trainer.position, run.config["epochs"]
    begun = (position.epoch + position.step / len(run.trainer.batches)) / epochs
    return run_seconds(run.config, cost, len(run.train_set), len(run.eval_set), begun)


def measure(trainer: Trainer, images: int) -> tuple[float, float]:
    """Seconds per image of a training step and of an evaluation on ``images`` images, at full input
    size. Works on a copy of the network and restores the random states."""
    states = random_states()
    model = copy.deepcopy(trainer.model)
    compiled = trainer.run_model is not trainer.model
    batch = torch.randn(images, 3, *trainer.config["input_size"], device=trainer.device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64, device=trainer.device)

    def forward(net: nn.Module) -> Tensor:
        with trainer.precision.context():
            return net(batch)

    def step() -> None:
        F.cross_entropy(forward(net).float(), labels).backward()

    net = torch.compile(model, dynamic=False) if compiled else model
    net.train()
    if images == 1:  # as in the run: BatchNormPolicy
        norms_to_eval(model)
    step()  # also sets up kernels, which takes several times as long as a step
    training = timed(step, trainer.device)
    model.eval()
    with torch.no_grad():
        forward(model)
        evaluating = timed(lambda: forward(model), trainer.device)
    restore_random_states(states)
    return training / images, evaluating / images


def most_that_fit(trainer: Trainer, start: int) -> int:
    """How many images fit in memory in a forward and backward pass, found by doubling (or halving)
    ``start`` up to MAX_TRIED; 0 if not even one does. On a copy of the network, not compiled."""
    states = random_states()
    model = copy.deepcopy(trainer.model).train()
    norms_to_eval(model)  # so that a single image can be tried
    count, most = start, 0
    while 0 < count <= MAX_TRIED:
        if fits_in_memory(trainer, model, count):
            most, count = count, 2 * count
        elif most:
            break
        else:
            count //= 2
    restore_random_states(states)
    return most


def norms_to_eval(model: nn.Module) -> None:
    """Have the batch norms use their running statistics."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()


def fits_in_memory(trainer: Trainer, model: nn.Module, count: int) -> bool:
    """Whether a forward and backward pass on ``count`` images has enough memory."""
    try:
        batch = torch.zeros(count, 3, *trainer.config["input_size"], device=trainer.device)
        with trainer.precision.context():
            logits = model(batch.contiguous(memory_format=torch.channels_last))
        logits.float().sum().backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_oom_error(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call. On a GPU, where calls are short, the mean of ten; on a CPU, which has other
    programs to run, the least of up to three in half a second."""
    if device.type == "cuda":
        started = synced_time(device)
        for _ in range(10):
            work()
        return (synced_time(device) - started) / 10
    calls: list[float] = []
    while len(calls) < 3 and sum(calls) < 0.5:
        started = synced_time(device)
        work()
        calls.append(synced_time(device) - started)
    return min(calls)


def run_seconds(
    config: dict, cost: tuple[float, float], train_images: int, test_images: int, begun: float = 0.0
) -> float:
    """Seconds of the rest of a run, evaluations included, after ``begun`` (0 to 1) of it. A
    progressively resized image costs its share of the pixels.

    ``cost``: seconds per image, in training and in evaluation (see ``measure``)."""
    steps_per_epoch = max(1, train_images // config["batch_size"])
    # the cost of the rest, in units of the whole run at full size
    share, done = 0.0, begun
    for scale, until in [*stages(config, steps_per_epoch), (1.0, 1.0)]:
        share += max(0.0, until - done) * scale**2
        done = max(done, until)
    evaluations = config["epochs"] - int(begun * config["epochs"])
    evaluated = evaluations * (test_images + recalibration_count(train_images))
    return config["epochs"] * train_images * cost[0] * share + evaluated * cost[1]
