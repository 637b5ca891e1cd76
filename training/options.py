"""The command line of the training scripts, and what it resolves to: the run's config, one flat
dict of plain values.

The config is saved in config.json and in every checkpoint. A default is in one place only: in the
recipe at the top of the script, or below for what is not part of a recipe.
"""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING

from attention_model import MODEL_NAMES
from common.arguments import (
    MAX_DIGITS,
    MAX_WORKERS,
    ArgumentParser,
    as_option,
    at_least_0,
    auto_or_whole,
    did_you_mean,
    expanded_path,
    fraction,
    int_at_least,
    nearest,
    one_of,
    positive,
    was_given,
)
from common.errors import UserError
from training.attacks import ATTACKS, MAX_STRENGTH
from training.recipe_help import constants_table, in_recipes

if TYPE_CHECKING:
    from training.task import Task

NEWEST = True  # the value of a bare --resume
SHORT_RUN = 10  # epochs; a recipe's changes for short runs apply below this

# Recipe values with an option of their own; the others are changed by --set.
RECIPE_OPTIONS = (
    "epochs",
    "batch_size",
    "lr",
    "image_size",
    "init_from",
    "freeze_epochs",
    "skip_unreadable",
)
# What a resumed run may change: where and how it runs, and how long. All else is its mathematics.
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


# Options of no recipe, whose default is below.
ALWAYS_GIVEN = (
    "data_dir",
    "device",
    "num_workers",
    "micro_batch",
    "checkpoint_activations",
    "overlay_every",
)
# Options that go with one other alone.
COMPANIONS = {
    "out": "evaluate",
    "sort": "evaluate",
    "export": "evaluate",
    "attack": "evaluate",
    "attack_images": "attack",
    "keep": "sanity",
    "json": "benchmark",
}
UNLESS_GIVEN = argparse.SUPPRESS  # as a default: not in the result unless it was given
# The other settings with an option of their own. (Not every recipe has an image size.)
WITH_OPTION = (
    *ALWAYS_GIVEN,
    "image_size",
    "recipe",
    "model",
    "width",
    "seed",
    "val_fraction",
    "precision",
    "sample",
    "compile",
)


def make_parser(task: Task) -> ArgumentParser:
    """The options of a training script."""
    recipes = task.recipes
    constants = constants_of(recipes)
    instead = {name: f"--set {name}=VALUE" for name in constants}
    instead |= {"learning-rate": "--lr", "checkpoint": "--evaluate, --resume or --init-from"}
    parser = ArgumentParser(description=task.description, epilog=examples(task), instead=instead)
    add_places(parser, task)
    add_mathematics(parser, recipes, task.model)
    add_speed(parser)
    add_modes(parser)
    add_companions(parser)
    parser.add_argument(
        "--overlay-every",
        type=int_at_least(0),
        default=1,
        metavar="EPOCHS",
        help="epochs between attention pictures; 0: none, and no summary.png at the end",
    )
    parser.add_argument_group(
        "constants of the recipe (--set NAME=VALUE)",
        constants_table(
            constants,
            recipes,
            task.short,
            below=SHORT_RUN,
            width=shutil.get_terminal_size().columns - 2,
        ),
    )
    return parser


def add_places(parser: argparse.ArgumentParser, task: Task) -> None:
    """Data, run folder and device."""
    first = task.sample[next(iter(task.recipes))]
    size = " ".join(f"{as_option(name)} {value}" for name, value in first.items())
    group = parser.add_argument_group("what and where")
    group.add_argument(
        "--data-dir",
        type=expanded_path,
        default=task.data.default_dir,
        help="folder of your class folders, or of train/ and test/ with class folders"
        if task.data.is_own
        else "folder that holds (or will hold) the data set",
    )
    group.add_argument(
        "--run-dir",
        type=expanded_path,
        default=UNLESS_GIVEN,
        help=f"folder of this run (default: {task.runs}/<time>-<model>)",
    )
    group.add_argument(
        "--sample",
        action="store_true",
        default=UNLESS_GIVEN,
        help=f"train on the small built-in sample, a run with {size} unless these are given",
    )
    if any("skip_unreadable" in recipe for recipe in task.recipes.values()):
        group.add_argument(
            "--skip-unreadable",
            action="store_true",
            default=UNLESS_GIVEN,
            help="leave out images that cannot be read, and list them, instead of an error",
        )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    group.add_argument(
        "--num-workers",
        type=int_at_least(0, MAX_WORKERS),
        default=2,
        help="processes that decode images into the cache; 0: the main process",
    )


