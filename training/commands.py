"""The commands of a training script: a new run, --resume, --evaluate, --compare, --sanity,
--benchmark.

main() returns the exit status: 0 done, 1 failed, 2 bad use, 128 + N stopped by signal N after
saving (SIGINT 130, SIGTERM 143).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch

from common.arguments import as_option, parse, was_given
from common.checkpoint import CHECKPOINT_NAME, PREVIOUS_NAME, upgrade_config
from common.device import device_name, persist_compile_cache, tune_malloc
from common.errors import Interrupted, UserError, exit_status, one_line
from common.process import open_standard_streams, program, quoted, unbreakable_pipes
from data import split
from training import estimate, options, run_folder
from training.batch_norm import MIN_BN_BATCH
from training.benchmark import benchmark
from training.compare import compare
from training.config_checks import check_batch, check_recipe, check_start
from training.environment import command_line
from training.evaluate_attacks import evaluate_attacks
from training.evaluate_checkpoint import evaluate_checkpoint
from training.evaluation import Evaluation
from training.export import export_checkpoint
from training.progress import format_duration
from training.ranks import VARIABLES, Ranks, init_distributed, ranks_from_environment
from training.report import rows_of
from training.run import Run
from training.sanity import sanity_pass
from training.signals import Signals
from training.task import Task

FEW_STEPS = 300  # optimizer steps of a run: fewer are worth a word


def main(task: Task, argv: list[str] | None = None) -> int:
    """Run a training script with ``argv`` (default: the command line). Returns the exit status."""
    open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    parser = options.make_parser(task)
    try:
        args = parse(parser, argv)
        options.check_companions(parser, args)
    except SystemExit as stop:  # argparse has printed the help (0) or what is wrong (2)
        return stop.code
    if getattr(args, "compile", torch.cuda.is_available()):
        persist_compile_cache()
    if args.device == "cpu" or not torch.cuda.is_available():
        tune_malloc()
    is_run = not (args.evaluate or args.compare or args.sanity or args.benchmark)
    command, when_stopped = other_mode, "Stopped."
    if is_run:
        command = train
        when_stopped = "Stopped before the training began: there is nothing to save."
    with exit_status(when_stopped) as status:
        status.code = command(task, args, argv)
    return status.code


def other_mode(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """--evaluate, --compare, --sanity or --benchmark. Returns the exit status."""
    if ranks_from_environment().world_size > 1:
        raise UserError(
            f"--evaluate, --compare, --sanity and --benchmark run in one process: start them "
            f"without torchrun, or unset {' '.join(VARIABLES)}",
            2,
        )
    with unbreakable_pipes():
        if args.compare:
            others = [name for name in vars(args) if was_given(name, argv) and name != "compare"]
            if others:
                words = ", ".join(map(as_option, others))
                raise UserError(f"--compare only reads the runs: leave out {words}", 2)
            return compare(args.compare)
        if hasattr(args, "export"):  # goes with --evaluate
            return export_checkpoint(args, argv)
        if hasattr(args, "attack"):  # the same
            return evaluate_attacks(task, args, argv)
        if args.evaluate:
            return evaluate_checkpoint(task, args, argv)
        # of the sample they only take the pictures: they are about the size of a real run
        config = options.resolve(args, task, sample_size=False)
        check_recipe(config)
        if args.benchmark:
            return benchmark(
                task, config, args.benchmark, getattr(args, "json", None), command_line(argv)
            )
        keep = hasattr(args, "keep")
        with run_folder.new_folder(new_run_dirs("sanity", args, task.dataset)) as run_dir:
            return sanity_pass(task, config, run_dir, command_line(argv), keep=keep)


# ---- training -----------------------------------------------------------------------------------


def train(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """Train a new or a resumed run to its end, on every rank; rank 0 alone writes into the run
    directory. Returns the exit status."""
    run = None
    with init_distributed(args.device) as ranks, contextlib.ExitStack() as folder:
        prepare = new_run if args.resume is None else resumed_run
        try:
            run = prepare(task, args, argv, ranks, folder)
            if run is None:  # it is finished
                return 0
            describe(run)
            result = run.train()
        except Interrupted as stop:
            return stopped(run, stop)
        except RuntimeError as error:
            if not ranks.is_peer_failure(error):
                raise
            raise peer_failure(run, ranks, error) from None
        finally:
            if run and run.report:
                run.report.close()
        print_result(run, result)
    return 0


def new_run(
    task: Task,
    args: argparse.Namespace,
    argv: list[str],
    ranks: Ranks,
    folder: contextlib.ExitStack,
) -> Run:
    """A new run in a folder of its own, which ``folder`` keeps locked. Raises UserError."""
    config = options.resolve(args, task)
    check_recipe(config)
    check_start(config)
    check_batch(config, ranks)
    run_dir = None
    if ranks.is_main:
        runs = task.data.runs_name(config["data_dir"])
        candidates = new_run_dirs(runs, args, config["model"])
        run_dir = folder.enter_context(run_folder.new_folder(candidates))
    run_dir = ranks.broadcast_object(run_dir)
    with ranks.main_process_first():
        sets = split(config, *task.data.sets(config, download=True))
    run = Run(task, config, run_dir, *sets, ranks=ranks)
    run.start(command_line(argv))
    return run


def resumed_run(
    task: Task,
    args: argparse.Namespace,
    argv: list[str],
    ranks: Ranks,
    folder: contextlib.ExitStack,
) -> Run | None:
    """A run at its newest checkpoint, its folder locked by ``folder``; None where it is finished.
    Raises UserError."""
    run_dir = run_to_resume(task, args, ranks)
    if ranks.is_main:
        folder.enter_context(run_folder.lock(run_dir))
    with ranks.main_process_first():
        saved = run_folder.read_last(run_dir)
    before = saved["config"] if saved else stored_config(run_dir)
    config = options.resumed(before, args, task.recipes, argv)
    if ranks.world_size > 1:  # the stored device may be a single GPU
        config |= {"device": args.device}
    if config["dataset"] != task.dataset:
        raise UserError(f"{run_dir} is a run of train_{config['dataset']}.py", 2)
    if saved and saved["finished"] and config["epochs"] <= before["epochs"]:
        print_finished(run_dir, before["epochs"])
        if ranks.is_main:
            mark_finished(run_dir)
        return None
    if config["epochs"] != before["epochs"]:
        print(
            f"--epochs {config['epochs']} instead of {before['epochs']}: the schedule is that of "
            f"the new length from here on."
        )
    epochs_begun = saved["position"]["epoch"] + (saved["position"]["step"] > 0) if saved else 0
    if config["epochs"] < epochs_begun:
        raise UserError(
            f"--epochs {config['epochs']}: this run is in epoch {epochs_begun} already", 2
        )
    check_batch(config, ranks)
    with ranks.main_process_first():
        sets = split(config, *task.data.sets(config, download=False))
    run = Run(task, config, run_dir, *sets, saved=saved, ranks=ranks)
    run.start(command_line(argv), resumed=True)
    return run


def new_run_dirs(kind: str, args: argparse.Namespace, suffix: str) -> Iterator[Path]:
    """Candidates for the folder of a new run: --run-dir alone, or names under runs/``kind``,
    numbered, as several runs may start in one second."""
    if hasattr(args, "run_dir"):
        yield Path(args.run_dir)
        return
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{suffix}"
    yield from (
        Path("runs", kind, f"{name}-{number}" if number else name) for number in itertools.count()
    )


def run_to_resume(task: Task, args: argparse.Namespace, ranks: Ranks) -> Path:
    """The folder of --resume or --run-dir, else that of the newest unfinished run. Raises UserError
    where it holds no run."""
    run_dir = named_run(args)
    if run_dir is None:
        run_dir = newest_run(task, args) if ranks.is_main else None
        run_dir = ranks.broadcast_object(run_dir)
    names = ("config.json", CHECKPOINT_NAME, PREVIOUS_NAME)
    if not any((run_dir / name).exists() for name in names):
        raise UserError(
            f"--resume {run_dir}: there is no run in this folder (no {', no '.join(names)})", 2
        )
    return run_dir


def newest_run(task: Task, args: argparse.Namespace) -> Path:
    """The newest unfinished run of this script on these images; without --data-dir on any of the
    user's. Raises UserError where there is none."""
    folders, where = [Path("runs", task.data.runs_name(args.data_dir))], None
    if task.data.is_own and args.data_dir is None:
        folders, where = sorted(Path("runs").glob("*/")), Path("runs")
    return run_folder.newest_unfinished(folders, task.dataset, where or folders[0])


