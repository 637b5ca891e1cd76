"""folder.py: class folders of one's own images, their split, and everything that can be wrong with
them."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import SOURCES, center_box, load_folder
from datasets.folder_layout import folder_present

SIZE = 16


def picture(path, size=(40, 30), seed=None):
    """A picture of large blotches, of which no two seeds are near-duplicates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = abs(hash(str(path))) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    image.save(path)
    return image


def photos(root, count=6, classes=("cat", "dog")):
    for number, name in enumerate(classes):
        for i in range(count):
            picture(root / name / f"{i}.png", seed=100 * number + i)
    return root


@pytest.fixture
def root(tmp_path):
    return photos(tmp_path / "photos")


def load(root, **options):
    return load_folder(root, **{"image_size": SIZE, "progress": False} | options)


def error_of(root, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_stored(path, crop="center") -> np.ndarray:
    image = Image.open(path).convert("RGB")
    if crop == "center":
        image = image.crop(center_box(*image.size))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "whole"])
def test_every_image_is_in_one_set_with_its_pixels_and_its_class(root, crop):
    train, test = load(root, crop=crop)
    assert train.class_names == test.class_names == ("cat", "dog")
    assert sorted([*train.files, *test.files]) == sorted(
        f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)
    )
    assert torch.bincount(train.labels).tolist() == [5, 5] and len(test) == 2
    for images in (train, test):
        for file, pixels, label in zip(images.files, images.images, images.labels, strict=True):
            assert (pixels.numpy() == as_stored(root / file, crop)).all()
            assert file.split("/")[0] == images.class_names[label]


def test_the_center_is_the_middle_of_the_longer_side():
    assert center_box(40, 30) == (5, 0, 35, 30) and center_box(3, 8) == (0, 2, 3, 5)
    assert center_box(7, 7) == (0, 0, 7, 7)


@pytest.mark.parametrize("test_name", ["test", "val", "Valid", "validation"])
def test_folders_of_training_and_test_images_are_not_split(tmp_path, capsys, test_name):
    photos(tmp_path / "own" / "train", count=5)
    for name in ("cat", "dog"):
        picture(tmp_path / "own" / test_name / name / "9.jpg", seed=9 + len(name))
        shutil.copy(tmp_path / "own/train" / name / "0.png", tmp_path / "own" / test_name / name)
    train, test = load(tmp_path / "own")
    assert len(train) == 10 and set(test.files) == {
        f"{test_name}/{name}/{file}" for name in ("cat", "dog") for file in ("9.jpg", "0.png")
    }
    out = capsys.readouterr().out
    assert f"10 for training in train, 4 for the test in {test_name}" in out
    assert (
        "near-duplicates of training images in the test set (2), which inflate the accuracy" in out
    )
    assert f"{test_name}/cat/0.png = train/cat/0.png" in out


def test_of_test_and_val_the_test_images_are_used(tmp_path, capsys):
    for name in ("train", "val", "test"):
        photos(tmp_path / "own" / name, count=3)
    _, test = load(tmp_path / "own")
    assert {file.split("/")[0] for file in test.files} == {"test"}
    assert "  not used: val\n" in capsys.readouterr().out


@pytest.mark.parametrize("inner", ["train", "archive-main"])
def test_a_folder_in_between_is_passed(tmp_path, inner):
    photos(tmp_path / "own" / inner)
    train, _ = load(tmp_path / "own")
    assert train.class_names == ("cat", "dog") and train.files[0].startswith(f"{inner}/cat/")


def test_a_class_may_be_called_train(tmp_path):
    photos(tmp_path / "own", classes=("bus", "plane", "train"))
    picture(tmp_path / "own/train/steam/a.png", seed=1000)
    assert load(tmp_path / "own")[0].class_names == ("bus", "plane", "train")


def test_the_folder_may_be_the_one_where_the_script_starts(root, monkeypatch):
    expected = load(root)
    monkeypatch.chdir(root)
    (root / "runs/photos/a run").mkdir(parents=True)  # begins before the images are read
    for name in (".", "./", "../photos"):
        found = load(name)
        assert found[0].files == expected[0].files and found[1].files == expected[1].files


def test_folders_in_a_class_belong_to_it_and_hidden_names_do_not(root, capsys):
    picture(root / "cat/2021/may/a.png", seed=1000)
    picture(root / "cat/.thumbnails/b.png")
    (root / "cat/.DS_Store").write_text("x")
    (root / "__MACOSX").mkdir()
    os.symlink(root, root / "dog/loop")  # a link to a folder above
    os.mkfifo(root / "dog/pipe.png")  # opening it would wait for ever
    (root / "dog/notes.txt").write_text("x")
    picture(root / "loose.png")
    train, test = load(root)
    files = [*train.files, *test.files]
    assert len(files) == 13 and "cat/2021/may/a.png" in files
    out = capsys.readouterr().out
    assert "13 images in 2 classes (cat, dog), 6 to 7 per class; 40x30 pixels" in out
    assert "passed over 2 of 15 names" in out and "dog/notes.txt, dog/pipe.png" in out
    assert "passed over 1 image in no class folder: loose.png" in out


