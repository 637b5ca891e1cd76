"""Weights of other programs for torchvision's networks, and names for their classes: what is taken
of a file, and what is said of one that does not fit."""

import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.checkpoint import read_checkpoint
from common.errors import UserError
from explain.class_names import read_class_names
from explain.networks import load_network
from explain.weights import blank, fitted
from tests.helpers.makers import torchvisions, untrained
from train_cifar100 import FAST

ARCH, CLASSES = "squeezenet1_1", 3  # small, and its head is a convolution
SIDE = 64


@pytest.fixture(scope="module")
def model():
    return torchvisions(ARCH, torch.float32, CLASSES)


@pytest.fixture(scope="module")
def batch():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def other_numbers(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


def loaded(folder, content, arch=ARCH, **options):
    torch.save(content, folder / "mine.pth")
    return load_network(arch=arch, weights=folder / "mine.pth", device="cpu", **options)


def refused(folder, content, arch=ARCH):
    """What is said of a file, which is one line."""
    with pytest.raises(UserError) as caught:
        loaded(folder, content, arch)
    message = str(caught.value)
    assert "\n" not in message and "weights_only" not in message
    return message.removeprefix(f"{folder / 'mine.pth'} ")


def assert_same(network, expected, batch):
    with torch.no_grad():
        torch.testing.assert_close(network(batch), expected(batch), atol=1e-5, rtol=1e-4)


def said(network):
    """What the description says of the file, after the size."""
    return network.description.partition(" px")[2].removeprefix("; ")


# ---- where the weights are in the file ----------------------------------------------------------


@pytest.mark.parametrize(
    "wrap, words",
    [
        (lambda state: state, ""),
        (lambda state: dict(sorted(state.items())), ""),
        (lambda state: {"net": state, "epoch": 3}, "from 'net'"),
        (lambda state: {"model_state_dict": state, "loss": 0.5}, "from 'model_state_dict'"),
        (lambda state: {"model": state, "ema": None}, "from 'model'"),
        (lambda state: {"checkpoint": {"model": state}}, "from 'checkpoint.model'"),
        (lambda state: {"trunk": state, "loss": {"weight": torch.ones(3)}}, "from 'trunk'"),
        (
            lambda state: {
                "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(3)},
                "pytorch-lightning_version": "2.5",
            },
            "from 'state_dict', without the prefix model., 1 entry left out",
        ),
        (
            lambda state: prefixed(state, "_orig_mod.module."),
            "without the prefix _orig_mod.module.",
        ),
        (
            lambda state: prefixed(state, "module._orig_mod."),
            "without the prefix module._orig_mod.",
        ),
        (lambda state: prefixed(state, "backbone.net."), "without the prefix backbone.net."),
    ],
)
def test_a_state_dict_is_found_in_the_file_and_under_a_prefix(tmp_path, model, batch, wrap, words):
    network = loaded(tmp_path, wrap(model.state_dict()))
    assert_same(network.model, model, batch)
    assert said(network) == words
    assert network.class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    "wrap, words",
    [
        (lambda raw, ema: {"model": raw, "ema": ema}, "from 'ema'"),
        (lambda raw, ema: {"state_dict_ema": ema, "state_dict": raw}, "from 'state_dict_ema'"),
        (
            lambda raw, ema: {
                "state_dict": prefixed(raw, "net.") | prefixed(ema, "net_ema.module.")
            },
            "from 'state_dict', without the prefix net_ema.module., 52 entries left out",
        ),
        (
            lambda raw, ema: (
                {"ema": {"conv": torch.ones(1)} | dict(list(raw.items())[:9])} | {"model": ema}
            ),
            "from 'model', as 'ema' is incomplete",
        ),
    ],
)
def test_a_moving_average_is_taken_rather_than_its_weights(tmp_path, model, batch, wrap, words):
    ema = model.state_dict()
    network = loaded(tmp_path, wrap(other_numbers(ema), ema))
    assert_same(network.model, model, batch)
    assert said(network) == words


