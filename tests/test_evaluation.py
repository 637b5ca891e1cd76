"""Evaluation against an independent loop."""

import pytest
import torch

from attention_model import build_model
from common.device import Precision
from tests.helpers.trainers import CPU
from training.evaluation import evaluate


def test_evaluation_against_a_loop_over_images():
    torch.manual_seed(3)
    model = build_model("vgg-gap", 7, width=1 / 16).train()
    images, labels = torch.randn(11, 3, 32, 32), torch.randint(7, (11,))
    batches = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 11, 4)]
    result = evaluate(model, batches, 7, Precision("fp32", CPU))
    assert model.training
    model.eval()
    with torch.no_grad():
        ranks = [
            (model(x[None])[0].argsort(descending=True) == y).nonzero().item()
            for x, y in zip(images, labels, strict=True)
        ]
        loss = (
            sum(
                -model(x[None])[0].log_softmax(0)[y].item()
                for x, y in zip(images, labels, strict=True)
            )
            / 11
        )
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.top1 == pytest.approx(100 * sum(r == 0 for r in ranks) / 11)
    assert result.top5 == pytest.approx(100 * sum(r < 5 for r in ranks) / 11)
    assert result.class_counts == torch.bincount(labels, minlength=7).tolist()
    assert sum(result.class_correct) == sum(r == 0 for r in ranks)
