"""A trained network in the user's own code: against few-line references, with images of every form,
from several threads, under what a caller may have set, and in wrong use."""

import copy
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cam import load_network
from common.errors import UserError
from explain.networks import TrainedNetwork
from tests.helpers.makers import torchvisions, untrained
from train_cifar100 import FAST

CLASSES = ("apple", "pear", "sweet_pepper", "7")
SIZE = 32
LEVELS = ["conv7", "conv10", "conv13"]


def noise(height, width, seed=0):
    """Blocks of 8 pixels: what is left of finer noise after resizing is gray."""
    blocks = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width].copy()


PHOTO = noise(60, 90)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "attention": untrained(
            folder / "attention.pt", "vgg-att3-concat-pc", FAST, "cifar100", CLASSES
        ),
        "gap": untrained(folder / "gap.pt", "vgg-gap", FAST, "cifar100", CLASSES),
        "center": untrained(
            folder / "center.pt", "vgg-att3-concat-dp", FAST | {"crop": "center"}, "folder", CLASSES
        ),
    }


@pytest.fixture(scope="module")
def networks(checkpoints):
    return {name: load_network(path, device="cpu") for name, path in checkpoints.items()}


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("photo.png")
    return "photo.png"


def reference_input(pixels):
    """(1, 3, 32, 32): resized by PIL, then (x / 255 - 0.5) / 0.25."""
    small = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    x = torch.tensor(np.array(small), dtype=torch.float64)
    return ((x / 255 - 0.5) / 0.25).permute(2, 0, 1)[None].float()


def reference_map(raw, height, width):
    """(1, h, w) -> (height, width): positive values, upsampled, divided by the largest."""
    large = F.interpolate(
        raw.relu()[None], (height, width), mode="bilinear", align_corners=False
    ).squeeze()
    return (large / large.max()).numpy()


@torch.no_grad()
def reference_probabilities(network, pixels):
    return network.model(reference_input(pixels)).softmax(1)[0]


# ---- numbers ------------------------------------------------------------------------------------


def test_predict_is_the_softmax_of_the_model_best_first(networks, photo):
    network = networks["attention"]
    p = reference_probabilities(network, PHOTO)
    assert p.max() - p.min() > 0.01
    expected = sorted(zip(CLASSES, p.tolist(), strict=True), key=lambda pair: -pair[1])
    for k in (1, 3, 4, 100):
        found = network.predict(photo, k=k)
        assert [name for name, _ in found] == [name for name, _ in expected[:k]]
        assert [value for _, value in found] == pytest.approx(
            [v for _, v in expected[:k]], abs=1e-5
        )
    assert network.predict(photo) == found and type(found[0][1]) is float


def test_attention_is_the_networks_own_at_the_size_of_the_picture(networks, photo):
    network = networks["attention"]
    with torch.no_grad():
        _, raw = network.model(reference_input(PHOTO), return_attention=True)
    maps = network.attention(photo)
    assert list(maps) == LEVELS
    for level in LEVELS:
        assert maps[level].dtype == np.float32 and maps[level].std() > 0.01
        np.testing.assert_allclose(maps[level], reference_map(raw[level], 60, 90), atol=1e-5)


@pytest.mark.parametrize("height, width, box", [(60, 90, (0, 15)), (91, 40, (25, 0))])
def test_a_network_of_centered_squares_sees_no_more_than_the_square(networks, height, width, box):
    network, pixels, (y, x) = networks["center"], noise(height, width, 3), box
    side = min(height, width)
    square = pixels[y : y + side, x : x + side]
    torch.testing.assert_close(network.preprocess(pixels), reference_input(square))
    torch.testing.assert_close(
        torch.tensor(sorted(value for _, value in network.predict(pixels))),
        reference_probabilities(network, square).sort().values,
    )
    with torch.no_grad():
        _, raw = network.model(reference_input(square), return_attention=True)
    for level, found in network.attention(pixels).items():
        expected = np.zeros((height, width), np.float32)
        expected[y : y + side, x : x + side] = reference_map(raw[level], side, side)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    found = network.cam(pixels)
    assert found.shape == (height, width) and found.max() == 1
    np.testing.assert_array_equal(found[y : y + side, x : x + side], network.cam(square))
    found[y : y + side, x : x + side] = 0
    assert not found.any()
    # another network sees all of it
    torch.testing.assert_close(networks["gap"].preprocess(pixels), reference_input(pixels))


