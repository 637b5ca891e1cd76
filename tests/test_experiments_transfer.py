"""The features of a frozen network for other classes, and the linear classifier on them."""

import json

import numpy as np
import pytest
import torch

from attention_model import build_model
from common.device import Precision
from common.errors import UserError
from data import ImageSet, load_cifar100, load_cub, split_validation
from datasets.cub_sample import write_cub_sample
from experiments import transfer
from experiments.transfer import (
    WEIGHT_DECAYS,
    choose_weight_decay,
    first_classes,
    fit,
    handed_over,
    linear_probe,
    link_classes,
    zero_layer,
)
from tests.helpers.makers import load_cifar, make_folders, untrained
from train_cifar100 import FAST
from training.evaluation import interval_95

FP32 = Precision("fp32", torch.device("cpu"))
ANIMALS = ("ant", "bee", "cow", "dog")


def blobs(per_class=20, features=5, classes=3, noise=1.5, seed=0):
    """Overlapping clouds: features (N, C) float64, labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    centers = np.random.default_rng(0).normal(size=(classes, features))
    x = centers[labels] + noise * rng.normal(size=(len(labels), features))
    return torch.from_numpy(x), torch.from_numpy(labels)


def small_network(name):
    """With statistics and weights of batch norm that change something."""
    torch.manual_seed(0)
    model = build_model(name, 4, width=1 / 16)
    for norm in model.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model


def features_by_hand(model, images):
    """Each layer of attention, norm and pooling written out."""
    x, local = images, {}
    with torch.no_grad():
        model.eval()
        maps = model(images, return_attention=True)[1]
        for number in range(1, 6):
            x = model.trunk.run_block(number, x)
            local[{3: "conv7", 4: "conv10", 5: "conv13"}.get(number)] = x
        if not maps:
            return x.mean((2, 3))
        normed = []
        for level, branch in zip(maps, model.classifier.levels, strict=True):
            attended = torch.einsum("nhw,nchw->nc", maps[level], local[level])
            norm = branch.norm
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            normed.append(((attended - norm.running_mean) * scale + norm.bias).clamp(min=0))
        return torch.cat(normed, 1)


# ---- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg-gap", "vgg-att3-concat-pc", "vgg-att3-indep-pc"])
def test_the_features_are_those_of_a_forward_pass_by_hand(name):
    model, images = small_network(name), torch.randn(7, 3, 32, 32)
    batches = [(images[:4], torch.arange(4)), (images[4:], torch.arange(4, 7))]
    features, labels = handed_over(model, batches, FP32)
    expected = features_by_hand(model, images)
    assert features.dtype is torch.float32 and features.std() > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert labels.equal(torch.arange(7))
    with torch.no_grad():  # and the classes follow from them
        layers, logits = model.class_layers(), model(images)
    parts = features.split([layer.in_features for layer in layers], 1)
    sums = sum(layer(part) for layer, part in zip(layers, parts, strict=True))
    torch.testing.assert_close(sums.detach(), logits, rtol=1e-3, atol=1e-3)


def test_the_network_is_left_as_it_was(monkeypatch):
    """No hook, the mode, gradients; also where a batch fails. On a GPU nothing is a copy."""
    monkeypatch.setattr(transfer, "fuse_conv_bn", lambda model: model)
    model = small_network("vgg-att3-indep-pc").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = (torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    features, _ = handed_over(model, [batch, batch], FP32)
    assert features.shape[0] == 8 and not features.requires_grad
    with pytest.raises(ValueError, match="3, H, W"):
        handed_over(model, [batch, (torch.zeros(4, 1, 32, 32), batch[1])], FP32)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_features_that_are_not_finite_are_an_error():
    model = small_network("vgg-gap")
    torch.nn.init.constant_(model.trunk.block5[-1].norm.bias, float("nan"))
    with pytest.raises(UserError, match="not finite in fp32"):
        handed_over(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2))], FP32)


# ---- linear classifier --------------------------------------------------------------------------


def newton(x, y, classes, weight_decay, steps=30):
    """W (classes, C) and b (classes,) by Newton's method, with the whole Hessian."""
    inputs = np.hstack([x, np.ones((len(x), 1))])
    size, eye = inputs.shape[1], np.eye(classes)
    decay = 2 * weight_decay * np.tile(np.arange(size) < size - 1, classes)
    theta = np.zeros(classes * size)
    for _ in range(steps):
        scores = inputs @ theta.reshape(classes, size).T
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = ((p - eye[y]).T @ inputs / len(x)).ravel() + decay * theta
        curvature = p[:, :, None] * eye - p[:, :, None] * p[:, None, :]
        hessian = np.einsum("nij,na,nb->iajb", curvature, inputs, inputs) / len(x)
        hessian = hessian.reshape(len(theta), -1) + np.diag(decay)
        theta -= np.linalg.lstsq(hessian, gradient, rcond=None)[0]  # one more b changes nothing
    assert abs(gradient).max() < 1e-10
    theta = theta.reshape(classes, size)
    return theta[:, :-1], theta[:, -1]


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
def test_the_fit_is_that_of_newtons_method(weight_decay):
    x, y = blobs()
    layer = zero_layer(5, 3)
    fit(layer, x, y, weight_decay)
    w, b = newton(x.numpy(), y.numpy(), 3, weight_decay)
    np.testing.assert_allclose(layer.weight.detach(), w, rtol=1e-3, atol=1e-4)
    found_b = layer.bias.detach().numpy()
    np.testing.assert_allclose(found_b - found_b.mean(), b - b.mean(), rtol=1e-3, atol=1e-4)


