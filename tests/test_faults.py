"""Files that were damaged, by chance (seeded) or on purpose: each is read right, or refused in our
own words."""

import contextlib
import random
import re
import shutil
import struct
import zipfile
import zlib

import pytest
import torch
from PIL import Image, ImageFile

from common.checkpoint import FORMAT, load_model, read_checkpoint
from common.errors import UserError
from data import load_cifar100, open_rgb
from datasets import cub
from datasets.cub_sample import write_cub_sample
from datasets.decoding import Decoding, decode_images
from tests.helpers.trainers import make_trainer
from training import commands, report, run_folder


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with bits flipped, an end cut off, bytes put in, taken out, copied over others, or
    its end rewritten."""
    data, kind = bytearray(content), rng.randrange(6)
    place, length = rng.randrange(len(data)), rng.randint(1, 200)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.randbytes(min(length, 40))
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        other = rng.randrange(len(data))
        data[place : place + length] = data[other : other + length]
    else:  # a zip file has its directory there
        for _ in range(rng.randint(1, 4)):
            data[-rng.randint(1, min(len(data), 1500))] = rng.randrange(256)
    return bytes(data)


def test_a_thousand_damaged_checkpoints(tmp_path):
    torch.manual_seed(0)
    content = {
        "format": FORMAT,
        "model": {f"w{i}": torch.randn(3, 3) for i in range(4)},
        "ema": None,
        "config": {"model": "vgg"},
        "class_names": ["a", "b"],
        "input_size": [32, 32],
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "position": {"epoch": 1},
        "transferred": [],
    }
    path, rng, read = tmp_path / "last.pt", random.Random(0), 0
    torch.save(content, path)
    whole = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(damaged(whole, rng))
        try:
            found = read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            read += 1
            assert all(
                torch.equal(found["model"][name], value) for name, value in content["model"].items()
            )
    assert 20 < read < 300  # damage to what nobody reads, as time stamps
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    write_cub_sample(folder, seed=0, classes=3, train_per_class=2, test_per_class=1)
    return folder


def test_a_thousand_damaged_metadata_files(birds, tmp_path):
    """Also that no image path leaves the folder, whatever the files say."""
    folder, rng, read = tmp_path / cub.CUB_FOLDER, random.Random(1), 0
    shutil.copytree(birds / cub.CUB_FOLDER, folder, ignore=shutil.ignore_patterns("*.jpg"))
    files = sorted(folder.rglob("*.txt"))
    originals = {path: path.read_bytes() for path in files}
    assert len(files) == 7
    for _ in range(1000):
        path = rng.choice(files)
        path.write_bytes(damaged(originals[path], rng))
        try:
            found, parts, class_names, part_names = cub.read_metadata(folder)
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            read += 1
            assert len(found) >= 3 and all(0 <= bird.label < len(class_names) for bird in found)
            assert all(
                folder / "images" in bird.path.parents and ".." not in bird.path.parts
                for bird in found
            )
        path.write_bytes(originals[path])
    assert 50 < read < 900
    assert sorted(folder.rglob("*.txt")) == files and [p.name for p in tmp_path.iterdir()] == [
        cub.CUB_FOLDER
    ]


def test_hundreds_of_damaged_run_folders(tmp_path):
    """config.json, metrics.csv and the event files, as --resume reads them."""
    run, rng, cut = tmp_path / "run", random.Random(2), 0
    written = report.Report(run)
    written.start("python train_cifar100.py", {"lr": 0.1})
    written.tabs({"lr": 0.1})
    for epoch in range(1, 5):
        written.epoch(dict.fromkeys(report.METRIC_FIELDS, 0.5) | {"epoch": epoch})
    run_folder.write_config(
        run, {"commands": ["python train_cifar100.py"], "config": {"model": "vgg", "seed": 3}}
    )
    originals = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert len(originals) == 4
    for _ in range(250):
        shutil.rmtree(run)
        (run / "train").mkdir(parents=True)
        for path, content in originals.items():
            path.write_bytes(content)
        path = rng.choice(sorted(originals))
        path.write_bytes(damaged(originals[path], rng))
        assert isinstance(run_folder.earlier_commands(run), list)
        try:
            run_folder.check_own(run, run / "last.pt", {"config": {"model": "vgg", "seed": 3}})
            commands.stored_config(run)
        except UserError as error:
            assert str(run) in str(error)
        with contextlib.suppress(UserError):
            assert run_folder.newest_unfinished([tmp_path], "cifar100", tmp_path) == run
        harmed = path.read_bytes()
        report.truncate_after(run, 2)
        if (run / "metrics.csv").exists():
            cut += 1
            assert all(row["epoch"] <= 2 for row in report.read_metrics(run / "metrics.csv"))
        else:
            assert (run / "metrics.damaged.csv").read_bytes() == harmed
    assert 150 < cut < 250 and [p.name for p in tmp_path.iterdir()] == ["run"]


# ---- files that mean harm -----------------------------------------------------------------------


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one bit a pixel whose header says what it likes."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


HUGE = {
    "a header that lies": (".png", lambda: png(2**31 - 1, 2**31 - 1, b"")),
    # 2.7 GB in RGB, 109 kB here
    "gigabytes of nothing": (".png", lambda: png(30_000, 30_000, bytes(3751 * 30_000))),
    "a portable pixmap": (".ppm", lambda: b"P6 99999 99999 255\n" + bytes(100)),
    "a bitmap": (
        ".bmp",
        lambda: (
            b"BM"
            + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 99_999, 99_999, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
    ),
    "a GIF": (
        ".gif",
        lambda: (
            b"GIF89a"
            + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
            + b",\0\0\0\0"
            + struct.pack("<HHB", 65_535, 65_535, 0)
            + b"\x02\x02\x4c\x01\0;"
        ),
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_pictures_that_would_fill_the_memory(birds, tmp_path, monkeypatch, kind):
    """Refused by every reader, as the first image of a set and as a later one, before they are
    unpacked."""
    ending, make = HUGE[kind]
    unpacked, load = [], ImageFile.ImageFile.load

    def logits_with_hooks(image):
        unpacked.append(image.width * image.height)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", logits_with_hooks)
    for number in (0, 3):
        folder = tmp_path / f"data {number}"
        for split in ("train", "test"):
            for each in range(4):
                path = folder / "cifar100" / split / f"class {each % 2}" / f"{each}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32)).save(path)
        bad = path.parent.parent / f"class {number % 2}" / f"{number}.png"
        bad.unlink()
        bad.with_suffix(ending).write_bytes(make())
        with pytest.raises(UserError, match=re.escape(str(bad.with_suffix(ending)))):
            load_cifar100(folder)
    shutil.copytree(birds / cub.CUB_FOLDER, tmp_path / cub.CUB_FOLDER)
    bird = sorted((tmp_path / cub.CUB_FOLDER / "images").rglob("*.jpg"))[1]
    bird.write_bytes(make())
    with pytest.raises(UserError, match=re.escape(str(bird))):
        cub.load_cub(tmp_path, image_size=32)
    photo = tmp_path / f"photo{ending}"
    photo.write_bytes(make())
    with pytest.raises(UserError, match=re.escape(str(photo))):
        open_rgb(photo)
    assert unpacked and max(unpacked) < 10**6


def test_sets_that_fit_no_memory(tmp_path):
    with pytest.raises(
        UserError,
        match="40,000,000 images of 20000x20000 pixels take 44,703,484 GiB of memory, more than",
    ):
        decode_images([tmp_path / "a.png"] * 40_000_000, Decoding((20_000, 20_000), True))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model": {"x": torch.zeros(1).expand(10**6, 10**6)}, "ema": None},
            "its model is not what it should be",
        ),
        # 9 TB of weights
        (
            {"config": {"model": "vgg", "width": 4000.0, "trunk": "", "dropout": 0.0, "pool4": 2}},
            "does not hold the network that its settings describe: names or shapes of the weights "
            "differ",
        ),
        ({"class_names": ["a"] * 10**5}, "does not hold the network that its settings describe"),
    ],
)
def test_checkpoints_that_would_fill_the_memory(tmp_path, change, message):
    content = {
        "format": FORMAT,
        "model": {"x": torch.zeros(2)},
        "ema": None,
        "class_names": ["a", "b"],
        "config": {"model": "vgg", "width": 1.0, "trunk": "", "dropout": 0.0, "pool4": 2},
        "input_size": [32, 32],
        "mean": [0.1] * 3,
        "std": [0.3] * 3,
        "position": {},
        "transferred": [],
    }
    torch.save(content | change, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").stat().st_size < 10**8
    with pytest.raises(UserError, match=message):
        load_model(read_checkpoint(tmp_path / "last.pt"))


def test_a_compressed_checkpoint_is_refused_before_it_grows(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    # PyTorch would read it
    assert torch.load(tmp_path / "b.pt", weights_only=True)["w"].shape == (1000,)
    with pytest.raises(UserError, match="b.pt is refused: PyTorch does not write compressed files"):
        read_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"config": {"model": "vgg-att9", "width": 1.0}},
            "does not hold the network that its settings describe",
        ),
        (
            {"config": "none"},
            "is not a checkpoint of this project: its config is not what it should be",
        ),
        ({"class_names": []}, "its class_names is not what it should be"),
        ({"class_names": [1, 2]}, "its class_names is not what it should be"),
        ({"input_size": [32]}, "its input_size is not what it should be"),
        ({"input_size": [10**9, 10**9]}, "its input_size is not what it should be"),
        ({"mean": [float("nan")] * 3}, "its mean is not what it should be"),
        ({"std": [0.0] * 3}, "its std is not what it should be"),
        ({"model": {}, "ema": {}}, "does not hold the network that its settings describe"),
        ({"model": {"x": "y"}, "ema": None}, "its model is not what it should be"),
    ],
)
def test_a_checkpoint_with_other_things_in_it(tmp_path, change, message):
    ours = make_trainer()
    content = ours.state() | {
        "format": FORMAT,
        "config": ours.config | {"trunk": ""},
        "class_names": list("abcd"),
        "input_size": [32, 32],
        "mean": [0.1] * 3,
        "std": [0.3] * 3,
    }
    torch.save(content, tmp_path / "last.pt")
    assert load_model(read_checkpoint(tmp_path / "last.pt"))(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        4,
    )
    torch.save(content | change, tmp_path / "last.pt")
    with pytest.raises(UserError, match=message):
        load_model(read_checkpoint(tmp_path / "last.pt"))
