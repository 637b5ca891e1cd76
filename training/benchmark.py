"""--benchmark: the speed of the real training step, where its time goes, and the speed of a plain
training loop."""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from common.device import choose_device, device_name, peak_memory_mib, synced_time
from common.errors import UserError, is_oom_error
from common.files import replace_file
from data import ImageSet, split
from training.run import Run
from training.sanity import cpu_batch
from training.task import Task
from training.trainer import Trainer

WINDOWS = 5  # of steps; the median of their rates is reported
WARM_UP = 3  # steps that are not counted: kernels are chosen, graphs compiled
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product measures the device
PARTS = ("data", "forward", "backward", "optimizer")


def benchmark(task: Task, config: dict, steps: int, json_path: str | None, command: str) -> int:
    """Measure, print the table, write it to ``json_path`` if one is given. Returns the exit status.
    Downloads nothing and saves no training.

    Raises UserError where ``json_path`` cannot be written."""
    if json_path:
        check_json(Path(json_path))
    if config["init_from"] != "none":
        source = config["init_from"] or "a checkpoint"
        print(f"--benchmark starts from nothing, not from {source}: the speed is the same.")
    *sets, sample = task.data.sets_or_sample(config)
    train, evaluation = split(config, *sets)
    device = choose_device(config["device"])
    asked = config["batch_size"]
    batch = min(asked if device.type == "cuda" else cpu_batch(config, train), len(train))
    config = config | {
        "sample": sample,
        "progressive": "none",
        "init_from": "none",
        "freeze_epochs": 0.0,
        "batch_size": batch,
    }
    run = Run(task, config, Path("."), train, evaluation)
    trainer, config = run.trainer, run.config
    result = {
        "command": command,
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": config["precision"],
        "model": config["model"],
        "width": config["width"],
        "input_size": config["input_size"],
        "batch_size": config["batch_size"],
        "compiled": run.compiled,
        "checkpoint_activations": config["checkpoint_activations"],
        "images": train.source,
    }
    result |= measure_step(trainer, steps)
    result["flop_an_image"] = flops_per_image(trainer)
    result["flop_per_second"] = result["flop_an_image"] * result["images_per_second"]
    result["matrix_flop_per_second"] = matrix_rate(device, trainer.precision.dtype)
    result["share_of_matrix_rate"] = result["flop_per_second"] / result["matrix_flop_per_second"]
    try:
        plain = baseline(trainer, train, config, steps, run.mean, run.std)
    except (RuntimeError, MemoryError) as error:
        if not is_oom_error(error):
            raise
        plain = None  # it may need more memory than our step
    result["baseline_images_per_second"] = plain
    result["ratio"] = plain and result["images_per_second"] / plain
    print_table(result, asked)
    if json_path:
        text = json.dumps(result, indent=2) + "\n"
        replace_file(Path(json_path), lambda file: file.write(text.encode()))
        print(f"Written to {json_path}")
    return 0


def check_json(path: Path) -> None:
    """Called first, as measuring takes minutes. Raises UserError where the result could not be
    written, or would replace a file that is not an earlier result."""
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}", 2)
    if os.path.lexists(path) and not is_result(path):
        raise UserError(
            f"--json {path} is there already, and not written by --benchmark: give another name", 2
        )


def is_result(path: Path) -> bool:
    """Whether --benchmark has written this file."""
    try:
        names = json.loads(path.read_text("utf-8-sig")).keys()
        return names >= {"command", "images_per_second", "parts_ms"}
    except (OSError, ValueError, AttributeError):
        return False


# ---- our step -----------------------------------------------------------------------------------


