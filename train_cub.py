"""Train a VGG with attention gates on CUB-200-2011, 200 kinds of birds ("Learn to Pay Attention",
Jetley et al., ICLR 2018, arXiv 1804.02391).

    python train_cub.py --sample        a small network on generated pictures, in a minute
    python train_cub.py --sanity        every path of a run, on a small slice
    python train_cub.py                 vgg-att3-concat-pc at 224 px, from ImageNet weights
    python train_cub.py --recipe paper --init-from runs/cifar100/RUN/last.pt
    python train_cub.py --help          all options

On the first 40 of the 200 classes, at 224 px, the default recipe reaches 71.5 % top-1 from a
CIFAR-100 network (two runs, 71.28 and 71.74) and 51.74 % from scratch (docs/results.md, "Full
width, on a GPU"). ImageNet weights and all 200 classes have not been measured.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

from data import CUB
from training.commands import main
from training.task import Task

# fmt: off
# Every default, with its unit and source. --set NAME=VALUE changes one that has no option.
PAPER = {
    "epochs": 320,              # authors' code
    "batch_size": 128,          # images; authors' code
    "lr": 0.01,                 # authors' 0.1 in Torch7, whose SGD has dampening 0.9: 0.01 here
    "lr_by_width": 0.0,         # factor on lr: 1 / width, at most this (not on Muon's); 0: 1
    "momentum": 0.9,            # authors' code
    "nesterov": False,          # authors' code
    "muon": 0.0,                # 3x3 filters by Muon (training/optim.py) at this times lr; 0: SGD
    "weight_decay": 5e-4,       # authors' code
    "decay_all": True,          # on every parameter; authors' code
    "schedule": "double-halve", # lr doubled after halve_every epochs and again, then halved ...
    "halve_every": 30,          # ... every so many epochs; authors' code
    "warmup": 0.0,              # share of the run over which the rate rises
    "label_smoothing": 0.0,     # authors' code
    "dropout": 1.0,             # factor on the authors' rates (0.3 to 0.5)
    "ema_decay": 0.0,           # moving average of the weights, per step; 0: none
    "ema_share": 0.02,          # share of the run that it spans at most; 1: no limit
    "image_size": 80,           # pixels; authors' code
    "crop": "box",              # to the bounding box (authors' code), or the whole image
    "margin": 0.0,              # added to each side of the box, in units of its longer side
    "zoom": 0.0,                # smallest share of the image in a random resized crop; 0: none
    "crop_pad": 0,              # pixels of reflection for the random crop; 0: none
    "flip": True,               # authors' code
    "jitter": 0.0,              # brightness, contrast, saturation times 1 +/- jitter; 0: none
    "trivial_augment": False,   # one of 14 changes to each image (arXiv 2103.10158)
    "cutout": 0,                # side in pixels; 0: none
    "progressive": "none",      # progressive resizing (training/optim.py)
    "progressive_from": 300,    # optimizer steps; shorter runs train at full size throughout
    "trunk": "",                # full or pooled; "": what suits the model (full: authors' code)
    "pool4": 5,                 # side of the pooling before block 4: 16x16 maps; authors' code
    "init_from": "",            # a CIFAR-100 checkpoint, which has to be named: authors' code
    "freeze_epochs": 0.0,       # nothing is frozen: authors' code
    "transfer_lr": 1.0,         # one rate for all: authors' code
}
FAST = PAPER | {
    "epochs": 60,
    "batch_size": 32,
    "lr": 0.02,                 # of the new layers
    "nesterov": True,
    "decay_all": False,         # filters and matrices: decay pulls a gate's u to a flat map
    "schedule": "linear",       # up, then down to 0
    "warmup": 0.1,
    "label_smoothing": 0.1,
    "dropout": 0.0,
    "ema_decay": 0.99,
    "image_size": 224,          # what the ImageNet weights were trained at
    "margin": 0.1,
    "zoom": 0.5,
    "jitter": 0.2,
    "trunk": "pooled",          # fits the ImageNet weights, and 224 px into a small card
    "pool4": 2,
    "init_from": "imagenet",
    "freeze_epochs": 2.0,       # new layers give the trunk useless gradients at first
    "transfer_lr": 0.5,         # between 0.2 and 1 (docs/recipes.md, "Why birds converge")
}
# A run on the built-in sample (--sample): a minute on two cores, to about 100 %.
SAMPLE = {"width": 0.125, "image_size": 96, "epochs": 40, "batch_size": 16, "init_from": "none"}
# fmt: on

TASK = Task(
    description="Train a VGG with attention gates on CUB-200-2011 (arXiv 1804.02391).",
    recipes={"fast": FAST, "paper": PAPER},
    short={},
    sample={"fast": SAMPLE, "paper": SAMPLE},
    model="vgg-att3-concat-pc",
    data=CUB,
)

if __name__ == "__main__":
    sys.exit(main(TASK))
