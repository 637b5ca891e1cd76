"""Train a VGG with attention gates on CIFAR-10 ("Learn to Pay Attention", Jetley et al., ICLR
2018, arXiv 1804.02391).

    python train_cifar10.py --sample        a small network on generated pictures, in a minute
    python train_cifar10.py --sanity        every path of a run, on a small slice, in a minute
    python train_cifar10.py                 the fast recipe, vgg-att3-concat-pc
    python train_cifar10.py --help          all options

Both recipes are those of CIFAR-100; the paper, too, has one for both data sets. Its best result on
CIFAR-10 is 94.77 % (vgg-att2-concat-pc, 300 epochs). This code has not been measured on CIFAR-10.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

from data import CIFAR10
from train_cifar100 import FAST, PAPER, SAMPLE, SHORT  # a default is in one place
from training.commands import main
from training.task import Task

TASK = Task(
    description="Train a VGG with attention gates on CIFAR-10 (arXiv 1804.02391).",
    recipes={"fast": FAST, "paper": PAPER},
    short={"fast": SHORT},
    sample={"fast": SAMPLE, "paper": SAMPLE},
    model="vgg-att3-concat-pc",
    data=CIFAR10,
)

if __name__ == "__main__":
    sys.exit(main(TASK))
