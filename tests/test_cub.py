"""cub.py: values against PIL by hand, every bad input and its message, cache and workers."""

import functools
import hashlib
import io
import os
import shutil
import signal
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import cub_present, place_on
from datasets import cub, decoding, image_cache, image_files
from datasets.cub import CUB_FOLDER
from tests.helpers.makers import BIRD_SIZE as SIZE
from tests.helpers.makers import BIRDS, decoded_anew
from tests.helpers.makers import birds_fail as fails
from tests.helpers.makers import load_birds as load

REAL = Path(__file__).parent.parent / "data"
TRAIN, TEST = (3, 7, 12), (4, 9)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- pictures and places -------------------------------------------------------------------------


def by_hand(root, number, crop):
    """What a picture and its parts should be: PIL, and one part after the other."""
    name, _, _, (width, height), _, parts = BIRDS[number]
    x0, y0, x1, y1 = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    image = Image.open(root / CUB_FOLDER / "images" / name).crop((x0, y0, x1, y1))
    places = []
    for x, y, seen in parts:
        inside = seen and x0 <= x < x1 and y0 <= y < y1
        places.append(
            [(x - x0) / (x1 - x0) * SIZE, (y - y0) / (y1 - y0) * SIZE, 1.0]
            if inside
            else [0.0, 0.0, 0.0]
        )
    return (
        np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)),
        torch.tensor(places),
        (x0, y0, x1, y1),
    )


@pytest.mark.parametrize("crop,margin", [("box", 0.0), ("box", 0.25), ("box", 3.0), ("whole", 0.0)])
def test_pictures_boxes_and_parts(root, crop, margin):
    for ids, loaded in zip((TRAIN, TEST), load(root, crop=crop, margin=margin), strict=True):
        assert loaded.class_names == ("Red bird", "Blue bird") and loaded.part_names == (
            "left eye",
            "tail",
        )
        assert (
            loaded.labels.tolist() == [{1: 0, 4: 1}[BIRDS[i][1]] for i in ids]
            and loaded.labels.dtype == torch.int64
        )
        assert (
            loaded.images.dtype == torch.uint8
            and loaded.boxes.dtype == loaded.parts.dtype == torch.float32
        )
        for i, image, box, parts in zip(
            ids, loaded.images, loaded.boxes, loaded.parts, strict=True
        ):
            x, y, width, height = BIRDS[i][4]
            bird = [round(x), round(y), round(x + width), round(y + height)]
            more = round(margin * max(bird[2] - bird[0], bird[3] - bird[1]))
            grown = (bird[0] - more, bird[1] - more, bird[2] + more, bird[3] + more)
            pixels, places, shown = by_hand(root, i, grown if crop == "box" else (0, 0, 999, 999))
            assert (image.numpy() == pixels).all()
            torch.testing.assert_close(parts, places)
            bird = np.clip(bird, [0, 0, 0, 0], BIRDS[i][3] * 2)
            across, down = SIZE / (shown[2] - shown[0]), SIZE / (shown[3] - shown[1])
            expected = (bird - np.array(shown[:2] * 2)) * [across, down, across, down]
            np.testing.assert_allclose(box.numpy(), expected, rtol=1e-6, atol=1e-5)
            if crop == "box" and not margin:
                assert box.tolist() == [0, 0, SIZE, SIZE]


def test_subset_and_device_carry_boxes_and_parts(root):
    train, _ = load(root, crop="whole")
    part = train.subset([2, 0]).to("cpu")
    assert torch.equal(part.parts, train.parts[[2, 0]]) and torch.equal(
        part.boxes, train.boxes[[2, 0]]
    )
    assert part.part_names == train.part_names and part.labels.tolist() == [1, 0]
    assert (
        torch.equal(place_on(train, "cpu").parts, train.parts)
        and str(root / CUB_FOLDER) in train.source
    )


def test_without_parts(root):
    shutil.rmtree(root / CUB_FOLDER / "parts")
    train, test = load(root)
    assert (
        train.parts is test.parts is None
        and train.part_names == ()
        and train.subset([0]).parts is None
    )


