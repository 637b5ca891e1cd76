"""--sanity: one short epoch through every path of a real run, checks on what came out, and what the
real run will take."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from common.checkpoint import (
    CHECKPOINT_NAME,
    build_from_config,
    load_model,
    read_checkpoint,
)
from common.device import choose_device, choose_precision, device_name, peak_memory_mib
from data import ImageSet, eval_batch_size, evenly_spread, input_size, split
from training import transfer
from training.checkpoint import restore_random_states
from training.estimate import MAX_TRIED, measure, most_that_fit, run_seconds
from training.health import DEAD_SD
from training.optim import parse_progressive
from training.progress import format_duration
from training.report import read_metrics
from training.run import Run
from training.task import Task
from training.trainer import Trainer

STEPS = 4  # optimizer steps of the pass
CPU_SECONDS = 30.0  # that these steps may take on a CPU: the batch is cut to fit
MIN_BATCH = 4


class Outcome(NamedTuple):
    """A line of the table."""

    name: str
    text: str
    failures: tuple[str, ...] = ()
    seconds: float = 0.0


def sanity_pass(task: Task, config: dict, run_dir: Path, command: str) -> int:
    """Run it in a folder of its own, print the table, return the exit status: 1 when a check
    failed. Never downloads."""
    started = time.perf_counter()
    *sets, sample = task.data.sets_or_sample(config)
    train, evaluation = split(config, *sets)
    sizes = (
        (task.data.train_images, task.data.test_images) if sample else (len(train), len(evaluation))
    )
    absent = (
        "" if config["sample"] or not sample else f" (no {task.dataset} in {config['data_dir']})"
    )
    outcomes = [Outcome("data", train.source + absent, seconds=time.perf_counter() - started)]

    started = time.perf_counter()
    device = choose_device(config["device"])
    init_from, start = weights_to_start_from(config)
    small = config_of_the_pass(config, train, device) | {"init_from": init_from, "sample": sample}
    batch = small["batch_size"]
    # On a GPU a whole batch of an evaluation, whose memory counts too.
    tested = max(
        2 * batch,
        16,
        device.type == "cuda" and eval_batch_size(input_size(config, train), device) + 1,
    )
    run = Run(
        task, small, run_dir, spread(train, STEPS * batch), spread(evaluation, tested), sanity=True
    )
    run.start(command)
    run.train()
    peak = peak_memory_mib(device)  # what follows holds the network twice and more
    epoch = Outcome(
        "one epoch", what_was_trained(run, config), seconds=time.perf_counter() - started
    )
    outcomes += [Outcome("start", start), epoch]
    for check in CHECKS:
        started = time.perf_counter()
        outcomes.append(check(run)._replace(seconds=time.perf_counter() - started))

    trainer = run.trainer
    cost = measure(trainer, images=min(batch, trainer.micro_batch or batch))
    most = most_that_fit(trainer, batch) if device.type == "cuda" else None
    run.report.close()
    passed = print_table(outcomes)
    print_estimate(config, cost, trainer, sizes, batch, peak, most)
    print(f"Everything it wrote is in {run_dir}")
    return 0 if passed else 1


def weights_to_start_from(config: dict) -> tuple[str, str]:
    """--init-from of the pass, which does not download, and what to say about it."""
    init_from = config["init_from"]
    if not init_from:
        return "none", "from scratch; the real run needs --init-from"
    if init_from == "imagenet" and not transfer.imagenet_file().is_file():
        return (
            "none",
            f"from scratch: no ImageNet weights in {transfer.imagenet_file()}; the real run downloads them",
        )
    return init_from, f"--init-from {init_from}"


def config_of_the_pass(config: dict, train: ImageSet, device: torch.device) -> dict:
    """The config of a real run -> that of one epoch of STEPS steps, one for each image size that
    the real run has."""
    batch = config["batch_size"] if device.type == "cuda" else cpu_batch(config, train)
    batch = min(batch, len(train) // STEPS)
    scales = [scale for scale, _ in parse_progressive(config["progressive"])][: STEPS - 1]
    progressive = (
        " ".join(f"{scale:g}:{(number + 1) / STEPS:g}" for number, scale in enumerate(scales))
        or "none"
    )
    # The rate goes down with the batch, and a run of a few steps has no time to warm up to the
    # whole of it.
    return config | {
        "epochs": 1,
        "batch_size": batch,
        "lr": 0.1 * config["lr"] * batch / config["batch_size"],
        "overlay_every": 1,
        "freeze_epochs": 0.5 if config["freeze_epochs"] else 0.0,
        "progressive": progressive,
        "progressive_from": 0,
    }


def what_was_trained(run: Run, real: dict) -> str:
    config, (height, width) = run.config, run.config["input_size"]
    extras = "progressive resizing, " if config["progressive"] != "none" else ""
    extras += "frozen trunk and all, " if config["freeze_epochs"] else ""
    average = ", moving average" if run.trainer.ema else ""
    return (
        f"{STEPS} steps of {config['batch_size']} images (the real run: {real['batch_size']}) of {height}x{width} px, "
        f"{config['precision']}: {extras}forward, backward, optimizer{average}, evaluation, checkpoint"
    )


def spread(images: ImageSet, count: int) -> ImageSet:
    """So many images, evenly spread over the set."""
    return images.subset(evenly_spread(count, len(images)))


def cpu_batch(config: dict, train: ImageSet) -> int:
    """The largest power of two, at most the real batch, whose STEPS steps fit CPU_SECONDS, from a
    first small step."""
    model = build_from_config(config, len(train.class_names)).to(memory_format=torch.channels_last)
    images = torch.rand(MIN_BATCH, 3, *input_size(config, train)).contiguous(
        memory_format=torch.channels_last
    )
    started = time.perf_counter()
    precision = choose_precision(config["precision"], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images).float().square().mean()
    loss.backward()
    affordable = CPU_SECONDS / STEPS * MIN_BATCH / (time.perf_counter() - started)
    return min(config["batch_size"], max(MIN_BATCH, 2 ** int(math.log2(max(affordable, 1)))))


# ---- checks, each of a run whose epoch is done --------------------------------------------------


def check_gradients(run: Run) -> Outcome:
    missing, expected = missing_gradients(run.trainer)
    exempt = (
        f"; {expected} parameters have none by the mathematics of {run.config['model']}"
        if expected
        else ""
    )
    return Outcome(
        "gradients",
        f"{len(missing)} missing{exempt}",
        (f"no gradient reached {', '.join(missing)}",) if missing else (),
    )


def check_finite(run: Run) -> Outcome:
    infinite = non_finite(run.trainer)
    if infinite:
        return Outcome("finite values", "FAILED", (f"not finite: {', '.join(infinite)}",))
    return Outcome("finite values", "weights, statistics, momentum")


def check_attention(run: Run) -> Outcome:
    health = run.attention.health
    dead = [level for level, each in health.items() if not each.score_sd_max > DEAD_SD]
    text = "; ".join(
        f"{level}: score sd {h.score_sd:.2g}, entropy {h.entropy:.2f}"
        for level, h in health.items()
    )
    return Outcome(
        "attention",
        text or "this network has none",
        tuple(
            f"attention level {level} is dead: its scores do not vary on any image"
            for level in dead
        ),
    )


def check_reload(run: Run) -> Outcome:
    if reload_equal(run, read_checkpoint(run.run_dir / CHECKPOINT_NAME)):
        return Outcome("reload", "a network built from the checkpoint alone gives equal logits")
    return Outcome(
        "reload", "FAILED", ("the network reloaded from the checkpoint gives other logits",)
    )


def check_resume(run: Run) -> Outcome:
    difference = resumed_step(run, read_checkpoint(run.run_dir / CHECKPOINT_NAME))
    # On a GPU sums may run in another order; on a CPU the same numbers must come out.
    same = difference == 0 if run.device.type == "cpu" else difference < 1e-2
    return Outcome(
        "resume",
        f"one more step: largest difference of a weight {difference:.3g}",
        ()
        if same
        else (f"a step of the resumed run differs from the run's own by {difference:.3g}",),
    )


def check_report(run: Run) -> Outcome:
    if len(read_metrics(run.run_dir / "metrics.csv")) == 1 and any(run.run_dir.glob("*tfevents*")):
        return Outcome("report", "metrics.csv, TensorBoard scalars, pictures, text, hparams")
    return Outcome("report", "FAILED", ("metrics.csv or the TensorBoard events are missing",))


CHECKS = (check_gradients, check_finite, check_attention, check_reload, check_resume, check_report)


def missing_gradients(trainer: Trainer) -> tuple[list[str], int]:
    """Names of the parameters that should have a gradient and have none (or only zeros), and how
    many rightly have none.

    A convolution's bias in front of a batch norm is exempt from the zero test: the norm takes it
    away again."""
    exempt = trainer.model.parameters_without_gradient()
    undone_biases = {id(conv.bias) for conv in trainer.model.normalized_convs()}
    missing = []
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad or name in exempt:
            continue
        if p.grad is None or (id(p) not in undone_biases and not p.grad.any()):
            missing.append(name)
    return missing, sum(p.numel() for name, p in trainer.model.named_parameters() if name in exempt)


def non_finite(trainer: Trainer) -> list[str]:
    """Names of weights, buffers, gradients and momenta that hold a NaN or an infinity."""
    tensors = dict(trainer.model.state_dict())
    # while it looks for its scale, it meets infinite gradients and skips them
    if not trainer.precision.scaler.is_enabled():
        tensors |= {
            f"gradient of {name}": p.grad
            for name, p in trainer.model.named_parameters()
            if p.grad is not None
        }
    tensors |= {
        f"moving average of {name}": t for name, t in trainer.eval_model.state_dict().items()
    }
    for number, state in enumerate(trainer.optimizer.state.values()):
        tensors |= {
            f"momentum {number}": value for value in state.values() if torch.is_tensor(value)
        }
    return [name for name, t in tensors.items() if not torch.isfinite(t).all()]


@torch.no_grad()
def reload_equal(run: Run, saved: dict) -> bool:
    """Logits of the run's network and of one built from the checkpoint alone, on the same images."""
    images, _ = next(run.trainer.batches.epoch(0))
    fresh = load_model(saved).to(run.device, memory_format=torch.channels_last)
    mine = run.trainer.eval_model
    mine.eval()
    with run.trainer.precision.context():
        a, b = mine(images).float(), fresh(images).float()
    tolerance = 1e-3 if run.trainer.precision.dtype is torch.float32 else 2e-2
    return (
        torch.equal(a, b)
        if run.device.type == "cpu"
        else torch.allclose(a, b, atol=tolerance, rtol=tolerance)
    )


