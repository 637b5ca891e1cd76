"""image_files.py: pictures of every mode, those that cannot be read, workers that fail, and the
cache."""

import functools
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import files
from common.errors import UserError, printable
from datasets import decoding, image_cache, image_files
from tests.helpers.makers import cifar_fails as fails
from tests.helpers.makers import decoded_anew, make_folders
from tests.helpers.makers import load_cifar as load

# ---- pictures ------------------------------------------------------------------------------------


def test_grey_palette_and_transparent_images_become_rgb(tmp_path, recwarn):
    make_folders(tmp_path)
    folder = tmp_path / "cifar100/train/cat"
    Image.new("L", (20, 16), 77).save(folder / "000.png")
    Image.new("RGBA", (20, 16), (1, 2, 3, 128)).save(folder / "001.png")
    palette = Image.new("RGB", (20, 16), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(folder / "002.png", transparency=bytes([0, 255]))
    train, _ = load(tmp_path)
    # on white
    assert train.images[:3, 5, 5].tolist() == [[77, 77, 77], [128, 128, 129], [255, 255, 255]]
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


@pytest.mark.parametrize(
    "spoil,why",
    [
        (lambda path: path.write_text("this is text"), "not an image"),
        (truncated, "truncated"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (deep, "8 bits"),
    ],
)
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
    for limit in (80_000, 40_000):  # PIL warns above the limit, and raises above twice the limit
        monkeypatch.setattr(image_files, "MAX_PIXELS", limit)
        fails(tmp_path, bomb, "has 300x310 pixels: more than", image_size=16)
    assert Image.MAX_IMAGE_PIXELS == 89478485  # other people's is as it was


def test_an_image_that_is_too_small(tmp_path):
    make_folders(tmp_path, size=(8, 8))
    fails(tmp_path, "8x8", "--image-size")
    assert load(tmp_path, image_size=16)[0].image_size == (16, 16)


def photo(height=20, width=30, channels=3):
    """Smooth, so that JPEG keeps it nearly as it is."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (
        255 * np.stack([down, across, down * across, 0.5 + across / 2], -1)[..., :channels]
    ).astype(np.uint8)


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def pillow_writes(names):
    """Those whose format the installed Pillow can write: AVIF and QOI came late."""
    Image.init()
    return [
        name
        for name in names
        if Image.registered_extensions().get(Path(name).suffix.lower()) in Image.SAVE
    ]


# How a camera's picture has to be turned, by number: as EXIF says where row 0 and column 0 are to
# be seen.
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("number", SEEN)
@pytest.mark.parametrize(
    "ending, options, most",
    [
        each
        for each in (
            ("png", {}, 0),
            ("tif", {}, 0),
            ("webp", {"lossless": True}, 0),
            ("jpg", {"quality": 98, "subsampling": 0}, 4),
            ("avif", {"quality": 98}, 12),
        )
        if pillow_writes([f"a.{each[0]}"])
    ],
)
def test_pictures_are_opened_the_way_up_that_the_camera_says(
    tmp_path, number, ending, options, most
):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(photo()).save(path, exif=with_orientation(number), **options)
    upright = np.asarray(image_files.open_rgb(path)).astype(int)
    assert (
        upright.shape == SEEN[number](photo()).shape
        and abs(upright - SEEN[number](photo())).max() <= most
    )
    if ending in ("png", "webp", "jpg"):  # of the others PIL turns the pixels itself
        raw = np.asarray(image_files.open_rgb(path, upright=False)).astype(int)
        assert raw.shape == (20, 30, 3) and abs(raw - photo()).max() <= most


def test_damaged_exif_data_do_not_hide_a_picture(tmp_path):
    path = tmp_path / "a.jpg"
    for junk in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0junk",
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\1abcd",
    ):
        Image.fromarray(photo()).save(path, exif=junk)
        assert image_files.open_rgb(path).size == (30, 20)


def test_turned_pictures_count_as_they_are_seen(tmp_path):
    """Of one size when they are upright; and the cache holds them so."""
    make_folders(tmp_path, size=(20, 16))
    turned = tmp_path / "cifar100/train/cat/000.png"
    Image.fromarray(photo(20, 16)).save(turned, exif=with_orientation(6))
    for _ in range(2):
        assert (load(tmp_path)[0].images[0].numpy() == SEEN[6](photo(20, 16))).all()
    Image.fromarray(photo(16, 20)).save(turned, exif=with_orientation(6))
    fails(tmp_path, "001.png is 20x16 pixels, the images before it are 16x20")


@pytest.mark.parametrize(
    "make",
    [
        lambda rgb, alpha: Image.fromarray(np.dstack([rgb, alpha])),
        lambda rgb, alpha: Image.fromarray(np.where(alpha[..., None] > 0, rgb, 0)).convert("RGBA"),
    ],
)
def test_what_is_transparent_is_white_whatever_colour_it_hides(tmp_path, make):
    """Three files that every viewer shows alike: black, green and noise hidden behind what is
    transparent."""
    alpha = np.where(photo()[..., 0] > 127, 255, 0).astype(np.uint8)
    expected = np.where(alpha[..., None] > 0, photo(), 255)
    for hidden in (0, (0, 255, 0), np.random.default_rng(0).integers(0, 256, (20, 30, 3))):
        rgb = np.where(alpha[..., None] > 0, photo(), hidden).astype(np.uint8)
        path = tmp_path / "a.png"
        Image.fromarray(np.dstack([rgb, alpha])).save(path)
        assert (np.asarray(image_files.open_rgb(path)) == expected).all()


def test_every_kind_of_transparency(tmp_path):
    half = [round((1 - 100 / 255) * 255 + 100 / 255 * value) for value in (200, 50, 0)]
    grey = Image.new("LA", (20, 20), (200, 100))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([1, 2, 3, 200, 50, 0])
    for name, image, options, expected in (
        ("rgba.png", Image.new("RGBA", (20, 20), (200, 50, 0, 100)), {}, half),
        ("la.png", grey, {}, [half[0]] * 3),
        ("p.png", palette, {"transparency": bytes([255, 100])}, half),
        ("p.gif", palette, {"transparency": 1}, [255] * 3),
        (
            "rgb.png",
            Image.new("RGB", (20, 20), (200, 50, 0)),
            {"transparency": (200, 50, 0)},
            [255] * 3,
        ),
        ("l.png", Image.new("L", (20, 20), 9), {"transparency": 9}, [255] * 3),
        ("opaque.png", Image.new("RGBA", (20, 20), (200, 50, 0, 255)), {}, [200, 50, 0]),
        ("rgba.webp", Image.new("RGBA", (20, 20), (200, 50, 0, 0)), {"lossless": True}, [255] * 3),
        ("rgba.tif", Image.new("RGBA", (20, 20), (200, 50, 0, 100)), {}, half),
    ):
        image.save(tmp_path / name, **options)
        opened = np.asarray(image_files.open_rgb(tmp_path / name)).astype(int)
        assert opened.shape == (20, 20, 3) and abs(opened - expected).max() <= 1, name


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_phones_largest_photo_is_decoded_smaller(tmp_path, orientation):
    """12000x9000, 108 megapixels, beyond PIL's own limit. A JPEG decoder can do it at a quarter."""
    down, across = np.ogrid[:9000, :12000]
    Image.fromarray((down // 64).astype(np.uint8) + (across // 64).astype(np.uint8)).save(
        tmp_path / "phone.jpg", quality=90, exif=with_orientation(orientation)
    )
    image = image_files.open_rgb(tmp_path / "phone.jpg")
    assert image.size == ((3000, 2250) if orientation == 1 else (2250, 3000))
    y, x = (2000, 1500) if orientation == 1 else (1500, 2250 - 1 - 2000)
    expected = (8000 // 64 + 6000 // 64) % 256
    assert abs(int(np.asarray(image)[y, x, 0]) - expected) <= 2
    images = decoding.decode_images(
        [tmp_path / "phone.jpg"], decoding.Decoding((32, 32), True), progress=False
    ).images
    assert images.shape == (1, 32, 32, 3)


def test_what_no_decoder_reduces_is_read_whole_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "REDUCED_ABOVE", 400)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 600)
    for ending in ("png", "bmp", "gif"):
        Image.fromarray(photo()).save(tmp_path / f"a.{ending}")
        assert image_files.open_rgb(tmp_path / f"a.{ending}").size == (30, 20)
        Image.fromarray(photo(20, 31)).save(tmp_path / f"b.{ending}")
        with pytest.raises(
            UserError, match=f"b.{ending} has 31x20 pixels: more than 0 megapixels are not read"
        ):
            image_files.open_rgb(tmp_path / f"b.{ending}")


def test_every_ending_that_pillow_decodes_counts(tmp_path, capsys):
    make_folders(tmp_path)
    folder = tmp_path / "cifar100/train/cat"
    names = pillow_writes(["a.jfif", "b.avif", "c.JPG", "d.jp2", "e.tga", "f.pgm", "g.qoi"])
    for name in names:
        Image.new("RGB", (20, 16), (9, 9, 9)).convert("L" if name == "f.pgm" else "RGB").save(
            folder / name
        )
    for name in ("h.HEIC", "i.heic", "notes.txt", "README", ".hidden.png", "script.eps"):
        (folder / name).write_text("")
    (folder / "more").mkdir()
    Image.new("RGB", (20, 16)).save(folder / "more/a.png")  # belongs to the class
    train, _ = load(tmp_path)
    assert train.labels.tolist().count(0) == 4 + len(names)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'cifar100/train'}: passed over 5 of {12 + len(names)} names without "
        "an ending of an image format that Pillow reads "
        "here (2 .heic, 1 no ending, 1 .txt, 1 .eps): cat/README, cat/h.HEIC, "
        "cat/i.heic and 2 more\n"
    )


