"""What a script does with its command line: a new run, --resume, --evaluate, --sanity, --benchmark. main() returns the
exit status: 0 done, 1 a failure, 2 bad use, 128 + N stopped by signal N after saving (SIGINT 130, SIGTERM 143)."""
from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch

from attention_model import scaled
from data import DataError, ImageSet
from image_files import one_line, printable
from training import checkpoint, options, sanity
from training.benchmark import benchmark
from training.loop import Interrupted, Precision, SMALLEST_FOR_STATISTICS, Trainer, evaluate, memory_ran_out
from training.memory import check_memory
from training.optimise import SCHEDULES, learning_rate, parse_progressive, width_factor
from training.options import UserError
from training.process import open_standard_streams, program, quoted, unbreakable_pipes
from training.ranks import VARIABLES, Ranks, joined, of_environment
from training.run import Run, Signals, Task, build, clock, eval_batches, split


def main(task: Task, argv: list[str] | None = None) -> int:
    open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    parser = options.make_parser(task.description, task.recipes, model=task.model, dataset=task.dataset)
    try:
        args = options.parse(parser, argv)
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
        raise UserError(f"--evaluate, --sanity and --benchmark run in one process: start them without torchrun, or unset "
                        f"{' '.join(VARIABLES)}", 2)
    if not (args.evaluate or args.sanity or args.benchmark):
        with joined(args.device) as ranks:
            try:
                return train(task, args, argv, ranks)
            except RuntimeError as error:
                if not ranks.lost_by(error):
                    raise
                raise UserError(f"rank {ranks.rank} lost the others ({one_line(error)[:150]}). The rank that ended first has "
                                f"printed why") from None
    with unbreakable_pipes():
        if args.evaluate:
            return evaluate_checkpoint(task, args, argv)
        config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
        check_recipe(config)
        command = options.command_line(argv)
        if args.benchmark:
            return benchmark(task, config, args.benchmark, args.json, command)
        with checkpoint.new_folder(new_run_dirs(task, args, "sanity")) as run_dir:
            return sanity.sanity_pass(task, config, run_dir, command)


def new_run_dirs(task: Task, args, suffix: str) -> Iterator[Path]:
    """--run-dir alone, or names of a folder under runs/, one after the other: several runs may start in one second."""
    if hasattr(args, "run_dir"):
        yield Path(args.run_dir)
        return
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{suffix}"
    yield from (Path("runs", task.dataset, f"{name}-{number}" if number else name) for number in itertools.count())


def run_to_resume(args) -> Path | None:
    """The folder that --resume names, its checkpoint's folder, or --run-dir; None: the newest unfinished run."""
    named = None if args.resume is options.NEWEST else Path(args.resume)
    if named and named.is_file():
        named = named.parent
    given = Path(args.run_dir) if hasattr(args, "run_dir") else None
    if named and given and named.resolve() != given.resolve():
        raise UserError(f"--resume {args.resume} and --run-dir {args.run_dir} name two runs: leave --run-dir out", 2)
    return named or given


