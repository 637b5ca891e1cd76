"""The images of cam.py: what a network sees of files, and of the data sets that it was or was not
trained on."""

import numpy as np
import pytest
from PIL import Image

import cam
from data import SOURCES, load_folder
from tests.helpers.makers import make_folders, untrained
from train_cifar100 import FAST
from train_folder import SMALL

CLASSES = ["cat", "dog"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("photo.png") -> (exit status, standard output, standard error, what the network was
    given), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    given, batch = [], cam.TrainedNetwork.batch
    monkeypatch.setattr(
        cam.TrainedNetwork,
        "batch",
        lambda self, images: (given.append(np.stack(list(images))), batch(self, images))[1],
    )

    def call(*words):
        given.clear()
        status = cam.main([*map(str, words), "--num-workers", "0", "--method", "gradcam"])
        return status, *capsys.readouterr(), given

    return call


@pytest.fixture
def trained(tmp_path):
    """trained(config, dataset) -> a checkpoint."""

    def make(config, dataset):
        return untrained(tmp_path / f"{dataset}.pt", "vgg-gap", config, dataset, CLASSES)

    return make


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(pixels, side=32):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


@pytest.fixture
def photos(tmp_path):
    """Ten wide pictures of each class, which have to be split."""
    for seed, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise(40, 60, 10 * seed + i)).save(
                tmp_path / "photos" / name / f"{i}.png"
            )
    return tmp_path / "photos"


@pytest.mark.parametrize("height, width, y, x", [(40, 91, 0, 25), (90, 40, 25, 0)])
def test_the_square_that_the_network_sees_is_the_picture_that_is_drawn(
    cli, trained, height, width, y, x
):
    pixels = noise(height, width)
    square = pixels[y : y + 40, x : x + 40]
    Image.fromarray(pixels).save("photo.png")
    words = ["photo.png", "--opacity", 0, "--out", "."]  # the picture without its map
    status, _, err, given = cli("--checkpoint", trained(FAST | SMALL, "folder"), *words)
    assert status == 0, err
    np.testing.assert_array_equal(given[0], resized(square)[None])
    shown = np.asarray(Image.open("photo-gradcam.png").convert("RGB"))
    np.testing.assert_array_equal(shown, square.repeat(6, 0).repeat(6, 1))
    # the same picture for a network that was trained on whole ones
    status, _, err, given = cli("--checkpoint", trained(FAST, "cifar100"), *words)
    np.testing.assert_array_equal(given[0], resized(pixels)[None])
    scale = np.asarray(Image.open("photo-gradcam.png")).shape[0] // height
    shown = np.asarray(Image.open("photo-gradcam.png").convert("RGB"))
    np.testing.assert_array_equal(shown, pixels.repeat(scale, 0).repeat(scale, 1))


def test_class_folders_are_split_and_cut_as_in_training(cli, trained, photos):
    config = {"data_dir": str(photos), "crop": "whole", "test_share": 0.5, "split_seed": 7}
    path = trained(SMALL | config, "folder")
    expected = load_folder(photos, image_size=32, crop="whole", test_share=0.5, split_seed=7)
    status, out, err, given = cli("--checkpoint", path, "--dataset", "folder")
    assert status == 0 and "10 of 10 test images" in out, err
    assert np.array_equal(given[0], expected[1].images)
    status, out, _, given = cli(
        "--checkpoint", path, "--dataset", "folder", "--split", "train", "--index", "9,0"
    )
    assert status == 0 and np.array_equal(given[0], expected[0].images[[9, 0]])
    assert "folder-train 9: " in out
    photos.rename(photos.parent / "moved")
    status, _, err, _ = cli("--checkpoint", path, "--dataset", "folder")
    assert status == 1 and ": give --data-dir" in err
    status, _, err, given = cli("--checkpoint", path, "--dataset", "folder", "--data-dir", "moved")
    assert status == 0 and np.array_equal(given[0], expected[1].images), err


def test_another_network_sees_the_centered_squares_of_class_folders(cli, trained, photos):
    path = trained(FAST, "cifar100")
    status, _, err, given = cli("--checkpoint", path, "--dataset", "folder")
    assert status == 2 and "error: --dataset folder needs --data-dir" in err and not given
    status, out, err, given = cli("--checkpoint", path, "--dataset", "folder", "--data-dir", photos)
    assert status == 0 and "4 of 4 test images" in out, err
    squares = [
        resized(noise(40, 60, seed)[:, 10:50], round(32 * 8 / 7)).tobytes() for seed in range(20)
    ]
    assert {picture.tobytes() for picture in given[0]} < set(squares)


def test_cifar_10_with_any_network(cli, trained, tmp_path):
    pixels = make_folders(tmp_path / "data", CLASSES, 2, (32, 32), name="cifar10")
    expected = [each for path, each in sorted(pixels.items()) if path.parts[-3] == "test"]
    for path in (trained(FAST, "cifar10"), trained(FAST, "cub")):
        status, out, err, given = cli(
            "--checkpoint", path, "--dataset", "cifar10", "--index", "0-3"
        )
        assert status == 0 and "4 of 4 test images" in out, err
        np.testing.assert_array_equal(given[0], expected)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "cub"])
def test_only_birds_have_boxes_to_crop_by(cli, trained, name):
    path = trained(SMALL, name)
    status, _, err, _ = cli("--checkpoint", path, "--dataset", name, "--crop", "box")
    assert status == 2 and f"--crop is for birds (--dataset cub), not for {name}" in err