def test_the_accuracy_is_that_of_newtons_method_on_standardized_features():
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    probe = linear_probe(x, y, test_x, test_y, 3, seed=0)
    mean, sd = x.numpy().mean(0), x.numpy().std(0)
    w, b = newton((x.numpy() - mean) / sd, y.numpy(), 3, probe.weight_decay)
    correct = int(((((test_x.numpy() - mean) / sd) @ w.T + b).argmax(1) == test_y.numpy()).sum())
    assert (probe.correct, probe.images) == (correct, 60) and 30 < correct < 60
    assert probe.top1 == pytest.approx(100 * correct / 60)


def test_the_weight_decay_is_the_largest_of_the_best_on_the_held_out_images():
    """Each fitted from zero by Newton's method, not from the one before."""
    x, y = blobs()
    pictures = ImageSet(torch.zeros(60, 1, 1, 3, dtype=torch.uint8), y, ("a", "b", "c"), "a test")
    part, held_out = split_validation(pictures, 0.2, 5)
    assert held_out.labels.bincount().tolist() == [4, 4, 4]
    rows, others = part.rows.numpy(), held_out.rows.numpy()
    counts = {}
    for weight_decay in WEIGHT_DECAYS:
        w, b = newton(x.numpy()[rows], y.numpy()[rows], 3, weight_decay)
        seen = (x.numpy()[others] @ w.T + b).argmax(1)
        counts[weight_decay] = int((seen == y.numpy()[others]).sum())
    assert len(set(counts.values())) > 1
    best = max(WEIGHT_DECAYS, key=lambda weight_decay: (counts[weight_decay], weight_decay))
    assert choose_weight_decay(x, y, 3, 5) == (best, pytest.approx(100 * counts[best] / 12))


def test_of_equally_good_weight_decays_it_is_the_largest():
    (x, y), (test_x, test_y) = blobs(noise=0.01), blobs(noise=0.01, seed=1)
    probe = linear_probe(x, y, test_x, test_y, 3, seed=0)
    assert (probe.weight_decay, probe.validation_top1, probe.top1) == (1.0, 100.0, 100.0)


