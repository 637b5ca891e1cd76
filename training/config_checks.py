"""Checks of a config, before a folder is made or an image read. Each raises UserError."""

from __future__ import annotations

import torch

from attention_model import scaled
from common.checkpoint import build_from_config, read_checkpoint
from common.device import choose_device, choose_precision
from common.errors import UserError
from training.memory import check_memory
from training.ranks import Ranks
from training.schedules import SCHEDULES, parse_progressive

CHOICES = {"schedule": SCHEDULES}
CROPS = {"cub": ("box", "whole"), "folder": ("center", "whole")}  # by data set
UPPER_LIMITS = {  # exclusive
    "momentum": 1,
    "label_smoothing": 1,
    "ema_decay": 1,
    "warmup": 1,
    "crop_pad": 16,
    "zoom": 1,
    "jitter": 1,
    "cutout": 4096,
    "test_share": 1,
    "pool4": 4096,
}


def check_batch(config: dict, ranks: Ranks) -> None:
    """Whether the batch is large enough for every rank."""
    if config["batch_size"] < 2 * ranks.world_size:
        raise UserError(
            f"--batch-size {config['batch_size']} is too small for {ranks.world_size} ranks: "
            f"2 images each are the least",
            2,
        )


def check_recipe(config: dict) -> None:
    """The values of a recipe, and whether this machine can run it."""
    device = choose_device(config["device"])
    choose_precision(config["precision"], device)
    with torch.device("meta"):
        check_memory(build_from_config(config, num_classes=2), config, device)
    try:
        parse_progressive(config["progressive"])
    except ValueError as error:
        raise UserError(f"--set progressive: {error}", 2) from None
    choices = CHOICES | {"crop": CROPS.get(config["dataset"], ())}
    for name in choices.keys() & config.keys():
        if config[name] not in choices[name]:
            raise UserError(f"--set {name}={config[name]}: choose {' or '.join(choices[name])}", 2)
    if config.get("test_share") == 0:
        raise UserError("--set test_share=0: expected a share above 0", 2)
    for name, limit in UPPER_LIMITS.items():
        if config.get(name, 0) >= limit:
            raise UserError(f"--set {name}={config[name]}: expected a number below {limit}", 2)
    if config["nesterov"] and not config["momentum"]:
        raise UserError("--set momentum=0: Nesterov needs a momentum; add --set nesterov=false", 2)
    if config["halve_every"] < 1:
        raise UserError("--set halve_every=0: expected 1 epoch or more", 2)
    if config["freeze_epochs"] >= config["epochs"]:
        raise UserError(
            f"--freeze-epochs {config['freeze_epochs']:g}: fewer than the {config['epochs']} "
            f"epochs of the run are needed, or the trunk would never train",
            2,
        )


def check_start(config: dict) -> None:
    """--init-from of a new run, before an image is read."""
    if config["data_dir"] is None and not config["sample"]:
        raise UserError(
            "--data-dir FOLDER is needed: your class folders, FOLDER/<class>/*, or "
            "FOLDER/train/<class>/* and FOLDER/test/<class>/*. (--sample trains without)",
            2,
        )
    if not config["init_from"]:
        raise UserError(
            "this recipe starts from a CIFAR-100 network, which train_cifar100.py trains: "
            "give --init-from RUN_DIR/last.pt. Else --init-from imagenet (--set trunk=pooled), "
            "or --init-from none",
            2,
        )
    if config["init_from"] == "none" and config["freeze_epochs"]:
        raise UserError(
            "--freeze-epochs keeps a transferred trunk as it is, and --init-from none transfers "
            "none: leave one of them out",
            2,
        )
    if config["init_from"] == "imagenet" and scaled(64, config["width"]) != 64:
        raise UserError(
            f"ImageNet weights fit --width 1, not {config['width']:g}: give --init-from none, "
            f"or a checkpoint of that width",
            2,
        )
    if config["init_from"] not in ("none", "imagenet"):
        read_checkpoint(config["init_from"])
