"""explain/maps.py: the methods against few-line references in float64, and what they leave
behind."""

import gc
import math
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from attention_model import build_model
from explain.layers import default_layer, feature_layers
from explain.maps import attention_maps, class_activation_map, grad_cam
from tests.helpers.makers import torchvisions

SIZE = (64, 96)


def images(count=2, size=SIZE, dtype=torch.float64):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def ours(name, dtype=torch.float64, width=1 / 16, **settings):
    """One of our networks, with batch norm that normalises by something."""
    torch.manual_seed(0)
    model = build_model(name, 5, width=width, **settings).to(dtype)
    model.train()
    model(images(8, (32, 32), dtype))
    return model.eval()


def in_unit_range(maps, size=SIZE):
    """The reference for what comes out: negatives cut off, upsampled, divided by the largest, if
    there is one."""
    maps = F.interpolate(maps.relu()[:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]
    largest = [each.max() for each in maps]
    assert max(largest) > 0
    return torch.stack(
        [each / most if most > 0 else each for each, most in zip(maps, largest, strict=True)]
    )


def assert_maps(maps, expected):
    assert maps.dtype == torch.float32 and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps, expected.float(), atol=1e-6, rtol=1e-5)


# ---- equality -----------------------------------------------------------------------------------


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
        expected = torch.stack(
            [
                (linear.weight[t][:, None, None] * f).sum(0)
                for t, f in zip(targets, features, strict=True)
            ]
        )
    assert_maps(class_activation_map(model, x, targets), in_unit_range(expected))
    torch.testing.assert_close(logits, model(x).detach())  # so these are the features that count


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "vgg-att1-pc", "vgg"])
def test_class_activation_map_needs_pooling_and_one_linear_layer(name):
    model = (
        ours(name, torch.float32)
        if name.startswith("vgg-") or name == "vgg"
        else torchvisions(name, torch.float32)
    )
    with pytest.raises(ValueError, match="use gradcam"):
        class_activation_map(model, images(1, dtype=torch.float32), [0])


@pytest.mark.parametrize(
    "name, layer",
    [
        ("resnet18", None),
        ("resnet18", "layer2.0.bn1"),
        ("resnet18", "layer3.1.relu"),
        ("vgg-att3-concat-dp", None),
        ("vgg-att3-concat-pc", "trunk.block4.0.conv"),
    ],
)
def test_grad_cam_is_plain_autograd(name, layer):
    """Against a backward pass through the whole network, every parameter asking for its
    gradient."""
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
    (gradient,) = torch.autograd.grad(
        logits[0, 3] + logits[1, 1] + logits[2, 0] + logits[3, 2], outputs[-1]
    )
    alpha = gradient.mean(dim=(2, 3), keepdim=True)
    assert_maps(
        grad_cam(model, x, targets, layer), in_unit_range((alpha * outputs[-1]).sum(1).detach())
    )
    assert_maps(
        grad_cam(model, x, targets, module), in_unit_range((alpha * outputs[-1]).sum(1).detach())
    )


def test_grad_cam_by_finite_differences():
    """Moving a whole channel of the activations by eps moves the logit by eps times the sum of its
    gradients."""
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(3, 12, 5, stride=4), nn.Tanh()).double()
    behind = nn.Sequential(
        nn.Conv2d(12, 8, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(480, 3)
    ).double()
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


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", "layer4"),
        ("vgg11", "features.19"),
        ("vgg11_bn", "features.27"),
        ("densenet121", "features"),
        ("mobilenet_v2", "features"),
        ("squeezenet1_1", "classifier.2"),
        ("convnext_tiny", "features"),
        ("swin_t", "permute"),
    ],
)
def test_default_layer_of_torchvisions(name, expected):
    with torch.device("meta"):  # shapes only
        model, x = torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, 96, 96)
    layers = feature_layers(model, x)
    assert default_layer(model, x) == expected and layers[expected][1] * layers[expected][2] > 1


def test_default_layer_still_has_an_extent_in_small_images():
    assert (
        default_layer(torchvisions("resnet18", torch.float32), images(1, (32, 32), torch.float32))
        == "layer3"
    )


