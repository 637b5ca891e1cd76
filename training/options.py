"""The command line that both scripts share, and what it resolves to: one flat dict of plain values,
the run's config.

The config is saved in config.json and in every checkpoint. A default stands in one place only: the
dicts at the top of the script, or the constants below for what is no part of a recipe.
"""

from __future__ import annotations

import argparse

from attention_model import MODEL_NAMES
from common.arguments import (
    MAX_DIGITS,
    MAX_WORKERS,
    HelpFormatter,
    at_least_0,
    auto_or_whole,
    expanded_path,
    fraction,
    int_at_least,
    positive,
    was_given,
)
from common.errors import UserError

NEWEST = True  # what a bare --resume gives
SHORT_RUN = 10  # epochs; below, a recipe's changes for short runs hold

# Options with a command-line word of their own whose value is part of the recipe.
RECIPE_OPTIONS = ("epochs", "batch_size", "lr", "image_size", "init_from", "freeze_epochs")
# What a resumed run may change: where and how it runs, and how long. All else decides the
# mathematics.
MAY_CHANGE = (
    "data_dir",
    "device",
    "num_workers",
    "compile",
    "micro_batch",
    "checkpoint_activations",
    "overlay_every",
    "epochs",
)


def make_parser(
    description: str, recipes: dict[str, dict], *, model: str, dataset: str
) -> argparse.ArgumentParser:
    """The options of both scripts. None as a default means: from the recipe, or from the checkpoint
    on resume."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    quiet = argparse.SUPPRESS  # not in the result unless it was given
    where = parser.add_argument_group("what and where")
    where.add_argument(
        "--data-dir",
        type=expanded_path,
        default="data",
        help="folder that holds (or will hold) the data set",
    )
    where.add_argument(
        "--run-dir",
        type=expanded_path,
        default=quiet,
        help=f"folder of this run (default: runs/{dataset}/<time>-<model>)",
    )
    where.add_argument(
        "--sample", action="store_true", default=quiet, help="train on the small built-in sample"
    )
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    where.add_argument(
        "--num-workers",
        type=int_at_least(0, MAX_WORKERS),
        default=2,
        help="processes that decode images into the cache; 0: the main process",
    )

    what = parser.add_argument_group(
        "the run (part of its mathematics: fixed when a run is resumed)"
    )
    what.add_argument(
        "--recipe",
        choices=sorted(recipes),
        default=quiet,
        help=f"settings to start from (default: {next(iter(recipes))})",
    )
    what.add_argument(
        "--model",
        choices=MODEL_NAMES,
        metavar="NAME",
        default=quiet,
        help=f"network: {', '.join(MODEL_NAMES)} (default: {model})",
    )
    what.add_argument(
        "--width", type=positive(16), default=quiet, help="factor on all channels (default: 1.0)"
    )
    what.add_argument(
        "--image-size",
        type=int_at_least(16, 4096),
        default=quiet,
        help="side in pixels (default: the recipe's)",
    )
    what.add_argument(
        "--epochs", type=int_at_least(1, 10**6), default=quiet, help="(default: the recipe's)"
    )
    what.add_argument(
        "--batch-size",
        type=int_at_least(2, 10**6),
        default=quiet,
        help="images an optimizer step (default: the recipe's)",
    )
    what.add_argument(
        "--lr",
        type=positive(1e6),
        default=quiet,
        help="peak learning rate, with lr_by_width that of full width (default: the recipe's)",
    )
    what.add_argument(
        "--seed",
        type=int_at_least(0, 2**63 - 1),
        default=quiet,
        help="of weights, order, augmentation, dropout (default: 0)",
    )
    what.add_argument(
        "--val-fraction",
        type=fraction,
        default=quiet,
        help="part of the training images held out; they are evaluated instead of the test set, "
        "and best.pt is kept (default: 0)",
    )
    what.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default=quiet,
        help="(default: auto: bf16 where it is native, else fp16 on a GPU, fp32 on a CPU)",
    )
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a constant of the recipe; may be repeated; names: "
        + ", ".join(name for name in next(iter(recipes.values())) if name not in RECIPE_OPTIONS),
    )
    what.add_argument(
        "--init-from",
        type=expanded_path,
        metavar="{imagenet,none,CHECKPOINT}",
        default=quiet,
        help="weights to start from: torchvision's vgg16_bn, none, or a last.pt (default: the recipe's)",
    )
    what.add_argument(
        "--freeze-epochs",
        type=at_least_0,
        default=quiet,
        metavar="N",
        help="train head and gates alone, on the transferred trunk as it is, for so many epochs "
        "(default: the recipe's)",
    )

    how = parser.add_argument_group("speed and memory")
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=quiet,
        help="torch.compile (default: on GPUs of compute capability 7.0 or more)",
    )
    how.add_argument(
        "--micro-batch",
        type=auto_or_whole,
        default="auto",
        metavar="{auto,N}",
        help="images in memory at once; gradients accumulate to the batch. auto: the batch, halved on "
        "out-of-memory",
    )
    how.add_argument(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute activations twice, store fewer",
    )

    modes = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    modes.add_argument(
        "--sanity",
        action="store_true",
        help="one short epoch through every path of a real run, in a minute or two",
    )
    modes.add_argument(
        "--resume",
        nargs="?",
        type=expanded_path,
        const=NEWEST,
        metavar="RUN_DIR",
        help="go on with a run; no folder: the newest unfinished one",
    )
    modes.add_argument(
        "--evaluate",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="loss, top-1, top-5 and each class of a checkpoint",
    )
    modes.add_argument(
        "--benchmark",
        nargs="?",
        const=25,
        type=int_at_least(1, 10**5),
        metavar="STEPS",
        help="speed of the training step, its parts, and of the plain way to write it",
    )
    parser.add_argument(
        "--json",
        type=expanded_path,
        metavar="FILE",
        help="write what --benchmark measures to this file too",
    )
    parser.add_argument(
        "--overlay-every",
        type=int_at_least(0),
        default=1,
        metavar="EPOCHS",
        help="attention pictures every so many epochs; 0: none",
    )
    return parser


# ---- types of options, for argparse -------------------------------------------------------------


def resolve(
    args: argparse.Namespace,
    recipes: dict[str, dict],
    short: dict[str, dict],
    *,
    model: str,
    dataset: str,
) -> dict:
    """A new run's config: the recipe (with what it changes for a short run), then --set and the
    options on top.

    Raises UserError for a wrong --set."""
    given = vars(args)
    recipe = given.get("recipe", next(iter(recipes)))
    base = dict(recipes[recipe])
    if given.get("epochs", base["epochs"]) < SHORT_RUN:
        base |= short.get(recipe, {})
    config = {
        "dataset": dataset,
        "recipe": recipe,
        "model": model,
        "width": 1.0,
        "seed": 0,
        "val_fraction": 0.0,
        "image_size": None,
        "precision": "auto",
        "sample": False,
    }
    changes = parse_set(args.set, base)
    if changes.get("momentum") == 0:
        changes.setdefault("nesterov", False)  # which has no meaning without one
    config |= base | changes
    config |= {name: given[name] for name in config if name in given}
    config |= {
        name: given[name]
        for name in (
            "data_dir",
            "device",
            "num_workers",
            "micro_batch",
            "checkpoint_activations",
            "overlay_every",
        )
    }
    config["compile"] = given.get("compile", "auto")
    # none where there is nothing to keep as it is, and no more than a quarter of a run
    if "freeze_epochs" not in given:
        config["freeze_epochs"] *= config["init_from"] != "none"
        config["freeze_epochs"] = min(config["freeze_epochs"], config["epochs"] / 4)
    return config


def parse_set(pairs: list[str], recipe: dict) -> dict:
    """["momentum=0.8"] -> {"momentum": 0.8}, each checked against the recipe's value of that name."""
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in recipe:
            raise UserError(
                f"--set {pair}: expected NAME=VALUE with a NAME of {', '.join(recipe)}", 2
            )
        if name in RECIPE_OPTIONS:
            raise UserError(f"--set {pair}: use --{name.replace('_', '-')} {text} for this one", 2)
        changes[name] = same_type(pair, text.strip(), recipe[name])
    return changes


