"""image_files.py: pictures of every mode, those that cannot be read, workers that fail, and the cache."""
import functools
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import files
import image_files
from tests.makers import cifar_fails as fails, decoded_anew, load_cifar as load, make_folders


# ----------------------------------------------------------------------------------------------------------- pictures

def test_grey_palette_and_transparent_images_become_rgb(tmp_path, recwarn):
    make_folders(tmp_path)
    folder = tmp_path / "cifar100/train/cat"
    Image.new("L", (20, 16), 77).save(folder / "000.png")
    Image.new("RGBA", (20, 16), (1, 2, 3, 128)).save(folder / "001.png")
    palette = Image.new("RGB", (20, 16), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(folder / "002.png", transparency=bytes([0, 255]))
    train, _ = load(tmp_path)
    assert train.images[:3, 5, 5].tolist() == [[77, 77, 77], [128, 128, 129], [255, 255, 255]]   # on white
    assert not recwarn.list


@pytest.mark.parametrize("split,index,workers", [("train", 2, 0), ("train", 2, 1), ("test", 0, 0)])
def test_images_of_different_size(tmp_path, split, index, workers):
    make_folders(tmp_path)
    odd = tmp_path / "cifar100" / split / "dog" / f"{index:03d}.png"
    Image.new("RGB", (33, 16)).save(odd)
    fails(tmp_path, odd, "33x16", "20x16", "--image-size", num_workers=workers)


def test_test_images_of_another_size_are_refused_from_the_cache_too(tmp_path):
    make_folders(tmp_path)
    load(tmp_path)
    for path in (tmp_path / "cifar100/train").glob("*/*.png"):
        Image.new("RGB", (21, 17)).save(path)
    odd = tmp_path / "cifar100/test/cat/000.png"
    fails(tmp_path, odd, "20x16", "21x17")


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def deep(path):
    Image.fromarray(np.full((16, 20), 40000, np.uint16)).save(path)


@pytest.mark.parametrize("spoil,why", [
    (lambda path: path.write_text("this is text"), "not an image"), (truncated, "truncated"),
    (lambda path: path.write_bytes(b""), "not an image"), (deep, "8 bits")])
@pytest.mark.parametrize("index", [0, 2])
def test_unreadable_image(tmp_path, spoil, why, index):
    make_folders(tmp_path)
    bad = tmp_path / "cifar100/train/cat" / f"{index:03d}.png"
    spoil(bad)
    fails(tmp_path, bad, why, "Replace or remove")
    assert not list((tmp_path / ".cache").glob("*"))


def test_decompression_bomb(tmp_path, monkeypatch):
    make_folders(tmp_path)
    bomb = tmp_path / "cifar100/train/dog/001.png"
    Image.new("RGB", (300, 310)).save(bomb)
    for limit in (80_000, 40_000):      # PIL warns above the limit, and raises above twice the limit
        monkeypatch.setattr(image_files, "MOST_PIXELS", limit)
        fails(tmp_path, bomb, "has 300x310 pixels: more than", image_size=16)
    assert Image.MAX_IMAGE_PIXELS == 89478485   # other people's is as it was


def test_an_image_that_is_too_small(tmp_path):
    make_folders(tmp_path, size=(8, 8))
    fails(tmp_path, "8x8", "--image-size")
    assert load(tmp_path, image_size=16)[0].image_size == (16, 16)


# ------------------------------------------------------------------------------------------------------------ workers

DECODE_CHUNK = image_files._decode_chunk


def dying_chunk(parent, *words):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return DECODE_CHUNK(*words)


def failing_chunk(parent, *words):
    if os.getpid() != parent:
        raise MemoryError("a worker's")
    return DECODE_CHUNK(*words)


@pytest.mark.parametrize("chunk", [dying_chunk, failing_chunk])
def test_a_worker_that_dies_or_fails_is_replaced_by_the_main_process(tmp_path, monkeypatch, capsys, chunk):
    make_folders(tmp_path)
    paths = sorted(tmp_path.glob("cifar100/train/*/*.png"))
    monkeypatch.setattr(image_files, "CHUNK", 1)
    monkeypatch.setattr(image_files, "_decode_chunk", functools.partial(chunk, os.getpid()))
    images = image_files.decode_images(paths, (16, 20), False, num_workers=1, progress=False).images
    assert (images.numpy() == np.stack([np.asarray(Image.open(path)) for path in paths])).all()
    assert capsys.readouterr().out.count("going on in the main process") == 1


def test_no_processes_to_be_had(tmp_path, monkeypatch):
    make_folders(tmp_path)

    def refuse(self, *args):
        raise OSError("no processes left")
    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse)
    assert len(load(tmp_path, num_workers=2)[0]) == 6


