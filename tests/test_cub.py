"""cub.py, cub_sample.py and download.py: values against PIL by hand, every bad input and its message, cache, workers,
downloads from a server on the loopback interface, and crafted archives."""
import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import socket
import tarfile
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cub
import data
import download
import image_files
from cub import CUB_FOLDER, cub_present, load_cub
from cub_sample import MARK_CELL, PART_NAMES, WORDS, cub_sample, draw_bird, write_cub_sample
from image_files import DataError
from sample_data import CELLS, MARKS

REAL = Path(__file__).parent.parent / "data"
SIZE = 24
# id: name, class id, train, (width, height), box x y width height, parts x y visible
BIRDS = {
    3: ("001.Red_bird/a.png", 1, 1, (50, 40), (3.2, 4.6, 20.5, 15.1), ((5.0, 6.0, 1), (12.5, 9.5, 1))),
    4: ("001.Red_bird/b.png", 1, 0, (40, 60), (0.0, 10.0, 40.0, 30.0), ((1.0, 2.0, 1), (0.0, 0.0, 0))),
    7: ("004.Blue_bird/c.png", 4, 1, (64, 64), (30.0, 30.0, 50.0, 20.4), ((63.9, 35.0, 1), (0.0, 0.0, 0))),
    9: ("004.Blue_bird/d.png", 4, 0, (33, 31), (1.0, 1.0, 9.0, 9.0), ((2.0, 3.0, 1), (9.9, 10.0, 1))),
    12: ("004.Blue_bird/e.png", 4, 1, (31, 70), (-4.0, 20.5, 20.0, 60.0), ((3.0, 30.0, 1), (4.0, 5.0, 1))),
}
TRAIN, TEST = (3, 7, 12), (4, 9)


@pytest.fixture(autouse=True)
def fresh_notices():
    image_files._say_once.cache_clear()


@pytest.fixture
def root(tmp_path):
    """A data folder with BIRDS in CUB's layout."""
    folder, rng = tmp_path / "data" / CUB_FOLDER, np.random.default_rng(0)
    (folder / "parts").mkdir(parents=True)
    tables = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": [],
              "parts/part_locs": [], "classes": ["4 004.Blue_bird", "1 001.Red_bird"],
              "parts/parts": ["1 left eye", "2 tail"]}
    for i, (name, label, train, (width, height), box, parts) in BIRDS.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        tables["images"].append(f"{i} {name}")
        tables["image_class_labels"].append(f"{i} {label}")
        tables["train_test_split"].append(f"{i} {train}")
        tables["bounding_boxes"].append(f"{i} {' '.join(map(str, box))}")
        tables["parts/part_locs"] += [f"{i} {p} {x} {y} {seen}" for p, (x, y, seen) in enumerate(parts, 1)]
    for name, lines in tables.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def load(root, **options):
    return load_cub(root, **{"image_size": SIZE, "download": False, "progress": False, **options})


def fails(root, *words, **options):
    """The load fails with one line that holds every word."""
    with pytest.raises(DataError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ------------------------------------------------------------------------------------------------- pictures and places

def by_hand(root, number, crop):
    """What a picture and its parts should be: PIL, and one part after the other."""
    name, _, _, (width, height), _, parts = BIRDS[number]
    x0, y0, x1, y1 = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    image = Image.open(root / CUB_FOLDER / "images" / name).crop((x0, y0, x1, y1))
    places = []
    for x, y, seen in parts:
        inside = seen and x0 <= x < x1 and y0 <= y < y1
        places.append([(x - x0) / (x1 - x0) * SIZE, (y - y0) / (y1 - y0) * SIZE, 1.0] if inside else [0.0, 0.0, 0.0])
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)), torch.tensor(places), (x0, y0, x1, y1)


@pytest.mark.parametrize("crop,margin", [("box", 0.0), ("box", 0.25), ("box", 3.0), ("whole", 0.0)])
def test_pictures_boxes_and_parts(root, crop, margin):
    for ids, loaded in zip((TRAIN, TEST), load(root, crop=crop, margin=margin)):
        assert loaded.class_names == ("Red bird", "Blue bird") and loaded.part_names == ("left eye", "tail")
        assert loaded.labels.tolist() == [{1: 0, 4: 1}[BIRDS[i][1]] for i in ids] and loaded.labels.dtype == torch.int64
        assert loaded.images.dtype == torch.uint8 and loaded.boxes.dtype == loaded.parts.dtype == torch.float32
        for i, image, box, parts in zip(ids, loaded.images, loaded.boxes, loaded.parts):
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
    assert torch.equal(part.parts, train.parts[[2, 0]]) and torch.equal(part.boxes, train.boxes[[2, 0]])
    assert part.part_names == train.part_names and part.labels.tolist() == [1, 0]
    assert torch.equal(data.place_on(train, "cpu").parts, train.parts) and str(root / CUB_FOLDER) in train.source


