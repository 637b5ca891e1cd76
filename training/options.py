"""The command line that both scripts share, and what it resolves to: one flat dict of plain values, the run's config.

The config is saved in config.json and in every checkpoint. A default stands in one place only: the dicts at the
top of the script, or the constants below for what is no part of a recipe.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from attention_model import MODEL_NAMES
from files import expand_user

LONGEST_NUMBER = 40     # characters; Python itself refuses some thousands
NEWEST = True   # what a bare --resume gives
MOST_WORKERS = 256
SHORT_RUN = 10  # epochs; below, a recipe's changes for short runs hold
CHECKPOINT_NAME, PREVIOUS_NAME = "last.pt", "last.prev.pt"

# Options with a command-line word of their own whose value is part of the recipe.
RECIPE_OPTIONS = ("epochs", "batch_size", "lr", "image_size", "init_from", "freeze_epochs")
# What a resumed run may change: where and how it runs, and how long. All else decides the mathematics.
MAY_CHANGE = ("data_dir", "device", "num_workers", "compile", "micro_batch", "checkpoint_activations", "overlay_every",
              "epochs")


class UserError(Exception):
    """Something the user can mend, in one or two lines: what is wrong, where, and what to do next.

    ``status`` is the exit status: 2 for bad use, 1 for a failure."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def make_parser(description: str, recipes: dict[str, dict], *, model: str, dataset: str) -> argparse.ArgumentParser:
    """The options of both scripts. None as a default means: from the recipe, or from the checkpoint on resume."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    quiet = argparse.SUPPRESS  # not in the result unless it was given
    where = parser.add_argument_group("what and where")
    where.add_argument("--data-dir", type=path, default="data", help="folder that holds (or will hold) the data set")
    where.add_argument("--run-dir", type=path, default=quiet,
                       help=f"folder of this run (default: runs/{dataset}/<time>-<model>)")
    where.add_argument("--sample", action="store_true", default=quiet, help="train on the small built-in sample")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:N")
    where.add_argument("--num-workers", type=whole(0, MOST_WORKERS), default=2,
                       help="processes that decode images into the cache; 0: the main process")

    what = parser.add_argument_group("the run (part of its mathematics: fixed when a run is resumed)")
    what.add_argument("--recipe", choices=sorted(recipes), default=quiet,
                      help=f"settings to start from (default: {next(iter(recipes))})")
    what.add_argument("--model", choices=MODEL_NAMES, metavar="NAME", default=quiet,
                      help=f"network: {', '.join(MODEL_NAMES)} (default: {model})")
    what.add_argument("--width", type=positive(16), default=quiet, help="factor on all channels (default: 1.0)")
    what.add_argument("--image-size", type=whole(16, 4096), default=quiet, help="side in pixels (default: the recipe's)")
    what.add_argument("--epochs", type=whole(1, 10**6), default=quiet, help="(default: the recipe's)")
    what.add_argument("--batch-size", type=whole(2, 10**6), default=quiet,
                      help="images an optimizer step (default: the recipe's)")
    what.add_argument("--lr", type=positive(1e6), default=quiet,
                      help="peak learning rate, with lr_by_width that of full width (default: the recipe's)")
    what.add_argument("--seed", type=whole(0, 2**63 - 1), default=quiet,
                      help="of weights, order, augmentation, dropout (default: 0)")
    what.add_argument("--val-fraction", type=fraction, default=quiet,
                      help="part of the training images held out; they are evaluated instead of the test set, "
                           "and best.pt is kept (default: 0)")
    what.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default=quiet,
                      help="(default: auto: bf16 where it is native, else fp16 on a GPU, fp32 on a CPU)")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                      help="change a constant of the recipe; may be repeated; names: " + ", ".join(
                          name for name in next(iter(recipes.values())) if name not in RECIPE_OPTIONS))
    what.add_argument("--init-from", type=path, metavar="{imagenet,none,CHECKPOINT}", default=quiet,
                      help="weights to start from: torchvision's vgg16_bn, none, or a last.pt (default: the recipe's)")
    what.add_argument("--freeze-epochs", type=at_least_0, default=quiet, metavar="N",
                      help="train head and gates alone, on the transferred trunk as it is, for so many epochs "
                           "(default: the recipe's)")

    how = parser.add_argument_group("speed and memory")
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, default=quiet,
                     help="torch.compile (default: on GPUs of compute capability 7.0 or more)")
    how.add_argument("--micro-batch", type=auto_or_whole, default="auto", metavar="{auto,N}",
                     help="images in memory at once; gradients accumulate to the batch. auto: the batch, halved on "
                          "out-of-memory")
    how.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
                     help="compute activations twice, store fewer")

    modes = parser.add_argument_group("instead of a new run").add_mutually_exclusive_group()
    modes.add_argument("--sanity", action="store_true", help="one short epoch through every path of a real run, in a minute or two")
    modes.add_argument("--resume", nargs="?", type=path, const=NEWEST, metavar="RUN_DIR",
                       help="go on with a run; no folder: the newest unfinished one")
    modes.add_argument("--evaluate", type=path, metavar="CHECKPOINT", help="loss, top-1, top-5 and each class of a checkpoint")
    modes.add_argument("--benchmark", nargs="?", const=25, type=whole(1, 10**5), metavar="STEPS",
                       help="speed of the training step, its parts, and of the plain way to write it")
    parser.add_argument("--json", type=path, metavar="FILE", help="write what --benchmark measures to this file too")
    parser.add_argument("--overlay-every", type=whole(0), default=1, metavar="EPOCHS",
                        help="attention pictures every so many epochs; 0: none")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options of a command line. A shell makes an empty word of a variable that is not set, and no option means
    anything by one. Exits with status 2 where argv is wrong."""
    for before, word in zip(["", *argv], argv):
        name, equals, value = word.partition("=")
        if not word.strip():
            parser.error(f"{before if before.startswith('--') else 'an argument'} is empty")
        if name.startswith("--") and equals and not value.strip():
            parser.error(f"{name} is empty")
    return parser.parse_args(argv)


