"""cifar.py: class folders and official files of CIFAR-100 and CIFAR-10, every bad input and its
message, and downloads from a server on the loopback interface."""

import http.server
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets import cifar, decoding, download
from tests.helpers.cifar import OTHER, Cifar
from tests.helpers.makers import load_cifar

REAL = Path(__file__).parent.parent / "data"


@pytest.fixture(params=["cifar100", "cifar10"])
def ours(request, monkeypatch):
    return Cifar(request.param, monkeypatch)


@pytest.fixture
def other(ours, monkeypatch):
    return Cifar(OTHER[ours.name], monkeypatch)


# ---- class folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, workers", [("cifar100", 0), ("cifar100", 1), ("cifar10", 0)], indirect=["ours"]
)
def test_class_folders(tmp_path, workers, monkeypatch, ours):
    monkeypatch.setattr(decoding, "CHUNK", 4)
    pixels = ours.make_folders(tmp_path)
    (tmp_path / ours.name / "train/.hidden").mkdir()
    (tmp_path / ours.name / "train/cat/notes.txt").write_text("no image")
    (tmp_path / ours.name / "train/cat/.000.png").write_text("no image")
    train, test = ours.read(tmp_path, num_workers=workers)
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.labels.dtype == torch.int64 and train.image_size == (16, 20)
    assert train.source == f"{ours.archive.title} class folders in {tmp_path / ours.name}"
    for split, loaded in (("train", train), ("test", test)):
        expected = [pixels[path] for path in sorted(pixels) if path.parent.parent.name == split]
        assert (loaded.images.numpy() == np.stack(expected)).all()


