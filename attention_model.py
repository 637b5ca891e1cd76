"""VGG with attention gates, after "Learn to Pay Attention" (Jetley et al., ICLR 2018, arXiv
1804.02391).

    model = build_model("vgg-att3-concat-pc", num_classes=100)
    logits = model(images)                                  # (N, 100)
    logits, maps = model(images, return_attention=True)     # maps["conv7"]: (N, H, W), sums to 1 over positions

Names as in the paper: the *local features* l of a level are the activations of conv7, conv10 or
conv13, the *global feature* g is the output of the layers behind them, a *compatibility score* c_i
says how well l_i and g go together, and the *attention map* a is its softmax over the positions.
The classifier sees only the weighted sums g_a = sum_i a_i l_i.

The model knows nothing of data sets or of training. It takes any image from 32 pixels up, square or
not.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import (
    _BatchNorm as BatchNorm,  # what BatchNorm2d and SyncBatchNorm have in common
)
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

MODEL_NAMES = ("vgg", "vgg-gap", "vgg-pan") + tuple(
    f"vgg-{levels}-{compatibility}"
    for levels in ("att1", "att2-concat", "att2-indep", "att3-concat", "att3-indep")
    for compatibility in ("pc", "dp", "gate")
)
TRUNKS = ("full", "pooled")
# pixels; at 16 the full trunk's conv13 map is still 4x4. The networks are meant for 32 and up.
SMALLEST_IMAGE = 16

# (output channels, dropout behind it) of each convolution, section 1 of the authors' network file.
# The last of a block has no dropout: it is where the local features are read.
BLOCKS = (
    ((64, 0.3), (64, 0.0)),
    ((128, 0.4), (128, 0.0)),
    ((256, 0.4), (256, 0.4), (256, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
)
LEVEL_OF_BLOCK = {3: "conv7", 4: "conv10", 5: "conv13"}
GLOBAL_DROPOUT = 0.4
HEAD_DROPOUT = 0.5  # the authors', in front of each linear layer


class ConvBNReLU(nn.Sequential):
    """Convolution 3x3 with bias, batch norm, ReLU, dropout: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels_out, eps=eps)
        # the norm keeps its input, not its output: in place costs nothing
        self.relu = nn.ReLU(inplace=True)
        if dropout > 0:
            self.dropout = nn.Dropout(dropout)


class Trunk(nn.Module):
    """The 13 convolutions of VGG16 in five blocks.

    ``full`` (the paper's) pools before blocks 4 and 5 only, so that conv7 sees the image at full
    resolution; ``pooled`` pools after every block, as VGG16 does. The pooling in front of block 4
    has the side ``pool4``.
    """

    def __init__(self, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__()
        eps = 1e-3 if trunk == "full" else 1e-5  # the authors' and torchvision's
        channels = 3
        for number, block in enumerate(BLOCKS, start=1):
            units = []
            for full_width, rate in block:
                channels_out = scaled(full_width, width)
                units.append(ConvBNReLU(channels, channels_out, rate * dropout, eps))
                channels = channels_out
            setattr(self, f"block{number}", nn.Sequential(*units))
        before = {4: pool4, 5: 2} if trunk == "full" else {2: 2, 3: 2, 4: pool4, 5: 2}
        self.pools = nn.ModuleDict(
            {
                f"block{number}": nn.MaxPool2d(side, ceil_mode=True)
                for number, side in before.items()
            }
        )
        self.checkpoint_activations = False

    @property
    def pools_everywhere(self) -> bool:
        return len(self.pools) == len(BLOCKS) - 1

    def run_block(self, number: int, x: Tensor) -> Tensor:
        """Block ``number`` (1 to 5) with the pooling in front of it. With
        ``checkpoint_activations`` only what comes out of it is kept for the backward pass: at full
        resolution 448 channels in three blocks, instead of 2,300."""
        name = f"block{number}"
        layers = [self.pools[name]] if name in self.pools else []
        return run_layers([*layers, getattr(self, name)], x, self.checkpoint_activations)


class GlobalBranch(nn.Module):
    """Conv13's activations (N, C, H, W) -> the global feature g (N, C): two more convolutions,
    three poolings, a linear layer without batch norm or ReLU. The last pooling is adaptive; at
    32x32 it is the authors' 2x2."""

    def __init__(self, channels: int, dropout: float, eps: float, first_pool: int = 2):
        super().__init__()
        self.pool1 = nn.MaxPool2d(first_pool, ceil_mode=True)
        self.unit1 = ConvBNReLU(channels, channels, GLOBAL_DROPOUT * dropout, eps)
        self.pool2 = nn.MaxPool2d(2, ceil_mode=True)
        self.unit2 = ConvBNReLU(channels, channels, GLOBAL_DROPOUT * dropout, eps)
        self.pool3 = nn.AdaptiveMaxPool2d(1)
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)
        self.linear = nn.Linear(channels, channels)
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        x = run_layers(
            [self.pool1, self.unit1, self.pool2, self.unit2], x, self.checkpoint_activations
        )
        return self.linear(self.dropout(self.pool3(x).flatten(1)))