def resumed_step(run: Run, saved: dict) -> float:
    """Largest difference of a weight between one more step of the run and the same step of a run
    resumed from disk."""
    trainer = run.trainer
    batch = next(trainer.batches.epoch(0))
    longer = run.config | {"epochs": 2}
    resumed = Run(run.task, longer, run.run_dir, run.train_set, run.eval_set, saved=saved).trainer
    trainer.config = longer
    results = []
    for each in (trainer, resumed):
        restore_random_states(saved["rng"])
        each.batch_norm.mode = None
        each.step(*batch)
        results.append(each.model.state_dict())
    return max(
        (a.double() - b.double()).abs().max().item()
        for a, b in zip(results[0].values(), results[1].values(), strict=True)
    )


# ---- what is printed ----------------------------------------------------------------------------


def print_table(outcomes: list[Outcome]) -> bool:
    """Print the table and the failures. Returns whether all passed."""
    print(f"\n{'exercised':<14} {'seconds':>7}  outcome")
    for outcome in outcomes:
        print(f"{outcome.name:<14} {outcome.seconds:7.1f}  {outcome.text}")
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    for failure in failures:
        print(f"FAILED: {failure}")
    total = sum(outcome.seconds for outcome in outcomes)
    print(f"Sanity pass {'FAILED' if failures else 'passed'} in {total:.0f} s.\n")
    return not failures


def print_estimate(
    config: dict,
    cost: tuple[float, float],
    trainer: Trainer,
    sizes: tuple[int, int],
    batch: int,
    peak: float,
    most: int | None,
) -> None:
    device = trainer.device
    whole = run_seconds(config, cost, *sizes)
    epoch = format_duration(whole / config["epochs"])
    cut = (
        f" (measured with {batch} images a step instead of {config['batch_size']})"
        if batch != config["batch_size"]
        else ""
    )
    print(
        f"On {device_name(device)}, {trainer.config['precision']}: about {epoch} an epoch of {sizes[0]:,} "
        f"images, {format_duration(whole)} for {config['epochs']} epochs{cut}.\n"
        f"Peak memory {peak:,.0f} MiB ({'GPU' if device.type == 'cuda' else 'resident'})."
    )
    if most is not None:
        hint = "" if config["checkpoint_activations"] else "; --checkpoint-activations allows more"
        print(
            f"Largest micro-batch that fits, by doubling: {most}{' or more' if 2 * most > MAX_TRIED else ''}{hint}."
        )
