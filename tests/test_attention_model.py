"""The networks against independent references: parameter counts, float64 maths, torchvision's
VGG16."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

import attention_model
from attention_model import (
    MODEL_NAMES,
    AdditiveCompatibility,
    AttentionGate,
    Classifier,
    DotProductCompatibility,
    ParametrizedCompatibility,
    attend,
    build_model,
    fuse_conv_bn,
)
from common.device import COMPILES_CHECKPOINTS, torch_version

ATTENTION_NAMES = [name for name in MODEL_NAMES if "att" in name and "uniform" not in name]
NARROW = 1 / 16  # 4 to 32 channels: milliseconds a step


def narrow(name: str, **options):
    torch.manual_seed(0)
    return build_model(name, 7, width=NARROW, **options)


@pytest.mark.parametrize(
    "name, count",
    [
        ("vgg", 15_038_116),
        ("vgg-gap", 14_774_436),
        ("vgg-att1-pc", 19_760_293),
        ("vgg-att2-concat-pc", 19_813_030),
        ("vgg-att3-concat-pc", 19_971_751),
        ("vgg-att3-indep-pc", 19_971_951),
        ("vgg-pan", 24_745_126),
    ],
)
def test_parameter_counts_are_the_authors(name, count):
    with torch.device("meta"):
        model = build_model(name, 100)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("size", [(32, 32), (40, 56), (80, 80)])
def test_every_network_at_every_size(name, size):
    model = narrow(name, pool4=5 if size == (80, 80) else 2).eval()
    images = torch.randn(2, 3, *size)
    logits, maps = model(images, return_attention=True)
    assert logits.shape == (2, 7) and torch.equal(logits, model(images))
    assert tuple(maps) == model.levels
    sides = {"conv7": size, "conv10": tuple(-(-s // (5 if size == (80, 80) else 2)) for s in size)}
    sides["conv13"] = tuple(-(-s // 2) for s in sides["conv10"])
    for level, attention_map in maps.items():
        assert attention_map.shape == (2, *sides[level]) and attention_map.dtype == torch.float32
        if level in model.sigmoid_levels:
            assert attention_map.min() >= 0 and attention_map.max() <= 1
        else:
            torch.testing.assert_close(attention_map.sum((1, 2)), torch.ones(2))


def test_which_levels_have_maps():
    assert narrow("vgg").levels == narrow("vgg-gap").levels == ()
    assert narrow("vgg-att3-concat-uniform").levels == ()
    assert narrow("vgg-pan").levels == ("conv10", "conv13") and narrow(
        "vgg-pan"
    ).sigmoid_levels == ("conv10",)
    assert narrow("vgg-att1-dp").levels == ("conv13",)
    assert narrow("vgg-att2-indep-pc").levels == ("conv10", "conv13")
    assert narrow("vgg-att3-concat-gate").levels == ("conv7", "conv10", "conv13")


def test_the_network_is_the_authors_layer_for_layer():
    """Convolutions with their input sides at 32x32, in the order they are run (PAPER, the
    network)."""
    model, seen = narrow("vgg-att3-concat-dp").eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda m, x: seen.append((m.in_channels, m.out_channels, x[0].shape[-1]))
            )
    model(torch.randn(1, 3, 32, 32))
    c1, c2, c3, c4 = 4, 8, 16, 32
    assert seen == [
        (3, c1, 32),
        (c1, c1, 32),
        (c1, c2, 32),
        (c2, c2, 32),
        (c2, c3, 32),
        (c3, c3, 32),
        (c3, c3, 32),
        (c3, c4, 16),
        (c4, c4, 16),
        (c4, c4, 16),
        (c4, c4, 8),
        (c4, c4, 8),
        (c4, c4, 8),
        (c4, c4, 4),
        (c4, c4, 2),
    ]
    rates = [
        m.p
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Dropout) and name.startswith("trunk")
    ]
    assert rates == [0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


# ---- compatibility functions and heads, in float64, written out position by position ------------


@pytest.fixture
def features():
    torch.manual_seed(1)
    return torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)


def by_position(local, score):
    """score(image number, local feature (C,)) at every position -> (N, H, W)."""
    n, _, h, w = local.shape
    return np.array(
        [
            [[score(k, local[k, :, i, j].numpy()) for j in range(w)] for i in range(h)]
            for k in range(n)
        ]
    )


def numpy_of(module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def test_parametrised_compatibility(features):
    local, g = features
    module = ParametrizedCompatibility(6).double()
    w = numpy_of(module)
    expected = by_position(
        local, lambda k, at: w["u.weight"][0] @ (at + g[k].numpy()) + w["u.bias"][0]
    )
    np.testing.assert_allclose(module(local, g).detach().numpy(), expected, rtol=1e-12)


def test_dot_product_compatibility(features):
    local, g = features
    expected = by_position(local, lambda k, at: at @ g[k].numpy())
    np.testing.assert_allclose(DotProductCompatibility()(local, g).numpy(), expected, rtol=1e-12)


def test_additive_compatibility(features):
    local, g = features
    module = AdditiveCompatibility(6, 6).double()
    w = numpy_of(module)

    def score(k, at):
        joint = w["W.weight"][:, :, 0, 0] @ at + w["W.bias"] + w["V.weight"] @ g[k].numpy()
        return w["u.weight"][0] @ np.maximum(joint, 0)

    np.testing.assert_allclose(
        module(local, g).detach().numpy(), by_position(local, score), rtol=1e-12
    )
    assert module.W.out_channels == 3  # half of 6


@pytest.mark.parametrize("compatibility", ["pc", "dp", "gate"])
def test_gate_is_softmax_and_weighted_sum(features, compatibility):
    local, g = features
    gate = AttentionGate(compatibility, 6, 6).double()
    attended, scores = gate(local, g)
    flat = scores.detach().numpy().reshape(2, -1)
    a = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    expected = np.einsum("np,ncp->nc", a, local.numpy().reshape(2, 6, -1))
    # the softmax is in float32
    np.testing.assert_allclose(attended.detach().numpy(), expected, rtol=1e-5)


def test_uniform_is_the_mean_of_the_local_features(features):
    local, _ = features
    attended, _ = AttentionGate("uniform", 6, 6).double()(local, None)
    np.testing.assert_allclose(attended.numpy(), local.numpy().mean((2, 3)), rtol=1e-6)


def test_uniform_is_pc_without_its_scores():
    """The same weights otherwise, and the same logits where u is 0; no global branch."""
    uniform, pc = narrow("vgg-att3-indep-uniform").eval(), narrow("vgg-att3-indep-pc").eval()
    missing, unused = pc.load_state_dict(uniform.state_dict(), strict=False)
    assert not unused and {name.split(".")[0] for name in missing} == {
        "global_branch",
        "global_to_conv7",
        "gates",
    }
    for gate in pc.gates.values():
        gate.compatibility.u.weight.data.zero_()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(uniform(images), pc(images))
    assert not uniform.parameters_without_gradient() and not uniform.gate_parameters()


@pytest.mark.parametrize("combination", ["concat", "indep"])
def test_classifier(combination):
    torch.manual_seed(2)
    module = Classifier([3, 5], 4, combination, dropout=0.0).double().eval()
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        (
            norm.running_mean.normal_(),
            norm.running_var.uniform_(0.5, 2),
            norm.weight.data.normal_(),
            norm.bias.data.normal_(),
        )
    x = [torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)]
    w = numpy_of(module)
    h = [
        np.maximum(
            (f.numpy() - w[f"levels.{i}.norm.running_mean"])
            / np.sqrt(w[f"levels.{i}.norm.running_var"] + 1e-5)
            * w[f"levels.{i}.norm.weight"]
            + w[f"levels.{i}.norm.bias"],
            0,
        )
        for i, f in enumerate(x)
    ]
    if combination == "concat":
        expected = np.concatenate(h, 1) @ w["linears.0.weight"].T + w["linears.0.bias"]
    else:
        expected = sum(
            f @ w[f"linears.{i}.weight"].T + w[f"linears.{i}.bias"] for i, f in enumerate(h)
        )
    np.testing.assert_allclose(
        module([f.clone() for f in x]).detach().numpy(), expected, rtol=1e-10
    )


def test_summed_logits_give_the_probabilities_of_summed_log_softmax():
    a, b = torch.randn(2, 4, 9, dtype=torch.float64)
    torch.testing.assert_close((a + b).softmax(1), (a.log_softmax(1) + b.log_softmax(1)).softmax(1))


# ---- trap 1: who listens to g -------------------------------------------------------------------


@pytest.mark.parametrize("compatibility, listens", [("pc", False), ("dp", True), ("gate", True)])
def test_does_the_map_change_with_g(features, compatibility, listens):
    local, g = features
    torch.manual_seed(3)
    compat = AttentionGate(compatibility, 6, 6).double().compatibility
    a, b = (compat(local, x).flatten(1).softmax(1) for x in (g, g + torch.randn_like(g)))
    difference = (a - b).abs().max().item()
    assert difference > 1e-3 if listens else difference < 1e-12


@pytest.mark.parametrize("compatibility, listens", [("pc", False), ("dp", True), ("gate", True)])
def test_does_the_global_branch_learn(compatibility, listens):
    model = narrow(f"vgg-att3-concat-{compatibility}", dropout=0.0)
    # at its initial scale a map of a narrow, untrained net barely depends on g
    with torch.no_grad():
        for p in model.global_branch.linear.parameters():
            p.mul_(10)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    gradients = {
        name: 0.0 if p.grad is None else p.grad.abs().max().item()
        for name, p in model.named_parameters()
        if name.startswith(("global_branch", "global_to_conv7"))
    }
    if listens:
        assert (
            gradients["global_branch.linear.weight"] > 1e-8
            and gradients["global_branch.unit1.conv.weight"] > 1e-8
        )
        assert not model.parameters_without_gradient()
    else:
        assert set(gradients.values()) == {0.0}
        assert set(gradients) <= model.parameters_without_gradient()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_other_parameter_gets_a_gradient(name):
    model = narrow(name)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == model.parameters_without_gradient()


def test_skipping_g_under_pc_gives_the_map_with_g(features):
    local, g = features
    gate = AttentionGate("pc", 6, 6).double()
    torch.testing.assert_close(gate(local, g)[0], gate(local, None)[0], rtol=1e-6, atol=1e-7)


# ---- the pooled trunk is VGG16's ----------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 64), (96, 96)])
def test_pooled_trunk_equals_torchvision(size):
    torch.manual_seed(4)
    ours = build_model("vgg-gap", 5, trunk="pooled").trunk.eval()
    theirs = torchvision.models.vgg16_bn(weights=None).features.eval()
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    for norm in (m for m in theirs if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight, 1, 0.1), torch.nn.init.normal_(norm.bias, 0, 0.1)
    pairs = list(
        zip(
            [m for m in ours.modules() if isinstance(m, kinds)],
            [m for m in theirs if isinstance(m, kinds)],
            strict=True,
        )
    )
    for a, b in pairs:
        a.load_state_dict(b.state_dict())
    x = images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for number in range(1, 6):
            x = ours.run_block(number, x)
        expected = theirs(images)
        torch.testing.assert_close(F.max_pool2d(x, 2), expected, atol=1e-5, rtol=1e-5)
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}


# ---- memory, batches, errors --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg", "vgg-pan", "vgg-att3-concat-pc", "vgg-att3-indep-gate"])
def test_checkpointed_activations_change_nothing(name):
    """Equal gradients, and batch-norm statistics that move once a step; with dropout, from the same
    random state."""
    plain = narrow(name)
    saving = copy.deepcopy(plain)
    saving.checkpoint_activations = True
    assert saving.checkpoint_activations and not plain.checkpoint_activations
    images = torch.randn(4, 3, 32, 32)
    for model in (plain, saving):
        torch.manual_seed(5)
        F.cross_entropy(model(images), torch.arange(4)).backward()
    for (key, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=key)


@pytest.mark.skipif(torch_version() < COMPILES_CHECKPOINTS, reason="wrong in this PyTorch; refused")
def test_checkpointed_activations_under_the_compiler():
    """Through the compiler's tracing, without its code generator (which needs a C compiler)."""
    plain = narrow("vgg-att2-concat-gate", dropout=0.0)
    saving = copy.deepcopy(plain)
    saving.checkpoint_activations = True
    images = torch.randn(4, 3, 32, 32)
    for model in (plain, torch.compile(saving, backend="aot_eager")):
        F.cross_entropy(model(images), torch.arange(4)).backward()
    for (key, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=key)


