"""A run's folder: its checkpoints, config.json and lock.

A crash at any moment leaves a whole checkpoint. It is one plain dict (see Run.checkpoint_dict and
Trainer.state) that ``torch.load(weights_only=True)`` reads; common/checkpoint.py verifies it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import CHECKPOINT_NAME, PREVIOUS_NAME, read_checkpoint, upgrade_config
from common.errors import UserError
from common.files import (
    free_path,
    identity,
    make_folders,
    remove_leftovers,
    remove_made,
    replace_file,
    set_aside,
)
from common.process import quoted
from explain.pictures import is_own_picture, png_bytes
from training.event_files import TRAIN
from training.options import MAY_CHANGE

BEST_NAME = "best.pt"
SUMMARY_NAME = "summary.png"
# What a run writes besides TensorBoard's event files. The folder of a new run must hold none of it.
RUN_FILES = ("config.json", "metrics.csv", CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME, SUMMARY_NAME)


def save_file(path: Path, saved: dict, previous: Path | None = None) -> None:
    """Save to ``path``, whole or not at all. What ``path`` held is kept as ``previous``, if that is
    given.

    Raises UserError where the disk is full or ``path`` cannot be written."""
    try:
        # a run folder that was moved away must not lose the run
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, functools.partial(torch.save, saved), previous=previous)
    except (OSError, RuntimeError) as error:  # on a full disk torch raises a RuntimeError
        raise UserError(
            f"{path} could not be written: {disk_error(error)}. What was saved before is "
            f"untouched: make room there, then --resume {quoted(path.parent)}"
        ) from error


def disk_error(error: BaseException) -> str:
    """The system's text of the OSError behind an error, else the error's first line."""
    cause = error
    while not isinstance(cause, OSError) and cause.__context__:
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0]


def save_checkpoint(run_dir: Path, saved: dict) -> None:
    """Write last.pt; the one before becomes last.prev.pt."""
    save_file(run_dir / CHECKPOINT_NAME, saved, previous=run_dir / PREVIOUS_NAME)


def read_last(run_dir: Path) -> dict | None:
    """A run's newest readable checkpoint: last.pt, else last.prev.pt, with a note. None when there
    is none yet.

    Raises UserError when neither can be read, or they belong to another run."""
    last, previous = run_dir / CHECKPOINT_NAME, run_dir / PREVIOUS_NAME
    if not last.exists() and not previous.exists():
        return None
    try:
        return check_own(run_dir, last, read_checkpoint(last))
    except UserError as error:
        if not previous.exists():
            raise
        saved = check_own(run_dir, previous, read_checkpoint(previous))
        print(f"{error}\nResuming from the checkpoint before it, {previous}.")
        return saved


def prepare_to_write(run_dir: Path, config: dict) -> None:
    """Prepare the folder of a resumed run with this config for writing.

    The next save would overwrite files under a run's names: those that are damaged, or another
    run's, get another name. An unusable last.pt is replaced by last.prev.pt. Half-written files of
    a killed process are removed."""

    def is_of_this_run(path: Path) -> bool:
        try:
            return not differences(read_checkpoint(path)["config"], config)
        except UserError:
            return False

    last, previous, best = (run_dir / name for name in (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME))
    for path in (last, previous, best) if config["val_fraction"] else (last, previous):
        if os.path.lexists(path) and not is_of_this_run(path):
            set_aside(path, "is damaged, or not this run's")
    if previous.exists() and not last.exists():  # else the next save would have none to keep
        os.replace(previous, last)
    if os.path.lexists(run_dir / "config.json"):
        try:
            read_settings(run_dir)
        except (FileNotFoundError, IsADirectoryError, ValueError):  # the first: a broken link
            set_aside(run_dir / "config.json", "is damaged, or not this run's")
    remove_leftovers(run_dir, age=0)


def check_own(run_dir: Path, path: Path, saved: dict) -> dict:
    """Return ``saved``. Raises UserError where config.json has the settings of another run."""
    try:
        settings = upgrade_config(read_settings(run_dir))
    except (OSError, ValueError):  # lost or damaged: the checkpoint holds all of it
        return saved
    for name in differences(saved["config"], settings):
        raise UserError(
            f"{path} belongs to another run: {name} is {saved['config'][name]} in it, "
            f"and {settings[name]} in {run_dir / 'config.json'}"
        )
    return saved


def differences(config: dict, settings: dict) -> list[str]:
    """Names of the settings that no resume may change and that differ, after a round trip through
    JSON (config.json)."""
    return [
        name
        for name in sorted((config.keys() & settings.keys()) - set(MAY_CHANGE))
        if json.loads(json.dumps(config[name])) != json.loads(json.dumps(settings[name]))
    ]


def newest_unfinished(folders: Iterable[Path], dataset: str, where: Path) -> Path:
    """The run in one of the folders that is of this data set, was written to last, is unfinished
    and is not being trained; sanity passes do not count. Raises UserError, which says ``where``,
    if there is none."""
    found = []
    for config_path in (path for runs in folders for path in runs.glob("*/config.json")):
        run_dir = config_path.parent
        with contextlib.suppress(OSError, ValueError):
            settings = read_settings(run_dir)  # anybody may have a config.json
            config = read_config(run_dir)
            if settings.get("dataset", dataset) != dataset:
                continue
            if not config.get("sanity") and not config.get("finished"):
                written = max(path.lstat().st_mtime for path in run_dir.iterdir())
                found.append((written, run_dir))
    for _, run_dir in sorted(found, reverse=True):
        with contextlib.suppress(UserError), lock(run_dir):
            return run_dir
    problem = (
        f"every unfinished run in {where} is being trained"
        if found
        else f"there is no unfinished run in {where}"
    )
    raise UserError(f"--resume: {problem}; name the run's folder", 2)


def write_summary(folder: Path, picture: np.ndarray) -> Path:
    """Write summary.png, over that of this run's earlier end; a picture of somebody else's stays,
    and the new one gets another name. Returns its path."""
    path = free_path(folder / SUMMARY_NAME, is_own_picture)
    replace_file(path, lambda file: file.write(png_bytes(picture)))
    return path


# ---- config.json --------------------------------------------------------------------------------


def write_config(run_dir: Path, record: dict) -> None:
    text = json.dumps(record, indent=2) + "\n"
    replace_file(run_dir / "config.json", lambda file: file.write(text.encode()))


def read_config(run_dir: Path) -> dict:
    return json.loads((run_dir / "config.json").read_text("utf-8-sig"))


def record_of(run_dir: Path, config: dict) -> dict:
    """What config.json says in the folder of a checkpoint with this config; {} where it is lost,
    damaged or another run's."""
    try:
        settings = upgrade_config(read_settings(run_dir))
        return {} if differences(config, settings) else read_config(run_dir)
    except (OSError, ValueError):
        return {}


