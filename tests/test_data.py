"""data.py: loading, every bad input and its message, the cache, and augmentation against loops over single images."""
import functools
import http.server
import os
import pickle
import random
import signal
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import download
import image_files
from augmentation import Augmentation, TrainBatches, normalise, resize
from data import DataError, ImageSet

REAL = Path(__file__).parent.parent / "data"
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.fixture(autouse=True)
def fresh_notices():
    image_files._say_once.cache_clear()


def image_set(count=20, height=18, width=24, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))
    return ImageSet(images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]), "a test")


def make_folders(root, classes=("cat", "dog"), per_class=3, size=(20, 16), ending="png"):
    """Class folders under root/cifar100; returns the pixels by path."""
    rng, pixels = np.random.default_rng(0), {}
    for split in ("train", "test"):
        for name in classes:
            folder = root / "cifar100" / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / f"{i:03d}.{ending}")
                pixels[folder / f"{i:03d}.{ending}"] = array
    return pixels


def load(root, **options):
    return data.load_cifar100(root, download=False, progress=False, **options)


def fails(root, *words, **options):
    """The load fails with one line that holds every word."""
    with pytest.raises(DataError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


# ------------------------------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize("height,width,pad,cutout", [(18, 24, 4, 7), (32, 32, 4, 8), (9, 7, 3, 12), (16, 16, 0, 0)])
@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_equals_a_loop_over_single_images(height, width, pad, cutout, flip):
    images = image_set(40, height, width).images
    augmentation = Augmentation(mean=MEAN, std=STD, pad=pad, flip=flip, cutout=cutout)
    batch = augmentation(images, torch.Generator().manual_seed(5))
    draw = augmentation.draw(40, height, width, torch.Generator().manual_seed(5))
    assert batch.dtype == torch.float32 and batch.shape == (40, 3, height, width)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(images.numpy()):
        top, left, flipped, y, x = (int(value[i]) for value in draw[:5])
        expected = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")[top:top + height, left:left + width]
        if flip and flipped:
            expected = expected[:, ::-1]
        expected = (expected / 255.0 - np.array(MEAN)) / np.array(STD)
        if cutout:
            y, x = y - cutout // 2, x - cutout // 2
            expected[max(y, 0):max(y + cutout, 0), max(x, 0):max(x + cutout, 0)] = 0
        np.testing.assert_allclose(batch[i].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_draws_cover_their_ranges_and_differ_between_images():
    draw = Augmentation(mean=MEAN, std=STD, pad=4).draw(4000, 10, 12, torch.Generator().manual_seed(0))
    for values, end in zip(draw, (9, 9, 2, 10, 12)):
        counts = torch.bincount(values.long(), minlength=end)
        assert len(counts) == end and counts.min() > 4000 / end * 0.7


def test_padding_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="reflect padding of 4 px"):
        Augmentation(mean=MEAN, std=STD)(image_set(2, 4, 9).images, torch.Generator())


def test_normalise_and_resize():
    images = image_set().images
    plain = normalise(images, MEAN, STD)
    expected = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(plain.permute(0, 2, 3, 1).double(), expected, atol=2e-6, rtol=0)
    assert resize(plain, None) is plain and resize(plain, (18, 24)) is plain
    small = resize(plain, (9, 12))      # half the size
    assert small.shape == (20, 3, 9, 12) and small.is_contiguous(memory_format=torch.channels_last)
    assert abs(small.mean() - plain.mean()) < 0.02 and small.std() < 0.7 * plain.std()     # antialiased


# ------------------------------------------------------------------------------------------------------------ batches

def batches(images=None, seed=1, batch_size=6):
    augmentation = Augmentation(mean=MEAN, std=STD, cutout=5)
    return TrainBatches(images or image_set(), batch_size, seed=seed, augmentation=augmentation, device="cpu")


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other))


