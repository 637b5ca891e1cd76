"""The training loop: one optimizer step, one epoch, and the state between them. Every run goes
through here.

Nothing in the loop waits for the device (but fp16's loss scaler): sums stay there and are read
about once a second and at the end of the epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attention_model import Network
from common.device import Precision, peak_memory_mib
from common.errors import Interrupted, UserError, is_oom_error, one_line
from data import TrainBatches, resize
from training import advice
from training.batch_norm import BatchNormPolicy
from training.optim import (
    EMA,
    grad_norm,
    input_size_at,
    lr_at,
    make_optimizer,
    width_factor,
)
from training.ranks import ALONE, Ranks


@dataclasses.dataclass
class TrainState:
    """Where a run is. ``step`` counts the optimizer steps of the epoch that is under way, from 0."""

    epoch: int = 0  # epochs that are whole: trained, evaluated, reported
    step: int = 0
    seconds: float = 0.0  # of training in the epoch under way
    # of the epoch's last step, per attention level
    gate_gradients: dict = dataclasses.field(default_factory=dict)


class Trainer:
    """A network, its optimizer and its moving average, and where the run is.

    ``transferred`` names the weights that came from another network (see transfer.py): they train
    at a rate of their own, and those of them in the trunk not before ``freeze_epochs``."""

    # seconds between looks at the loss on a GPU: a look waits for it. A CPU's are free
    SYNC_EVERY = 1.0
    RANK_SYNC_EVERY = 20  # steps between looks of several ranks, which must look at the same step

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
        # batch norm sees the whole batch, as on one GPU
        if ranks.world_size > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.model.checkpoint_activations = config["checkpoint_activations"]
        self.parallel = self.model
        # some parameters have no gradient, by the mathematics (pc) or while they are frozen
        if ranks.world_size > 1:
            unused = bool(self.model.parameters_without_gradient() or config["freeze_epochs"])
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=unused)
        if compiled:  # for each image size, part of a batch, and frozen or not
            torch._dynamo.config.cache_size_limit = 64
        self.run_model = torch.compile(self.parallel, dynamic=False) if compiled else self.parallel
        self.compile_is_optional = compiled and config["compile"] == "auto"
        self.transferred = transferred
        self.optimizer = make_optimizer(self.model, config, precision, transferred)
        self.precision = Precision(precision, device)
        self.ema = (
            EMA(self.model, config["ema_decay"], config["ema_share"])
            if config["ema_decay"]
            else None
        )
        self.position = TrainState()
        # of the epoch so far: loss * images, correct, steps until the loss was not finite; and all
        # steps, on the host
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.summed = 0
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
        """The weights to evaluate and to use: the moving average where there is one."""
        return self.ema.model if self.ema else self.model

    # ---- state ----

    def state(self) -> dict:
        """What a checkpoint needs to resume bit for bit. The model's keys have no wrapper's prefix."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "position": dataclasses.asdict(self.position)
            | {"sums": [*self.sums[:2].tolist(), self.images_summed]},
            "schedule": {"epochs": self.config["epochs"], "steps_an_epoch": len(self.batches)},
            "micro_batch": self.micro_batch,
            "transferred": sorted(self.transferred),
        }

    def load_state(self, state: dict) -> None:
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
            # reduced after out-of-memory; not a number that was asked for
            self.micro_batch = state["micro_batch"]
        if state["schedule"]["steps_an_epoch"] != len(self.batches):
            raise UserError(
                f"the data set has changed since the run was stopped: an epoch had "
                f"{state['schedule']['steps_an_epoch']} steps and has {len(self.batches)} now. Bring the old "
                f"images back, or start a new run"
            )

    # ---- training ----

    def train_epoch(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        on_check: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        """The rest of the epoch at ``position``. ``on_check(step, mean loss)`` is called when the
        loss has been looked at and a checkpoint may be saved.

        Raises Interrupted (after a whole step), UserError for a non-finite loss or when memory runs
        out."""
        position, steps = self.position, len(self.batches)
        self.batch_norm.mode = None
        started, before = time.perf_counter(), position.seconds
        looked = started
        for images, labels in self.batches.epoch(position.epoch, position.step):
            self.step(images, labels)
            position.step += 1
            position.seconds = before + time.perf_counter() - started
            if position.step == steps:
                position.gate_gradients = {
                    level: grad_norm(parameters)
                    for level, parameters in self.model.gate_parameters().items()
                }
            at_check = position.step == steps or self.sync_due(position.step, looked)
            # Several ranks agree on the step to stop at; that waits for the device, so they ask at
            # checks only.
            stop = (
                self.ranks.any_rank(should_stop())
                if at_check or self.ranks.world_size == 1
                else False
            )
            if at_check or stop:
                loss = self.checked_loss()
                looked = time.perf_counter()
                position.seconds = before + looked - started
                if stop:
                    raise Interrupted
                on_check(position.step, loss)
                started += time.perf_counter() - looked  # a save is not training

    def sync_due(self, step: int, looked: float) -> bool:
        """Whether to look at the loss after this step; the last look was at ``looked``."""
        if self.device.type == "cpu":
            return True
        if self.ranks.world_size > 1:
            return step % self.RANK_SYNC_EVERY == 0
        return time.perf_counter() - looked >= self.SYNC_EVERY

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on a batch (N, 3, H, W), in parts of at most ``micro_batch`` images.
        When memory runs out, the whole step is done again in smaller parts: the optimizer never
        sees half a batch."""
        config, steps = self.config, len(self.batches)
        done = self.done
        images = resize(images, input_size_at(config, done, steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config, done, steps) * group.get("scale", 1.0)
        if done == math.ceil(config["freeze_epochs"] * steps) > 0:
            print(
                f"The trunk trains from here on (epoch {self.position.epoch + 1}, step {self.position.step + 1})."
            )
        while True:
            self.batch_norm.set_train_mode(done, self.micro_batch)
            try:
                self.gradients(images, labels)
                break
            except Exception as error:
                full, reason = is_oom_error(error), one_line(error)[:200]
                if not (full or self.compile_is_optional):
                    raise
            # Outside the except, whose traceback holds the activations.
            if full:
                self.halve_micro_batch(len(images), reason)
            # no C compiler, no Python.h, a card that Triton does not know: the night's run must not
            # end on it
            else:
                self.run_model, self.compile_is_optional = self.parallel, False
                print(
                    f"torch.compile failed ({reason}): training without it, slower (--no-compile avoids the attempt)"
                )
        if self.precision.scaler.is_enabled():
            # here, so that the gates' gradient norms are the true ones
            self.precision.scaler.unscale_(self.optimizer)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.ema:
            self.ema.update(done, config["epochs"] * steps)

    @property
    def images_summed(self) -> float:
        """Images that ``sums`` is of."""
        return float(self.summed * self.batches.images_per_step)

    @property
    def done(self) -> int:
        """Optimizer steps of the run so far."""
        return self.position.epoch * len(self.batches) + self.position.step

    def trained_at(self) -> list[tuple[int, int]]:
        """(height, width) of the images in the epoch's first and last step so far."""
        steps = len(self.batches)
        return [
            input_size_at(self.config, step, steps) or tuple(self.config["input_size"])
            for step in (self.position.epoch * steps, max(0, self.done - 1))
        ]

    def gradients(self, images: Tensor, labels: Tensor) -> None:
        """Fresh gradients of the mean loss of the batch on the parameters. Its sums are added when
        the whole batch is through."""
        self.optimizer.zero_grad(set_to_none=True)
        sums, alone = torch.zeros_like(self.sums), self.ranks.world_size == 1
        total = len(images) if alone else self.batches.images_per_step
        # Every rank must make as many parts: in each, SyncBatchNorm meets the others.
        shares = (total // self.ranks.world_size, math.ceil(total / self.ranks.world_size))
        parts = list(split_micro_batches(images, labels, self.micro_batch, shares))
        # around all parts, as autocast forgets its casts of the weights at the end
        with self.precision.context():
            for number, (part, answers) in enumerate(parts, start=1):
                # Ranks exchange gradients once a step, at its last part.
                with (
                    contextlib.nullcontext()
                    if alone or number == len(parts)
                    else self.parallel.no_sync()
                ):
                    logits = self.run_model(part)
                    with self.precision.off():
                        loss = F.cross_entropy(
                            logits.float(), answers, label_smoothing=self.config["label_smoothing"]
                        )
                        # DistributedDataParallel takes the mean over the ranks.
                        weight = len(answers) / total * self.ranks.world_size
                        self.precision.scaler.scale(
                            loss if weight == 1 else loss * weight
                        ).backward()
                        sums[0].add_(loss.detach(), alpha=len(answers))
                        sums[1].add_((logits.detach().argmax(1) == answers).sum())
        self.ranks.all_reduce(sums)
        self.sums += sums
        self.sums[2].add_(self.sums[0] < math.inf)  # a sum that is not finite stays so
        self.summed += 1

    def halve_micro_batch(self, batch: int, reason: str) -> None:
        """After out-of-memory. Raises UserError when that is not wanted or not possible."""
        self.optimizer.zero_grad(set_to_none=True)
        now = min(self.micro_batch or batch, batch)
        if self.config["micro_batch"] != "auto" or now <= 1 or self.ranks.world_size > 1:
            raise advice.out_of_memory(
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
            f"Out of memory with {now} images at once: continuing with --micro-batch {self.micro_batch} (the batch stays "
            f"{batch}: gradients add up over the parts). {self.batch_norm.note(self.micro_batch)}"
        )

    def recalibrate_batch_norm(self, images: Iterator[Tensor]) -> None:
        """Take the statistics of the network that is evaluated anew from training images (N, 3, H,
        W), the same for all ranks; what was frozen in the last step stays as it was used."""
        self.batch_norm.recalibrate(
            self.eval_model, images, self.precision, max(0, self.done - 1), self.micro_batch
        )
        self.broadcast_buffers()

    def broadcast_buffers(self) -> None:
        """Rank 0's batch-norm statistics for all, before they are used; each rank's are of its own
        part of the batches."""
        self.ranks.broadcast(self.model.buffers())
        if self.ema:
            self.ranks.broadcast(self.ema.model.buffers())

    def checked_loss(self) -> float:
        """The epoch's mean loss so far. Raises UserError when a loss was not finite."""
        loss_sum, _, finite = self.sums.tolist()
        if finite < self.summed:
            raise self.diverged("the loss", int(finite) + 1)
        return loss_sum / self.images_summed if self.summed else math.nan

    def check_weights(self) -> None:
        """Before anything is saved. Raises UserError when a weight is not finite, whatever the
        losses were."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            raise self.diverged("a weight", self.position.step)

    def diverged(self, what: str, step: int) -> UserError:
        return advice.diverged(
            what,
            epoch=self.position.epoch + 1,
            step=step,
            steps=len(self.batches),
            precision=self.precision.name,
        )

    def epoch_metrics(self) -> dict:
        """The training half of a metrics row, for the epoch that has just ended."""
        loss_sum, correct, _ = self.sums.tolist()
        images = self.images_summed
        epoch, steps = self.position.epoch, len(self.batches)
        rate = lr_at(self.config, epoch * steps + steps - 1, steps) * width_factor(self.config)
        return {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": loss_sum / images,
            "train_top1": 100 * correct / images,
            "images_per_second": images / max(self.position.seconds, 1e-9),
            "seconds": self.position.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    def next_epoch(self) -> None:
        """The epoch is whole: trained, evaluated, reported."""
        self.position = TrainState(epoch=self.position.epoch + 1)
        self.sums.zero_()
        self.summed = 0


def split_micro_batches(
    images: Tensor, labels: Tensor, micro_batch: int | None, shares: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into near-equal parts of at most ``micro_batch`` images, none of a single one
    (batch norm cannot train on it) unless the batch or ``micro_batch`` is. ``shares``: images of
    the rank with the fewest, and with the most; each makes as many parts."""
    least, most = shares or (len(images), len(images))
    pieces = 1 if not micro_batch else math.ceil(most / micro_batch)
    pieces = min(pieces, least if micro_batch == 1 else max(1, least // 2))
    yield from zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