def measure_step(trainer: Trainer, steps: int) -> dict:
    """Images per second (median of WINDOWS windows of the real loop), the parts of a step in ms
    (from further steps, which wait for the device after each part), and the peak memory in MiB."""
    batches = cycle(map(trainer.batches.epoch, itertools.count()))
    for _ in range(WARM_UP):
        trainer.step(*next(batches))
    rates = rates_of(
        lambda: trainer.step(*next(batches)), trainer.device, steps, trainer.config["batch_size"]
    )
    peak = peak_memory_mib(trainer.device)
    return {
        "images_per_second": statistics.median(rates),
        "slowest_window": min(rates),
        "fastest_window": max(rates),
        "step_ms": 1000 * trainer.config["batch_size"] / statistics.median(rates),
        "parts_ms": parts(trainer, batches, max(2, steps // WINDOWS)),
        "peak_memory_mib": peak,
    }


def rates_of(
    step: Callable[[], object], device: torch.device, steps: int, images: int
) -> list[float]:
    """Images per second of each of WINDOWS windows, which share ``steps`` steps (at least one per
    window) of ``images`` images."""
    steps_per_window = max(1, steps // WINDOWS)
    rates = []
    for _ in range(WINDOWS):
        started = synced_time(device)
        for _ in range(steps_per_window):
            step()
        rates.append(steps_per_window * images / (synced_time(device) - started))
    return rates


def parts(
    trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> dict[str, float]:
    """Milliseconds per step of PARTS: preparing the batch; the forward pass; the loss and the
    backward pass; the optimizer with the moving average."""
    seconds = dict.fromkeys(PARTS, 0.0)
    forward, gradients = trainer.run_model, trainer.gradients

    def timed(part: str, work: Callable) -> Callable:
        def call(*args: object) -> object:
            started = synced_time(trainer.device)
            result = work(*args)
            seconds[part] += synced_time(trainer.device) - started
            return result

        return call

    trainer.run_model, trainer.gradients = timed("forward", forward), timed("backward", gradients)
    try:
        for _ in range(steps):
            batch = timed("data", next)(batches)
            timed("optimizer", trainer.step)(*batch)
    finally:
        trainer.run_model, trainer.gradients = forward, gradients
    # step() contains gradients(), which contains the forward pass
    seconds["optimizer"] -= seconds["backward"]
    seconds["backward"] -= seconds["forward"]
    return {part: 1000 * value / steps for part, value in seconds.items()}


def flops_per_image(trainer: Trainer) -> int:
    """Floating-point operations of one image's forward and backward pass, without recomputation. A
    multiply-add counts as two."""
    model = copy.deepcopy(trainer.model).train()
    model.checkpoint_activations = False
    images = torch.randn(2, 3, *trainer.config["input_size"], device=trainer.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        with trainer.precision.context():
            logits = model(images)
        logits.float().sum().backward()
    return counter.get_total_flops() // 2


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product in this precision: what the
    device can reach. In fp32 a GPU's convolutions may use TF32, so the product may too."""
    side, before = MATRIX[device.type], torch.backends.cuda.matmul.allow_tf32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        rates = rates_of(lambda: a @ b, device, 2 * WINDOWS, side)  # of rows
        return statistics.median(2 * side**2 * rate for rate in rates)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- the plain loop -----------------------------------------------------------------------------


class PlainImages(Dataset):
    """Images one by one, through torchvision's transforms."""

    def __init__(self, images: ImageSet, transform: Callable):
        self.stored = images.stored.cpu().numpy()
        self.rows = range(len(images)) if images.rows is None else images.rows.tolist()
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.stored[self.rows[index]]
        return self.transform(Image.fromarray(pixels)), self.labels[index]


def plain_transform(config: dict, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """torchvision's transforms for the augmentation of the config."""
    from torchvision import transforms

    size = tuple(config["input_size"])
    if config["zoom"]:
        crop = transforms.RandomResizedCrop(size, (config["zoom"], 1.0))
    else:
        padding = config["crop_pad"] or None
        crop = transforms.RandomCrop(size, padding=padding, padding_mode="reflect")
    changes = [transforms.TrivialAugmentWide()] if config["trivial_augment"] else []
    return transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            *changes,
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def baseline(
    trainer: Trainer,
    train: ImageSet,
    config: dict,
    steps: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> float:
    """Images per second of the same network and batch in fp32 and NCHW, with a DataLoader of two
    workers (fewer by --num-workers) and torchvision's transforms for each image, torch's SGD, and
    the loss read at every step."""
    loader = DataLoader(
        PlainImages(train, plain_transform(config, mean, std)),
        config["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=min(2, config["num_workers"]),
        pin_memory=trainer.device.type == "cuda",
    )
    model = copy.deepcopy(trainer.model)
    model.to(memory_format=torch.contiguous_format).train()
    model.checkpoint_activations = False
    optimizer = torch.optim.SGD(
        model.parameters(),
        config["lr"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
    )
    total_loss, batches = 0.0, cycle(itertools.repeat(loader))

    def step() -> None:
        nonlocal total_loss
        images, labels = (tensor.to(trainer.device, non_blocking=True) for tensor in next(batches))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total_loss += loss.item()

    for _ in range(WARM_UP):
        step()
    return statistics.median(rates_of(step, trainer.device, steps, config["batch_size"]))


def cycle(epochs: Iterable[Iterable]) -> Iterator:
    """The batches of epoch after epoch."""
    for epoch in epochs:
        yield from epoch


# ---- what is printed ----------------------------------------------------------------------------


def print_table(result: dict, asked: int) -> None:
    """Print what ``benchmark`` measured. ``asked``: the batch size of the config."""
    height, width = result["input_size"]
    cut = f" (cut from {asked})" if result["batch_size"] != asked else ""
    print(
        f"\n{result['model']}, width {result['width']:g}, {height}x{width} px, "
        f"batches of {result['batch_size']}{cut}\n"
        f"{result['device']}, PyTorch {result['torch']}; {result['images']}\n"
    )
    for name, value, note in table_rows(result):
        print(f"{name:<15} {value:>18}   {note}".rstrip())


def table_rows(result: dict) -> list[tuple[str, str, str]]:
    """(name, value, note) of each line of the table."""
    options = [name for name in ("compiled", "checkpoint_activations") if result[name]]
    in_use = ", ".join([result["precision"], "channels_last", *options])
    windows = f"{result['slowest_window']:,.1f} to {result['fastest_window']:,.1f}"
    flop_per_second = result["flop_per_second"] / 1e9
    matrix_product = result["matrix_flop_per_second"] / 1e9
    of_matrix = f"{result['share_of_matrix_rate']:.2f} of a large matrix product's"
    percent_per_ms = 100 / sum(result["parts_ms"].values())
    plain = result["baseline_images_per_second"]
    return [
        (
            "training step",
            f"{result['images_per_second']:,.1f} images/s",
            f"median of {WINDOWS} windows, {windows}; {in_use}",
        ),
        ("one step", f"{result['step_ms']:,.1f} ms", ""),
        *(
            (f"  {part}", f"{ms:,.1f} ms", f"{ms * percent_per_ms:.1f} %")
            for part, ms in result["parts_ms"].items()
        ),
        (
            "arithmetic",
            f"{result['flop_an_image'] / 1e9:,.2f} GFLOP/image",
            "forward and backward, counted",
        ),
        ("achieved", f"{flop_per_second:,.1f} GFLOP/s", f"{of_matrix} {matrix_product:,.1f}"),
        ("peak memory", f"{result['peak_memory_mib']:,.0f} MiB", ""),
        (
            "the plain way",
            f"{plain:,.1f} images/s" if plain else "out of memory",
            "fp32, NCHW, DataLoader with torchvision's transforms, loss read at every step",
        ),
        ("ratio", f"{result['ratio']:.2f}" if plain else "", ""),
    ]