# ---- compatibility functions: local features (N, C, H, W), global feature (N, C_g) -> scores (N,
# Paper section 3.1. None builds l + g, which would be one more full-size tensor for the backward
# pass.


class ParametrizedCompatibility(nn.Module):
    """pc: c_i = u . (l_i + g) + b = u . l_i + u . g + b. The same number u . g + b is added at
    every position, so softmax over the positions does not see it: with ``g=None`` it is left out,
    which changes nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.u = nn.Linear(channels, 1)

    def forward(self, local: Tensor, g: Tensor | None) -> Tensor:
        scores = project(local, self.u)
        return scores if g is None else scores + self.u(g)[:, :, None]


class DotProductCompatibility(nn.Module):
    """dp: c_i = <l_i, g>. No parameters."""

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        # so that l's gradient is channels_last too
        scores = torch.bmm(local.flatten(2).transpose(1, 2), g[:, :, None])
        return scores.view(local.shape[0], *local.shape[2:])


class AdditiveCompatibility(nn.Module):
    """gate: c_i = u . relu(W l_i + V g), W and V to half the channels (additive attention gate,
    arXiv 1804.03999).

    The ReLU between the sum and u is what gives g a say in the map."""

    def __init__(self, channels: int, global_channels: int):
        super().__init__()
        between = max(1, channels // 2)
        self.W = nn.Conv2d(channels, between, 1)
        self.V = nn.Linear(global_channels, between, bias=False)  # W has the bias
        # a bias would be one more constant that softmax ignores
        self.u = nn.Linear(between, 1, bias=False)

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        joint = F.relu(self.W(local) + self.V(g)[:, :, None, None])
        return project(joint, self.u)


def project(features: Tensor, u: nn.Linear) -> Tensor:
    """u . x at every position, without u's bias: (N, C, H, W) -> (N, H, W). On channels_last
    features a product with a vector takes half of the time of a convolution with one filter."""
    return features.permute(0, 2, 3, 1) @ u.weight[0]


def attend(local: Tensor, attention_map: Tensor) -> Tensor:
    """The attended feature g_a = sum_i a_i l_i: (N, C, H, W), (N, H, W) -> (N, C)."""
    weights = attention_map.flatten(1)[:, None, :].to(local.dtype)
    # so that l's gradient is channels_last too
    return torch.bmm(weights, local.flatten(2).transpose(1, 2))[:, 0]


def softmax_over_positions(scores: Tensor) -> Tensor:
    """Scores (N, H, W) -> attention map (N, H, W) in float32, summing to 1 over H and W (paper
    section 3, eq. 3)."""
    return scores.flatten(1).float().softmax(dim=1).view(scores.shape)


class AttentionGate(nn.Module):
    """One level: local features (N, C, H, W) and g (N, C_g) -> attended feature (N, C), scores (N,
    H, W)."""

    def __init__(self, compatibility: str, channels: int, global_channels: int):
        super().__init__()
        self.compatibility = {
            "pc": lambda: ParametrizedCompatibility(channels),
            "dp": DotProductCompatibility,
            "gate": lambda: AdditiveCompatibility(channels, global_channels),
        }[compatibility]()

    def forward(self, local: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.compatibility(local, g)
        return attend(local, softmax_over_positions(scores)), scores


class BranchNorm(nn.Sequential):
    """What each attended feature goes through before the classifier: batch norm (it also keeps the
    scale of the branch, without which weight decay starves it: a flat map), ReLU, dropout."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)


