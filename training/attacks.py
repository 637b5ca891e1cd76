"""Adversarial images: FGSM and PGD.

An attack of strength s looks for images that differ by at most s / 255 in every color value, on
which the network's loss is higher. It knows the network: it follows the sign of the loss's gradient
with respect to the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attention_model import Network, fuse_conv_bn
from common.device import Precision

MAX_STRENGTH = 255  # the range of an 8-bit color value: a strength of 1 is one of its steps
PGD_STEPS = 20
PGD_REACH = 2.5  # the length of all steps together, in units of the bound: far enough to turn back
NOISE_SEED = 0
# the smallest probability of a mistake that an image's loss is divided by, near float64's precision


class AttackedNetwork:
    """A network as its attacker sees it: it takes images in [0, 1], and its normalization is
    inside.

    Works on a copy in evaluation mode whose parameters get no gradient.
    """

    def __init__(
        self,
        model: Network,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
        observe: Callable[[int], object] = lambda count: None,
    ):
        """mean, std: of each channel, as in ``data.to_input``. observe: gets the number of images
        after each gradient."""
        self.network = fuse_conv_bn(model).requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(values, device=precision.device).view(1, 3, 1, 1) for values in (mean, std)
        )
        self.precision, self.observe = precision, observe

    def images_of(self, inputs: Tensor) -> Tensor:
        """The network's input (N, 3, H, W) -> images in [0, 1]."""
        return (inputs * self.std + self.mean).clamp_(0, 1)

    def inputs_of(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> the network's input."""
        return (images - self.mean) / self.std

    @torch.enable_grad()
    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient (N, 3, H, W) of each image's cross-entropy with its label (N,), divided by
        the probability p that the network gives to the other classes.

        The division changes no sign. Without it, the gradient of an image that the network is sure
        of would be lost in half precision. What remains is the gradient of log(p / (1 - p))."""
        images = images.detach().requires_grad_()
        with self.precision.context():
            logits = self.network(self.inputs_of(images))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        of_label = labels[:, None]
        others = logits.scatter(1, of_label, -torch.inf).logsumexp(1)
        (gradient,) = torch.autograd.grad((others - logits.gather(1, of_label)[:, 0]).sum(), images)
        self.observe(len(images))
        return gradient


# ---- attacks ------------------------------------------------------------------------------------
# Each takes images (N, 3, H, W) in [0, 1], labels (N,), strengths, and a generator on the CPU, and
# yields the attacked images of each strength.


def fgsm(
    network: AttackedNetwork,
    images: Tensor,
    labels: Tensor,
    strengths: Sequence[float],
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Fast gradient sign method (Goodfellow et al., arXiv 1412.6572): one step as long as the bound
    allows. One gradient serves all strengths. Draws nothing."""
    direction = network.gradient(images, labels).sign_()
    for strength in strengths:
        yield (images + strength / MAX_STRENGTH * direction).clamp_(0, 1)


def pgd(
    network: AttackedNetwork,
    images: Tensor,
    labels: Tensor,
    strengths: Sequence[float],
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): PGD_STEPS steps along the
    gradient's sign, each followed by a projection onto the bound around the image and onto [0, 1].
    It starts at a random point within the bound, in the same direction for all strengths."""
    # on the CPU: the same on every device; in the order of the images: the same in any batches
    noise = torch.rand(images.shape, generator=generator).to(images).mul_(2).sub_(1)
    for strength in strengths:
        bound = strength / MAX_STRENGTH
        low, high = (images - bound).clamp_(min=0), (images + bound).clamp_(max=1)
        attacked = (images + bound * noise).clamp_(low, high)
        for _ in range(PGD_STEPS):
            direction = network.gradient(attacked, labels).sign_()
            attacked = attacked.add(direction, alpha=PGD_REACH * bound / PGD_STEPS)
            attacked.clamp_(low, high)
        yield attacked


ATTACKS = {"fgsm": fgsm, "pgd": pgd}
STEPS = {"none": 0, "fgsm": 1, "pgd": PGD_STEPS}


def gradients_per_image(attacks: Mapping[str, Sequence[float]]) -> int:
    """How many gradients the attacks, strengths by name, take for each image."""
    return sum(1 if name == "fgsm" else STEPS[name] * len(attacks[name]) for name in attacks)


def attacked_batches(
    network: AttackedNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Sequence[float]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input (N, 3, H, W), labels (N,)) of each batch: first as it is, then after each attack at
    each strength, in their order."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for inputs, labels in batches:
        yield inputs, labels
        images = network.images_of(inputs)
        for name, strengths in attacks.items():
            for attacked in ATTACKS[name](network, images, labels, strengths, generator):
                yield network.inputs_of(attacked), labels