def test_without_parts(root):
    shutil.rmtree(root / CUB_FOLDER / "parts")
    train, test = load(root)
    assert train.parts is test.parts is None and train.part_names == () and train.subset([0]).parts is None


def test_grey_palette_transparent_and_cmyk_images_become_rgb(root, recwarn):
    images = root / CUB_FOLDER / "images"
    colour = Image.new("RGB", (50, 40), (90, 80, 70))
    for image, path, expected in ((Image.new("L", (50, 40), 77), TRAIN[0], [77] * 3),
                                  (colour.convert("P", palette=Image.Palette.ADAPTIVE), TRAIN[1], [90, 80, 70]),
                                  (Image.new("RGBA", (50, 40), (1, 2, 3, 9)), TRAIN[2], [1, 2, 3])):
        image.save(images / BIRDS[path][0])
        assert load(root)[0].images[TRAIN.index(path), 5, 5].tolist() == expected
    colour.convert("CMYK").save(images / BIRDS[TRAIN[0]][0], format="jpeg")
    assert abs(load(root)[0].images[0].int() - torch.tensor([90, 80, 70])).max() < 4
    assert not recwarn.list


@pytest.mark.parametrize("names,expected", [
    (("001.Red_bird", "002.Red_bird"), ("001.Red_bird", "002.Red_bird")), (("a.b_c", "2.x"), ("a.b c", "x")),
    (("001.", "002.x"), ("001.", "002.x")), (("1.a_b", "2.a b"), ("1.a_b", "2.a b"))])
def test_class_names(root, names, expected):
    (root / CUB_FOLDER / "classes.txt").write_text(f"1 {names[0]}\n4 {names[1]}\n")
    assert load(root)[0].class_names == expected


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("file,old,new,words", [
    ("images", "4 001.Red_bird/b.png\n", "4\n", ["line 2", "2 fields"]),
    ("images", "4 001", "four 001", ["line 2", "'four'", "whole number"]),
    ("images", "4 001", "-4 001", ["line 2", "whole number"]),
    ("images", "4 001", "9" * 5000 + " 001", ["line 2", "whole number"]),
    ("images", "4 001", "\u0664 001", ["line 2", "whole number"]),
    ("images", "4 001", "3 001", ["line 2", "id 3 is already on line 1"]),
    ("images", "001.Red_bird/b.png", "001.Red_bird/a.png", ["line 2", "already on line 1"]),
    ("images", "001.Red_bird/b.png", "/etc/passwd", ["line 2", "'/etc/passwd'", "inside images/"]),
    ("images", "001.Red_bird/b.png", "../../b.png", ["line 2", "inside images/"]),
    ("images", "001.Red_bird/b.png", "001.Red_bird\\b.png", ["line 2", "inside images/"]),
    ("images", "001.Red_bird/b.png", "C:b.png", ["line 2", "inside images/"]),
    ("images", "001.Red_bird/b.png", "b\0.png", ["line 2", "cannot be printed"]),
    ("images", "4 001.Red_bird/b.png\n", "", ["image_class_labels.txt, line 2", "4 is not in images.txt"]),
    ("image_class_labels", "4 1\n", "", ["no row for image id 4", "1 missing"]),
    ("image_class_labels", "4 1\n", "4 1\n5 1\n", ["line 3", "image id 5 is not in images.txt"]),
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
    ("bounding_boxes", "20.5", "", ["line 1", "5 fields are expected, not 4"]),
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
    ("parts/part_locs", "4 1 1.0", "3 1 1.0", ["line 3", "part 1 of image id 3 is already on line 1"]),
    ("parts/part_locs", "4 1 1.0", "5 1 1.0", ["line 3", "image id 5 is not in images.txt"]),
    ("parts/part_locs", "4 1 1.0 2.0 1", "4 1 1.0 2.0 2", ["line 3", "'2' is neither"]),
    ("parts/part_locs", "4 1 1.0", "4 1 x", ["line 3", "not numbers of pixels"]),
])
def test_bad_metadata(root, file, old, new, words):
    path = root / CUB_FOLDER / f"{file}.txt"
    change(path, old, new)
    fails(root, *words, crop="whole")
    fails(root, root / CUB_FOLDER, *words)