def kept_for_backward(
    trunk: str, saving: bool, dtype: torch.dtype, batch: int, monkeypatch
) -> float:
    """MiB that the forward pass of vgg-att3-concat-pc keeps for the backward pass at 224x224, full
    width: the storages behind all saved tensors, each counted once. On fake tensors, which have
    shapes and types and no numbers."""
    monkeypatch.setattr(attention_model, "initialize", lambda model: None)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        model = build_model("vgg-att3-concat-pc", 200, trunk=trunk, dropout=0.0)
        model.checkpoint_activations = saving
        images = torch.empty(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            F.cross_entropy(model(images).float(), torch.zeros(batch, dtype=torch.int64))
        return sum(storage.nbytes() for storage in storages.values()) / 2**20


@pytest.mark.parametrize(
    "trunk, saving, dtype, most",
    [
        ("full", True, torch.bfloat16, 70),
        ("full", False, torch.bfloat16, 370),
        ("pooled", False, torch.bfloat16, 90),
        ("pooled", True, torch.bfloat16, 15),
        ("full", True, torch.float32, 120),
        ("full", False, torch.float32, 700),
        ("pooled", False, torch.float32, 130),
        ("pooled", True, torch.float32, 25),
    ],
)
def test_activations_kept_an_image(monkeypatch, trunk, saving, dtype, most):
    """Measured as the difference between batches of 4 and 2, so that the weights do not count."""
    four, two = (kept_for_backward(trunk, saving, dtype, batch, monkeypatch) for batch in (4, 2))
    print(
        f"{trunk} trunk, {dtype}{', checkpointing' if saving else ''}: {(four - two) / 2:.1f} MiB "
        "an image"
    )
    assert 0.6 * most < (four - two) / 2 <= most


def test_a_batch_of_one():
    image = torch.randn(1, 3, 32, 32)
    for name in MODEL_NAMES:
        assert narrow(name).eval()(image).shape == (1, 7)
    with pytest.raises(ValueError, match="a batch of 1 cannot train: batch norm needs at least 2"):
        narrow("vgg-att3-concat-pc")(image)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build_model("vgg-att4", 10), "unknown model 'vgg-att4'"),
        (lambda: build_model("vgg-att1-concat-pc", 10), "unknown model"),
        (lambda: build_model("vgg", 10, trunk="full"), "vgg-gap is the baseline that has one"),
        (lambda: build_model("vgg-gap", 10, trunk="half"), "unknown trunk 'half'"),
        (lambda: build_model("vgg", 0), "out of range: num_classes 0"),
        (lambda: build_model("vgg", 10, width=-1), "width -1"),
        (
            lambda: narrow("vgg").eval()(torch.randn(2, 1, 32, 32)),
            r"shape \(N, 3, H, W\), got \(2, 1, 32, 32\)",
        ),
        (lambda: narrow("vgg").eval()(torch.randn(2, 3, 32, 8)), "32x8 px are too small"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name", ["vgg-att3-concat-pc", "vgg-att3-concat-dp", "vgg-att3-concat-gate"]
)
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_the_initial_maps_are_spread(name, width):
    """Neither one-hot, as from the authors' u (std 1.41), nor flat: a good part of the positions
    counts, in effect."""
    torch.manual_seed(6)
    model = build_model(name, 10, width=width).train()
    with torch.no_grad():
        _, maps = model(torch.randn(4, 3, 32, 32), return_attention=True)
    for level, attention_map in maps.items():
        p = attention_map.flatten(1).double()
        effective = (torch.special.entr(p).sum(1)).exp().mean().item() / p.shape[1]
        assert 0.1 < effective < 0.99, (level, effective)


