"""cam.py: the methods against few-line references in float64, what they leave behind, the measures against brute force,
a network that has learned where to look, and the command line."""
import csv
import dataclasses
import gc
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import cam
from attention_model import build_model
from augmentation import normalise
from cam import attention_maps, class_activation_map, grad_cam
from cub import load_cub
from cub_sample import write_cub_sample
from sample_data import cifar_sample
from train_cifar100 import FAST, TASK
from train_cub import DEFAULT
from training import checkpoint, commands
from training.explain import default_layer, feature_layers
from training.localise import (CENTRE, IOUS, THRESHOLDS, UNIFORM, Measures, best_ious, component_boxes, energy_in_box,
                               nearest_parts, pointing_game)

SIZE = (64, 96)


def images(count=2, size=SIZE, dtype=torch.float64):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def torchvisions(name, dtype=torch.float64, classes=7):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=classes).to(dtype).eval()


def ours(name, dtype=torch.float64, width=1 / 16, **settings):
    """One of our networks, with batch norm that normalises by something."""
    torch.manual_seed(0)
    model = build_model(name, 5, width=width, **settings).to(dtype)
    model.train()
    model(images(8, (32, 32), dtype))
    return model.eval()


def in_unit_range(maps, size=SIZE):
    """The reference for what comes out: negatives cut off, upsampled, divided by the largest, if there is one."""
    maps = F.interpolate(maps.relu()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    largest = [each.max() for each in maps]
    assert max(largest) > 0
    return torch.stack([each / most if most > 0 else each for each, most in zip(maps, largest)])


def assert_maps(maps, expected):
    assert maps.dtype == torch.float32 and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps, expected.float(), atol=1e-6, rtol=1e-5)


# ---- equality --------------------------------------------------------------------------------------------------------

def test_attention_maps_are_the_networks_own_upsampled():
    model, x = ours("vgg-att3-concat-gate"), images()
    with torch.no_grad():
        _, expected = model(x, return_attention=True)
    maps = attention_maps(model, x)
    assert list(maps) == ["conv7", "conv10", "conv13"]
    for level, each in maps.items():
        assert_maps(each, in_unit_range(expected[level]))
    with pytest.raises(ValueError, match="no attention levels: use gradcam, or cam"):
        attention_maps(ours("vgg-gap"), x)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg-gap"])
def test_class_activation_map_by_its_definition(name):
    """DenseNet has a ReLU that is no module between its features and the pooling."""
    x, targets = images(4), torch.tensor([3, 1, 0, 2])
    model = ours(name) if name.startswith("vgg") else torchvisions(name)
    with torch.no_grad():
        if name == "resnet18":
            features, linear = nn.Sequential(*list(model.children())[:-2])(x), model.fc
        elif name == "densenet121":
            features, linear = model.features(x).relu(), model.classifier
        else:
            features, linear = x, model.classifier
            for block in range(1, 6):
                features = model.trunk.run_block(block, features)
        logits = linear(features.mean((2, 3)))
        expected = torch.stack([(linear.weight[t][:, None, None] * f).sum(0) for t, f in zip(targets, features)])
    assert_maps(class_activation_map(model, x, targets), in_unit_range(expected))
    torch.testing.assert_close(logits, model(x).detach())   # so these are the features that count


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "vgg-att1-pc", "vgg"])
def test_class_activation_map_needs_pooling_and_one_linear_layer(name):
    model = ours(name, torch.float32) if name.startswith("vgg-") or name == "vgg" else torchvisions(name, torch.float32)
    with pytest.raises(ValueError, match="use gradcam"):
        class_activation_map(model, images(1, dtype=torch.float32), [0])


@pytest.mark.parametrize("name, layer", [
    ("resnet18", None), ("resnet18", "layer2.0.bn1"), ("resnet18", "layer3.1.relu"), ("vgg-att3-concat-dp", None),
    ("vgg-att3-concat-pc", "trunk.block4.0.conv")])
def test_grad_cam_is_plain_autograd(name, layer):
    """Against a backward pass through the whole network, every parameter asking for its gradient."""
    x, targets = images(4), torch.tensor([3, 1, 0, 2])
    model = ours(name) if name.startswith("vgg") else torchvisions(name)
    module = dict(model.named_modules())[layer or {"resnet18": "layer4"}.get(name, "trunk.block5")]
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)
        return output.clone()
    handle = module.register_forward_hook(keep)
    logits = model(x)
    handle.remove()
    gradient, = torch.autograd.grad(logits[0, 3] + logits[1, 1] + logits[2, 0] + logits[3, 2], outputs[-1])
    alpha = gradient.mean(dim=(2, 3), keepdim=True)
    assert_maps(grad_cam(model, x, targets, layer), in_unit_range((alpha * outputs[-1]).sum(1).detach()))
    assert_maps(grad_cam(model, x, targets, module), in_unit_range((alpha * outputs[-1]).sum(1).detach()))


