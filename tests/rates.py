"""Which rates suit a width: 200 steps at full size at the recipe's rates and at others
(docs/recipes.md, "The rate and the width").

    python tests/rates.py DATA_DIR WIDTH [RATE,FILTERS ...]

RATE is that of all parameters but the filters, FILTERS that of the filters.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402 - once the path is set

from tests.helpers.runs import config_of
from train_cifar100 import TASK
from training.run import Run

STEPS, HELD_OUT = 200, 10_000


def measure(width: float, rate: float, filters: float, train, held_out) -> dict:
    """Loss of the last 20 steps, held-out top-1, the largest relative change of a layer's filters
    in a step, and each level's score sd."""
    config = config_of(
        TASK,
        "--width",
        width,
        "--epochs",
        1,
        "--lr",
        rate,
        "--set",
        f"muon={filters / rate}",
        "--set",
        "lr_by_width=0",
        "--set",
        "progressive=none",
        "--no-compile",
    )
    run = Run(TASK, config, Path("."), train, held_out)
    trainer, losses, largest = run.trainer, [], 0.0
    weights = [conv.weight for conv in trainer.model.normalized_convs()]
    for images, labels in trainer.batches.epoch(0):
        before, sums = [p.detach().clone() for p in weights], trainer.sums.clone()
        trainer.step(images, labels)
        trainer.position.step += 1
        changes = [
            ((p.detach() - old).norm() / old.norm()).item()
            for p, old in zip(weights, before, strict=True)
        ]
        # the first step brings the filters to their norm
        largest = max(largest, *changes) if losses else 0.0
        losses.append(((trainer.sums - sums)[0] / len(images)).item())
    model, batch = trainer.eval_model, next(trainer.batches.epoch(0))[0]
    with torch.no_grad():
        result, (_, scores) = run.evaluate(), model.logits_and_scores(batch)
    return {
        "width": width,
        "rate": rate,
        "filters": filters,
        "loss": sum(losses[-20:]) / 20,
        "held_out_top1": result.top1,
        "largest_change_of_a_filter": largest,
        "score_sd": {level: s.flatten(1).std(1).mean().item() for level, s in scores.items()},
    }


if __name__ == "__main__":
    data_dir, width, *pairs = sys.argv[1:]
    everything, _ = TASK.data.load(
        {"data_dir": data_dir, "image_size": None, "num_workers": 0}, False
    )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(5))
    sets = everything.subset(order[: 128 * STEPS]), everything.subset(order[-HELD_OUT:])
    for pair in pairs or (
        "0.05,0.015",
        "0.1,0.015",
        "0.2,0.015",
        "0.1,0.0075",
        "0.1,0.03",
        "0.1,0.06",
    ):
        print(json.dumps(measure(float(width), *map(float, pair.split(",")), *sets)), flush=True)
