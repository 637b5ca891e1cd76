"""Read checkpoints: verified, never executed.

A checkpoint is one plain dict (see Run.checkpoint_dict) that ``torch.load(weights_only=True)``
reads.
"""

from __future__ import annotations

import errno
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from attention_model import Network, build_model, scaled
from common.errors import UserError
from common.file_kinds import kind_of

CHECKPOINT_NAME, PREVIOUS_NAME = "last.pt", "last.prev.pt"
FORMAT = 2

# Options that configs of format 1 lack, with the values that reproduce its behavior.
SINCE_FORMAT_2 = {"zoom": 0.0, "jitter": 0.0, "transfer_lr": 1.0, "freeze_epochs": 0.0}
# The same for options that early runs of format 2 lack.
ADDED_TO_FORMAT_2 = {
    "muon": 0.0,
    "ema_share": 1.0,
    "progressive_from": 0,
    "trivial_augment": False,
    "lr_by_width": 0.0,
}
# Errors that say nothing about the content of a file: permissions, disks and networks in trouble.
UNRELATED_TO_CONTENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
}


# ---- read ---------------------------------------------------------------------------------------


def read_checkpoint(path: Path | str) -> dict:
    """Load a checkpoint of this project, checksums verified, config upgraded. Code in it never
    runs. Raises UserError for any other file, and OSError as ``read_plain`` does."""
    path = Path(path)
    kind = kind_of(path)
    if kind:
        raise UserError(
            f"{path} is {kind.name}, not a checkpoint of this project: name the last.pt of a run"
        )
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
            f"{path} is not a checkpoint of this project: "
            f"its {', '.join(wrong)} is not what it should be"
        )
    return saved | {"config": upgrade_config(saved["config"])}


def read_plain(path: Path | str, verify: bool = False, otherwise: str = "") -> object:
    """Load a file with weights_only=True: plain values and tensors, no code.

    ``verify`` checks the checksums, which torch.load does not; files of other programs may lack
    them. ``otherwise``: the last words of the message about a file with code, what to do instead.
    Raises UserError, or OSError if the disk or the file's permissions are the cause.
    """
    path = Path(path)
    try:
        if verify:
            _verify_archive(path)
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
            f"{path} is refused: it holds more than plain numbers and tensors, "
            f"and reading it could run code{otherwise}"
        ) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        TypeError,
        AssertionError,
        struct.error,
        MemoryError,  # a damaged length
    ) as error:
        if isinstance(error, OSError) and error.errno in UNRELATED_TO_CONTENT:
            raise OSError(error.errno, error.strerror, str(path)) from None
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{path} could not be read: {reason}") from None


def _verify_archive(path: Path) -> None:
    """Check the checksums of a file that torch.save wrote. Raises UserError."""
    with zipfile.ZipFile(path) as archive:
        # torch compresses nothing: compressed content was made to exhaust the memory
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise UserError(f"{path} is refused: PyTorch does not write compressed files")
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong. Use another file")


def upgrade_config(config: dict) -> dict:
    """The config of a run, completed with the options that its version did not have."""
    init_from = config.get("init_from") or "none"
    return SINCE_FORMAT_2 | ADDED_TO_FORMAT_2 | config | {"init_from": init_from}


# ---- networks -----------------------------------------------------------------------------------


def load_model(saved: dict) -> Network:
    """The trained network of a checkpoint, in evaluation mode on the CPU. Raises UserError."""
    config, state = saved["config"], inference_weights(saved)
    num_classes = len(saved["class_names"])
    mismatch = "names or shapes of the weights differ"
    try:
        # checked before anything is built as wide as the config claims
        first = state.get("trunk.block1.0.conv.weight")
        if first is None or len(first) != scaled(64, config["width"]):
            raise ValueError(mismatch)
        with torch.device("meta"):  # takes no memory
            fresh = build_from_config(config, num_classes).state_dict()
        if _shapes(fresh) != _shapes(state):
            raise ValueError(mismatch)
        model = build_from_config(config, num_classes)
        model.load_state_dict(state)
    except (UserError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint does not hold the network that its settings describe: {reason}"
        ) from None
    return model.eval()


def inference_weights(saved: dict) -> dict[str, torch.Tensor]:
    """The weights to use: the moving average with its batch-norm buffers if there is one."""
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


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


# ---- what a checkpoint holds --------------------------------------------------------------------


def is_number_list(value: object, count: int, above: float, below: float) -> bool:
    """Whether this is a list of ``count`` numbers between the two bounds."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(isinstance(number, (int, float)) and above < number < below for number in value)
    )


def is_state_dict(value: object) -> bool:
    """Whether this is a state dict whose tensors are backed by as many bytes as their shapes claim.
    (A crafted one can repeat a single number without end.)"""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and torch.is_tensor(tensor)
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        for name, tensor in value.items()
    )


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
# Checks of the values that every reader uses: an undamaged file can still hold anything.
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
