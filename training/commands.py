"""What a script does with its command line: a new run, --resume, --evaluate, --sanity, --benchmark.
main() returns the exit status: 0 done, 1 a failure, 2 bad use, 128 + N stopped by signal N after
saving (SIGINT 130, SIGTERM 143)."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch

from common.arguments import parse
from common.checkpoint import CHECKPOINT_NAME, PREVIOUS_NAME, upgrade_config
from common.device import device_name, persist_compile_cache, tune_malloc
from common.errors import Interrupted, UserError, exit_status, one_line
from common.process import open_standard_streams, program, quoted, unbreakable_pipes
from data import split
from training import checkpoint, estimate, options
from training.batch_norm import MIN_BN_BATCH
from training.benchmark import benchmark
from training.checks import check_batch, check_recipe, check_start
from training.environment import command_line
from training.evaluate_checkpoint import evaluate_checkpoint
from training.evaluation import Evaluation
from training.progress import format_duration
from training.ranks import VARIABLES, Ranks, init_distributed, ranks_from_environment
from training.run import Run
from training.sanity import sanity_pass
from training.signals import Signals
from training.task import Task


def main(task: Task, argv: list[str] | None = None) -> int:
    """Run a training script: parse ``argv`` (default: the command line), and return the exit
    status."""
    open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    parser = options.make_parser(
        task.description, task.recipes, model=task.model, dataset=task.dataset
    )
    try:
        args = parse(parser, argv)
        if args.json and not args.benchmark:
            parser.error("--json goes with --benchmark")
    except SystemExit as stop:  # argparse has printed the help (0) or what is wrong (2)
        return stop.code
    if getattr(args, "compile", torch.cuda.is_available()):
        persist_compile_cache()
    if args.device == "cpu" or not torch.cuda.is_available():
        tune_malloc()
    command = train if not (args.evaluate or args.sanity or args.benchmark) else instead_of_a_run
    with exit_status("Stopped before the training began: there is nothing to save.") as status:
        status.code = command(task, args, argv)
    return status.code


def instead_of_a_run(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """--evaluate, --sanity or --benchmark."""
    if ranks_from_environment().world_size > 1:
        raise UserError(
            f"--evaluate, --sanity and --benchmark run in one process: start them without torchrun, or unset "
            f"{' '.join(VARIABLES)}",
            2,
        )
    with unbreakable_pipes():
        if args.evaluate:
            return evaluate_checkpoint(task, args, argv)
        config = options.resolve(
            args, task.recipes, task.short, model=task.model, dataset=task.dataset
        )
        check_recipe(config)
        if args.benchmark:
            return benchmark(task, config, args.benchmark, args.json, command_line(argv))
        with checkpoint.new_folder(new_run_dirs(task, args, "sanity")) as run_dir:
            return sanity_pass(task, config, run_dir, command_line(argv))


# ---- training -----------------------------------------------------------------------------------


def train(task: Task, args: argparse.Namespace, argv: list[str]) -> int:
    """A new run, or the rest of one. Every rank comes here; rank 0 alone writes into the run
    directory."""
    run = None
    with init_distributed(args.device) as ranks, contextlib.ExitStack() as folder:
        prepare = new_run if args.resume is None else resumed_run
        try:
            run = prepare(task, args, argv, ranks, folder)
            if run is None:  # there is nothing left of it
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
    """A run that has not begun, in a folder of its own, which ``folder`` keeps locked."""
    config = options.resolve(args, task.recipes, task.short, model=task.model, dataset=task.dataset)
    check_recipe(config)
    check_start(config)
    check_batch(config, ranks)
    run_dir = None
    if ranks.is_main:
        run_dir = folder.enter_context(
            checkpoint.new_folder(new_run_dirs(task, args, config["model"]))
        )
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
    """A run at its newest checkpoint, its folder locked by ``folder``; None where it is finished."""
    run_dir = run_to_resume(args) or ranks.broadcast_object(
        checkpoint.newest_unfinished(Path("runs", task.dataset)) if ranks.is_main else None
    )
    names = ("config.json", CHECKPOINT_NAME, PREVIOUS_NAME)
    if not any((run_dir / name).exists() for name in names):
        raise UserError(
            f"--resume {run_dir}: there is no run in this folder (no {', no '.join(names)})", 2
        )
    if ranks.is_main:
        folder.enter_context(checkpoint.lock(run_dir))
    with ranks.main_process_first():
        saved = checkpoint.read_last(run_dir)
    before = saved["config"] if saved else stored_config(run_dir)
    config = options.resumed(before, args, task.recipes, argv)
    if ranks.world_size > 1:  # as the ranks have met; the stored one may be a single GPU
        config |= {"device": args.device}
    if config["dataset"] != task.dataset:
        raise UserError(f"{run_dir} is a run of train_{config['dataset']}.py", 2)
    if saved and saved["finished"] and config["epochs"] <= before["epochs"]:
        print(
            f"{run_dir} is finished: {before['epochs']} epochs. A longer run: --resume {quoted(run_dir)} --epochs "
            f"{2 * before['epochs']}"
        )
        if ranks.is_main:
            # a config.json that is lost or damaged
            with contextlib.suppress(OSError, ValueError, TypeError):
                checkpoint.write_config(
                    run_dir, checkpoint.read_config(run_dir) | {"finished": True}
                )
        return None
    if config["epochs"] != before["epochs"]:
        print(
            f"--epochs {config['epochs']} instead of {before['epochs']}: the schedule is that of the new length from here on."
        )
    begun = saved["position"]["epoch"] + (saved["position"]["step"] > 0) if saved else 0
    if config["epochs"] < begun:
        raise UserError(f"--epochs {config['epochs']}: this run is in epoch {begun} already", 2)
    check_batch(config, ranks)
    with ranks.main_process_first():
        sets = split(config, *task.data.sets(config, download=False))
    run = Run(task, config, run_dir, *sets, saved=saved, ranks=ranks)
    run.start(command_line(argv), resumed=True)
    return run


def new_run_dirs(task: Task, args: argparse.Namespace, suffix: str) -> Iterator[Path]:
    """--run-dir alone, or names of a folder under runs/, one after the other: several runs may
    start in one second."""
    if hasattr(args, "run_dir"):
        yield Path(args.run_dir)
        return
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{suffix}"
    yield from (
        Path("runs", task.dataset, f"{name}-{number}" if number else name)
        for number in itertools.count()
    )


def run_to_resume(args: argparse.Namespace) -> Path | None:
    """The folder that --resume names, its checkpoint's folder, or --run-dir; None: the newest
    unfinished run."""
    named = None if args.resume is options.NEWEST else Path(args.resume)
    if named and named.is_file():
        named = named.parent
    given = Path(args.run_dir) if hasattr(args, "run_dir") else None
    if named and given and named.resolve() != given.resolve():
        raise UserError(
            f"--resume {args.resume} and --run-dir {args.run_dir} name two runs: leave --run-dir out",
            2,
        )
    return named or given


def stored_config(run_dir: Path) -> dict:
    """The config of a run that has no checkpoint yet: it starts over with the same settings."""
    try:
        config = upgrade_config(checkpoint.read_settings(run_dir))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir / 'config.json'} is damaged ({error}) and there is no checkpoint: start a new run"
        ) from None
    print(f"{run_dir} has no checkpoint yet: starting over with its settings.")
    return config


# ---- what is printed ----------------------------------------------------------------------------


def describe(run: Run) -> None:
    """What is trained on what, before it begins."""
    config, trainer, position = run.config, run.trainer, run.trainer.position
    where = "from transferred weights" if trainer.transferred else "from scratch"
    if run.resumed:
        where = f"from epoch {position.epoch + 1}, step {position.step + 1}"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    tensorboard = program("tensorboard", "tensorboard.main")
    print(
        f"{config['model']}, width {config['width']:g}, {parameters:,} parameters, {config['recipe']} recipe, {where} to epoch "
        f"{config['epochs']}\n"
        f"{len(run.train_set):,} training and {len(run.eval_set):,} {run.eval_name} images ({run.train_set.source})\n"
        f"{device_name(run.device)}, {config['precision']}, PyTorch {torch.__version__}\n"
        f"{estimate.rate_in_words(trainer)}\n"
        f"Run directory {run.run_dir}; curves: {tensorboard} --logdir {quoted(run.run_dir.parent)}"
    )
    if run.ranks.world_size > 1:
        print(
            f"{run.ranks.world_size} ranks, each with {config['batch_size'] / run.ranks.world_size:g} images of a batch"
        )
    if trainer.micro_batch and config["micro_batch"] == "auto":
        print(f"Resuming with --micro-batch {trainer.micro_batch} (reduced after out-of-memory).")
    if trainer.batch_norm.batch_size(trainer.micro_batch) < MIN_BN_BATCH:
        print(trainer.batch_norm.note(trainer.micro_batch))
    if run.device.type == "cpu" and run.ranks.world_size == 1:
        left = config["epochs"] - position.epoch
        advice = (
            "--width 0.25 takes a sixteenth of the arithmetic; " if config["width"] >= 0.5 else ""
        )
        print(
            f"No GPU: the epochs ahead ({left}) take about {format_duration(estimate.seconds_left(run))} here. {advice}--sanity "
            f"gives a closer estimate."
        )


def stopped(run: Run, stop: Interrupted) -> int:
    """Say how to resume. Returns the exit status."""
    words = (
        f"\nStopped by {signal.Signals(stop.signal).name}; everything is saved. Resume with:\n"
        f"  {how_to_resume(run)}"
    )
    try:
        print(words, flush=True)
    except BrokenPipeError:  # Ctrl-C ends the `tee` behind a pipe as well
        with contextlib.suppress(OSError):
            print(words, file=sys.stderr)
        Signals.nobody_reads()  # or Python would complain at its end
    return 128 + stop.signal


def peer_failure(run: Run | None, ranks: Ranks, error: RuntimeError) -> UserError:
    """What to say on a rank when another has gone."""
    words = f"rank {ranks.rank} lost the others ({one_line(error)[:150]}). The rank that ended first has printed why"
    if run is None or not ranks.is_main:
        return UserError(words)
    position = run.trainer.position
    saved = (
        f"Everything up to epoch {position.epoch + 1}, step {position.step} is saved"
        if ranks.steps_are_whole
        else "The last checkpoint is at most a minute or two old"
    )
    return UserError(f"{words}. {saved}; resume with:\n  {how_to_resume(run)}")


def print_result(run: Run, result: Evaluation) -> None:
    print(
        f"Last epoch ({run.config['epochs']}): {run.eval_name} top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss "
        f"{result.loss:.4f}. Checkpoint: {run.run_dir / CHECKPOINT_NAME}"
    )
    if run.best:
        print(
            f"Best on the validation images: epoch {run.best['epoch']}, {run.best['top1']:.2f} %: {run.run_dir / 'best.pt'}. "
            f"The test set has not been looked at: --evaluate does."
        )


def how_to_resume(run: Run) -> str:
    """The command line that resumes a run as it was started: from this folder, with as many ranks."""
    script = f"train_{run.task.dataset}.py"
    if Path(sys.argv[0]).name == script:
        script = sys.argv[0]
    ranks = run.ranks.world_size
    start = (
        program("python")
        if ranks == 1
        else (
            f"{program('torchrun', 'torch.distributed.run')} --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE') or ranks}"
        )
    )
    return f"{start} {quoted(script)} --resume {quoted(run.run_dir)}"