FILES = ["classes", "images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/parts",
         "parts/part_locs"]


@pytest.mark.parametrize("file", FILES)
def test_metadata_files_that_cannot_be_read(root, monkeypatch, file):
    path = root / CUB_FOLDER / f"{file}.txt"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))     # line ends of another system are no error
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


@pytest.mark.parametrize("spoil,why", [
    (truncated_jpeg, "truncated"), (lambda path: path.write_text("this is text"), "not an image"),
    (lambda path: path.write_bytes(b""), "not an image"), (Path.unlink, "No such file"),
    (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
    (lambda path: Image.new("RGB", (300, 300)).save(path), "decompression bomb")])
@pytest.mark.parametrize("number", [TRAIN[1], TEST[0]])
def test_unreadable_images(root, monkeypatch, spoil, why, number):
    path = root / CUB_FOLDER / "images" / BIRDS[number][0]
    spoil(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    fails(root, path, why, "Replace or remove", "rows")
    assert len(list((root / ".cache").glob("*"))) == (number in TEST)


def test_bad_options(root):
    fails(root, "--image-size 15", image_size=15)
    for margin in (-0.1, float("nan"), float("inf")):
        fails(root, "margin", margin=margin)
    with pytest.raises(ValueError, match="box or whole"):
        load(root, crop="bird")


def test_mistyped_data_dir(root):
    fails(root / CUB_FOLDER, "is itself the folder", f"({root})", download=True)
    fails(root / "nowhere", "does not exist", cub.CUB_URL, cub.CUB_MD5, "--sample")
    fails(root / "no" / "where", "does not exist", download=True)
    (root / "empty").mkdir()
    fails(root / "empty", "no CUB-200-2011 in", root / "empty" / cub.CUB_ARCHIVE)
    (root / "file").write_text("")
    fails(root / "file", "is a file", download=True)
    assert cub_present(root) and not cub_present(root / "empty") and not cub_present(root / "file")
    shutil.rmtree(root / CUB_FOLDER / "images")
    fails(root, BIRDS[TRAIN[0]][0], "No such file")


# -------------------------------------------------------------------------------------------------------------- workers

def dying_chunk(parent, files, size, resize):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return image_files._decode_chunk(files, size, resize)


def failing_chunk(parent, files, size, resize):
    if os.getpid() != parent and files[0][0].name == "a.png":   # the other chunks are the worker's
        raise MemoryError("a worker's")
    return image_files._decode_chunk(files, size, resize)


@pytest.mark.parametrize("chunk,reason", [(dying_chunk, "it was killed"), (failing_chunk, "a worker's")])
def test_workers(root, monkeypatch, capsys, chunk, reason):
    """What a worker does not give, because it was killed or had no memory, the main process decodes."""
    paths = [root / CUB_FOLDER / "images" / BIRDS[i][0] for i in BIRDS]
    crops = [(1, 2, 20 + i, 30) for i in BIRDS]
    decode = functools.partial(image_files.decode_images, paths, (SIZE, SIZE), True, progress=False, crops=crops)
    expected = decode()
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 2 * SIZE * SIZE * 3)     # two images a chunk
    worker, submit = functools.partial(chunk, os.getpid()), ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda self, decode, *args: submit(self, worker, *args))
    got = decode(num_workers=1)
    assert all(torch.equal(a, b) for a, b in zip(expected, got)) and got.crops.tolist()[0] == [1, 2, 23, 30]
    assert got.sizes.tolist() == [list(BIRDS[i][3]) for i in BIRDS]
    out = capsys.readouterr().out
    assert out.count("going on in the main process") == 1 and reason in out


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
    monkeypatch.setattr(image_files, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(image_files, "CHUNK", 2)
    images = image_files.decode_images(paths, (SIZE, SIZE), True, num_workers=2, progress=False).images
    assert len(most) == 15 and max(most) == 4 and (images == images[0]).all()


# ---------------------------------------------------------------------------------------------------------------- cache

def decoded_anew(root, monkeypatch, **options):
    """The splits that were decoded rather than read from the cache, and what was loaded."""
    titles, decode = [], image_files.decode_images

    def spy(*args):
        titles.append(args[5])
        return decode(*args)
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode_images", spy)
        loaded = load(root, **options)
    return titles, loaded


def test_cache(root, monkeypatch, capsys):
    both = ["cub-train-box", "cub-test-box"]
    titles, first = decoded_anew(root, monkeypatch)
    assert titles == both
    titles, second = decoded_anew(root, monkeypatch)
    assert titles == []
    for one, other in zip(first, second):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "boxes", "parts"))

    image = root / CUB_FOLDER / "images" / BIRDS[TEST[0]][0]
    Image.new("RGB", (60, 60), (1, 2, 3)).save(image)
    titles, loaded = decoded_anew(root, monkeypatch)
    assert titles == both[1:] and loaded[1].images[0, 0, 0].tolist() == [1, 2, 3]
    change(root / CUB_FOLDER / "bounding_boxes.txt", "3.2", "9.2")
    titles, loaded = decoded_anew(root, monkeypatch)
    assert titles == both[:1] and (loaded[0].images[0].numpy() == by_hand(root, 3, (9, 5, 30, 20))[0]).all()
    change(root / CUB_FOLDER / "parts/part_locs.txt", "12.5", "13.5")   # parts and labels are not in the cache
    assert decoded_anew(root, monkeypatch)[0] == []
    assert [decoded_anew(root, monkeypatch, margin=0.2)[0] for _ in range(2)] == [both, []]
    assert len(list((root / ".cache").iterdir())) == 2      # another margin replaces; another crop or size stays beside

    assert len(decoded_anew(root, monkeypatch, crop="whole")[0]) == 2
    change(root / CUB_FOLDER / "bounding_boxes.txt", "9.2", "3.2")
    assert decoded_anew(root, monkeypatch, crop="whole")[0] == []
    assert len(decoded_anew(root, monkeypatch, image_size=32)[0]) == 2
    assert len(list((root / ".cache").iterdir())) == 6 and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images", "crops", "sizes", "key"])