def test_a_features_scale_and_offset_change_nothing_nor_does_a_constant_one():
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    expected = linear_probe(x, y, test_x, test_y, 3, seed=0)
    scale = 10.0 ** torch.tensor([-3, -1, 0, 2, 4], dtype=torch.float64)
    offset = torch.tensor([5.0, 0.0, -1.0, 2.0, 0.0])

    def changed(features, constant):
        rounded = constant * (1 + 1e-7 * torch.randn(60, 1, dtype=torch.float64))
        columns = [torch.zeros(60, 1), torch.full((60, 1), constant), rounded]
        return torch.cat([features * scale + offset, *columns], 1)

    torch.manual_seed(0)
    assert linear_probe(changed(x, 0.1), y, changed(test_x, 0.2), test_y, 3, seed=0) == expected


def test_the_test_images_choose_nothing():
    (x, y), (test_x, test_y) = blobs(), blobs(seed=1)
    probes = [
        linear_probe(x, y, test_x, test_y, 3, seed=0),
        linear_probe(x, y, test_x, (test_y + 1) % 3, 3, seed=0),
        linear_probe(x, y, -9 * test_x[:7], test_y[:7], 3, seed=0),
    ]
    assert len({(probe.weight_decay, probe.validation_top1) for probe in probes}) == 1
    assert len({probe.top1 for probe in probes}) == 3


def test_classes_of_two_images_have_none_to_hold_out():
    x, y = blobs(per_class=2)
    with pytest.raises(UserError, match="no class has 3 training images"):
        linear_probe(x, y, x, y, 3, seed=0)


# ---- transfer -----------------------------------------------------------------------------------


