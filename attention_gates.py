"""What the paper adds to a VGG: compatibility functions, attention gates, and the head on the attended features ("Learn to
Pay Attention", Jetley et al., ICLR 2018, arXiv 1804.02391, section 3). attention_model.py puts them into networks."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DROPOUT = 0.5  # the authors', in front of each linear layer


# ---- compatibility functions: local features (N, C, H, W), global feature (N, C_g) -> scores (N, H, W) ----------------
# Paper section 3.1. None builds l + g, which would be one more full-size tensor for the backward pass.

class ParametrisedCompatibility(nn.Module):
    """pc: c_i = u . (l_i + g) + b = u . l_i + u . g + b. The same number u . g + b is added at every position, so softmax
    over the positions does not see it: with ``g=None`` it is left out, which changes nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.u = nn.Linear(channels, 1)

    def forward(self, local: Tensor, g: Tensor | None) -> Tensor:
        scores = project(local, self.u)
        return scores if g is None else scores + self.u(g)[:, :, None]


class DotProductCompatibility(nn.Module):
    """dp: c_i = <l_i, g>. No parameters."""

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        scores = torch.bmm(local.flatten(2).transpose(1, 2), g[:, :, None])    # so that l's gradient is channels_last too
        return scores.view(local.shape[0], *local.shape[2:])


class AdditiveCompatibility(nn.Module):
    """gate: c_i = u . relu(W l_i + V g), W and V to half the channels (additive attention gate, arXiv 1804.03999).

    The ReLU between the sum and u is what gives g a say in the map."""

    def __init__(self, channels: int, global_channels: int):
        super().__init__()
        between = max(1, channels // 2)
        self.W = nn.Conv2d(channels, between, 1)
        self.V = nn.Linear(global_channels, between, bias=False)  # W has the bias
        self.u = nn.Linear(between, 1, bias=False)  # a bias would be one more constant that softmax ignores

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        joint = F.relu(self.W(local) + self.V(g)[:, :, None, None])
        return project(joint, self.u)


def project(features: Tensor, u: nn.Linear) -> Tensor:
    """u . x at every position, without u's bias: (N, C, H, W) -> (N, H, W). On channels_last features a product with a
    vector takes half of the time of a convolution with one filter."""
    return features.permute(0, 2, 3, 1) @ u.weight[0]


def attend(local: Tensor, attention_map: Tensor) -> Tensor:
    """The attended feature g_a = sum_i a_i l_i: (N, C, H, W), (N, H, W) -> (N, C)."""
    weights = attention_map.flatten(1)[:, None, :].to(local.dtype)
    return torch.bmm(weights, local.flatten(2).transpose(1, 2))[:, 0]      # so that l's gradient is channels_last too


def softmax_over_positions(scores: Tensor) -> Tensor:
    """Scores (N, H, W) -> attention map (N, H, W) in float32, summing to 1 over H and W (paper section 3, eq. 3)."""
    return scores.flatten(1).float().softmax(dim=1).view(scores.shape)


class AttentionGate(nn.Module):
    """One level: local features (N, C, H, W) and g (N, C_g) -> attended feature (N, C), scores (N, H, W)."""

    def __init__(self, compatibility: str, channels: int, global_channels: int):
        super().__init__()
        self.compatibility = {
            "pc": lambda: ParametrisedCompatibility(channels),
            "dp": DotProductCompatibility,
            "gate": lambda: AdditiveCompatibility(channels, global_channels),
        }[compatibility]()

    def forward(self, local: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.compatibility(local, g)
        return attend(local, softmax_over_positions(scores)), scores


class LevelHead(nn.Sequential):
    """What each attended feature goes through before the classifier: batch norm (it also keeps the scale of the branch,
    without which weight decay starves it: a flat map), ReLU, dropout."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)


class Classifier(nn.Module):
    """Attended features, one (N, C) a level -> logits (N, num_classes). ``concat``: one linear layer on all of them.
    ``indep``: a linear layer for each, their logits summed (the same probabilities as summed log-softmax)."""

    def __init__(self, channels: list[int], num_classes: int, combination: str, dropout: float):
        super().__init__()
        self.levels = nn.ModuleList(LevelHead(c, dropout) for c in channels)
        self.combination = combination
        sizes = [sum(channels)] if combination == "concat" else channels
        self.linears = nn.ModuleList(nn.Linear(size, num_classes) for size in sizes)

    def forward(self, attended: list[Tensor]) -> Tensor:
        features = [level(x) for level, x in zip(self.levels, attended)]
        if self.combination == "concat":
            return self.linears[0](torch.cat(features, dim=1))
        return torch.stack([linear(x) for linear, x in zip(self.linears, features)]).sum(dim=0)