def test_image_size_resizes_images_of_any_size(tmp_path, ours):
    ours.make_folders(tmp_path)
    Image.new("RGB", (50, 90), (255, 0, 0)).save(tmp_path / ours.name / "test/dog/000.png")
    train, test = ours.read(tmp_path, image_size=24)
    assert train.image_size == test.image_size == (24, 24)
    assert (test.images[3] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


def test_bad_class_folders(tmp_path, ours):
    folder, archive = tmp_path / ours.name, ours.archive
    message = ours.fails(
        tmp_path / "nowhere", tmp_path / "nowhere", "does not exist", archive.url, archive.md5
    )
    assert "--sample" in message and "class folders" in message
    ours.fails(tmp_path, f"no {archive.title} in", tmp_path)
    # not even with a download, where the parent is missing
    with pytest.raises(UserError, match="does not exist"):
        ours.load(tmp_path / "a" / "b")
    folder.mkdir()
    ours.fails(tmp_path, folder / "train", "is missing")
    (folder / "train").write_text("as Kaggle has it, but alone")
    files = {
        "cifar100": "three official files train, test and meta",
        "cifar10": "seven official files data_batch_1 to data_batch_5, test_batch and batches.meta",
    }[ours.name]
    ours.fails(tmp_path, folder / "train", "is a file, not a folder", f"or the {files}")
    (folder / "train").unlink()
    (folder / "train").mkdir()
    ours.fails(tmp_path, folder / "test", "is missing")
    ours.fails(folder, f"no {archive.title} in")
    (folder / "test").mkdir()
    # it is itself the folder
    for root in (tmp_path, folder):
        ours.fails(root, folder / "train", "no class folders")
    for split in ("train", "test"):
        (tmp_path / "unnamed" / split).mkdir(parents=True)
    # which may be anything
    ours.fails(tmp_path / "unnamed", "holds train/ and test/ itself", "as --data-dir")
    for size in (0, 15):
        ours.fails(tmp_path, "--image-size", "at least 16", image_size=size)
    (tmp_path / "file").write_text("")
    ours.fails(tmp_path / "file", "is a file")


def test_empty_class(tmp_path, ours):
    ours.make_folders(tmp_path)
    (tmp_path / ours.name / "test/emu").mkdir()
    ours.fails(tmp_path, tmp_path / ours.name / "test/emu", "no images")


def test_class_lists_that_differ(tmp_path, ours):
    ours.make_folders(tmp_path, classes=tuple("abcdef"), per_class=1)
    for name in "bcde":
        path = tmp_path / ours.name / "test" / name
        path.rename(path.parent / f"x{name}")
    ours.fails(tmp_path, "only in train b, c, d and 1 more", "only in test xb, xc, xd and 1 more")


def test_images_in_no_class_folder_are_counted(tmp_path, capsys, ours):
    ours.make_folders(tmp_path)
    folder = tmp_path / ours.name
    for number in range(4):
        shutil.copy(folder / "train/cat/000.png", folder / f"train/{number}.png")
    (folder / "train/labels.txt").write_text("")
    ours.read(tmp_path)
    assert capsys.readouterr().out == (
        f"{folder / 'train'}: passed over 4 images in no class folder: 0.png, "
        f"1.png, 2.png and 1 more\n"
    )
    (folder / "test/cow/images").mkdir(parents=True)
    ours.fails(
        tmp_path,
        "class folder",
        folder / "test/cow",
        "holds no images. Put images into it",
    )


# ---- official archive ----------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path, ours):
    """See Cifar.write_official."""
    return ours.write_official(tmp_path / "making")


def check_official(sets, expected):
    for loaded, (pixels, labels) in zip(sets, expected, strict=True):
        assert np.array_equal(loaded.images.numpy(), pixels) and loaded.images.is_contiguous()
        assert loaded.labels.tolist() == labels and loaded.labels.dtype == torch.int64
        assert loaded.class_names == ("ant", "bee", "cow")


def test_archive_and_unpacked_folder(tmp_path, official, ours):
    path, expected = official
    root, folder = tmp_path / "d", path.parent / ours.archive.folder
    root.mkdir()
    assert not ours.present(root)
    (root / path.name).write_bytes(path.read_bytes())
    assert ours.present(root)
    check_official(ours.read(root), expected)
    assert ours.read(root, image_size=40)[0].image_size == (40, 40)
    assert [p.name for p in root.iterdir()] == [path.name]  # nothing was unpacked
    (root / path.name).unlink()
    folder.rename(root / folder.name)
    assert ours.present(root)
    check_official(ours.read(root), expected)
    ours.make_folders(root)
    assert ours.read(root)[0].class_names == ("cat", "dog")  # class folders come first


def test_the_official_names_and_sums_are_torchvisions():
    """An independent record of them."""
    from torchvision.datasets import CIFAR10, CIFAR100

    for archive, theirs in ((cifar.CIFAR100_ARCHIVE, CIFAR100), (cifar.CIFAR10_ARCHIVE, CIFAR10)):
        assert (archive.url, archive.md5) == (theirs.url, theirs.tgz_md5)
        assert (archive.name, archive.folder) == (theirs.filename, theirs.base_folder)
        assert list(archive.train.items()) == [tuple(file) for file in theirs.train_list]
        assert list(archive.test.items()) == [tuple(file) for file in theirs.test_list]
        assert archive.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
        assert archive.class_names == theirs.meta["key"]


@pytest.mark.parametrize(
    "place, data_dir",
    [
        (["UNPACKED", "UNPACKED"], "."),  # unpacked one level too deep
        (["UNPACKED"], "UNPACKED"),  # --data-dir is the folder itself
        (["FOLDERS"], "."),  # Kaggle's: the official files in a folder of that name
        (["FOLDERS"], "FOLDERS"),
        (["Unpacked"], "."),
        (["Folders"], "."),
        (["downloads", "UNPACKED"], "."),
        (["any name"], "any name"),
        (["FOLDERS", "UNPACKED"], "."),
    ],
)
def test_official_files_one_level_off_are_found_and_nothing_is_downloaded(
    tmp_path, official, monkeypatch, ours, place, data_dir
):
    path, expected = official
    target = tmp_path.joinpath("d", *ours.spelled(*place))
    root = tmp_path.joinpath("d", *ours.spelled(data_dir))
    target.parent.mkdir(parents=True)
    (path.parent / ours.archive.folder).rename(target)
    monkeypatch.setattr(cifar, "fetch", None)  # a call would fail
    assert ours.present(root)
    sets = ours.load(root, progress=False)
    check_official(sets, expected)
    assert (
        sets[0].source == f"official {ours.archive.title} files in "
        f"{root.joinpath(target.relative_to(root))}"
    )
    assert sorted(p.name for p in target.iterdir()) == sorted(ours.archive.files)


@pytest.mark.parametrize("place", [["UNPACKED", "ARCHIVE"], ["downloads", "ARCHIVE"], ["Archive"]])
def test_an_archive_one_level_off_is_found(tmp_path, official, ours, place):
    path, expected = official
    target = tmp_path.joinpath("d", *ours.spelled(*place))
    target.parent.mkdir(parents=True)
    path.rename(target)
    assert ours.present(tmp_path / "d")
    check_official(ours.read(tmp_path / "d"), expected)


@pytest.mark.parametrize(
    "place, data_dir",
    [
        (["Folders"], "."),
        (["FOLDERS"], "FOLDERS"),
        (["photos", "FOLDERS"], "."),
        (["FOLDERS", "FOLDERS"], "."),
    ],
)
def test_class_folders_one_level_off_are_found(tmp_path, ours, place, data_dir):
    ours.make_folders(tmp_path / "making")
    target = tmp_path.joinpath("d", *ours.spelled(*place))
    root = tmp_path.joinpath("d", *ours.spelled(data_dir))
    target.parent.mkdir(parents=True)
    (tmp_path / "making" / ours.name).rename(target)
    assert ours.present(root)
    assert ours.read(root)[0].class_names == ("cat", "dog")


def test_what_lies_beside_the_data_folder_is_named_not_downloaded_again(
    tmp_path, official, monkeypatch, ours
):
    path, _ = official
    monkeypatch.setattr(cifar, "fetch", None)
    (tmp_path / "there").mkdir()
    for name in (ours.archive.folder, path.name):
        (path.parent / name).rename(tmp_path / name)
        for new in ("new", "there"):
            with pytest.raises(
                UserError,
                match=f"no {ours.archive.title} in .*{new}, but there is one at .*{name}: "
                "give --data-dir ",
            ):
                ours.load(tmp_path / new, progress=False)
        (tmp_path / name).rename(path.parent / name)
    assert not ours.present(tmp_path / "new") and not (tmp_path / "new").exists()


def test_inside_the_data_set_nothing_is_downloaded(tmp_path, monkeypatch, ours):
    monkeypatch.setattr(cifar, "fetch", None)
    ours.make_folders(tmp_path)
    folder = tmp_path / ours.name
    for inside in ("train", "train/cat"):
        with pytest.raises(
            UserError, match=f"but there is one at {folder}: give --data-dir {tmp_path}$"
        ):
            ours.load(folder / inside, progress=False)


def test_links_to_the_data_set(tmp_path, official, ours, other):
    path, expected = official
    ours.make_folders(tmp_path)
    (tmp_path / "mine").symlink_to(tmp_path / ours.name)
    assert ours.read(tmp_path / "mine")[0].class_names == ("cat", "dog")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / path.name).symlink_to(path.rename(tmp_path / "stored"))
    assert ours.present(tmp_path / "linked")
    check_official(ours.read(tmp_path / "linked"), expected)
    [name] = ours.spelled("Folders")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).symlink_to((tmp_path / ours.name).rename(tmp_path / other.name))
    assert ours.read(tmp_path / "own")[0].class_names == ("cat", "dog")  # the link's name counts


