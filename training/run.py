"""One run: data, network, trainer, report and checkpoints together.

New runs, resumed runs, the sanity pass and the benchmark use it.
"""

from __future__ import annotations

import functools
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from attention_model import Network
from common.checkpoint import FORMAT, build_from_config
from common.device import choose_compile, choose_device, choose_precision
from common.errors import Interrupted, UserError
from common.files import identity
from data import (
    Augmentation,
    ImageSet,
    TrainBatches,
    channel_statistics,
    eval_batch_size,
    eval_batches,
    evenly_spread,
    input_size,
    place_on,
    stable_seed,
)
from training import report, run_folder, transfer
from training.attention_monitor import AttentionMonitor
from training.environment import environment
from training.evaluation import Evaluation, evaluate
from training.optim import width_factor
from training.progress import Progress, epoch_line
from training.ranks import ALONE, Ranks
from training.schedules import peak_lr
from training.signals import Signals
from training.summary import SHEET, summary_picture
from training.task import Task
from training.time_left import end_in_words, epoch_cost, seconds_left
from training.trainer import Trainer, split_micro_batches

SAVE_EVERY = 50.0  # seconds; with a step and the save itself about a minute of work is at risk
POINTS_EVERY = 2.0  # seconds between reports of the curves by step, each synced to the disk
SAVE_SHARE = 0.02  # of the run's time: where a save takes over a second, there are fewer saves
# Batch norm is recalibrated on a twelfth of the training images (3 % of a full-size epoch), at
# least 512 and at most 1,024. With 256 images the accuracy is 0.2 to 0.5 points below that with
# 1,024 (docs/recipes.md, "What is evaluated").
RECALIBRATION_IMAGES = 512, 1024


