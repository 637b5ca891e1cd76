"""The optimizer of a run: parameter groups, SGD and Muon, learning rate, progressive resizing,
moving average of the weights.

Every number comes from the run's config (the recipes at the top of each script).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attention_model import SMALLEST_IMAGE, Network
from common.device import DTYPES

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


class Muon(torch.optim.SGD):
    """Muon (Keller Jordan, kellerjordan.github.io/posts/muon) for the groups with a
    ``filter_momentum``: 3x3 filters in front of a batch norm. SGD for the others.

    A layer's filters (C', C, 3, 3) count as a matrix C' x 9C. Its Nesterov momentum is replaced by
    the nearest matrix with equal singular values, so that every direction learns at the same speed,
    not only the strongest. The filters keep their initial norm, which the batch norm cancels: the
    learning rate is their relative change per step, and they need no decay. (torch.optim.Muon, from
    PyTorch 2.9 on, takes matrices only.)

    ``dtype``: of the matrix products."""

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options: Any):
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            if "filter_momentum" in group:
                filters = [p for p in group["params"] if p.grad is not None]
                if filters:  # a frozen trunk has no gradients
                    self.prepare(filters, group["filter_momentum"])
        return super().step(closure)

    def prepare(self, filters: list[nn.Parameter], decay: float) -> None:
        """Renormalize the filters (C', C, 3, 3) and replace each gradient with its orthogonalized
        update, of the same shape. ``decay``: the momentum, 0 to 1."""
        for p in filters:
            if "filter_norm" not in self.state[p]:
                self.state[p] |= {"filter_norm": p.norm(), "filter_momentum": torch.zeros_like(p)}
        norms, momenta = (
            [self.state[p][name] for p in filters] for name in ("filter_norm", "filter_momentum")
        )
        # Nesterov's momentum, but for a factor that newton_schulz() cancels.
        gradients = [p.grad for p in filters]
        torch._foreach_lerp_(momenta, gradients, 1 - decay)
        ahead = torch._foreach_lerp(gradients, momenta, decay)
        torch._foreach_mul_(filters, torch._foreach_div(norms, torch._foreach_norm(filters)))
        # Input channels last, as channels_last has them in memory: the order of a matrix's columns
        # does not matter.
        matrices = [x.permute(0, 2, 3, 1).flatten(1) for x in ahead]
        steps = [
            step.view_as(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for step, p in zip(newton_schulz(matrices, self.dtype), filters, strict=True)
        ]
        # All singular values are 1: the norm is the root of their number.
        sizes = torch._foreach_div(norms, [math.sqrt(min(x.shape)) for x in matrices])
        # The fused SGD needs weight and gradient in the same memory format.
        for p in filters:
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p)
        gradients = [p.grad for p in filters]
        torch._foreach_copy_(gradients, steps)  # in float32 again
        torch._foreach_mul_(gradients, sizes)


# iterations; five, computed as below, overshoot in bfloat16 (singular values up to 4)
NEWTON_SCHULZ = 3
# smaller matrices are padded with zeros: a few large products are faster than many small ones
SMALLEST_GRAM = 64


def newton_schulz(matrices: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Matrices (R, C) in float32, of any shapes -> the nearest ones with all singular values 1,
    roughly (most end between 0.5 and 1.2).

    Newton-Schulz iterations x <- (a + b x x^T + c (x x^T)^2) x in ``dtype``, whose polynomial
    (Jordan's) lifts small singular values fast. The factors are polynomials of the Gram matrix
    g = x x^T, so they are multiplied there, R x R, and x is only needed at the beginning and at the
    end: for R = 512, C = 4608 that is half of the arithmetic. Matrices of one shape are computed
    together, and Gram matrices of one size multiplied together: fewer, larger products."""
    order = sorted(range(len(matrices)), key=lambda i: (gram_side(matrices[i]), matrices[i].shape))
    matrices = [matrices[i] for i in order]
    lengths = torch._foreach_norm(matrices)
    torch._foreach_add_(lengths, 1e-20)
    stacks = [
        matrices[0].new_empty(len(list(same_shape)), *shape, dtype=dtype)
        for shape, same_shape in itertools.groupby(matrix.shape for matrix in matrices)
    ]
    slots = [x for stack in stacks for x in stack]
    torch._foreach_copy_(slots, torch._foreach_div(matrices, lengths))
    wide_stacks = [x if x.shape[1] <= x.shape[2] else x.mT for x in stacks]
    groups = [list(same_side) for _, same_side in itertools.groupby(wide_stacks, gram_side)]
    products = products_of_factors([gram_matrices(group) for group in groups])
    results = [
        factor @ x
        for group, product in zip(groups, products, strict=True)
        for factor, x in zip(corners(product, group), group, strict=True)
    ]
    steps = [
        step
        for result, stack in zip(results, stacks, strict=True)
        for step in (result if result.shape == stack.shape else result.mT)
    ]
    return [steps[order.index(i)] for i in range(len(order))]


def gram_side(x: torch.Tensor) -> int:
    """Side of the padded Gram matrix of x (..., R, C)."""
    return max(SMALLEST_GRAM, min(x.shape[-2:]))


def gram_matrices(stacks: list[torch.Tensor]) -> torch.Tensor:
    """x x^T of stacks x (B, R, C), R <= C, that have the same gram_side S, padded with zeros: (sum
    of B, S, S)."""
    side = gram_side(stacks[0])
    no_padding = all(x.shape[1] == side for x in stacks)
    new = stacks[0].new_empty if no_padding else stacks[0].new_zeros
    grams = new(sum(map(len, stacks)), side, side)
    for gram, x in zip(corners(grams, stacks), stacks, strict=True):
        torch.bmm(x, x.mT, out=gram)
    return grams


def corners(padded: torch.Tensor, stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of ``padded`` (sum of B, S, S): the matrices (B, R, R) of each stack (B, R, C)."""
    split = padded.split([len(x) for x in stacks])
    return [grams[:, : x.shape[1], : x.shape[1]] for grams, x in zip(split, stacks, strict=True)]


def products_of_factors(grams: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gram matrices of stacks x, (B, S, S) each -> the product of the iterations' factors for each
    x, by which x is to be multiplied."""
    a, b, c = 3.4445, -4.7750, 2.0315
    products = None
    for number in range(NEWTON_SCHULZ):
        factors = [torch.baddbmm(g, g, g, beta=b, alpha=c) for g in grams]
        torch._foreach_add_([factor.diagonal(dim1=1, dim2=2) for factor in factors], a)
        if products is None:
            products = factors
        else:
            products = [f @ product for f, product in zip(factors, products, strict=True)]
        if number < NEWTON_SCHULZ - 1:
            grams = [f @ g @ f for f, g in zip(factors, grams, strict=True)]
    return products


# ---- schedules ----------------------------------------------------------------------------------

SCHEDULES = ("linear", "halve", "double-halve")


def lr_at(config: dict, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0, over the whole run).

    With every ``schedule``, the rate rises linearly over the first ``warmup`` of the run (0 to 1).

    "linear": after the warm-up linearly down to 0 at the end of the run.
    "halve": the paper's for CIFAR, ``lr`` halved every ``halve_every`` epochs.
    "double-halve": the authors' for CUB, ``lr`` doubled after ``halve_every`` epochs and after
    twice as many, then halved every ``halve_every``.
    """
    total = config["epochs"] * steps_per_epoch
    rising = config["warmup"] * total
    if step + 1 < rising:
        return config["lr"] * (step + 1) / rising
    periods = step // steps_per_epoch // config["halve_every"]
    if config["schedule"] == "halve":
        return config["lr"] * 0.5**periods
    if config["schedule"] == "double-halve":
        return config["lr"] * 2.0 ** (periods if periods <= 2 else 4 - periods)
    return config["lr"] * (total - step) / max(1.0, total - rising + 1)


def stages(config: dict, steps_per_epoch: int) -> list[tuple[float, float]]:
    """Progressive resizing: (factor on the side, share of the run at which it ends) of each stage
    before the full size.

    ``progressive`` = "0.5:0.6 0.75:0.8" means half the side for the first 0.6 of the run, then
    three quarters until 0.8. Early steps learn most of what they would from full-size images, at a
    quarter of the cost. A run of fewer steps than ``progressive_from`` has no such stages: too few
    steps would be left at full size."""
    if config["epochs"] * steps_per_epoch < config["progressive_from"]:
        return []
    return parse_progressive(config["progressive"])


def input_size_at(config: dict, step: int, steps_per_epoch: int) -> tuple[int, int] | None:
    """(height, width) of the training images in optimizer step ``step`` (from 0, over the whole
    run); None: the full size."""
    done = step / (config["epochs"] * steps_per_epoch)
    for scale, until in stages(config, steps_per_epoch):
        if done < until:
            height, width = config["input_size"]
            return (
                max(SMALLEST_IMAGE, round(height * scale)),
                max(SMALLEST_IMAGE, round(width * scale)),
            )
    return None


def parse_progressive(text: str) -> list[tuple[float, float]]:
    """The (scale, until) pairs of a text like "0.5:0.6 0.75:0.8"; [] for "none" or "". Raises
    ValueError for anything else."""
    words = [word for word in text.split() if word != "none"]
    try:
        pairs = [tuple(float(number) for number in word.split(":")) for word in words]
        in_range = all(0 < scale <= 1 and 0 < until <= 1 for scale, until in pairs)
        in_order = pairs == sorted(pairs, key=lambda pair: pair[-1])
    except ValueError:  # not numbers, or not two
        in_range = in_order = False
    if not (in_range and in_order):
        raise ValueError(
            f"progressive '{text}': expected SCALE:UNTIL pairs, "
            f"both above 0 and at most 1, in order"
        )
    return pairs


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