def test_batches_are_determined_by_seed_and_epoch():
    assert same(batches().epoch(3), batches().epoch(3))
    assert not same(batches().epoch(3), batches().epoch(4))
    assert not same(batches().epoch(3), batches(seed=2).epoch(3))
    reused = batches()
    list(reused.epoch(0))
    assert same(reused.epoch(3), batches().epoch(3))


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_start_step_goes_on_where_the_epoch_was_left(start):
    assert same(list(batches().epoch(2))[start:], batches().epoch(2, start_step=start))


def test_interleaved_epochs_do_not_disturb_each_other():
    shared = batches()
    pairs = list(zip(shared.epoch(0), shared.epoch(1)))
    assert same([p[0] for p in pairs], batches().epoch(0)) and same([p[1] for p in pairs], batches().epoch(1))


def test_global_random_states_are_neither_read_nor_moved():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = list(batches().epoch(0))
    data.split_validation(image_set(), 0.2, 0)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert same(first, batches().epoch(0))


def test_an_epoch_holds_each_image_once():
    numbered = image_set(20)
    numbered.images[:] = torch.arange(20, dtype=torch.uint8)[:, None, None, None]
    plain = Augmentation(mean=(0, 0, 0), std=(1 / 255,) * 3)
    loader = TrainBatches(numbered, 5, seed=0, augmentation=plain, device="cpu")
    seen = [(x[:, 0, 0, 0].round().long(), y) for x, y in loader.epoch(0)]
    assert [len(y) for _, y in seen] == [5, 5, 5, 5] and len(loader) == 4
    order = torch.cat([x for x, _ in seen])
    assert sorted(order.tolist()) == list(range(20)) and order.tolist() != list(range(20))
    assert torch.equal(torch.cat([y for _, y in seen]), numbered.labels[order])     # labels go with their images


def test_number_of_steps():
    assert len(batches()) == 3 and len(list(batches().epoch(0))) == 3
    few = batches(batch_size=64)
    assert len(few) == 1 and [len(y) for _, y in few.epoch(0)] == [20]


def test_stable_seed_is_the_same_everywhere():
    assert data.stable_seed("order", 0, 1) == data.stable_seed("order", 0, 1) == 4602570500139554110
    assert data.stable_seed(1, 23) != data.stable_seed(12, 3)


def per_image_loader(images):
    """What the speed is compared with: a torch DataLoader of 2 workers over torchvision's per-image transforms."""
    from torchvision import transforms as T
    transform = T.Compose([T.ToPILImage(), T.RandomCrop(32, padding=4, padding_mode="reflect"),
                           T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD),
                           T.RandomErasing(p=1.0, scale=(1 / 16, 1 / 16), ratio=(1, 1))])
    pairs = [(transform, image.permute(2, 0, 1)) for image in images]
    return torch.utils.data.DataLoader(PerImage(pairs), batch_size=256, num_workers=2)