def test_the_authors_initial_gate_is_almost_one_hot():
    """Why u does not start as the authors' does."""
    torch.manual_seed(6)
    model = build_model("vgg-att3-concat-pc", 10, width=0.25).train()
    with torch.no_grad():
        for gate in model.gates.values():
            gate.compatibility.u.weight.normal_(std=2**0.5)
        _, maps = model(torch.randn(4, 3, 32, 32), return_attention=True)
    p = maps["conv7"].flatten(1).double()
    assert torch.special.entr(p).sum(1).exp().mean() < 0.1 * p.shape[1]


@pytest.mark.parametrize("compatibility", ["pc", "dp", "gate"])
def test_scores_stay_of_order_1_when_training_begins(compatibility):
    """Five steps at the recipe's rate without its warm-up. With g in plain units, dp's were at 255
    then."""
    torch.manual_seed(0)
    model = build_model(f"vgg-att3-concat-{compatibility}", 10, width=0.25, dropout=0.0).train()
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(6):
        logits, scores = model.logits_and_scores(images)
        for level, score in scores.items():
            assert 0.1 < score.flatten(1).std(1).mean() < 10, level
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()


def test_convolutions_start_as_the_identity():
    model = narrow("vgg-gap").eval()
    unit = model.trunk.block3[1]
    images = torch.rand(2, unit.conv.in_channels, 9, 9)
    torch.testing.assert_close(unit.conv(images), images)


