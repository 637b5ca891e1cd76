"""A small trainer on random images."""

import torch

from attention_model import build_model
from train_cifar100 import FAST
from training.trainer import Trainer

CONFIG = FAST | {
    "model": "vgg-att3-concat-gate",
    "width": 1 / 16,
    "batch_size": 8,
    "epochs": 2,
    "micro_batch": "auto",
    "checkpoint_activations": False,
    "progressive": "none",
    "input_size": [32, 32],
    "ema_decay": 0.9,
    "lr": 0.1,
    "muon": 0.15,
    "lr_by_width": 0.0,
}
CPU = torch.device("cpu")


class Batches:
    """Three batches of random images."""

    def __init__(self, count=8, device=CPU):
        torch.manual_seed(7)
        self.all = [
            (torch.randn(count, 3, 32, 32).to(device), torch.randint(4, (count,)).to(device))
            for _ in range(3)
        ]

    def __len__(self):
        return len(self.all)

    @property
    def images_per_step(self):
        return len(self.all[0][0])

    def epoch(self, epoch, start_step=0):
        yield from self.all[start_step:]


def make_trainer(batches=None, device=CPU, precision="fp32", compiled=False, **changes) -> Trainer:
    config = CONFIG | changes
    torch.manual_seed(0)
    model = build_model(config["model"], 4, width=config["width"], dropout=config["dropout"])
    return Trainer(
        config,
        model,
        batches or Batches(device=device),
        device,
        precision=precision,
        compiled=compiled,
    )


def staged(**changes) -> Trainer:
    """A trainer whose trunk and gates were transferred; two epochs of three steps, the first half
    of them frozen."""
    config = (
        CONFIG
        | {
            "freeze_epochs": 1.0,
            "transfer_lr": 0.1,
            "model": "vgg-att3-concat-dp",
            "ema_decay": 0.0,
        }
        | changes
    )
    torch.manual_seed(0)
    model = build_model(config["model"], 4, width=config["width"], dropout=0.0)
    names = frozenset(
        name for name in model.state_dict() if not name.startswith("classifier.linears")
    )
    return Trainer(
        config,
        model,
        Batches(config["batch_size"]),
        torch.device("cpu"),
        precision="fp32",
        transferred=names,
    )


def snapshot(ours):
    return {name: value.clone() for name, value in ours.model.state_dict().items()}