def named_run(args: argparse.Namespace) -> Path | None:
    """The folder that --resume names (or holds its checkpoint), or --run-dir; None: neither does.
    Raises UserError where they differ."""
    resumed = None if args.resume is options.NEWEST else Path(args.resume)
    if resumed and resumed.is_file():
        resumed = resumed.parent
    run_dir = Path(args.run_dir) if hasattr(args, "run_dir") else None
    if resumed and run_dir and resumed.resolve() != run_dir.resolve():
        raise UserError(
            f"--resume {args.resume} and --run-dir {args.run_dir} name two runs: "
            f"leave --run-dir out",
            2,
        )
    return resumed or run_dir


def mark_finished(run_dir: Path) -> None:
    """Say so in config.json, unless that is lost or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        run_folder.write_config(run_dir, run_folder.read_config(run_dir) | {"finished": True})


def stored_config(run_dir: Path) -> dict:
    """The config of a run without a checkpoint: it starts over with the same settings. Raises
    UserError where config.json is damaged, too."""
    try:
        config = upgrade_config(run_folder.read_settings(run_dir))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir / 'config.json'} is damaged ({error}) and there is no checkpoint: "
            f"start a new run"
        ) from None
    print(f"{run_dir} has no checkpoint yet: starting over with its settings.")
    return config


# ---- what is printed ----------------------------------------------------------------------------


def describe(run: Run) -> None:
    """What is trained on what, before it begins."""
    config, trainer, position = run.config, run.trainer, run.trainer.position
    if run.resumed:
        start = f"from epoch {position.epoch + 1}, step {position.step + 1}"
    else:
        start = "from transferred weights" if trainer.transferred else "from scratch"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{config['model']}, width {config['width']:g}, {parameters:,} parameters, "
        f"{config['recipe']} recipe, {start} to epoch {config['epochs']}\n"
        f"{len(run.train_set):,} training and {len(run.eval_set):,} {run.eval_name} images "
        f"({run.train_set.source})\n"
        f"{device_name(run.device)}, {config['precision']}, PyTorch {torch.__version__}\n"
        f"{estimate.rate_in_words(trainer)}\n"
        f"Run directory {run.run_dir}; curves: {tensorboard(run.run_dir.parent)}"
    )
    ranks = run.ranks.world_size
    if ranks > 1:
        print(f"{ranks} ranks, each with {config['batch_size'] / ranks:g} images of a batch")
    if trainer.micro_batch and config["micro_batch"] == "auto":
        print(f"Resuming with --micro-batch {trainer.micro_batch} (reduced after out-of-memory).")
    if trainer.batch_norm.batch_size(trainer.micro_batch) < MIN_BN_BATCH:
        print(trainer.batch_norm.note(trainer.micro_batch))
    steps = len(trainer.batches) * config["epochs"]
    if steps < FEW_STEPS and not config["sample"]:
        print(
            f"Only {steps} optimizer steps: use more --epochs, or a smaller --batch-size "
            f"(and --lr in proportion)."
        )
    if run.device.type == "cpu" and ranks == 1:
        print(cpu_estimate(run))


def tensorboard(runs: Path) -> str:
    """The command that shows the curves of a folder of runs."""
    return f"{program('tensorboard', 'tensorboard.main')} --logdir {quoted(runs)}"


def cpu_estimate(run: Run) -> str:
    """How long a run without a GPU takes, in words."""
    epochs = run.config["epochs"] - run.trainer.position.epoch
    height, width = run.config["input_size"]
    images = min(run.config["batch_size"], max(2, 16 * 32**2 // (height * width)))
    duration = format_duration(estimate.guess_seconds(run, images))
    advice = " The first epoch tells more." if epochs > 1 else ""
    if run.config["width"] >= 0.5:
        advice += " --width 0.25 takes a sixteenth of the arithmetic."
    return (
        f"No GPU: perhaps {duration} for the epochs ahead ({epochs}), a guess from a step on "
        f"{images} images, much too high if other programs are running.{advice}"
    )


def print_finished(run_dir: Path, epochs: int) -> None:
    print(
        f"{run_dir} is finished: {epochs} epochs. "
        f"A longer run: --resume {quoted(run_dir)} --epochs {2 * epochs}"
    )


def stopped(run: Run, stop: Interrupted) -> int:
    """Print how to resume. Returns the exit status."""
    message = (
        f"\nStopped by {signal.Signals(stop.signal).name}; everything is saved. Resume with:\n"
        f"  {how_to_resume(run)}"
    )
    try:
        print(message, flush=True)
    except BrokenPipeError:  # Ctrl-C ends the `tee` behind a pipe as well
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)
        Signals.nobody_reads()  # or Python would print an error when it exits
    return 128 + stop.signal


def peer_failure(run: Run | None, ranks: Ranks, error: RuntimeError) -> UserError:
    """The error of a rank after another one has failed."""
    message = (
        f"rank {ranks.rank} lost the others ({one_line(error)[:150]}). "
        f"The rank that ended first has printed why"
    )
    if run is None or not ranks.is_main:
        return UserError(message)
    position = run.trainer.position
    if ranks.steps_are_whole:
        saved = f"Everything up to epoch {position.epoch + 1}, step {position.step} is saved"
    else:
        saved = "The last checkpoint is at most a minute or two old"
    return UserError(f"{message}. {saved}; resume with:\n  {how_to_resume(run)}")


def print_result(run: Run, result: Evaluation) -> None:
    print(
        f"Last epoch ({run.config['epochs']}): {run.eval_name} top-1 {result.top1:.2f} %, "
        f"top-5 {result.top5:.2f} %, loss {result.loss:.4f}. "
        f"Checkpoint: {run.run_dir / CHECKPOINT_NAME}"
    )
    print(time_in_words(run))
    print(f"Each class and the mistakes: --evaluate {quoted(run.run_dir / CHECKPOINT_NAME)}")
    if run.summary:
        print(f"Summary in a picture: {run.summary}")
    print(f"Curves: {tensorboard(run.run_dir.parent)}, then open http://localhost:6006")
    if run.best:
        best = run.run_dir / run_folder.BEST_NAME
        print(
            f"Best on the validation images: epoch {run.best['epoch']}, "
            f"{run.best['top1']:.2f} %: {best}. "
            f"The test set has not been looked at: --evaluate does."
        )


def time_in_words(run: Run) -> str:
    """How long a run took, from its start or resume to its end."""
    took = f"Took {format_duration(time.monotonic() - run.began)}"
    if not run.resumed:
        return f"{took}."
    rows = rows_of(run.run_dir)
    training = format_duration(sum(row["seconds"] or 0 for row in rows))
    return f"{took} since it was resumed; {training} of training in all."


def how_to_resume(run: Run) -> str:
    """The command line that resumes a run as it was started: in this folder, with as many ranks."""
    script = f"train_{run.task.dataset}.py"
    if Path(sys.argv[0]).name == script:
        script = sys.argv[0]
    ranks = run.ranks.world_size
    if ranks == 1:
        launcher = program("python")
    else:
        torchrun = program("torchrun", "torch.distributed.run")
        launcher = f"{torchrun} --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE') or ranks}"
    return f"{launcher} {quoted(script)} --resume {quoted(run.run_dir)}"