def test_cam_by_its_definition_for_a_class_by_name_by_number_and_as_seen(networks, photo):
    network = copy.deepcopy(networks["gap"])
    network.model.classifier.weight.data += 0.1  # evidence for every class
    with torch.no_grad():
        features = reference_input(PHOTO)
        for block in range(1, 6):
            features = network.model.trunk.run_block(block, features)
    best = int(reference_probabilities(network, PHOTO).argmax())
    for target, index in (("Sweet pepper", 2), (0, 0), (np.int64(1), 1), ("7", 3), (None, best)):
        weights = network.model.classifier.weight[index].detach()
        expected = reference_map(torch.einsum("nchw,c->nhw", features, weights), 60, 90)
        for method in ("cam", "gradcam"):  # the same for a network that ends in pooling
            found = network.cam(photo, target=target, method=method)
            assert found.dtype == np.float32 and found.std() > 0.005
            np.testing.assert_allclose(found, expected, atol=1e-4)
    early, late = (network.cam(photo, layer=f"trunk.block{number}") for number in (3, 5))
    assert np.abs(early - late).max() > 0.1
    np.testing.assert_array_equal(early, network.cam(photo, layer=network.model.trunk.block3))


def test_preprocess_gives_what_the_model_takes(networks, photo):
    network, other = networks["attention"], noise(40, 33, 1)
    batch = network.preprocess([photo, other])
    assert batch.dtype == torch.float32 and batch.device == network.device
    expected = torch.cat([reference_input(PHOTO), reference_input(other)])
    torch.testing.assert_close(batch, expected)
    assert network.model(batch).requires_grad  # a plain module


# ---- the forms of an image ----------------------------------------------------------------------


def forms(pixels):
    """The same picture in every form: uint8, then floats."""
    tensor = torch.from_numpy(pixels)
    last, first = tensor, tensor.permute(2, 0, 1)
    exact = {
        "PIL": Image.fromarray(pixels),
        "transparent": Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, "u1")])),
        "array": pixels,
        "read only": np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape),
        "mirrored twice": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "channels first": pixels.transpose(2, 0, 1),
        "tensor": first,
        "tensor, channels last": last,
    }
    floats = {
        "float64": pixels / 255,
        "other byte order": (pixels / 255).astype(">f4"),
        "float tensor": (first / 255).requires_grad_(),
        "slightly beyond": first.double() / 255 * 1.0002 - 0.0001,
    }
    return exact, floats


def test_every_form_of_a_picture_gives_the_same(networks, photo, tmp_path):
    network = networks["attention"]
    best, maps, heat = network.predict(photo), network.attention(photo), network.cam(photo)
    exact, floats = forms(PHOTO)
    exact |= {"Path": tmp_path / photo, "absolute": str(tmp_path / photo)}
    for name, image in (exact | floats).items():
        # PIL rounds a resized uint8 picture to whole levels
        tolerance = 0 if name in exact else 5e-3
        found = network.predict(image)
        assert [n for n, _ in found] == [n for n, _ in best], name
        assert [p for _, p in found] == pytest.approx([p for _, p in best], abs=tolerance), name
        for level, each in network.attention(image).items():
            np.testing.assert_allclose(each, maps[level], atol=4 * tolerance, err_msg=name)
        np.testing.assert_allclose(network.cam(image), heat, atol=20 * tolerance, err_msg=name)


def test_floats_are_resized_as_floats(networks):
    fine = torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(fine[None], (SIZE, SIZE), mode="bilinear", antialias=True)
    batch = networks["gap"].preprocess([fine, fine.permute(1, 2, 0).numpy(), fine.double()])
    torch.testing.assert_close(batch, ((small - 0.5) / 0.25).expand(3, -1, -1, -1))
    # and at the network's own size no value is changed
    torch.testing.assert_close(networks["gap"].preprocess(small), (small - 0.5) / 0.25)
    half = networks["gap"].preprocess([small[0].half(), small[0].bfloat16()])
    torch.testing.assert_close(half, batch[:2], atol=0.02, rtol=0)