# ---- types of options, for argparse -----------------------------------------------------------------------------------

def path(text: str) -> str:
    """A file or folder, ~ expanded: a shell leaves it as it is behind the = of --option=~/x."""
    try:
        expanded = str(expand_user(text))
        return f"./{expanded}" if expanded.startswith("~") else expanded    # what is expanded once more stays itself
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(least: int, most: int = 2**31 - 1):
    def number(text: str) -> int:
        if len(text) > LONGEST_NUMBER:
            raise argparse.ArgumentTypeError(f"{text[:LONGEST_NUMBER]}... is not between {least} and {most}")
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is {f'below {least}' if value < least else f'above {most}'}")
        return value
    number.__name__ = "whole number"
    return number


def positive(most: float):
    def number(text: str) -> float:
        value = float(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is {f'above {most:g}' if value > most else 'not above 0'}")
        return value
    number.__name__ = "number above 0"
    return number


def at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def auto_or_whole(text: str) -> int | str:
    return text if text == "auto" else whole(1)(text)


# argparse puts these into its "invalid ... value".
at_least_0.__name__, fraction.__name__ = "number of 0 or more", "fraction"
auto_or_whole.__name__ = "auto or whole number"


def resolve(args: argparse.Namespace, recipes: dict[str, dict], short: dict[str, dict], *, model: str,
            dataset: str) -> dict:
    """A new run's config: the recipe (with what it changes for a short run), then --set and the options on top.

    Raises UserError for a wrong --set."""
    given = vars(args)
    recipe = given.get("recipe", next(iter(recipes)))
    base = dict(recipes[recipe])
    if given.get("epochs", base["epochs"]) < SHORT_RUN:
        base |= short.get(recipe, {})
    config = {"dataset": dataset, "recipe": recipe, "model": model, "width": 1.0, "seed": 0, "val_fraction": 0.0,
              "image_size": None, "precision": "auto", "sample": False}
    changes = parse_set(args.set, base)
    if changes.get("momentum") == 0:
        changes.setdefault("nesterov", False)   # which has no meaning without one
    config |= base | changes
    config |= {name: given[name] for name in config if name in given}
    config |= {name: given[name] for name in ("data_dir", "device", "num_workers", "micro_batch", "checkpoint_activations",
                                              "overlay_every")}
    config["compile"] = given.get("compile", "auto")
    if "freeze_epochs" not in given:    # none where there is nothing to keep as it is, and no more than a quarter of a run
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
            raise UserError(f"--set {pair}: expected NAME=VALUE with a NAME of {', '.join(recipe)}", 2)
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
        if not isinstance(default, str) and len(text) > LONGEST_NUMBER:
            raise ValueError
        value = type(default)(text)
    except ValueError:
        what = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"--set {pair[:2 * LONGEST_NUMBER]}: expected {what}, as in the default {default}", 2) from None
    if isinstance(value, float) and not 0 <= value < float("inf") or isinstance(value, int) and value < 0:
        raise UserError(f"--set {pair}: expected a finite number, 0 or more", 2)
    return value