def test_what_other_programs_decode_is_not_opened_under_another_name(tmp_path):
    """Pillow goes by the content; an EPS would be given to Ghostscript."""
    Image.new("RGB", (20, 16)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png cannot be read as an image \(not an image\)"):
        image_files.open_rgb(tmp_path / "a.png")


def test_a_name_is_printed_on_one_line():
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[31m")) == r"caf\xe9\n\x1b[31m"
    assert printable("caf\u00e9 \U0001f426") == "caf\u00e9 \U0001f426"


def test_threads_that_open_images_leave_pillow_as_it_was(tmp_path, monkeypatch):
    """Its limit and Python's warnings belong to the whole process."""
    monkeypatch.setattr(image_files, "MAX_PIXELS", 2000)
    for name, side in (("small", 40), ("large", 50)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    before, errors = (Image.MAX_IMAGE_PIXELS, list(warnings.filters)), []

    def read():
        for _ in range(40):
            assert image_files.open_rgb(tmp_path / "small.png").size == (40, 40)
            try:
                image_files.open_rgb(tmp_path / "large.png")
            except UserError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 6 * 40 and all("50x50 pixels" in error for error in errors)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


# ---- workers -------------------------------------------------------------------------------------

DECODE_CHUNK = decoding._decode_chunk


def dying_chunk(parent, *words):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return DECODE_CHUNK(*words)


def failing_chunk(parent, *words):
    if os.getpid() != parent:
        raise MemoryError("a worker's")
    return DECODE_CHUNK(*words)


@pytest.mark.parametrize("chunk", [dying_chunk, failing_chunk])
def test_a_worker_that_dies_or_fails_is_replaced_by_the_main_process(
    tmp_path, monkeypatch, capsys, chunk
):
    make_folders(tmp_path)
    paths = sorted(tmp_path.glob("cifar100/train/*/*.png"))
    monkeypatch.setattr(decoding, "CHUNK", 1)
    monkeypatch.setattr(decoding, "_decode_chunk", functools.partial(chunk, os.getpid()))
    images = decoding.decode_images(
        paths, decoding.Decoding((16, 20), False), num_workers=1, progress=False
    ).images
    assert (images.numpy() == np.stack([np.asarray(Image.open(path)) for path in paths])).all()
    assert capsys.readouterr().out.count("continuing in the main process") == 1


def test_no_processes_to_be_had(tmp_path, monkeypatch):
    make_folders(tmp_path)

    def refuse(self, *args):
        raise OSError("no processes left")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse)
    assert len(load(tmp_path, num_workers=2)[0]) == 6


# ---- cache ---------------------------------------------------------------------------------------


def test_cache(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)
    titles, first = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train", "cifar100-test"]
    titles, second = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == [] and all(
        torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True)
    )

    changed = tmp_path / "cifar100/train/cat/000.png"
    # another image: decoded again, and the old cache goes
    Image.new("RGB", (20, 16), (1, 2, 3)).save(changed)
    titles, third = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and third[0].images[0, 0, 0].tolist() == [1, 2, 3]
    os.utime(changed, (1, 1))  # another time
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == ["cifar100-train"]
    changed.rename(changed.with_name("zzz.png"))  # another name
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == ["cifar100-train"]
    assert len(list((tmp_path / ".cache").iterdir())) == 4  # pixels and the rest of each split

    # a size of its own, beside another
    assert len(decoded_anew(load, tmp_path, monkeypatch, image_size=16)[0]) == 2
    assert decoded_anew(load, tmp_path, monkeypatch, image_size=16)[0] == []
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == []
    monkeypatch.setattr(image_cache, "CACHE_VERSION", 10**6)
    assert len(decoded_anew(load, tmp_path, monkeypatch)[0]) == 2
    assert (
        len(list((tmp_path / ".cache").iterdir())) == 8 and "damaged" not in capsys.readouterr().out
    )


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "ending, spoil",
    [
        ("npy", lambda path: path.write_bytes(b"")),
        ("npy", lambda path: path.write_bytes(b"text")),
        ("npy", flip_a_byte),
        ("npy", cut),
        ("npy", lambda path: path.unlink()),
        ("npy", lambda path: np.save(path, np.zeros((6, 64, 64, 3), np.uint8))),
        ("pt", lambda path: path.write_bytes(b"")),
        ("pt", cut),
        ("pt", lambda path: torch.save({"key": "x"}, path)),
        ("pt", lambda path: change(path, thumbnails=torch.zeros(6, 64, dtype=torch.uint8))),
        ("pt", lambda path: change(path, sizes=torch.zeros(6, 2))),
        ("pt", lambda path: change(path, crc32=1)),
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys, ending, spoil):
    make_folders(tmp_path, size=(64, 64))
    first = load(tmp_path)[0].images.clone()  # what is loaded is mapped from the file
    spoil(next((tmp_path / ".cache").glob(f"cifar100-train-*.{ending}")))
    titles, second = decoded_anew(load, tmp_path, monkeypatch)
    assert titles == ["cifar100-train"] and torch.equal(first, second[0].images)
    assert capsys.readouterr().out.count("is damaged") == 1
    assert decoded_anew(load, tmp_path, monkeypatch)[0] == []


def change(path, **values):
    torch.save(torch.load(path) | values, path)


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
    others = [
        cache / name
        for name in (
            "mine.pt",
            ".a.pt.b.tmp",
            ".learn-to-pay-attention-notes.tmp",
            "cifar100-train-0123456789abcdef0123.pt",
        )
    ]
    for path in (old, new, *others):
        path.write_text("x")
        os.utime(path, (1, 1)) if path != new else None
    load(tmp_path)
    assert not old.exists() and new.exists() and all(path.read_text() == "x" for path in others)