def add_mathematics(parser: argparse.ArgumentParser, recipes: dict[str, dict], model: str) -> None:
    """The options that decide a run's mathematics. Their defaults are the recipe's, or the
    checkpoint's on resume."""
    group = parser.add_argument_group(
        "the run (part of its mathematics: fixed when a run is resumed)"
    )
    group.add_argument(
        "--recipe",
        **one_of(recipes),
        default=UNLESS_GIVEN,
        help=f"settings to start from (default: {next(iter(recipes))})",
    )
    group.add_argument(
        "--model",
        **one_of(MODEL_NAMES),
        metavar="NAME",
        default=UNLESS_GIVEN,
        help=f"network: {', '.join(MODEL_NAMES)} (default: {model})",
    )
    group.add_argument(
        "--width",
        type=positive(16),
        default=UNLESS_GIVEN,
        help="factor on all channels (default: 1.0)",
    )
    group.add_argument(
        "--image-size",
        type=int_at_least(16, 4096),
        default=UNLESS_GIVEN,
        help=f"side to which images are resized, in pixels {in_recipes(recipes, 'image_size')}",
    )
    group.add_argument(
        "--epochs",
        type=int_at_least(1, 10**6),
        default=UNLESS_GIVEN,
        help=f"epochs to train {in_recipes(recipes, 'epochs')}",
    )
    group.add_argument(
        "--batch-size",
        type=int_at_least(2, 10**6),
        default=UNLESS_GIVEN,
        help=f"images per optimizer step {in_recipes(recipes, 'batch_size')}",
    )
    group.add_argument(
        "--lr",
        type=positive(1e6),
        default=UNLESS_GIVEN,
        help="peak learning rate, at full width, of all weights but the 3x3 filters that Muon "
        f"moves; see muon and lr_by_width below {in_recipes(recipes, 'lr')}",
    )
    group.add_argument(
        "--seed",
        type=int_at_least(0, 2**63 - 1),
        default=UNLESS_GIVEN,
        help="of weights, order, augmentation, dropout (default: 0)",
    )
    group.add_argument(
        "--val-fraction",
        type=fraction,
        default=UNLESS_GIVEN,
        help="part of the training images held out; they are evaluated instead of the test set, "
        "and best.pt is kept (default: 0)",
    )
    group.add_argument(
        "--precision",
        **one_of(("auto", "bf16", "fp16", "fp32")),
        default=UNLESS_GIVEN,
        help="auto: bf16 where it is native, else fp16 on a GPU, fp32 on a CPU (default: auto)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a constant of the recipe, see below; may be repeated",
    )
    group.add_argument(
        "--init-from",
        type=expanded_path,
        metavar="{imagenet,none,CHECKPOINT}",
        default=UNLESS_GIVEN,
        help="weights to start from: torchvision's vgg16_bn, none, or a last.pt "
        f"{in_recipes(recipes, 'init_from')}",
    )
    group.add_argument(
        "--freeze-epochs",
        type=at_least_0,
        default=UNLESS_GIVEN,
        metavar="N",
        help="first epochs in which only head and gates train, on the frozen transferred trunk; "
        f"by default at most a quarter of the run {in_recipes(recipes, 'freeze_epochs')}",
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    """Compilation and memory."""
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=UNLESS_GIVEN,
        help="torch.compile (default: on GPUs of compute capability 7.0 or more)",
    )
    group.add_argument(
        "--micro-batch",
        type=auto_or_whole,
        default="auto",
        metavar="{auto,N}",
        help="images in memory at once; gradients accumulate to the batch. auto: the batch, "
        "halved on out-of-memory",
    )
    group.add_argument(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute activations twice, store fewer",
    )