def resumed(config: dict, args: argparse.Namespace, recipes: dict[str, dict], argv: list[str]) -> dict:
    """The config of a checkpoint with what the command line may change on top.

    Raises UserError when an option that was given contradicts the run."""
    given = vars(args)
    asked = {name: given[name] for name in given if name in config and was_given(name, argv)}
    asked |= parse_set(args.set, recipes[config["recipe"]])
    for name, value in asked.items():
        if name not in MAY_CHANGE and value != config[name] and (name, value) != ("precision", "auto"):
            raise UserError(f"this run has --{name.replace('_', '-')} {config[name]}, and {value} would make it another "
                            f"run: leave the option out, or start a new run", 2)
    return config | {name: value for name, value in asked.items() if name in MAY_CHANGE}


def was_given(name: str, argv: list[str]) -> bool:
    words = (f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}")
    return any(word == w or word.startswith(w + "=") for word in argv for w in words)


# ---- device and precision ---------------------------------------------------------------------------------------------

def choose_device(name: str) -> torch.device:
    """--device as a torch.device. Raises UserError for one that is not there."""
    if name in ("auto", "cuda") and torch.distributed.is_initialized() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())    # each rank has its own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):     # torch takes cuda:300 for cuda:44
        raise UserError(f"--device {name}: expected auto, cpu, cuda, or cuda:N", 2)
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: PyTorch {torch.__version__} sees no CUDA GPU here. Check nvidia-smi; the "
                            f"README's \"Old cards\" says which PyTorch build fits which card")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """--precision as bf16, fp16 or fp32. auto: bf16 where it is native, else fp16 on CUDA and fp32 on CPUs, and on a GTX
    16xx, whose convolutions give NaN in fp16 (github.com/pytorch/pytorch/issues/77955)."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU, and there is none here (nvidia-smi must list it): a run in fp16 can go on on a GPU "
                        "only; a new one can have --precision bf16 (if the CPU has it) or fp32", 2)
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
        return "fp32" if "GTX 16" in torch.cuda.get_device_name(device) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bf16 natively (AVX512-BF16 or AMX)? Emulated bf16 is hundreds of times slower than fp32."""
    checks = (getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks)


def choose_compile(asked: bool | str, device: torch.device, checkpoint_activations: bool, ranks: int = 1) -> bool:
    """--compile; unless asked for, on where it pays: one GPU that Triton knows (compute capability 7.0). The compiler stops
    at every SyncBatchNorm.

    Not with --checkpoint-activations: PyTorch 2.6 then moves the batch-norm statistics twice; 2.15 does not (measured).
    """
    if asked == "auto":
        return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
                and not checkpoint_activations and ranks == 1)
    if asked and checkpoint_activations and torch_version() < COMPILES_CHECKPOINTS:
        raise UserError(f"--compile with --checkpoint-activations gives wrong batch-norm statistics in PyTorch "
                        f"{torch.__version__}: leave one of them out, or install PyTorch 2.15", 2)
    return bool(asked)


def keep_compiled() -> None:
    """Have torch.compile keep what it makes in the user's cache folder, so that the next run starts fast even when the
    machine was restarted; its own choice is /tmp. TORCHINDUCTOR_CACHE_DIR says otherwise. Call it before anything is
    built: importing the compiler settles the place, and that happens here and there."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(OSError, ValueError):  # no home, or none to write to: /tmp then
        folder = expand_user(home) / "learn-to-pay-attention"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def keep_memory() -> None:
    """On a CPU, have the C library keep the memory of large tensors from one step to the next. By itself it gives every
    block over 32 MiB back to the system at once, and the next step pays for each of its pages again: a tenth of the time
    of a quarter-width step on images of 32 px. With another C library than glibc it does nothing."""
    mmap_threshold, trim_threshold = -3, -1     # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(mmap_threshold, 2**30):      # refused by versions that would then do worse with the other one alone
            mallopt(trim_threshold, 2**31 - 1)


COMPILES_CHECKPOINTS = (2, 15)  # the first PyTorch version that we have seen do it right


def torch_version() -> tuple[int, int]:
    return tuple(int(number) for number in torch.__version__.split(".")[:2])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() != 1 else ''}, {cpu_name()}"


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict:
    """What a run ran on, for config.json: versions, device, threads, git commit."""
    others = {name: version(name) for name in ("torchvision", "numpy", "tensorboard", "pillow")}
    return {"python": platform.python_version(), "torch": torch.__version__, **others,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "device": device_name(device), "threads": torch.get_num_threads(), "git_commit": git_commit()}


@functools.lru_cache(maxsize=None)
def git_commit() -> str | None:
    """The commit that this code was at when the run began, with "+changes" when files differ from it; None outside a
    checkout."""
    here = Path(__file__).resolve().parent
    try:
        def git(*words: str) -> str:
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(argv: list[str]) -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *argv])