def test_grey_palette_transparent_and_cmyk_images_become_rgb(root, recwarn):
    images = root / CUB_FOLDER / "images"
    colour = Image.new("RGB", (50, 40), (90, 80, 70))
    for image, path, expected in (
        (Image.new("L", (50, 40), 77), TRAIN[0], [77] * 3),
        (colour.convert("P", palette=Image.Palette.ADAPTIVE), TRAIN[1], [90, 80, 70]),
        (Image.new("RGBA", (50, 40), (1, 2, 3, 9)), TRAIN[2], [246] * 3),
    ):
        image.save(images / BIRDS[path][0])
        assert load(root)[0].images[TRAIN.index(path), 5, 5].tolist() == expected
    colour.convert("CMYK").save(images / BIRDS[TRAIN[0]][0], format="jpeg")
    assert abs(load(root)[0].images[0].int() - torch.tensor([90, 80, 70])).max() < 4
    assert not recwarn.list


@pytest.mark.parametrize(
    "names,expected",
    [
        (("001.Red_bird", "002.Red_bird"), ("001.Red_bird", "002.Red_bird")),
        (("a.b_c", "2.x"), ("a.b c", "x")),
        (("001.", "002.x"), ("001.", "002.x")),
        (("1.a_b", "2.a b"), ("1.a_b", "2.a b")),
    ],
)
def test_class_names(root, names, expected):
    (root / CUB_FOLDER / "classes.txt").write_text(f"1 {names[0]}\n4 {names[1]}\n")
    assert load(root)[0].class_names == expected


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file,old,new,words",
    [
        ("images", "4 001.Red_bird/b.png\n", "4\n", ["line 2", "2 fields"]),
        ("images", "4 001", "four 001", ["line 2", "'four'", "whole number"]),
        ("images", "4 001", "-4 001", ["line 2", "whole number"]),
        ("images", "4 001", "9" * 5000 + " 001", ["line 2", "whole number"]),
        ("images", "4 001", "\u0664 001", ["line 2", "whole number"]),
        ("images", "4 001", "3 001", ["line 2", "id 3 is already on line 1"]),
        ("images", "001.Red_bird/b.png", "001.Red_bird/a.png", ["line 2", "already on line 1"]),
        (
            "images",
            "001.Red_bird/b.png",
            "/etc/passwd",
            ["line 2", "'/etc/passwd'", "inside images/"],
        ),
        ("images", "001.Red_bird/b.png", "../../b.png", ["line 2", "inside images/"]),
        ("images", "001.Red_bird/b.png", "001.Red_bird\\b.png", ["line 2", "inside images/"]),
        ("images", "001.Red_bird/b.png", "C:b.png", ["line 2", "inside images/"]),
        ("images", "001.Red_bird/b.png", "b\0.png", ["line 2", "cannot be printed"]),
        (
            "images",
            "4 001.Red_bird/b.png\n",
            "",
            ["image_class_labels.txt, line 2", "4 is not in images.txt"],
        ),
        ("image_class_labels", "4 1\n", "", ["no row for image id 4", "1 missing"]),
        (
            "image_class_labels",
            "4 1\n",
            "4 1\n5 1\n",
            ["line 3", "image id 5 is not in images.txt"],
        ),
        ("image_class_labels", "4 1", "4 1\n4 1", ["line 3", "image id 4 is already on line 2"]),
        ("image_class_labels", "4 1", "4 2", ["line 2", "class id 2 is not in classes.txt"]),
        ("image_class_labels", "4 1", "4 1.0", ["line 2", "'1.0' is not a whole number"]),
        ("image_class_labels", "4 1", "4 1 1", ["line 2", "'1 1' is not a whole number"]),
        ("train_test_split", "3 1", "3 2", ["line 1", "'2' is neither 1 (train) nor 0 (test)"]),
        ("train_test_split", "3 1", "3 0", ["no training image of class '001.Red_bird'"]),
        ("train_test_split", "4 0", "", ["no row for image id 4"]),
        ("bounding_boxes", "20.5", "nan", ["line 1", "not numbers of pixels"]),
        ("bounding_boxes", "20.5", "inf", ["line 1", "not numbers of pixels"]),
        ("bounding_boxes", "20.5", "1e300", ["line 1", "not numbers of pixels"]),
        ("bounding_boxes", "20.5", "wide", ["line 1", "3.2 4.6 wide 15.1"]),
        ("bounding_boxes", "20.5", "", ["line 1", "expected 5 fields, found 4"]),
        ("bounding_boxes", "20.5", "0.0", ["line 1", "holds no pixel"]),
        ("bounding_boxes", "20.5", "-7", ["line 1", "holds no pixel"]),
        ("bounding_boxes", "3.2", "-99", ["line 1", "holds no pixel"]),
        ("bounding_boxes", "3.2", "50.0", ["line 1", "a.png", "50x40"]),
        ("classes", "001.Red_bird", "004.Blue_bird", ["line 2", "already on line 1"]),
        ("classes", "001.Red_bird", "red/bird", ["line 2", "holds a / or"]),
        ("classes", "001.Red_bird", "red\\bird", ["line 2", "holds a / or"]),
        ("classes", "001.Red_bird", "Red_bird\n8 Third", ["no training image of class 'Third'"]),
        ("classes", "001.Red_bird", "001.Red\u2028bird", ["line 2", "cannot be printed"]),
        ("parts/parts", "2 tail\n", "", ["part_locs.txt, line 2", "part id 2 is not in parts.txt"]),
        ("parts/parts", "2 tail", "2 tail\n3 beak", ["no row for part 3 of image id 3"]),
        ("parts/part_locs", "4 1 1.0 2.0 1\n", "", ["no row for part 1 of image id 4"]),
        (
            "parts/part_locs",
            "4 1 1.0",
            "3 1 1.0",
            ["line 3", "part 1 of image id 3 is already on line 1"],
        ),
        ("parts/part_locs", "4 1 1.0", "5 1 1.0", ["line 3", "image id 5 is not in images.txt"]),
        ("parts/part_locs", "4 1 1.0 2.0 1", "4 1 1.0 2.0 2", ["line 3", "'2' is neither"]),
        ("parts/part_locs", "4 1 1.0", "4 1 x", ["line 3", "not numbers of pixels"]),
    ],
)
def test_bad_metadata(root, file, old, new, words):
    path = root / CUB_FOLDER / f"{file}.txt"
    change(path, old, new)
    fails(root, *words, crop="whole")
    fails(root, root / CUB_FOLDER, *words)


