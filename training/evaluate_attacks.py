"""--evaluate with --attack: loss and top-1 of a checkpoint on adversarial test images, by strength;
printed, and as a file."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.device import device_name
from common.errors import UserError, printable
from data import evenly_spread
from training.attacks import (
    ATTACKS,
    PGD_REACH,
    PGD_STEPS,
    STEPS,
    AttackedNetwork,
    attacked_batches,
    gradients_per_image,
)
from training.compare import aligned
from training.environment import command_line
from training.evaluate_checkpoint import check_options, opened_checkpoint, print_network
from training.evaluation import OpenedCheckpoint, evaluate, interval_95
from training.evaluation_files import has_key, json_bytes, record, rounded, write_file
from training.progress import format_duration
from training.task import Task

FILE = "attacks.json"


def evaluate_attacks(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """Evaluate the checkpoint of --evaluate on the test images as they are and after each attack of
    --attack; print the results, then write them. Returns the exit status.

    Raises UserError for an option that contradicts the checkpoint or has no effect, for other
    images, and for a folder that cannot be written to."""
    check_options(args, argv)
    if hasattr(args, "sort"):
        raise UserError("--attack prints no classes: leave out --sort", 2)
    opened, attacks = opened_checkpoint(task, args, argv), merged(args.attack)
    total = len(opened.test)
    chosen = evenly_spread(getattr(args, "attack_images", total), total)
    if len(chosen) < total:
        opened = dataclasses.replace(opened, test=opened.test.subset(chosen))
    print_network(opened)
    print_plan(opened, attacks, total)
    started = time.perf_counter()
    results = attack_results(opened, attacks)
    print_results(results, time.perf_counter() - started)
    content = record(opened, command_line(argv)) | {"results": [r.as_record() for r in results]}
    folder = Path(getattr(args, "out", opened.path.parent))
    path = write_file(folder / FILE, json_bytes(content), has_key("results"))
    print(f"Written to {printable(path)}")
    return 0


def merged(given: Iterable[tuple[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The strengths of each attack, ascending, from any number of --attack."""
    strengths: dict[str, set[float]] = {}
    for name, numbers in given:
        strengths.setdefault(name, set()).update(numbers)
    return {name: sorted(strengths[name]) for name in ATTACKS if name in strengths}


# ---- results ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack leaves of the accuracy."""

    attack: str  # "none", "fgsm" or "pgd"
    strength: float  # the bound on the change of each color value, of 255
    images: int
    correct: int
    loss: float  # mean cross-entropy in nats

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.correct / self.images

    def as_record(self) -> dict:
        """Plain values; None for a number that is not finite."""
        return {
            "attack": self.attack,
            "strength": self.strength,
            "steps": STEPS[self.attack],
            "images": self.images,
            "correct": self.correct,
            "top1": rounded(self.top1),
            "top1_95": [rounded(end) for end in interval_95(self.top1, self.images)],
            "loss": rounded(self.loss),
        }


def attack_results(
    opened: OpenedCheckpoint, attacks: Mapping[str, Sequence[float]]
) -> list[AttackResult]:
    """The results on the test images as they are, then after each attack at each of its strengths.
    The former are those of ``evaluate`` on the same batches, in the same precision."""
    saved, device, images = opened.saved, opened.precision.device, len(opened.test)
    kinds = [("none", 0.0)]
    kinds += [(name, strength) for name, strengths in attacks.items() for strength in strengths]
    sums = torch.zeros(len(kinds), 2, dtype=torch.float64, device=device)  # correct answers, loss
    places = itertools.cycle(range(len(kinds)))

    def observe(logits: Tensor, best: Tensor, labels: Tensor) -> None:
        correct = (best[:, 0] == labels).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums[next(places)] += torch.stack([correct.double(), loss.double()])

    gradients = images * gradients_per_image(attacks)
    with tqdm(total=gradients, unit=" gradients", leave=False, disable=None) as bar:
        network = AttackedNetwork(
            opened.model, saved["mean"], saved["std"], opened.precision, bar.update
        )
        evaluate(
            opened.model,
            attacked_batches(network, opened.batches(), attacks),
            len(opened.test.class_names),
            opened.precision,
            observe=observe,
        )
    return [
        AttackResult(name, strength, images, int(correct), loss / images)
        for (name, strength), (correct, loss) in zip(kinds, sums.tolist(), strict=True)
    ]


# ---- what is printed ----------------------------------------------------------------------------


def print_plan(
    opened: OpenedCheckpoint, attacks: Mapping[str, Sequence[float]], total: int
) -> None:
    """What is attacked, and how much work that is."""
    images = f"{len(opened.test):,}"
    if len(opened.test) < total:
        images += f" of {total:,}"
    print(
        f"{images} test images ({opened.test.source}), {device_name(opened.precision.device)}, "
        f"{opened.precision.name}, gradients per image: {gradients_per_image(attacks)}",
        flush=True,
    )


def print_results(results: Sequence[AttackResult], seconds: float) -> None:
    """A line per attack and strength."""
    rows = [("attack", "strength", "top-1, %", "95 % interval", "loss")]
    for each in results:
        low, high = interval_95(each.top1, each.images)
        interval = f"{low:.2f} to {high:.2f}"
        top1, loss = f"{each.top1:.2f}", f"{each.loss:.4f}"
        rows.append((each.attack, f"{each.strength:g}", top1, interval, loss))
    print("\n" + "\n".join(aligned(rows, "<>>>>")))
    print(
        "\nA strength is the largest change of a color value, of 255. fgsm takes one step; pgd "
        f"takes {PGD_STEPS},\neach of {PGD_REACH / PGD_STEPS:g} of the strength, from a random "
        f"start. Took {format_duration(seconds)}.",
        flush=True,  # what follows may fail
    )
