"""--sanity: one short epoch through every path of a real run, checks of the result, and an estimate
of the real run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from common.checkpoint import (
    CHECKPOINT_NAME,
    PREVIOUS_NAME,
    build_from_config,
    load_model,
    read_checkpoint,
)
from common.device import choose_device, choose_precision, device_name, peak_memory_mib
from common.errors import UserError
from data import ImageSet, eval_batch_size, evenly_spread, input_size, split
from training import transfer
from training.attention_health import DEAD_SD
from training.estimate import MAX_TRIED, measure, most_that_fit, run_seconds
from training.progress import format_duration
from training.report import read_metrics
from training.run import Run
from training.run_folder import BEST_NAME, restore_random_states
from training.schedules import parse_progressive
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


def sanity_pass(
    task: Task, config: dict, run_dir: Path, command: str, *, keep: bool = False
) -> int:
    """Run the pass in ``run_dir`` and print its table. Returns the exit status: 1 when a check
    failed. Never downloads. Once it has passed, its checkpoints are removed, unless ``keep``."""
    started = time.perf_counter()
    *sets, sample = task.data.sets_or_sample(config)
    train, evaluation = split(config, *sets)
    sizes = len(train), len(evaluation)
    if len(train) < STEPS:
        raise UserError(
            f"--sanity needs {STEPS} training images or more, and {train.source} have {len(train)}"
        )
    if sample:
        sizes = task.data.train_images, task.data.test_images
    absent = ""
    if sample and not config["sample"]:
        absent = f" (no {task.dataset} in {config['data_dir']})"
        if task.data.is_own:
            absent = " (--data-dir names your images)"
    outcomes = [Outcome("data", train.source + absent, seconds=time.perf_counter() - started)]

    started = time.perf_counter()
    device = choose_device(config["device"])
    init_from, start = weights_to_start_from(config)
    small = config_of_the_pass(config, train, device) | {"init_from": init_from, "sample": sample}
    batch = small["batch_size"]
    eval_images = max(2 * batch, 16)
    if device.type == "cuda":  # a whole batch of an evaluation, whose memory counts too
        eval_images = max(eval_images, eval_batch_size(input_size(config, train), device) + 1)
    train, evaluation = spread(train, STEPS * batch), spread(evaluation, eval_images)
    run = Run(task, small, run_dir, train, evaluation, sanity=True)
    run.start(command)
    run.train()
    peak = peak_memory_mib(device)  # before the checks, which hold several copies of the network
    trained = what_was_trained(run, config)
    outcomes.append(Outcome("start", start))
    outcomes.append(Outcome("one epoch", trained, seconds=time.perf_counter() - started))
    for check in CHECKS:
        started = time.perf_counter()
        outcomes.append(check(run)._replace(seconds=time.perf_counter() - started))

    trainer = run.trainer
    cost = measure(trainer, images=min(batch, trainer.micro_batch or batch))
    most = most_that_fit(trainer, batch) if device.type == "cuda" else None
    run.report.close()
    passed = print_table(outcomes)
    print_estimate(config, cost, trainer, sizes, batch, peak, most)
    removed = ""
    if passed and not keep:
        size = remove_checkpoints(run_dir) / 2**20
        removed = f"; its checkpoints ({size:,.0f} MiB) are removed (--keep keeps them)"
    print(f"Everything it wrote is in {run_dir}{removed}")
    return 0 if passed else 1


def remove_checkpoints(run_dir: Path) -> int:
    """Remove the checkpoints of a pass, whose folder was a new one. Returns their size in bytes."""
    size = 0
    for name in (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME):
        path = run_dir / name
        if path.exists():
            size += path.stat().st_size
            path.unlink()
    return size


def weights_to_start_from(config: dict) -> tuple[str, str]:
    """--init-from of the pass, which does not download, and its line of the table."""
    init_from = config["init_from"]
    if not init_from:
        return "none", "from scratch; the real run needs --init-from"
    if init_from == "imagenet" and not transfer.imagenet_file().is_file():
        return "none", (
            f"from scratch: no ImageNet weights in {transfer.imagenet_file()}; "
            f"the real run downloads them"
        )
    return init_from, f"--init-from {init_from}"


def config_of_the_pass(config: dict, train: ImageSet, device: torch.device) -> dict:
    """The config of a real run -> that of one epoch of STEPS steps, one per image size of the real
    run."""
    batch = config["batch_size"] if device.type == "cuda" else cpu_batch(config, train)
    batch = min(batch, len(train) // STEPS)
    scales = [scale for scale, _ in parse_progressive(config["progressive"])][: STEPS - 1]
    stages = [f"{scale:g}:{(number + 1) / STEPS:g}" for number, scale in enumerate(scales)]
    # The rate scales with the batch; a tenth of it, as a few steps leave no time for a warm-up.
    return config | {
        "epochs": 1,
        "batch_size": batch,
        "lr": 0.1 * config["lr"] * batch / config["batch_size"],
        "overlay_every": 1,
        "freeze_epochs": 0.5 if config["freeze_epochs"] else 0.0,
        "progressive": " ".join(stages) or "none",
        "progressive_from": 0,
    }


def what_was_trained(run: Run, real: dict) -> str:
    """The epoch's line of the table. ``real``: the config of the real run."""
    config, (height, width) = run.config, run.config["input_size"]
    extras = "progressive resizing, " if config["progressive"] != "none" else ""
    extras += "frozen trunk and all, " if config["freeze_epochs"] else ""
    average = ", moving average" if run.trainer.ema else ""
    return (
        f"{STEPS} steps of {config['batch_size']} images (the real run: {real['batch_size']}) "
        f"of {height}x{width} px, {config['precision']}: {extras}forward, backward, "
        f"optimizer{average}, evaluation, checkpoint"
    )