def read_settings(run_dir: Path) -> dict:
    """The settings in a run's config.json. Raises OSError, and ValueError for another file of that
    name."""
    try:
        settings = read_config(run_dir)["config"]
        if all(isinstance(settings[name], str) for name in ("model", "recipe", "dataset")):
            return settings
    except (KeyError, TypeError, IndexError):
        pass
    raise ValueError("it is not what a run writes")


def earlier_commands(run_dir: Path) -> list[str]:
    """The command lines that started and resumed this run so far; [] where they are lost."""
    try:
        return list(read_config(run_dir)["commands"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


# ---- folders ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(candidates: Iterator[Path]) -> Iterator[Path]:
    """The folder of a new run, made and locked: the first of ``candidates`` that does not exist,
    else the last of them. If it is still empty at the end, it is removed, with the parents that
    were made for it.

    Raises UserError for a folder that holds what a run would write."""
    with contextlib.ExitStack() as stack:
        for run_dir in candidates:
            made = make_folders(run_dir)
            if run_dir in made:
                break
        stack.enter_context(lock(run_dir))
        stack.callback(remove_made, made)  # while the lock keeps others out of it
        check_new(run_dir)
        yield run_dir


def check_new(run_dir: Path) -> None:
    """Raises UserError where a new run in this folder would overwrite something, or mix its curves
    with others."""
    found = [name for name in (*RUN_FILES, TRAIN) if os.path.lexists(run_dir / name)]
    found += sorted(path.name for path in run_dir.iterdir() if "tfevents" in path.name)
    if "config.json" in found or CHECKPOINT_NAME in found:
        raise UserError(
            f"{run_dir} holds a run already: resume it with --resume {quoted(run_dir)}, "
            f"or name another --run-dir",
            2,
        )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{run_dir} holds {', '.join(found[:3])}{more}, which a run writes too: "
            f"name another --run-dir, or move them away",
            2,
        )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keep a run directory to one process. The lock is on the folder itself and ends with the
    process, however it ends.

    Raises UserError where another process has it."""
    in_use = UserError(f"{run_dir} is in use by another process: wait for it, or stop it first")
    try:
        import fcntl
    except ImportError:  # Windows has no flock: only the check for an existing run protects there
        yield
        return
    try:
        descriptor = os.open(run_dir, os.O_RDONLY)
    except FileNotFoundError:
        raise in_use from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        except OSError:  # some network file systems lock no folders
            pass
        if identity(run_dir) != identity(descriptor):
            raise in_use  # the other process had made the folder, and has just removed it
        yield
    finally:
        os.close(descriptor)


# ---- random states ------------------------------------------------------------------------------


def random_states() -> dict:
    """The state of torch's generators (initialization, dropout; CPU and each GPU) and Python's. The
    order and the augmentation need none."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict) -> None:
    """Set the states of ``random_states``; those of the GPUs only on as many GPUs."""
    torch.set_rng_state(states["torch"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if (
        "cuda" in states
        and torch.cuda.is_available()
        and len(states["cuda"]) == torch.cuda.device_count()
    ):
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
