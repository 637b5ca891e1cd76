"""The training loop of every run: one optimizer step, one epoch, and the state between them.

Nothing in the loop waits for the device (except fp16's loss scaler): sums stay there and are read
about once per second and at the end of the epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attention_model import Network
from common.device import Precision, peak_memory_mib
from common.errors import Interrupted, UserError, is_oom_error, one_line
from data import TrainBatches, resize
from training import failures
from training.batch_norm import BatchNormPolicy
from training.optim import EMA, grad_norm, make_optimizer, width_factor
from training.ranks import ALONE, Ranks
from training.schedules import input_size_at, lr_at


class StepPoint(NamedTuple):
    """A point of the curves by step."""

    step: int  # optimizer steps of the run, this one included
    loss: float  # mean training loss since the point before, in nats
    lr: float  # learning rate of this step (see ``Trainer.rate_at``)


@dataclasses.dataclass
class TrainState:
    """The position of a run."""

    epoch: int = 0  # completed epochs: trained, evaluated, reported
    step: int = 0  # completed optimizer steps of the current epoch
    seconds: float = 0.0  # of training in the current epoch
    # of the epoch's last step, per attention level
    gate_gradients: dict[str, float | None] = dataclasses.field(default_factory=dict)
    # the epoch's steps and summed loss at its last point of the curves by step
    point: tuple[int, float] = (0, 0.0)


class Trainer:
    """A network with its optimizer and its moving average, and the position of the run.

    ``transferred``: names of the weights that came from another network (training/transfer.py).
    They train at a rate of their own, and those of the trunk only after ``freeze_epochs``."""

    # seconds between reads of the loss on a GPU, which wait for it; a CPU's do not
    SYNC_EVERY = 1.0
    # steps between reads with several ranks, which must read at the same step
    RANK_SYNC_EVERY = 20
    POINTS = 50  # of the curves by step, per epoch, about

    def __init__(
        self,
        config: dict,
        model: Network,
        batches: TrainBatches,
        device: torch.device,
        *,
        precision: str,
        compiled: bool = False,
        transferred: frozenset[str] = frozenset(),
        ranks: Ranks = ALONE,
    ):
        self.config, self.batches, self.device, self.ranks = config, batches, device, ranks
        if ranks.world_size > 1 and device.type == "cuda":
            # batch norm sees the whole batch, as on one GPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.model.checkpoint_activations = config["checkpoint_activations"]
        self.parallel = self.model
        if ranks.world_size > 1:
            # some parameters have no gradient, by the mathematics (pc) or while they are frozen
            unused = bool(self.model.parameters_without_gradient() or config["freeze_epochs"])
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=unused)
        self.run_model = self.parallel
        if compiled:
            # a graph per image size, part of a batch, and frozen or not
            torch._dynamo.config.cache_size_limit = 64
            self.run_model = torch.compile(self.parallel, dynamic=False)
        self.compile_is_optional = compiled and config["compile"] == "auto"
        self.transferred = transferred
        self.optimizer = make_optimizer(self.model, config, precision, transferred)
        self.precision = Precision(precision, device)
        self.ema: EMA | None = None
        if config["ema_decay"]:
            self.ema = EMA(self.model, config["ema_decay"], config["ema_share"])
        self.position = TrainState()
        # of the epoch so far: loss * images, correct, steps until the loss was not finite; and all
        # steps, on the host
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.summed = 0
        # points of the curves by step that take_points has not read yet: (step of the epoch, sum)
        self.point_sums: list[tuple[int, Tensor]] = []
        self.point_every = max(1, round(len(batches) / self.POINTS))
        self.micro_batch = None if config["micro_batch"] == "auto" else config["micro_batch"]
        self.batch_norm = BatchNormPolicy(
            self.model,
            transferred,
            freeze_steps=config["freeze_epochs"] * len(batches),
            images_per_step=batches.images_per_step,
            device=device,
            ranks=ranks,
        )

    @property
    def eval_model(self) -> Network:
        """The network to evaluate and to use: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    # ---- state ----------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint needs to resume bit for bit. Weights are by the bare model's names."""
        sums = [*self.sums[:2].tolist(), self.images_summed]
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "position": dataclasses.asdict(self.position) | {"sums": sums},
            "schedule": {"epochs": self.config["epochs"], "steps_an_epoch": len(self.batches)},
            "micro_batch": self.micro_batch,
            "transferred": sorted(self.transferred),
        }

    def load_state(self, state: dict) -> None:
        """Resume from ``state`` (see there). Raises UserError where an epoch has another number of
        steps."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        position = dict(state["position"])
        loss, correct, _ = position.pop("sums")
        self.position = TrainState(**position)
        self.summed = self.position.step
        self.sums = torch.tensor(
            [loss, correct, self.summed], dtype=torch.float64, device=self.device
        )
        if self.config["micro_batch"] == "auto" == state.get("config", self.config)["micro_batch"]:
            # reduced after out-of-memory; a number that was asked for is not kept
            self.micro_batch = state["micro_batch"]
        steps_before = state["schedule"]["steps_an_epoch"]
        if steps_before != len(self.batches):
            raise UserError(
                f"the data set has changed since the run was stopped: an epoch had {steps_before} "
                f"steps and has {len(self.batches)} now. Bring the old images back, or start a "
                f"new run"
            )

    # ---- training -------------------------------------------------------------------------------

    def train_epoch(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        on_check: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        """Train the rest of the epoch at ``position``. ``on_check(step, mean loss)`` is called
        whenever the loss has been read; it may save a checkpoint.

        Raises Interrupted (after a whole step), and UserError for a non-finite loss or out of
        memory."""
        position, steps = self.position, len(self.batches)
        self.batch_norm.mode = None
        started, before = time.perf_counter(), position.seconds
        checked_at = started
        for images, labels in self.batches.epoch(position.epoch, position.step):
            self.step(images, labels)
            position.step += 1
            position.seconds = before + time.perf_counter() - started
            if position.step % self.point_every == 0 or position.step == steps:
                self.point_sums.append((position.step, self.sums[0].clone()))
            if position.step == steps:
                position.gate_gradients = {
                    level: grad_norm(parameters)
                    for level, parameters in self.model.gate_parameters().items()
                }
            at_check = position.step == steps or self.sync_due(position.step, checked_at)
            # Several ranks agree on the step to stop at; that waits for the device, so they do it
            # at checks only.
            may_stop = at_check or self.ranks.world_size == 1
            stop = may_stop and self.ranks.any_rank(should_stop())
            if at_check or stop:
                loss = self.checked_loss()
                checked_at = time.perf_counter()
                position.seconds = before + checked_at - started
                if stop:
                    raise Interrupted
                on_check(position.step, loss)
                started += time.perf_counter() - checked_at  # a save is not training

    def sync_due(self, step: int, checked_at: float) -> bool:
        """Whether to read the loss after this step; it was last read at ``checked_at``."""
        if self.device.type == "cpu":
            return True
        if self.ranks.world_size > 1:
            return step % self.RANK_SYNC_EVERY == 0
        return time.perf_counter() - checked_at >= self.SYNC_EVERY

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on a batch (N, 3, H, W), in parts of at most ``micro_batch`` images.
        When memory runs out, the whole step is repeated in smaller parts: the optimizer never sees
        half a batch. Raises UserError where that is not possible."""
        config, steps = self.config, len(self.batches)
        done = self.global_step
        images = resize(images, input_size_at(config, done, steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config, done, steps) * group.get("scale", 1.0)
        if done == math.ceil(config["freeze_epochs"] * steps) > 0:
            epoch, step = self.position.epoch + 1, self.position.step + 1
            print(f"The trunk trains from here on (epoch {epoch}, step {step}).")
        while True:
            self.batch_norm.set_train_mode(done, self.micro_batch)
            try:
                self.gradients(images, labels)
                break
            except Exception as error:
                out_of_memory, reason = is_oom_error(error), one_line(error)[:200]
                if not (out_of_memory or self.compile_is_optional):
                    raise
            # outside the except clause, whose traceback holds the activations
            if out_of_memory:
                self.halve_micro_batch(len(images), reason)
            else:
                self.stop_compiling(reason)
        if self.precision.scaler.is_enabled():
            # here, so that the gates' gradient norms are the unscaled ones
            self.precision.scaler.unscale_(self.optimizer)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.ema:
            self.ema.update(done, config["epochs"] * steps)

    @property
    def images_summed(self) -> float:
        """How many images ``sums`` covers."""
        return float(self.summed * self.batches.images_per_step)

    @property
    def global_step(self) -> int:
        """Optimizer steps of the run so far."""
        return self.position.epoch * len(self.batches) + self.position.step

    def trained_at(self) -> list[tuple[int, int]]:
        """(height, width) of the images in the epoch's first and last step so far."""
        steps = len(self.batches)
        return [
            input_size_at(self.config, step, steps) or tuple(self.config["input_size"])
            for step in (self.position.epoch * steps, max(0, self.global_step - 1))
        ]

    def gradients(self, images: Tensor, labels: Tensor) -> None:
        """Set the parameters' gradients to those of the batch's mean loss. ``sums`` is updated when
        the whole batch is done."""
        self.optimizer.zero_grad(set_to_none=True)
        sums, alone = torch.zeros_like(self.sums), self.ranks.world_size == 1
        total = len(images) if alone else self.batches.images_per_step
        # every rank must have as many parts: in each, SyncBatchNorm meets the others
        shares = (total // self.ranks.world_size, math.ceil(total / self.ranks.world_size))
        parts = list(split_micro_batches(images, labels, self.micro_batch, shares))
        smoothing = self.config["label_smoothing"]
        # around all parts, as autocast drops its casts of the weights at the end
        with self.precision.context():
            for number, (part, targets) in enumerate(parts, start=1):
                # ranks exchange gradients once per step, at its last part
                exchange = alone or number == len(parts)
                with contextlib.nullcontext() if exchange else self.parallel.no_sync():
                    logits = self.run_model(part)
                    with self.precision.off():
                        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                        # DistributedDataParallel takes the mean over the ranks
                        weight = len(targets) / total * self.ranks.world_size
                        weighted = loss if weight == 1 else loss * weight
                        self.precision.scaler.scale(weighted).backward()
                        sums[0].add_(loss.detach(), alpha=len(targets))
                        sums[1].add_((logits.detach().argmax(1) == targets).sum())
        self.ranks.all_reduce(sums)
        self.sums += sums
        self.sums[2].add_(self.sums[0] < math.inf)  # a sum that is not finite stays so
        self.summed += 1

    def halve_micro_batch(self, batch: int, reason: str) -> None:
        """Halve the micro-batch after out-of-memory. Raises UserError where that is not allowed
        (--micro-batch N) or not possible."""
        self.optimizer.zero_grad(set_to_none=True)
        now = min(self.micro_batch or batch, batch)
        if self.config["micro_batch"] != "auto" or now <= 1 or self.ranks.world_size > 1:
            raise failures.out_of_memory(
                self.config,
                self.model,
                self.device,
                self.precision.name,
                micro_batch=now,
                ranks=self.ranks.world_size,
                reason=reason,
            )
        self.micro_batch = now // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"Out of memory with {now} images at once: continuing with "
            f"--micro-batch {self.micro_batch} (the batch stays {batch}: gradients add up over "
            f"the parts). {self.batch_norm.note(self.micro_batch)}"
        )

    def stop_compiling(self, reason: str) -> None:
        """Train without torch.compile: without a C compiler or Python.h, or on a card that Triton
        does not know, an overnight run must not fail."""
        self.run_model, self.compile_is_optional = self.parallel, False
        print(
            f"torch.compile failed ({reason}): training without it, slower "
            f"(--no-compile avoids the attempt)"
        )

    def recalibrate_batch_norm(self, images: Iterator[Tensor]) -> None:
        """Recompute the batch-norm statistics of ``eval_model`` from training images (N, 3, H, W),
        the same on all ranks. What was frozen in the last step keeps its statistics."""
        self.batch_norm.recalibrate(
            self.eval_model, images, self.precision, max(0, self.global_step - 1), self.micro_batch
        )
        self.broadcast_buffers()

    def broadcast_buffers(self) -> None:
        """Give all ranks rank 0's batch-norm statistics, before they are used: each rank's are of
        its own part of the batches."""
        self.ranks.broadcast(self.model.buffers())
        if self.ema:
            self.ranks.broadcast(self.ema.model.buffers())

    def checked_loss(self) -> float:
        """The epoch's mean loss so far. Raises UserError where a loss was not finite."""
        loss_sum, _, finite = self.sums.tolist()
        if finite < self.summed:
            raise self.diverged("the loss", int(finite) + 1)
        return loss_sum / self.images_summed if self.summed else math.nan

    def take_points(self) -> list[StepPoint]:
        """The points of the curves by step since the last call. Waits for the device. Called before
        every save, so that none is missing, or twice there, after a resume."""
        steps, points = len(self.batches), []
        reached = [step for step, _ in self.point_sums]
        sums = torch.stack([total for _, total in self.point_sums]).tolist() if reached else []
        self.point_sums = []
        for step, total in zip(reached, sums, strict=True):
            step_before, total_before = self.position.point
            images = (step - step_before) * self.batches.images_per_step
            done = self.position.epoch * steps + step
            points.append(StepPoint(done, (total - total_before) / images, self.rate_at(done - 1)))
            self.position.point = (step, total)
        return points

    def rate_at(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0) of the run, of all weights but Muon's
        filters and transferred ones."""
        return lr_at(self.config, step, len(self.batches)) * width_factor(self.config)

    def check_weights(self) -> None:
        """Called before anything is saved. Raises UserError where a weight is not finite, whatever
        the losses were."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            raise self.diverged("a weight", self.position.step)

    def diverged(self, subject: str, step: int) -> UserError:
        """The error for a ``subject`` that is not finite at this step (from 1) of the epoch."""
        return failures.diverged(
            subject,
            epoch=self.position.epoch + 1,
            step=step,
            steps=len(self.batches),
            precision=self.precision.name,
        )

    def epoch_metrics(self) -> dict:
        """The training columns of metrics.csv, for the epoch that has just ended."""
        loss_sum, correct, _ = self.sums.tolist()
        images = self.images_summed
        epoch = self.position.epoch
        return {
            "epoch": epoch + 1,
            "lr": self.rate_at((epoch + 1) * len(self.batches) - 1),
            "train_loss": loss_sum / images,
            "train_top1": 100 * correct / images,
            "images_per_second": images / max(self.position.seconds, 1e-9),
            "seconds": self.position.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    def next_epoch(self) -> None:
        """Move on, after the epoch was trained, evaluated and reported."""
        self.position = TrainState(epoch=self.position.epoch + 1)
        self.sums.zero_()
        self.summed = 0
        self.point_sums = []


def split_micro_batches(
    images: Tensor, labels: Tensor, micro_batch: int | None, shares: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into near-equal parts of at most ``micro_batch`` images. None has a single
    image (batch norm cannot train on it) unless the batch or ``micro_batch`` is 1.

    ``shares``: images of the rank with the fewest, and with the most; each makes as many parts."""
    least, most = shares or (len(images), len(images))
    count = 1 if not micro_batch else math.ceil(most / micro_batch)
    count = min(count, least if micro_batch == 1 else max(1, least // 2))
    yield from zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
