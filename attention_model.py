"""VGG with attention gates, after "Learn to Pay Attention" (Jetley et al., ICLR 2018, arXiv
1804.02391).

    model = build_model("vgg-att3-concat-pc", num_classes=100)
    logits = model(images)                               # (N, 100)
    logits, maps = model(images, return_attention=True)  # maps["conv7"]: (N, H, W), sums to 1

The paper in one file, in its order: compatibility functions, attention gate, head, trunk, networks,
initialization. Names are the paper's. The *local features* l of a level are the activations of
conv7, conv10 or conv13. The *global feature* g is the output of the layers after conv13. A
*compatibility score* c_i says how well l_i and g match, and the *attention map* a is the softmax of
the scores over positions. The classifier sees only the weighted sums g_a = sum_i a_i l_i.

The model is independent of data sets and training. It takes images of any size from 32 pixels up,
square or not.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the common base of BatchNorm2d and SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

MODEL_NAMES = ("vgg", "vgg-gap", "vgg-pan") + tuple(
    f"vgg-{levels}-{compatibility}"
    for levels in ("att1", "att2-concat", "att2-indep", "att3-concat", "att3-indep")
    for compatibility in ("pc", "dp", "gate", "uniform")
)
TRUNKS = ("full", "pooled")
# pixels; at 16 the full trunk's conv13 map is still 4x4. The networks are meant for 32 and up.
SMALLEST_IMAGE = 16

# (output channels, dropout after it) of each convolution, section 1 of the authors' network file.
# The last one of a block has no dropout: local features are read there.
BLOCKS = (
    ((64, 0.3), (64, 0.0)),
    ((128, 0.4), (128, 0.0)),
    ((256, 0.4), (256, 0.4), (256, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
    ((512, 0.4), (512, 0.4), (512, 0.0)),
)
LEVEL_OF_BLOCK = {3: "conv7", 4: "conv10", 5: "conv13"}
GLOBAL_DROPOUT = 0.4
HEAD_DROPOUT = 0.5  # the authors', before each linear layer


# ---- compatibility functions --------------------------------------------------------------------
# Local features (N, C, H, W) and global feature (N, C_g) -> scores (N, H, W), paper section 3.1.
# None builds l + g, which would be one more full-size tensor for the backward pass.


class ParametrizedCompatibility(nn.Module):
    """pc: c_i = u . (l_i + g) + b = u . l_i + u . g + b.

    u . g + b is the same at every position, and softmax over positions ignores a constant: with
    ``g=None`` it is left out, and the map stays the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.u = nn.Linear(channels, 1)

    def forward(self, local: Tensor, g: Tensor | None) -> Tensor:
        scores = project(local, self.u)
        return scores if g is None else scores + self.u(g)[:, :, None]


class DotProductCompatibility(nn.Module):
    """dp: c_i = <l_i, g>. No parameters."""

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        # transposed, so that the gradient of l is channels_last too
        scores = torch.bmm(local.flatten(2).transpose(1, 2), g[:, :, None])
        return scores.view(local.shape[0], *local.shape[2:])


