"""The experiments as a list of commands, and the program that runs them.

Each command leaves a file in its run's folder. A command whose file is there is skipped, and a
training run that was stopped is resumed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import CHECKPOINT_NAME
from common.errors import UserError
from common.files import make_folders
from experiments.transfer import first_classes, link_classes
from training.run_folder import read_config

SEEDS = (0, 1, 2)
# pictures do not change a run, and cost time
COMMON = ("--recipe", "fast", "--overlay-every", "0", "--num-workers", "0")
CONTROL = "vgg-gap"
# the levels and compatibility functions of docs/attention.md; "uniform" has no place to look at
ATTENTION = (
    "vgg-att1-pc",
    "vgg-att2-concat-pc",
    "vgg-att3-concat-pc",
    "vgg-att3-indep-pc",
    "vgg-att3-concat-dp",
    "vgg-att3-concat-gate",
    "vgg-pan",
)
MODELS = ("vgg", CONTROL, *ATTENTION, "vgg-att3-concat-uniform")
COMPARED = ("vgg-att3-concat-pc", CONTROL)  # in the costly experiments
FIRST = 50  # CIFAR-100 classes that the runs called first50-... are trained on
ATTACKS = ("fgsm:1,2,4,8", "pgd:1,2")
ATTACKED = 500  # test images
MAPS, ATTACK, TRANSFER = "replaced_maps.json", "attacks.json", "transfer.json"
KEPT = ("config.json", "metrics.csv", MAPS, ATTACK, TRANSFER)
# an absolute path of three parts or more; its last two
ABSOLUTE = re.compile(r"""(?<![\w.:/])/(?:[^/\s"']+/)+([^/\s"']+/[^/\s"']+)""")


@dataclass(frozen=True)
class Run:
    """A training run and what is measured on it."""

    name: str  # of its folder
    train: tuple[str, ...]  # options of train_cifar100.py
    measures: tuple[tuple[str, tuple[str, ...]], ...]  # (the file it writes, python's arguments)


def plan(folder: Path, data_dir: str, options: Sequence[str]) -> list[Run]:
    """Every run, in the order in which they are made: one seed of all networks after the other.

    folder: of all runs. options: of train_cifar100.py, common to all
    (COMMON and the size).
    """
    runs = []
    for seed in SEEDS:
        for model in MODELS:
            name = f"{model}-{seed}"
            checkpoint = str(folder / name / CHECKPOINT_NAME)
            measures = []
            if model in ATTENTION:
                measures.append((MAPS, ("-m", "experiments", "maps", checkpoint)))
            if model in COMPARED:
                attack = ["train_cifar100.py", "--evaluate", checkpoint]
                attack += [word for each in ATTACKS for word in ("--attack", each)]
                # bf16 would round the gradients, too
                attack += ["--attack-images", str(ATTACKED), "--precision", "fp32"]
                measures.append((ATTACK, tuple(attack)))
                measures.append((TRANSFER, ("-m", "experiments", "transfer", checkpoint)))
            runs.append(run_of(name, model, seed, data_dir, options, measures))
    for seed in SEEDS:
        for model in COMPARED:
            name = f"first{FIRST}-{model}-{seed}"
            checkpoint = str(folder / name / CHECKPOINT_NAME)
            transfer = (TRANSFER, ("-m", "experiments", "transfer", checkpoint))
            runs.append(run_of(name, model, seed, first_dir(folder), options, [transfer], data_dir))
    return runs


def run_of(
    name: str,
    model: str,
    seed: int,
    data_dir: str,
    options: Sequence[str],
    measures: Iterable[tuple[str, tuple[str, ...]]],
    measured_on: str | None = None,
) -> Run:
    """measured_on: the data folder of the measures, that of the training unless it is another."""
    train = ("--data-dir", data_dir, "--model", model, "--seed", str(seed), *options)
    data = ("--data-dir", measured_on or data_dir)
    return Run(name, train, tuple((file, (*words, *data)) for file, words in measures))


def first_dir(folder: Path) -> str:
    """The data folder with links to the first classes alone."""
    return str(folder / f"first{FIRST}-classes")


# ---- running it ---------------------------------------------------------------------------------


def run_all(folder: Path, data_dir: str, options: Sequence[str], jobs: int) -> int:
    """Run what is missing, ``jobs`` runs at a time. Returns the number of runs that failed; the
    log beside their folder says why."""
    make_folders(folder)
    runs, stop = plan(folder, data_dir, options), threading.Event()
    try:
        link_classes(data_dir, first_dir(folder), first_classes(data_dir, FIRST))
    except UserError as error:
        print(f"Without the runs on the first {FIRST} classes: {error}", flush=True)
        runs = [run for run in runs if first_dir(folder) not in run.train]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            done = list(pool.map(lambda run: run_one(run, folder, environment, stop), runs))
        except KeyboardInterrupt:
            stop.set()  # the running commands have had the Ctrl-C themselves, and save
            raise
    return done.count(False)


def run_one(run: Run, folder: Path, environment: dict[str, str], stop: threading.Event) -> bool:
    """Whether everything of this run is there now."""
    where = folder / run.name
    log = folder / f"{run.name}.log"
    commands = [] if is_finished(where) else [("train_cifar100.py", *training_words(run, where))]
    commands += [words for file, words in run.measures if not (where / file).exists()]
    for words in commands:
        if stop.is_set():
            return False
        print(f"{run.name}: python {' '.join(words)}", flush=True)
        with open(log, "a") as output:
            done = subprocess.run(
                [sys.executable, *words], stdout=output, stderr=output, env=environment
            )
        if done.returncode:
            print(f"{run.name}: failed with status {done.returncode}, see {log}", flush=True)
            return False
    return True


def training_words(run: Run, where: Path) -> tuple[str, ...]:
    """The options of train_cifar100.py that begin the run, or resume it."""
    if (where / "config.json").exists():
        return ("--resume", str(where))
    return (*run.train, "--run-dir", str(where))


def is_finished(where: Path) -> bool:
    try:
        return bool(read_config(where)["finished"])
    except (OSError, ValueError, KeyError):
        return False


# ---- keeping it ---------------------------------------------------------------------------------


def keep(folder: Path, kept: Path) -> int:
    """Copy the small files of the finished runs (KEPT) to ``kept``, absolute paths cut to
    their last two parts.
    Returns the number of runs. Raises UserError where there is none."""
    runs = [path for path in sorted(folder.glob("*/")) if is_finished(path)]
    if not runs:
        raise UserError(f"{folder} holds no finished run", 2)
    for run in runs:
        make_folders(kept / run.name)
        for path in (run / name for name in KEPT if (run / name).exists()):
            text = ABSOLUTE.sub(r"\1", path.read_text())
            (kept / run.name / path.name).write_text(text)
    return len(runs)
