"""Schedules of a run: the learning rate, and the image size of progressive resizing."""

from __future__ import annotations

from attention_model import SMALLEST_IMAGE

SCHEDULES = ("linear", "halve", "double-halve")


def lr_at(config: dict, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0, over the whole run).

    With every ``schedule``, the rate rises linearly over the first ``warmup`` of the run (0 to 1).

    "linear": after the warm-up linearly down to 0 at the end of the run.
    "halve": the paper's for CIFAR, ``lr`` halved every ``halve_every`` epochs.
    "double-halve": the authors' for CUB, ``lr`` doubled after ``halve_every`` epochs and after
    twice as many, then halved every ``halve_every``.
    """
    total = config["epochs"] * steps_per_epoch
    rising = config["warmup"] * total
    if step + 1 < rising:
        return config["lr"] * (step + 1) / rising
    periods = step // steps_per_epoch // config["halve_every"]
    if config["schedule"] == "halve":
        return config["lr"] * 0.5**periods
    if config["schedule"] == "double-halve":
        return config["lr"] * 2.0 ** (periods if periods <= 2 else 4 - periods)
    if config["schedule"] == "linear":
        return config["lr"] * (total - step) / max(1.0, total - rising + 1)
    raise ValueError(f"unknown schedule {config['schedule']!r}: {', '.join(SCHEDULES)}")


def peak_lr(config: dict, steps_per_epoch: int) -> float:
    """The highest rate of a run, at full width (see ``lr_at``)."""
    total = config["epochs"] * steps_per_epoch
    rising = int(config["warmup"] * total)
    # Where a schedule peaks: around the warm-up's end, or at the first epochs at which the rate is
    # doubled or halved.
    turns = [rising + offset for offset in (-2, -1, 0, 1)]
    turns += [number * config["halve_every"] * steps_per_epoch for number in range(4)]
    return max(lr_at(config, min(max(0, step), total - 1), steps_per_epoch) for step in turns)


def stages(config: dict, steps_per_epoch: int) -> list[tuple[float, float]]:
    """Progressive resizing: (factor on the side, share of the run at which it ends) of each stage
    before the full size.

    ``progressive`` = "0.5:0.6 0.75:0.8" means half the side for the first 0.6 of the run, then
    three quarters until 0.8. Early steps learn most of what they would from full-size images, at a
    quarter of the cost. A run of fewer steps than ``progressive_from`` has no such stages: too few
    steps would be left at full size."""
    if config["epochs"] * steps_per_epoch < config["progressive_from"]:
        return []
    return parse_progressive(config["progressive"])


def input_size_at(config: dict, step: int, steps_per_epoch: int) -> tuple[int, int] | None:
    """(height, width) of the training images in optimizer step ``step`` (from 0, over the whole
    run); None: the full size."""
    done = step / (config["epochs"] * steps_per_epoch)
    for scale, until in stages(config, steps_per_epoch):
        if done < until:
            height, width = config["input_size"]
            return (
                max(SMALLEST_IMAGE, round(height * scale)),
                max(SMALLEST_IMAGE, round(width * scale)),
            )
    return None


def parse_progressive(text: str) -> list[tuple[float, float]]:
    """The (scale, until) pairs of a text like "0.5:0.6 0.75:0.8"; [] for "none" or "". Raises
    ValueError for anything else."""
    words = [word for word in text.split() if word != "none"]
    try:
        pairs = [tuple(float(number) for number in word.split(":")) for word in words]
        in_range = all(0 < scale <= 1 and 0 < until <= 1 for scale, until in pairs)
        in_order = pairs == sorted(pairs, key=lambda pair: pair[-1])
    except ValueError:  # not numbers, or not two
        in_range = in_order = False
    if not (in_range and in_order):
        raise ValueError(
            f"progressive '{text}': expected SCALE:UNTIL pairs, "
            f"both above 0 and at most 1, in order"
        )
    return pairs
