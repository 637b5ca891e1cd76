"""data.py: sets, loading, every bad input and its message, and downloads from a server on the
loopback interface."""

import http.server
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common.errors import UserError
from data import load_cifar100
from datasets import cifar100, download, image_files
from tests.helpers.makers import cifar_fails as fails
from tests.helpers.makers import load_cifar as load
from tests.helpers.makers import make_folders

REAL = Path(__file__).parent.parent / "data"


# ---- class folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_class_folders(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(image_files, "CHUNK", 4)
    pixels = make_folders(tmp_path)
    (tmp_path / "cifar100/train/.hidden").mkdir()
    (tmp_path / "cifar100/train/cat/notes.txt").write_text("no image")
    (tmp_path / "cifar100/train/cat/.000.png").write_text("no image")
    train, test = load(tmp_path, num_workers=workers)
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (
        train.labels.dtype == torch.int64
        and train.image_size == (16, 20)
        and "class folders" in train.source
    )
    for split, loaded in (("train", train), ("test", test)):
        expected = [pixels[path] for path in sorted(pixels) if path.parent.parent.name == split]
        assert (loaded.images.numpy() == np.stack(expected)).all()


def test_image_size_resizes_images_of_any_size(tmp_path):
    make_folders(tmp_path)
    Image.new("RGB", (50, 90), (255, 0, 0)).save(tmp_path / "cifar100/test/dog/000.png")
    train, test = load(tmp_path, image_size=24)
    assert train.image_size == test.image_size == (24, 24)
    assert (test.images[3] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


def test_bad_class_folders(tmp_path, monkeypatch):
    message = fails(
        tmp_path / "nowhere",
        tmp_path / "nowhere",
        "does not exist",
        cifar100.CIFAR100_URL,
        cifar100.CIFAR100_MD5,
    )
    assert "--sample" in message and "class folders" in message
    fails(tmp_path, "no CIFAR-100 in", tmp_path)
    # not even with a download, where the parent is missing
    with pytest.raises(UserError, match="does not exist"):
        load_cifar100(tmp_path / "a" / "b")
    (tmp_path / "cifar100").mkdir()
    fails(tmp_path, tmp_path / "cifar100/train", "is missing")
    (tmp_path / "cifar100/train").write_text("as Kaggle has it, but alone")
    fails(
        tmp_path,
        tmp_path / "cifar100/train",
        "is a file, not a folder",
        "or the three official files train, test and meta",
    )
    (tmp_path / "cifar100/train").unlink()
    (tmp_path / "cifar100/train").mkdir()
    fails(tmp_path, tmp_path / "cifar100/train", "no class folders")
    fails(tmp_path / "cifar100", "no CIFAR-100 in")
    (tmp_path / "cifar100/test").mkdir()
    # it is itself the folder
    fails(tmp_path / "cifar100", tmp_path / "cifar100/train", "no class folders")
    for split in ("train", "test"):
        (tmp_path / "other" / split).mkdir(parents=True)
    # which may be anything
    fails(tmp_path / "other", "holds train/ and test/ itself", "as --data-dir")
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


# ---- official archive ----------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The bytes of a small archive like the official one, whose md5 sums data.py is made to
    expect."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "making" / cifar100.CIFAR100_UNPACKED
    folder.mkdir(parents=True)
    contents = {"meta": {"fine_label_names": ["ant", "bee"]}}
    for split, count in (("train", 6), ("test", 4)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[split] = {"data": pixels, "fine_labels": [i % 2 for i in range(count)]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    path = tmp_path / "making" / cifar100.CIFAR100_ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, cifar100.CIFAR100_UNPACKED)
        # a member that would leave the folder, if anything were unpacked
        tar.add(folder / "meta", "../escaped")
    monkeypatch.setattr(cifar100, "CIFAR100_MD5", download.md5_of(path))
    monkeypatch.setattr(
        cifar100, "CIFAR100_FILES", {name: download.md5_of(folder / name) for name in contents}
    )
    return path, contents


def check_official(sets, contents):
    for loaded, split in zip(sets, ("train", "test"), strict=True):
        expected = contents[split]["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert (loaded.images.numpy() == expected).all() and loaded.images.is_contiguous()
        assert loaded.labels.tolist() == contents[split]["fine_labels"] and loaded.class_names == (
            "ant",
            "bee",
        )


def test_archive_and_unpacked_folder(tmp_path, archive):
    path, contents = archive
    root = tmp_path / "d"
    root.mkdir()
    assert not data.cifar100_present(root)
    (root / path.name).write_bytes(path.read_bytes())
    assert data.cifar100_present(root)
    check_official(load(root), contents)
    assert load(root, image_size=40)[0].image_size == (40, 40)
    assert [p.name for p in root.iterdir()] == [path.name]  # nothing was unpacked
    (root / path.name).unlink()
    (path.parent / cifar100.CIFAR100_UNPACKED).rename(root / cifar100.CIFAR100_UNPACKED)
    assert data.cifar100_present(root)
    check_official(load(root), contents)
    make_folders(root)
    assert load(root)[0].class_names == ("cat", "dog")  # class folders come first


def moved(root, *names):
    """What is at root/official, a level deeper, under other letters, ...: as root/names."""
    target = root.joinpath(*names)
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / "official").rename(target)
    return target


@pytest.mark.parametrize(
    "place, data_dir",
    [
        (["cifar-100-python", "cifar-100-python"], "."),  # unpacked one level too deep
        (["cifar-100-python"], "cifar-100-python"),  # --data-dir is the folder itself
        # Kaggle's: the files train, test and meta in a folder of that name
        (["cifar100"], "."),
        (["cifar100"], "cifar100"),
        (["CIFAR-100-Python"], "."),
        (["Cifar100"], "."),
        (["downloads", "cifar-100-python"], "."),
        (["any name"], "any name"),
        (["cifar100", "cifar-100-python"], "."),
    ],
)
def test_official_files_one_level_off_are_found_and_nothing_is_downloaded(
    tmp_path, archive, monkeypatch, place, data_dir
):
    path, contents = archive
    root = tmp_path / "d"
    root.mkdir()
    (path.parent / cifar100.CIFAR100_UNPACKED).rename(root / "official")
    target = moved(root, *place)
    monkeypatch.setattr(cifar100, "fetch", None)  # a call would fail
    assert data.cifar100_present(root / data_dir)
    sets = load_cifar100(root / data_dir, progress=False)
    check_official(sets, contents)
    assert (
        sets[0].source == "official CIFAR-100 files in "
        f"{(root / data_dir).joinpath(target.relative_to(root / data_dir))}"
    )
    assert sorted(p.name for p in target.iterdir()) == ["meta", "test", "train"]


@pytest.mark.parametrize(
    "place",
    [
        ["cifar-100-python", "cifar-100-python.tar.gz"],
        ["downloads", "cifar-100-python.tar.gz"],
        ["CIFAR-100-python.TAR.GZ"],
    ],
)
def test_an_archive_one_level_off_is_found(tmp_path, archive, place):
    path, contents = archive
    root = tmp_path / "d"
    root.mkdir()
    path.rename(root / "official")
    moved(root, *place)
    assert data.cifar100_present(root)
    check_official(load(root), contents)


@pytest.mark.parametrize(
    "place, data_dir",
    [
        (["CIFAR100"], "."),
        (["cifar100"], "cifar100"),
        (["photos", "cifar100"], "."),
        (["cifar100", "cifar100"], "."),
    ],
)
def test_class_folders_one_level_off_are_found(tmp_path, place, data_dir):
    make_folders(tmp_path / "making")
    root = tmp_path / "d"
    root.mkdir()
    (tmp_path / "making" / "cifar100").rename(root / "official")
    moved(root, *place)
    assert data.cifar100_present(root / data_dir)
    assert load(root / data_dir)[0].class_names == ("cat", "dog")


def test_what_lies_beside_the_data_folder_is_named_not_downloaded_again(
    tmp_path, archive, monkeypatch
):
    path, _ = archive
    monkeypatch.setattr(cifar100, "fetch", None)
    (tmp_path / "there").mkdir()
    for name in (cifar100.CIFAR100_UNPACKED, path.name):
        (path.parent / name).rename(tmp_path / name)
        for new in ("new", "there"):
            with pytest.raises(
                UserError,
                match=f"no CIFAR-100 in .*{new}, but there is one at .*{name}: give --data-dir ",
            ):
                load_cifar100(tmp_path / new, progress=False)
        (tmp_path / name).rename(path.parent / name)
    assert not data.cifar100_present(tmp_path / "new") and not (tmp_path / "new").exists()


def test_inside_the_data_set_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "fetch", None)
    make_folders(tmp_path)
    for inside in ("cifar100/train", "cifar100/train/cat"):
        with pytest.raises(
            UserError, match=f"but there is one at {tmp_path}/cifar100: give --data-dir {tmp_path}$"
        ):
            load_cifar100(tmp_path / inside, progress=False)


def test_a_link_to_the_data_set(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "mine").symlink_to(tmp_path / "cifar100")
    assert load(tmp_path / "mine")[0].class_names == ("cat", "dog")


def test_images_in_no_class_folder_are_counted(tmp_path, capsys):
    make_folders(tmp_path)
    for number in range(4):
        shutil.copy(
            tmp_path / "cifar100/train/cat/000.png", tmp_path / f"cifar100/train/{number}.png"
        )
    (tmp_path / "cifar100/train/labels.txt").write_text("")
    load(tmp_path)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'cifar100/train'}: passed over 4 images in no class folder: 0.png, "
        f"1.png, 2.png and 1 more\n"
    )
    (tmp_path / "cifar100/test/cow/images").mkdir(parents=True)
    fails(
        tmp_path,
        "class folder",
        tmp_path / "cifar100/test/cow",
        "holds no images, only images/. Put images into it",
    )


