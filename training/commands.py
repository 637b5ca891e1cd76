"""What a script does with its command line: a new run, --resume, --evaluate, --sanity, --benchmark. main() returns the
exit status: 0 done, 1 a failure, 2 bad use, 128 + N stopped by signal N after saving (SIGINT 130, SIGTERM 143)."""
from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch

from data import DataError, ImageSet
from image_files import one_line
from training import checkpoint, options, sanity
from training.benchmark import benchmark
from training.loop import Interrupted, Precision, SMALLEST_FOR_STATISTICS, Trainer, evaluate, memory_ran_out
from training.optimise import SCHEDULES, learning_rate, parse_progressive
from training.options import UserError
from training.ranks import Ranks, joined, of_environment
from training.run import Run, Signals, Task, build, clock, eval_batches, split


def main(task: Task, argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = options.make_parser(task.description, task.recipes, model=task.model, dataset=task.dataset)
    try:
        args = parser.parse_args(argv)
        if args.json and not args.benchmark:
            parser.error("--json goes with --benchmark")
    except SystemExit as stop:  # argparse has printed the help (0) or what is wrong (2)
        return stop.code
    if getattr(args, "compile", torch.cuda.is_available()):
        options.keep_compiled()
    if args.device == "cpu" or not torch.cuda.is_available():
        options.keep_memory()
    return exit_status(lambda: do(task, args, argv), "Stopped before the training began: there is nothing to save.")


def exit_status(action: Callable[[], int], when_stopped: str) -> int:
    """What ``action`` returns; else 1 or 2 for what a user can mend, told in a line or two, and 130 after Ctrl-C."""
    try:
        return action()
    except Interrupted as stop:  # in the sanity pass; a run catches its own
        return 128 + stop.args[0]
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        print(f"error: out of memory outside the training step: {one_line(error)[:200]}\n"
              f"Is another program using the memory (nvidia-smi, top)? Else try a smaller --image-size, or --device cpu.",
              file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        return 130


def do(task: Task, args, argv: list[str]) -> int:
    if of_environment().world_size > 1 and (args.evaluate or args.sanity or args.benchmark):
        raise UserError("--evaluate, --sanity and --benchmark run in one process: start them without torchrun", 2)
    if args.evaluate:
        return evaluate_checkpoint(task, args, argv)
    if args.sanity or args.benchmark:
        config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
        check_recipe(config)
        command = options.command_line(argv)
        if args.sanity:
            with removed_if_empty(run_dir_of(task, args, "sanity")) as run_dir:
                return sanity.sanity_pass(task, config, run_dir, command)
        return benchmark(task, config, args.benchmark, args.json, command)
    with joined(args.device) as ranks:
        return train(task, args, argv, ranks)


def run_dir_of(task: Task, args, suffix: str) -> Path:
    """--run-dir, or a folder of its own for every run, made here: several may start in the same second."""
    if hasattr(args, "run_dir"):
        return Path(args.run_dir)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{suffix}"
    for number in itertools.count(1):
        run_dir = Path("runs", task.dataset, name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            return run_dir


@contextlib.contextmanager
def removed_if_empty(run_dir: Path) -> Iterator[Path]:
    """Where nothing came of it, no folder is left."""
    try:
        yield run_dir
    finally:
        with contextlib.suppress(OSError):  # not empty, or not there
            run_dir.rmdir()


def run_to_resume(args) -> Path | None:
    """The folder that --resume names, its checkpoint's folder, or --run-dir; None: the newest unfinished run."""
    named = Path(args.resume) if args.resume else None
    if named and named.is_file():
        named = named.parent
    given = Path(args.run_dir) if hasattr(args, "run_dir") else None
    if named and given and named.resolve() != given.resolve():
        raise UserError(f"--resume {args.resume} and --run-dir {args.run_dir} name two runs: leave --run-dir out", 2)
    return named or given


def load(task: Task, config: dict) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a config: the sample, or the data set (downloaded when it is not there)."""
    return task.sample(config) if config["sample"] else task.load(config)


# ---- training ---------------------------------------------------------------------------------------------------------

def train(task: Task, args, argv: list[str], ranks: Ranks) -> int:
    """A new run, or the rest of one. Every rank comes here; the first one alone writes into the run directory."""
    content = None
    if args.resume is None:
        config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
        check_recipe(config)
        check_start(config)
        run_dir = ranks.broadcast_object(run_dir_of(task, args, config["model"]) if ranks.first else None)
        if ranks.first and any((run_dir / name).exists() for name in ("config.json", options.CHECKPOINT_NAME)):
            raise UserError(f"{run_dir} holds a run already: go on with it by --resume {run_dir}, or name another "
                            f"--run-dir", 2)
        run_dir.mkdir(parents=True, exist_ok=True)
    else:
        run_dir = run_to_resume(args) or ranks.broadcast_object(
            checkpoint.newest_unfinished(Path("runs", task.dataset)) if ranks.first else None)
        names = ("config.json", options.CHECKPOINT_NAME, options.PREVIOUS_NAME)
        if not any((run_dir / name).exists() for name in names):
            raise UserError(f"--resume {run_dir}: there is no run in this folder (no {', no '.join(names)})", 2)
    with removed_if_empty(run_dir), checkpoint.lock(run_dir) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            checkpoint.clean(run_dir)
        if args.resume is not None:
            with ranks.first_goes_ahead():
                content = checkpoint.read_last(run_dir, mend=ranks.first)
            before = content["config"] if content else stored_config(run_dir)
            config = options.resumed(before, args, task.recipes, argv)
            if ranks.world_size > 1:     # as the ranks have met; the stored one may be a single GPU
                config["device"] = args.device
            if config["dataset"] != task.dataset:
                raise UserError(f"{run_dir} is a run of train_{config['dataset']}.py", 2)
            if content and content["finished"] and config["epochs"] <= before["epochs"]:
                print(f"{run_dir} is finished: {before['epochs']} epochs. A longer run: --resume {run_dir} --epochs "
                      f"{2 * before['epochs']}")
                if ranks.first:
                    with contextlib.suppress(OSError, ValueError, TypeError):   # a config.json that is lost or damaged
                        checkpoint.write_config(run_dir, checkpoint.read_config(run_dir) | {"finished": True})
                return 0
            if config["epochs"] != before["epochs"]:
                print(f"--epochs {config['epochs']} instead of {before['epochs']}: the schedule is that of the new length "
                      f"from here on.")
            begun = content["position"]["epoch"] + (content["position"]["step"] > 0) if content else 0
            if config["epochs"] < begun:
                raise UserError(f"--epochs {config['epochs']}: this run is in epoch {begun} already", 2)
        if config["batch_size"] < 2 * ranks.world_size:
            raise UserError(f"--batch-size {config['batch_size']} is too small for {ranks.world_size} ranks: 2 images each are "
                            f"the least", 2)
        with ranks.first_goes_ahead():
            sets = split(config, *load(task, config))
        return train_here(task, config, run_dir, sets, content, argv, ranks)


def train_here(task: Task, config: dict, run_dir: Path, sets: tuple[ImageSet, ImageSet], content: dict | None,
               argv: list[str], ranks: Ranks) -> int:
    """Train, and say how it ended. The run directory is locked by the caller."""
    run = Run(task, config, run_dir, *sets, content=content, ranks=ranks)
    trainer = run.trainer
    run.start(options.command_line(argv))
    where = f"from epoch {trainer.position.epoch + 1}, step {trainer.position.step + 1}" if content else (
        "from transferred weights" if trainer.transferred else "from scratch")
    del content  # the network, its average and the momentum a second time
    print(f"{config['model']}, width {config['width']:g}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, "
          f"{config['recipe']} recipe, {where} to epoch {config['epochs']}\n"
          f"{len(run.train_set):,} training and {len(run.eval_set):,} {run.eval_name} images ({run.train_set.source})\n"
          f"{options.device_name(run.device)}, {config['precision']}, PyTorch {torch.__version__}\n"
          f"{rate_in_words(trainer)}\n"
          f"Run directory {run_dir}; curves: tensorboard --logdir {run_dir.parent}")
    if ranks.world_size > 1:
        print(f"{ranks.world_size} ranks, each with {config['batch_size'] / ranks.world_size:g} images of a batch")
    if trainer.micro_batch and config["micro_batch"] == "auto":
        print(f"Going on with --micro-batch {trainer.micro_batch}, to which this run came when memory ran out.")
    if trainer.images_at_once() < SMALLEST_FOR_STATISTICS:
        print(trainer.what_batch_norm_does())
    if run.device.type == "cpu" and ranks.world_size == 1:
        say_how_long(run)
    try:
        result = run.train()
    except Interrupted as stop:
        number = stop.args[0]
        words = (f"\nStopped by {signal.Signals(number).name}; everything is saved. Go on with:\n"
                 f"  {how_to_resume(task, run_dir, ranks)}")
        try:
            print(words, flush=True)
        except BrokenPipeError:     # Ctrl-C ends the `tee` behind a pipe as well
            with contextlib.suppress(OSError):
                print(words, file=sys.stderr)
            Signals.nobody_reads()  # or Python would complain at its end
        return 128 + number
    except RuntimeError as error:
        if not ranks.lost_by(error):
            raise
        saved = (f"Everything up to epoch {trainer.position.epoch + 1}, step {trainer.position.step} is saved"
                 if ranks.steps_are_whole else "The last checkpoint is at most a minute or two old")
        saved = f" {saved}; go on with:\n  {how_to_resume(task, run_dir, ranks)}" if ranks.first else ""
        raise UserError(f"rank {ranks.rank} lost the others ({one_line(error)[:150]}). The rank that ended first has printed "
                        f"why.{saved}") from None
    finally:
        if run.report:
            run.report.close()
    print(f"Last epoch ({config['epochs']}): {run.eval_name} top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss "
          f"{result.loss:.4f}. Checkpoint: {run_dir / options.CHECKPOINT_NAME}")
    if run.best:
        print(f"Best on the validation images: epoch {run.best['epoch']}, {run.best['top1']:.2f} %: {run_dir / 'best.pt'}. "
              f"The test set has not been looked at: --evaluate does.")
    return 0


def how_to_resume(task: Task, run_dir: Path, ranks: Ranks) -> str:
    """The command line that goes on with a run, as it was started: from this folder, with as many ranks."""
    script = sys.argv[0] if Path(sys.argv[0]).name == f"train_{task.dataset}.py" else f"train_{task.dataset}.py"
    here = os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)
    start = "python" if ranks.world_size == 1 else f"torchrun --nproc-per-node={here}"
    return f"{start} {shlex.quote(script)} --resume {shlex.quote(str(run_dir))}"


def rate_in_words(trainer: Trainer) -> str:
    """The peak learning rate, for an image too: what a step does to the weights depends on both rate and batch."""
    config, steps = trainer.config, len(trainer.batches)
    peak = max(learning_rate(config, step, steps) for step in range(config["epochs"] * steps))
    words = f"Peak learning rate {peak:.3g} for batches of {config['batch_size']}: {peak / config['batch_size']:.2g} an image"
    if config["muon"]:
        words += f"; {config['muon']:g} of it for the 3x3 filters, by Muon"
    if trainer.transferred:
        words += f"; {config['transfer_lr']:g} of it for the transferred layers"
    if config["freeze_epochs"]:
        words += f", whose trunk trains after {config['freeze_epochs']:g} epochs"
    return words


def stored_config(run_dir: Path) -> dict:
    """The config of a run that has no checkpoint yet: it starts over with the same settings."""
    try:
        config = checkpoint.with_news(checkpoint.read_config(run_dir)["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run_dir / 'config.json'} is damaged ({error}) and there is no checkpoint: start a new run") from None
    print(f"{run_dir} has no checkpoint yet: starting over with its settings.")
    return config


def check_recipe(config: dict) -> None:
    """Fail now, before a folder is made or an image read."""
    options.choose_precision(config["precision"], options.choose_device(config["device"]))
    with torch.device("meta"):
        build(config, num_classes=2)
    try:
        parse_progressive(config["progressive"])
    except ValueError as error:
        raise UserError(f"--set progressive: {error}", 2) from None
    choices = {"schedule": SCHEDULES, "crop": ("box", "whole")}
    for name in choices.keys() & config.keys():
        if config[name] not in choices[name]:
            raise UserError(f"--set {name}={config[name]}: choose {' or '.join(choices[name])}", 2)
    below = {"momentum": 1, "label_smoothing": 1, "ema_decay": 1, "warmup": 1, "crop_pad": 16, "zoom": 1, "jitter": 1}
    for name, limit in below.items():
        if config[name] >= limit:
            raise UserError(f"--set {name}={config[name]}: expected a number below {limit}", 2)
    if config["nesterov"] and not config["momentum"]:
        raise UserError("--set momentum=0: Nesterov needs a momentum; add --set nesterov=false", 2)
    if config["halve_every"] < 1:
        raise UserError("--set halve_every=0: expected 1 epoch or more", 2)
    if config["freeze_epochs"] >= config["epochs"]:
        raise UserError(f"--freeze-epochs {config['freeze_epochs']:g}: fewer than the {config['epochs']} epochs of the run "
                        f"are needed, or the trunk would never train", 2)


def check_start(config: dict) -> None:
    """--init-from of a new run, before an image is read. Raises UserError."""
    if not config["init_from"]:
        raise UserError("this recipe starts from a CIFAR-100 network, which train_cifar100.py trains: give --init-from "
                        "RUN_DIR/last.pt. Else --init-from imagenet (--set trunk=pooled), or --init-from none", 2)
    if config["init_from"] == "none" and config["freeze_epochs"]:
        raise UserError("--freeze-epochs keeps a transferred trunk as it is, and --init-from none transfers none: leave one "
                        "of them out", 2)
    if config["init_from"] not in ("none", "imagenet"):
        checkpoint.read_checkpoint(config["init_from"])


def say_how_long(run: Run) -> None:
    """Without a GPU: what the run takes here, from a small step."""
    cost = sanity.measure(run.trainer, images=8)
    position, epochs = run.trainer.position, run.config["epochs"]
    left = epochs - position.epoch
    begun = (position.epoch + position.step / len(run.trainer.batches)) / epochs
    seconds = sanity.run_seconds(run.config, cost, len(run.train_set), len(run.eval_set), begun)
    advice = "--width 0.25 takes a sixteenth of the arithmetic; " if run.config["width"] >= 0.5 else ""
    print(f"No GPU: the epochs ahead ({left}) take about {clock(seconds)} here. {advice}--sanity gives a closer estimate.")


# ---- evaluation -------------------------------------------------------------------------------------------------------

def evaluate_checkpoint(task: Task, args, argv: list[str]) -> int:
    """Loss, top-1, top-5 and each class, from the checkpoint alone; where the images are may be told."""
    taken = ("data_dir", "num_workers", "device", "precision", "evaluate")
    ignored = [name for name in vars(args) if options.was_given(name, argv) and name not in taken]
    if ignored:
        raise UserError(f"--evaluate takes the run's settings from the checkpoint: leave out "
                        f"{', '.join('--' + name.replace('_', '-') for name in ignored)}", 2)
    content = checkpoint.read_checkpoint(args.evaluate)
    config = content["config"] | {name: getattr(args, name) for name in ("data_dir", "num_workers")
                                  if options.was_given(name, argv)}
    if config["dataset"] != task.dataset:
        raise UserError(f"{args.evaluate} is a checkpoint of train_{config['dataset']}.py", 2)
    device = options.choose_device(args.device)
    torch.backends.cudnn.benchmark = True   # as in training
    precision = options.choose_precision(getattr(args, "precision", precision_here(config["precision"], device)), device)
    model = checkpoint.load_model(content).to(device, memory_format=torch.channels_last)
    _, test = load(task, config)
    if tuple(content["class_names"]) != test.class_names:
        raise UserError(f"{args.evaluate} was trained on other classes than those of {test.source}")
    started = time.perf_counter()
    batches = eval_batches(test, device, content["mean"], content["std"], content["input_size"])
    result = evaluate(model, batches, len(test.class_names), Precision(precision, device))
    seconds = time.perf_counter() - started
    print(f"{args.evaluate}: {config['model']}, width {config['width']:g}, after epoch {content['position']['epoch']} of "
          f"{config['epochs']}" + (", moving average of the weights" if content["ema"] else ""))
    print(f"{len(test):,} test images ({test.source}), {options.device_name(device)}, {precision}, {seconds:.1f} s")
    print(f"loss {result.loss:.4f}   top-1 {result.top1:.2f} %   top-5 {result.top5:.2f} %\n")
    print_classes(test.class_names, result.class_counts, result.class_correct)
    return 0


def precision_here(trained_in: str, device: torch.device) -> str:
    """The precision of a run, where this device has it; else "auto": emulated bf16 would seem to hang."""
    native = trained_in in ("fp32", options.choose_precision("auto", device)) or (trained_in, device.type) == ("fp16", "cuda")
    return trained_in if native else "auto"


def print_classes(names: tuple[str, ...], counts: list[int], correct: list[int]) -> None:
    """Top-1 of each class, worst first, in as many columns as fit 100 characters."""
    wide = max(len(name) for name in names) + 16
    order = sorted(range(len(names)), key=lambda i: (correct[i] / max(1, counts[i]), names[i]))
    cells = [f"{names[i]:<{wide - 16}} {100 * correct[i] / max(1, counts[i]):5.1f} % {f'of {counts[i]}':<7}" for i in order]
    columns = max(1, 100 // wide)
    print("top-1 of each class, worst first")
    for first in range(0, len(cells), columns):
        print("  ".join(cells[first:first + columns]).rstrip())
