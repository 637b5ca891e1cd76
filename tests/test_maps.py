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
from torch import nn

from attention_model import build_model
from explain.maps import (
    attention_maps,
    class_activation_map,
    grad_cam,
    grad_cam_plus_plus,
    gradient_maps,
    hires_cam,
    layer_cam,
    raw_gradient_maps,
)
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


# ---- the other gradient methods -----------------------------------------------------------------


def grad_cam_reference(a, g):
    return (g.mean((1, 2), keepdim=True) * a).sum(0)


def grad_cam_plus_plus_reference(a, g):
    """Equations 18 and 19 of the paper, for Y = exp(S): its derivatives by A are Y g, Y g^2, Y g^3
    where S is piecewise linear. Pixel by pixel, as they are written."""
    y = torch.tensor(1.7, dtype=torch.float64)  # whatever exp(S) is
    weights = torch.zeros(len(a), dtype=torch.float64)
    for k in range(len(a)):
        first, second, third = y * g[k], y * g[k] ** 2, y * g[k] ** 3
        denominator = 2 * second + a[k].sum() * third
        alpha = torch.where(g[k] != 0, second / denominator, 0.0)
        weights[k] = (alpha * first.relu()).sum()
    return torch.einsum("k,khw->hw", weights, a)


def hires_cam_reference(a, g):
    return sum(a[k] * g[k] for k in range(len(a)))


def layer_cam_reference(a, g):
    return sum(a[k] * g[k].relu() for k in range(len(a)))


