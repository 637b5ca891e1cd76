"""Muon: momentum that is orthogonalized, for the 3x3 filters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


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