def add_modes(parser: argparse.ArgumentParser) -> None:
    """What a script does instead of a new run."""
    group = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    group.add_argument(
        "--sanity",
        action="store_true",
        help="one short epoch through every path of a real run, in about a minute",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        type=expanded_path,
        const=NEWEST,
        metavar="RUN_DIR",
        help="resume a run (default: the newest unfinished)",
    )
    group.add_argument(
        "--evaluate",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="loss, top-1, top-5, each class, each image and the mistakes of a checkpoint, also as "
        "files and pictures",
    )
    group.add_argument(
        "--compare",
        nargs="+",
        type=expanded_path,
        metavar="RUN",
        help="what differs between two or more runs (their folders), and their last epochs, best "
        "first",
    )
    group.add_argument(
        "--benchmark",
        nargs="?",
        const=25,
        type=int_at_least(1, 10**5),
        metavar="STEPS",
        help="speed of the training step, its parts, and of the plain way to write it",
    )


def add_companions(parser: argparse.ArgumentParser) -> None:
    """Options that go with one mode alone (see ``check_companions``)."""
    group = parser.add_argument_group("only with one of the above")
    group.add_argument(
        "--out",
        type=expanded_path,
        default=UNLESS_GIVEN,
        metavar="FOLDER",
        help="where --evaluate writes its files (default: beside the checkpoint)",
    )
    group.add_argument(
        "--sort",
        **one_of(("accuracy", "name")),
        default=UNLESS_GIVEN,
        help="order of the classes that --evaluate prints (default: accuracy, worst first)",
    )
    group.add_argument(
        "--export",
        type=expanded_path,
        default=UNLESS_GIVEN,
        metavar="FILE",
        help="instead of evaluating the checkpoint, write its network to FILE, for use without "
        "this project: .pt2 for PyTorch (torch.export) or .onnx. Needs no images",
    )
    group.add_argument(
        "--attack",
        type=attack_of,
        action="append",
        default=UNLESS_GIVEN,
        metavar="NAME:STRENGTHS",
        help="instead of the usual results, loss and top-1 on adversarial images, by fgsm or pgd "
        "with these largest changes of a color value (of 255), for example fgsm:1,2,4; may be "
        "repeated",
    )
    group.add_argument(
        "--attack-images",
        type=int_at_least(1),
        default=UNLESS_GIVEN,
        metavar="N",
        help="attack N test images only, evenly spread over the set (default: all)",
    )
    group.add_argument(
        "--keep",
        action="store_true",
        default=UNLESS_GIVEN,
        help="keep the checkpoints of a --sanity pass",
    )
    group.add_argument(
        "--json",
        type=expanded_path,
        default=UNLESS_GIVEN,
        metavar="FILE",
        help="write what --benchmark measures to this file too",
    )


def attack_of(text: str) -> tuple[str, tuple[float, ...]]:
    """The type of --attack: "fgsm:1,2" -> ("fgsm", (1.0, 2.0))."""
    name, _, strengths = text.partition(":")
    try:
        if name not in ATTACKS:
            raise ValueError
        return name, tuple(map(positive(MAX_STRENGTH), strengths.split(",")))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text[:MAX_DIGITS]}: expected {' or '.join(ATTACKS)} and strengths above 0 and up to "
            f"{MAX_STRENGTH}, for example fgsm:1,2,4"
        ) from None


