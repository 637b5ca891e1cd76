"""Train a VGG with attention gates on class folders of your own images ("Learn to Pay Attention",
Jetley et al., ICLR 2018, arXiv 1804.02391).

    python train_folder.py --data-dir photos                   photos/<class>/*, which is split, or
                                                               photos/{train,test}/<class>/*
    python train_folder.py --data-dir photos --recipe small    32 px, from scratch
    python train_folder.py --data-dir photos --sanity          every path of a run, in a minute
    python train_folder.py --sample                            a small network, generated pictures
    python train_folder.py --help                              all options

docs/data.md, "Your own images", has the layouts, and what is done with images of other shapes.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

import train_cifar100
import train_cub
from data import FOLDER
from training.commands import main
from training.task import Task

# fmt: off
# The recipe for CIFAR-100, whose values train_cifar100.py explains, and what class folders need
# besides. --set NAME=VALUE changes one that has no option.
SMALL = train_cifar100.FAST | {
    "image_size": 32,           # pixels
    "crop": "center",           # the centered square of the shorter side, or the whole image
    "test_share": 0.2,          # of each class, where there is no test/ or val/
    "split_seed": 0,            # draws it. Not --seed: runs that differ in that share a test set
    "near_duplicates": True,    # are looked for, and kept on one side of that split
    "skip_unreadable": False,   # leave out images that cannot be read
}
# The recipe for birds, whose values train_cub.py explains.
PHOTOS = SMALL | {name: value for name, value in train_cub.FAST.items() if name in SMALL} | {
    "crop": "center",
}
# fmt: on

TASK = Task(
    description="Train a VGG with attention gates on class folders of your own images "
    "(arXiv 1804.02391).",
    recipes={"photos": PHOTOS, "small": SMALL},
    short={"small": train_cifar100.SHORT},
    sample={"photos": train_cub.SAMPLE, "small": train_cifar100.SAMPLE},
    model="vgg-att3-concat-pc",
    data=FOLDER,
)

if __name__ == "__main__":
    sys.exit(main(TASK))
