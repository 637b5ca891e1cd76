"""What a script does with its command line: a new run, --resume, --evaluate, --sanity. main() returns the exit status:
0 done, 1 a failure, 2 bad use, 130 or 143 stopped by SIGINT or SIGTERM after saving."""
from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable
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
from training.run import Run, Task, build, clock, eval_batches, split


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
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        return 130


def do(task: Task, args, argv: list[str]) -> int:
    if of_environment().count > 1 and (args.evaluate or args.sanity or args.benchmark):
        raise UserError("--evaluate, --sanity and --benchmark run in one process: start them without torchrun", 2)
    if args.evaluate:
        return evaluate_checkpoint(task, args, argv)
    if args.sanity or args.benchmark:
        config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
        check_recipe(config)
        command = options.command_line(argv)
        if args.sanity:
            return sanity.sanity_pass(task, config, run_dir_of(task, args, "sanity"), command)
        return benchmark(task, config, args.benchmark, args.json, command)
    with joined(args.device) as ranks:
        return train(task, args, argv, ranks)


def run_dir_of(task: Task, args, suffix: str) -> Path:
    if hasattr(args, "run_dir"):
        return Path(args.run_dir)
    return Path("runs", task.dataset, f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{suffix}")


def load(task: Task, config: dict) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a config: the sample, or the data set (downloaded when it is not there)."""
    return task.sample(config) if config["sample"] else task.load(config)


# ---- training ---------------------------------------------------------------------------------------------------------

def train(task: Task, args, argv: list[str], ranks: Ranks) -> int:
    """A new run, or the rest of one. Every rank comes here; the first one alone touches the run directory."""
    content = None
    if args.resume is None:
        config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
        check_recipe(config)
        check_start(config)
        run_dir = ranks.same(run_dir_of(task, args, config["model"]))
        if ranks.first and any((run_dir / name).exists() for name in ("config.json", options.CHECKPOINT_NAME)):
            raise UserError(f"{run_dir} holds a run already: go on with it by --resume {run_dir}, or name another "
                            f"--run-dir", 2)
        run_dir.mkdir(parents=True, exist_ok=True)
    else:
        run_dir = Path(args.resume) if args.resume else ranks.same(
            checkpoint.newest_unfinished(Path("runs", task.dataset)) if ranks.first else None)
        names = ("config.json", options.CHECKPOINT_NAME, options.PREVIOUS_NAME)
        if not any((run_dir / name).exists() for name in names):
            raise UserError(f"--resume {run_dir}: there is no run in this folder (no {', no '.join(names)})", 2)
    with checkpoint.lock(run_dir) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            checkpoint.clean(run_dir)
        if args.resume is not None:
            with ranks.first_goes_ahead():
                content = checkpoint.read_last(run_dir, mend=ranks.first)
            before = content["config"] if content else stored_config(run_dir)
            config = options.resumed(before, args, task.recipes, argv)
            if ranks.count > 1:     # as the ranks have met; the stored one may be a single GPU
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
        if config["batch_size"] < 2 * ranks.count:
            raise UserError(f"--batch-size {config['batch_size']} is too small for {ranks.count} ranks: 2 images each are "
                            f"the least", 2)
        try:
            with ranks.first_goes_ahead():
                sets = split(config, *load(task, config))
        except DataError:
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # a folder that nothing was written to
            raise
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
    if ranks.count > 1:
        print(f"{ranks.count} ranks, each with {config['batch_size'] / ranks.count:g} images of a batch")
    if trainer.micro_batch and trainer.micro_batch < SMALLEST_FOR_STATISTICS:
        print(trainer.what_batch_norm_does())
    if run.device.type == "cpu" and ranks.count == 1:
        say_how_long(run)
    try:
        result = run.train()
    except Interrupted as stop:
        number = stop.args[0]
        print(f"\nStopped by {signal.Signals(number).name}; everything is saved. Go on with:\n"
              f"  python train_{task.dataset}.py --resume {shlex.quote(str(run_dir))}")
        return 128 + number
    except RuntimeError as error:
        if ranks.count == 1:
            raise
        run.save()  # as it was after the last whole step
        raise UserError(f"rank {ranks.rank} lost the others ({' '.join(str(error).split())[:150]}). Its own error is what the "
                        f"rank that ended first printed. Everything up to epoch {trainer.position.epoch + 1}, step "
                        f"{trainer.position.step} is saved: start again with --resume {shlex.quote(str(run_dir))}") from None
    finally:
        if run.report:
            run.report.close()
    print(f"Last epoch ({config['epochs']}): {run.eval_name} top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss "
          f"{result.loss:.4f}. Checkpoint: {run_dir / options.CHECKPOINT_NAME}")
    if run.best:
        print(f"Best on the validation images: epoch {run.best['epoch']}, {run.best['top1']:.2f} %: {run_dir / 'best.pt'}. "
              f"The test set has not been looked at: --evaluate does.")
    return 0


def rate_in_words(trainer: Trainer) -> str:
    """The peak learning rate, for an image too: what a step does to the weights depends on both rate and batch."""
    config, steps = trainer.config, len(trainer.batches)
    peak = max(learning_rate(config, epoch * steps + step, steps) for epoch in range(config["epochs"])
               for step in (0, steps // 2, steps - 1))
    words = f"Peak learning rate {peak:.3g} for batches of {config['batch_size']}: {peak / config['batch_size']:.2g} an image"
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
    left = run.config["epochs"] - run.trainer.position.epoch
    seconds = sanity.epoch_seconds(run.config, cost, len(run.train_set), len(run.eval_set)) * left
    advice = "--width 0.25 takes a sixteenth of the arithmetic; " if run.config["width"] >= 0.5 else ""
    print(f"No GPU: the epochs ahead ({left}) take about {clock(seconds)} here. {advice}--sanity gives a closer estimate.")


# ---- evaluation -------------------------------------------------------------------------------------------------------

def evaluate_checkpoint(task: Task, args, argv: list[str]) -> int:
    """Loss, top-1, top-5 and each class, from the checkpoint alone; where the images are may be told."""
    content = checkpoint.read_checkpoint(args.evaluate)
    config = content["config"] | {name: getattr(args, name) for name in ("data_dir", "num_workers")
                                  if options.was_given(name, argv)}
    if config["dataset"] != task.dataset:
        raise UserError(f"{args.evaluate} is a checkpoint of train_{config['dataset']}.py", 2)
    device = options.choose_device(args.device)
    trained_in = "auto" if config["precision"] == "fp16" and device.type == "cpu" else config["precision"]
    precision = options.choose_precision(getattr(args, "precision", trained_in), device)
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


def print_classes(names: tuple[str, ...], counts: list[int], correct: list[int]) -> None:
    """Top-1 of each class, worst first, in as many columns as fit 100 characters."""
    wide = max(len(name) for name in names) + 16
    order = sorted(range(len(names)), key=lambda i: (correct[i] / max(1, counts[i]), names[i]))
    cells = [f"{names[i]:<{wide - 16}} {100 * correct[i] / max(1, counts[i]):5.1f} % {f'of {counts[i]}':<7}" for i in order]
    columns = max(1, 100 // wide)
    print("top-1 of each class, worst first")
    for first in range(0, len(cells), columns):
        print("  ".join(cells[first:first + columns]).rstrip())