def spread(images: ImageSet, count: int) -> ImageSet:
    """``count`` images, evenly spread over the set."""
    return images.subset(evenly_spread(count, len(images)))


def cpu_batch(config: dict, train: ImageSet) -> int:
    """The largest power of two, at most the real batch, whose STEPS steps fit CPU_SECONDS, as
    estimated from a small first step."""
    model = build_from_config(config, len(train.class_names)).to(memory_format=torch.channels_last)
    images = torch.rand(MIN_BATCH, 3, *input_size(config, train))
    images = images.contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    precision = choose_precision(config["precision"], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images).float().square().mean()
    loss.backward()
    affordable = CPU_SECONDS / STEPS * MIN_BATCH / (time.perf_counter() - started)
    return min(config["batch_size"], max(MIN_BATCH, 2 ** int(math.log2(max(affordable, 1)))))


# ---- checks of a run whose epoch is done --------------------------------------------------------


def check_gradients(run: Run) -> Outcome:
    missing, exempt = missing_gradients(run.trainer)
    text = f"{len(missing)} missing"
    if exempt:
        text += f"; {exempt} parameters have none by the mathematics of {run.config['model']}"
    failures = (f"no gradient reached {', '.join(missing)}",) if missing else ()
    return Outcome("gradients", text, failures)


def check_finite(run: Run) -> Outcome:
    infinite = non_finite(run.trainer)
    if infinite:
        return Outcome("finite values", "FAILED", (f"not finite: {', '.join(infinite)}",))
    return Outcome("finite values", "weights, statistics, momentum")


def check_attention(run: Run) -> Outcome:
    health = run.attention.health
    text = "; ".join(
        f"{level}: score sd {h.score_sd:.2g}, entropy {h.entropy:.2f}"
        for level, h in health.items()
    )
    failures = tuple(
        f"attention level {level} is dead: its scores do not vary on any image"
        for level, h in health.items()
        if not h.score_sd_max > DEAD_SD
    )
    return Outcome("attention", text or "this network has none", failures)


def check_reload(run: Run) -> Outcome:
    if reload_equal(run, read_checkpoint(run.run_dir / CHECKPOINT_NAME)):
        return Outcome("reload", "a network built from the checkpoint alone gives equal logits")
    return Outcome(
        "reload", "FAILED", ("the network reloaded from the checkpoint gives other logits",)
    )


def check_resume(run: Run) -> Outcome:
    difference = resumed_step(run, read_checkpoint(run.run_dir / CHECKPOINT_NAME))
    # on a CPU the numbers must be the same; on a GPU sums may run in another order
    same = difference == 0 if run.device.type == "cpu" else difference < 1e-2
    failure = f"a step of the resumed run differs from the run's own by {difference:.3g}"
    return Outcome(
        "resume",
        f"one more step: largest difference of a weight {difference:.3g}",
        () if same else (failure,),
    )


