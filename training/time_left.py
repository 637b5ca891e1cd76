"""When a run will end, told once, after the first epoch: its speed is known then."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta
from typing import NamedTuple

import torch

from common.device import synced_time
from data import eval_batch_size
from training.progress import Progress, format_duration
from training.schedules import input_size_at
from training.trainer import Trainer

# A training step computes about three times what the network's forward pass does: its backward pass
# needs the gradients of the activations and those of the weights. A frozen trunk only the first.
STEP_IN_FORWARDS = 3
PARTS = 4  # of an epoch: what changes within it is counted to the quarter


class EpochCost(NamedTuple):
    """What an epoch took, in seconds."""

    step: float  # per optimizer step, once the kernels are compiled
    setup: float  # beyond its steps: compiling the kernels, at the first of each image size
    forward: float  # of a batch of the training's size, at full image size; on a GPU
    rest: float  # evaluation, reports, saving


def epoch_cost(trainer: Trainer, progress: Progress, started: float) -> EpochCost:
    """The cost of an epoch that has just ended and was reported; it began at ``started``."""
    step = progress.seconds_per_step()
    trained_until, _ = progress.checks[-1]
    in_training = trained_until - progress.began
    compiled = trainer.run_model is not trainer.parallel
    setup = in_training - step * (progress.steps - progress.start)
    on_gpu = trainer.device.type == "cuda"
    return EpochCost(
        step=step,
        setup=max(0.0, setup) if compiled else 0.0,
        forward=seconds_of_forward(trainer) if on_gpu else 0.0,
        rest=time.monotonic() - started - in_training,
    )


@torch.no_grad()
def seconds_of_forward(trainer: Trainer) -> float:
    """Seconds that the network takes for its share of a training batch at full image size, without
    gradients. (An evaluation's own time would not do: the first one sets up kernels.)"""
    model, size, device = trainer.eval_model, trainer.config["input_size"], trainer.device
    share = trainer.batches.images_per_step / trainer.ranks.world_size
    count = max(1, min(int(share), eval_batch_size(size, device)))
    batch = torch.zeros(count, 3, *size, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    was_training = model.training
    model.eval()
    with trainer.precision.context():
        model(batch)
        started = synced_time(device)
        model(batch)
        seconds = synced_time(device) - started
    model.train(was_training)
    return seconds * share / count


def seconds_left(config: dict, steps: int, done: int, cost: EpochCost, *, on_gpu: bool) -> float:
    """Seconds of the epochs after the first ``done`` ones of a run; ``cost`` is that of the last of
    them. ``steps``: optimizer steps per epoch.

    On a CPU a step takes its share of the pixels. A GPU takes as long for a small image until it
    has enough work: there it is the same time, but at least that of the arithmetic."""
    measured = size, frozen = stage_at(config, steps, done - 1 / PARTS)
    seconds, compiled = 0.0, {measured}
    for part in range(done * PARTS, config["epochs"] * PARTS):
        stage = later_size, later_frozen = stage_at(config, steps, part / PARTS)
        if on_gpu:
            forwards = 1 if later_frozen else STEP_IN_FORWARDS
            step = max(cost.step, forwards * cost.forward * later_size)
        else:
            thawed = STEP_IN_FORWARDS if frozen and not later_frozen else 1
            step = cost.step * thawed * later_size / size
        setup = 0.0 if stage in compiled else cost.setup
        seconds += (steps * step + cost.rest) / PARTS + setup
        compiled.add(stage)
    return seconds


def stage_at(config: dict, steps: int, epoch: float) -> tuple[float, bool]:
    """After so many epochs: the pixels of the training images, as a share of the full size, and
    whether the trunk is frozen."""
    height, width = config["input_size"]
    size = input_size_at(config, math.ceil(epoch * steps), steps) or (height, width)
    return size[0] * size[1] / (height * width), epoch < config["freeze_epochs"]


def end_in_words(seconds: float, now: datetime) -> str:
    """The line that tells when a run will end: the clock's time, with the day if it is another."""
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f"{end:%a %d %b} "
    return (
        f"About {format_duration(seconds)} more: the run will end at about {day}{end:%H:%M} "
        f"(from this epoch's speed)."
    )