class AdditiveCompatibility(nn.Module):
    """gate: c_i = u . relu(W l_i + V g), W and V to half the channels (additive attention gate,
    arXiv 1804.03999).

    With the ReLU between the sum and u, g influences the map.
    """

    def __init__(self, channels: int, global_channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.W = nn.Conv2d(channels, hidden, 1)
        self.V = nn.Linear(global_channels, hidden, bias=False)  # W has the bias
        # a bias would be one more constant that softmax ignores
        self.u = nn.Linear(hidden, 1, bias=False)

    def forward(self, local: Tensor, g: Tensor) -> Tensor:
        joint = F.relu(self.W(local) + self.V(g)[:, :, None, None])
        return project(joint, self.u)


class UniformCompatibility(nn.Module):
    """uniform: c_i = 0, so that g_a is the mean of the local features. No parameters, and no map to
    look at: the control for where attention looks."""

    def forward(self, local: Tensor, g: Tensor | None) -> Tensor:
        return local.new_zeros(local.shape[0], *local.shape[2:])


# The compatibility functions that end in a product with a vector u.
VECTOR_COMPATIBILITIES = (ParametrizedCompatibility, AdditiveCompatibility)


def project(features: Tensor, u: nn.Linear) -> Tensor:
    """u . x at every position, without the bias of u: (N, C, H, W) -> (N, H, W).

    On channels_last features, a product with a vector takes half the time of a convolution with one
    filter.
    """
    return features.permute(0, 2, 3, 1) @ u.weight[0]


# ---- attention gate -----------------------------------------------------------------------------


def softmax_over_positions(scores: Tensor) -> Tensor:
    """Scores (N, H, W) -> attention map (N, H, W) in float32, summing to 1 over H and W (paper
    section 3, eq. 3)."""
    return scores.flatten(1).float().softmax(dim=1).view(scores.shape)


def attend(local: Tensor, attention_map: Tensor) -> Tensor:
    """The attended feature g_a = sum_i a_i l_i: (N, C, H, W), (N, H, W) -> (N, C)."""
    weights = attention_map.flatten(1)[:, None, :].to(local.dtype)
    # transposed, so that the gradient of l is channels_last too
    return torch.bmm(weights, local.flatten(2).transpose(1, 2))[:, 0]


class AttentionGate(nn.Module):
    """One level: local features (N, C, H, W) and g (N, C_g) -> attended feature (N, C) and scores
    (N, H, W)."""

    def __init__(self, compatibility: str, channels: int, global_channels: int):
        super().__init__()
        self.compatibility = {
            "pc": lambda: ParametrizedCompatibility(channels),
            "dp": DotProductCompatibility,
            "gate": lambda: AdditiveCompatibility(channels, global_channels),
            "uniform": UniformCompatibility,
        }[compatibility]()

    def forward(self, local: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.compatibility(local, g)
        return attend(local, softmax_over_positions(scores)), scores


# ---- head ---------------------------------------------------------------------------------------


class BranchNorm(nn.Sequential):
    """Batch norm, ReLU and dropout between an attended feature and the classifier, (N, C) each.

    The batch norm also keeps the scale of the branch. Without it, weight decay starves the branch
    and its map becomes flat.
    """

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)


class Classifier(nn.Module):
    """Attended features, one (N, C) per level -> logits (N, num_classes).

    ``concat``: one linear layer on all of them. ``indep``: one linear layer per level, whose logits
    are summed (the same probabilities as summed log-softmax).
    """

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
        logits = [linear(features[i]) for i, linear in enumerate(self.linears)]
        return torch.stack(logits).sum(dim=0)


# ---- trunk --------------------------------------------------------------------------------------


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class ConvBNReLU(nn.Sequential):
    """Convolution 3x3 with bias, batch norm, ReLU, dropout: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels_out, eps=eps)
        # in place is free: the norm keeps its input for the backward pass, not its output
        self.relu = nn.ReLU(inplace=True)
        if dropout > 0:
            self.dropout = nn.Dropout(dropout)


class Trunk(nn.Module):
    """The 13 convolutions of VGG16 in five blocks.

    ``full`` (the paper's) pools before blocks 4 and 5 only, so conv7 sees the image at full
    resolution. ``pooled`` pools after every block, as VGG16 does. ``pool4`` is the side of the
    pooling before block 4.
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
        pool_before = {4: pool4, 5: 2} if trunk == "full" else {2: 2, 3: 2, 4: pool4, 5: 2}
        self.pools = nn.ModuleDict(
            {
                f"block{number}": nn.MaxPool2d(side, ceil_mode=True)
                for number, side in pool_before.items()
            }
        )
        self.checkpoint_activations = False

    @property
    def pools_everywhere(self) -> bool:
        return len(self.pools) == len(BLOCKS) - 1

    def run_block(self, number: int, x: Tensor) -> Tensor:
        """The pooling before block ``number`` (1 to 5), if any, and the block.

        With ``checkpoint_activations``, only its output is kept for the backward pass: at full
        resolution 448 channels in three blocks, instead of 2,300.
        """
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
        layers = [self.pool1, self.unit1, self.pool2, self.unit2]
        x = run_layers(layers, x, self.checkpoint_activations)
        return self.linear(self.dropout(self.pool3(x).flatten(1)))


# ---- networks -----------------------------------------------------------------------------------


class Network(nn.Module, abc.ABC):
    """The common interface: images (N, 3, H, W) -> logits (N, num_classes), and maps on request."""

    TRUNK = "trunk"  # the trunk's name in state dicts
    # the layer whose output conv13's map covers; it ends in conv13's ReLU
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
        """Names of the levels with an attention map, in network order."""
        return ()

    @property
    def global_branches(self) -> tuple[str, ...]:
        """Names of the global branches whose feature g the maps depend on."""
        return ()

    @property
    def checkpoint_activations(self) -> bool:
        """Trade compute for memory: recompute the convolutions' inner activations in the backward
        pass."""
        return self.trunk.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, (Trunk, GlobalBranch)):
                module.checkpoint_activations = on

    @abc.abstractmethod
    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, num_classes) and the compatibility scores (N, H, W) of each level."""

    def forward(
        self, images: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Normalized images (N, 3, H, W) -> logits (N, num_classes); with ``return_attention`` also
        a dict of maps, one (N, H, W) in float32 per level.

        Raises:
            ValueError: images of the wrong shape, too small, or a training batch of 1 where batch
                norm needs more.
        """
        self.check(images)
        logits, scores = self.logits_and_raw_scores(images)
        if not return_attention:
            return logits
        return logits, {level: self.map_of(level, s) for level, s in scores.items()}

    def logits_and_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the compatibility scores behind the maps (see map_of): one (N, H, W) in
        float32 per level. Raises ValueError as forward does."""
        self.check(images)
        logits, scores = self.logits_and_raw_scores(images)
        return logits, {level: s.float() for level, s in scores.items()}

    def map_of(self, level: str, scores: Tensor) -> Tensor:
        """Scores (N, H, W) -> the attention map (N, H, W), float32."""
        if level in self.sigmoid_levels:
            return scores.float().sigmoid()
        return softmax_over_positions(scores)

    def check(self, images: Tensor) -> None:
        """Raises ValueError for images that forward cannot use."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (N, 3, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} px are too small: "
                f"at least {SMALLEST_IMAGE} px are needed, 32 px or more are intended"
            )
        if self.training and images.shape[0] == 1:
            if any(m.training for m in self.modules() if isinstance(m, nn.BatchNorm1d)):
                raise ValueError(
                    "a batch of 1 cannot train: batch norm needs at least 2 values per channel. "
                    "Use a batch of 2 or more, or model.eval()"
                )

    # ---- roles ----------------------------------------------------------------------------------
    # What each parameter is, so that optimizers, checks and transfers need not guess it from names.

    @property
    def is_pooled(self) -> bool:
        """Whether the trunk pools after every block, as torchvision's VGG16 does."""
        return self.trunk.pools_everywhere

    def normalized_convs(self) -> list[nn.Conv2d]:
        """The 3x3 convolutions before a batch norm, which cancels their bias and the norm of their
        filters."""
        return [module.conv for module in self.modules() if isinstance(module, ConvBNReLU)]

    def gate_vectors(self) -> list[nn.Parameter]:
        """The vectors u that turn features into compatibility scores, (1, C) each."""
        return [m.u.weight for m in self.modules() if isinstance(m, VECTOR_COMPATIBILITIES)]

    @abc.abstractmethod
    def class_layers(self) -> list[nn.Linear]:
        """The layers whose outputs are the classes."""

    def parameters_without_gradient(self) -> set[str]:
        """Names of the parameters that get no gradient by the mathematics of the network, not by
        mistake."""
        return set()

    def compatibilities(self) -> dict[str, nn.Module]:
        """The compatibility function of each level: its output is the scores (N, H, W)."""
        return {}

    def gate_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each level's gate alone (none for dp)."""
        return {level: list(c.parameters()) for level, c in self.compatibilities().items()}

    def names_of(self, parameters: Iterable[nn.Parameter]) -> set[str]:
        """The names of these parameters."""
        wanted = set(map(id, parameters))
        return {name for name, p in self.named_parameters() if id(p) in wanted}


