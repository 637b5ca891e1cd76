"""The optimizer of a run: parameter groups, SGD and Muon, learning rate, progressive resizing,
moving average of the weights.

Every number comes from the run's config (the recipes at the top of each script).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from attention_model import Network
from common.device import DTYPES
from training.muon import Muon

# ---- parameter groups ---------------------------------------------------------------------------


def width_factor(config: dict) -> float:
    """Factor on the learning rate of all but Muon's filters: 1 / width, at most ``lr_by_width`` (0:
    1 at every width). The schedule's rate is that of full width.

    Scores and logits are sums over channels, and a step moves each summand alike, so wide networks
    need smaller steps (the idea of arXiv 2203.03466, not its exact rules)."""
    return min(config["lr_by_width"], 1 / config["width"]) if config["lr_by_width"] else 1.0


def parameter_groups(
    model: Network, config: dict, transferred: frozenset[str] = frozenset()
) -> list[dict]:
    """The parameter groups for torch.optim, one dict per kind of parameter.

    ``weight_decay`` is on all parameters (``decay_all``, the paper's), or on matrices and filters
    alone: not on biases, batch norms, and a gate's vector u, which decay pulls towards a uniform
    map. ``scale`` is a group's factor on the schedule's rate: ``muon`` for the 3x3 filters,
    ``transfer_lr`` for the weights named in ``transferred``. The transferred trunk has groups of
    its own, as all weights of a group must get their first gradient in the same step (the fused
    SGD asks for that)."""
    in_trunk = set(map(id, model.trunk.parameters()))
    gate_vectors = set(map(id, model.gate_vectors()))
    filters = set()
    if config["muon"] > 0:
        filters = {id(conv.weight) for conv in model.normalized_convs()}

    def kind(name: str, p: nn.Parameter) -> tuple[str, bool, bool]:
        if name not in transferred:
            origin = "new"
        else:
            origin = "trunk" if id(p) in in_trunk else "other"
        decays = config["decay_all"] or (p.ndim > 1 and id(p) not in gate_vectors)
        return origin, decays, id(p) in filters

    groups = []
    for origin in ("new", "trunk", "other"):
        for decays, by_muon in ((True, True), (True, False), (False, False)):
            params = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and kind(name, p) == (origin, decays, by_muon)
            ]
            group = {
                "params": params,
                "weight_decay": config["weight_decay"] if decays else 0.0,
                "scale": 1.0 if origin == "new" else config["transfer_lr"],
            }
            if by_muon:  # with a momentum of its own and no decay, as it keeps the norm
                group |= {
                    "filter_momentum": config["momentum"],
                    "momentum": 0.0,
                    "nesterov": False,
                    "weight_decay": 0.0,
                    "scale": group["scale"] * config["muon"],
                }
            else:
                group["scale"] *= width_factor(config)
            groups.append(group)
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: Network, config: dict, precision: str, transferred: frozenset[str] = frozenset()
) -> torch.optim.SGD:
    """SGD, with Muon for the 3x3 filters if the config has ``muon``. The schedule sets the learning
    rate at every step.

    The fused kernel makes one pass over the weights instead of one per operation. Not with fp16:
    when the loss scaler skips the very first step, it leaves an uninitialized momentum."""
    groups = parameter_groups(model, config, transferred)
    options = {
        "lr": config["lr"],
        "momentum": config["momentum"],
        "nesterov": config["nesterov"],
        "fused": precision != "fp16" or None,  # None: PyTorch's choice, on a GPU foreach
    }
    if not config["muon"]:
        return torch.optim.SGD(groups, **options)
    return Muon(groups, DTYPES[precision], **options)


# ---- Muon ---------------------------------------------------------------------------------------


# ---- schedules ----------------------------------------------------------------------------------


# ---- moving average and norms -------------------------------------------------------------------


class EMA:
    """Exponential moving average of the weights, with their batch-norm buffers, to evaluate and to
    use.

    The average spans 1 / (1 - ``decay``) steps, but at most ``share`` of the run: in a short run,
    whose weights move fast, a longer one lags behind. At first it spans few steps (decay (1 + t) /
    (10 + t)), so that the random initial weights drop out soon."""

    def __init__(self, model: nn.Module, decay: float, share: float = 1.0):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.share = decay, share
        # Collected once: optimizer steps and load_state_dict write into the same tensors.
        own, others = self.model.state_dict().values(), model.state_dict().values()
        pairs = list(zip(own, others, strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # of batch norm
        self.averages, self.values = zip(*averaged, strict=True)
        self.counters, self.counted = ([pair[i] for pair in counters] for i in (0, 1))

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Add the weights after optimizer step ``step`` (from 0) of the run's ``steps``."""
        decay = min(self.decay, (1 + step) / (10 + step), 1 - 1 / max(1.0, self.share * steps))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)
        if self.counters:
            torch._foreach_copy_(self.counters, self.counted)


def grad_norm(parameters: list[nn.Parameter]) -> float | None:
    """Euclidean norm of all gradients; None where there are none. Waits for the device: not for the
    inner loop."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))
