"""Checkpoints: written so that a crash at any moment leaves a whole one, verified when read, never
executed.

A checkpoint is one plain dict (see Trainer.state and run.checkpoint_of) that
``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from common.checkpoint import (
    CHECKPOINT_NAME,
    PREVIOUS_NAME,
    read_checkpoint,
    upgrade_config,
)
from common.errors import UserError
from common.files import (
    identity,
    make_folders,
    remove_leftovers,
    remove_made,
    replace_file,
    set_aside,
)
from common.process import quoted
from training.options import MAY_CHANGE

BEST_NAME = "best.pt"
# What a run writes besides TensorBoard's event files. In the folder of a new run none of it may be
# there.
RUN_FILES = ("config.json", "metrics.csv", CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME)


def save_file(path: Path, saved: dict, previous: Path | None = None) -> None:
    """Save to ``path``, whole or not at all; what it held stays under the name ``previous``, if one
    is given.

    Raises UserError when there is no room, or no way to write there."""
    try:
        # a run folder that was moved away must not lose the run
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, functools.partial(torch.save, saved), previous=previous)
    # torch makes a RuntimeError of its own out of a full disk
    except (OSError, RuntimeError) as error:
        cause = error
        while not isinstance(cause, OSError) and cause.__context__:
            cause = cause.__context__
        reason = (
            cause.strerror
            if isinstance(cause, OSError) and cause.strerror
            else str(error).splitlines()[0]
        )
        raise UserError(
            f"{path} could not be written: {reason}. What was saved before is untouched: make room there, "
            f"then --resume {quoted(path.parent)}"
        ) from error


def save_checkpoint(run_dir: Path, saved: dict) -> None:
    """The new last.pt; the one before stays as last.prev.pt."""
    save_file(run_dir / CHECKPOINT_NAME, saved, previous=run_dir / PREVIOUS_NAME)


def read_last(run_dir: Path) -> dict | None:
    """The newest checkpoint of a run that can be read; None when there is none yet. Says when it is
    the one before."""
    last, previous = run_dir / CHECKPOINT_NAME, run_dir / PREVIOUS_NAME
    if not last.exists() and not previous.exists():
        return None
    try:
        return check_own(run_dir, last, read_checkpoint(last))
    except UserError as error:
        if not previous.exists():
            raise
        saved = check_own(run_dir, previous, read_checkpoint(previous))
        print(f"{error}\nGoing on from the checkpoint before it, {previous}.")
        return saved


def prepare_to_write(run_dir: Path, config: dict) -> None:
    """Before a resumed run with these settings writes: what has a name of ours and is not this
    run's would go with the next save, so it gets another name; of a last.pt that cannot be used,
    the one before takes the place. What a killed process left half-written is removed."""

    def is_ours(path: Path) -> bool:
        try:
            return not differences(read_checkpoint(path)["config"], config)
        except UserError:
            return False

    last, previous, best = (run_dir / name for name in (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME))
    for path in (last, previous, best) if config["val_fraction"] else (last, previous):
        if os.path.lexists(path) and not is_ours(path):
            set_aside(path, "is damaged, or not this run's")
    if previous.exists() and not last.exists():  # else the first save would have none to keep
        os.replace(previous, last)
    if os.path.lexists(run_dir / "config.json"):
        try:
            read_settings(run_dir)
        # FileNotFoundError: a link that leads nowhere
        except (FileNotFoundError, IsADirectoryError, ValueError):
            set_aside(run_dir / "config.json", "is damaged, or not this run's")
    remove_leftovers(run_dir, age=0)


def check_own(run_dir: Path, path: Path, saved: dict) -> dict:
    """The saved, unless the settings in config.json say that it is another run's: then a
    UserError."""
    try:
        settings = upgrade_config(read_settings(run_dir))
    except (OSError, ValueError):  # lost or damaged: the checkpoint holds all of it
        return saved
    for name in differences(saved["config"], settings):
        raise UserError(
            f"{path} belongs to another run: {name} is {saved['config'][name]} in it, and {settings[name]} in "
            f"{run_dir / 'config.json'}"
        )
    return saved


def differences(config: dict, settings: dict) -> list[str]:
    """The settings that one run has in two ways. Values as JSON has them, which a config.json went
    through."""
    return [
        name
        for name in sorted((config.keys() & settings.keys()) - set(MAY_CHANGE))
        if json.loads(json.dumps(config[name])) != json.loads(json.dumps(settings[name]))
    ]


def newest_unfinished(runs: Path) -> Path:
    """The run of ``runs`` that was written to last, has not finished and is not being trained;
    sanity passes do not count. Raises UserError."""
    found = []
    for config_path in runs.glob("*/config.json"):
        with contextlib.suppress(OSError, ValueError):
            read_settings(config_path.parent)  # anybody may have a config.json
            config = read_config(config_path.parent)
            if not config.get("sanity") and not config.get("finished"):
                found.append(
                    (
                        max(p.lstat().st_mtime for p in config_path.parent.iterdir()),
                        config_path.parent,
                    )
                )
    for _, run_dir in sorted(found, reverse=True):
        with contextlib.suppress(UserError), lock(run_dir):
            return run_dir
    which = (
        f"every unfinished run in {runs} is being trained"
        if found
        else f"there is no unfinished run in {runs}"
    )
    raise UserError(f"--resume: {which}; name the run's folder", 2)


def write_config(run_dir: Path, record: dict) -> None:
    text = json.dumps(record, indent=2) + "\n"
    replace_file(run_dir / "config.json", lambda file: file.write(text.encode()))


def read_config(run_dir: Path) -> dict:
    return json.loads((run_dir / "config.json").read_text("utf-8-sig"))


def read_settings(run_dir: Path) -> dict:
    """The settings in a run's config.json. Raises OSError, or ValueError for any other file of that
    name."""
    try:
        settings = read_config(run_dir)["config"]
        if all(isinstance(settings[name], str) for name in ("model", "recipe", "dataset")):
            return settings
    except (KeyError, TypeError, IndexError):
        pass
    raise ValueError("it is not what a run writes")


def earlier_commands(run_dir: Path) -> list[str]:
    """The command lines that this run was started and resumed by so far."""
    try:
        return list(read_config(run_dir)["commands"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


# ---- folders ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(candidates: Iterator[Path]) -> Iterator[Path]:
    """The folder of a new run, made and locked: the first of ``candidates`` that is not there yet,
    or the last of them. At its end it goes again, with the parents that were made for it, if
    nothing came into it.

    Raises UserError for a folder that holds what a run would write."""
    with contextlib.ExitStack() as stack:
        for run_dir in candidates:
            made = make_folders(run_dir)
            if run_dir in made:
                break
        stack.enter_context(lock(run_dir))
        # before the lock is given up: nobody else's folder, and nobody in it
        stack.callback(remove_made, made)
        check_new(run_dir)
        yield run_dir


def check_new(run_dir: Path) -> None:
    """Raises UserError where a new run in this folder would write over something, or mix its curves
    with others."""
    found = [name for name in RUN_FILES if os.path.lexists(run_dir / name)]
    found += sorted(path.name for path in run_dir.iterdir() if "tfevents" in path.name)
    if "config.json" in found or CHECKPOINT_NAME in found:
        raise UserError(
            f"{run_dir} holds a run already: go on with it by --resume {quoted(run_dir)}, or name another "
            f"--run-dir",
            2,
        )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{run_dir} holds {', '.join(found[:3])}{more}, which a run writes too: name another --run-dir, or "
            f"move them away",
            2,
        )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """One process a run directory. The lock is on the folder itself and ends with the process,
    however it ends."""
    in_use = UserError(f"{run_dir} is in use by another process: wait for it, or stop it first")
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there the check for an existing run is all there is
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
            raise in_use  # it had made the folder, and has just taken it away again
        yield
    finally:
        os.close(descriptor)


# ---- random states ------------------------------------------------------------------------------


def random_states() -> dict:
    """torch's (dropout, initialisation), each GPU's and Python's; the order and augmentation need
    none."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if (
        "cuda" in states
        and torch.cuda.is_available()
        and len(states["cuda"]) == torch.cuda.device_count()
    ):
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


# ---- networks from checkpoints ------------------------------------------------------------------