def test_gray_and_transparent_pictures_and_those_that_are_as_small_as_their_channels(networks):
    gray, network = PHOTO[..., 0], networks["gap"]
    expected = reference_input(np.dstack([gray] * 3))
    for image in (gray, torch.from_numpy(gray), Image.fromarray(gray)):
        torch.testing.assert_close(network.preprocess(image), expected)
    clear = Image.fromarray(np.dstack([PHOTO, np.zeros((60, 90), np.uint8)]))
    torch.testing.assert_close(network.preprocess(clear), torch.full((1, 3, SIZE, SIZE), 2.0))
    tiny = noise(24, 24)[::8, ::8].copy()  # (3, 3, 3): last of an array, first of a tensor
    torch.testing.assert_close(network.preprocess(tiny), reference_input(tiny))
    channels_first = torch.from_numpy(tiny).permute(2, 0, 1)
    torch.testing.assert_close(network.preprocess(channels_first), reference_input(tiny))


def test_many_images_are_their_single_results_in_order(networks, photo, monkeypatch):
    network = networks["attention"]
    many = [photo, noise(20, 70, 1), Image.fromarray(noise(99, 30, 2)), noise(32, 32, 3) / 255]
    many.append(torch.from_numpy(noise(48, 48, 4)).permute(2, 0, 1))
    single = {
        name: [getattr(network, name)(image) for image in many]
        for name in ("predict", "attention", "cam")
    }
    sizes, batch = [], TrainedNetwork.batch
    monkeypatch.setattr(
        TrainedNetwork, "batch", lambda self, x: (sizes.append(len(x)), batch(self, x))[1]
    )
    monkeypatch.setattr(TrainedNetwork, "batch_size", 2)
    for images in (many, tuple(many), iter(many)):
        assert_same(network.predict(images), single["predict"])
        assert sizes == [2, 2, 1]
        sizes.clear()
    assert_same(network.attention(many), single["attention"])
    assert_same(network.cam(many), single["cam"])
    assert sizes == [2, 2, 1] * 2
    stack = np.stack([PHOTO, PHOTO[::-1]])
    for several in (stack, torch.from_numpy(stack).permute(0, 3, 1, 2) / 255, [PHOTO, PHOTO[::-1]]):
        results = network.attention(several)
        assert len(results) == 2 and results[1]["conv7"].shape == (60, 90)
        assert isinstance(network.attention(several[:1]), list)
    assert_same(network.predict(stack), [network.predict(each) for each in stack])