def check_companions(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with the usual error where an option is given without its mode."""
    for name, mode in COMPANIONS.items():
        if hasattr(args, name) and not getattr(args, mode, None):
            parser.error(f"{as_option(name)} goes with {as_option(mode)}")


def constants_of(recipes: dict[str, dict]) -> list[str]:
    """The names of the recipes that have no option: --set changes them."""
    names = dict.fromkeys(name for values in recipes.values() for name in values)
    return [name for name in names if name not in RECIPE_OPTIONS]


def examples(task: Task) -> str:
    """The end of the help: a command line and its purpose, four times."""
    data = "--data-dir photos " if task.data.is_own else ""
    purposes = {
        f"{data}--sanity": "every path of a run in about a minute, and an estimate of its time",
        f"{data}--epochs 90 --set dropout=0.5": "a new run: longer, with half the authors' dropout",
        "--resume": f"resume the newest unfinished run in {task.runs}",
        "--evaluate RUN/last.pt": "loss, top-1, top-5 and each class of a run",
    }
    lines = [f"  python %(prog)s {words}\n      {text}" for words, text in purposes.items()]
    return "\n".join(["examples:", *lines])


# ---- the config ---------------------------------------------------------------------------------


def resolve(args: argparse.Namespace, task: Task, *, sample_size: bool = True) -> dict:
    """A new run's config: the recipe with its changes for a short run and, unless ``sample_size``
    is off, for one on the built-in sample; then --set and the options on top.

    Raises UserError for a wrong --set."""
    given = vars(args)
    recipe = given.get("recipe", next(iter(task.recipes)))
    base = dict(task.recipes[recipe])
    size = task.sample[recipe] if sample_size and "sample" in given else {}
    if given.get("epochs", (base | size)["epochs"]) < SHORT_RUN:
        base |= task.short.get(recipe, {})
    config = {
        "dataset": task.dataset,
        "recipe": recipe,
        "model": task.model,
        "width": 1.0,
        "seed": 0,
        "val_fraction": 0.0,
        "image_size": None,
        "precision": "auto",
        "sample": False,
    }
    changes = parse_set(args.set, base)
    if changes.get("momentum") == 0:
        changes.setdefault("nesterov", False)  # which needs a momentum
    config |= base | size | changes
    config |= {name: given[name] for name in config if name in given}
    config |= {name: given[name] for name in ALWAYS_GIVEN}
    config["compile"] = given.get("compile", "auto")
    # by default none without transferred weights, and at most a quarter of the run
    if "freeze_epochs" not in given:
        config["freeze_epochs"] *= config["init_from"] != "none"
        config["freeze_epochs"] = min(config["freeze_epochs"], config["epochs"] / 4)
    return config


def parse_set(pairs: list[str], recipe: dict) -> dict:
    """["momentum=0.8"] -> {"momentum": 0.8}, with the type of the recipe's value.

    Raises UserError for another name, for one that has an option, and for a wrong value."""
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if name in RECIPE_OPTIONS and equals:
            raise UserError(f"--set {pair}: use {as_option(name)} {text} for this one", 2)
        if not equals or name not in recipe:
            raise UserError(f"--set {wrong_set(pair, recipe)}\n--help lists all names.", 2)
        changes[name] = same_type(pair, text.strip(), recipe[name])
    return changes


def wrong_set(pair: str, recipe: dict) -> str:
    """What is wrong with a --set without a value or with an unknown name."""
    name, equals, _ = pair.partition("=")
    if not equals:
        return f"{pair}: expected NAME=VALUE"
    with_option = {*RECIPE_OPTIONS, *WITH_OPTION}
    settings = dict.fromkeys([*recipe, *WITH_OPTION])
    near = nearest(name.strip(), (as_option(n) if n in with_option else n for n in settings))
    return f"{pair}: no constant is called {name.strip()}{did_you_mean(near)}"


def same_type(pair: str, text: str, default: object) -> object:
    """``text`` as a value of the default's type; a number must be finite and 0 or more. Raises
    UserError naming ``pair``."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {pair}: expected true or false", 2)
        return text.lower() == "true"
    try:
        if not isinstance(default, str) and len(text) > MAX_DIGITS:
            raise ValueError
        value = type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(
            f"--set {pair[: 2 * MAX_DIGITS]}: expected {kind}, as in the default {default}", 2
        ) from None
    if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
        raise UserError(f"--set {pair}: expected a finite number, 0 or more", 2)
    return value


def resumed(
    config: dict, args: argparse.Namespace, recipes: dict[str, dict], argv: list[str]
) -> dict:
    """The config of a checkpoint, with the given options that may change (MAY_CHANGE).

    Raises UserError where another option contradicts the run."""
    given = vars(args)
    asked = {name: given[name] for name in given if name in config and was_given(name, argv)}
    asked |= parse_set(args.set, recipes[config["recipe"]])
    for name, value in asked.items():
        if name in MAY_CHANGE or value == config[name] or (name, value) == ("precision", "auto"):
            continue
        raise UserError(
            f"this run has {as_option(name)} {config[name]}, and {value} would make it "
            f"another run: leave the option out, or start a new run",
            2,
        )
    return config | {name: value for name, value in asked.items() if name in MAY_CHANGE}
