"""One run: data, network, loop, report and checkpoints together. Both scripts, the sanity pass and a resumed run use it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from attention_model import build_model
from augmentation import Augmentation, TrainBatches, normalise, resize
from data import ImageSet, channel_statistics, place_on, split_validation, stable_seed
from files import identity
from training import checkpoint, options, report, transfer
from training.loop import Evaluation, Interrupted, Trainer, evaluate, parts_of
from training.options import UserError
from training.pictures import attention_sheet, title_of
from training.ranks import Ranks, of_environment

SAVE_EVERY = 50.0       # seconds; with a step and the save itself about a minute of work is at risk
SAVE_SHARE = 0.02       # of the run's time may go into saving: where a save takes over a second, there are fewer
OVERLAY_IMAGES = 16
# For Trainer.recalibrate_batch_norm: a twelfth of the training images (3 % of a full-size epoch), at least 512 and at most 1,024.
# With 256 images the accuracy is 0.2 to 0.5 points below that with 1,024 (README).
RECALIBRATION_IMAGES = 512, 1024
# Of all images of an evaluation batch: 256 or 512 images of 32x32, for which training a batch of 128 leaves room.
EVAL_PIXELS = {"cpu": 2**18, "cuda": 2**19}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a script brings: its name, recipes, and where its images come from."""
    dataset: str                                    # "cifar100": names the runs' folder
    description: str
    recipes: dict[str, dict]                        # the first is the default
    short: dict[str, dict]                          # what a recipe changes for runs under options.SHORT_RUN epochs
    model: str                                      # default network
    load: Callable[[dict, bool], tuple[ImageSet, ImageSet]]     # (config, may it download?) -> train, test
    sample: Callable[[dict], tuple[ImageSet, ImageSet]]     # (config) -> the built-in one
    present: Callable[[str], bool]                  # are there images in this data folder?
    train_images: int                               # of the full data set, for estimates without it
    test_images: int


class Signals:
    """SIGINT, SIGTERM, a terminal that is closed (SIGHUP), and what batch systems send before they end a job, ask the run to
    end after the step; a second SIGINT ends the process at once. Ctrl-C also ends the `tee` behind a pipe, and whatever wrote
    there would then fail: see ``nobody_reads``. Python gives signals to the main thread only: in another one there are none.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "Signals":
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]   # Windows has the first two
        ignored = [n for n in numbers[2:] if signal.getsignal(n) == signal.SIG_IGN]     # nohup's SIGHUP stays ignored
        main = threading.current_thread() is threading.main_thread()
        self.before = {n: signal.signal(n, self.receive) for n in numbers if main and n not in ignored}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)   # None: not Python's

    def receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)
        self.received = self.received or number
        if number == getattr(signal, "SIGHUP", None):
            self.nobody_reads()
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step; once more Ctrl-C to leave at once without saving.\n")

    @staticmethod
    def nobody_reads() -> None:
        """Send what is still printed to nowhere, where it went to a terminal or a pipe: writing there would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            with contextlib.suppress(OSError):  # closed already
                if not stat.S_ISREG(os.fstat(number).st_mode):
                    os.dup2(nowhere, number)

    def __call__(self) -> bool:
        return self.received is not None