class PerImage(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        transform, image = self.pairs[index]
        return transform(image)


def rate(iterator, windows, steps):
    """Images a second in the best of some windows of some steps; the first batch, which starts things up, is free."""
    next(iterator)
    best = 0.0
    for _ in range(windows):
        start = time.perf_counter()
        count = sum(len(next(iterator)) for _ in range(steps))
        best = max(best, count / (time.perf_counter() - start))
    return best


def test_ten_times_the_speed_of_a_loader_with_two_workers():
    images = image_set(8192, 32, 32)
    # Windows of 6 batches: as workers hold 2 batches each ready, a shorter one could find them all waiting
    theirs = rate(iter(per_image_loader(images.images[:13 * 256])), windows=2, steps=6)
    augmentation = Augmentation(mean=MEAN, std=STD, cutout=8)
    ours = TrainBatches(images, 512, seed=0, augmentation=augmentation, device="cpu")
    best, threads = 0.0, torch.get_num_threads()
    try:
        for count in {1, threads}:      # beside other busy processes, one thread is often the faster
            torch.set_num_threads(count)
            best = max(best, *(rate((x for x, _ in ours.epoch(e)), windows=5, steps=3) for e in range(4)))
    finally:
        torch.set_num_threads(threads)
    print(f"{best:,.0f} images/s against {theirs:,.0f}: {best / theirs:.1f} times")
    assert best >= 10 * theirs


# --------------------------------------------------------------------------------------------------------------- sets

def test_image_set():
    whole = image_set()
    boxed = ImageSet(whole.images, whole.labels, whole.class_names, "x", torch.arange(80.0).view(20, 4))
    part = boxed.subset([4, 2])
    assert len(part) == 2 and part.image_size == (18, 24) and part.labels.tolist() == [1, 2]
    assert torch.equal(part.images, whole.images[[4, 2]]) and part.boxes[0].tolist() == [16, 17, 18, 19]
    assert whole.to("cpu").boxes is None and torch.equal(data.place_on(boxed, "cpu").boxes, boxed.boxes)


def test_place_on_a_gpu_by_a_tenth_of_its_free_memory(monkeypatch):
    whole, moved = image_set(), []
    monkeypatch.setattr(ImageSet, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: moved.append("pinned") or self)
    for free, expected in ((whole.images.nbytes * 10, [torch.device("cuda")]),
                           (whole.images.nbytes * 10 - 1, ["pinned", "pinned"])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        moved.clear()
        data.place_on(whole, "cuda")
        assert moved == expected


def test_split_validation_takes_a_share_of_each_class():
    whole = image_set(63, classes=3)
    whole.images[:, 0, 0, 0] = torch.arange(63, dtype=torch.uint8)
    train, validation = data.split_validation(whole, 0.2, seed=7)
    assert torch.bincount(validation.labels).tolist() == [4, 4, 4] and len(train) == 51
    ids = [s.images[:, 0, 0, 0].tolist() for s in (train, validation)]
    assert sorted(ids[0] + ids[1]) == list(range(63)) and validation.labels.tolist() == [i % 3 for i in ids[1]]
    assert torch.equal(validation.images, data.split_validation(whole, 0.2, seed=7)[1].images)
    assert not torch.equal(validation.images, data.split_validation(whole, 0.2, seed=8)[1].images)
    kept, _ = data.split_validation(whole, 0.999, seed=0)
    assert torch.bincount(kept.labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 0.001, float("nan")])
def test_split_validation_refuses_useless_fractions(fraction):
    with pytest.raises(DataError, match="--val-fraction"):
        data.split_validation(image_set(), fraction, 0)


def test_channel_statistics():
    whole = image_set(50)
    mean, std = data.channel_statistics(whole)
    pixels = whole.images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), atol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), atol=1e-12)
    flat = ImageSet(torch.full((2, 16, 16, 3), 9, dtype=torch.uint8), torch.zeros(2).long(), ("a",), "x")
    assert data.channel_statistics(flat)[1] == (1 / 255,) * 3


# ------------------------------------------------------------------------------------------------------ class folders