def test_transfer_to_birds_against_the_steps_by_hand(tmp_path):
    write_cub_sample(tmp_path / "data", seed=0, classes=3, train_per_class=8, test_per_class=4)
    path = untrained(tmp_path / "a.pt", "vgg-att3-concat-pc", FAST, "cifar100", ANIMALS)
    result = transfer.transfer(path, "birds", tmp_path / "data", 24, FP32)

    sets = load_cub(tmp_path / "data", image_size=24, crop="box", margin=0.1, download=False)
    model = build_model("vgg-att3-concat-pc", 4, width=1 / 16, trunk="pooled")
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    inputs = [(images.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25 for images in sets]
    (x, y), (test_x, test_y) = (
        (features_by_hand(model, images), each.labels)
        for images, each in zip(inputs, sets, strict=True)
    )
    probe = linear_probe(x, y, test_x, test_y, 3, seed=0)
    assert json.loads(json.dumps(result)) == {  # plain values
        "target": "birds",
        "image_size": 24,
        "classes": 3,
        "features": 16 + 32 + 32,
        "weight_decay": probe.weight_decay,
        "validation_top1": probe.validation_top1,
        "train_images": 24,
        "test_images": 12,
        "correct": probe.correct,
        "top1": probe.top1,
        "top1_95": list(interval_95(probe.top1, 12)),
    }


def test_the_last_classes_of_cifar_are_those_that_the_network_does_not_know(tmp_path, monkeypatch):
    make_folders(tmp_path, ANIMALS, per_class=4, size=(32, 32))
    path = untrained(tmp_path / "a.pt", "vgg-gap", FAST, "cifar100", ("dog", "bee"))
    given = []
    monkeypatch.setattr(
        transfer, "linear_probe", lambda *args: given.extend(args) or linear_probe(*args)
    )
    result = transfer.transfer(path, "cifar100-last", tmp_path, 32, FP32)
    counts = ("classes", "features", "train_images", "test_images")
    assert [result[name] for name in counts] == [2, 32, 8, 8]
    train, test = load_cifar100(tmp_path, download=False)
    model = build_model("vgg-gap", 2, width=1 / 16, trunk="pooled")
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    for features, labels, images in ((*given[:2], train), (*given[2:4], test)):
        unknown = images.subset([*range(4), *range(8, 12)])  # ant and cow
        pixels = (unknown.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        expected = features_by_hand(model, pixels)
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
        assert labels.tolist() == [0] * 4 + [1] * 4


def test_wrong_targets_are_errors(tmp_path):
    make_folders(tmp_path, ANIMALS, size=(32, 32))
    path = untrained(tmp_path / "a.pt", "vgg-gap", FAST, "cifar100", ANIMALS[:3])
    with pytest.raises(UserError, match="all classes of CIFAR-100 .* but 1"):
        transfer.transfer(path, "cifar100-last", tmp_path, 32, FP32)
    with pytest.raises(UserError, match="expected birds or cifar100-last"):
        transfer.transfer(path, "cats", tmp_path, 32, FP32)
    with pytest.raises(UserError, match="image size of 8 is too small"):
        transfer.transfer(path, "birds", tmp_path, 8, FP32)


# ---- some of the classes ------------------------------------------------------------------------


def test_linked_classes_are_a_data_set_of_the_same_images(tmp_path):
    make_folders(tmp_path / "data", ANIMALS)
    assert first_classes(tmp_path / "data", 2) == ("ant", "bee")
    link_classes(tmp_path / "data", tmp_path / "two", ("dog", "bee"))
    whole, linked = load_cifar(tmp_path / "data"), load_cifar(tmp_path / "two")
    for images, all_images in zip(linked, whole, strict=True):
        assert images.class_names == ("bee", "dog")
        assert images.images.equal(all_images.images[[3, 4, 5, 9, 10, 11]])
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_right_links_are_kept_and_missing_ones_added(tmp_path):
    make_folders(tmp_path / "data", ANIMALS)
    link_classes(tmp_path / "data", tmp_path / "some", ["ant", "bee"])
    links = sorted((tmp_path / "some").glob("cifar100/*/*"))
    before = [(link.lstat().st_ino, link.lstat().st_mtime_ns) for link in links]
    link_classes(tmp_path / "data", tmp_path / "some", (name for name in ANIMALS[:3]))
    after = [(link.lstat().st_ino, link.lstat().st_mtime_ns) for link in links]
    assert after == before and len(links) == 4
    assert load_cifar(tmp_path / "some")[0].class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize("wrong", ["file", "folder", "other class", "wrong link", "dead", "beside"])
def test_anything_else_beside_the_links_is_an_error(tmp_path, wrong):
    make_folders(tmp_path / "data", ANIMALS)
    train = tmp_path / "some" / "cifar100" / "train"
    train.mkdir(parents=True)
    place = {
        "file": lambda: (train / "notes.txt").write_text("mine"),
        "folder": lambda: (train / "ant").mkdir(),
        "other class": lambda: (train / "dog").symlink_to(tmp_path / "data/cifar100/train/dog"),
        "wrong link": lambda: (train / "ant").symlink_to(tmp_path / "data/cifar100/test/ant"),
        "dead": lambda: (train / "ant").symlink_to(tmp_path / "nowhere"),
        "beside": lambda: (train.parent / "test").symlink_to(tmp_path / "data/cifar100/test"),
    }
    place[wrong]()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="some/cifar100/t.* move it away, or name another folder"):
        link_classes(tmp_path / "data", tmp_path / "some", ("ant", "bee"))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_linked_is_an_error(tmp_path):
    make_folders(tmp_path / "data", ANIMALS)
    for classes in (("ant", "elk"), ("ant", "..")):
        with pytest.raises(UserError, match=f"train has no class folder {classes[1]}"):
            link_classes(tmp_path / "data", tmp_path / "some", classes)
    with pytest.raises(UserError, match="5 classes asked for: .* has 1 to 4"):
        first_classes(tmp_path / "data", 5)
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "cifar-100-python.tar.gz").write_bytes(b"an archive")
    for call in (
        lambda: link_classes(tmp_path / "official", tmp_path / "some", ANIMALS),
        lambda: first_classes(tmp_path / "official", 2),
    ):
        with pytest.raises(UserError, match="class folders are needed at .*official/cifar100/"):
            call()
    assert not (tmp_path / "some").exists()