def test_good_data_are_never_to_be_deleted(tmp_path, archive):
    """Something of that name that is not whole: the advice is to move it, as it may be the only
    copy of something."""
    path, _ = archive
    root = path.parent
    (root / cifar100.CIFAR100_UNPACKED / "meta").rename(root / "meta")
    message = fails(root, root / cifar100.CIFAR100_UNPACKED / "meta", "Move")
    assert "Delete" not in message and "delete" not in message


def test_damaged_archive_and_unpacked_folder(tmp_path, archive):
    path, _ = archive
    whole = path.read_bytes()
    root = path.parent
    (root / cifar100.CIFAR100_UNPACKED / "train").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    fails(root, root / cifar100.CIFAR100_UNPACKED / "train", "md5", "Move")
    (root / cifar100.CIFAR100_UNPACKED / "train").unlink()
    fails(root, root / cifar100.CIFAR100_UNPACKED / "train", "Move")
    (root / cifar100.CIFAR100_UNPACKED).rename(root / "away")
    for content in (whole[: len(whole) // 2], whole + b"x", b""):
        path.write_bytes(content)
        fails(root, path, cifar100.CIFAR100_MD5, cifar100.CIFAR100_URL, "Move it away")


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
def server(monkeypatch, serve):
    """Starts a server that answers with the given bytes, and points data.py at it."""

    def start(content, declared=None, status=200):
        address = serve(Server, content=content, declared=declared, status=status)
        monkeypatch.setattr(cifar100, "CIFAR100_URL", f"{address}/c.tar.gz")

    return start


def download_fails(root, *words):
    with pytest.raises(UserError) as caught:
        load_cifar100(root, progress=False)
    message = str(caught.value)
    assert "\n" not in message
    advice = (
        cifar100.CIFAR100_URL,
        cifar100.CIFAR100_MD5,
        root / cifar100.CIFAR100_ARCHIVE,
        "class folders",
        "--sample",
    )
    for word in (*words, *advice):
        assert str(word) in message, message
    assert not list(root.glob("*")) and not list(root.glob(".*")), (
        "something half-made was left behind"
    )
    assert not data.cifar100_present(root)


def test_download(tmp_path, archive, server, capsys):
    path, contents = archive
    server(path.read_bytes())
    root = tmp_path / "data"  # made by the download
    check_official(load_cifar100(root, progress=False), contents)
    assert [p.name for p in root.iterdir()] == [cifar100.CIFAR100_ARCHIVE]
    assert "downloading" in capsys.readouterr().out
    server(b"", status=500)
    check_official(load_cifar100(root, progress=False), contents)  # nothing is fetched twice


def test_downloads_that_fail(tmp_path, archive, server):
    whole = archive[0].read_bytes()
    server(whole[:-7])
    download_fails(tmp_path / "a", "half a download", f"{len(whole) - 7:,} bytes")
    server(whole + b"more")
    download_fails(tmp_path / "a", "another file")
    server(whole[:500], declared=len(whole))  # the connection ends before the file does
    download_fails(tmp_path / "a")
    server(b"gone", status=404)
    download_fails(tmp_path / "a", "404")


def test_dead_server(tmp_path, monkeypatch, server):
    server(b"")
    port = int(cifar100.CIFAR100_URL.split(":")[2].split("/")[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as closed:
        monkeypatch.setattr(
            cifar100,
            "CIFAR100_URL",
            cifar100.CIFAR100_URL.replace(str(port), str(closed.server_port)),
        )
    download_fails(tmp_path / "a", "refused")


def test_silent_server(tmp_path, monkeypatch, server):
    import socket

    server(b"")
    monkeypatch.setattr(download, "SOCKET_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            cifar100, "CIFAR100_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/c.tar.gz"
        )
        download_fails(tmp_path / "a", "timed out")
    assert socket.getdefaulttimeout() is None


# ---- real images ---------------------------------------------------------------------------------


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