class Run:
    """A run in ``run_dir`` on a training and an evaluation set (see ``split``), new or gone on with from the checkpoint
    ``content``."""

    def __init__(self, task: Task, config: dict, run_dir: Path, train: ImageSet, evaluation: ImageSet, *,
                 content: dict | None = None, sanity: bool = False, ranks: Ranks = Ranks()):
        self.task, self.config, self.run_dir, self.sanity, self.ranks = task, config, run_dir, sanity, ranks
        self.device = options.choose_device(config["device"])
        config["precision"] = options.choose_precision(config["precision"], self.device)
        self.compiled = options.choose_compile(config["compile"], self.device, config["checkpoint_activations"],
                                               ranks.world_size)
        self.class_names = train.class_names
        self.eval_name = "val" if config["val_fraction"] else "test"
        config["input_size"] = input_size(config, train)
        self.labels = [fingerprint(train), fingerprint(evaluation)]
        self.check_data(content)
        self.train_set, self.eval_set = place_on(train, self.device), place_on(evaluation, self.device)

        torch.backends.cudnn.benchmark = True  # the shapes of a run are few and fixed
        random.seed(config["seed"])
        torch.manual_seed(config["seed"])
        model = build(config, len(self.class_names))
        if content:
            self.mean, self.std, transferred = content["mean"], content["std"], frozenset(content["transferred"])
        else:
            self.mean, self.std, transferred = self.weights_and_statistics(model, train)
        augmentation = Augmentation(mean=self.mean, std=self.std, pad=config["crop_pad"], flip=config["flip"],
                                    cutout=config["cutout"], zoom=config["zoom"], jitter=config["jitter"],
                                    trivial_augment=config["trivial_augment"], size=config["input_size"])
        batches = TrainBatches(self.train_set, config["batch_size"], seed=config["seed"], augmentation=augmentation,
                               device=self.device, share=ranks.share)
        self.trainer = Trainer(config, model, batches, self.device, precision=config["precision"],
                               compiled=self.compiled, transferred=transferred, ranks=ranks)
        self.best: dict | None = None
        self.finished = False
        if content:
            self.trainer.load_state(content)
            checkpoint.restore_random_states(content["rng"])
            self.best = content["best"]
        if not ranks.first:     # dropout must differ between ranks; rank 0 is as a process alone
            position = self.trainer.position
            torch.manual_seed(stable_seed("rank", config["seed"], ranks.rank, position.epoch, position.step))
        self.report: report.Report | None = None    # rank 0's
        self.health: dict[str, report.LevelHealth] = {}  # of the last epoch, per attention level
        self.warned: set[str] = set()
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def weights_and_statistics(self, model: nn.Module, train: ImageSet) -> tuple[tuple, tuple, frozenset[str]]:
        """Load what --init-from names. Returns the mean and std to normalise with, the source's where there is one (its
        first layers know no other input), and the names of the weights that went over."""
        with self.ranks.first_goes_ahead():     # to download it, once
            source = transfer.source_of(self.config["init_from"], model)
        if source:
            return source.mean, source.std, transfer.transfer(model, source, self.class_names)
        # A sanity pass without the weights takes the frozen stage all the same.
        pretended = self.sanity and self.config["freeze_epochs"] > 0
        names = frozenset(name for name in model.state_dict() if pretended and name.startswith("trunk."))
        return *channel_statistics(train), names

    def check_data(self, content: dict | None) -> None:
        """Raises UserError when a checkpoint was made with other classes, another number of images of one of them, or
        another image size than these."""
        if content and tuple(content["class_names"]) != self.class_names:
            raise UserError("the data set has changed since the run was stopped: its classes are not those of the "
                            "checkpoint. Bring the old images back (--data-dir), or start a new run")
        for name, before, now in zip(("training", self.eval_name), (content or {}).get("labels", ()), self.labels):
            if before != now:
                raise UserError(f"the data set has changed since the run was stopped: it had {before[0]:,} {name} images and "
                                f"has {now[0]:,}{' with other labels' if before[0] == now[0] else ''} now. Bring the old "
                                f"images back (--data-dir), or start a new run")
        if content and list(content["input_size"]) != self.config["input_size"]:
            raise UserError(f"the images are {self.config['input_size']} px now and were {content['input_size']} px "
                            f"when the run was stopped: bring the old ones back, or start a new run")

    # ---- the whole run ----

    def start(self, command: str, resumed: bool = False) -> None:
        """Open the report; of a resumed run after cutting back to the checkpoint what an earlier process has written."""
        epoch = self.trainer.position.epoch
        if not self.ranks.first:
            return
        self.folder = identity(self.run_dir)
        if resumed:     # and can go on: a run that is refused keeps all as it is
            checkpoint.prepare_to_write(self.run_dir, self.config)
            report.cut_back(self.run_dir, epoch or -1)
        self.commands = checkpoint.earlier_commands(self.run_dir) + [command]
        self.write_config()
        self.report = report.Report(self.run_dir, eval_name=self.eval_name)
        if epoch == 0:
            self.report.start(command, self.config, self.hparams())

    def hparams(self) -> dict:
        """Few, as TensorBoard ticks the first five by the alphabet; the whole configuration is there as text."""
        return {name: self.config[name] for name in ("batch_size", "epochs", "lr", "model", "recipe", "seed", "width")}

    def write_config(self) -> None:
        record = {"commands": self.commands, "config": self.config,
                  "resolved": {"device": str(self.device), "compile": self.compiled, "ranks": self.ranks.world_size,
                               "precision": self.config["precision"],
                               "checkpoint_activations": self.config["checkpoint_activations"]},
                  "environment": options.environment(self.device),
                  "data": {"train": self.train_set.source, "images": len(self.train_set),
                           f"{self.eval_name} images": len(self.eval_set), "classes": len(self.class_names)},
                  "sanity": self.sanity, "finished": self.finished}
        checkpoint.write_config(self.run_dir, record)

    def train(self) -> Evaluation:
        """Every epoch from the position to the end. Raises Interrupted after saving, when a signal came or when nobody
        reads what is printed any more."""
        trainer, epochs, last = self.trainer, self.config["epochs"], None
        with Signals() as signals:
            try:
                while trainer.position.epoch < epochs:
                    last = self.epoch(signals)
            except Interrupted:
                self.save()
                raise Interrupted(signals.received or signal.SIGTERM) from None  # it may have come to another rank
            except BrokenPipeError:
                if self.ranks.world_size > 1:   # the others are in the middle of a step
                    raise
                signals.nobody_reads()
                self.save()
                raise Interrupted(signals.received or getattr(signal, "SIGPIPE", signal.SIGTERM)) from None
            except RuntimeError as error:
                if self.ranks.lost_by(error) and self.ranks.steps_are_whole:
                    self.save()     # here, as torchrun sends a SIGTERM in a moment
                raise
            last = last or self.evaluate()  # stopped between its last epoch and its end
            self.finished = True
            if self.ranks.first:
                self.report.finish(epochs, self.hparams(), {"loss": last.loss, "top1": last.top1, "top5": last.top5})
                self.save()
                self.write_config()
        return last

    def epoch(self, signals: Callable[[], bool]) -> Evaluation:
        """Train one epoch, evaluate, report, save."""
        trainer, number = self.trainer, self.trainer.position.epoch + 1
        with Progress(f"epoch {number}/{self.config['epochs']}", len(trainer.batches), trainer.batches.images_a_step,
                      trainer.position.step) as progress:
            def on_check(step: int, loss: float) -> None:
                progress.at(step, loss)
                self.save_when_due()
            trainer.train_epoch(signals, on_check)
        row = trainer.epoch_metrics()
        trainer.check_weights()
        result = self.evaluate(signals)
        row |= {"eval_loss": result.loss, "eval_top1": result.top1, "eval_top5": result.top5}
        if self.ranks.first:
            self.show_attention(number)
            self.report.epoch(row)
        sizes, full = trainer.trained_at(), tuple(self.config["input_size"])
        average = ", moving average" if trainer.average else ""
        lags = " (lags while training images are smaller)" if sizes[1] != full else ""
        trained = " to ".join(dict.fromkeys(map(in_pixels, sizes)))
        print(f"epoch {number}/{self.config['epochs']}  train ({trained}) loss {row['train_loss']:.4f}, top-1 "
              f"{row['train_top1']:.2f} %  {self.eval_name} ({in_pixels(full)}{average}) loss {result.loss:.4f}, top-1 "
              f"{result.top1:.2f} %, top-5 {result.top5:.2f} %{lags}  {row['images_per_second']:.0f} images/s, "
              f"{row['seconds']:.1f} s", flush=True)
        trainer.next_epoch()
        if self.config["val_fraction"] and result.top1 > (self.best or {"top1": -1.0})["top1"]:
            self.best = {"epoch": number, "top1": result.top1}
            if self.ranks.first:
                self.check_folder()
                checkpoint.save_file(self.run_dir / checkpoint.BEST_NAME, self.content())
        if number == 1:
            self.save()
        else:
            self.save_when_due()
        return result

    def evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        self.trainer.recalibrate_batch_norm(self.recalibration_batches())
        self.trainer.broadcast_buffers()
        batches = eval_batches(self.eval_set, self.device, self.mean, self.std, self.config["input_size"],
                               self.ranks.share(len(self.eval_set)))
        return evaluate(self.trainer.eval_model, batches, len(self.class_names), self.trainer.precision, should_stop,
                        self.ranks)

    def recalibration_batches(self) -> Iterator[Tensor]:
        """Training images, evenly spread over the set and augmented as in training, the same ones every time."""
        chosen = torch.linspace(0, len(self.train_set) - 1, recalibration_count(len(self.train_set))).round().long()
        generator = torch.Generator(self.device)
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
        # No larger than in an evaluation, which has to fit anyway, and no single image: batch norm cannot take its variance.
        parts = parts_of(chosen, chosen, max(2, eval_batch_size(self.config["input_size"], self.device)))
        for number, (part, _) in enumerate(parts):
            generator.manual_seed(stable_seed("statistics", self.config["seed"], number))
            images = self.train_set.images.index_select(0, part.to(self.train_set.images.device))
            yield self.trainer.batches.augmentation(images.to(self.device), generator)

    # ---- attention ----

    @torch.no_grad()
    def show_attention(self, epoch: int) -> None:
        """Health (and, when they are due, overlays) of the same images every time; warnings are printed once."""
        model, every = self.trainer.eval_model, self.config["overlay_every"]
        if not model.levels:
            return
        count = min(OVERLAY_IMAGES, len(self.eval_set))
        chosen = torch.linspace(0, len(self.eval_set) - 1, count).round().long().to(self.eval_set.images.device)
        images, labels = self.eval_set.images[chosen], self.eval_set.labels[chosen].tolist()
        was_training = model.training
        model.eval()
        with self.trainer.precision.context():
            logits, scores = model.logits_and_scores(resize(normalise(images.to(self.device), self.mean, self.std),
                                                            self.config["input_size"]))
        model.train(was_training)
        self.health = report.attention_health(scores, self.trainer.position.gate_gradients, model.sigmoid_levels)
        self.report.health(epoch, self.health)
        warnings = {line.partition(":")[0].partition("(")[0]: line for line in report.health_warnings(self.health)}
        for what, line in warnings.items():
            if what not in self.warned:
                print(f"warning: {line}")
        self.warned = set(warnings)
        if every and (epoch % every == 0 or epoch == self.config["epochs"]):
            maps = {level: model.map_of(level, s).cpu().numpy() for level, s in scores.items()}
            chance, seen = logits.float().softmax(1).max(1)
            titles = [title_of(self.class_names[t], self.class_names[s], p)
                      for t, s, p in zip(labels, seen.tolist(), chance.tolist())]
            self.report.overlays(epoch, attention_sheet(images.cpu().numpy(), maps, titles))

    # ---- checkpoints ----

    def content(self) -> dict:
        """All that going on, --evaluate and cam.py need, as plain values."""
        return {"format": checkpoint.FORMAT, **self.trainer.state(), "best": self.best, "config": dict(self.config),
                "class_names": list(self.class_names), "labels": self.labels,
                "input_size": list(self.config["input_size"]),
                "mean": list(self.mean), "std": list(self.std), "rng": checkpoint.random_states(),
                "finished": self.finished}

    def save(self) -> None:
        self.trainer.check_weights()  # never weights that have diverged over a good checkpoint
        started = time.monotonic()
        if self.ranks.first:
            self.check_folder()
            checkpoint.save_checkpoint(self.run_dir, self.content())
            self.folder = identity(self.run_dir)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

    def check_folder(self) -> None:
        """A run's folder that was moved away is made again, so that nothing is lost. Raises UserError where another one has
        been put in its place: what is in there is somebody's."""
        if identity(self.run_dir) not in (None, self.folder):
            raise UserError(f"{self.run_dir} is another folder now than the one that this run began in, and nothing was "
                            f"written there. Bring the run's folder back, then --resume it")

    def save_when_due(self) -> None:
        """In mid-epoch too: about a minute of work is at risk, however long an epoch takes (or fifty times what a save
        takes, on a slow disk)."""
        if time.monotonic() - self.saved_at >= max(SAVE_EVERY, self.save_seconds / SAVE_SHARE):
            self.save()