def test_a_changed_cache_is_made_again(root, monkeypatch, capsys, name):
    first = load(root)[0].images.clone()
    path = next((root / ".cache").glob("cub-train-*.pt"))
    content = torch.load(path, weights_only=True)
    content[name] = "another" if name == "key" else content[name] + 1
    torch.save(content, path)
    titles, second = decoded_anew(root, monkeypatch)
    assert titles == ["cub-train-box"] and torch.equal(first, second[0].images)
    assert capsys.readouterr().out.count("is damaged") == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_the_cache_is_mapped_not_read(root, monkeypatch):
    monkeypatch.setattr(image_files, "CHECKSUM_BYTES", 1000)     # a checksum of many pieces
    sets = [load(root), load(root)]     # made, and found
    for path in (root / ".cache").iterdir():
        assert Path("/proc/self/maps").read_text().count(str(path)) == 2
    assert torch.equal(sets[0][0].images, sets[1][0].images)


# ------------------------------------------------------------------------------------------------------------- download

class Server(http.server.BaseHTTPRequestHandler):
    """Answers with `content`, of which the n-th answer sends only the first `sends[n]` bytes (the last for ever)."""

    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start else None
        sends = self.sends[min(len(self.asked), len(self.sends) - 1)]
        self.asked.append(start)
        part = self.content[start or 0:] if self.ranges else self.content
        self.send_response(206 if self.ranges and start is not None else self.status)
        if self.ranges and start is not None:
            self.send_header("Content-Range", f"bytes {start + self.shift}-/*")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:sends])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Starts a server of given bytes on the loopback interface and points cub.py at it; returns what it was asked."""
    servers = []
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(cub, "CUB_MIB", 1)
    monkeypatch.setattr(cub, "CUB_UNPACKED_MIB", 1)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")

    def start(content, sends=(None,), ranges=True, status=200, shift=0):
        handler = type("Handler", (Server,), {"content": content, "sends": sends, "ranges": ranges, "status": status,
                                              "shift": shift, "asked": []})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(cub, "CUB_URL", f"http://127.0.0.1:{servers[-1].server_port}/{cub.CUB_ARCHIVE}")
        return handler.asked
    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture
def archive(root, monkeypatch):
    """The bytes of an archive of `root`'s folder, whose md5 cub.py is made to expect."""
    (root / "attributes.txt").write_text("1 has_bill_shape::curved")
    content = tar_of([("attributes.txt", root / "attributes.txt"), (CUB_FOLDER, root / CUB_FOLDER)])
    monkeypatch.setattr(cub, "CUB_MD5", hashlib.md5(content).hexdigest())
    return content


