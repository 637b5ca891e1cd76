"""Read checkpoints: verified, never executed.

A checkpoint is one plain dict (see Run.checkpoint_dict) that ``torch.load(weights_only=True)``
reads."""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path

import torch

from attention_model import Network, build_model, scaled
from common.errors import UserError

CHECKPOINT_NAME, PREVIOUS_NAME = "last.pt", "last.prev.pt"
FORMAT = 2


# What a config of format 1 did not have, with the values that mean what its code did.
SINCE_FORMAT_2 = {"zoom": 0.0, "jitter": 0.0, "transfer_lr": 1.0, "freeze_epochs": 0.0}


# The same for early runs of format 2.
LATER = {
    "muon": 0.0,
    "ema_share": 1.0,
    "progressive_from": 0,
    "trivial_augment": False,
    "lr_by_width": 0.0,
}


REQUIRED = (
    "format",
    "model",
    "ema",
    "config",
    "class_names",
    "input_size",
    "mean",
    "std",
    "position",
)


def is_number_list(value: object, count: int, above: float, below: float) -> bool:
    """Is this a list of so many numbers between the two?"""
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(isinstance(number, (int, float)) and above < number < below for number in value)
    )


def is_state_dict(value: object) -> bool:
    """Is this a state dict, whose tensors hold as many numbers as they say? (A crafted one repeats
    a number for ever.)"""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and torch.is_tensor(tensor)
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        for name, tensor in value.items()
    )


# What the values that every reader uses look like; a file can be whole and still hold anything.
EXPECTED = {
    "model": is_state_dict,
    "ema": lambda value: value is None or is_state_dict(value),
    "config": lambda value: isinstance(value, dict) and isinstance(value.get("model"), str),
    "class_names": lambda value: (
        isinstance(value, (list, tuple)) and value and all(isinstance(n, str) for n in value)
    ),
    "input_size": lambda value: is_number_list(value, 2, 0, 10_000),
    "mean": lambda value: is_number_list(value, 3, -100, 100),
    "std": lambda value: is_number_list(value, 3, 0, 100),
}


# Errors that say nothing about what the file holds: rights, and disks and networks in trouble.
PASSING = {
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
}


def read_plain(path: Path | str, verify: bool = False) -> object:
    """Load a file with weights_only=True: plain values and tensors, no code.

    ``verify`` checks the checksums, which torch.load does not (and files of other programs may have
    none). Raises UserError, or OSError where a disk or the file's permissions are in the way."""
    path = Path(path)
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                # torch compresses nothing: what is compressed was made to grow in memory
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise UserError(f"{path} is refused: PyTorch does not write compressed files")
                damaged = archive.testzip()
            if damaged:
                raise UserError(
                    f"{path} is damaged: the checksum of {damaged} is wrong. Use another file"
                )
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder; name the checkpoint in it, {path / CHECKPOINT_NAME}"
        ) from None
    except (zipfile.BadZipFile, EOFError):
        raise UserError(f"{path} is no checkpoint: not a PyTorch file, or cut short") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it holds more than plain numbers and tensors, and reading it could run "
            f"code"
        ) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        NotImplementedError,
    ) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise UserError(
            f"{path} could not be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def read_checkpoint(path: Path | str) -> dict:
    """A checkpoint of ours, its checksums verified. Raises UserError for anything else; code in it
    never runs."""
    path = Path(path)
    saved = read_plain(path, verify=True)
    missing = [name for name in REQUIRED if not isinstance(saved, dict) or name not in saved]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project: it has no {', '.join(missing)}"
        )
    if saved["format"] == 1 and isinstance(saved["config"], dict):
        saved |= {"format": 2, "transferred": []}
    if saved["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {saved['format']}, and this code reads format {FORMAT}"
        )
    wrong = [name for name, is_right in EXPECTED.items() if not is_right(saved[name])]
    if wrong:
        raise UserError(
            f"{path} is not a checkpoint of this project: its {', '.join(wrong)} is not what it should be"
        )
    return saved | {"config": upgrade_config(saved["config"])}


def upgrade_config(config: dict) -> dict:
    """A run's config with what its format or its version did not have yet."""
    return SINCE_FORMAT_2 | LATER | config | {"init_from": config.get("init_from") or "none"}


def inference_weights(saved: dict) -> dict:
    """The weights to use: the moving average with its batch-norm buffers where there is one."""
    return saved["ema"] or saved["model"]


def build_from_config(config: dict, num_classes: int) -> Network:
    """The network of a config, with fresh weights. Raises UserError."""
    try:
        return build_model(
            config["model"],
            num_classes,
            width=config["width"],
            trunk=config["trunk"] or None,
            dropout=config["dropout"],
            pool4=config["pool4"],
        )
    except ValueError as error:
        raise UserError(str(error), 2) from None


def load_model(saved: dict) -> Network:
    """The trained network, in evaluation mode on the CPU, from a checkpoint alone. Raises
    UserError."""
    config, state, num_classes = (
        saved["config"],
        inference_weights(saved),
        len(saved["class_names"]),
    )
    try:
        # looked at before anything is built as wide as the settings claim
        first = state.get("trunk.block1.0.conv.weight")
        if first is None or len(first) != scaled(64, config["width"]):
            raise ValueError("names or shapes of the weights differ")
        with torch.device("meta"):  # takes no memory
            expected = {
                name: tensor.shape
                for name, tensor in build_from_config(config, num_classes).state_dict().items()
            }
        if expected != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("names or shapes of the weights differ")
        model = build_from_config(config, num_classes)
        model.load_state_dict(state)
    except (UserError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint does not hold the network that its settings describe: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return model.eval()