def assert_same(found, expected):
    """Nested lists and dicts of numbers and arrays, up to rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_files_are_read_one_at_a_time(networks, monkeypatch):
    """So that the memory for many photos is that of one."""
    photos, peak = [], []

    def read(image, name):
        pixels = PHOTO.copy()
        photos.append(weakref.ref(pixels))
        peak.append(sum(photo() is not None for photo in photos))
        return pixels

    monkeypatch.setattr("explain.images.pixels_of", read)
    assert len(networks["gap"].predict(["a"] * 40, k=1)) == 40
    assert len(peak) == 40 and max(peak) <= 2


# ---- threads and callers ------------------------------------------------------------------------


def everything(network, images):
    return [
        [network.predict(image), network.attention(image), network.cam(image)] for image in images
    ]


def test_four_threads_at_once_equal_one(networks):
    """The maps put hooks on the network and switch requires_grad: no other thread may see that."""
    network, images = networks["attention"], [noise(20 + i, 30, i) for i in range(4)]
    alone = everything(network, images)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: everything(network, images), range(12)))
    for each in together:
        assert_same(each, alone)
    assert all(p.requires_grad for p in network.model.parameters())
    assert not any(module._forward_hooks for module in network.model.modules())


@pytest.mark.parametrize("setting", ["inference_mode", "no_grad", "float64", "float16", "meta"])
def test_what_the_caller_has_set_changes_nothing(checkpoints, networks, setting):
    """Loading and using a network in another mode, or with another default type or device."""
    expected = everything(networks["attention"], [PHOTO])
    before = torch.get_default_dtype()
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        elif setting.startswith("float"):
            torch.set_default_dtype(getattr(torch, setting))
        with (
            getattr(torch, setting)() if setting.endswith(("mode", "grad")) else torch.enable_grad()
        ):
            network = load_network(checkpoints["attention"], device="cpu")
            assert_same(everything(network, [PHOTO]), expected)
            batch = network.preprocess(PHOTO)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert batch.dtype == torch.float32
    assert_same(everything(network, [PHOTO]), expected)
    assert next(network.model.parameters()).dtype == torch.float32
    network.model(networks["attention"].preprocess(PHOTO)).sum().backward()  # can be trained


def test_a_network_that_the_caller_trains_or_converts_is_used_as_it_is(checkpoints, networks):
    expected = everything(networks["attention"], [PHOTO])
    network = load_network(checkpoints["attention"], device="cpu")
    network.model.train()
    statistics = copy.deepcopy(network.model.state_dict())
    assert_same(everything(network, [PHOTO]), expected)
    assert network.model.training
    assert all(torch.equal(v, statistics[k]) for k, v in network.model.state_dict().items())
    assert_same(everything(pickle.loads(pickle.dumps(network)), [PHOTO]), expected)
    assert_same(everything(copy.deepcopy(network), [PHOTO]), expected)
    network.model.double()
    assert_same(everything(network, [PHOTO]), expected)


def test_bf16_is_near_and_its_maps_are_float32(checkpoints, networks):
    for name in ("attention", "gap"):
        network = load_network(checkpoints[name], device="cpu", precision="bf16")
        exact, near = dict(networks[name].predict(PHOTO)), dict(network.predict(PHOTO))
        assert near != exact and near == pytest.approx(exact, abs=0.02)
        best = max(exact, key=exact.get)
        maps = [network.cam(PHOTO, best), networks[name].cam(PHOTO, best)]
        if name == "attention":
            maps = [*network.attention(PHOTO).values(), *networks[name].attention(PHOTO).values()]
        for a, b in zip(maps[: len(maps) // 2], maps[len(maps) // 2 :], strict=True):
            assert a.dtype == np.float32 and np.abs(a - b).mean() < 0.03
        # more than the 256 values of bf16: only the forward pass was in it
        assert len(np.unique(maps[0])) > 1000
        assert next(network.model.parameters()).dtype == torch.float32
    np.testing.assert_allclose(
        network.cam(PHOTO, best, method="cam"), networks["gap"].cam(PHOTO, best), atol=0.05
    )


def test_from_another_folder(checkpoints, networks, photo, tmp_path):
    code = (
        "import sys; from cam import load_network\n"
        "network = load_network(sys.argv[1], device='cpu')\n"
        "print(network, network.predict('photo.png', k=1), network.attention('photo.png').keys())"
    )
    command = [sys.executable, "-c", code, str(checkpoints["attention"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    network = networks["attention"]
    name, probability = network.predict(photo, k=1)[0]
    assert done.stdout.startswith(f"<TrainedNetwork {checkpoints['attention']}: vgg-att3-concat-pc")
    assert f" [('{name}', {str(probability)[:6]}" in done.stdout and str(LEVELS) in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["photo.png"]


def test_a_network_of_torchvisions_with_weights_from_a_file(tmp_path):
    model = torchvisions("squeezenet1_1", torch.float32, classes=3)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    network = load_network(arch="squeezenet1_1", weights=tmp_path / "mine.pth", device="cpu")
    x = np.asarray(Image.fromarray(PHOTO).resize((224, 224), Image.Resampling.BILINEAR))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    batch = torch.tensor((x / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = {f"class {i}": p for i, p in enumerate(model(batch).softmax(1)[0].tolist())}
    assert dict(network.predict(PHOTO)) == pytest.approx(expected, abs=1e-5)
    assert network.cam(PHOTO, target="class 2").shape == (60, 90)
    with pytest.raises(ValueError, match="no attention levels: use gradcam"):
        network.attention(PHOTO)


# ---- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "there are no images: the list is empty"),
        (iter(()), "the list is empty"),
        (np.zeros((0, 3, 8, 8)), "the list is empty"),
        (None, "got NoneType"),
        (3, "got int"),
        (b"photo.png", "got bytes"),
        ({"photo.png": 1}, "got dict"),
        ([PHOTO, [PHOTO]], "image 1 is of type list: expected one image"),
        ([PHOTO[None]], r"image 0 is an array of shape \(1, 60, 90, 3\): expected one image"),
        (PHOTO[None, None], r"the image is an array of shape \(1, 1, 60, 90, 3\): expected"),
        (torch.zeros(4, 8, 8), r"the image is a tensor of shape \(4, 8, 8\): expected \(H, W\)"),
        ([PHOTO, PHOTO[:, :, :2]], r"image 1 is an array of shape \(60, 90, 2\)"),
        (PHOTO[:0], r"of shape \(0, 90, 3\)"),
        (np.float32(1) * np.ones(3), r"of shape \(3,\)"),
        (PHOTO.astype(np.float32), "values from 0 to 25[0-9]: floats must be from 0 to 1"),
        ((torch.zeros(2, 3, 8, 8) - 0.5) / 0.2, "image 0 has values from -2.5 to -2.5"),
        (np.full((8, 8, 3), np.nan), "values from nan to nan"),
        (np.array([[0.5, np.inf]]), "to inf"),
        (PHOTO.astype(int), "type int64: expected uint8, or floats"),
        (PHOTO > 9, "type bool"),
        (torch.zeros(8, 8, dtype=torch.complex64), "type complex64"),
        (Image.new("I", (8, 8)), "pixels of type I, more than 8 bits"),
    ],
)
def test_what_is_no_image_is_a_value_error_that_says_why(networks, images, message):
    with pytest.raises(ValueError, match=message):
        networks["gap"].predict(images)


def test_a_file_that_cannot_be_read_is_named(networks, photo, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    whole = (tmp_path / photo).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, reason in (("text.jpg", "not an image"), ("gone.png", "No such file or directory")):
        with pytest.raises(UserError, match=rf"{name} cannot be read as an image \({reason}\)"):
            networks["gap"].cam([photo, name])
    with pytest.raises(UserError, match="cut.png cannot be read"):
        networks["gap"].preprocess(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"image 1 cannot be read \(image file is truncated"):
        networks["gap"].preprocess([PHOTO, Image.open("cut.png")])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda net: net.predict(PHOTO, k=0), "k is 0"),
        (lambda net: net.cam(PHOTO, target="pare"), "no such class; nearest: pear"),
        (lambda net: net.cam(PHOTO, target=4), "target 4: the classes are numbered 0 to 3"),
        (lambda net: net.cam(PHOTO, target=-1), "numbered 0 to 3"),
        (lambda net: net.cam(PHOTO, target=True), "no such class"),
        (lambda net: net.cam(PHOTO, method="attention"), "expected one of cam, gradcam"),
        (lambda net: net.cam(PHOTO, method="cam", layer="trunk"), "is for the gradient methods"),
        (lambda net: net.cam(PHOTO, layer="trunk.block6"), "no layer 'trunk.block6'; it has trunk"),
        (lambda net: net.attention(PHOTO), "no attention levels"),
    ],
)
def test_wrong_questions_say_what_is_right(networks, call, message):
    with pytest.raises(ValueError, match=message):
        call(networks["gap"])


@pytest.mark.parametrize(
    "words, error, message",
    [
        ({}, ValueError, "name one network"),
        ({"checkpoint": "a.pt", "arch": "resnet18"}, ValueError, "name one network"),
        ({"arch": "resnet18"}, ValueError, "name one network"),
        ({"checkpoint": "a.pt", "weights": "DEFAULT"}, ValueError, "name one network"),
        ({"checkpoint": "gone.pt"}, UserError, "gone.pt: there is no such file"),
        ({"checkpoint": "."}, UserError, "is a folder; name the checkpoint in it"),
        ({"checkpoint": "photo.png"}, UserError, "photo.png is no checkpoint"),
        ({"checkpoint": "a.pt", "device": "gpu"}, UserError, "expected auto, cpu, cuda"),
        ({"checkpoint": "a.pt", "precision": "half"}, UserError, "expected auto, bf16"),
        ({"checkpoint": "a.pt", "precision": "fp16", "device": "cpu"}, UserError, "needs a GPU"),
        ({"arch": "resnet19", "weights": "DEFAULT"}, UserError, "nearest: resnet1"),
        ({"arch": "resnet18", "weights": "V9"}, UserError, "which are IMAGENET1K_V1, DEFAULT"),
        ({"arch": "resnet18", "weights": "photo.png"}, UserError, "photo.png"),
    ],
)
def test_networks_that_cannot_be_loaded(photo, words, error, message):
    with pytest.raises(error, match=message):
        load_network(**words)