@pytest.mark.parametrize("workers", [0, 1])
def test_class_folders(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(image_files, "CHUNK", 4)
    pixels = make_folders(tmp_path)
    (tmp_path / "cifar100/train/.hidden").mkdir()
    (tmp_path / "cifar100/train/cat/notes.txt").write_text("no image")
    (tmp_path / "cifar100/train/cat/.000.png").write_text("no image")
    train, test = load(tmp_path, num_workers=workers)
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.labels.dtype == torch.int64 and train.image_size == (16, 20) and "class folders" in train.source
    for split, loaded in (("train", train), ("test", test)):
        expected = [pixels[path] for path in sorted(pixels) if path.parent.parent.name == split]
        assert (loaded.images.numpy() == np.stack(expected)).all()


def test_image_size_resizes_images_of_any_size(tmp_path):
    make_folders(tmp_path)
    Image.new("RGB", (50, 90), (255, 0, 0)).save(tmp_path / "cifar100/test/dog/000.png")
    train, test = load(tmp_path, image_size=24)
    assert train.image_size == test.image_size == (24, 24)
    assert (test.images[3] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


def test_grey_palette_and_transparent_images_become_rgb(tmp_path, recwarn):
    make_folders(tmp_path)
    folder = tmp_path / "cifar100/train/cat"
    Image.new("L", (20, 16), 77).save(folder / "000.png")
    Image.new("RGBA", (20, 16), (1, 2, 3, 128)).save(folder / "001.png")
    palette = Image.new("RGB", (20, 16), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(folder / "002.png", transparency=bytes([0, 255]))
    train, _ = load(tmp_path)
    assert train.images[:3, 5, 5].tolist() == [[77, 77, 77], [1, 2, 3], [9, 8, 7]]
    assert not recwarn.list


def test_bad_class_folders(tmp_path, monkeypatch):
    message = fails(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist", data.CIFAR100_URL, data.CIFAR100_MD5)
    assert "--sample" in message and "class folders" in message
    fails(tmp_path, "no CIFAR-100 in", tmp_path)
    with pytest.raises(DataError, match="does not exist"):      # not even with a download, where the parent is missing
        data.load_cifar100(tmp_path / "a" / "b")
    (tmp_path / "cifar100").mkdir()
    fails(tmp_path, tmp_path / "cifar100/train", "is missing")
    (tmp_path / "cifar100/train").mkdir()
    fails(tmp_path, tmp_path / "cifar100/train", "no class folders")
    fails(tmp_path / "cifar100", "no CIFAR-100 in")
    (tmp_path / "cifar100/test").mkdir()
    fails(tmp_path / "cifar100", "--data-dir is the folder that holds cifar100")
    for size in (0, 15):
        fails(tmp_path, "--image-size", "at least 16", image_size=size)
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file", "is a file")


def test_empty_class(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "cifar100/test/emu").mkdir()
    fails(tmp_path, tmp_path / "cifar100/test/emu", "no images")


def test_class_lists_that_differ(tmp_path):
    make_folders(tmp_path, classes=tuple("abcdef"))
    for name in "bcde":
        (tmp_path / "cifar100/test" / name).rename(tmp_path / "cifar100/test" / f"x{name}")
    fails(tmp_path, "only in train b, c, d and 1 more", "only in test xb, xc, xd and 1 more")


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
    Image.new("RGB", (300, 300)).save(bomb)
    for limit in (80_000, 40_000):      # PIL warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        fails(tmp_path, bomb, "decompression bomb", image_size=16)


def test_an_image_that_is_too_small(tmp_path):
    make_folders(tmp_path, size=(8, 8))
    fails(tmp_path, "8x8", "--image-size")
    assert load(tmp_path, image_size=16)[0].image_size == (16, 16)


# ------------------------------------------------------------------------------------------------------------ workers

def dying_chunk(parent, files, size, resize):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    pixels, place = image_files._open_rgb(files[0][0], size, resize, None)
    return pixels[None], np.array([place])


def failing_chunk(parent, files, size, resize):
    if os.getpid() != parent:
        raise MemoryError("a worker's")
    return dying_chunk(parent, files, size, resize)


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

def decoded_anew(root, monkeypatch, **options):
    """Load, and tell which splits were decoded rather than read from the cache."""
    titles, decode = [], image_files.decode_images

    def spy(paths, size, resize, num_workers, progress, title, crops):
        titles.append(title)
        return decode(paths, size, resize, num_workers, progress, title, crops)
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode_images", spy)
        loaded = load(root, **options)
    return titles, loaded


def test_cache(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)
    titles, first = decoded_anew(tmp_path, monkeypatch)
    assert titles == ["cifar100-train", "cifar100-test"]
    titles, second = decoded_anew(tmp_path, monkeypatch)
    assert titles == [] and all(torch.equal(a.images, b.images) for a, b in zip(first, second))

    changed = tmp_path / "cifar100/train/cat/000.png"
    Image.new("RGB", (20, 16), (1, 2, 3)).save(changed)     # another image: decoded again, and the old cache goes
    titles, third = decoded_anew(tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and third[0].images[0, 0, 0].tolist() == [1, 2, 3]
    os.utime(changed, (1, 1))                               # another time
    assert decoded_anew(tmp_path, monkeypatch)[0] == ["cifar100-train"]
    changed.rename(changed.with_name("zzz.png"))            # another name
    assert decoded_anew(tmp_path, monkeypatch)[0] == ["cifar100-train"]
    assert len(list((tmp_path / ".cache").iterdir())) == 2

    assert len(decoded_anew(tmp_path, monkeypatch, image_size=16)[0]) == 2  # a size of its own, beside the other's
    assert decoded_anew(tmp_path, monkeypatch, image_size=16)[0] == []
    assert decoded_anew(tmp_path, monkeypatch)[0] == []
    monkeypatch.setattr(image_files, "CACHE_VERSION", 10**6)
    assert len(decoded_anew(tmp_path, monkeypatch)[0]) == 2
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
    titles, second = decoded_anew(tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and torch.equal(first, second[0].images)
    assert capsys.readouterr().out.count("is damaged") == 1
    assert decoded_anew(tmp_path, monkeypatch)[0] == []


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
    assert list((tmp_path / ".cache").iterdir()) == [] and "No space left" in capsys.readouterr().out


def test_leftovers_of_killed_runs_are_removed_when_old(tmp_path):
    make_folders(tmp_path)
    (tmp_path / ".cache").mkdir()
    old, new = (tmp_path / ".cache" / f".cifar100-train-{n}.pt.{n}.tmp" for n in (1, 2))
    other = tmp_path / ".cache" / "mine.pt"
    for path in (old, new, other):
        path.write_text("x")
        os.utime(path, (1, 1)) if path != new else None
    load(tmp_path)
    assert not old.exists() and new.exists() and other.exists()


# ---------------------------------------------------------------------------------------------------- official archive

@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The bytes of a small archive like the official one, whose md5 sums data.py is made to expect."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "making" / data.CIFAR100_UNPACKED
    folder.mkdir(parents=True)
    contents = {"meta": {"fine_label_names": ["ant", "bee"]}}
    for split, count in (("train", 6), ("test", 4)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[split] = {"data": pixels, "fine_labels": [i % 2 for i in range(count)]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    path = tmp_path / "making" / data.CIFAR100_ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, data.CIFAR100_UNPACKED)
        tar.add(folder / "meta", "../escaped")      # a member that would leave the folder, if anything were unpacked
    monkeypatch.setattr(data, "CIFAR100_MD5", download.md5_of(path))
    monkeypatch.setattr(data, "CIFAR100_FILES", {name: download.md5_of(folder / name) for name in contents})
    return path, contents


def check_official(sets, contents):
    for loaded, split in zip(sets, ("train", "test")):
        expected = contents[split]["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert (loaded.images.numpy() == expected).all() and loaded.images.is_contiguous()
        assert loaded.labels.tolist() == contents[split]["fine_labels"] and loaded.class_names == ("ant", "bee")


def test_archive_and_unpacked_folder(tmp_path, archive):
    path, contents = archive
    root = tmp_path / "d"
    root.mkdir()
    assert not data.cifar100_present(root)
    (root / path.name).write_bytes(path.read_bytes())
    assert data.cifar100_present(root)
    check_official(load(root), contents)
    assert load(root, image_size=40)[0].image_size == (40, 40)
    assert [p.name for p in root.iterdir()] == [path.name]      # nothing was unpacked
    (root / path.name).unlink()
    (path.parent / data.CIFAR100_UNPACKED).rename(root / data.CIFAR100_UNPACKED)
    assert data.cifar100_present(root)
    check_official(load(root), contents)
    make_folders(root)
    assert load(root)[0].class_names == ("cat", "dog")      # class folders come first


def test_damaged_archive_and_unpacked_folder(tmp_path, archive):
    path, _ = archive
    whole = path.read_bytes()
    root = path.parent
    (root / data.CIFAR100_UNPACKED / "train").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    fails(root, root / data.CIFAR100_UNPACKED / "train", "md5", "Delete")
    (root / data.CIFAR100_UNPACKED / "train").unlink()
    fails(root, root / data.CIFAR100_UNPACKED / "train", "Delete")
    (root / data.CIFAR100_UNPACKED).rename(root / "away")
    for content in (whole[:len(whole) // 2], whole + b"x", b""):
        path.write_bytes(content)
        fails(root, path, data.CIFAR100_MD5, data.CIFAR100_URL, "Delete it")


class Server(http.server.BaseHTTPRequestHandler):
    content, declared, status = b"", None, 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.declared or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Starts a server on the loopback interface that answers with the given bytes, and points data.py at it."""
    servers = []
    monkeypatch.setattr(download, "PAUSE", 0.0)

    def start(content, declared=None, status=200):
        handler = type("Handler", (Server,), {"content": content, "declared": declared, "status": status})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(data, "CIFAR100_URL", f"http://127.0.0.1:{servers[-1].server_port}/c.tar.gz")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def download_fails(root, *words):
    with pytest.raises(DataError) as caught:
        data.load_cifar100(root, progress=False)
    message = str(caught.value)
    assert "\n" not in message
    advice = data.CIFAR100_URL, data.CIFAR100_MD5, root / data.CIFAR100_ARCHIVE, "class folders", "--sample"
    for word in (*words, *advice):
        assert str(word) in message, message
    assert not list(root.glob("*")) and not list(root.glob(".*")), "something half-made was left behind"
    assert not data.cifar100_present(root)


def test_download(tmp_path, archive, server, capsys):
    path, contents = archive
    server(path.read_bytes())
    root = tmp_path / "data"        # made by the download
    check_official(data.load_cifar100(root, progress=False), contents)
    assert [p.name for p in root.iterdir()] == [data.CIFAR100_ARCHIVE]
    assert "downloading" in capsys.readouterr().out
    server(b"", status=500)
    check_official(data.load_cifar100(root, progress=False), contents)      # nothing is fetched twice


def test_downloads_that_fail(tmp_path, archive, server):
    whole = archive[0].read_bytes()
    server(whole[:-7])
    download_fails(tmp_path / "a", "half a download", f"{len(whole) - 7:,} bytes")
    server(whole + b"more")
    download_fails(tmp_path / "a", "another file")
    server(whole[:500], declared=len(whole))        # the connection ends before the file does
    download_fails(tmp_path / "a")
    server(b"gone", status=404)
    download_fails(tmp_path / "a", "404")


def test_dead_server(tmp_path, monkeypatch, server):
    server(b"")
    port = int(data.CIFAR100_URL.split(":")[2].split("/")[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as closed:
        monkeypatch.setattr(data, "CIFAR100_URL", data.CIFAR100_URL.replace(str(port), str(closed.server_port)))
    download_fails(tmp_path / "a", "refused")


def test_silent_server(tmp_path, monkeypatch, server):
    import socket
    server(b"")
    monkeypatch.setattr(download, "SOCKET_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(data, "CIFAR100_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/c.tar.gz")
        download_fails(tmp_path / "a", "timed out")
    assert socket.getdefaulttimeout() is None


# ---------------------------------------------------------------------------------------------------------- real images

@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="no CIFAR-100 class folders in data/")
def test_real_class_folders(tmp_path):
    """A few classes of the real images, linked into a folder of their own."""
    names = sorted(path.name for path in (REAL / "cifar100" / "train").iterdir())[:2]
    for split in ("train", "test"):
        (tmp_path / "cifar100" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "cifar100" / split / name).symlink_to(REAL / "cifar100" / split / name)
    train, test = load(tmp_path)
    assert (len(train), len(test), train.image_size) == (1000, 200, (32, 32))
    assert train.class_names == tuple(names) and torch.bincount(train.labels).tolist() == [500, 500]