class Progress:
    """A bar in a terminal or a notebook; in a log file a line a minute."""

    def __init__(self, title: str, steps: int, batch_size: int, start: int):
        self.title, self.steps, self.start = title, steps, start
        self.batch_size, self.said_at, self.began = batch_size, time.monotonic(), time.monotonic()
        self.live = (sys.stderr.isatty() or "ipykernel" in sys.modules) and of_environment().first
        self.bar = tqdm(total=steps * batch_size, initial=start * batch_size, desc=title, unit=" images", leave=False,
                        disable=not self.live, unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def at(self, step: int, loss: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(step * self.batch_size - self.bar.n)
        now = time.monotonic()
        if not self.live and now - self.said_at >= 60:
            self.said_at = now
            rate = (step - self.start) / (now - self.began)
            print(f"{self.title}  step {step}/{self.steps}  loss {loss:.3f}  {rate * self.batch_size:.0f} images/s  "
                  f"{clock((self.steps - step) / rate)} left in this epoch", flush=True)


def split(config: dict, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """What is trained on and what is evaluated: the two sets, or with --val-fraction two parts of the first."""
    return split_validation(train, config["val_fraction"], config["seed"]) if config["val_fraction"] else (train, test)


def build(config: dict, num_classes: int) -> nn.Module:
    """The network of a config, with fresh weights."""
    try:
        return build_model(config["model"], num_classes, width=config["width"], trunk=config["trunk"] or None,
                           dropout=config["dropout"], pool4=config["pool4"])
    except ValueError as error:
        raise UserError(str(error), 2) from None


def fingerprint(image_set: ImageSet) -> list[int]:
    """The number of images, and a checksum of their labels in order."""
    return [len(image_set), zlib.crc32(image_set.labels.cpu().numpy().tobytes())]


def recalibration_count(images: int) -> int:
    """How many of the training images batch norm's statistics are taken anew from."""
    least, most = RECALIBRATION_IMAGES
    return min(images, max(least, min(most, images // 12)))


def in_pixels(size: tuple[int, int]) -> str:
    """(height, width) for people: 32 px, 24x36 px."""
    height, width = size
    return f"{height} px" if height == width else f"{height}x{width} px"


def input_size(config: dict, train: ImageSet) -> list[int]:
    """[height, width] that the network sees: --image-size, or that of the images."""
    return [config["image_size"]] * 2 if config["image_size"] else list(train.image_size)


def eval_batch_size(size, device: torch.device) -> int:
    """Images of (height, width) in a batch of an evaluation."""
    return max(1, EVAL_PIXELS[device.type] // (size[0] * size[1]))


def eval_batches(image_set: ImageSet, device: torch.device, mean, std, size,
                 part: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
    """The set (or a part of it) in order, as large normalised batches on the device; the whole picture, resized to
    `size`."""
    count = eval_batch_size(size, device)
    start, end, _ = part.indices(len(image_set))
    for first in range(start, end, count):
        chosen = slice(first, min(first + count, end))
        images, labels = (t[chosen].to(device, non_blocking=True) for t in (image_set.images, image_set.labels))
        yield resize(normalise(images, mean, std), size), labels


def clock(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 10 s, 5 h 02 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