REFERENCES = {
    grad_cam: ("gradcam", grad_cam_reference),
    grad_cam_plus_plus: ("gradcam++", grad_cam_plus_plus_reference),
    hires_cam: ("hirescam", hires_cam_reference),
    layer_cam: ("layercam", layer_cam_reference),
}
LAYERS = {
    "resnet18": ["layer2", "layer3.0.conv1", "layer4"],  # a ReLU in place follows the convolution
    "vgg-att3-concat-dp": ["trunk.block3", "trunk.block4.0.conv", "trunk.block5"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_method_at_every_layer_is_its_papers_formula(name):
    """Activations and gradients by a backward pass through the whole network."""
    x, targets = images(3), [3, 1, 0]
    model = ours(name) if name.startswith("vgg") else torchvisions(name)
    together = gradient_maps(model, x, targets, layers=LAYERS[name])
    assert list(together) == LAYERS[name]
    for layer in LAYERS[name]:
        kept = []

        def keep(module, inputs, output, kept=kept):
            kept.append(output)
            return output.clone()

        handle = model.get_submodule(layer).register_forward_hook(keep)
        score = model(x)[range(3), targets].sum()
        handle.remove()
        (gradients,) = torch.autograd.grad(score, kept)
        activations = kept[0].detach()
        for function, (method, reference) in REFERENCES.items():
            expected = torch.stack(
                [reference(a, g) for a, g in zip(activations, gradients, strict=True)]
            )
            assert_maps(together[layer][method], in_unit_range(expected))
            assert_maps(function(model, x, targets, layer), in_unit_range(expected))


def test_all_layers_and_methods_share_one_pass(monkeypatch):
    model, x = ours("vgg-gap", torch.float32), images(2, dtype=torch.float32)
    forward, backward, grad = [], [], torch.autograd.grad
    model.register_forward_hook(lambda *_: forward.append(1))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or grad(*a, **k))
    gradient_maps(model, x, [0, 1], layers=["trunk.block3", "trunk.block4", "trunk.block5"])
    assert len(forward) == len(backward) == 1


def test_hires_cam_on_a_pooling_linear_network_is_cam():
    for name in ("resnet18", "vgg-gap"):
        model = ours(name) if name == "vgg-gap" else torchvisions(name)
        expected = class_activation_map(model, images(3), [0, 1, 4])
        assert_maps(hires_cam(model, images(3), [0, 1, 4]), expected)
        assert expected.std() > 0.1


def test_hires_cam_behind_a_gate_counts_what_attention_takes():
    """With one gate, no dropout and the scores held, the logit is a sum over positions of weight
    times feature: where the attention is 0, Grad-CAM may be high and HiResCAM is 0."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.linear = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x):
            features = self.features(x).relu()
            attention = torch.zeros_like(features[:, :1])
            attention[:, :, 2:4, 5:8] = 1 / 6
            return self.linear((features * attention).sum((2, 3)))

    torch.manual_seed(0)
    model, x = Gated().double(), images(2, (12, 16))
    for method, outside in ((hires_cam, 0.0), (grad_cam, 0.1)):
        maps = method(model, x, [0, 1], "features").clone()
        maps[:, 2:4, 5:8] = 0
        assert maps.max() <= outside if method is hires_cam else maps.max() > outside


def test_a_network_of_many_classes_has_a_map_per_column():
    model, x = ours("vgg-gap"), images(2)
    columns = [torch.tensor([0, 1]), torch.tensor([4, 2])]
    found = raw_gradient_maps(model, x, columns, ["layercam"], ["trunk.block4", "trunk.block5"])
    for layer, by_method in found.items():
        for column, maps in zip(columns, by_method["layercam"], strict=True):
            assert_maps(layer_cam(model, x, column, layer), in_unit_range(maps))


# ---- another image's g --------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["dp", "gate"])
def test_a_query_replaces_g_and_nothing_else(score):
    model, x = ours(f"vgg-att3-concat-{score}"), images(3)
    image, other = x[:1], x[1:2]
    with torch.no_grad():
        blocks, local = other, {}
        for number in range(1, 6):
            blocks = model.trunk.run_block(number, blocks)
        g = model.global_branch(blocks)
        blocks = image
        for number, level in zip(range(1, 6), (None, None, "conv7", "conv10", "conv13")):  # noqa: B905
            blocks = model.trunk.run_block(number, blocks)
            local[level] = blocks
        for level, maps in attention_maps(model, image, other).items():
            level_g = g
            if score == "dp" and level == "conv7":
                level_g = model.global_to_conv7(g)
            if score == "dp":
                level_g = level_g / math.sqrt(local[level].shape[1])
            scores = model.gates[level].compatibility(local[level], level_g)
            expected = scores.flatten(1).softmax(1).view_as(scores)
            assert_maps(maps, in_unit_range(expected))
    own = attention_maps(model, x)
    for level, maps in attention_maps(model, x, x).items():
        torch.testing.assert_close(maps, own[level])  # one's own g
    assert (attention_maps(model, x, other)["conv10"][0] - own["conv10"][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 queries for 3 images"):
        attention_maps(model, x, x[:2])


def test_a_query_of_pc_is_refused_and_of_progressive_attention_moves_its_sigmoid():
    x = images(2)
    for name in ("vgg-att3-concat-pc", "vgg-att1-pc"):
        with pytest.raises(ValueError, match="a query changes nothing in this network"):
            attention_maps(ours(name), x, x[:1])
    model = ours("vgg-pan")
    own, other = attention_maps(model, x), attention_maps(model, x, x.flip(0))
    assert (own["conv10"] - other["conv10"]).abs().max() > 1e-4


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
            lambda: gradient_maps(model, x, [0, 1], layers=["trunk.block3", None])["trunk.block3"],
            lambda: attention_maps(attention, x, x[:1]),
        ]
        results = [call() for call in calls]
        for wrong in (
            lambda: class_activation_map(model, x, [0, 5]),
            lambda: grad_cam(model, x, [0]),
            lambda: layer_cam(model, x, [0, 7]),
            lambda: attention_maps(attention, x, x[:1, :2]),
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
    for method in (class_activation_map, *REFERENCES):
        assert (method(model, x, [0, 1]) == 0).all()
    attention = ours("vgg-att1-pc", torch.float32)
    attention.gates["conv13"].compatibility.u.weight.data.zero_()
    torch.testing.assert_close(attention_maps(attention, x)["conv13"], torch.ones(2, *SIZE))


def test_checkpointed_activations_change_no_map():
    """Recomputed in the backward pass, they would miss the hooks of the forward pass."""
    model, x = ours("vgg-att3-concat-dp"), images(2)
    layers = ["trunk.block2", "trunk.block4.0", "trunk.block5"]
    expected = gradient_maps(model, x, [0, 1], layers=layers)
    model.checkpoint_activations = True
    for mode in (True, False):
        found = gradient_maps(model.train(mode), x, [0, 1], layers=layers)
        for layer in layers:
            torch.testing.assert_close(found[layer], expected[layer])
    assert model.checkpoint_activations and model.global_branch.checkpoint_activations


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


def test_the_gradient_methods_cost_little_more_than_a_forward_pass():
    """16 images of 224x224 through resnet18: Grad-CAM at its last layer, and four methods at three
    layers, in turn with a forward pass without gradients; the least time of each. The gradient of
    the whole network would take two forward passes more."""
    model, x = torchvisions("resnet18", torch.float32, 1000), images(16, (224, 224), torch.float32)
    targets = torch.arange(16)

    def forward():
        with torch.no_grad():
            model(x)

    def one():
        grad_cam(model, x, targets)

    def twelve():
        gradient_maps(model, x, targets, layers=["layer2", "layer3", "layer4"])

    seconds = {work: math.inf for work in (forward, one, twelve)}
    for number in range(20):  # the first one warms up
        for work in seconds:
            started = time.perf_counter()
            work()
            seconds[work] = (
                min(seconds[work], time.perf_counter() - started) if number else math.inf
            )
        ratios = [seconds[work] / seconds[forward] if number else math.inf for work in seconds]
        if ratios[1] <= 1.3 and ratios[2] <= 1.6:
            break
    print(
        f"\nforward {seconds[forward]:.2f} s; times that: gradcam {ratios[1]:.3f}, "
        f"four methods at three layers {ratios[2]:.3f}"
    )
    assert ratios[1] <= 1.3 and ratios[2] <= 1.6