FILES = [
    "classes",
    "images",
    "image_class_labels",
    "train_test_split",
    "bounding_boxes",
    "parts/parts",
    "parts/part_locs",
]


@pytest.mark.parametrize("file", FILES)
def test_metadata_files_that_cannot_be_read(root, monkeypatch, file):
    path = root / CUB_FOLDER / f"{file}.txt"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))  # line ends of another system are no error
    load(root)
    path.write_bytes(whole.replace(b"1", b"1\xff", 1))
    fails(root, path, "line ", "not UTF-8")
    path.write_bytes(b" \n\n")
    fails(root, path, "is empty")
    monkeypatch.setattr(cub, "MAX_METADATA_BYTES", 1000)
    path.write_bytes(whole + b"\n" * 1001)
    fails(root, path, "larger than 0 MiB")
    path.unlink()
    fails(root, path, "No such file", "official archive")
    os.mkfifo(path)
    fails(root, path, "not a file")


def test_no_images_in_a_split(root):
    path = root / CUB_FOLDER / "train_test_split.txt"
    for value, word in (("1", "no test images"), ("0", "no training images")):
        path.write_text("".join(f"{i} {value}\n" for i in BIRDS))
        fails(root, path, word)


def truncated_jpeg(path):
    buffer = io.BytesIO()
    Image.effect_noise((50, 40), 90).convert("RGB").save(buffer, "jpeg")
    path.write_bytes(buffer.getvalue()[:-300])


