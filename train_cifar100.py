"""Train a VGG with attention gates on CIFAR-100 ("Learn to Pay Attention", Jetley et al., ICLR
2018, arXiv 1804.02391).

    python train_cifar100.py --sample       a small network on generated pictures, in a minute
    python train_cifar100.py --sanity       every path of a run, on a small slice, in a minute
    python train_cifar100.py                the fast recipe, vgg-att3-concat-pc
    python train_cifar100.py --help         all options

``python train_cifar100.py`` reaches 78.67 % top-1 (sd 0.22) on the 10,000 test images at the last
of 30 epochs: mean of three runs, seeds 0 to 2, in bf16 with PyTorch 2.11.0. Seed 0 took 5 min 40 s
from start to exit, alone on an NVIDIA H100 (docs/results.md, "CIFAR-100, full width, on GPUs"). The
paper: 77.03 % after 300 epochs.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from common.process import settle

    settle()  # before PyTorch is loaded

from data import CIFAR100
from training.commands import main
from training.task import Task

# fmt: off
# Every default, with its unit and source. --set NAME=VALUE changes one that has no option.
PAPER = {
    "epochs": 300,              # authors' code
    "batch_size": 128,          # images; authors' code
    "lr": 0.1,                  # authors' 1.0 in Torch7, whose SGD has dampening 0.9: 0.1 here
    "lr_by_width": 0.0,         # factor on lr: 1 / width, at most this (not on Muon's); 0: 1
    "momentum": 0.9,            # authors' code
    "muon": 0.0,                # 3x3 filters by Muon (training/optim.py) at this times lr; 0: SGD
    "nesterov": False,          # authors' code
    "weight_decay": 5e-4,       # authors' code
    "decay_all": True,          # on every parameter; authors' code
    "schedule": "halve",        # lr halved ...
    "halve_every": 25,          # ... every so many epochs; authors' code
    "warmup": 0.0,              # share of the run over which the rate rises
    "label_smoothing": 0.0,     # authors' code
    "dropout": 1.0,             # factor on the authors' rates (0.3 to 0.5)
    "ema_decay": 0.0,           # moving average of the weights, per step; 0: none
    "ema_share": 0.02,          # share of the run that it spans at most; 1: no limit
    "crop_pad": 4,              # pixels of reflection for the random crop; the authors only flip
    "flip": True,               # authors' code
    "trivial_augment": False,   # one of 14 changes to each image (arXiv 2103.10158)
    "cutout": 0,                # side in pixels; 0: none
    "zoom": 0.0,                # smallest share of the image in a random resized crop; 0: none
    "jitter": 0.0,              # brightness, contrast, saturation times 1 +/- jitter; 0: none
    "progressive": "none",      # progressive resizing (training/optim.py)
    "progressive_from": 300,    # optimizer steps; shorter runs train at full size throughout
    "trunk": "",                # full or pooled; "": what suits the model (the paper's)
    "pool4": 2,                 # side of the pooling in front of block 4
    "init_from": "none",        # weights to start from
    "freeze_epochs": 0.0,       # epochs in which a transferred trunk is frozen
    "transfer_lr": 1.0,         # factor on the learning rate of transferred layers
}
FAST = PAPER | {
    "epochs": 30,
    "nesterov": True,
    "lr": 0.05,                 # full width; 0.1 and 0.2 learn less (docs/recipes.md)
    "muon": 0.3,                # learns more per step than SGD (docs/recipes.md, "Muon")
    "lr_by_width": 4.0,         # lr is 0.1 at width 0.5, 0.2 at 0.25 and below
    "decay_all": False,         # filters and matrices: decay pulls a gate's u to a flat map
    "schedule": "linear",       # up, down to 0: most of a long schedule's gain in a tenth of it
    "warmup": 0.15,
    "label_smoothing": 0.1,
    "dropout": 0.0,             # TrivialAugment instead
    "trivial_augment": True,    # else the last ten of 30 epochs only memorize: 97.5 % in training,
                                # 65.5 % held out
    "ema_decay": 0.99,
    "progressive": "0.5:0.3 0.75:0.5",  # half the side until 0.3 of the run, 3/4 until 0.5
}
# Changes to the fast recipe in runs under 10 epochs (a CPU's): faster filters, more of the run on
# small images, and no TrivialAugment, as they are too short to overfit (docs/recipes.md, "The two
# recipes").
SHORT = {
    "muon": 0.6,
    "trivial_augment": False,
    "progressive": "0.5:0.7 0.75:0.9",
}
# A run on the built-in sample (--sample): a minute on two cores, to about 100 %.
SAMPLE = {"width": 0.125, "epochs": 5}
# fmt: on

TASK = Task(
    description="Train a VGG with attention gates on CIFAR-100 (arXiv 1804.02391).",
    recipes={"fast": FAST, "paper": PAPER},
    short={"fast": SHORT},
    sample={"fast": SAMPLE, "paper": SAMPLE},
    model="vgg-att3-concat-pc",
    data=CIFAR100,
)

if __name__ == "__main__":
    sys.exit(main(TASK))
