"""The training loop: one step, one epoch, one evaluation. Every run goes through here, whatever its length.

Nothing in the loop waits for the device (but fp16's loss scaler): sums stay there and are read about once a second and
at the epoch's end.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel

from attention_model import without_norms
from augmentation import resize
from image_files import one_line
from training.optimise import (MovingAverage, Precision, grad_norm, input_size_at, learning_rate, make_optimizer,
                               width_factor)
from training.options import UserError
from training.ranks import Ranks


SMALLEST_FOR_STATISTICS = 8     # images; batch norm's mean and variance of fewer are mostly noise


# What else than OutOfMemoryError says that memory ran out: the CPU's allocator, CUDA, its libraries and Triton. And what
# may: a library that finds no memory to begin with; cuDNN, of which PyTorch tries every algorithm and swallows each one's
# out-of-memory.
NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
PERHAPS_NO_MEMORY = ("STATUS_NOT_INITIALIZED", "unable to find an engine to execute this computation")


class Interrupted(Exception):
    """Raised between two steps (or two batches of an evaluation) when a signal asks the run to end."""


@dataclasses.dataclass
class Position:
    """Where a run is. ``step`` counts the optimizer steps of the epoch that is under way, from 0."""
    epoch: int = 0          # epochs that are whole: trained, evaluated, reported
    step: int = 0
    seconds: float = 0.0    # of training in the epoch under way
    gate_gradients: dict = dataclasses.field(default_factory=dict)  # of the epoch's last step, per attention level


@dataclasses.dataclass
class Evaluation:
    """Loss (cross-entropy in nats), top-1 and top-5 in percent; images and correct ones of each class."""
    loss: float
    top1: float
    top5: float
    class_counts: list[int]
    class_correct: list[int]


class Trainer:
    """A network, its optimizer and its moving average, and the position in the run.

    ``transferred`` names the weights that came from another network (see transfer.py): they train at a rate of their own,
    and those of them in the trunk not before ``freeze_epochs``."""

    LOOK_EVERY = 1.0        # seconds between looks at the loss on a GPU: a look waits for it. A CPU's are free
    RANKS_MEET_EVERY = 20   # steps between looks of several ranks, which must look at the same step

    def __init__(self, config: dict, model: nn.Module, batches, device: torch.device, *, precision: str,
                 compiled: bool = False, transferred: frozenset[str] = frozenset(), ranks: Ranks = Ranks()):
        self.config, self.batches, self.device, self.ranks = config, batches, device, ranks
        if ranks.world_size > 1 and device.type == "cuda":   # batch norm sees the whole batch, as on one GPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.model.checkpoint_activations = config["checkpoint_activations"]
        self.parallel = self.model
        if ranks.world_size > 1:     # some parameters have no gradient, by the mathematics (pc) or while they are frozen
            unused = bool(self.model.parameters_without_gradient() or config["freeze_epochs"])
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=unused)
        if compiled:    # for each image size, part of a batch, and frozen or not
            torch._dynamo.config.cache_size_limit = 64
        self.run_model = torch.compile(self.parallel, dynamic=False) if compiled else self.parallel
        self.may_do_without_compiling = compiled and config["compile"] == "auto"
        self.transferred = transferred
        self.optimizer = make_optimizer(self.model, config, precision, transferred)
        self.precision = Precision(precision, device)
        self.average = (MovingAverage(self.model, config["ema_decay"], config["ema_share"]) if config["ema_decay"]
                        else None)
        self.position = Position()
        # of the epoch so far: loss * images, correct, steps until the loss was not finite; and all steps, on the host
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.summed = 0
        self.micro_batch = None if config["micro_batch"] == "auto" else config["micro_batch"]
        self.mode: tuple | None = None  # see set_mode; None: to be set

    @property
    def eval_model(self) -> nn.Module:
        """The weights to evaluate and to use: the moving average where there is one."""
        return self.average.model if self.average else self.model

    # ---- state ----

    def state(self) -> dict:
        """What a checkpoint needs to go on with, bit for bit. The model's keys are clean: no wrapper's prefix."""
        return {"model": self.model.state_dict(), "ema": self.average.model.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.precision.scaler.state_dict(),
                "position": dataclasses.asdict(self.position) | {"sums": [*self.sums[:2].tolist(), self.images_summed]},
                "schedule": {"epochs": self.config["epochs"], "steps_an_epoch": len(self.batches)},
                "micro_batch": self.micro_batch, "transferred": sorted(self.transferred)}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        position = dict(state["position"])
        loss, correct, _ = position.pop("sums")
        self.position = Position(**position)
        self.summed = self.position.step
        self.sums = torch.tensor([loss, correct, self.summed], dtype=torch.float64, device=self.device)
        if self.config["micro_batch"] == "auto" == state.get("config", self.config)["micro_batch"]:
            self.micro_batch = state["micro_batch"]     # to which it came; not a number that was asked for then
        if state["schedule"]["steps_an_epoch"] != len(self.batches):
            raise UserError(f"the data set has changed since the run was stopped: an epoch had "
                            f"{state['schedule']['steps_an_epoch']} steps and has {len(self.batches)} now. Bring the old "
                            f"images back, or start a new run")

    # ---- training ----

    def train_epoch(self, should_stop: Callable[[], bool] = lambda: False,
                    on_check: Callable[[int, float], None] = lambda step, loss: None) -> None:
        """The rest of the epoch at ``position``. ``on_check(step, mean loss)`` is called when the loss has been
        looked at and a checkpoint may be saved.

        Raises Interrupted (after a whole step), UserError for a non-finite loss or when memory runs out."""
        position, steps = self.position, len(self.batches)
        self.mode = None
        started, before = time.perf_counter(), position.seconds
        looked = started
        for images, labels in self.batches.epoch(position.epoch, position.step):
            self.step(images, labels)
            position.step += 1
            position.seconds = before + time.perf_counter() - started
            if position.step == steps:
                position.gate_gradients = {level: grad_norm(parameters) for level, parameters
                                           in self.model.gate_parameters().items()}
            at_check = position.step == steps or self.look_is_due(position.step, looked)
            # Several ranks agree on the step to stop at; that waits for the device, so they ask at checks only.
            stop = self.ranks.any(should_stop()) if at_check or self.ranks.world_size == 1 else False
            if at_check or stop:
                loss = self.checked_loss()
                looked = time.perf_counter()
                position.seconds = before + looked - started
                if stop:
                    raise Interrupted
                on_check(position.step, loss)
                started += time.perf_counter() - looked     # a save is not training

    def look_is_due(self, step: int, looked: float) -> bool:
        """Whether to look at the loss after this step; the last look was at ``looked``."""
        if self.device.type == "cpu":
            return True
        if self.ranks.world_size > 1:
            return step % self.RANKS_MEET_EVERY == 0
        return time.perf_counter() - looked >= self.LOOK_EVERY

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on a batch (N, 3, H, W), in parts of at most ``micro_batch`` images. When memory runs out,
        the whole step is done again in smaller parts: the optimizer never sees half a batch."""
        config, steps = self.config, len(self.batches)
        done = self.done
        images = resize(images, input_size_at(config, done, steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, done, steps) * group.get("scale", 1.0)
        if done == math.ceil(config["freeze_epochs"] * steps) > 0:
            print(f"The trunk trains from here on (epoch {self.position.epoch + 1}, step {self.position.step + 1}).")
        while True:
            self.set_mode()
            try:
                self.gradients(images, labels)
                break
            except Exception as error:
                full, reason = memory_ran_out(error), one_line(error)[:200]
                if not (full or self.may_do_without_compiling):
                    raise
            if full:
                self.halve_micro_batch(len(images), reason)     # outside the except: its traceback holds the activations
            else:   # no C compiler, no Python.h, a card that Triton does not know: the night's run must not end on it
                self.run_model, self.may_do_without_compiling = self.parallel, False
                print(f"torch.compile failed ({reason}): going on without it, slower (--no-compile says so beforehand)")
        if self.precision.scaler.is_enabled():
            self.precision.scaler.unscale_(self.optimizer)  # here, so that the gates' gradient norms are the true ones
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.average:
            self.average.update(done, config["epochs"] * steps)

    @property
    def images_summed(self) -> float:
        """Images that ``sums`` is of."""
        return float(self.summed * self.batches.images_a_step)

    @property
    def done(self) -> int:
        """Optimizer steps of the run so far."""
        return self.position.epoch * len(self.batches) + self.position.step

    def trained_at(self) -> list[tuple[int, int]]:
        """(height, width) of the images in the epoch's first and last step so far."""
        steps = len(self.batches)
        return [input_size_at(self.config, step, steps) or tuple(self.config["input_size"])
                for step in (self.position.epoch * steps, max(0, self.done - 1))]

    def set_mode(self, step: int | None = None) -> None:
        """Put the network into training mode for the step (from 0, over the whole run; None: that of ``position``).

        While it is frozen, the transferred trunk neither trains nor moves its batch-norm statistics. Batch norm that sees
        fewer than SMALLEST_FOR_STATISTICS images at a time (a small batch or micro-batch) uses its running statistics, as
        they are, where these came with transferred weights, and everywhere when it sees one image."""
        frozen = (self.done if step is None else step) < self.config["freeze_epochs"] * len(self.batches)
        seen = self.images_at_once()
        few = seen < SMALLEST_FOR_STATISTICS
        mode = frozen, seen if few else None
        if mode == self.mode:
            return
        self.mode = mode
        self.model.train()
        for name, p in self.model.trunk.named_parameters(prefix="trunk"):
            p.requires_grad_(not (frozen and name in self.transferred))
        for name, module in self.model.named_modules():
            if isinstance(module, BatchNorm):
                known = f"{name}.running_mean" in self.transferred
                still = known and frozen and name.startswith("trunk.")
                module.train(not (still or few and (known or seen == 1)))

    def images_at_once(self) -> int:
        """How many images batch norm sees at a time, at most."""
        batch, ranks = self.batches.images_a_step, self.ranks.world_size
        here = min(self.micro_batch or batch, math.ceil(batch / ranks))
        return here * ranks if self.device.type == "cuda" else here     # SyncBatchNorm

    def gradients(self, images: Tensor, labels: Tensor) -> None:
        """Fresh gradients of the batch's mean loss on the parameters; the batch's sums are added when all is well."""
        self.optimizer.zero_grad(set_to_none=True)
        sums, alone = torch.zeros_like(self.sums), self.ranks.world_size == 1
        total = len(images) if alone else self.batches.images_a_step
        # Every rank must make as many parts: in each, SyncBatchNorm meets the others.
        shares = (total // self.ranks.world_size, math.ceil(total / self.ranks.world_size))
        parts = list(parts_of(images, labels, self.micro_batch, shares))
        with self.precision.context():  # around all parts, as autocast forgets its casts of the weights at the end
            for number, (part, answers) in enumerate(parts, start=1):
                # Ranks exchange gradients once a step, at its last part.
                with contextlib.nullcontext() if alone or number == len(parts) else self.parallel.no_sync():
                    logits = self.run_model(part)
                    with self.precision.off():
                        self.backward(logits, answers, total, sums)
        self.ranks.all_reduce(sums)
        self.sums += sums
        self.sums[2].add_(self.sums[0] < math.inf)      # a sum that is not finite stays so
        self.summed += 1

    def backward(self, logits: Tensor, labels: Tensor, total: int, sums: Tensor) -> None:
        """Gradients of a part's share in the mean loss of ``total`` images; its own ``sums`` are added."""
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config["label_smoothing"])
        weight = len(labels) / total * self.ranks.world_size     # DistributedDataParallel takes the mean over the ranks
        self.precision.scaler.scale(loss if weight == 1 else loss * weight).backward()
        sums[0].add_(loss.detach(), alpha=len(labels))
        sums[1].add_((logits.detach().argmax(1) == labels).sum())

    def halve_micro_batch(self, batch: int, reason: str) -> None:
        """After out-of-memory: half the micro-batch, or a UserError when that is not wanted or not possible."""
        self.optimizer.zero_grad(set_to_none=True)
        now = min(self.micro_batch or batch, batch)
        if self.config["micro_batch"] != "auto" or now <= 1 or self.ranks.world_size > 1:
            peak = f"peak {peak_memory_mib(self.device):.0f} MiB"
            raise UserError(f"out of memory at {now} image{'s' * (now > 1)} at once ({peak}): {reason}\n"
                            f"Try, in this order: {', '.join(self.what_saves_memory())}")
        self.micro_batch = now // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"Out of memory with {now} images at once: going on with --micro-batch {self.micro_batch} (the batch stays "
              f"{batch}: gradients add up over the parts). {self.what_batch_norm_does()}")

    def what_saves_memory(self) -> list[str]:
        """Options that would help and aren't in use, the cheapest first."""
        ranks = self.ranks.world_size
        alone, now = ranks == 1, self.micro_batch or math.ceil(self.config["batch_size"] / ranks)
        options = {"--micro-batch auto": alone and self.config["micro_batch"] != "auto",
                   f"--micro-batch {max(1, now // 2)}": not alone,  # ranks cannot agree on it in mid-step
                   "--checkpoint-activations": not self.config["checkpoint_activations"],
                   "--precision auto": self.precision.name == "fp32" and self.device.type == "cuda",
                   "--set trunk=pooled": "block2" not in self.model.trunk.pools,
                   "a smaller --image-size": True, "a smaller --width": True, "another GPU (nvidia-smi: who uses this one?)":
                   True}
        return [option for option, helps in options.items() if helps][:3]

    def what_batch_norm_does(self) -> str:
        """In words, for the micro-batch of now."""
        count = self.images_at_once()
        if count >= SMALLEST_FOR_STATISTICS:
            return f"Batch norm sees {count} images at a time."
        if count == 1:
            return ("Batch norm uses its running statistics as they are, since one image has none worth using: fit to "
                    "fine-tune with, not to train from scratch.")
        if self.transferred:
            return "Batch norm uses the running statistics that came with the transferred weights, as they are."
        small_parts = self.micro_batch and self.micro_batch < self.batches.images_a_step
        advice = "--checkpoint-activations or a smaller --image-size would allow" if small_parts else "--batch-size gives it"
        return f"Batch norm sees {count} images at a time, whose statistics are noisy: {advice} more."

    @torch.no_grad()
    def recalibrate_batch_norm(self, images: Iterator[Tensor]) -> None:
        """Take the batch norms' statistics anew from batches of training images (N, 3, H, W), in the network that is
        evaluated and used. Its running statistics are not those of its weights: they are of smaller images (progressive
        resizing), of the weights before they were averaged (arXiv 1803.05407), and of activations that dropout had widened
        (arXiv 1801.05134; a convolution that starts as the identity averages none of that out). Norms whose statistics are
        kept as they are keep them."""
        model = self.eval_model
        self.mode = None
        self.set_mode(max(0, self.done - 1))    # what was frozen in the last step stays as it was used
        moving = {name for name, m in self.model.named_modules() if isinstance(m, BatchNorm) and m.training}
        norms = [m for name, m in model.named_modules() if name in moving]
        before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None    # the mean over all batches
            norm.train()
        for batch in images:
            with self.precision.context():
                model(batch)
        for norm, (momentum, state) in zip(norms, before):
            norm.momentum = momentum
            if not norm.num_batches_tracked:    # pc does not run the global branch
                norm.load_state_dict(state)
        model.eval()
        self.mode = None

    def broadcast_buffers(self) -> None:
        """Rank 0's batch-norm statistics for all, before they are used; each rank's are of its own part of the batches."""
        self.ranks.broadcast(self.model.buffers())
        if self.average:
            self.ranks.broadcast(self.average.model.buffers())

    def checked_loss(self) -> float:
        """The epoch's mean loss so far. Raises UserError when a loss was not finite."""
        loss_sum, _, finite = self.sums.tolist()
        if finite < self.summed:
            raise self.diverged("the loss", int(finite) + 1)
        return loss_sum / self.images_summed if self.summed else math.nan

    def check_weights(self) -> None:
        """Before anything is saved. Raises UserError when a weight is not finite, whatever the losses were."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            raise self.diverged("a weight", self.position.step)

    def diverged(self, what: str, step: int) -> UserError:
        exact = "" if self.precision.name == "fp32" else ", --precision fp32"
        return UserError(
            f"{what} is not finite at epoch {self.position.epoch + 1}, step {step} of {len(self.batches)}: the training "
            f"diverged. The last good checkpoint is kept.\nStart a new run with, in this order: a lower --lr, a longer warm-up "
            f"(--set warmup=0.3){exact}. --resume keeps a run's settings; --init-from RUN_DIR/last.pt takes its weights along")

    def epoch_metrics(self) -> dict:
        """The training half of a metrics row, for the epoch that has just ended."""
        loss_sum, correct, _ = self.sums.tolist()
        seen = self.images_summed
        epoch, steps = self.position.epoch, len(self.batches)
        rate = learning_rate(self.config, epoch * steps + steps - 1, steps) * width_factor(self.config)
        return {"epoch": epoch + 1, "lr": rate,
                "train_loss": loss_sum / seen, "train_top1": 100 * correct / seen,
                "images_per_second": seen / max(self.position.seconds, 1e-9), "seconds": self.position.seconds,
                "peak_memory_mib": peak_memory_mib(self.device)}

    def next_epoch(self) -> None:
        """The epoch is whole: trained, evaluated, reported."""
        self.position = Position(epoch=self.position.epoch + 1)
        self.sums.zero_()
        self.summed = 0


def parts_of(images: Tensor, labels: Tensor, micro_batch: int | None,
             shares: tuple[int, int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in near-equal parts of at most ``micro_batch`` images, none of a single one (batch norm cannot train on
    it) unless the batch or ``micro_batch`` is. ``shares``: images of the rank with the fewest, and with the most; each
    makes as many parts."""
    least, most = shares or (len(images), len(images))
    pieces = 1 if not micro_batch else math.ceil(most / micro_batch)
    pieces = min(pieces, least if micro_batch == 1 else max(1, least // 2))
    yield from zip(images.tensor_split(pieces), labels.tensor_split(pieces))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], num_classes: int, precision: Precision,
             should_stop: Callable[[], bool] = lambda: False, ranks: Ranks = Ranks()) -> Evaluation:
    """The network on every batch, in evaluation mode; its mode is restored. With several ranks, each has its batches, and
    all get the result of all. Raises Interrupted."""
    was_training, device = model.training, precision.device
    model.eval()
    network = without_norms(model) if device.type == "cpu" else model
    try:
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        counts, right = (torch.zeros(num_classes, dtype=torch.int64, device=device) for _ in range(2))
        for images, labels in batches:
            if ranks.world_size == 1 and should_stop():
                raise Interrupted
            with precision.context():
                logits = network(images)
            logits = logits.float()
            hits = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum").double(), hits[:, 0].sum().double(),
                                 hits.any(1).sum().double()])
            counts.index_add_(0, labels, torch.ones_like(labels))
            right.index_add_(0, labels, hits[:, 0].long())
    finally:
        model.train(was_training)
    ranks.all_reduce(sums, counts, right)
    seen = max(1, int(counts.sum()))
    loss, top1, top5 = (sums / seen).tolist()
    return Evaluation(loss, 100 * top1, 100 * top5, counts.tolist(), right.tolist())


def memory_ran_out(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that there was not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (any(words in said for words in NO_MEMORY)
            or any(words in said for words in PERHAPS_NO_MEMORY) and gpu_is_half_full())


def gpu_is_half_full() -> bool:
    """Whether less than half of the current GPU's memory is free, or in PyTorch's hands and unused."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < total / 2


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far in MiB: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    import sys
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