# ---- the split ----------------------------------------------------------------------------------


def test_the_split_is_the_same_at_every_start_and_another_by_seed(root, tmp_path):
    first = load(root)
    assert load(root)[1].files == first[1].files
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    assert load(tmp_path / "copy")[1].files == first[1].files
    assert {load(root, split_seed=seed)[1].files for seed in range(5)} != {first[1].files}


@pytest.mark.parametrize("share, expected", [(0.01, 1), (0.5, 3), (0.75, 5), (0.99, 5)])
def test_the_share_is_of_each_class(root, share, expected):
    assert torch.bincount(load(root, test_share=share)[1].labels).tolist() == [expected] * 2


def test_another_image_changes_the_sides_of_few(root):
    before = load(root)
    picture(root / "cat/new.png", seed=5000)
    after = load(root)
    moved = set(before[1].files) ^ set(after[1].files)
    assert len(moved) <= 2


@pytest.mark.parametrize("seed", range(8))
def test_near_duplicates_are_on_one_side(root, capsys, seed):
    copies = {}
    for i in range(3):
        path = root / f"cat/{i}.png"
        Image.open(path).resize((80, 60)).save(root / f"cat/copy{i}.jpg", quality=80)
        copies[f"cat/{i}.png"] = f"cat/copy{i}.jpg"
    shutil.copy(root / "cat/5.png", root / "dog/5.jpg")  # of two classes
    copies["cat/5.png"] = "dog/5.jpg"
    train, test = load(root, split_seed=seed, test_share=0.4)
    for original, copy in copies.items():
        assert (original in train.files) == (copy in train.files)
    out = capsys.readouterr().out
    assert "near-duplicates, each kept on one side: 8\n" in out
    assert "near-duplicates of different classes (1): dog/5.jpg = cat/5.png" in out


def test_pictures_before_the_same_background_can_be_split(tmp_path, capsys):
    background = picture(tmp_path / "background.png", size=(96, 96), seed=0)
    rng = np.random.default_rng(0)
    for i in range(20):
        image = background.copy()
        image.paste("red" if i % 2 else "blue", (x := int(rng.integers(0, 88)), 40, x + 8, 48))
        path = tmp_path / "own" / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    assert "--set near_duplicates=false" in error_of(tmp_path / "own")
    assert "20 of them are one group" in capsys.readouterr().out
    assert len(load(tmp_path / "own", near_duplicates=False)[1]) == 4
    assert "near-duplicates" not in capsys.readouterr().out


def test_a_class_of_copies_alone_has_no_test_image(root, capsys):
    for i in range(6):
        picture(root / f"dog/{i}.png", seed=1)
    _, test = load(root)
    assert test.labels.unique().tolist() == [0]
    assert "classes without a test image: dog" in capsys.readouterr().out


def test_small_classes_are_named(root, capsys):
    picture(root / "rat/a.png", seed=1000)
    train, test = load(root)
    assert train.labels.tolist().count(2) == 1 and test.labels.tolist().count(2) == 0
    assert "classes with fewer than 5 images: rat (1)" in capsys.readouterr().out


def test_without_any_test_image_there_is_no_set(tmp_path):
    photos(tmp_path / "own", count=1)
    assert "leaves no image for the test set" in error_of(tmp_path / "own")


# ---- the cache ----------------------------------------------------------------------------------


def test_the_second_start_decodes_nothing_and_says_the_same(root, monkeypatch, capsys):
    first = load(root)
    said = capsys.readouterr().out
    monkeypatch.setattr("datasets.image_cache.decoded_chunks", None)
    second = load(root)
    assert capsys.readouterr().out == said
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images) and a.files == b.files and a.content == b.content
    assert first[0].stored.data_ptr() == first[1].stored.data_ptr()  # no copies


def test_the_content_is_that_of_the_files(root, tmp_path):
    train, test = load(root)
    assert train.content == test.content != 0
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    assert load(tmp_path / "copy")[0].content == train.content
    assert load(root, split_seed=1, image_size=24)[0].content == train.content
    picture(root / "cat/0.png", size=(41, 30), seed=999)
    assert load(root)[0].content != train.content


# ---- wrong folders ------------------------------------------------------------------------------


def make_empty(root):
    (root / "cow").mkdir()
    (root / "cow/notes.txt").write_text("x")


def same_but_for_case(root):
    picture(root / "Cat/a.png")


def same_but_for_unicode(root):
    picture(root / "caf\u00e9/a.png")
    picture(root / unicodedata.normalize("NFD", "caf\u00e9") / "a.png")


