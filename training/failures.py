"""What a user can do about a run that failed: out of memory, or diverged."""

from __future__ import annotations

import math

import torch

from attention_model import Network
from common.device import peak_memory_mib
from common.errors import UserError


def out_of_memory(
    config: dict,
    model: Network,
    device: torch.device,
    precision: str,
    *,
    micro_batch: int,
    ranks: int,
    reason: str,
) -> UserError:
    """The error for a micro-batch that does not fit and is not to be, or cannot be, halved."""
    plural = "s" * (micro_batch > 1)
    peak = f"peak {peak_memory_mib(device):.0f} MiB"
    options = what_saves_memory(config, model, device, precision, micro_batch, ranks)
    return UserError(
        f"out of memory at {micro_batch} image{plural} at once ({peak}): {reason}\n"
        f"Try, in this order: {', '.join(options)}"
    )


def what_saves_memory(
    config: dict,
    model: Network,
    device: torch.device,
    precision: str,
    micro_batch: int | None,
    ranks: int,
) -> list[str]:
    """At most three options that would help and are not in use, the cheapest first."""
    now = micro_batch or math.ceil(config["batch_size"] / ranks)
    options = {
        "--micro-batch auto": ranks == 1 and config["micro_batch"] != "auto",
        # ranks cannot agree on it in the middle of a step
        f"--micro-batch {max(1, now // 2)}": ranks > 1,
        "--checkpoint-activations": not config["checkpoint_activations"],
        "--precision auto": precision == "fp32" and device.type == "cuda",
        "--set trunk=pooled": not model.is_pooled,
        "a smaller --image-size": True,
        "a smaller --width": True,
        "another GPU (nvidia-smi: who uses this one?)": True,
    }
    return [option for option, helps in options.items() if helps][:3]


def diverged(subject: str, *, epoch: int, step: int, steps: int, precision: str) -> UserError:
    """The error for a ``subject`` ("the loss") that is not finite at this step (from 1) of this
    epoch (from 1)."""
    fp32 = "" if precision == "fp32" else ", --precision fp32"
    return UserError(
        f"{subject} is not finite at epoch {epoch}, step {step} of {steps}: the training diverged. "
        f"The last good checkpoint is kept.\n"
        f"Start a new run with, in this order: a lower --lr, a longer warm-up "
        f"(--set warmup=0.3){fp32}. --resume keeps a run's settings; "
        f"--init-from RUN_DIR/last.pt takes its weights along"
    )