def test_gradients_of_the_local_features_stay_channels_last():
    local = torch.randn(2, 8, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(2, 8)
    for output in (
        attend(local, torch.rand(2, 4, 5)),
        DotProductCompatibility()(local, g),
        ParametrizedCompatibility(8)(local, g),
    ):
        assert torch.autograd.grad(output.sum(), local)[0].is_contiguous(
            memory_format=torch.channels_last
        )


def test_channels_last_gives_the_same():
    model = narrow("vgg-att3-concat-gate").double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, maps = model(images, return_attention=True)
    model = model.to(memory_format=torch.channels_last)
    after, other = model(
        images.contiguous(memory_format=torch.channels_last), return_attention=True
    )
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(maps, other)


@pytest.mark.parametrize("name", ["vgg", "vgg-pan", "vgg-att3-concat-dp"])
def test_without_norms_gives_the_same_and_leaves_the_network_alone(name):
    model = narrow(name).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    before, images = (
        {n: t.clone() for n, t in model.state_dict().items()},
        torch.randn(2, 3, 32, 32, dtype=torch.float64),
    )
    folded = fuse_conv_bn(model)
    assert model.training and not any(
        isinstance(m, torch.nn.BatchNorm2d) for m in folded.trunk.modules()
    )
    torch.testing.assert_close(folded(images), model.eval()(images))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