def check_report(run: Run) -> Outcome:
    if len(read_metrics(run.run_dir / "metrics.csv")) == 1 and any(run.run_dir.glob("*tfevents*")):
        return Outcome("report", "metrics.csv, TensorBoard scalars, pictures, text, hparams")
    return Outcome("report", "FAILED", ("metrics.csv or the TensorBoard events are missing",))


CHECKS = (check_gradients, check_finite, check_attention, check_reload, check_resume, check_report)


def missing_gradients(trainer: Trainer) -> tuple[list[str], int]:
    """Names of the parameters that lack a gradient (or have only zeros), and the number of
    parameters that lack one by the network's mathematics.

    A convolution's bias in front of a batch norm may have only zeros: the norm cancels it."""
    exempt = trainer.model.parameters_without_gradient()
    canceled_biases = {id(conv.bias) for conv in trainer.model.normalized_convs()}
    missing = []
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad or name in exempt:
            continue
        if p.grad is None or (id(p) not in canceled_biases and not p.grad.any()):
            missing.append(name)
    numel = {name: p.numel() for name, p in trainer.model.named_parameters()}
    return missing, sum(numel[name] for name in numel if name in exempt)


def non_finite(trainer: Trainer) -> list[str]:
    """Names of weights, buffers, gradients and momenta that hold a NaN or an infinity."""
    tensors = dict(trainer.model.state_dict())
    # a loss scaler that searches its scale meets infinite gradients, and skips them
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
    """Whether the run's network and one built from the checkpoint alone give equal logits on the
    same images."""
    images, _ = next(run.trainer.batches.epoch(0))
    reloaded = load_model(saved).to(run.device, memory_format=torch.channels_last)
    trained = run.trainer.eval_model
    trained.eval()
    with run.trainer.precision.context():
        a, b = trained(images).float(), reloaded(images).float()
    if run.device.type == "cpu":
        return torch.equal(a, b)
    tolerance = 1e-3 if run.trainer.precision.dtype is torch.float32 else 2e-2
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def resumed_step(run: Run, saved: dict) -> float:
    """Largest difference of a weight between one more step of the run and the same step of a run
    resumed from disk."""
    trainer = run.trainer
    batch = next(trainer.batches.epoch(0))
    longer = run.config | {"epochs": 2}
    resumed = Run(run.task, longer, run.run_dir, run.train_set, run.eval_set, saved=saved).trainer
    trainer.config = longer
    states = []
    for t in (trainer, resumed):
        restore_random_states(saved["rng"])
        t.batch_norm.mode = None
        t.step(*batch)
        states.append(t.model.state_dict().values())
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(*states, strict=True))


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
    """Print how long the real run takes and its memory.

    Args:
        config: of the real run.
        cost: seconds per image, in training and in evaluation.
        sizes: images of the real training and evaluation set.
        batch: the batch of the pass.
        peak: memory of the pass in MiB.
        most: the largest micro-batch that fits; None: not tried."""
    device, epochs = trainer.device, config["epochs"]
    seconds = run_seconds(config, cost, *sizes)
    cut = ""
    if batch != config["batch_size"]:
        cut = f" (measured with {batch} images per step instead of {config['batch_size']})"
    memory, advice = "GPU", ""
    if device.type == "cpu":
        memory = "resident"
        advice = " Much too high if other programs are running; the first epoch tells more."
    print(
        f"On {device_name(device)}, {trainer.config['precision']}: about "
        f"{format_duration(seconds / epochs)} per epoch of {sizes[0]:,} images, "
        f"{format_duration(seconds)} for {epochs} epochs{cut}.{advice}\n"
        f"Peak memory {peak:,.0f} MiB ({memory})."
    )
    if most is not None:
        more = " or more" if 2 * most > MAX_TRIED else ""
        hint = "" if config["checkpoint_activations"] else "; --checkpoint-activations allows more"
        print(f"Largest micro-batch that fits, by doubling: {most}{more}{hint}.")