def train_and_another(root):
    for name in ("train", "holdout"):
        shutil.copytree(root / "cat", root / name / "cat")
    for name in ("cat", "dog"):
        shutil.rmtree(root / name)


def val_and_classes(root):
    shutil.copytree(root / "cat", root / "val/cat")


def only_images(root):
    shutil.rmtree(root)
    picture(root / "a.png")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (make_empty, ["photos/cow holds no images, only cow/notes.txt", "move it away"]),
        (lambda root: shutil.rmtree(root / "cat"), ["two classes or more", "only, dog"]),
        (same_but_for_case, ["Cat and cat", "differ only in case"]),
        (same_but_for_unicode, ["cafe\\u0301 and caf\u00e9", "differ only in their Unicode form"]),
        (train_and_another, ["train/ with folders in it, and beside it holdout", "test or val"]),
        (val_and_classes, ["val/ with folders in it, and beside it cat, dog", "set train, or"]),
        (only_images, ["holds no folders", "FOLDER/<class>/*"]),
        (shutil.rmtree, ["is missing", "FOLDER/<class>/*"]),
    ],
)
def test_a_folder_that_cannot_be_a_set(root, spoil, words):
    spoil(root)
    for word in words:
        assert word in error_of(root)


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "photos").write_text("x")
    assert "is a file, not a folder" in error_of(tmp_path / "photos")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda test: shutil.rmtree(test / "dog"), "only in train dog, only in val none"),
        (lambda test: picture(test / "cow/a.png"), "only in train none, only in val cow"),
        (lambda test: (test / "dog").rename(test / "Dog"), "differ only in case: give them the"),
    ],
)
def test_other_classes_in_the_test_set(tmp_path, change, words):
    for name in ("train", "val"):
        photos(tmp_path / "own" / name, count=2, classes=("cat", "dog", "rat"))
    change(tmp_path / "own/val")
    assert words in error_of(tmp_path / "own")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_and_can_be_skipped(root, monkeypatch, capsys, num_workers):
    monkeypatch.setattr("datasets.decoding.CHUNK", 8)
    (root / "cat/0.png").write_text("no image")
    whole = (root / "dog/1.png").read_bytes()
    (root / "dog/1.png").write_bytes(whole[: len(whole) // 2])
    os.symlink("nowhere", root / "dog/broken.png")
    message = error_of(root, num_workers=num_workers)
    assert "cat/0.png cannot be read as an image (not an image) (2 more images" in message
    assert "dog/1.png, dog/broken.png). Replace or remove it, or leave" in message
    (root / "dog/broken.png").unlink()
    capsys.readouterr()
    for _ in range(2):  # decoded, and from the cache
        train, test = load(root, skip_unreadable=True, num_workers=num_workers)
        files = [*train.files, *test.files]
        assert len(files) == 10 and not {"cat/0.png", "dog/1.png"} & {*files}
        for images in (train, test):
            for file, pixels in zip(images.files, images.images, strict=True):
                assert (pixels.numpy() == as_stored(root / file)).all()
        out = capsys.readouterr().out
        assert f"skipped: {root / 'cat/0.png'} cannot be read as an image (not an image)\n" in out
        assert "10 images in 2 classes" in out
    assert "--skip-unreadable" in error_of(root)  # though the cache has the others


def test_an_image_that_can_be_read_again_is(root, monkeypatch):
    """A permission was missing, for example: neither length nor time of the file change."""
    whole = (root / "cat/0.png").read_bytes()
    before = os.stat(root / "cat/0.png")
    for content, count in ((b"x" * len(whole), 11), (whole, 12)):
        (root / "cat/0.png").write_bytes(content)
        os.utime(root / "cat/0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert sum(map(len, load(root, skip_unreadable=True))) == count


def test_many_unreadable_images_are_counted(root, capsys):
    for i in range(25):
        (root / f"cat/bad{i}.png").write_text("")
    load(root, skip_unreadable=True)
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 20 and "and 5 more that cannot be read" in out


def test_a_class_that_cannot_be_read_at_all(root):
    for path in (root / "cat").iterdir():
        path.write_text("no image")
    assert "class cat" in error_of(root, skip_unreadable=True)


def test_where_the_runs_go(tmp_path, monkeypatch):
    name = SOURCES["folder"].runs_name
    assert name("/somewhere/photos") == "photos" and name("photos/") == "photos"
    monkeypatch.chdir(tmp_path)
    assert name(".") == tmp_path.name
    assert name("/") == "folder" == name(None)
    assert name("x/.hidden") == "hidden" and name("a\nb") == "a\\nb"
    assert name("x/sanity") == "sanity-folder" and name("CUB") == "CUB-folder"
    assert SOURCES["cub"].runs_name("anything") == "cub"


def test_presence_is_cheap_and_never_an_error(root, tmp_path):
    assert folder_present(root) and not folder_present(tmp_path / "nothing")
    assert not folder_present(None) and not folder_present(root / "cat/0.png")
