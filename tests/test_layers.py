"""explain/layers.py: how the outputs of layers lie over the image, and which layers there are."""

import pytest
import torch
import torchvision
from torch import nn

from attention_model import build_model
from explain.layers import block_layers, default_layer, feature_layers
from explain.maps import grad_cam, gradient_maps
from tests.helpers.makers import torchvisions

SIZE = (64, 96)


def images(count=2, size=SIZE, dtype=torch.float32):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def fresh(name, size=96):
    """A network of torchvision and an image, as shapes only."""
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None), torch.zeros(1, 3, size, size)


# ---- names --------------------------------------------------------------------------------------


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
    model, x = fresh(name)
    layers = feature_layers(model, x)
    assert default_layer(model, x) == expected and layers[expected][1] * layers[expected][2] > 1


def test_default_layer_still_has_an_extent_in_small_images():
    assert default_layer(torchvisions("resnet18", torch.float32), images(1, (32, 32))) == "layer3"


def test_layers_that_do_not_do():
    model, x = build_model("vgg-att1-pc", 5, width=1 / 16), images(1)
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


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", ["features.1", "features.4", "features.9", "features.14", "features.19"]),
        ("efficientnet_b0", ["features.1", "features.2", "features.3", "features.5", "features"]),
        (
            "densenet121",
            ["features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"],
        ),
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features"]),
        ("swin_t", ["features.1", "features.3", "features.5", "permute"]),
    ],
)
def test_blocks_are_the_last_layers_of_each_resolution(name, expected):
    assert block_layers(*fresh(name)) == expected


def test_blocks_of_this_projects_networks():
    model = build_model("vgg-att3-concat-pc", 5, width=1 / 16)
    assert block_layers(model, images()) == [f"trunk.block{number}" for number in range(1, 6)]
    pooled = build_model("vgg", 5, width=1 / 16)  # its block 5 has one position at 16 px
    assert block_layers(pooled, images(1, (16, 16)))[-1] != "trunk.block5"


# ---- grids --------------------------------------------------------------------------------------