class Classifier(nn.Module):
    """Attended features, one (N, C) a level -> logits (N, num_classes). ``concat``: one linear
    layer on all of them. ``indep``: a linear layer for each, their logits summed (the same
    probabilities as summed log-softmax)."""

    def __init__(self, channels: list[int], num_classes: int, combination: str, dropout: float):
        super().__init__()
        self.levels = nn.ModuleList(BranchNorm(c, dropout) for c in channels)
        self.combination = combination
        sizes = [sum(channels)] if combination == "concat" else channels
        self.linears = nn.ModuleList(nn.Linear(size, num_classes) for size in sizes)

    def forward(self, attended: list[Tensor]) -> Tensor:
        features = [level(attended[i]) for i, level in enumerate(self.levels)]
        if self.combination == "concat":
            return self.linears[0](torch.cat(features, dim=1))
        return torch.stack([linear(features[i]) for i, linear in enumerate(self.linears)]).sum(
            dim=0
        )


# ---- networks -----------------------------------------------------------------------------------


class Network(nn.Module, abc.ABC):
    """What every network here does: images (N, 3, H, W) -> logits (N, num_classes), and its maps
    when asked."""

    TRUNK = "trunk"  # the trunk's name in state dicts
    # the layer whose output conv13's map is over; it ends in conv13's ReLU
    LAST_FEATURES = "trunk.block5"
    # levels whose map is a gate in [0, 1], not a probability over positions
    sigmoid_levels: tuple[str, ...] = ()

    def __init__(self, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__()
        self.width = width
        self.trunk = Trunk(trunk, width, dropout, pool4)
        self.channels = {
            level: scaled(BLOCKS[block - 1][-1][0], width)
            for block, level in LEVEL_OF_BLOCK.items()
        }
        self.eps = self.trunk.block1[0].norm.eps

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels that have an attention map, in the order of the network."""
        return ()

    @property
    def checkpoint_activations(self) -> bool:
        """Trade compute for memory: the convolutions' inner activations are computed again in the
        backward pass."""
        return self.trunk.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, (Trunk, GlobalBranch)):
                module.checkpoint_activations = on

    @abc.abstractmethod
    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, num_classes) and the compatibility scores (N, H, W) of each level."""

    def forward(self, images: Tensor, return_attention: bool = False):
        """Images (N, 3, H, W), normalised -> logits (N, num_classes); with ``return_attention``
        also a dict of maps, one (N, H, W) in float32 a level. Raises ValueError where the images
        cannot be used."""
        self.check(images)
        logits, scores = self.logits_and_raw_scores(images)
        if not return_attention:
            return logits
        return logits, {level: self.map_of(level, s) for level, s in scores.items()}

    def logits_and_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the compatibility scores that the maps are made of (see map_of): one (N, H,
        W) in float32 a level."""
        self.check(images)
        logits, scores = self.logits_and_raw_scores(images)
        return logits, {level: s.float() for level, s in scores.items()}

    def map_of(self, level: str, scores: Tensor) -> Tensor:
        """Scores (N, H, W) -> the attention map (N, H, W), float32."""
        return (
            scores.float().sigmoid()
            if level in self.sigmoid_levels
            else softmax_over_positions(scores)
        )

    # What each parameter is, for optimizers, checks and transfers, which must not guess it from
    # names.

    @property
    def is_pooled(self) -> bool:
        """Whether the trunk pools after every block, as torchvision's VGG16 does."""
        return self.trunk.pools_everywhere

    def normalized_convs(self) -> list[nn.Conv2d]:
        """The 3x3 convolutions in front of a batch norm, which undoes the norm of their filters and
        their bias."""
        return [module.conv for module in self.modules() if isinstance(module, ConvBNReLU)]

    def gate_vectors(self) -> list[nn.Parameter]:
        """The vectors u that turn features into compatibility scores, (1, C) each."""
        return [module.u.weight for module in self.modules() if hasattr(module, "u")]

    @abc.abstractmethod
    def class_layers(self) -> list[nn.Linear]:
        """The layers whose outputs are the classes."""

    def parameters_without_gradient(self) -> set[str]:
        """Names of the parameters that get no gradient by the mathematics of the network, not by a
        mistake."""
        return set()

    def gate_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that belong to each level's gate alone (none for dp)."""
        return {}

    def check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (N, 3, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} px are too small: "
                f"{SMALLEST_IMAGE} px is the least, 32 px is what the networks are meant for"
            )
        if (
            self.training
            and images.shape[0] == 1
            and any(m.training for m in self.modules() if isinstance(m, nn.BatchNorm1d))
        ):
            raise ValueError(
                "a batch of 1 cannot train: batch norm needs 2 values a channel or more. "
                "Use a batch of 2, or model.eval()"
            )