def test_the_averaged_model_of_torch_is_read(tmp_path, model, batch):
    content = {"model": other_numbers(model.state_dict())}
    network = loaded(tmp_path, content | {"model_ema": AveragedModel(model).state_dict()})
    assert_same(network.model, model, batch)
    assert said(network) == "from 'model_ema', without the prefix module., 1 entry left out"


def test_two_networks_in_a_file_are_not_chosen_from(tmp_path, model):
    state = model.state_dict()
    message = refused(tmp_path, {"student": state, "teacher": state})
    assert message == "holds the network several times: 'student', 'teacher'. Save one of them"
    message = refused(tmp_path, prefixed(state, "a.") | prefixed(state, "b."))
    assert message == "holds the network several times: under a., under b.. Save one of them"


def test_weights_come_as_float32_and_without_random_numbers(tmp_path, model, batch):
    before = torch.get_rng_state()
    half = {name: value.half() for name, value in model.state_dict().items()}
    network = loaded(tmp_path, half)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in network.model.named_parameters():
        assert torch.equal(value, half[name].float()) and value.requires_grad
    assert not network.model.training


# ---- families of networks -----------------------------------------------------------------------

FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 "
    "shufflenet_v2_x0_5 squeezenet1_0 swin_v2_t vgg11_bn vit_b_32"
).split()


def on_meta(state):
    """The same names and shapes, without memory."""
    return {name: torch.empty_like(value, device="meta") for name, value in state.items()}


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_number_of_classes_is_that_of_the_networks_own_head(arch):
    """By what differs between networks of 1000 and of 7 classes, in files sorted by name."""
    own = blank(arch).state_dict()
    state = on_meta(blank(arch, num_classes=7).state_dict())
    head = [name for name in own if own[name].shape != state[name].shape]
    model, taken = fitted(arch, "a file", {"": dict(sorted(state.items()))})
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in state.items()}
    assert head and {shapes[name][0] for name in head} == {7}
    assert taken == ["with transform_input"] * (arch in ("googlenet", "inception_v3"))


@pytest.mark.parametrize("arch, entries, side", [("googlenet", 20, 64), ("inception_v3", 14, 96)])
def test_heads_for_training_alone_are_left_out(arch, entries, side):
    """And the input is normalized as torchvision's own weights need it."""
    torch.manual_seed(0)
    build = torchvision.models.get_model
    expected = build(arch, weights=None, num_classes=3, init_weights=False, transform_input=True)
    states = {"": expected.eval().state_dict()}
    model, taken = fitted(arch, "a file", states)
    assert taken == [f"{entries} entries left out", "with transform_input"]
    assert_same(model.eval(), expected, torch.randn(1, 3, side, side))


def test_the_size_of_a_vision_transformer_is_that_of_the_file():
    state = on_meta(blank("vit_b_32", image_size=96, num_classes=7).state_dict())
    model, _ = fitted("vit_b_32", "a file", {"": state})
    assert model.image_size == 96 and len(model.heads.head.weight) == 7


