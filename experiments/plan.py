"""The experiments as a list of commands, and the program that runs them.

Each command leaves a file in its run's folder. A command whose file is there is skipped, and a
training run that was stopped is resumed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import CHECKPOINT_NAME
from common.errors import UserError
from common.files import identity, make_folders, replace_file
from experiments.transfer import first_classes, link_classes
from training.evaluate_attacks import FILE as ATTACK
from training.run_folder import lock, read_config

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
COMPARED = ("vgg-att3-concat-pc", "vgg-att3-concat-uniform", CONTROL)  # in the costly experiments
FIRST = 50  # CIFAR-100 classes that the runs called first50-... are trained on
ATTACKS = ("fgsm:1,2,4,8", "pgd:1,2")
ATTACKED = 500  # test images
MAPS, TRANSFER = "replaced_maps.json", "transfer.json"
KEPT = ("config.json", "metrics.csv", MAPS, ATTACK, TRANSFER)
# an absolute path of three parts or more; its last two
ABSOLUTE = re.compile(r"""(?<![\w.:/])/(?:[^/\s"']+/)+([^/\s"']+/[^/\s"']+)""")


@dataclass(frozen=True)
class Run:
    """A training run and what is measured on it."""

    name: str  # of its folder
    train: tuple[str, ...]  # options of train_cifar100.py
    measures: tuple[tuple[str, tuple[str, ...]], ...]  # (the file it writes, python's arguments)


def plan(folder: Path, data_dir: str, size: Sequence[str], device: str) -> list[Run]:
    """Every run, in the order in which they are made: one seed of all networks after the other.

    folder: of all runs. size: the options --width and --epochs.
    """
    options = ("--device", device, *size, *COMMON)
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
    where = ("--data-dir", measured_on or data_dir, *options[:2])  # and the device
    return Run(name, train, tuple((file, (*words, *where)) for file, words in measures))


def first_dir(folder: Path) -> str:
    """The data folder with links to the first classes alone."""
    return str(folder / f"first{FIRST}-classes")


# ---- running it ---------------------------------------------------------------------------------


def run_all(folder: Path, data_dir: str, size: Sequence[str], device: str, jobs: int) -> int:
    """Run what is missing, ``jobs`` runs at a time. Returns the number of runs that failed; the
    log beside their folder says why. Raises UserError where another process runs them."""
    make_folders(folder)
    runs = plan(folder, data_dir, size, device)
    if not (Path(data_dir) / "cifar100").is_dir():
        print(f"Without the runs on {FIRST} classes: {data_dir}/cifar100 has no class folders")
        runs = [run for run in runs if first_dir(folder) not in run.train]
    else:
        link_classes(data_dir, first_dir(folder), first_classes(data_dir, FIRST))
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with lock(folder), ThreadPoolExecutor(jobs) as pool:
        commands = Commands(environment)
        try:
            done = list(pool.map(lambda run: run_one(run, folder, commands), runs))
        except KeyboardInterrupt:
            print("\nStopping. The training runs save what they have; this resumes with them.")
            commands.stop()
            raise
    return done.count(False)


class Commands:
    """Runs commands, of which the first Ctrl-C stops all: a run that gets a second one would not
    save."""

    def __init__(self, environment: dict[str, str]):
        self.environment, self.running, self.stopped = environment, set(), False

    def run(self, words: Sequence[str], log: Path) -> int | None:
        """The exit status of ``python words``, whose output goes to ``log``; None once stopped."""
        if self.stopped:
            return None
        with open(log, "a") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
            )
            self.running.add(process)
            status = process.wait()
            self.running.discard(process)
        return None if self.stopped else status

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.running):
            process.send_signal(signal.SIGINT)


def run_one(run: Run, folder: Path, commands: Commands) -> bool:
    """Whether everything of this run is there now."""
    where, log = folder / run.name, folder / f"{run.name}.log"
    others = differing(run, where)
    if others:
        print(f"{run.name}: there is another run in {where} ({others}): move it away", flush=True)
        return False
    missing = [] if is_finished(where) else [("train_cifar100.py", *training_words(run, where))]
    missing += [words for file, words in run.measures if not (where / file).exists()]
    for words in missing:
        print(f"{run.name}: python {' '.join(words)}", flush=True)
        status = commands.run(words, log)
        if status:
            print(f"{run.name}: failed with status {status}, see {log}", flush=True)
        if status != 0:
            return False
    return True


def training_words(run: Run, where: Path) -> tuple[str, ...]:
    """The options of train_cifar100.py that begin the run, or resume it."""
    if (where / "config.json").exists():
        return ("--resume", str(where))
    return (*run.train, "--run-dir", str(where))


def differing(run: Run, where: Path) -> str:
    """What the run in ``where``, if there is one, has otherwise than the list: "epochs 30"."""
    config = config_of(where).get("config", {})
    wanted = dict(zip(run.train[::2], run.train[1::2], strict=True))
    names = [name for name in ("model", "seed", "width", "epochs") if name in config]
    return ", ".join(
        f"{name} {config[name]}" for name in names if str(config[name]) != wanted[f"--{name}"]
    )


def is_finished(where: Path) -> bool:
    return bool(config_of(where).get("finished"))


def config_of(where: Path) -> dict:
    """The content of a run's config.json, {} where there is none to read."""
    try:
        return read_config(where)
    except (OSError, ValueError):
        return {}


# ---- keeping it ---------------------------------------------------------------------------------


def keep(folder: Path, kept: Path) -> int:
    """Copy the small files of the finished runs (KEPT) to ``kept``, absolute paths cut to their
    last two parts. Returns the number of runs. Raises UserError where there is none, or where
    ``kept`` holds other folders of these names."""
    runs = [path for path in sorted(folder.glob("*/")) if is_finished(path)]
    if not runs:
        raise UserError(f"{folder} holds no finished run", 2)
    for run in runs:
        copy = kept / run.name
        is_ours = identity(copy) != identity(run) and config_of(copy).get("finished")
        if os.path.lexists(copy) and not is_ours:
            raise UserError(f"{copy} is no copy of {run}: name another folder")
        make_folders(copy)
        for path in (run / name for name in KEPT if (run / name).exists()):
            text = ABSOLUTE.sub(r"\1", path.read_text())
            replace_file(copy / path.name, lambda file, text=text: file.write(text.encode()))
    return len(runs)