class Run:
    """A run in ``run_dir`` on a training and an evaluation set (see data.split): new, or resumed
    from the checkpoint ``saved``.

    ``self.config`` is ``config`` with the values that depend on this machine and these images:
    precision and input_size.

    Raises UserError where the checkpoint or the weights of --init-from do not fit."""

    def __init__(
        self,
        task: Task,
        config: dict,
        run_dir: Path,
        train: ImageSet,
        evaluation: ImageSet,
        *,
        saved: dict | None = None,
        sanity: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.task, self.run_dir = task, run_dir
        self.sanity, self.ranks = sanity, ranks
        self.resumed = saved is not None
        self.device = choose_device(config["device"])
        self.config = config | {
            "precision": choose_precision(config["precision"], self.device),
            "input_size": input_size(config, train),
        }
        self.compiled = choose_compile(
            config["compile"], self.device, config["checkpoint_activations"], ranks.world_size
        )
        self.class_names = train.class_names
        self.eval_name = "val" if config["val_fraction"] else "test"
        self.fingerprints = [fingerprint(train), fingerprint(evaluation)]
        if saved:
            self.check_data(saved)
        self.train_set = place_on(train, self.device)
        self.eval_set = place_on(evaluation, self.device)

        torch.backends.cudnn.benchmark = True  # the shapes of a run are few and fixed
        random.seed(config["seed"])
        torch.manual_seed(config["seed"])
        model = build_from_config(config, len(self.class_names))
        if saved:
            self.mean, self.std = saved["mean"], saved["std"]
            transferred = frozenset(saved["transferred"])
        else:
            self.mean, self.std, transferred = self.weights_and_statistics(model, train)
        self.trainer = Trainer(
            self.config,
            model,
            self.training_batches(),
            self.device,
            precision=self.config["precision"],
            compiled=self.compiled,
            transferred=transferred,
            ranks=ranks,
        )
        self.best: dict | None = None
        self.summary: Path | None = None  # the picture that the end of the run leaves
        self.finished = False
        if saved:
            self.trainer.load_state(saved)
            run_folder.restore_random_states(saved["rng"])
            self.best = saved["best"]
        if not ranks.is_main:  # dropout must differ between ranks; rank 0's is that of one process
            position = self.trainer.position
            torch.manual_seed(
                stable_seed("rank", config["seed"], ranks.rank, position.epoch, position.step)
            )
        self.report: report.Report | None = None  # rank 0's
        self.attention = AttentionMonitor(
            self.eval_set, self.device, self.mean, self.std, self.config["input_size"]
        )
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.points_at = self.began = time.monotonic()

    def training_batches(self) -> TrainBatches:
        """The training set, shuffled and augmented as the config says."""
        config = self.config
        augmentation = Augmentation(
            mean=self.mean,
            std=self.std,
            pad=config["crop_pad"],
            flip=config["flip"],
            cutout=config["cutout"],
            zoom=config["zoom"],
            jitter=config["jitter"],
            trivial_augment=config["trivial_augment"],
            size=config["input_size"],
        )
        return TrainBatches(
            self.train_set,
            config["batch_size"],
            seed=config["seed"],
            augmentation=augmentation,
            device=self.device,
            share=self.ranks.share,
        )

    def weights_and_statistics(
        self, model: Network, train: ImageSet
    ) -> tuple[tuple[float, ...], tuple[float, ...], frozenset[str]]:
        """Load the weights of --init-from. Returns the mean and std to normalize with, the source's
        if there is one (its first layers know no other input), and the names of the loaded
        weights."""
        with self.ranks.main_process_first():  # it downloads them, once
            source = transfer.source_of(self.config["init_from"], model)
        if source:
            return source.mean, source.std, transfer.transfer(model, source, self.class_names)
        names = frozenset()
        if self.sanity and self.config["freeze_epochs"] > 0:
            # a sanity pass without the weights freezes the trunk all the same
            names = frozenset(model.trunk.state_dict(prefix=f"{model.TRUNK}."))
        return *channel_statistics(train), names

    def check_data(self, saved: dict) -> None:
        """Raises UserError where a checkpoint was made with other classes, another number of
        images, other labels, other images (where that can be told), or another image size."""
        if tuple(saved["class_names"]) != self.class_names:
            raise UserError(
                "the data set has changed since the run was stopped: its classes are not those of "
                "the checkpoint. Bring the old images back (--data-dir), or start a new run"
            )
        stored = zip(("training", self.eval_name), saved.get("labels", ()), strict=False)
        pairs = [(*each, now) for each, now in zip(stored, self.fingerprints, strict=False)]
        for place, how in enumerate(("", " with other labels", " others")):
            for name, before, now in pairs:
                # earlier versions stored fewer numbers
                if before[place : place + 1] and before[place] != now[place]:
                    raise UserError(
                        f"the data set has changed since the run was stopped: it had "
                        f"{before[0]:,} {name} images and has {now[0]:,}{how} now. Bring the old "
                        f"images back (--data-dir), or start a new run"
                    )
        if list(saved["input_size"]) != self.config["input_size"]:
            raise UserError(
                f"the images are {self.config['input_size']} px now and were "
                f"{saved['input_size']} px when the run was stopped: bring the old ones back, "
                f"or start a new run"
            )

    # ---- the whole run --------------------------------------------------------------------------

    def start(self, command: str, resumed: bool = False) -> None:
        """Open the report. That of a resumed run is first truncated to the checkpoint. ``command``:
        the command line, for config.json."""
        epoch = self.trainer.position.epoch
        if not self.ranks.is_main:
            return
        self.folder = identity(self.run_dir)
        if resumed:  # not earlier: where resuming fails, the folder must stay as it is
            run_folder.prepare_to_write(self.run_dir, self.config)
            report.truncate_after(
                self.run_dir, epoch or -1, self.trainer.global_step, eval_name=self.eval_name
            )
        self.commands = run_folder.earlier_commands(self.run_dir) + [command]
        self.write_config()
        self.report = report.Report(self.run_dir, eval_name=self.eval_name)
        if epoch == 0:
            self.report.start(command, self.config)
        self.report.tabs(self.hparams())

    def hparams(self) -> dict:
        """The hyperparameters for TensorBoard: those that most comparisons are about, and what
        differs from the recipe."""
        always = ("batch_size", "epochs", "lr", "model", "recipe", "seed", "width")
        others = {"val_fraction": 0.0, "image_size": None, "sample": False}
        unchanged = others | self.task.recipes[self.config["recipe"]]
        changed = [name for name in unchanged if self.config[name] != unchanged[name]]
        return {name: self.config[name] for name in dict.fromkeys([*always, *changed])}

    def write_config(self) -> None:
        """Write config.json."""
        run_folder.write_config(self.run_dir, self.record())

    def record(self) -> dict:
        """The content of config.json."""
        return {
            "commands": self.commands,
            "config": self.config,
            "resolved": {
                "device": str(self.device),
                "compile": self.compiled,
                "ranks": self.ranks.world_size,
                "precision": self.config["precision"],
                "peak_lr": peak_lr(self.config, len(self.trainer.batches))
                * width_factor(self.config),
                "checkpoint_activations": self.config["checkpoint_activations"],
            },
            "environment": environment(self.device),
            "data": {
                "train": self.train_set.source,
                "images": len(self.train_set),
                f"{self.eval_name} images": len(self.eval_set),
                "classes": len(self.class_names),
            },
            "sanity": self.sanity,
            "finished": self.finished,
        }

    def tell_end(self, progress: Progress, started: float) -> bool:
        """Print when the run will end, after an epoch that began at ``started``. Returns whether
        that is known: not where the epoch had been trained before it was resumed."""
        done = self.trainer.position.epoch
        if done >= self.config["epochs"] or len(progress.checks) < 2:
            return False
        cost, steps = epoch_cost(self.trainer, progress, started), len(self.trainer.batches)
        on_gpu = self.device.type == "cuda"
        left = seconds_left(self.config, steps, done, cost, on_gpu=on_gpu)
        print(end_in_words(left, datetime.now()), flush=True)
        return True

    def train(self) -> Evaluation:
        """Train from the current position to the end. Returns the last evaluation.

        Raises Interrupted, after saving, on a signal or when standard output is closed."""
        trainer, epochs, last, told = self.trainer, self.config["epochs"], None, False
        with Signals() as signals:
            try:
                while trainer.position.epoch < epochs:
                    started = time.monotonic()
                    with Progress(trainer, epochs) as progress:
                        trainer.train_epoch(signals, functools.partial(self.on_check, progress))
                    last = self.finish_epoch(signals)
                    told = told or self.tell_end(progress, started)
            except Interrupted:
                self.save()
                # the signal may have reached another rank only
                raise Interrupted(signals.received or signal.SIGTERM) from None
            except BrokenPipeError:
                if self.ranks.world_size > 1:  # the others are in the middle of a step
                    raise
                signals.nobody_reads()
                self.save()
                sigpipe = getattr(signal, "SIGPIPE", signal.SIGTERM)
                raise Interrupted(signals.received or sigpipe) from None
            except RuntimeError as error:
                if self.ranks.is_peer_failure(error) and self.ranks.steps_are_whole:
                    self.save()  # at once: torchrun is about to send a SIGTERM
                raise
            last = last or self.evaluate()  # if stopped between the last epoch and the end
            self.finish(last)
        return last

    def finish(self, last: Evaluation) -> None:
        """Draw the summary, and mark the run as finished in its report, checkpoint and
        config.json."""
        if self.ranks.is_main:
            self.draw_summary(last)  # before the run counts as finished: --resume would not draw it
            self.finished = True
            self.report.finish()
            self.save()
            self.write_config()

    def on_check(self, progress: Progress, step: int, loss: float) -> None:
        """Show the progress, report it and save if it is time (see Trainer.train_epoch)."""
        progress.at(step, loss)
        if time.monotonic() - self.points_at >= POINTS_EVERY:
            self.report_points()
        self.save_when_due()

    def report_points(self) -> None:
        """Report the curves by step up to here."""
        points = self.trainer.take_points()
        if self.ranks.is_main:
            self.report.steps(points)
        self.points_at = time.monotonic()

    def finish_epoch(self, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate, report and save an epoch whose steps are done."""
        trainer, epoch = self.trainer, self.trainer.position.epoch + 1
        row = trainer.epoch_metrics()
        trainer.check_weights()
        result = self.evaluate(should_stop)
        row |= {"eval_loss": result.loss, "eval_top1": result.top1, "eval_top5": result.top5}
        self.report_points()
        if self.ranks.is_main:
            self.report_attention(epoch)
            self.report.epoch(row)
        line = epoch_line(
            row,
            self.config["epochs"],
            self.eval_name,
            trainer.trained_at(),
            tuple(self.config["input_size"]),
            averaged=trainer.ema is not None,
        )
        print(line, flush=True)
        trainer.next_epoch()
        if self.config["val_fraction"]:
            self.save_if_best(epoch, result.top1)
        if epoch == 1:
            self.save()
        else:
            self.save_when_due()
        return result

    def report_attention(self, epoch: int) -> None:
        """Report the attention after an epoch (from 1), with overlays every ``overlay_every``
        epochs and after the last."""
        every, trainer = self.config["overlay_every"], self.trainer
        is_last = epoch == self.config["epochs"]
        self.attention.observe(
            trainer.eval_model,
            trainer.precision,
            trainer.position.gate_gradients,
            self.report,
            epoch,
            overlays=every > 0 and (epoch % every == 0 or is_last),
        )

    def draw_summary(self, last: Evaluation) -> None:
        """Write summary.png, unless pictures are turned off."""
        if not self.config["overlay_every"]:
            return
        model, eight = self.trainer.eval_model, evenly_spread(8, len(self.eval_set))
        picture = summary_picture(
            self.config,
            self.record(),
            report.rows_of(self.run_dir),
            last,
            eval_name=self.eval_name,
            curve_name=self.eval_name,
            images=len(self.eval_set),
            epoch=self.trainer.position.epoch,
            sheet=self.attention.sheet(model, self.trainer.precision, eight, **SHEET),
        )
        self.check_folder()
        self.summary = run_folder.write_summary(self.run_dir, picture)

    def evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Loss and accuracy on the evaluation set, with recalibrated batch-norm statistics. Raises
        Interrupted when ``should_stop``."""
        self.trainer.recalibrate_batch_norm(self.recalibration_batches())
        batches = eval_batches(
            self.eval_set,
            self.device,
            self.mean,
            self.std,
            self.config["input_size"],
            self.ranks.share(len(self.eval_set)),
        )
        return evaluate(
            self.trainer.eval_model,
            batches,
            len(self.class_names),
            self.trainer.precision,
            should_stop,
            self.ranks,
        )

    def recalibration_batches(self) -> Iterator[Tensor]:
        """Training images (N, 3, H, W), evenly spread over the set and augmented as in training;
        the same ones every time."""
        indices = evenly_spread(recalibration_count(len(self.train_set)), len(self.train_set))
        generator = torch.Generator(self.device)
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
        # At most that of an evaluation, which has to fit anyway, and at least 2: batch norm needs
        # two images for a variance.
        batch_size = max(2, eval_batch_size(self.config["input_size"], self.device))
        for number, (batch, _) in enumerate(split_micro_batches(indices, indices, batch_size)):
            generator.manual_seed(stable_seed("statistics", self.config["seed"], number))
            images = self.train_set.take(batch.to(self.train_set.device))
            yield self.trainer.batches.augmentation(images.to(self.device), generator)

    # ---- checkpoints ----------------------------------------------------------------------------

    def checkpoint_dict(self) -> dict:
        """Everything that --resume, --evaluate and cam.py need, as plain values."""
        return {
            "format": FORMAT,
            **self.trainer.state(),
            "best": self.best,
            "config": dict(self.config),
            "class_names": list(self.class_names),
            "labels": self.fingerprints,
            "input_size": list(self.config["input_size"]),
            "mean": list(self.mean),
            "std": list(self.std),
            "rng": run_folder.random_states(),
            "finished": self.finished,
        }

    def save(self) -> None:
        """Write last.pt. Raises UserError where that fails, or where the weights have diverged."""
        self.trainer.check_weights()  # diverged weights must not replace a good checkpoint
        self.report_points()  # the checkpoint knows none before it
        started = time.monotonic()
        if self.ranks.is_main:
            self.check_folder()
            run_folder.save_checkpoint(self.run_dir, self.checkpoint_dict())
            self.folder = identity(self.run_dir)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

    def save_if_best(self, epoch: int, top1: float) -> None:
        """Write best.pt if ``top1`` is the highest so far on the validation images. Raises
        UserError."""
        if self.best and top1 <= self.best["top1"]:
            return
        self.best = {"epoch": epoch, "top1": top1}
        if self.ranks.is_main:
            self.check_folder()
            run_folder.save_file(self.run_dir / run_folder.BEST_NAME, self.checkpoint_dict())

    def check_folder(self) -> None:
        """Raises UserError where another folder is in the place of the run's: its files are
        somebody else's. A missing folder is fine: it is made again, so that nothing is lost."""
        if identity(self.run_dir) not in (None, self.folder):
            raise UserError(
                f"{self.run_dir} is another folder now than the one that this run began in, and "
                f"nothing was written there. Bring the run's folder back, then --resume it"
            )

    def save_when_due(self) -> None:
        """Save if SAVE_EVERY has passed, in mid-epoch too: about a minute of work is at risk,
        however long an epoch takes (or fifty times what a save takes, on a slow disk)."""
        if time.monotonic() - self.saved_at >= max(SAVE_EVERY, self.save_seconds / SAVE_SHARE):
            self.save()


def fingerprint(image_set: ImageSet) -> list[int]:
    """The number of images, a checksum of their labels in order, and one of their files (0 where it
    is not known)."""
    labels = zlib.crc32(image_set.labels.cpu().numpy().tobytes())
    return [len(image_set), labels, image_set.content]


def recalibration_count(images: int) -> int:
    """How many of the training images batch norm is recalibrated on."""
    least, most = RECALIBRATION_IMAGES
    return min(images, max(least, min(most, images // 12)))
