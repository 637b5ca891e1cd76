"""explain/methods.py: which maps are made, under which names, and of which class."""

import numpy as np
import pytest
import torch

from attention_model import build_model
from common.errors import UserError
from explain.maps import (
    attention_maps,
    gradient_maps,
    hires_cam,
    layer_cam,
    raw_gradient_maps,
)
from explain.methods import METHODS, applicable, list_layers, maps_of
from explain.networks import TrainedNetwork
from explain.smoothing import smoothed

NAMES = ("a", "b", "c")


def network_of(name):
    torch.manual_seed(0)
    model = build_model(name, 3, width=1 / 16).train()
    model(images(8))  # batch norm has something to normalize by
    return TrainedNetwork(model.eval(), NAMES, (32, 32), (0.5,) * 3, (0.25,) * 3, name)


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def networks():
    return {name: network_of(name) for name in ("vgg-gap", "vgg-att2-concat-gate")}


@pytest.mark.parametrize(
    "name, asked, expected",
    [
        ("vgg-gap", [], ["cam", "gradcam"]),
        ("vgg-att2-concat-gate", [], ["attention", "gradcam"]),
        ("vgg-gap", ["all"], ["cam", "gradcam", "gradcam++", "hirescam", "layercam"]),
        ("vgg-att2-concat-gate", ["layercam", "attention"], ["attention", "layercam"]),
    ],
)
def test_what_is_drawn(networks, capsys, name, asked, expected):
    assert applicable(networks[name], asked).names == expected
    out = capsys.readouterr().out
    skipped = {line.split(" ")[0] for line in out.splitlines() if "skipped" in line}
    lacking = {"attention"} if name == "vgg-gap" else {"cam"}
    assert skipped == (lacking if asked in ([], ["all"]) else set())
    assert ("misleads" in out) == (expected[-1] == "gradcam" and "attention" in expected)
    assert f"{expected[-1]} at trunk.block5\n" in out


def test_what_was_asked_for_and_does_not_apply_is_an_error(networks):
    for name, asked, layers, message in (
        ("vgg-gap", ["attention"], (), "--method attention: this network has no attention"),
        ("vgg-gap", ["cam", "attention"], (), "--method attention"),
        ("vgg-att2-concat-gate", ["cam"], (), "--method cam: .* use gradcam"),
        ("vgg-gap", [], ["trunk.block5", "trunk.block7"], "--layer .*no layer 'trunk.block7'"),
    ):
        with pytest.raises(UserError, match=message):
            applicable(networks[name], asked, layers)
    query = images(1)
    with pytest.raises(UserError, match="--query is for attention maps"):
        applicable(networks["vgg-att2-concat-gate"], ["gradcam"], query=query)
    with pytest.raises(UserError, match="--query: a query changes nothing"):
        applicable(network_of("vgg-att1-pc"), [], query=query)


def test_several_methods_layers_and_classes_have_names_of_their_own(networks):
    network, x = networks["vgg-gap"], images()
    layers = ["trunk.block4", "blocks"]
    methods = applicable(network, ["hirescam", "layercam"], layers)
    blocks = ["trunk.block4", *(f"trunk.block{number}" for number in (1, 2, 3, 5))]
    assert methods.layers == blocks
    classes = torch.tensor([[0, 2], [1, 0]])
    found = maps_of(network, methods, x, classes)
    assert list(found) == [
        f"{method}-{layer}{rank}"
        for method in ("hirescam", "layercam")
        for layer in blocks
        for rank in ("", "-2")
    ]
    for rank, ending in enumerate(("", "-2")):
        expected = gradient_maps(network.model, x, classes[:, rank], layers=blocks)
        for layer in blocks:
            for method in ("hirescam", "layercam"):
                each = found[f"{method}-{layer}{ending}"]
                assert each.rank == rank and each.label == f"{method}\n{layer}"
                np.testing.assert_allclose(each.values, expected[layer][method].numpy(), atol=1e-6)


def test_one_layer_is_not_in_the_name_and_attention_has_no_class(networks):
    network, x = networks["vgg-att2-concat-gate"], images()
    methods = applicable(network, ["attention", "layercam"], query=x[:1])
    found = maps_of(network, methods, x, torch.tensor([[0], [1]]))
    names = ["conv10", "conv10-query", "conv13", "conv13-query", "layercam"]
    assert [(name, each.rank) for name, each in found.items()] == [
        *((name, None) for name in names[:4]),
        ("layercam", 0),
    ]
    own, other = attention_maps(network.model, x), attention_maps(network.model, x, x[:1])
    for level in own:
        np.testing.assert_allclose(found[level].values, own[level].numpy(), atol=1e-6)
        np.testing.assert_allclose(found[f"{level}-query"].values, other[level].numpy(), atol=1e-6)
    np.testing.assert_allclose(found["layercam"].values, layer_cam(network.model, x, [0, 1]))


def test_smooth_maps_are_the_smoothed_ones_divided_by_their_maximum(networks):
    network, x = networks["vgg-gap"], images()
    methods = applicable(network, ["hirescam"], smooth=True)
    found = maps_of(network, methods, x, torch.tensor([[0], [1]]))["hirescam"].values

    def raw(batch):
        maps = raw_gradient_maps(network.model, batch, [[0, 1]], ["hirescam"], [None])
        return {"a": maps["trunk.block5"]["hirescam"][0]}

    expected = smoothed(raw, x)["a"]
    expected = (expected / expected.amax((1, 2), keepdim=True)).nan_to_num()  # 0/0 is 0
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert np.abs(found - hires_cam(network.model, x, [0, 1]).numpy()).max() > 0.05


def test_the_layers_are_listed_with_their_sizes_and_marks(networks, capsys):
    assert list_layers(networks["vgg-gap"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trunk.block5                        32 x 8 x 8   (default, blocks)" in lines
    assert sum("blocks)" in line for line in lines) == 5
    assert set(METHODS) == {"attention", "cam", "gradcam", "gradcam++", "hirescam", "layercam"}
