"""--sanity: one short epoch through every path of a real run, checks on what came out, and what the real run will take."""
from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import ImageSet
from training import checkpoint, options, transfer
from training.loop import BatchNorm, Trainer, memory_ran_out, peak_memory_mib
from training.optimise import parse_progressive, stages
from training.report import DEAD_SD, read_metrics
from training.run import Run, Task, build, clock, eval_batch_size, input_size, recalibration_count, split

STEPS = 4               # optimizer steps of the pass
CPU_SECONDS = 30.0      # that these steps may take on a CPU: the batch is cut to fit
LEAST_BATCH = 4
MOST_TRIED = 1024       # images at once, when the largest micro-batch is looked for


def sanity_pass(task: Task, config: dict, run_dir: Path, command: str) -> int:
    """Run it in a folder of its own, print the table, return the exit status: 1 when a check failed. Never downloads."""
    table: list[tuple[str, str, float]] = []
    failures: list[str] = []
    clock_at = [time.perf_counter()]

    def row(what: str, outcome: str) -> None:
        now = time.perf_counter()
        table.append((what, outcome, now - clock_at[0]))
        clock_at[0] = now

    real = dict(config)
    sample = config["sample"] or not task.present(config["data_dir"])
    train, evaluation = split(config, *(task.sample(config) if sample else task.load(config, False)))
    sizes = (task.train_images, task.test_images) if sample else (len(train), len(evaluation))
    row("data", f"{train.source}" + ("" if config["sample"] or not sample else
                                     f" (no {task.dataset} in {config['data_dir']})"))

    if not config["init_from"]:
        config["init_from"], start = "none", "from scratch; the real run needs --init-from"
    elif config["init_from"] == "imagenet" and not transfer.imagenet_file().is_file():
        config["init_from"], start = "none", (f"from scratch: no ImageNet weights in {transfer.imagenet_file()}; the real "
                                              f"run downloads them")
    else:
        start = f"--init-from {config['init_from']}"
    device = options.choose_device(config["device"])
    batch = config["batch_size"] if device.type == "cuda" else cpu_batch(task, config, train)
    batch = min(batch, len(train) // STEPS)
    # A step of each size that the real run has.
    scales = [scale for scale, _ in parse_progressive(config["progressive"])][:STEPS - 1]
    progressive = " ".join(f"{scale:g}:{(number + 1) / STEPS:g}" for number, scale in enumerate(scales)) or "none"
    # The rate goes down with the batch, and a run of a few steps has no time to warm up to the whole of it.
    config |= {"epochs": 1, "batch_size": batch, "lr": 0.1 * config["lr"] * batch / config["batch_size"],
               "sample": sample, "overlay_every": 1, "freeze_epochs": 0.5 if config["freeze_epochs"] else 0.0,
               "progressive": progressive, "progressive_from": 0}
    # On a GPU a whole batch of an evaluation, whose memory counts too.
    tested = max(2 * batch, 16, device.type == "cuda" and eval_batch_size(input_size(config, train), device) + 1)
    run = Run(task, config, run_dir, spread(train, STEPS * batch), spread(evaluation, tested), sanity=True)
    run.start(command)
    run.train()
    trainer, peak = run.trainer, peak_memory_mib(device)    # what follows holds the network twice and more
    table.append(("start", start, 0.0))
    position = "progressive resizing, " if config["progressive"] != "none" else ""
    position += "frozen trunk and all, " if config["freeze_epochs"] else ""
    average = ", moving average" if trainer.average else ""
    height, width = config["input_size"]
    row("one epoch", f"{STEPS} steps of {batch} images (the real run: {real['batch_size']}) of {height}x{width} px, "
                     f"{config['precision']}: {position}forward, backward, optimizer{average}, evaluation, checkpoint")
    missing, expected = missing_gradients(trainer)
    failures += [f"no gradient reached {', '.join(missing)}"] if missing else []
    row("gradients", f"{len(missing)} missing" + (f"; {expected} parameters have none by the mathematics of "
                                                  f"{config['model']}" if expected else ""))
    infinite = non_finite(trainer)
    failures += [f"not finite: {', '.join(infinite)}"] if infinite else []
    row("finite values", "weights, statistics, momentum" if not infinite else "FAILED")
    dead = [level for level, each in run.health.items() if not each.score_sd_max > DEAD_SD]
    failures += [f"attention level {level} is dead: its scores do not vary on any image" for level in dead]
    row("attention", "; ".join(f"{level}: score sd {h.score_sd:.2g}, entropy {h.entropy:.2f}"
                               for level, h in run.health.items()) or "this network has none")
    content = checkpoint.read_checkpoint(run_dir / options.CHECKPOINT_NAME)
    equal = reload_equal(run, content)
    failures += [] if equal else ["the network reloaded from the checkpoint gives other logits"]
    row("reload", "a network built from the checkpoint alone gives equal logits" if equal else "FAILED")
    difference = resumed_step(run, content)
    # On a GPU sums may run in another order; on a CPU the same numbers must come out.
    same = difference == 0 if device.type == "cpu" else difference < 1e-2
    failures += [] if same else [f"a step of the resumed run differs from the run's own by {difference:.3g}"]
    row("resume", f"one more step: largest difference of a weight {difference:.3g}")
    told = len(read_metrics(run_dir / "metrics.csv")) == 1 and any(run_dir.glob("*tfevents*"))
    failures += [] if told else ["metrics.csv or the TensorBoard events are missing"]
    row("report", "metrics.csv, TensorBoard scalars, pictures, text, hparams" if told else "FAILED")
    cost = measure(trainer, images=min(batch, trainer.micro_batch or batch))
    most = most_that_fit(trainer, batch) if device.type == "cuda" else None
    run.report.close()
    print_table(table, failures)
    print_estimate(real, cost, trainer, sizes, batch, peak, most)
    print(f"Everything it wrote is in {run_dir}")
    return 1 if failures else 0


def spread(images: ImageSet, count: int) -> ImageSet:
    """So many images, evenly spread over the set (class folders come sorted by class)."""
    count = min(count, len(images))
    return images.subset(torch.linspace(0, len(images) - 1, count).round().long())


def cpu_batch(task: Task, config: dict, train: ImageSet) -> int:
    """The largest power of two, at most the real batch, whose STEPS steps fit CPU_SECONDS, from a first small step."""
    model = build(config, len(train.class_names)).to(memory_format=torch.channels_last)
    images = torch.rand(LEAST_BATCH, 3, *input_size(config, train)).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    precision = options.choose_precision(config["precision"], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images).float().square().mean()
    loss.backward()
    affordable = CPU_SECONDS / STEPS * LEAST_BATCH / (time.perf_counter() - started)
    return min(config["batch_size"], max(LEAST_BATCH, 2 ** int(math.log2(max(affordable, 1)))))


# ---- checks -----------------------------------------------------------------------------------------------------------

def missing_gradients(trainer: Trainer) -> tuple[list[str], int]:
    """Names of the parameters that should have a gradient and have none (or only zeros), and how many rightly have none.

    A convolution's bias in front of a batch norm is exempt from the zero test: the norm takes it away again."""
    exempt = trainer.model.parameters_without_gradient()
    missing = []
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad or name in exempt:
            continue
        if p.grad is None or (not name.endswith("conv.bias") and not p.grad.any()):
            missing.append(name)
    return missing, sum(p.numel() for name, p in trainer.model.named_parameters() if name in exempt)


def non_finite(trainer: Trainer) -> list[str]:
    """Names of weights, buffers, gradients and momenta that hold a NaN or an infinity."""
    tensors = dict(trainer.model.state_dict())
    if not trainer.precision.scaler.is_enabled():   # while it looks for its scale, it meets infinite gradients and skips them
        tensors |= {f"gradient of {name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    tensors |= {f"moving average of {name}": t for name, t in trainer.eval_model.state_dict().items()}
    for number, state in enumerate(trainer.optimizer.state.values()):
        tensors |= {f"momentum {number}": value for value in state.values() if torch.is_tensor(value)}
    return [name for name, t in tensors.items() if not torch.isfinite(t).all()]


@torch.no_grad()
def reload_equal(run: Run, content: dict) -> bool:
    """Logits of the run's network and of one built from the checkpoint alone, on the same images."""
    images, _ = next(run.trainer.batches.epoch(0))
    fresh = checkpoint.load_model(content).to(run.device, memory_format=torch.channels_last)
    mine = run.trainer.eval_model
    mine.eval()
    with run.trainer.precision.context():
        a, b = mine(images).float(), fresh(images).float()
    tolerance = 1e-3 if run.trainer.precision.dtype is torch.float32 else 2e-2
    return torch.equal(a, b) if run.device.type == "cpu" else torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def resumed_step(run: Run, content: dict) -> float:
    """Largest difference of a weight between one more step of the run and the same step of a run resumed from disk."""
    trainer = run.trainer
    batch = next(trainer.batches.epoch(0))
    longer = run.config | {"epochs": 2}
    resumed = Run(run.task, dict(longer), run.run_dir, run.train_set, run.eval_set, content=content).trainer
    trainer.config = longer
    results = []
    for each in (trainer, resumed):
        checkpoint.restore_random_states(content["rng"])
        each.mode = None
        each.step(*batch)
        results.append(each.model.state_dict())
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(results[0].values(), results[1].values()))


# ---- what a run will take ---------------------------------------------------------------------------------------------

def measure(trainer: Trainer, images: int) -> tuple[float, float]:
    """Seconds an image of a training step and of an evaluation, at full input size. The run is left untouched: it works
    on a copy of the network and puts the random states back."""
    states = checkpoint.random_states()
    model = copy.deepcopy(trainer.model)
    compiled = trainer.run_model is not trainer.model
    batch = torch.randn(images, 3, *trainer.config["input_size"], device=trainer.device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64, device=trainer.device)

    def forward(net):
        with trainer.precision.context():
            return net(batch)

    def step() -> None:
        F.cross_entropy(forward(net).float(), labels).backward()

    net = torch.compile(model, dynamic=False) if compiled else model
    net.train()
    if images == 1:     # as in the run: set_mode
        norms_to_eval(model)
    step()  # the first step also sets up kernels, and takes several times what the next ones do
    training = timed(step, trainer.device)
    model.eval()
    with torch.no_grad():
        forward(model)
        evaluating = timed(lambda: forward(model), trainer.device)
    checkpoint.restore_random_states(states)
    return training / images, evaluating / images


def most_that_fit(trainer: Trainer, start: int) -> int:
    """Images whose forward and backward pass fit in memory at once, found by doubling (or halving) ``start`` up to
    MOST_TRIED; 0 when not even one fits. On a copy of the network, not compiled."""
    states = checkpoint.random_states()
    model = copy.deepcopy(trainer.model).train()
    norms_to_eval(model)    # so that a single image can be tried
    count, most = start, 0
    while 0 < count <= MOST_TRIED:
        if fits(trainer, model, count):
            most, count = count, 2 * count
        elif most:
            break
        else:
            count //= 2
    checkpoint.restore_random_states(states)
    return most


def norms_to_eval(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()


def fits(trainer: Trainer, model: torch.nn.Module, count: int) -> bool:
    """Whether a step on so many images has enough memory."""
    try:
        batch = torch.zeros(count, 3, *trainer.config["input_size"], device=trainer.device)
        with trainer.precision.context():
            logits = model(batch.contiguous(memory_format=torch.channels_last))
        logits.float().sum().backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()


def timed(work, device: torch.device) -> float:
    """Seconds of a call; on a GPU, whose calls are short, of the mean of ten."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    calls = 10 if device.type == "cuda" else 1
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - started) / calls


def run_seconds(config: dict, cost: tuple[float, float], train_images: int, test_images: int, begun: float = 0.0) -> float:
    """Seconds of what is left of a run, evaluations included, when ``begun`` (0 to 1) of it is done; a progressively
    resized image costs its share of pixels."""
    share, done, steps_an_epoch = 0.0, begun, max(1, train_images // config["batch_size"])
    for scale, until in [*stages(config, steps_an_epoch), (1.0, 1.0)]:
        share, done = share + max(0.0, until - done) * scale**2, max(done, until)
    evaluations = config["epochs"] - int(begun * config["epochs"])
    evaluated = evaluations * (test_images + recalibration_count(train_images))
    return config["epochs"] * train_images * cost[0] * share + evaluated * cost[1]


def print_table(table: list[tuple[str, str, float]], failures: list[str]) -> None:
    print(f"\n{'exercised':<14} {'seconds':>7}  outcome")
    for what, outcome, seconds in table:
        print(f"{what:<14} {seconds:7.1f}  {outcome}")
    for failure in failures:
        print(f"FAILED: {failure}")
    total = sum(seconds for *_, seconds in table)
    print(f"Sanity pass {'FAILED' if failures else 'passed'} in {total:.0f} s.\n")


def print_estimate(config: dict, cost: tuple[float, float], trainer: Trainer, sizes: tuple[int, int],
                   batch: int, peak: float, most: int | None) -> None:
    device = trainer.device
    whole = run_seconds(config, cost, *sizes)
    epoch = clock(whole / config["epochs"])
    cut = f" (measured with {batch} images a step instead of {config['batch_size']})" if batch != config["batch_size"] else ""
    print(f"On {options.device_name(device)}, {trainer.config['precision']}: about {epoch} an epoch of {sizes[0]:,} "
          f"images, {clock(whole)} for {config['epochs']} epochs{cut}.\n"
          f"Peak memory {peak:,.0f} MiB ({'GPU' if device.type == 'cuda' else 'resident'}).")
    if most is not None:
        hint = "" if config["checkpoint_activations"] else "; --checkpoint-activations allows more"
        print(f"Largest micro-batch that fits, by doubling: {most}{' or more' if 2 * most > MOST_TRIED else ''}{hint}.")