class VGG(Network):
    """The plain baseline: pooling after every block, linear - batch norm - ReLU - linear."""

    def __init__(self, num_classes: int, width: float, dropout: float, pool4: int):
        super().__init__("pooled", width, dropout, pool4)
        channels = self.channels["conv13"]
        self.pool = nn.AdaptiveMaxPool2d(1)  # at 32x32 the 2x2 pooling after block 5
        self.dropout = nn.Dropout(HEAD_DROPOUT * dropout)
        self.linear = nn.Linear(channels, channels)
        self.level = BranchNorm(channels, dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = images
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
        x = self.linear(self.dropout(self.pool(x).flatten(1)))
        return self.classifier(self.level(x)), {}

    def class_layers(self) -> list[nn.Linear]:
        return [self.classifier]


class VGGGAP(Network):
    """The attention networks' trunk without attention: average pooling and a linear layer (Zhou et
    al., arXiv 1512.04150).

    With the same recipe it is the fair control for the effect of attention: VGG differs from the
    attention networks in resolution as well.
    """

    def __init__(self, num_classes: int, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__(trunk, width, dropout, pool4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self.channels["conv13"], num_classes)

    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = images
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
        return self.classifier(self.pool(x).flatten(1)), {}

    def class_layers(self) -> list[nn.Linear]:
        return [self.classifier]


class AttentionVGG(Network):
    """VGG-att1, att2, att3: attention at conv13, conv10 and conv13, or conv7, conv10 and conv13
    (paper section 3).

    With pc the output does not depend on g (see ParametrizedCompatibility), so the global branch
    does not run: its parameters exist, as in the authors' network, and get no gradient. With
    uniform there is no g, and no map.
    """

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
        attended = tuple(LEVEL_OF_BLOCK.values())[-levels:]
        self._levels = () if compatibility == "uniform" else attended
        channels = self.channels["conv13"]
        if compatibility != "uniform":
            self.global_branch = GlobalBranch(channels, dropout, self.eps)
        self.uses_global = compatibility in ("dp", "gate")
        self.dot_product = compatibility == "dp"
        # the gate's V maps g to any width by itself
        if levels == 3 and compatibility in ("pc", "dp"):
            self.global_to_conv7 = nn.Sequential(
                nn.BatchNorm1d(channels),
                nn.ReLU(inplace=False),
                nn.Dropout(HEAD_DROPOUT * dropout),
                nn.Linear(channels, self.channels["conv7"]),
            )
        self.gates = nn.ModuleDict(
            {
                level: AttentionGate(compatibility, self.channels[level], channels)
                for level in attended
            }
        )
        self.classifier = Classifier(
            [self.channels[level] for level in attended], num_classes, combination, dropout
        )

    @property
    def levels(self) -> tuple[str, ...]:
        return self._levels

    @property
    def global_branches(self) -> tuple[str, ...]:
        return ("global_branch",) if self.uses_global else ()

    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, local = images, {}
        for number in range(1, 6):
            x = self.trunk.run_block(number, x)
            if LEVEL_OF_BLOCK.get(number) in self.gates:
                local[LEVEL_OF_BLOCK[number]] = x
        g = self.global_branch(x) if self.uses_global else None
        attended, scores = [], {}
        for level, features in local.items():
            level_g = g
            if level == "conv7" and g is not None and hasattr(self, "global_to_conv7"):
                level_g = self.global_to_conv7(g)
            if self.dot_product:  # see initialize
                level_g = level_g / math.sqrt(features.shape[1])
            g_a, scores[level] = self.gates[level](features, level_g)
            attended.append(g_a)
        return self.classifier(attended), {level: scores[level] for level in self.levels}

    def class_layers(self) -> list[nn.Linear]:
        return list(self.classifier.linears)

    def parameters_without_gradient(self) -> set[str]:
        if self.uses_global or not self.levels:
            return set()
        unused = [*self.global_branch.parameters()]
        if hasattr(self, "global_to_conv7"):
            unused += self.global_to_conv7.parameters()
        unused += [gate.compatibility.u.bias for gate in self.gates.values()]
        return self.names_of(unused)

    def compatibilities(self) -> dict[str, nn.Module]:
        return {level: self.gates[level].compatibility for level in self.levels}


class VGGPAN(Network):
    """VGG-PAN, progressive attention (Seo et al., arXiv 1606.02393) as the authors built it: a
    sigmoid pc gate multiplies conv10's activations before block 5, softmax pc attention reads
    conv13, and the head sees only the latter."""

    sigmoid_levels = ("conv10",)

    def __init__(self, num_classes: int, trunk: str, width: float, dropout: float, pool4: int):
        super().__init__(trunk, width, dropout, pool4)
        channels = self.channels["conv13"]
        self.global_branch_conv10 = GlobalBranch(channels, dropout, self.eps, first_pool=4)
        # for softmax pc: does not run, as in AttentionVGG
        self.global_branch = GlobalBranch(channels, dropout, self.eps)
        self.compatibility_conv10 = ParametrizedCompatibility(channels)
        self.gates = nn.ModuleDict({"conv13": AttentionGate("pc", channels, channels)})
        self.classifier = Classifier([channels], num_classes, "concat", dropout)

    @property
    def levels(self) -> tuple[str, ...]:
        return ("conv10", "conv13")

    @property
    def global_branches(self) -> tuple[str, ...]:
        return ("global_branch_conv10",)

    def logits_and_raw_scores(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, scores = images, {}
        for number in range(1, 5):
            x = self.trunk.run_block(number, x)
        scores["conv10"] = self.compatibility_conv10(x, self.global_branch_conv10(x))
        x = x * scores["conv10"].sigmoid()[:, None]
        x = self.trunk.run_block(5, x)
        g_a, scores["conv13"] = self.gates["conv13"](x, None)
        return self.classifier([g_a]), scores

    def class_layers(self) -> list[nn.Linear]:
        return list(self.classifier.linears)

    def parameters_without_gradient(self) -> set[str]:
        u = self.gates["conv13"].compatibility.u
        return self.names_of([*self.global_branch.parameters(), u.bias])

    def compatibilities(self) -> dict[str, nn.Module]:
        return {"conv10": self.compatibility_conv10, "conv13": self.gates["conv13"].compatibility}


# ---- building a network -------------------------------------------------------------------------


def build_model(
    name: str,
    num_classes: int,
    width: float = 1.0,
    trunk: str | None = None,
    dropout: float = 1.0,
    pool4: int = 2,
) -> Network:
    """Build a network with fresh weights from torch's global random generator.

    Args:
        name: one of MODEL_NAMES.
        num_classes: outputs, 1 or more.
        width: factor on every number of channels (1.0: the paper's).
        trunk: "full" or "pooled"; None: pooled for vgg, full otherwise.
        dropout: factor on the authors' dropout rates (0 turns it off).
        pool4: side and stride of the pooling before block 4 (5: the authors' for CUB at 80 px).

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
            "vgg pools after every block: it has no full trunk. "
            "vgg-gap is the baseline that has one"
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
        _, levels, *combination, compatibility = name.split("-")  # vgg-att1-pc: no combination
        model = AttentionVGG(
            int(levels.removeprefix("att")),
            combination[0] if combination else "concat",
            compatibility,
            num_classes,
            trunk,
            width,
            dropout,
            pool4,
        )
    initialize(model)
    return model


# ---- initialization -----------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Set fresh weights. They are the authors' (convolutions N(0, sqrt(2 / (k*k*out))), linear
    layers U(-1/sqrt(in), 1/sqrt(in)), which is nn.Linear's own, batch norm U(0, 1), u as a
    convolution with one output: std 1.41) with these exceptions:

    - A 3x3 convolution starts as the identity (Dirac): filter i passes channel i through, filters
      beyond the number of input channels are the authors'. Thirteen layers without a shortcut learn
      much faster from there (docs/recipes.md, "Initialization").
    - Batch norm starts at weight 1 and, after those convolutions, at bias 1: otherwise ReLU would
      cut off half of the remaining signal at every layer, and pass 7 % by the last.
    - Scores start with a standard deviation of order 1 over positions, so that the maps start
      spread out: u is N(0, 1/sqrt(C)), and the layers that produce g for dp start at half of
      PyTorch's weights. The authors' u makes softmax almost one-hot at once, and a one-hot map
      passes no gradient to the other positions.
    - For dp, g is in units of 1/sqrt(C): the network divides the output of its linear layer. <l, g>
      is a sum of C products, and a step on that layer moves each of them by C more. Without the
      division the first steps drive the scores to hundreds, and the maps onto one position for good
      (docs/recipes.md, "Initialization"). u moves the scores by C, as dp now does.
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
        if isinstance(module, VECTOR_COMPATIBILITIES):
            nn.init.normal_(module.u.weight, std=1 / math.sqrt(module.u.in_features))
            if module.u.bias is not None:
                nn.init.zeros_(module.u.bias)
    if isinstance(model, AttentionVGG) and model.dot_product:
        linears = [model.global_branch.linear]
        if len(model.levels) == 3:
            linears.append(model.global_to_conv7[-1])
        for linear in linears:
            linear.weight.mul_(0.5)


# ---- evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def fuse_conv_bn(model: Network) -> Network:
    """A copy for evaluation with each batch norm folded into the convolution before it, which saves
    a CPU one pass over each activation. Equal up to rounding."""
    model = copy.deepcopy(model).eval()
    for unit in model.modules():
        if isinstance(unit, ConvBNReLU):
            unit.conv, unit.norm = fuse_conv_bn_eval(unit.conv, unit.norm), nn.Identity()
    return model


# ---- activation checkpointing -------------------------------------------------------------------


def run_layers(layers: list[nn.Module], x: Tensor, save_memory: bool) -> Tensor:
    """Run the layers one after the other. In training with ``save_memory``, everything between x
    and the result is dropped and recomputed in the backward pass."""

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    if not (save_memory and torch.is_grad_enabled()):
        return run(x)
    # the compiler updates the statistics only once by itself, and accepts no context_fn
    if torch.compiler.is_compiling():
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(
        run,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), freeze_bn_stats(layers)),
    )


@contextlib.contextmanager
def freeze_bn_stats(layers: list[nn.Module]) -> Iterator[None]:
    """Batch norm normalizes as usual but keeps its running statistics: the recomputation must not
    update them a second time."""
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