class Permuted(nn.Module):
    """A convolution whose channels then go last, through a linear layer, and first again."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, stride=8)
        self.to_last = torchvision.ops.Permute([0, 2, 3, 1])
        self.linear = nn.Linear(channels, channels)
        self.to_first = torchvision.ops.Permute([0, 3, 1, 2])
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.to_first(self.linear(self.to_last(self.conv(x))).tanh())
        return self.head((x * x).mean((2, 3)))


@pytest.mark.parametrize("channels, size", [(5, (64, 96)), (8, (64, 64)), (9, (64, 64))])
def test_channels_last_is_read_as_such_also_where_the_shape_does_not_decide(channels, size):
    """8 channels of 8x8 positions could be either."""
    torch.manual_seed(0)
    model, x = Permuted(channels).double(), images(2, size, torch.float64)
    found = gradient_maps(model, x, [0, 3], layers=["conv", "to_last", "linear", "to_first"])
    for first, last in (("conv", "to_last"), ("to_first", "linear")):
        for method, maps in found[last].items():
            if first == "conv":  # the same numbers; behind the tanh they are others
                torch.testing.assert_close(maps, found[first][method])
            assert maps.std() > 0.05
    a = model.linear(model.conv(x).permute(0, 2, 3, 1)).detach().requires_grad_()
    b = a.tanh()
    logits = model.head((b * b).mean((1, 2)))
    (g,) = torch.autograd.grad(logits[0, 0] + logits[1, 3], a)
    expected = (a * g.mean((1, 2), keepdim=True)).sum(3).relu()
    expected = nn.functional.interpolate(expected[:, None], size, mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found["linear"]["gradcam"], expected.detach().float())


class Tokens(nn.Module):
    """Patches in rows, with or without a class token before them, and attention between them."""

    def __init__(self, class_token, patch=16):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, patch, stride=patch)
        self.block = nn.Linear(6, 6)
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0)
        self.after = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)
        self.class_token = class_token

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        if self.class_token:
            x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        x = self.after(self.mix(self.block(x)))
        return self.head(x[:, 0] if self.class_token else x.mean(1))


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_become_a_grid_again(class_token):
    torch.manual_seed(0)
    model, x = Tokens(class_token).double().eval(), images(2, dtype=torch.float64)  # 4x6 patches
    assert feature_layers(model, x)["block"] == (6, 4, 6)
    kept = []
    handle = model.block.register_forward_hook(lambda m, i, output: kept.append(output))
    logits = model(x)
    handle.remove()
    (g,) = torch.autograd.grad(logits[0, 1] + logits[1, 2], kept)
    a, g = kept[0].detach()[:, class_token:], g[:, class_token:]
    expected = ((a * g.mean(1, keepdim=True)).sum(2)).view(2, 4, 6).relu()
    expected = nn.functional.interpolate(expected[:, None], SIZE, mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(grad_cam(model, x, [1, 2], "block"), expected.float())


def test_where_only_the_class_token_counts_no_map_is_drawn():
    model, x = Tokens(True).eval(), images()
    assert default_layer(model, x) == "block" and list(feature_layers(model, x))[-1] == "block"
    assert block_layers(model, x) == ["block"]
    with pytest.raises(ValueError, match="only the class token reaches the logits.*choose block"):
        grad_cam(model, x, [0, 1], "after")
    assert default_layer(Tokens(False).eval(), x) == "after"


@pytest.mark.parametrize(
    "name, layer, shape",
    [
        (
            "maxvit_t",
            "blocks.0.layers.0.layers.window_attention.partition_op",
            r"\(1, 64, 49, 64\)",
        ),
        ("vit_b_16", "encoder.layers.encoder_layer_3.self_attention", "tuple"),
        ("vit_b_16", "heads", r"\(1, 1000\)"),
    ],
)
def test_what_has_no_grid_is_refused(name, layer, shape):
    model, x = fresh(name, 224)
    with pytest.raises(ValueError, match=f"needs a layer whose output lies over.*gives {shape}"):
        grad_cam(model, x, [0], layer)


def test_a_layer_of_one_position_is_refused():
    for model, layer, size in (
        (torchvisions("resnet18", torch.float32), "avgpool", 64),
        (build_model("vgg", 5, width=1 / 16).eval(), "trunk.block5", 16),
    ):
        with pytest.raises(ValueError, match="in several positions.*1, 1"):
            grad_cam(model, images(1, (size, size)), [0], layer)


class Odd(nn.Module):
    """Modules that return other things than tensors of a batch, and an image that is used again."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2, return_indices=True)
        self.scale = Scale()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        features, _ = self.pool(self.conv(x) * x)
        return self.fc(input=features.mean((2, 3))) * self.scale()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.nothing = nn.Identity()

    def forward(self):
        self.nothing(torch.zeros(2, 3, 0, 0))
        return torch.tensor(2.0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_networks_with_odd_modules(context):
    torch.manual_seed(0)
    model = Odd()
    with context():
        x = images(2, (32, 32))
        assert default_layer(model, x) == "conv"
        maps = grad_cam(model, x, [0, 1])
    torch.testing.assert_close(maps, grad_cam(model, images(2, (32, 32)), [0, 1], "conv"))


# ---- a planted sign -----------------------------------------------------------------------------


def signs(count, size, seed):
    """Noise with a bright square of 32 px whose color is the class, and the cell it is in."""
    draw = torch.Generator().manual_seed(seed)
    batch = 0.3 * torch.randn(count, 3, size, size, generator=draw)
    classes, cells = torch.arange(count) % 3, size // 32
    places = torch.randint(0, cells**2, (count,), generator=draw)
    for image, color, place in zip(batch, classes, places, strict=True):
        row, column = divmod(int(place), cells)
        square = image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        square[:] = -1.5
        square[color] = 3
    return batch, classes, places


def trained_head(name, size, **settings):
    """A transformer with random weights, its head fitted to the signs by ridge regression."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=3, **settings).eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    inputs = []
    handle = head.register_forward_pre_hook(lambda m, given: inputs.append(given[0]))
    batch, classes, _ = signs(24, size, 0)
    with torch.no_grad():
        model(batch)
        handle.remove()
        features = inputs[0].double()
        mean, sd = features.mean(0), features.std(0)
        z = (features - mean) / sd
        wanted = nn.functional.one_hot(classes, 3).double() - 1 / 3
        weights = z.T @ torch.linalg.solve(z @ z.T + 1000 * torch.eye(len(z)), wanted)
        head.weight.copy_((weights / sd[:, None]).T)
        head.bias.copy_(-(mean / sd) @ weights)
    return model


@pytest.mark.parametrize(
    "name, size, settings, old, least",
    [
        ("vit_b_16", 96, {"image_size": 96}, "conv_proj", 0.35),
        ("swin_t", 128, {}, None, 0.9),
    ],
)
def test_the_map_of_a_transformer_is_where_the_sign_is(name, size, settings, old, least):
    """In 96 px there are 9 cells: chance is 0.11. With random weights, eleven blocks of attention
    have mixed the patches; halfway they are still themselves. The patch embedding, which would be
    the last (N, C, h, w), is not what is drawn."""
    model = trained_head(name, size, **settings)
    batch, classes, places = signs(12, size, 1)
    layer = default_layer(model, batch)
    assert layer != old
    found = gradient_maps(model, batch, classes, ["gradcam"], [layer, MIDDLE[name]])
    for at, share in ((layer, least), (MIDDLE[name], 0.9)):
        peaks = found[at]["gradcam"].flatten(1).argmax(1)
        cells = peaks // size // 32 * (size // 32) + peaks % size // 32
        print(f"{name} {at}: {(cells == places).float().mean():.2f}")
        assert (cells == places).float().mean() >= share, at


MIDDLE = {"vit_b_16": "encoder.layers.encoder_layer_5", "swin_t": "features"}  # channels last