class VGG(Network):
    """The plain baseline: pooling after every block, linear - batch norm - ReLU - linear."""

    def __init__(self, num_classes: int, width: float, dropout: float, pool4: int):
        super().__init__("pooled", width, dropout, pool4)
        channels = self.channels["conv13"]
        self.pool = nn.AdaptiveMaxPool2d(1)  # at 32x32 the 2x2 pooling behind block 5
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)
        self.linear = nn.Linear(channels, channels)
        self.level = BranchNorm(channels, dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def class_layers(self) -> list[nn.Linear]:
        return [self.classifier]

    def logits_and_raw_scores(self, images: Tensor):
        x = images
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
        x = self.linear(self.dropout(self.pool(x).flatten(1)))
        return self.classifier(self.level(x)), {}


class VGGGAP(Network):
    """The attention nets' trunk without attention: average pooling and a linear layer (Zhou et al.,
    arXiv 1512.04150).

    With the same recipe it is the fair control for what attention adds: VGG differs from the
    attention nets in resolution as well."""

    def __init__(self, num_classes: int, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__(trunk, width, dropout, pool4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self.channels["conv13"], num_classes)

    def class_layers(self) -> list[nn.Linear]:
        return [self.classifier]

    def logits_and_raw_scores(self, images: Tensor):
        x = images
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
        return self.classifier(self.pool(x).flatten(1)), {}


class AttentionVGG(Network):
    """VGG-att1, att2, att3: attention at conv13, conv10 and conv13, or conv7, conv10 and conv13
    (paper section 3).

    With pc no part of the network can feel g (see ParametrizedCompatibility), so the global branch
    is not run: its parameters are there, as the authors', and get no gradient."""

    def __init__(
        self,
        levels: int,
        combination: str,
        compatibility: str,
        num_classes: int,
        trunk: str,
        width: float,
        dropout: float,
        pool4: int,
    ):
        super().__init__(trunk, width, dropout, pool4)
        self._levels = tuple(LEVEL_OF_BLOCK.values())[-levels:]
        channels = self.channels["conv13"]
        self.global_branch = GlobalBranch(channels, dropout, self.eps)
        self.uses_global, self.dot_product = compatibility != "pc", compatibility == "dp"
        if levels == 3 and compatibility != "gate":  # the gate's V maps g to any width by itself
            self.global_to_conv7 = nn.Sequential(
                nn.BatchNorm1d(channels),
                nn.ReLU(inplace=False),
                nn.Dropout(HEAD_DROPOUT * dropout),
                nn.Linear(channels, self.channels["conv7"]),
            )
        self.gates = nn.ModuleDict(
            {
                level: AttentionGate(compatibility, self.channels[level], channels)
                for level in self._levels
            }
        )
        self.classifier = Classifier(
            [self.channels[level] for level in self._levels], num_classes, combination, dropout
        )

    def class_layers(self) -> list[nn.Linear]:
        return list(self.classifier.linears)

    @property
    def levels(self) -> tuple[str, ...]:
        return self._levels

    def logits_and_raw_scores(self, images: Tensor):
        x, local = images, {}
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
            if LEVEL_OF_BLOCK.get(number) in self.gates:
                local[LEVEL_OF_BLOCK[number]] = x
        g = self.global_branch(x) if self.uses_global else None
        attended, scores = [], {}
        for level, features in local.items():
            g_here = g
            if level == "conv7" and g is not None and hasattr(self, "global_to_conv7"):
                g_here = self.global_to_conv7(g)
            if self.dot_product:  # see initialize
                g_here = g_here / math.sqrt(features.shape[1])
            g_a, scores[level] = self.gates[level](features, g_here)
            attended.append(g_a)
        return self.classifier(attended), scores

    def parameters_without_gradient(self) -> set[str]:
        if self.uses_global:
            return set()
        cut_off = ("global_branch.", "global_to_conv7.")
        return {
            name
            for name, _ in self.named_parameters()
            if name.startswith(cut_off) or name.endswith("u.bias")
        }

    def gate_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {level: list(gate.parameters()) for level, gate in self.gates.items()}


class VGGPAN(Network):
    """VGG-PAN, progressive attention (Seo et al., arXiv 1606.02393) as the authors built it: a
    sigmoid pc gate multiplies conv10's activations before block 5, softmax pc attention reads
    conv13; the head sees that alone."""

    sigmoid_levels = ("conv10",)

    def __init__(self, num_classes: int, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__(trunk, width, dropout, pool4)
        channels = self.channels["conv13"]
        self.global_branch_conv10 = GlobalBranch(channels, dropout, self.eps, first_pool=4)
        # softmax pc: not run, as in AttentionVGG
        self.global_branch = GlobalBranch(channels, dropout, self.eps)
        self.compatibility_conv10 = ParametrizedCompatibility(channels)
        self.gates = nn.ModuleDict({"conv13": AttentionGate("pc", channels, channels)})
        self.classifier = Classifier([channels], num_classes, "concat", dropout)

    def class_layers(self) -> list[nn.Linear]:
        return list(self.classifier.linears)

    @property
    def levels(self) -> tuple[str, ...]:
        return ("conv10", "conv13")

    def logits_and_raw_scores(self, images: Tensor):
        x, scores = images, {}
        for number in range(1, 5):
            x = self.trunk.run_block(number, x)
        scores["conv10"] = self.compatibility_conv10(x, self.global_branch_conv10(x))
        x = x * scores["conv10"].sigmoid()[:, None]
        x = self.trunk.run_block(5, x)
        g_a, scores["conv13"] = self.gates["conv13"](x, None)
        return self.classifier([g_a]), scores

    def parameters_without_gradient(self) -> set[str]:
        return {
            name
            for name, _ in self.named_parameters()
            if name.startswith("global_branch.") or name == "gates.conv13.compatibility.u.bias"
        }

    def gate_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {
            "conv10": list(self.compatibility_conv10.parameters()),
            "conv13": list(self.gates.parameters()),
        }


def build_model(
    name: str,
    num_classes: int,
    width: float = 1.0,
    trunk: str | None = None,
    dropout: float = 1.0,
    pool4: int = 2,
) -> Network:
    """Build a network of MODEL_NAMES with fresh weights from torch's global random generator.

    Args:
        num_classes: outputs, 1 or more.
        width: factor on every number of channels (1.0: the paper's).
        trunk: "full", "pooled", or None for what suits the network (pooled for vgg, full otherwise).
        dropout: factor on the authors' dropout rates (0 turns it off).
        pool4: side and stride of the pooling in front of block 4 (5: the authors' for CUB at 80 px).

    Raises:
        ValueError: an unknown name or trunk, vgg with the full trunk, or a number out of range.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model '{name}'; choose from {', '.join(MODEL_NAMES)}")
    trunk = trunk or ("pooled" if name == "vgg" else "full")
    if trunk not in TRUNKS:
        raise ValueError(f"unknown trunk '{trunk}'; choose from {', '.join(TRUNKS)}")
    if name == "vgg" and trunk == "full":
        raise ValueError(
            "vgg pools after every block: it has no full trunk. vgg-gap is the baseline that has one"
        )
    if num_classes < 1 or width <= 0 or not 0 <= dropout < 2 or pool4 < 1:
        raise ValueError(
            f"out of range: num_classes {num_classes} (1 or more), width {width} (above 0), "
            f"dropout {dropout} (0 to below 2), pool4 {pool4} (1 or more)"
        )
    if name == "vgg":
        model: Network = VGG(num_classes, width, dropout, pool4)
    elif name == "vgg-gap":
        model = VGGGAP(num_classes, trunk, width, dropout, pool4)
    elif name == "vgg-pan":
        model = VGGPAN(num_classes, trunk, width, dropout, pool4)
    else:
        parts = name.split("-")
        levels, compatibility = int(parts[1][-1]), parts[-1]
        combination = parts[2] if len(parts) == 4 else "concat"
        model = AttentionVGG(
            levels, combination, compatibility, num_classes, trunk, width, dropout, pool4
        )
    initialize(model)
    return model


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Fresh weights. The authors' (convolutions N(0, sqrt(2 / (k*k*out))), linear layers
    U(-1/sqrt(in), 1/sqrt(in)), which is nn.Linear's own, batch norm U(0, 1), u as a convolution
    with one output: std 1.41) but for these:

    - A 3x3 convolution starts as the identity (Dirac): filter i passes channel i on, filters beyond
      the input's channels are the authors'. Thirteen layers without a shortcut learn much faster
      from there; README has the measurement.
    - Batch norm starts at weight 1 and, behind those convolutions, at bias 1: ReLU would otherwise
      cut off half of what is left at every layer, and pass 7 % by the last.
    - Scores start with a standard deviation of order 1 over the positions, so that the maps start
      spread out: u is N(0, 1/sqrt(C)), and the layers that make dp's g start at half of PyTorch's
      weights. The authors' u makes softmax almost one-hot at once, and a one-hot map passes no
      gradient to the positions that it does not look at.
    - For dp, g comes in units of 1/sqrt(C): the network divides what its linear layer makes. <l, g>
      is a sum of C products, and a step on that layer moves each by C more, so without it the first
      steps take the scores to hundreds, and the maps onto one position for good (README has the
      measurement). u moves the scores by C, as dp now does.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ConvBNReLU):
            nn.init.constant_(module.norm.bias, 1.0)
            if module.conv.in_channels > 3:
                nn.init.dirac_(module.conv.weight[: module.conv.in_channels])
        if hasattr(module, "u"):
            nn.init.normal_(module.u.weight, std=1 / math.sqrt(module.u.in_features))
            if module.u.bias is not None:
                nn.init.zeros_(module.u.bias)
    if isinstance(model, AttentionVGG) and model.dot_product:
        for linear in [model.global_branch.linear] + (
            [model.global_to_conv7[-1]] if len(model.levels) == 3 else []
        ):
            linear.weight.mul_(0.5)


@torch.no_grad()
def fuse_conv_bn(model: Network) -> Network:
    """A copy for evaluation whose convolutions hold the batch norm behind them: a CPU then passes
    over each activation once less. Equal but for rounding."""
    model = copy.deepcopy(model).eval()
    for unit in model.modules():
        if isinstance(unit, ConvBNReLU):
            unit.conv, unit.norm = fuse_conv_bn_eval(unit.conv, unit.norm), nn.Identity()
    return model


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


# ---- activation checkpointing -------------------------------------------------------------------


def run_layers(layers: list[nn.Module], x: Tensor, save_memory: bool) -> Tensor:
    """The layers one after the other; in training with ``save_memory`` all between x and the result
    is dropped, and computed again in the backward pass."""

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    if not (save_memory and torch.is_grad_enabled()):
        return run(x)
    # the compiler moves the statistics once by itself, and takes no context_fn
    if torch.compiler.is_compiling():
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(
        run,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), freeze_bn_stats(layers)),
    )


@contextlib.contextmanager
def freeze_bn_stats(layers: list[nn.Module]):
    """Batch norm normalises as it would, but its running statistics stay: the second pass must not
    count twice."""
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