def test_old_files_lack_the_counters_and_the_versions_of_modules(tmp_path, batch):
    expected = torchvisions("mnasnet0_5", torch.float32, 4)
    state = {
        name: value
        for name, value in expected.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert_same(loaded(tmp_path, state, "mnasnet0_5").model, expected, batch)


# ---- heads that were replaced -------------------------------------------------------------------


def with_head(arch, place, head):
    """A network whose head was replaced after it was made."""
    model = torchvisions(arch, torch.float32)
    around, _, name = place.rpartition(".")
    setattr(model.get_submodule(around), name, head)
    return model.eval()


@pytest.mark.parametrize(
    "arch, place, head, layer",
    [
        ("shufflenet_v2_x0_5", "fc", [nn.Dropout(), nn.Linear(1024, 5)], "fc.1"),
        ("shufflenet_v2_x0_5", "fc", [nn.Linear(1024, 5, bias=False)], "fc.0"),
        ("mobilenet_v3_small", "classifier", nn.Linear(576, 5), "classifier"),
        ("mobilenet_v3_small", "classifier.3", [nn.Linear(1024, 5)], "classifier.3.0"),
        ("mnasnet0_5", "classifier", [nn.Linear(1280, 5), nn.Identity()], "classifier.0"),
    ],
)
def test_a_head_of_one_linear_layer_is_rebuilt(tmp_path, batch, arch, place, head, layer):
    head = nn.Sequential(*head) if isinstance(head, list) else head
    expected = with_head(arch, place, head)
    network = loaded(tmp_path, {"model": expected.state_dict()}, arch)
    assert_same(network.model, expected, batch)
    assert said(network) == f"from 'model', head: the linear layer {layer} alone"
    assert len(network.class_names) == 5


def test_a_head_after_a_map_of_one_position_is_rebuilt():
    head = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    model = blank("convnext_tiny")
    model.classifier = head.to("meta")
    found, taken = fitted("convnext_tiny", "a file", {"": on_meta(model.state_dict())})
    assert found.to("meta")(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)
    assert taken == ["head: the linear layer classifier.1 alone"]


@pytest.mark.parametrize(
    "head, names",
    [
        (
            [nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 5)],
            "missing: fc.weight, fc.bias; not in the network: fc.0.weight (64 x 1024), "
            "fc.0.bias (64), fc.2.weight (5 x 64) and 1 more",
        ),
        ([nn.Linear(512, 5, bias=False)], "not in the network: fc.0.weight (5 x 512)"),
        ([], "missing: fc.weight, fc.bias"),
        ([nn.BatchNorm1d(1024), nn.Linear(1024, 5)], "not in the network: fc.0.weight (1024)"),
    ],
)
def test_another_head_is_refused_with_what_differs(tmp_path, head, names):
    arch = "shufflenet_v2_x0_5"
    message = refused(tmp_path, with_head(arch, "fc", nn.Sequential(*head)).state_dict(), arch)
    assert (
        message.startswith(f"does not fit torchvision's {arch}: missing: fc") and names in message
    )


def test_a_head_whose_input_is_not_known_is_refused():
    """A pooling before it has no weights, so that the file does not show it."""
    model = blank("squeezenet1_1")
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.classifier = nn.Sequential(*pooling, nn.Linear(512, 5)).to("meta")
    with pytest.raises(ValueError, match=r"missing: classifier.1.weight.*classifier.2.weight \(5"):
        fitted("squeezenet1_1", "a file", {"": on_meta(model.state_dict())})


# ---- files that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["squeezenet1_0", "resnet18", "vit_b_16"])
def test_weights_of_another_network_are_named(tmp_path, model, arch):
    message = refused(tmp_path, {"net": prefixed(model.state_dict(), "module.")}, arch)
    expected = f"does not fit torchvision's {arch}: it fits {ARCH}. Give that as the arch"
    assert message == expected


def test_what_differs_is_named_in_one_line(tmp_path, model):
    state = model.state_dict()
    wrong = {
        "features.0.weight": torch.ones(64, 3, 5, 5),
        "features.0.bias": torch.ones(64, dtype=torch.int8),
        "features.3.attention.weight": torch.ones(2, 2),
    }
    assert refused(tmp_path, state | wrong) == (
        f"does not fit torchvision's {ARCH}: "
        "not in the network: features.3.attention.weight (2 x 2); "
        "of another shape: features.0.weight (64 x 3 x 5 x 5, not 64 x 3 x 3 x 3); "
        "not in floating point: features.0.bias"
    )


@pytest.mark.parametrize(
    "content", [{}, {"model": 1}, [1], torch.ones(3), {"w": torch.ones(1).expand(2**40)}]
)
def test_a_file_without_a_state_dict_says_so(tmp_path, content):
    assert refused(tmp_path, content) == "holds no state dict: save model.state_dict()"


def test_a_checkpoint_of_this_project_belongs_elsewhere(tmp_path):
    path = untrained(tmp_path / "last.pt", "vgg-gap", FAST, "cifar100", ["a", "b"])
    with pytest.raises(UserError, match="of this project: give it as the checkpoint"):
        load_network(arch=ARCH, weights=path)