# -------------------------------------------------------------------------------------------------------------- cache

def test_cache(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)
    titles, first = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train", "cifar100-test"]
    titles, second = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == [] and all(torch.equal(a.images, b.images) for a, b in zip(first, second))

    changed = tmp_path / "cifar100/train/cat/000.png"
    Image.new("RGB", (20, 16), (1, 2, 3)).save(changed)     # another image: decoded again, and the old cache goes
    titles, third = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and third[0].images[0, 0, 0].tolist() == [1, 2, 3]
    os.utime(changed, (1, 1))                               # another time
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == ["cifar100-train"]
    changed.rename(changed.with_name("zzz.png"))            # another name
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == ["cifar100-train"]
    assert len(list((tmp_path / ".cache").iterdir())) == 2

    assert len(decoded_anew(load, tmp_path, monkeypatch, image_size=16)[0]) == 2     # a size of its own, beside another
    assert decoded_anew(load, tmp_path, monkeypatch, image_size=16)[0] == []
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == []
    monkeypatch.setattr(image_files, "CACHE_VERSION", 10**6)
    assert len(decoded_anew(load, tmp_path, monkeypatch)[0]) == 2
    assert len(list((tmp_path / ".cache").iterdir())) == 4 and "damaged" not in capsys.readouterr().out


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"text"), flip_a_byte,
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: torch.save({"key": "x"}, path),
    lambda path: torch.save({"key": path.stem[-20:], "images": torch.zeros(6, 16, 20, 3)}, path)])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys, spoil):
    make_folders(tmp_path, size=(64, 64))
    first = load(tmp_path)[0].images.clone()    # what is loaded is mapped from the file
    spoil(next((tmp_path / ".cache").glob("cifar100-train-*.pt")))
    titles, second = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and torch.equal(first, second[0].images)
    assert capsys.readouterr().out.count("is damaged") == 1
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == []


def test_without_a_place_for_the_cache(tmp_path, capsys):
    make_folders(tmp_path)
    (tmp_path / ".cache").write_text("a file where the folder should be")
    assert len(load(tmp_path)[0]) == 6
    assert capsys.readouterr().out.count("no cache in") == 1


def test_a_full_disk_leaves_no_half_a_cache(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert len(load(tmp_path)[0]) == 6
    assert not (tmp_path / ".cache").exists() and "No space left" in capsys.readouterr().out


def test_leftovers_of_killed_runs_are_removed_when_old_and_nobody_elses(tmp_path):
    make_folders(tmp_path)
    cache = tmp_path / ".cache"
    cache.mkdir()
    old, new = files.temporary_in(cache), files.temporary_in(cache)
    others = [cache / name for name in ("mine.pt", ".a.pt.b.tmp", ".learn-to-pay-attention-notes.tmp",
                                        "cifar100-train-0123456789abcdef0123.pt")]
    for path in (old, new, *others):
        path.write_text("x")
        os.utime(path, (1, 1)) if path != new else None
    load(tmp_path)
    assert not old.exists() and new.exists() and all(path.read_text() == "x" for path in others)