def test_grad_cam_by_finite_differences():
    """Moving a whole channel of the activations by eps moves the logit by eps times the sum of its gradients."""
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(3, 12, 5, stride=4), nn.Tanh()).double()
    behind = nn.Sequential(nn.Conv2d(12, 8, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(480, 3)).double()
    x, eps = images(3), 1e-5
    with torch.no_grad():
        activations, logits = before(x), []
        for k in range(12):
            step = torch.zeros_like(activations)
            step[:, k] = eps
            logits.append((behind(activations + step) - behind(activations - step)) / (2 * eps))
    alpha = torch.stack(logits, 1)[range(3), :, [2, 0, 1]]
    maps = grad_cam(nn.Sequential(before, behind), x, [2, 0, 1], "0")
    expected = in_unit_range((alpha[:, :, None, None] * activations).sum(1))
    torch.testing.assert_close(maps, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "vgg-gap", "mobilenet_v2"])
def test_grad_cam_on_a_pooling_linear_network_is_cam(name):
    model = ours(name) if name == "vgg-gap" else torchvisions(name)
    maps = grad_cam(model, images(3), [0, 1, 4])
    torch.testing.assert_close(maps, class_activation_map(model, images(3), [0, 1, 4]))
    assert maps.std() > 0.1


# ---- layers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("resnet18", "layer4"), ("vgg11", "features.19"), ("vgg11_bn", "features.27"), ("densenet121", "features"),
    ("mobilenet_v2", "features"), ("squeezenet1_1", "classifier.2"), ("convnext_tiny", "features"),
    ("swin_t", "permute")])
def test_default_layer_of_torchvisions(name, expected):
    with torch.device("meta"):      # shapes only
        model, x = torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, 96, 96)
    layers = feature_layers(model, x)
    assert default_layer(model, x) == expected and layers[expected][1] * layers[expected][2] > 1


def test_default_layer_still_has_an_extent_in_small_images():
    assert default_layer(torchvisions("resnet18", torch.float32), images(1, (32, 32), torch.float32)) == "layer3"


def test_layers_that_do_not_do():
    model, x = ours("vgg-att1-pc", torch.float32), images(1, dtype=torch.float32)
    assert default_layer(model, x) == "trunk.block5" and feature_layers(model, x)["trunk.block5"] == (32, 16, 24)
    for layer, message in (("trunk.block9", "no layer 'trunk.block9'; it has trunk.block"),
                           (nn.ReLU(), "not part of this"), ("global_branch.unit1", "is not run"),
                           ("classifier.linears.0", r"gives \(1, 5\)")):
        with pytest.raises(ValueError, match=message):
            grad_cam(model, x, [0], layer)


# ---- what is left behind ---------------------------------------------------------------------------------------------

def state_of(model):
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks,
            [p.grad for p in model.parameters()], {k: v.clone() for k, v in model.state_dict().items()})


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_network_comes_back_as_it_was(context):
    model, x = ours("vgg-gap", torch.float32), images(dtype=torch.float32)
    model.train()
    model.trunk.block2.eval()   # a mixed state, as in fine-tuning
    model.trunk.block1.requires_grad_(False)
    attention = ours("vgg-att2-concat-dp", torch.float32).train()
    before = [state_of(m) for m in (model, attention)]
    with context():
        calls = [lambda: attention_maps(attention, x), lambda: class_activation_map(model, x, [0, 1]),
                 lambda: grad_cam(model, x, [0, 1]), lambda: grad_cam(attention, x, [0, 1], "trunk.block3")]
        results = [call() for call in calls]
        for wrong in (lambda: class_activation_map(model, x, [0, 5]), lambda: grad_cam(model, x, [0]),
                      lambda: grad_cam(model, x, [-1, 0]), lambda: grad_cam(model, x, [0, 1], "classifier"),
                      lambda: grad_cam(model, x[:, :2], [0, 1]), lambda: attention_maps(attention, x[0]),
                      lambda: grad_cam(model, x, [0.0, 1.0]), lambda: class_activation_map(model, x[:0], [])):
            with pytest.raises(ValueError):
                wrong()
    for network, (modes, asking, hooks, grads, weights) in zip((model, attention), before):
        now = state_of(network)
        assert now[0] == modes and now[1] == asking and now[2] == hooks == []
        assert all(grad is None for grad in now[3])
        assert all(torch.equal(weights[name], value) for name, value in now[4].items())     # statistics too
    for call, result in zip(calls, results):    # and the mode of whoever calls changes nothing
        again = call()
        for a, b in zip(again.values(), result.values()) if isinstance(again, dict) else [(again, result)]:
            assert torch.equal(a, b) and not b.requires_grad