def test_good_data_are_never_to_be_deleted(tmp_path, official, ours):
    """Something of that name that is not whole: the advice is to move it, as it may be the only
    copy of something."""
    path, _ = official
    root, folder = path.parent, path.parent / ours.archive.folder
    [meta] = ours.archive.meta
    (folder / meta).rename(root / meta)
    message = ours.fails(root, folder / meta, "Move")
    assert "Delete" not in message and "delete" not in message


def test_damaged_archive_and_unpacked_folder(tmp_path, official, ours):
    path, _ = official
    whole = path.read_bytes()
    root, folder = path.parent, path.parent / ours.archive.folder
    last = folder / list(ours.archive.train)[-1]
    last.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    ours.fails(root, last, "md5", "Move")
    last.unlink()
    ours.fails(root, last, "Move")
    folder.rename(root / "away")
    for content in (whole[: len(whole) // 2], whole + b"x", b""):
        path.write_bytes(content)
        ours.fails(root, path, ours.archive.md5, ours.archive.url, "Move it away")


# ---- both in one folder --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folders", "unpacked", "archive"])
def test_the_two_data_sets_lie_beside_each_other(tmp_path, monkeypatch, ours, other, kind):
    monkeypatch.setattr(cifar, "fetch", None)
    root = tmp_path / "d"
    expected = put(root, other, kind)
    assert other.present(root) and not ours.present(root)
    message = ours.fails(root, f"no {ours.archive.title} in {root}. {other.archive.title} at ")
    assert f" is for train_{other.name}.py. Fetch {ours.archive.url} " in message
    own = put(root, ours, kind)
    assert other.present(root) and ours.present(root)
    for cifar_set, images in ((ours, own), (other, expected)):
        sets = cifar_set.read(root)
        assert cifar_set.archive.title in sets[0].source
        for loaded, pixels in zip(sets, images, strict=True):
            assert np.array_equal(loaded.images.numpy(), pixels)


def put(root, cifar_set, kind):
    """The data set in ``root``, and its images, (train, test)."""
    if kind == "folders":
        pixels = cifar_set.make_folders(root, size=(32, 32))
        return [
            np.stack([pixels[path] for path in sorted(pixels) if split in path.parts])
            for split in ("train", "test")
        ]
    path, expected = cifar_set.write_official(root)
    if kind == "unpacked":
        path.unlink()
    else:
        shutil.rmtree(root / cifar_set.archive.folder)
    return [pixels for pixels, _ in expected]


@pytest.mark.parametrize("inside", ["", "train", "train/cat", "new"])
def test_nothing_is_downloaded_into_the_other_data_set(tmp_path, monkeypatch, ours, other, inside):
    monkeypatch.setattr(cifar, "fetch", None)
    other.make_folders(tmp_path)
    place = tmp_path / other.name
    with pytest.raises(UserError) as caught:
        ours.load(place / inside, progress=False)
    assert str(caught.value) == (
        f"no {ours.archive.title} in {place / inside}: {place} is {other.archive.title}, which "
        f"train_{other.name}.py trains on. Give the folder that holds {ours.archive.title}, or "
        f"will hold it, as --data-dir"
    )
    ours.make_folders(tmp_path)  # where the right one is beside it, that is the advice
    with pytest.raises(UserError, match="trains on" if inside else f"at {tmp_path / ours.name}: "):
        ours.load(place / inside, progress=False)
    other.write_official(tmp_path / "unpacked")
    with pytest.raises(UserError, match=f"{other.archive.folder} is {other.archive.title}, which"):
        ours.load(tmp_path / "unpacked" / other.archive.folder, progress=False)


def test_an_archive_under_the_other_name_is_refused(official, ours, other):
    path, _ = official
    path.rename(path.parent / other.archive.name)
    shutil.rmtree(path.parent / ours.archive.folder)
    other.fails(path.parent, other.archive.name, "is damaged", other.archive.md5)


# ---- download ------------------------------------------------------------------------------------


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
def server(ours, serve):
    """Starts a server that answers with the given bytes, and points cifar.py at it."""

    def start(content, declared=None, status=200):
        address = serve(Server, content=content, declared=declared, status=status)
        ours.change(url=f"{address}/c.tar.gz")

    return start


def download_fails(ours, root, *words):
    with pytest.raises(UserError) as caught:
        ours.load(root, progress=False)
    message, archive = str(caught.value), ours.archive
    assert "\n" not in message
    advice = (archive.url, archive.md5, root / archive.name, "class folders", "--sample")
    for word in (*words, *advice):
        assert str(word) in message, message
    assert not list(root.glob("*")) and not list(root.glob(".*")), (
        "something half-made was left behind"
    )
    assert not ours.present(root)


def test_download(tmp_path, official, server, capsys, ours):
    path, expected = official
    server(path.read_bytes())
    root = tmp_path / "data"  # made by the download
    check_official(ours.load(root, progress=False), expected)
    assert [p.name for p in root.iterdir()] == [ours.archive.name]
    assert "downloading" in capsys.readouterr().out
    server(b"", status=500)
    check_official(ours.load(root, progress=False), expected)  # nothing is fetched twice


def test_downloads_that_fail(tmp_path, official, server, ours):
    whole = official[0].read_bytes()
    server(whole[:-7])
    download_fails(ours, tmp_path / "a", "half a download", f"{len(whole) - 7:,} bytes")
    server(whole + b"more")
    download_fails(ours, tmp_path / "a", "another file")
    server(whole[:500], declared=len(whole))  # the connection ends before the file does
    download_fails(ours, tmp_path / "a")
    server(b"gone", status=404)
    download_fails(ours, tmp_path / "a", "404")


def test_dead_server(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as closed:
        ours.change(url=f"http://127.0.0.1:{closed.server_port}/c.tar.gz")
    download_fails(ours, tmp_path / "a", "refused")


def test_silent_server(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "SOCKET_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ours.change(url=f"http://127.0.0.1:{silent.getsockname()[1]}/c.tar.gz")
        download_fails(ours, tmp_path / "a", "timed out")
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
    train, test = load_cifar(tmp_path)
    assert (len(train), len(test), train.image_size) == (1000, 200, (32, 32))
    assert train.class_names == tuple(names) and torch.bincount(train.labels).tolist() == [500, 500]