# ---- other kinds of files -----------------------------------------------------------------------


def write_archive(path):
    torch.save({}, path.with_name("inside.pth"))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.with_name("inside.pth"))


def write_safetensors(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def write_program(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


SCRIPTED = torch.nn.Sequential(nn.Linear(2, 2))
WRITERS = {
    "traced": lambda path: torch.jit.save(torch.jit.trace(SCRIPTED, torch.ones(1, 2)), path),
    "scripted": lambda path: torch.jit.save(torch.jit.script(SCRIPTED), path),
    "program": write_program,
    "onnx": lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.14.1:\x02\n\x00"),
    "safetensors": write_safetensors,
    "npz": lambda path: np.savez(open(path, "wb"), w=np.ones(2)),
    "tar.gz": write_archive,
    "page": lambda path: path.write_text("\n<!DOCTYPE html><html>Not Found</html>"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid s"),
}
KINDS = {
    "traced": ("a TorchScript file, which holds code", "torch.jit.load(FILE).state_dict()"),
    "scripted": ("a TorchScript file, which holds code", "where you trust it"),
    "program": ("a program of torch.export (.pt2)", "torch.export.load(FILE).state_dict"),
    "onnx": ("an ONNX file", "save model.state_dict()"),
    "safetensors": ("a safetensors file", "torch.save(safetensors.torch.load_file(FILE), NEW)"),
    "npz": ("a NumPy file", "save model.state_dict()"),
    "tar.gz": ("a gzip archive", "unpack it"),
    "page": ("a web page", "fetch the file"),
    "pointer": ("a Git LFS pointer to a file", "git lfs pull"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", WRITERS)
def test_files_of_other_programs_are_called_by_their_name(tmp_path, kind):
    """Whatever their ending, and in each place where a file is given."""
    path = tmp_path / "net.pth"
    WRITERS[kind](path)
    name, remedy = KINDS[kind]
    with pytest.raises(UserError) as caught:
        load_network(arch=ARCH, weights=path)
    assert str(caught.value).startswith(f"{path} is {name}: ") and remedy in str(caught.value)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path} is {name}, not a checkpoint of this project: name the last.pt of a run"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_file_is_refused_by_the_training_scripts(cli, tmp_path):
    WRITERS["scripted"](tmp_path / "net.pt")
    for option in ("--init-from", "--evaluate", "--resume"):
        status, _, err = cli(option, tmp_path / "net.pt")
        assert status in (1, 2) and "weights_only" not in err and len(err.splitlines()) <= 2
        assert option == "--resume" or "net.pt is a TorchScript file, which holds code" in err


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_network_is_refused_with_what_to_save(tmp_path, legacy):
    path = tmp_path / "net.pth"
    torch.save({"model": SCRIPTED}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError) as caught:
        load_network(arch=ARCH, weights=path)
    assert str(caught.value) == (
        f"{path} is refused: it holds more than plain numbers and tensors, and reading it could "
        "run code. Where it was made, save the numbers alone: torch.save(model.state_dict(), NEW)"
    )


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.touch(), "could not be read: it is empty"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "it is no PyTorch file"),
        (lambda path: path.write_bytes(pickle.dumps({})), "it is no PyTorch file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "it is cut short or damaged"),
        (lambda path: path.mkdir(), "is a folder: name the file with the weights in it"),
    ],
)
def test_what_is_no_file_of_pytorch_says_so(tmp_path, write, message):
    write(tmp_path / "net.pth")
    with pytest.raises(UserError, match=message):
        load_network(arch=ARCH, weights=tmp_path / "net.pth")


# ---- class names --------------------------------------------------------------------------------

NAMES = ("cat", "Großer Hund", "птица")


@pytest.mark.parametrize(
    "text",
    [
        "cat\nGroßer Hund\nптица",
        "\ufeffcat\r\n Großer  Hund \r\nптица\r\n\r\n \n",
        '["cat", "Großer Hund", "птица"]',
        '{"1": "Großer Hund", "0": "cat", "2": "птица"}',
        ' {"Großer Hund": 1, "cat": 0, "птица": 2}\n',
        '{"0": ["n1", "cat"], "1": ["n2", "Großer Hund"], "2": ["n3", "птица"]}',
    ],
)
def test_class_names_are_read_from_lines_and_json(tmp_path, text):
    (tmp_path / "names").write_bytes(text.encode())
    assert read_class_names(tmp_path / "names", 3) == NAMES


def test_imagenets_names_that_repeat_get_their_id(tmp_path):
    pairs = [["n02012849", "crane"], ["n01440764", "tench"], ["n03126707", "crane"]]
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps({str(i): pair for i, pair in enumerate(pairs)}))
    assert read_class_names(path, 3) == ("crane (n02012849)", "tench", "crane (n03126707)")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nb\n", "has 2 class names, and the network 3 classes"),
        ("", "has 0 class names, and the network 3 classes"),
        ("a\n\nb", "line 2 is blank"),
        ("a\nb\n a", "line 3 is a, as line 1: each class needs a name of its own"),
        ('["a", "b", ""]', "class 2 is blank"),
        ('["a", "b", "a"]', "class 2 is a, as class 0"),
        ('["a", 7, "b"]', "class 1 is 7: expected a name"),
        ('["a", ["n1", "b", "c"]]', 'class 1 is ["n1", "b", "c"]: expected a name'),
        ('{"0": "a", "2": "b", "3": "c"}', "class 1 is missing: 3 classes are numbered 0 to 2"),
        ('{"a": 1, "b": 2, "c": 3}', "class 0 is missing"),
        ('{"0": "a", "0": "b"}', 'class 0 is there twice: "a", "b"'),
        ('{"a": 0, "b": 0}', 'class 0 is there twice: "a", "b"'),
        ('{"x": "a"}', '"x" is no class number'),
        ('{"-1": "a"}', '"-1" is no class number'),
        ('["a", "b"', "this is no JSON: "),
        ("[" * 200_000, "no list of class names"),
        ('["a", "b", "\\ud83d"]', "class 2 holds half of a character"),
    ],
)
def test_wrong_class_names_say_where(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_class_names(tmp_path / "names.txt", 3)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "names.txt"))