def test_memory_stays_flat_over_a_thousand_calls():
    """A leak of one call's activations, 96 KiB, would be 86 MiB."""
    class Tiny(nn.Sequential):
        levels = ("only",)

        def forward(self, x, return_attention=False):
            maps = {"only": x.mean(1).flatten(1).softmax(1).view(len(x), *x.shape[2:])}
            return (super().forward(x), maps) if return_attention else super().forward(x)
    model = Tiny(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x = images(2, (40, 40), torch.float32)

    def measured():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20, sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    for call in range(1000):
        grad_cam(model, x, [0, 1], None if call % 2 else "0")
        class_activation_map(model, x, [2, 3])
        attention_maps(model, x)
        if call == 100:
            before = measured()
    after = measured()
    print(f"\nresident MiB and tensors after 100 calls {before}, after 1,000 {after}")
    assert after[0] - before[0] < 4 and after[1] == before[1]


# ---- hard cases ------------------------------------------------------------------------------------------------------

def test_in_place_relu_behind_the_layer():
    """The activations are the layer's, not what the ReLU makes of them in the same memory."""
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 4, 3).double(), nn.Linear(4, 3).double()

    def network(inplace):
        return nn.Sequential(convolution, nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    maps = grad_cam(network(True), images(), [0, 2], "0")
    assert_maps(maps, grad_cam(network(False), images(), [0, 2], "0"))
    a = convolution(images())
    alpha = linear.weight[[0, 2]] * (a > 0).double().mean((2, 3))
    assert_maps(maps, in_unit_range((alpha[:, :, None, None] * a).sum(1).detach()))


def test_bf16_networks():
    model, x = ours("vgg-gap", torch.float32), images(2, (32, 32), torch.float32)
    reference = grad_cam(model, x, [0, 1])
    maps = grad_cam(model.bfloat16(), x, [0, 1])
    assert maps.dtype == torch.float32 and (maps - reference).abs().mean() < 0.05 and reference.std() > 0.1
    torch.testing.assert_close(class_activation_map(model, x, [0, 1]), maps, atol=0.02, rtol=0)
    maps = attention_maps(ours("vgg-att3-concat-pc", torch.float32).bfloat16(), x)
    assert all(each.dtype == torch.float32 and each.max() == 1 for each in maps.values())


def test_maps_without_evidence_and_uniform_maps():
    """0/0 is 0, never NaN; a uniform map is uniform."""
    model, x = ours("vgg-gap", torch.float32), images(dtype=torch.float32)
    model.classifier.weight.data[0] = 0
    model.classifier.weight.data[1] = -1
    for method in (class_activation_map, grad_cam):
        assert (method(model, x, [0, 1]) == 0).all()
    attention = ours("vgg-att1-pc", torch.float32)
    attention.gates["conv13"].compatibility.u.weight.data.zero_()
    torch.testing.assert_close(attention_maps(attention, x)["conv13"], torch.ones(2, *SIZE))


def test_a_batch_is_every_image_alone():
    model, x = ours("vgg-att3-concat-gate"), images(3)
    targets = [2, 0, 4]
    together = [grad_cam(model, x, targets), *attention_maps(model, x).values()]
    for i in range(3):
        one = x[i:i + 1]
        for a, b in zip(together, [grad_cam(model, one, targets[i:i + 1]), *attention_maps(model, one).values()]):
            torch.testing.assert_close(a[i:i + 1], b)


# ---- cost ------------------------------------------------------------------------------------------------------------

def test_grad_cam_costs_little_more_than_a_forward_pass():
    """64 images of 224x224 through resnet18, between two forward passes without gradients."""
    model, x = torchvisions("resnet18", torch.float32, 1000), images(64, (224, 224), torch.float32)

    def forward():
        with torch.no_grad():
            model(x)
    seconds = []
    for work in (forward, lambda: grad_cam(model, x, torch.arange(64)), forward):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    before, between, after = seconds
    ratio = 2 * between / (before + after)
    print(f"\nforward {before:.2f} s, gradcam {between:.2f} s, forward {after:.2f} s: {ratio:.3f} times a forward pass")
    assert ratio <= 1.3


# ---- the measures ----------------------------------------------------------------------------------------------------

def flood_boxes(mask):
    """Components by walking from pixel to pixel: the boxes as a sorted list."""
    left, boxes = {(y, x) for y, x in np.argwhere(mask)}, []
    while left:
        stack, part = [left.pop()], []
        while stack:
            y, x = stack.pop()
            part.append((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    stack.append(near)
        ys, xs = zip(*part)
        boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return sorted(boxes)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0])
def test_component_boxes_are_those_of_a_flood_fill(density):
    random = np.random.default_rng(int(10 * density))
    for height, width in ((1, 1), (1, 9), (9, 1), (12, 17), (30, 30)):
        masks = random.random((5, height, width)) < density
        boxes, owner = component_boxes(masks)
        for i, mask in enumerate(masks):
            assert sorted(map(tuple, boxes[owner == i].tolist())) == flood_boxes(mask)


def test_component_boxes_of_long_winding_parts():
    spiral, snake = np.zeros((2, 41, 41), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    for ring in range(0, 20, 2):
        spiral[ring, ring:41 - ring] = spiral[40 - ring, ring:41 - ring] = True
        spiral[ring:41 - ring, ring] = spiral[ring:41 - ring, 40 - ring] = True
    for mask in (snake, spiral):
        assert sorted(map(tuple, component_boxes(mask[None])[0].tolist())) == flood_boxes(mask)


def test_measures_by_hand():
    maps = np.zeros((3, 8, 10))
    maps[0, 2, 3] = maps[0, 7, 9] = 1       # two peaks, one in the box
    maps[1, 4:6, 1:4] = 1                   # the box, and a little one outside of it
    maps[1, 0, 9] = 1
    boxes = np.array([[2, 1, 5, 4], [1, 4, 4, 6], [0, 0, 5, 4]], float)     # the third map is empty: a uniform one
    assert pointing_game(maps, boxes) == pytest.approx([0.5, 6 / 7, 0.25])
    assert energy_in_box(maps, boxes) == pytest.approx([0.5, 6 / 7, 0.25])
    ious = best_ious(maps, boxes, [0.0, 0.5])
    assert ious == pytest.approx(np.array([[9 / 80, 1 / 9], [6 / 80, 1], [0.25, 0.25]]))


def test_max_box_acc_v2_against_brute_force():
    random = np.random.default_rng(3)
    maps = np.stack([np.asarray(Image.fromarray(random.random((4, 4)).astype(np.float32)).resize((12, 10), 2))
                     for _ in range(6)])
    peak = np.array([divmod(each.argmax(), 12)[::-1] for each in maps])
    boxes = np.concatenate([peak - 2, peak + random.integers(1, 4, (6, 2))], 1).clip(0, (12, 10, 12, 10)).astype(float)
    measures = Measures()
    for some in (slice(0, 4), slice(4, 6)):
        measures.add({"random": maps[some]}, boxes[some], None)
    row = measures.table()[0]
    expected = []
    for least in IOUS:
        accuracy = []
        for threshold in THRESHOLDS:
            right = 0
            for values, box in zip(maps.astype(float), boxes):
                values = (values - values.min()) / (values.max() - values.min())
                filled = np.zeros((10, 12), int)
                filled[int(box[1]):int(box[3]), int(box[0]):int(box[2])] = 1
                best = 0
                for x0, y0, x1, y1 in flood_boxes(values >= threshold):
                    found = np.zeros((10, 12), int)
                    found[y0:y1, x0:x1] = 1
                    best = max(best, (found & filled).sum() / (found | filled).sum())
                right += best >= least
            accuracy.append(right / 6)
        assert row[f"box_acc_iou_{least}"] == pytest.approx(max(accuracy))
        assert accuracy[list(THRESHOLDS).index(row[f"threshold_iou_{least}"])] == max(accuracy)
        expected.append(max(accuracy))
    assert row["max_box_acc_v2"] == pytest.approx(np.mean(expected)) and 0.1 < row["max_box_acc_v2"] < 1


def test_chance_is_the_boxs_share_of_the_area_and_parts_share_the_picture():
    boxes = np.array([[2, 0, 6, 5], [0, 0, 10, 4]], float)
    parts = np.array([[[1, 4, 1], [9, 4, 1], [5, 4, 0]], [[0, 0, 0], [0, 0, 0], [5, 4, 1]]], float)
    measures, peak = Measures(), np.zeros((2, 8, 10))
    peak[0, 4, 7] = peak[1, 0, 0] = 1
    measures.add({"peak": peak}, boxes, parts)
    rows = {row["map"]: row for row in measures.table()}
    assert rows[UNIFORM]["pointing_game"] == rows[UNIFORM]["energy_in_box"] == pytest.approx((0.25 + 0.5) / 2)
    assert rows[CENTRE]["pointing_game"] == pytest.approx((1 + 0.5) / 2)      # of the four pixels in the middle
    assert rows["peak"]["images"] == 2
    shares = {row["map"]: [row[name] for name in ("left", "right", "middle")]
              for row in measures.part_table(("left", "right", "middle"))}
    assert shares["peak"] == [0, 0.5, 0.5] and shares[UNIFORM] == pytest.approx([0.25, 0.25, 0.5])
    blind = nearest_parts(np.ones((1, 8, 10)), np.zeros((1, 3, 3)))
    assert not np.any(blind)


# ---- a network that has learned where to look ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An attention network and vgg-gap, trained on the sample for some seconds: name -> checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    sets = cifar_sample(classes=4, train_per_class=150, test_per_class=40)
    task = dataclasses.replace(TASK, sample=lambda config: sets)
    for name in ("vgg-att3-concat-pc", "vgg-gap"):
        assert commands.main(task, ["--sample", "--model", name, "--width", "0.0625", "--epochs", "3", "--batch-size",
                                    "16", "--lr", "0.04", "--set", "progressive=none", "--set", "crop_pad=2", "--seed",
                                    "0", "--device", "cpu", "--precision", "fp32", "--overlay-every", "0", "--run-dir",
                                    str(folder / name)]) == 0
    return {name: folder / name / "last.pt" for name in ("vgg-att3-concat-pc", "vgg-gap")}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("photo.png") -> (exit status, standard output, standard error), in an empty folder; with a small sample."""
    monkeypatch.chdir(tmp_path)
    sets = cifar_sample(classes=4, train_per_class=150, test_per_class=40)
    monkeypatch.setitem(cam.TASKS, "cifar100", dataclasses.replace(TASK, sample=lambda config: sets))

    def call(*words):
        capsys.readouterr()
        return cam.main([str(word) for word in words]), *capsys.readouterr()
    return call


def rows_of(path):
    with open(path, newline="") as file:
        return {row["map"]: row for row in csv.DictReader(file)}


def test_maps_point_at_the_mark(cli, trained, capsys):
    """160 pictures that the networks have not seen, the marks' boxes unknown to them."""
    rows = {}
    for name, path in trained.items():
        status, out, _ = cli("--checkpoint", path, "--dataset", "sample", "--measure", "--out", name)
        assert status == 0 and "160 test images" in out and "cam and gradcam of the true class" in out
        rows[name] = rows_of(Path(name, "measures.csv"))
        with capsys.disabled():
            print("\n" + out[out.index(":") + 2:])
    attention, pooled = rows["vgg-att3-concat-pc"], rows["vgg-gap"]
    assert list(attention) == ["conv7", "conv10", "conv13", "gradcam", UNIFORM, CENTRE]
    assert float(attention[UNIFORM]["pointing_game"]) == pytest.approx(49 / 1024, abs=1e-4)
    assert max(float(attention[level]["pointing_game"]) for level in ("conv7", "conv10", "conv13")) >= 0.8
    assert float(pooled["gradcam"]["pointing_game"]) >= 0.8 and pooled["cam"]["pointing_game"] >= "0.8"
    assert float(pooled["gradcam"]["max_box_acc_v2"]) > 0.3 > float(attention[CENTRE]["max_box_acc_v2"])


# ---- the command line ------------------------------------------------------------------------------------------------

def untrained(path, name, task_config, dataset, classes, size=32, width=1 / 16):
    """A checkpoint of a network that was not trained."""
    torch.manual_seed(0)
    config = task_config | {"model": name, "width": width, "dataset": dataset, "sample": False, "image_size": size,
                            "num_workers": 0, "trunk": "pooled", "pool4": 2}
    model = build_model(name, len(classes), width=width, trunk="pooled")
    torch.save({"format": checkpoint.FORMAT, "model": model.state_dict(), "ema": None, "config": config,
                "class_names": list(classes), "input_size": [size, size], "mean": [0.5] * 3, "std": [0.25] * 3,
                "position": {"epoch": 1}}, path)
    return path


@pytest.fixture
def ours_on_disk(tmp_path):
    return untrained(tmp_path / "net.pt", "vgg-att2-concat-dp", FAST, "cifar100", ["apple", "pear", "sweet_pepper"])


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_files_of_any_mode_and_size(cli, ours_on_disk, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(noise(50, 80, 1)).save(photos / "grey.png")
    Image.fromarray(noise(50, 80, 4)).save(photos / "rgba.png")
    Image.fromarray(noise(50, 80)).quantize(16).save(photos / "palette.gif", transparency=3)
    Image.fromarray(noise(1, 3000)).save(photos / "line.png")
    Image.fromarray(noise(1, 1)).save(photos / "dot.png")
    Image.fromarray(noise(1400, 900)).save(photos / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6    # to be turned by 90 degrees
    Image.fromarray(noise(48, 96)).save(photos / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(noise(48, 96)).convert("CMYK").save(photos / "cmyk.jpg")
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_text("no image")
    status, out, err = cli("--checkpoint", ours_on_disk, photos, "--out", "maps", "--raw")
    assert status == 0 and err == "" and "8 images done" in out
    assert "cam skipped: " in out and "use gradcam" in out and "gradcam at trunk.block5" in out
    assert re.search(r"photos/turned\.jpg: \w+ \d+\.\d %, \w+ \d+\.\d %, \w+ \d+\.\d %$", out, re.M)
    sizes = {name: Image.open(tmp_path / "maps" / f"{name}-conv13.png").size
             for name in ("grey", "line", "dot", "large", "turned")}
    assert sizes == {"grey": (400, 250), "line": (1024, 1), "dot": (224, 224), "large": (658, 1024),
                     "turned": (240, 480)}
    assert sorted(p.name for p in (tmp_path / "maps").glob("grey*")) == sorted(
        f"grey-{name}" for name in ("conv10.png", "conv10.npy", "conv13.png", "conv13.npy", "gradcam.png",
                                    "gradcam.npy", "sheet.png"))
    raw = np.load(tmp_path / "maps" / "turned-conv10.npy")
    assert raw.shape == (32, 32) and raw.dtype == np.float32 and raw.min() >= 0 and raw.max() == 1


def test_the_network_sees_the_picture_as_in_training_and_the_map_lies_over_it(cli, tmp_path, monkeypatch):
    """A squashed photo goes in normalised, and a spot comes out over the place where it was."""
    path = untrained(tmp_path / "net.pt", "vgg-gap", FAST, "cifar100", ["a", "b"])
    pixels, seen = noise(40, 90), []
    Image.fromarray(pixels).save("photo.png")

    def spot(model, batch, targets, layer):
        seen.append(batch)
        maps = torch.zeros(len(batch), 32, 32)
        maps[:, 8, 24] = 1
        return maps
    monkeypatch.setattr(cam, "grad_cam", spot)
    assert cli("--checkpoint", path, "photo.png", "--method", "gradcam", "--opacity", 1, "--out", ".")[0] == 0
    small = torch.from_numpy(np.array(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)))
    torch.testing.assert_close(seen[-1], normalise(small[None], [0.5] * 3, [0.25] * 3))
    shown = np.asarray(Image.open("photo-gradcam.png")).astype(int).sum(2)
    assert shown.shape == (240, 540)    # six times as large
    y, x = np.argwhere(shown == shown.max()).mean(0)
    assert (y / 240, x / 540) == pytest.approx((8.5 / 32, 24.5 / 32), abs=0.01)


def test_bad_images_are_told_and_the_rest_is_done(cli, ours_on_disk, tmp_path):
    Image.fromarray(noise(64, 64)).save("good.png")
    whole = Path("good.png").read_bytes()
    Path("cut.png").write_bytes(whole[:len(whole) // 2])
    Path("text.jpg").write_text("hello")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("deep.png")
    Path("empty").mkdir()
    status, out, err = cli("--checkpoint", ours_on_disk, "cut.png", "text.jpg", "gone.png", "deep.png", "empty",
                           "good.png")
    assert status == 1 and "1 image done, 4 files in runs/cam" in out
    for name, reason in (("cut.png", "truncated"), ("text.jpg", "not an image"), ("gone.png", "No such file"),
                         ("deep.png", "more than 8 bits"), ("empty", "holds no images")):
        assert len([line for line in err.splitlines() if name in line and reason in line]) == 1, err
    assert "5 of the inputs could not be used" in err and Path("runs/cam/good-sheet.png").exists()


def test_no_input_is_overwritten_and_names_do_not_clash(cli, ours_on_disk):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Image.fromarray(noise(32, 32)).save(Path(folder, "photo.png"))
        Image.fromarray(noise(32, 32)).save(Path(folder, "photo-conv10.png"))
    Path("a", "link-sheet.png").symlink_to("photo.png")
    Image.fromarray(noise(32, 32)).save(Path("a", "link.bmp"))
    before = {path: path.read_bytes() for path in Path().glob("[ab]/*")}
    status, out, _ = cli("--checkpoint", ours_on_disk, "a", "b", "--out", "a")
    assert status == 0 and "6 images done, 24 files in a" in out
    assert re.search(r"^b/photo\.png: .*   \(written as photo-3\)$", out, re.M)
    assert len(list(Path("a").iterdir())) == 4 + 24
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("a/link-sheet.png").is_symlink()
    assert Path("a/photo-2-conv10.png").exists() and Path("a/photo-3-sheet.png").exists()


def test_data_set_selection_targets_and_top_k(cli, trained):
    path = trained["vgg-gap"]
    status, out, err = cli("--checkpoint", path, "--dataset", "sample", "--index", "3,0-2", "--top-k", 2, "--out", "a",
                           "--colours", "viridis", "--opacity", 0.3)
    assert status == 0, err
    assert "4 of 160 test images" in out and "attention skipped" in out
    seen = re.findall(r"^sample-test (\d): (\w+|letter-\w) ", out, re.M)
    assert [number for number, _ in seen] == ["3", "0", "1", "2"]
    names = {p.name for p in Path("a").iterdir()}
    assert names == {f"sample-test-0000{i}-{what}.png" for i in range(4)
                     for what in ("cam", "cam-2", "gradcam", "gradcam-2", "sheet")} | {"sample-test-sheet.png"}
    status, out, _ = cli("--checkpoint", path, "--dataset", "sample", "--index", "0", "--target", "CROSS", "--out", "b",
                         "--method", "cam")
    assert status == 0 and "cross" in out and len(list(Path("b").iterdir())) == 2
    status, *_ = cli("--checkpoint", path, "--dataset", "sample", "--index", "0", "--target", 2, "--out", "c",
                     "--method", "cam")
    assert status == 0
    assert Path("b/sample-test-00000-cam.png").read_bytes() == Path("c/sample-test-00000-cam.png").read_bytes()
    assert Path("b/sample-test-00000-cam.png").read_bytes() != Path("a/sample-test-00000-cam.png").read_bytes()


def test_sets_go_through_in_one_batch(cli, trained, monkeypatch):
    calls, method = [], cam.grad_cam
    monkeypatch.setattr(cam, "grad_cam", lambda model, batch, *rest: (calls.append(len(batch)),
                                                                      method(model, batch, *rest))[1])
    assert cli("--checkpoint", trained["vgg-gap"], "--dataset", "sample", "--measure")[0] == 0
    assert calls == [1, 160]    # the first asks whether the method applies


def test_birds_are_measured_on_whole_pictures_part_by_part(cli, tmp_path):
    write_cub_sample(tmp_path / "data", seed=1, classes=3, train_per_class=2, test_per_class=3)
    path = untrained(tmp_path / "net.pt", "vgg-att3-concat-pc", DEFAULT, "cub", ["ring", "plus", "cross"], size=48)
    status, out, err = cli("--checkpoint", path, "--dataset", "cub", "--measure", "--num-workers", 0)
    assert status == 0, err
    _, test = load_cub(tmp_path / "data", image_size=round(48 * 8 / 7), crop="whole")
    share = ((test.boxes[:, 2:] - test.boxes[:, :2]).prod(1) / 55**2).mean().item()
    rows, parts = rows_of("runs/cam/measures.csv"), rows_of("runs/cam/parts.csv")
    assert float(rows[UNIFORM]["energy_in_box"]) == pytest.approx(share, abs=0.01) and 0.2 < share < 0.4
    for row in parts.values():
        assert float(row["eye"]) + float(row["mark"]) + float(row["tail"]) == pytest.approx(1, abs=2e-4)
    assert list(parts) == list(rows) and "peak nearest to, %" in out and "chosen with their boxes" in out
    status, out, _ = cli("--checkpoint", path, "--dataset", "cub", "--index", "0-2", "--num-workers", 0, "--out",
                         "boxes")
    assert status == 0 and "3 of 9 test images" in out  # cut out as in training
    assert Image.open("boxes/cub-test-00000-conv7.png").size == (275, 275)


def test_cifar_100_selection(cli, ours_on_disk, tmp_path):
    for split in ("train", "test"):
        for label in ("apple", "pear", "sweet_pepper"):
            folder = tmp_path / "data" / "cifar100" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(noise(32, 32)).save(folder / f"{i}.png")
    status, out, err = cli("--checkpoint", ours_on_disk, "--dataset", "cifar100", "--index", "0,5", "--num-workers", 0)
    assert status == 0 and "2 of 6 test images" in out, err
    assert {p.name[:19] for p in Path("runs/cam").iterdir()} == {"cifar100-test-00000", "cifar100-test-00005",
                                                                 "cifar100-test-sheet"}


def test_weights_of_your_own_for_torchvisions(cli, monkeypatch):
    model = torchvisions("resnet18", torch.float32, classes=3)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, "mine.pth")
    Image.fromarray(noise(60, 90)).save("photo.png")
    status, out, err = cli("--arch", "resnet18", "--weights", "mine.pth", "photo.png", "--out", "o", "--raw")
    assert status == 0, err
    assert "gradcam at layer4" in out and "class 2" in out and "attention skipped" in out
    assert np.abs(np.load("o/photo-cam.npy") - np.load("o/photo-gradcam.npy")).max() < 1e-3
    status, out, _ = cli("--arch", "resnet18", "--weights", "mine.pth", "--list-layers")
    assert status == 0 and re.search(r"^layer4 +512 x 7 x 7   \(default\)$", out, re.M) and "layer3.0.conv1" in out
    status, _, err = cli("--arch", "resnet34", "--weights", "mine.pth", "photo.png")
    assert status == 1 and "does not fit torchvision's resnet34" in err

    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    status, _, err = cli("--arch", "resnet18", "--weights", "DEFAULT", "photo.png")
    assert status == 1 and "https://download.pytorch.org/models/resnet18" in err and "put it at" in err


class Code:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def test_files_that_are_no_checkpoints_are_refused(cli, ours_on_disk):
    Image.fromarray(noise(32, 32)).save("photo.png")
    Path("cut.pt").write_bytes(ours_on_disk.read_bytes()[:5000])
    torch.save({"model": 1}, "other.pt")
    torch.save(Code(), "code.pt")
    Path("code.pkl").write_bytes(pickle.dumps(Code()))
    for name, message in (("cut.pt", "cut short"), ("other.pt", "not a checkpoint of this project"),
                          ("photo.png", "no checkpoint"), ("code.pt", "is refused"), ("gone.pt", "no such file")):
        status, _, err = cli("--checkpoint", name, "photo.png")
        assert status == 1 and message in err and len(err.splitlines()) <= 2
    for name in ("code.pt", "code.pkl", "photo.png", "cut.pt"):
        status, _, err = cli("--arch", "resnet18", "--weights", name, "photo.png")
        assert status == 1 and len(err.splitlines()) <= 2
        assert "refused" in err or f"{name} could not be read" in err
    assert not Path("executed").exists()


@pytest.mark.parametrize("words, message", [
    (["--target", "pare"], "there is no such class; near it: pear"),
    (["--target", "3"], "numbered 0 to 2"),
    (["--layer", "trunk.block6"], "no layer 'trunk.block6'; it has trunk.block"),
    (["--layer", "global_branch.linear"], "gives (1, 32)"),
    (["--method", "cam"], "--method cam: this network does not end in average pooling"),
    (["--method", "attention", "--layer", "x"], "--layer is for gradcam"),
    (["--target", "pear", "--top-k", "2"], "not allowed with"),
    (["--opacity", "2"], "not between 0 and 1"),
    (["--measure"], "--measure needs --dataset"),
    (["--dataset", "sample"], "not both"),
    (["--arch", "resnet18"], "name one network"),
    (["--index", "0"], "are for a --dataset"),
    (["--meth", "cam"], "unrecognized arguments"),
])
def test_wrong_use_exits_with_2(cli, ours_on_disk, words, message):
    Image.fromarray(noise(32, 32)).save("photo.png")
    status, _, err = cli("--checkpoint", ours_on_disk, "photo.png", *words)
    assert status == 2 and message in err
    assert not Path("runs").exists()


@pytest.mark.parametrize("words, message", [
    (["--dataset", "cifar100", "--measure"], "cifar100 has none: --dataset cub"),
    (["--dataset", "sample", "--index", "5-3"], "expected numbers and ranges"),
    (["--dataset", "sample", "--index", "160"], "there are 160 images, numbered from 0"),
    (["--dataset", "sample", "--measure", "--top-k", "2"], "takes the true class"),
    (["--dataset", "cub", "--data-dir", "gone/data"], "gone/data does not exist"),
    ([], "name images"),
])
def test_wrong_selections(cli, ours_on_disk, words, message):
    status, _, err = cli("--checkpoint", ours_on_disk, *words)
    assert status == (1 if "gone/data" in words else 2) and message in err


@pytest.mark.parametrize("words, message", [
    (["--arch", "resnet19", "--weights", "DEFAULT"], "no such classifier; near it: resnet1"),
    (["--arch", "resnet18"], "needs weights: --weights DEFAULT"),
    (["--arch", "resnet18", "--weights", "V9"], "neither a file nor weights of torchvision's resnet18"),
    (["--weights", "x.pth"], "name one network"),
])
def test_wrong_networks(cli, words, message):
    status, _, err = cli(*words, "photo.png")
    assert status == 2 and message in err