def load(task: Task, config: dict, *, new: bool) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a config: the sample, or the data set. For a new run it is downloaded when it is not there.
    Another one was made from images that were there: raises UserError where they are not any more."""
    if config["sample"]:
        return task.sample(config)
    if not new and not task.present(config["data_dir"]):
        raise UserError(f"the images that this was trained on are not in {Path(config['data_dir']).absolute()} any more: give "
                        f"--data-dir, the folder that holds them now")
    return task.load(config, new)


# ---- training ---------------------------------------------------------------------------------------------------------

def train(task: Task, args, argv: list[str], ranks: Ranks) -> int:
    """A new run, or the rest of one. Every rank comes here; the first one alone writes into the run directory."""
    return resumed_run(task, args, argv, ranks) if args.resume is not None else new_run(task, args, argv, ranks)


def new_run(task: Task, args, argv: list[str], ranks: Ranks) -> int:
    config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
    check_recipe(config)
    check_start(config)
    check_batch(config, ranks)
    with checkpoint.new_folder(new_run_dirs(task, args, config["model"])) if ranks.first else contextlib.nullcontext() as run_dir:
        run_dir = ranks.broadcast_object(run_dir)
        with ranks.first_goes_ahead():
            sets = split(config, *load(task, config, new=True))
        return train_here(task, config, run_dir, sets, None, argv, ranks)


def resumed_run(task: Task, args, argv: list[str], ranks: Ranks) -> int:
    run_dir = run_to_resume(args) or ranks.broadcast_object(
        checkpoint.newest_unfinished(Path("runs", task.dataset)) if ranks.first else None)
    names = ("config.json", options.CHECKPOINT_NAME, options.PREVIOUS_NAME)
    if not any((run_dir / name).exists() for name in names):
        raise UserError(f"--resume {run_dir}: there is no run in this folder (no {', no '.join(names)})", 2)
    with checkpoint.lock(run_dir) if ranks.first else contextlib.nullcontext():
        with ranks.first_goes_ahead():
            content = checkpoint.read_last(run_dir)
        before = content["config"] if content else stored_config(run_dir)
        config = options.resumed(before, args, task.recipes, argv)
        if ranks.world_size > 1:     # as the ranks have met; the stored one may be a single GPU
            config["device"] = args.device
        if config["dataset"] != task.dataset:
            raise UserError(f"{run_dir} is a run of train_{config['dataset']}.py", 2)
        if content and content["finished"] and config["epochs"] <= before["epochs"]:
            print(f"{run_dir} is finished: {before['epochs']} epochs. A longer run: --resume {quoted(run_dir)} --epochs "
                  f"{2 * before['epochs']}")
            if ranks.first:
                with contextlib.suppress(OSError, ValueError, TypeError):   # a config.json that is lost or damaged
                    checkpoint.write_config(run_dir, checkpoint.read_config(run_dir) | {"finished": True})
            return 0
        if config["epochs"] != before["epochs"]:
            print(f"--epochs {config['epochs']} instead of {before['epochs']}: the schedule is that of the new length from "
                  f"here on.")
        begun = content["position"]["epoch"] + (content["position"]["step"] > 0) if content else 0
        if config["epochs"] < begun:
            raise UserError(f"--epochs {config['epochs']}: this run is in epoch {begun} already", 2)
        check_batch(config, ranks)
        with ranks.first_goes_ahead():
            sets = split(config, *load(task, config, new=False))
        return train_here(task, config, run_dir, sets, content, argv, ranks)


def check_batch(config: dict, ranks: Ranks) -> None:
    if config["batch_size"] < 2 * ranks.world_size:
        raise UserError(f"--batch-size {config['batch_size']} is too small for {ranks.world_size} ranks: 2 images each are "
                        f"the least", 2)


def train_here(task: Task, config: dict, run_dir: Path, sets: tuple[ImageSet, ImageSet], content: dict | None,
               argv: list[str], ranks: Ranks) -> int:
    """Train, and say how it ended. The run directory is locked by the caller."""
    run = Run(task, config, run_dir, *sets, content=content, ranks=ranks)
    trainer = run.trainer
    run.start(options.command_line(argv), resumed=options.was_given("resume", argv))
    where = f"from epoch {trainer.position.epoch + 1}, step {trainer.position.step + 1}" if content else (
        "from transferred weights" if trainer.transferred else "from scratch")
    del content  # the network, its average and the momentum a second time
    print(f"{config['model']}, width {config['width']:g}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, "
          f"{config['recipe']} recipe, {where} to epoch {config['epochs']}\n"
          f"{len(run.train_set):,} training and {len(run.eval_set):,} {run.eval_name} images ({run.train_set.source})\n"
          f"{options.device_name(run.device)}, {config['precision']}, PyTorch {torch.__version__}\n"
          f"{rate_in_words(trainer)}\n"
          f"Run directory {run_dir}; curves: {program('tensorboard', 'tensorboard.main')} --logdir {quoted(run_dir.parent)}")
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
    here = os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size
    start = program("python") if ranks.world_size == 1 else (
        f"{program('torchrun', 'torch.distributed.run')} --nproc-per-node={here}")
    return f"{start} {quoted(script)} --resume {quoted(run_dir)}"


def rate_in_words(trainer: Trainer) -> str:
    """The peak learning rate, for an image too: what a step does to the weights depends on both rate and batch."""
    config, steps = trainer.config, len(trainer.batches)
    total, rising = config["epochs"] * steps, int(config["warmup"] * config["epochs"] * steps)
    # Where a schedule turns: around the warm-up's end, and at the first epochs at which the rate is doubled or halved.
    turns = [rising + more for more in (-2, -1, 0, 1)] + [number * config["halve_every"] * steps for number in range(4)]
    at_full_width = max(learning_rate(config, min(max(0, step), total - 1), steps) for step in turns)
    peak = at_full_width * width_factor(config)
    words = f"Peak learning rate {peak:.3g} for batches of {config['batch_size']}: {peak / config['batch_size']:.2g} an image"
    if config["muon"]:
        words += f"; {config['muon'] * at_full_width:.2g} for the 3x3 filters, by Muon"
    if trainer.transferred:
        words += f"; transferred layers at {config['transfer_lr']:g} times their rate"
    if config["freeze_epochs"]:
        words += f", whose trunk trains after {config['freeze_epochs']:g} epochs"
    return words


def stored_config(run_dir: Path) -> dict:
    """The config of a run that has no checkpoint yet: it starts over with the same settings."""
    try:
        config = checkpoint.with_news(checkpoint.read_settings(run_dir))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir / 'config.json'} is damaged ({error}) and there is no checkpoint: start a new run") from None
    print(f"{run_dir} has no checkpoint yet: starting over with its settings.")
    return config


def check_recipe(config: dict) -> None:
    """Fail now, before a folder is made or an image read."""
    device = options.choose_device(config["device"])
    options.choose_precision(config["precision"], device)
    with torch.device("meta"):
        check_memory(build(config, num_classes=2), config, device)
    try:
        parse_progressive(config["progressive"])
    except ValueError as error:
        raise UserError(f"--set progressive: {error}", 2) from None
    choices = {"schedule": SCHEDULES, "crop": ("box", "whole")}
    for name in choices.keys() & config.keys():
        if config[name] not in choices[name]:
            raise UserError(f"--set {name}={config[name]}: choose {' or '.join(choices[name])}", 2)
    below = {"momentum": 1, "label_smoothing": 1, "ema_decay": 1, "warmup": 1, "crop_pad": 16, "zoom": 1, "jitter": 1,
             "cutout": 4096, "pool4": 4096}
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
    if config["init_from"] == "imagenet" and scaled(64, config["width"]) != 64:
        raise UserError(f"ImageNet weights fit --width 1, not {config['width']:g}: give --init-from none, or a checkpoint of "
                        f"that width", 2)
    if config["init_from"] not in ("none", "imagenet"):
        checkpoint.read_checkpoint(config["init_from"])


def say_how_long(run: Run) -> None:
    """Without a GPU: what the run takes here, from a small step."""
    height, width = run.config["input_size"]
    cost = sanity.measure(run.trainer, images=max(1, min(8, 8 * 224**2 // (height * width))))
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
    _, test = load(task, config, new=False)
    if tuple(content["class_names"]) != test.class_names:
        raise UserError(f"{args.evaluate} was trained on other classes than those of {test.source}")
    started = time.perf_counter()
    batches = eval_batches(test, device, content["mean"], content["std"], content["input_size"])
    result = evaluate(model, batches, len(test.class_names), Precision(precision, device))
    seconds = time.perf_counter() - started
    print(f"{args.evaluate}: {config['model']}, width {config['width']:g}, after epoch {content['position']['epoch']} of "
          f"{config['epochs']}" + (", moving average of the weights" if content["ema"] else ""))
    if content["position"]["step"]:
        print("It was saved in the middle of an epoch, so batch norm's statistics are not taken anew yet: --resume to the epoch's "
              "end gives its accuracy.")
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
    names = tuple(map(printable, names))
    wide = max(len(name) for name in names) + 16
    order = sorted(range(len(names)), key=lambda i: (correct[i] / max(1, counts[i]), names[i]))
    cells = [f"{names[i]:<{wide - 16}} {100 * correct[i] / max(1, counts[i]):5.1f} % {f'of {counts[i]}':<7}" for i in order]
    columns = max(1, 100 // wide)
    print("top-1 of each class, worst first")
    for first in range(0, len(cells), columns):
        print("  ".join(cells[first:first + columns]).rstrip())