def test_files_that_hold_no_class_names(tmp_path):
    (tmp_path / "latin").write_bytes("Käfer".encode("latin-1"))
    (tmp_path / "utf16").write_bytes("cat\ndog".encode("utf-16"))
    for name, message in (
        ("latin", "is not UTF-8 text"),
        ("utf16", "is not UTF-8 text"),
        ("gone", "there is no such file"),
        ("", "this is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_class_names(tmp_path / name, 2)
    (tmp_path / "x.json").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="this is no JSON: Expecting value, line 1, column 1"):
        read_class_names(tmp_path / "x.json", 2)


def test_a_network_gets_the_names(tmp_path, model):
    (tmp_path / "names.txt").write_text("кот\nhund\nbird\n")
    photo = np.zeros((32, 32, 3), np.uint8)
    network = loaded(tmp_path, model.state_dict(), class_names=tmp_path / "names.txt")
    assert network.description.endswith(f"; class names of {tmp_path / 'names.txt'}")
    assert dict(network.predict(photo)).keys() == {"кот", "hund", "bird"}
    assert np.array_equal(network.cam(photo, target="hund"), network.cam(photo, target=1))
    path = untrained(tmp_path / "last.pt", "vgg-gap", FAST, "cifar100", ["a", "b", "c"])
    renamed = load_network(path, class_names=str(tmp_path / "names.txt"), device="cpu")
    plain = load_network(path, device="cpu")
    names = dict(zip("abc", renamed.class_names, strict=True))
    expected = [(names[name], probability) for name, probability in plain.predict(photo)]
    assert renamed.predict(photo) == expected
    (tmp_path / "names.txt").write_text("a\n")
    with pytest.raises(UserError, match="has 1 class name, and the network 3 classes"):
        load_network(path, class_names=tmp_path / "names.txt")