@pytest.mark.parametrize(
    "spoil,why",
    [
        (truncated_jpeg, "truncated"),
        (lambda path: path.write_text("this is text"), "not an image"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (Path.unlink, "No such file"),
        (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
        (
            lambda path: Image.new("RGB", (300, 200)).save(path),
            "has 300x200 pixels: more than 0 megapixels",
        ),
    ],
)
@pytest.mark.parametrize("number", [TRAIN[1], TEST[0]])
def test_unreadable_images(root, monkeypatch, spoil, why, number):
    path = root / CUB_FOLDER / "images" / BIRDS[number][0]
    spoil(path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 40_000)
    fails(root, path, why, "Replace or remove", "rows")
    assert len(list((root / ".cache").glob("*.npy"))) == (number in TEST)


def test_bad_options(root):
    fails(root, "--image-size 15", image_size=15)
    for margin in (-0.1, float("nan"), float("inf")):
        fails(root, "margin", margin=margin)
    with pytest.raises(ValueError, match="box or whole"):
        load(root, crop="bird")


@pytest.mark.parametrize(
    "place, data_dir",
    [
        (["cub_200_2011"], "."),
        (["CUB_200_2011", "CUB_200_2011"], "."),
        (["CUB_200_2011"], "CUB_200_2011"),
        (["cub2002011", "CUB_200_2011"], "."),
        (["birds"], "birds"),
        (["Cub_200_2011", "cub_200_2011"], "."),
    ],
)
def test_birds_one_level_off_are_found_and_nothing_is_downloaded(
    root, monkeypatch, place, data_dir
):
    expected = load(root)
    (root / CUB_FOLDER).rename(root / "official")
    target = root.joinpath(*place)
    target.parent.mkdir(exist_ok=True)
    (root / "official").rename(target)
    monkeypatch.setattr(cub, "fetch", None)
    assert cub_present(root / data_dir)
    train, test = load(root / data_dir, download=True)
    assert torch.equal(train.images, expected[0].images) and torch.equal(
        test.parts, expected[1].parts
    )


def test_an_archive_of_birds_one_level_off_is_unpacked_where_it_lies(root, monkeypatch):
    archive = root / CUB_FOLDER / cub.CUB_ARCHIVE
    with tarfile.open(root / "made.tgz", "w:gz") as tar:
        tar.add(root / CUB_FOLDER, CUB_FOLDER)
    shutil.rmtree(root / CUB_FOLDER)
    archive.parent.mkdir()
    (root / "made.tgz").rename(archive)
    monkeypatch.setattr(cub, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert cub_present(root) and len(load(root)[0]) == len(TRAIN)
    assert sorted(p.name for p in archive.parent.iterdir()) == [CUB_FOLDER, archive.name]
    assert len(load(root)[0]) == len(TRAIN)  # found there again


def test_metadata_with_a_mark_of_their_encoding(root):
    """As some editors write it: the first id would be no number."""
    expected = load(root)
    for path in (root / CUB_FOLDER).rglob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(load(root)[0].boxes, expected[0].boxes)


def test_boxes_are_in_pixels_of_the_file_so_birds_are_not_turned(root):
    expected = load(root)[0].images.clone()
    path = root / CUB_FOLDER / "images" / BIRDS[TRAIN[0]][0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    for crop in ("box", "whole"):
        load(root, crop=crop)
    assert torch.equal(load(root)[0].images, expected)


def test_mistyped_data_dir(root):
    fails(
        root / "nowhere",
        "no CUB-200-2011 in",
        "but there is one at",
        f"give --data-dir {root}",
        download=True,
    )
    for inside in ("images", "images/001.Red_bird"):
        fails(
            root / CUB_FOLDER / inside,
            f"but there is one at {root / CUB_FOLDER}: give --data-dir {root}",
            download=True,
        )
    fails(root.parent / "nowhere", "does not exist", cub.CUB_URL, cub.CUB_MD5, "--sample")
    fails(root / "no" / "where", "does not exist", download=True)
    empty = root.parent / "empty"
    empty.mkdir()
    fails(empty, "no CUB-200-2011 in", empty / cub.CUB_ARCHIVE)
    (root.parent / "file").write_text("")
    fails(root.parent / "file", "is a file", download=True)
    assert cub_present(root) and not cub_present(empty) and not cub_present(root.parent / "file")
    shutil.rmtree(root / CUB_FOLDER / "images")
    fails(root, BIRDS[TRAIN[0]][0], "No such file")


# ---- workers -------------------------------------------------------------------------------------


def dying_chunk(parent, files, *options):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return decoding._decode_chunk(files, *options)


def failing_chunk(parent, files, *options):
    if os.getpid() != parent and files[0][0].name == "a.png":  # the other chunks are the worker's
        raise MemoryError("a worker's")
    return decoding._decode_chunk(files, *options)


@pytest.mark.parametrize(
    "chunk,reason", [(dying_chunk, "it was killed"), (failing_chunk, "a worker's")]
)
def test_workers(root, monkeypatch, capsys, chunk, reason):
    """What a worker does not give, because it was killed or had no memory, the main process
    decodes."""
    paths = [root / CUB_FOLDER / "images" / BIRDS[i][0] for i in BIRDS]
    crops = [(1, 2, 20 + i, 30) for i in BIRDS]
    decode = functools.partial(
        decoding.decode_images,
        paths,
        decoding.Decoding((SIZE, SIZE), True),
        progress=False,
        crops=crops,
    )
    expected = decode()
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 2 * SIZE * SIZE * 3)  # two images a chunk
    worker, submit = functools.partial(chunk, os.getpid()), ProcessPoolExecutor.submit
    monkeypatch.setattr(
        ProcessPoolExecutor, "submit", lambda self, decode, *args: submit(self, worker, *args)
    )
    got = decode(num_workers=1)
    assert all(
        torch.equal(a, b) for a, b in zip(expected[:4], got[:4], strict=True)
    ) and got.crops.tolist()[0] == [
        1,
        2,
        23,
        30,
    ]
    assert got.sizes.tolist() == [list(BIRDS[i][3]) for i in BIRDS]
    out = capsys.readouterr().out
    assert out.count("continuing in the main process") == 1 and reason in out


def test_few_chunks_are_in_flight_at_a_time(root, monkeypatch):
    """Chunks that wait, done, for one that takes long must not fill the memory."""
    paths, open_tasks, most = [root / CUB_FOLDER / "images" / BIRDS[3][0]] * 30, set(), []

    class Pool:
        def __init__(self, workers, context):
            assert workers == 2

        def submit(self, decode, *args):
            task = SimpleNamespace(result=lambda: open_tasks.discard(id(task)) or decode(*args))
            open_tasks.add(id(task))
            most.append(len(open_tasks))
            return task

        def shutdown(self, **options):
            assert not open_tasks

    monkeypatch.setattr(decoding, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(decoding, "CHUNK", 2)
    images = decoding.decode_images(
        paths, decoding.Decoding((SIZE, SIZE), True), num_workers=2, progress=False
    ).images
    assert len(most) == 15 and max(most) == 4 and (images == images[0]).all()


# ---- cache ---------------------------------------------------------------------------------------


def test_cache(root, monkeypatch, capsys):
    both = ["cub-train-box", "cub-test-box"]
    titles, first = decoded_anew(load, root, monkeypatch)
    assert titles == both
    titles, second = decoded_anew(load, root, monkeypatch)
    assert titles == []
    for one, other in zip(first, second, strict=True):
        assert all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("images", "boxes", "parts")
        )

    image = root / CUB_FOLDER / "images" / BIRDS[TEST[0]][0]
    Image.new("RGB", (60, 60), (1, 2, 3)).save(image)
    titles, loaded = decoded_anew(load, root, monkeypatch)
    assert titles == both[1:] and loaded[1].images[0, 0, 0].tolist() == [1, 2, 3]
    change(root / CUB_FOLDER / "bounding_boxes.txt", "3.2", "9.2")
    titles, loaded = decoded_anew(load, root, monkeypatch)
    assert (
        titles == both[:1]
        and (loaded[0].images[0].numpy() == by_hand(root, 3, (9, 5, 30, 20))[0]).all()
    )
    # parts and labels are not in the cache
    change(root / CUB_FOLDER / "parts/part_locs.txt", "12.5", "13.5")
    assert decoded_anew(load, root, monkeypatch)[0] == []
    assert [decoded_anew(load, root, monkeypatch, margin=0.2)[0] for _ in range(2)] == [both, []]
    # another margin replaces; another crop or size stays beside
    assert len(list((root / ".cache").iterdir())) == 4

    assert len(decoded_anew(load, root, monkeypatch, crop="whole")[0]) == 2
    change(root / CUB_FOLDER / "bounding_boxes.txt", "9.2", "3.2")
    assert decoded_anew(load, root, monkeypatch, crop="whole")[0] == []
    assert len(decoded_anew(load, root, monkeypatch, image_size=32)[0]) == 2
    assert len(list((root / ".cache").iterdir())) == 12 and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["crops", "sizes", "thumbnails", "key"])
def test_a_changed_cache_is_made_again(root, monkeypatch, capsys, name):
    first = load(root)[0].images.clone()
    path = next((root / ".cache").glob("cub-train-*.pt"))
    content = torch.load(path, weights_only=True)
    content[name] = "another" if name == "key" else content[name] + 1
    torch.save(content, path)
    titles, second = decoded_anew(load, root, monkeypatch)
    assert titles == ["cub-train-box"] and torch.equal(first, second[0].images)
    assert capsys.readouterr().out.count("is damaged") == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_the_cache_is_mapped_not_read(root, monkeypatch):
    monkeypatch.setattr(image_cache, "CHECKSUM_BYTES", 1000)  # a checksum of many pieces
    sets = [load(root), load(root)]  # made, and found
    for path in (root / ".cache").glob("*.npy"):
        assert Path("/proc/self/maps").read_text().count(str(path)) == 2
    assert torch.equal(sets[0][0].images, sets[1][0].images)


# ---- real birds ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / CUB_FOLDER).is_dir(), reason="no CUB_200_2011 in data/")
def test_real_birds(tmp_path):
    """The metadata of all, and the first class's images, linked into a folder of their own."""
    birds, parts, class_names, part_names = cub.read_metadata(REAL / CUB_FOLDER)
    whole = len(class_names) == 200
    assert (len(birds), len(class_names)) == ((11788, 200) if whole else (2290, 40))
    assert sum(bird.train for bird in birds) == (5994 if whole else 1200)
    assert (
        parts.shape == (len(birds), 15, 3)
        and part_names[6] == "left eye"
        and class_names[4] == "Crested Auklet"
    )
    folder = tmp_path / CUB_FOLDER
    folder.mkdir()
    (folder / "images").symlink_to(REAL / CUB_FOLDER / "images")
    (folder / "classes.txt").write_text("1 001.Black_footed_Albatross\n")
    for name in FILES[1:5]:
        lines = (REAL / CUB_FOLDER / f"{name}.txt").read_text().splitlines(keepends=True)
        (folder / f"{name}.txt").write_text("".join(lines[:60]))
    train, test = load(tmp_path, image_size=96, crop="whole")
    assert (len(train), len(test)) == (30, 30) and test.class_names == ("Black footed Albatross",)
    with Image.open(birds[0].path) as image:
        scale = np.array([96 / image.width, 96 / image.height] * 2)
    x, y, width, height = map(float, (folder / "bounding_boxes.txt").read_text().split()[1:5])
    np.testing.assert_allclose(
        test.boxes[0], np.round([x, y, x + width, y + height]) * scale, rtol=1e-5
    )
