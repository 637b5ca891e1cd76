"""download.py: downloads from a server on the loopback interface, what fails of them, and crafted
archives."""

import hashlib
import http.server
import io
import os
import re
import shutil
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import files
from common.errors import UserError
from data import cub_present, load_cifar100
from datasets import cub, download
from datasets.cub import CUB_FOLDER
from tests.helpers.makers import birds_fail as fails
from tests.helpers.makers import listing
from tests.helpers.makers import load_birds as load

# ---- download ------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with `content`, of which the n-th answer sends only the first `sends[n]` bytes (the
    last for ever)."""

    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start else None
        sends = self.sends[min(len(self.asked), len(self.sends) - 1)]
        self.asked.append(start)
        part = self.content[start or 0 :] if self.ranges else self.content
        self.send_response(206 if self.ranges and start is not None else self.status)
        if self.ranges and start is not None:
            self.send_header("Content-Range", f"bytes {start + self.shift}-/*")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:sends])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, serve):
    """Starts a server of given bytes and points cub.py at it; returns what it was asked."""
    monkeypatch.setattr(cub, "CUB_MIB", 1)
    monkeypatch.setattr(cub, "CUB_UNPACKED_MIB", 1)

    def start(content, sends=(None,), ranges=True, status=200, shift=0):
        asked = []
        address = serve(
            Server,
            content=content,
            sends=sends,
            ranges=ranges,
            status=status,
            shift=shift,
            asked=asked,
        )
        monkeypatch.setattr(cub, "CUB_URL", f"{address}/{cub.CUB_ARCHIVE}")
        return asked

    return start


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


def download_fails(target, *words):
    fails(
        target,
        *words,
        cub.CUB_URL,
        cub.CUB_MD5,
        target / cub.CUB_ARCHIVE,
        "--sample",
        download=True,
    )
    assert not target.exists() or listing(target) == [], "something half-made was left behind"


def test_download(root, archive, server, capsys):
    asked = server(archive)
    target = root.parent / "new"
    train, test = load(target, download=True)
    expected = load(root)
    assert torch.equal(train.images, expected[0].images) and torch.equal(
        test.parts, expected[1].parts
    )
    assert listing(target) == [".cache", CUB_FOLDER, cub.CUB_ARCHIVE]  # without attributes.txt
    assert asked == [None] and "downloading" in capsys.readouterr().out
    load(target, download=True)
    shutil.rmtree(target / CUB_FOLDER)
    assert cub_present(target) and len(load(target)[0]) == 3  # from the archive
    (target / cub.CUB_ARCHIVE).write_bytes(archive[:-1])
    shutil.rmtree(target / CUB_FOLDER)
    fails(target, target / cub.CUB_ARCHIVE, "half a download", "Move it away")
    assert asked == [None]


@pytest.mark.parametrize(
    "sends,ranges,expected",
    [
        ((500, 700, None), True, [None, 500, 1200]),  # broken twice, and taken up each time
        # two attempts for nothing are borne
        ((500, 0, 0, 300, None), True, [None, 500, 500, 500, 800]),
        ((500, None), False, [None, 500]),  # a server without ranges sends it all again
    ],
)
def test_broken_downloads_are_taken_up(root, archive, server, capsys, sends, ranges, expected):
    asked = server(archive, sends, ranges)
    target = root.parent / "new"
    assert len(load(target, download=True)[0]) == 3
    assert asked == expected and (target / cub.CUB_ARCHIVE).read_bytes() == archive
    assert capsys.readouterr().out.count("trying again") == len(expected) - 1


def test_downloads_that_fail(root, archive, server):
    target = root.parent / "new"
    asked = server(archive, (500, 0))
    download_fails(target, f"received 500 of {len(archive):,} bytes")
    assert asked == [None, 500, 500, 500]
    asked = server(archive, (500,), ranges=False)
    download_fails(target, f"received 500 of {len(archive):,} bytes")
    assert asked == [None, 500, 500, 500]
    server(archive[:-7])
    download_fails(target, "half a download", f"{len(archive) - 7:,} bytes")
    server(archive + b"more")
    download_fails(target, "another file")
    server(archive, (500, None), shift=1)
    download_fails(target, "bytes 501-", "byte 500")
    asked = server(b"gone", status=404)
    download_fails(target, "404")
    assert len(asked) == 1  # to ask again is no use
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
    with pytest.raises(UserError, match="CIFAR-100 needs 161 MiB"):
        load_cifar100(target, progress=False)


def test_an_interrupted_download_leaves_nothing(root, archive, server, monkeypatch):
    server(archive)
    target = root.parent / "new"

    def interrupt(path):
        assert path.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "md5_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(target, download=True)
    assert not target.exists()


# ---- unpack --------------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    "crafted",
    [
        member("../escaped", size=3),
        member(f"{CUB_FOLDER}/../../escaped", size=3),
        member("/escaped", size=3),
        member(f"{CUB_FOLDER}/link", tarfile.SYMTYPE, "/etc"),
        member(f"{CUB_FOLDER}/link", tarfile.SYMTYPE, "inside"),
        member(f"{CUB_FOLDER}/link", tarfile.LNKTYPE, "attributes.txt"),
        member(f"{CUB_FOLDER}/zero", tarfile.CHRTYPE),
        member(f"{CUB_FOLDER}/pipe", tarfile.FIFOTYPE),
        member(CUB_FOLDER, tarfile.SYMTYPE, "/etc"),
        member(f"{CUB_FOLDER}\\..\\escaped", size=3),
    ],
)
def test_crafted_archives(root, tmp_path, capsys, crafted):
    target = tmp_path / "in" / "new"
    target.mkdir(parents=True)
    path = tmp_path / "crafted.tgz"
    path.write_bytes(
        tar_of(
            [
                (f"{CUB_FOLDER}/images.txt", root / CUB_FOLDER / "images.txt"),
                crafted,
                (CUB_FOLDER, root / CUB_FOLDER),
            ]
        )
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not a plain file or folder") as caught:
        download.unpack(path, CUB_FOLDER, target, progress=False)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/escaped").exists()


def test_damaged_and_foreign_archives(root, tmp_path, monkeypatch):
    target, path = tmp_path / "new", tmp_path / "damaged.tgz"
    target.mkdir()
    whole = tar_of([(CUB_FOLDER, root / CUB_FOLDER)])
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 255
    for content in (
        whole[: len(whole) // 2],
        bytes(spoilt),
        b"text",
        b"",
        tar_of([("other", root / CUB_FOLDER)]),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="could not unpack .* nothing was kept"):
            download.unpack(path, CUB_FOLDER, target, progress=False)
        assert listing(target) == []
    path.write_bytes(whole)
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(UserError, match="cannot unpack .* safely"):
        download.unpack(path, CUB_FOLDER, target, progress=False)


def test_two_processes_that_unpack_and_leftovers(root, tmp_path, monkeypatch):
    target, path = tmp_path / "new", tmp_path / "whole.tgz"
    path.write_bytes(tar_of([(CUB_FOLDER, root / CUB_FOLDER)]))
    old, new, theirs = (
        files.temporary_in(target),
        files.temporary_in(target),
        target / ".unpack-old",
    )
    for folder in (old, new, theirs):
        (folder / CUB_FOLDER).mkdir(parents=True)
    for touched in (old / CUB_FOLDER, old, theirs / CUB_FOLDER, theirs):
        os.utime(touched, (1, 1))
    download.unpack(path, CUB_FOLDER, target, progress=False)
    (target / CUB_FOLDER / "mine").write_text("the faster one's")
    download.unpack(path, CUB_FOLDER, target, progress=False)  # the name is taken: nothing happens
    assert (target / CUB_FOLDER / "mine").exists() and listing(target) == sorted(
        [new.name, theirs.name, CUB_FOLDER]
    )
