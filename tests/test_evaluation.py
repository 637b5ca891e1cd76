"""Evaluation against an independent loop."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from attention_model import build_model
from common.device import Precision
from tests.helpers.trainers import CPU
from training.evaluation import (
    PredictionRecorder,
    Predictions,
    evaluate,
    interval_95,
    mean_interval_95,
)


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


# ---- of each image ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [3, 12])
def test_recorded_predictions_count_as_the_evaluation_does(classes, tied):
    """Also where several classes have the same logit: then the same ones must be taken."""
    torch.manual_seed(0)
    model = build_model("vgg-gap", classes, width=1 / 16)
    if tied:
        for parameter in model.classifier.parameters():
            parameter.data.zero_()
    images, labels = torch.randn(40, 3, 32, 32), torch.randint(classes, (40,))
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    recorder = PredictionRecorder()
    result = evaluate(model, batches, classes, Precision("fp32", CPU), observe=recorder.observe)
    assert result == evaluate(model, batches, classes, Precision("fp32", CPU))
    found = recorder.predictions()
    rows = list(zip(found.labels.tolist(), found.best.tolist(), strict=True))
    assert len(rows) == 40 and {len(set(best)) for _, best in rows} == {min(5, classes)}
    assert 100 * sum(label == best[0] for label, best in rows) / 40 == result.top1
    assert 100 * sum(label in best for label, best in rows) / 40 == result.top5
    assert found.labels.equal(labels)
    assert found.losses.mean().item() == pytest.approx(result.loss, rel=1e-6)
    with torch.no_grad():
        probabilities = model.eval()(images).double().softmax(1)
    torch.testing.assert_close(
        found.probabilities.double(), probabilities.gather(1, found.best), rtol=1e-4, atol=1e-6
    )


def test_mistakes_and_confusions_against_a_loop():
    rng = np.random.default_rng(1)
    labels, seen = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    sure = rng.integers(30, 40, 60) / 100  # many are equal: the first image comes first
    predictions = Predictions(
        torch.tensor(labels),
        torch.tensor(seen)[:, None],
        torch.tensor(sure)[:, None],
        torch.ones(60),
    )
    wrong = [i for i in range(60) if labels[i] != seen[i]]
    assert predictions.mistakes().tolist() == sorted(wrong, key=lambda i: (-sure[i], i))
    counts = Counter(zip(labels.tolist(), seen.tolist(), strict=True))
    # a fifth class that no image has and none is seen as
    confusions = predictions.confusions(5)
    assert confusions.shape == (5, 5) and confusions.sum() == 60
    for (label, answer), count in counts.items():
        assert confusions[label, answer] == count


# ---- intervals ----------------------------------------------------------------------------------


def test_the_interval_of_an_accuracy_solves_wilsons_equation():
    """Its ends are the shares p from which the measured one is 1.96 standard deviations away."""
    for correct, images in ((8, 10), (5931, 10_000), (1, 7), (41, 100)):
        measured = correct / images
        z2 = 1.959963985**2
        ends = np.roots([1 + z2 / images, -2 * measured - z2 / images, measured**2])
        assert interval_95(100 * measured, images) == pytest.approx(sorted(100 * ends), abs=1e-6)
    assert interval_95(80, 10) == pytest.approx((49.0, 94.3), abs=0.05)  # published


def test_the_interval_stays_between_0_and_100():
    for images in (1, 3, 7, 100, 9999):
        low, high = interval_95(0, images)
        assert low == 0 and math.copysign(1, low) == 1 and 0 < high < 100
        low, high = interval_95(100, images)
        assert 0 < low < 100 and high == pytest.approx(100) and high <= 100


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).exponential(size=50)
    spread = 1.96 * math.sqrt(sum((v - values.mean()) ** 2 for v in values) / 49) / math.sqrt(50)
    assert mean_interval_95(torch.tensor(values)) == pytest.approx(
        (values.mean() - spread, values.mean() + spread), rel=1e-4
    )
    assert all(math.isnan(end) for end in mean_interval_95(torch.ones(1)))
    assert mean_interval_95(torch.tensor([0.0, 0.0, 3.0]))[0] == 0  # no loss is below that
