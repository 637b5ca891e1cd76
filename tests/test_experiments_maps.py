"""experiments/replaced_maps.py against the network's own formula, and what replacing changes."""

import copy

import numpy as np
import pytest
import torch

from attention_model import attend, build_model
from common.device import Precision
from common.errors import UserError
from experiments.replaced_maps import (
    average_scores,
    blocks_remembered,
    divergence,
    measure,
    outputs_replaced,
    partners,
    uniform_scores,
)

CPU32 = Precision("fp32", torch.device("cpu"))
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


def network(name: str):
    torch.manual_seed(0)
    model = build_model(name, 3, width=1 / 16).eval()
    with torch.no_grad():
        for gate in model.gates.values():  # maps that differ between images
            for p in gate.parameters():
                p.mul_(4)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches_of(images, size=4):
    return lambda: zip(images.split(size), LABELS.split(size), strict=True)


def top1_with(model, images, maps) -> list[float]:
    """Top-1 with these maps, by the formula: attend, then the classifier; and the same with batch
    norm by the statistics of these features."""
    local, hooks = {}, []
    for level, gate in model.gates.items():
        hooks.append(
            gate.register_forward_hook(lambda m, i, o, level=level: local.update({level: i[0]}))
        )
    model(images)
    for hook in hooks:
        hook.remove()
    attended, found = [attend(local[level], maps[level]) for level in model.gates], []
    for anew in (False, True):
        classifier = copy.deepcopy(model.classifier)
        for part in classifier.levels if anew else ():
            # without statistics of its own, batch norm takes those of the batch
            part.norm.running_mean = part.norm.running_var = None
        logits = classifier([features.clone() for features in attended])
        found.append(100 * (logits.argmax(1) == LABELS).float().mean().item())
    return found


@pytest.mark.parametrize("name", ["vgg-att3-concat-pc", "vgg-att2-indep-gate"])
def test_accuracy_with_replaced_maps_is_that_of_the_formula(name, images):
    model = network(name)
    found = measure(model, batches_of(images), CPU32)
    with torch.no_grad():
        logits, maps = model(images, return_attention=True)
        partner = partners(LABELS)
        expected = {
            "uniform": {k: torch.full_like(m, 1 / m[0].numel()) for k, m in maps.items()},
            "average": {k: m.mean(0, keepdim=True).expand_as(m) for k, m in maps.items()},
            **{name: {k: m[i] for k, m in maps.items()} for name, i in partner.items()},
        }
        assert found["images"] == 10
        assert found["top1"] == pytest.approx(top1_with(model, images, maps)[0], abs=1e-3)
        for row in found["replaced"]:
            if row["of"] == "g":
                continue
            levels = model.levels if row["of"] == "all" else (row["of"],)
            expected.setdefault("own", maps)
            replaced = maps | {level: expected[row["by"]][level] for level in levels}
            top1 = [row["top1"], row["top1_recalibrated"]]
            assert top1 == pytest.approx(top1_with(model, images, replaced), abs=1e-3), row
    assert {row["of"] for row in found["replaced"]} - {"g"} == {*model.levels, "all"}


def test_the_gates_of_another_image_need_its_g(images):
    """With another image's g, the scores of gate are u . relu(W l + V g')."""
    model = network("vgg-att1-gate")
    found = measure(model, batches_of(images), CPU32)
    assert set(found["moved_by_g"]) == {"same class", "other class"}
    with torch.no_grad():
        g = {}
        hook = model.global_branch.register_forward_hook(lambda m, i, o: g.update(own=o))
        _, own = model(images, return_attention=True)
        hook.remove()
        index = partners(LABELS)["other class"]
        with outputs_replaced({"g": model.global_branch}, lambda name, out: g["own"][index]):
            _, moved = model(images, return_attention=True)
        expected = divergence(own["conv13"], moved["conv13"]).mean().item()
    assert found["moved_by_g"]["other class"]["conv13"] == pytest.approx(expected, abs=2e-4)
    assert found["between_images"]["other class"]["conv13"] > 0


def test_pc_has_no_query_and_pan_a_gate(images):
    assert measure(network("vgg-att1-pc"), batches_of(images), CPU32)["moved_by_g"] == {}
    found = measure(network("vgg-pan"), batches_of(images), CPU32)
    assert {row["of"] for row in found["replaced"]} == {"conv10", "conv13", "all", "g"}
    assert set(found["between_images"]["same class"]) == {"conv13"}
    with pytest.raises(UserError, match="no attention maps"):
        torch.manual_seed(0)
        measure(build_model("vgg-gap", 3, width=1 / 16), batches_of(images), CPU32)


def test_replaced_scores():
    scores = torch.randn(5, 2, 3, dtype=torch.float64)
    assert uniform_scores(scores, False).unique().tolist() == [0]
    mean = scores.sigmoid().mean((1, 2))
    for got, expected in zip(uniform_scores(scores, True), mean, strict=True):
        torch.testing.assert_close(got.sigmoid(), expected.expand(2, 3))
    softmax = scores.flatten(1).softmax(1).view_as(scores)
    average = average_scores(scores, False)
    torch.testing.assert_close(average.flatten(1).softmax(1).view(2, 3), softmax.mean(0))
    torch.testing.assert_close(average_scores(scores, True)[0].sigmoid(), scores.sigmoid().mean(0))


def test_every_image_has_a_partner_of_the_same_and_of_another_class():
    found = partners(LABELS, seed=3)
    own = torch.arange(len(LABELS))
    for name, index in found.items():
        assert sorted(index.tolist()) == own.tolist() and not (index == own).any()
        assert ((LABELS[index] == LABELS) == (name == "same class")).all()
    assert not torch.equal(found["other class"], partners(LABELS, seed=4)["other class"])


def test_divergence_is_jensen_shannons():
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.25, 0.25, 0.25, 0.25])
    m = (p + q) / 2
    kl = [sum(a * np.log2(a / b) for a, b in zip(x, m, strict=True) if a) for x in (p, q)]
    got = divergence(*(torch.tensor(x).view(1, 2, 2) for x in (p, q)))
    assert got.item() == pytest.approx(sum(kl) / 2, abs=1e-12)
    apart = torch.eye(4).view(4, 2, 2)
    assert divergence(apart, apart).abs().max() < 1e-12
    assert divergence(apart, apart.roll(1, 0)).tolist() == pytest.approx([1] * 4)


def test_remembered_blocks_run_once_and_are_forgotten(images):
    model, runs = network("vgg-pan"), []
    model.trunk.block1.register_forward_hook(lambda m, i, o: runs.append(1))
    model.trunk.block5.register_forward_hook(lambda m, i, o: runs.append(5))
    with torch.no_grad(), blocks_remembered(model):
        first, again = model(images), model(images)
        assert torch.equal(first, again) and runs.count(1) == 1 and runs.count(5) == 2
        assert not torch.equal(model(images.flip(3)), first) and runs.count(1) == 2
    assert "run_block" not in vars(model.trunk)