def same_type(pair: str, text: str, default: object) -> object:
    """The text as a value of the default's type."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {pair}: expected true or false", 2)
        return text.lower() == "true"
    try:
        if not isinstance(default, str) and len(text) > MAX_DIGITS:
            raise ValueError
        value = type(default)(text)
    except ValueError:
        what = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(
            f"--set {pair[: 2 * MAX_DIGITS]}: expected {what}, as in the default {default}", 2
        ) from None
    if (
        isinstance(value, float)
        and not 0 <= value < float("inf")
        or isinstance(value, int)
        and value < 0
    ):
        raise UserError(f"--set {pair}: expected a finite number, 0 or more", 2)
    return value


def resumed(
    config: dict, args: argparse.Namespace, recipes: dict[str, dict], argv: list[str]
) -> dict:
    """The config of a checkpoint with what the command line may change on top.

    Raises UserError when an option that was given contradicts the run."""
    given = vars(args)
    asked = {name: given[name] for name in given if name in config and was_given(name, argv)}
    asked |= parse_set(args.set, recipes[config["recipe"]])
    for name, value in asked.items():
        if (
            name not in MAY_CHANGE
            and value != config[name]
            and (name, value) != ("precision", "auto")
        ):
            raise UserError(
                f"this run has --{name.replace('_', '-')} {config[name]}, and {value} would make it another "
                f"run: leave the option out, or start a new run",
                2,
            )
    return config | {name: value for name, value in asked.items() if name in MAY_CHANGE}