def test_layers_that_do_not_do():
    model, x = ours("vgg-att1-pc", torch.float32), images(1, dtype=torch.float32)
    assert default_layer(model, x) == "trunk.block5" and feature_layers(model, x)[
        "trunk.block5"
    ] == (32, 16, 24)
    for layer, message in (
        ("trunk.block9", "no layer 'trunk.block9'; it has trunk.block"),
        (nn.ReLU(), "not part of this"),
        ("global_branch.unit1", "is not run"),
        ("classifier.linears.0", r"gives \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            grad_cam(model, x, [0], layer)


# ---- what is left behind ------------------------------------------------------------------------


def state_of(model):
    hooks = [
        hook
        for m in model.modules()
        for hook in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)
    ]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        hooks,
        [p.grad for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_network_comes_back_as_it_was(context):
    model, x = ours("vgg-gap", torch.float32), images(dtype=torch.float32)
    model.train()
    model.trunk.block2.eval()  # a mixed state, as in fine-tuning
    model.trunk.block1.requires_grad_(False)
    attention = ours("vgg-att2-concat-dp", torch.float32).train()
    before = [state_of(m) for m in (model, attention)]
    with context():
        calls = [
            lambda: attention_maps(attention, x),
            lambda: class_activation_map(model, x, [0, 1]),
            lambda: grad_cam(model, x, [0, 1]),
            lambda: grad_cam(attention, x, [0, 1], "trunk.block3"),
        ]
        results = [call() for call in calls]
        for wrong in (
            lambda: class_activation_map(model, x, [0, 5]),
            lambda: grad_cam(model, x, [0]),
            lambda: grad_cam(model, x, [-1, 0]),
            lambda: grad_cam(model, x, [0, 1], "classifier"),
            lambda: grad_cam(model, x[:, :2], [0, 1]),
            lambda: attention_maps(attention, x[0]),
            lambda: grad_cam(model, x, [0.0, 1.0]),
            lambda: class_activation_map(model, x[:0], []),
        ):
            with pytest.raises(ValueError):
                wrong()
    for network, (modes, asking, hooks, _, weights) in zip((model, attention), before, strict=True):
        now = state_of(network)
        assert now[0] == modes and now[1] == asking and now[2] == hooks == []
        assert all(grad is None for grad in now[3])
        # statistics too
        assert all(torch.equal(weights[name], value) for name, value in now[4].items())
    for call, result in zip(
        calls, results, strict=True
    ):  # and the mode of whoever calls changes nothing
        again = call()
        for a, b in (
            zip(again.values(), result.values(), strict=True)
            if isinstance(again, dict)
            else [(again, result)]
        ):
            assert torch.equal(a, b) and not b.requires_grad


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Linux says there what is resident"
)
def test_memory_stays_flat_over_a_thousand_calls():
    """A leak of one call's activations, 96 KiB, would be 86 MiB. The allocator may keep some of
    its own, in a process that has run other tests."""

    class Tiny(nn.Sequential):
        levels = ("only",)

        def forward(self, x, return_attention=False):
            maps = {"only": x.mean(1).flatten(1).softmax(1).view(len(x), *x.shape[2:])}
            return (super().forward(x), maps) if return_attention else super().forward(x)

    model = Tiny(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    x = images(2, (40, 40), torch.float32)

    def measured():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, sum(
            issubclass(type(each), torch.Tensor) for each in gc.get_objects()
        )

    for call in range(1000):
        grad_cam(model, x, [0, 1], None if call % 2 else "0")
        class_activation_map(model, x, [2, 3])
        attention_maps(model, x)
        if call == 100:
            before = measured()
    after = measured()
    print(f"\nresident MiB and tensors after 100 calls {before}, after 1,000 {after}")
    assert after[0] - before[0] < 40 and after[1] == before[1]


# ---- hard cases ---------------------------------------------------------------------------------


def test_in_place_relu_behind_the_layer():
    """The activations are the layer's, not what the ReLU makes of them in the same memory."""
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 4, 3).double(), nn.Linear(4, 3).double()

    def network(inplace):
        return nn.Sequential(
            convolution, nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear
        )

    maps = grad_cam(network(True), images(), [0, 2], "0")
    assert_maps(maps, grad_cam(network(False), images(), [0, 2], "0"))
    a = convolution(images())
    alpha = linear.weight[[0, 2]] * (a > 0).double().mean((2, 3))
    assert_maps(maps, in_unit_range((alpha[:, :, None, None] * a).sum(1).detach()))


def test_bf16_networks():
    model, x = ours("vgg-gap", torch.float32), images(2, (32, 32), torch.float32)
    reference = grad_cam(model, x, [0, 1])
    maps = grad_cam(model.bfloat16(), x, [0, 1])
    assert (
        maps.dtype == torch.float32
        and (maps - reference).abs().mean() < 0.05
        and reference.std() > 0.1
    )
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
        one = x[i : i + 1]
        for a, b in zip(
            together,
            [grad_cam(model, one, targets[i : i + 1]), *attention_maps(model, one).values()],
            strict=True,
        ):
            torch.testing.assert_close(a[i : i + 1], b)


# ---- cost ---------------------------------------------------------------------------------------


def test_grad_cam_costs_little_more_than_a_forward_pass():
    """32 images of 224x224 through resnet18, in turn with a forward pass without gradients; the
    least time of each. The gradient of the whole network would take two forward passes more."""
    model, x = torchvisions("resnet18", torch.float32, 1000), images(32, (224, 224), torch.float32)

    def forward():
        with torch.no_grad():
            model(x)

    def explained():
        grad_cam(model, x, torch.arange(32))

    seconds = {work: math.inf for work in (forward, explained)}
    for number in range(20):  # the first one warms up
        for work in seconds:
            started = time.perf_counter()
            work()
            seconds[work] = (
                min(seconds[work], time.perf_counter() - started) if number else math.inf
            )
        ratio = seconds[explained] / seconds[forward] if number else math.inf
        if ratio <= 1.3:
            break
    print(
        f"\nforward {seconds[forward]:.2f} s, gradcam {seconds[explained]:.2f} s: {ratio:.3f} "
        "times a forward pass"
    )
    assert ratio <= 1.3