def tar_of(members):
    """The bytes of a .tar.gz of (name, path) or TarInfo members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(b"x" * member.size))
            else:
                tar.add(member[1], member[0])
    return buffer.getvalue()


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def download_fails(target, *words):
    fails(target, *words, cub.CUB_URL, cub.CUB_MD5, target / cub.CUB_ARCHIVE, "--sample", download=True)
    assert not target.exists() or listing(target) == [], "something half-made was left behind"


def test_download(root, archive, server, capsys):
    asked = server(archive)
    target = root.parent / "new"
    train, test = load(target, download=True)
    expected = load(root)
    assert torch.equal(train.images, expected[0].images) and torch.equal(test.parts, expected[1].parts)
    assert listing(target) == [".cache", CUB_FOLDER, cub.CUB_ARCHIVE]     # without attributes.txt
    assert asked == [None] and "downloading" in capsys.readouterr().out
    load(target, download=True)
    shutil.rmtree(target / CUB_FOLDER)
    assert cub_present(target) and len(load(target)[0]) == 3        # from the archive
    (target / cub.CUB_ARCHIVE).write_bytes(archive[:-1])
    shutil.rmtree(target / CUB_FOLDER)
    fails(target, target / cub.CUB_ARCHIVE, "half a download", "Delete it")
    assert asked == [None]


@pytest.mark.parametrize("sends,ranges,expected", [
    ((500, 700, None), True, [None, 500, 1200]),        # broken twice, and taken up each time
    ((500, 0, 0, 300, None), True, [None, 500, 500, 500, 800]),     # two attempts for nothing are borne
    ((500, None), False, [None, 500]),                  # a server without ranges sends it all again
])
def test_broken_downloads_are_taken_up(root, archive, server, capsys, sends, ranges, expected):
    asked = server(archive, sends, ranges)
    target = root.parent / "new"
    assert len(load(target, download=True)[0]) == 3
    assert asked == expected and (target / cub.CUB_ARCHIVE).read_bytes() == archive
    assert capsys.readouterr().out.count("trying again") == len(expected) - 1


def test_downloads_that_fail(root, archive, server):
    target = root.parent / "new"
    asked = server(archive, (500, 0))
    download_fails(target, f"500 of {len(archive):,} bytes came")
    assert asked == [None, 500, 500, 500]
    asked = server(archive, (500,), ranges=False)
    download_fails(target, f"500 of {len(archive):,} bytes came")
    assert asked == [None, 500, 500, 500]
    server(archive[:-7])
    download_fails(target, "half a download", f"{len(archive) - 7:,} bytes")
    server(archive + b"more")
    download_fails(target, "another file")
    server(archive, (500, None), shift=1)
    download_fails(target, "bytes 501-", "byte 500")
    assert server(b"gone", status=404) == []
    download_fails(target, "404")
    asked = server(b"busy", status=503)
    download_fails(target, "503")
    assert len(asked) == 3
    server(bytes(2**21 + 1))
    download_fails(target, "more than 2,097,152 bytes")


def test_dead_and_silent_servers(root, archive, server, monkeypatch):
    server(b"")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(download, "SOCKET_TIMEOUT", 0.1)
        monkeypatch.setattr(cub, "CUB_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/c.tgz")
        download_fails(root.parent / "new", "timed out")
    download_fails(root.parent / "new", "refused")


def test_full_disk(root, archive, server, monkeypatch):
    asked = server(archive)
    target = root.parent / "new"
    free = 2 * 2**20 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    fails(target, "needs 2 MiB", target, "1 MiB are free", download=True)
    assert asked == [] and not target.exists()
    free = 2 * 2**20
    load(target, download=True)
    shutil.rmtree(target / CUB_FOLDER)
    free = 0
    fails(target, "unpacking", "needs 1 MiB", "0 MiB are free")
    assert listing(target) == [".cache", cub.CUB_ARCHIVE]
    with pytest.raises(DataError, match="CIFAR-100 needs 161 MiB"):
        data.load_cifar100(target, progress=False)


def test_an_interrupted_download_leaves_nothing(root, archive, server, monkeypatch):
    server(archive)
    target = root.parent / "new"

    def interrupt(path):
        assert path.is_file()
        raise KeyboardInterrupt
    monkeypatch.setattr(download, "md5_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(target, download=True)
    assert listing(target) == []


# --------------------------------------------------------------------------------------------------------------- unpack

def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize("crafted", [
    member("../escaped", size=3), member(f"{CUB_FOLDER}/../../escaped", size=3), member("/escaped", size=3),
    member(f"{CUB_FOLDER}/link", tarfile.SYMTYPE, "/etc"), member(f"{CUB_FOLDER}/link", tarfile.SYMTYPE, "inside"),
    member(f"{CUB_FOLDER}/link", tarfile.LNKTYPE, "attributes.txt"), member(f"{CUB_FOLDER}/zero", tarfile.CHRTYPE),
    member(f"{CUB_FOLDER}/pipe", tarfile.FIFOTYPE), member(CUB_FOLDER, tarfile.SYMTYPE, "/etc"),
    member(f"{CUB_FOLDER}\\..\\escaped", size=3)])
def test_crafted_archives(root, tmp_path, capsys, crafted):
    target = tmp_path / "in" / "new"
    target.mkdir(parents=True)
    path = tmp_path / "crafted.tgz"
    path.write_bytes(tar_of([(f"{CUB_FOLDER}/images.txt", root / CUB_FOLDER / "images.txt"), crafted,
                             (CUB_FOLDER, root / CUB_FOLDER)]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="no plain file or folder") as caught:
        download.unpack(path, CUB_FOLDER, target, progress=False)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/escaped").exists()


def test_damaged_and_foreign_archives(root, tmp_path, monkeypatch):
    target, path = tmp_path / "new", tmp_path / "damaged.tgz"
    target.mkdir()
    whole = tar_of([(CUB_FOLDER, root / CUB_FOLDER)])
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 255
    for content in (whole[:len(whole) // 2], bytes(spoilt), b"text", b"", tar_of([("other", root / CUB_FOLDER)])):
        path.write_bytes(content)
        with pytest.raises(DataError, match="could not unpack .* nothing was kept"):
            download.unpack(path, CUB_FOLDER, target, progress=False)
        assert listing(target) == []
    path.write_bytes(whole)
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match="cannot unpack .* safely"):
        download.unpack(path, CUB_FOLDER, target, progress=False)


def test_two_processes_that_unpack_and_leftovers(root, tmp_path, monkeypatch):
    target, path = tmp_path / "new", tmp_path / "whole.tgz"
    path.write_bytes(tar_of([(CUB_FOLDER, root / CUB_FOLDER)]))
    old, new = target / ".unpack-old", target / ".unpack-new"
    for folder in (old, new):
        (folder / CUB_FOLDER).mkdir(parents=True)
    for touched in (old / CUB_FOLDER, old):
        os.utime(touched, (1, 1))
    download.unpack(path, CUB_FOLDER, target, progress=False)
    (target / CUB_FOLDER / "mine").write_text("the faster one's")
    download.unpack(path, CUB_FOLDER, target, progress=False)       # the name is taken: nothing happens
    assert (target / CUB_FOLDER / "mine").exists() and listing(target) == [".unpack-new", CUB_FOLDER]


# --------------------------------------------------------------------------------------------------------------- sample

def draw(label, seed):
    return draw_bird(np.random.Philox(key=np.array([seed, 99], dtype=np.uint64)).random_raw(WORDS), label)


def test_the_same_pixels_on_every_machine():
    """If this fails after a change to cub_sample.py, the sample has changed, and results on it with it."""
    digest = hashlib.sha256()
    for seed in range(4):
        picture, box, parts = draw(seed, seed)
        for array in (picture, box.astype("<i8"), parts.astype("<f8"), np.array(picture.shape, "<i8")):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "366a9a6f65dd15e8f20c0a64f3ea284ec7271d8db253b1d7b81c18723d54e61b"


def test_only_the_mark_knows_the_class_and_the_box_holds_the_parts():
    reach, kinds = CELLS * MARK_CELL / 2, set()
    for seed in range(24):
        label = seed % len(MARKS)
        (one, box, parts), (other, other_box, other_parts) = draw(label, seed), draw((label + 1) % len(MARKS), seed)
        height, width = one.shape[:2]
        assert 224 <= min(height, width) <= 248 and 256 <= max(height, width) <= 280
        assert (box == other_box).all() and (parts == other_parts).all()
        x0, y0, x1, y1 = box
        assert 0 < x0 < x1 < width and 0 < y0 < y1 < height
        assert (parts > [x0, y0]).all() and (parts < [x1, y1]).all()
        (x, y), eye = parts[PART_NAMES.index("mark")], parts[PART_NAMES.index("eye")].astype(int)
        assert x0 < x - reach < x + reach < x1 and y0 < y - reach < y + reach < y1
        tile = np.s_[int(y - reach):int(y + reach), int(x - reach):int(x + reach)]
        pattern = np.array([list(row) for row in list(MARKS.values())[label].split()]) == "#"
        cells = one[tile].astype(int).sum(-1)[MARK_CELL // 2::MARK_CELL, MARK_CELL // 2::MARK_CELL]
        ink, paper = cells[1:-1, 1:-1][pattern], np.append(cells[1:-1, 1:-1][~pattern], cells[0])
        assert len(set(ink)) == len(set(paper)) == 1 and abs(ink[0] - paper[0]) >= 3 * 96
        assert (one[eye[1], eye[0]] == 10).all() and (one[tile] != other[tile]).any()
        one[tile] = other[tile] = 0
        assert (one == other).all()
        kinds.add((height > width, eye[0] > x))
    assert len(kinds) == 4      # upright and not, facing left and right


def test_the_sample_on_disk(tmp_path):
    write_cub_sample(tmp_path, seed=3, classes=3, train_per_class=2, test_per_class=1)
    train, test = load(tmp_path, image_size=64, crop="whole")
    assert train.class_names == tuple(MARKS)[:3] and train.part_names == PART_NAMES
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and test.labels.tolist() == [0, 1, 2]
    assert (train.parts[..., 2] == 1).all() and len({image.numpy().tobytes() for image in train.images}) == 6
    assert (train.parts[..., :2] > train.boxes[:, None, :2]).all()
    assert (train.parts[..., :2] < train.boxes[:, None, 2:]).all()
    first = draw_bird(np.random.Philox(key=np.array([3, 2], dtype=np.uint64)).random_raw(WORDS), 0)[0]
    stored = Image.open(tmp_path / CUB_FOLDER / "images/001.ring/ring_0001.jpg")
    drawn, stored = (np.asarray(image.convert("L")).astype(int) for image in (Image.fromarray(first), stored))
    assert stored.shape == drawn.shape and abs(stored - drawn).max() < 16


def test_cub_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small = functools.partial(cub_sample, image_size=64, classes=2, train_per_class=3, test_per_class=2)
    train, test = small()
    assert listing(tmp_path) == []
    assert (len(train), len(test), train.image_size) == (6, 4, (64, 64)) and train.source == "built-in sample (seed 0)"
    assert (train.boxes == torch.tensor([0.0, 0, 64, 64])).all() and train.parts.shape == (6, 3, 3)
    assert torch.equal(train.images, small()[0].images) and not torch.equal(train.images, small(seed=1)[0].images)
    assert small(margin=0.1)[0].boxes[:, 0].min() > 3
    for classes in (1, 13):
        with pytest.raises(ValueError, match="2 to 12"):
            cub_sample(classes=classes)


# ----------------------------------------------------------------------------------------------------------- real birds

@pytest.mark.skipif(not (REAL / CUB_FOLDER).is_dir(), reason="no CUB_200_2011 in data/")
def test_real_birds(tmp_path):
    """The metadata of all, and the first class's images, linked into a folder of their own."""
    birds, parts, class_names, part_names = cub.read_metadata(REAL / CUB_FOLDER)
    whole = len(class_names) == 200
    assert (len(birds), len(class_names)) == ((11788, 200) if whole else (2290, 40))
    assert sum(bird.train for bird in birds) == (5994 if whole else 1200)
    assert parts.shape == (len(birds), 15, 3) and part_names[6] == "left eye" and class_names[4] == "Crested Auklet"
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
    np.testing.assert_allclose(test.boxes[0], np.round([x, y, x + width, y + height]) * scale, rtol=1e-5)
