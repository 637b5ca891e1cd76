"""files.py: written whole or not at all, and never over somebody else's file."""

import operator
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from common import arguments, files
from tests.helpers.makers import listing


def test_replaced_whole_or_not_at_all(tmp_path):
    path, previous = tmp_path / "a.bin", tmp_path / "a.prev.bin"
    for content in (b"one", b"two", b"three"):
        files.replace_file(path, operator.methodcaller("write", content), previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    before = os.umask(0)
    os.umask(before)
    # as any program's, so that others can read it
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~before

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as caught:
        files.replace_file(path, fail, previous=previous)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"three" and listing(tmp_path) == ["a.bin", "a.prev.bin"]


def test_many_writers_of_one_name(tmp_path):
    """Two processes that make the same pictures: each file is one writer's, and none fails."""
    failed = []

    def write(number):
        try:
            for _ in range(30):
                files.replace_file(
                    tmp_path / "a",
                    lambda file: [file.write(bytes([number]) * 999) for _ in range(9)],
                )
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "a").read_bytes()
    assert (
        not failed
        and len(content) == 9 * 999
        and len(set(content)) == 1
        and listing(tmp_path) == ["a"]
    )


def test_a_name_of_any_length_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    files.replace_file(path, lambda file: file.write(b"x"))
    assert path.read_bytes() == b"x"


def test_leftovers_are_known_by_their_names(tmp_path):
    ours = files.temporary_in(tmp_path), files.temporary_in(tmp_path)
    ours[0].write_text("half")
    (ours[1] / "inside").mkdir(parents=True)
    theirs = [
        ".notes.tmp",
        ".learn-to-pay-attention-notes.tmp",
        f"{ours[0].name}2",
        f"x{ours[0].name}",
        ".download-queue",
    ]
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    link = files.temporary_in(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    link.symlink_to(elsewhere)
    files.remove_leftovers(tmp_path)
    assert all(path.exists() for path in ours)  # an hour has not passed
    files.remove_leftovers(tmp_path, age=0)
    assert listing(tmp_path) == sorted([*theirs, "elsewhere"]) and listing(elsewhere) == ["kept"]


def test_what_is_in_the_way_is_kept(tmp_path, capsys):
    path = tmp_path / "last.pt"
    for number in range(3):
        path.write_text(str(number))
        files.set_aside(path, "could not be used")
    assert listing(tmp_path) == ["last.damaged-2.pt", "last.damaged-3.pt", "last.damaged.pt"]
    assert (tmp_path / "last.damaged.pt").read_text() == "0" and not path.exists()
    assert f"{path} could not be used: it is kept as last.damaged-3.pt\n" in capsys.readouterr().out


def test_a_free_name_is_one_that_nothing_has(tmp_path):
    (tmp_path / "a.csv").symlink_to("nowhere")
    (tmp_path / "a-2.csv").mkdir()
    assert files.free_path(tmp_path / "a.csv") == tmp_path / "a-3.csv"
    assert files.free_path(tmp_path / "b.csv") == tmp_path / "b.csv"


def test_only_who_made_a_folder_removes_it_and_only_while_it_is_empty(tmp_path):
    (tmp_path / "theirs").mkdir()
    made = files.make_folders(tmp_path / "theirs" / "a" / "b")
    assert made == [tmp_path / "theirs" / "a", tmp_path / "theirs" / "a" / "b"]
    assert files.make_folders(tmp_path / "theirs" / "a" / "b") == []
    (tmp_path / "theirs" / "a" / "somebody").write_text("")
    files.remove_made(made)
    assert listing(tmp_path / "theirs") == ["a"] and listing(tmp_path / "theirs" / "a") == [
        "somebody"
    ]
    (tmp_path / "theirs" / "a" / "somebody").unlink()
    files.remove_made(made)
    assert listing(tmp_path / "theirs") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(NotADirectoryError):
            files.make_folders(path)


def test_folders_that_several_make_and_remove_at_once(tmp_path):
    """Starts that fail remove the parents that they made while others make theirs in them."""
    failed, ends = [], time.monotonic() + 1

    def start(number):
        while time.monotonic() < ends and not failed:
            made = files.make_folders(tmp_path / "runs" / "cifar100" / str(number))
            if not (tmp_path / "runs" / "cifar100" / str(number)).is_dir():
                failed.append(number)
            files.remove_made(made)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert files.expand_user("~/x") == tmp_path / "x" and files.expand_user("~") == tmp_path
    assert files.expand_user("a/~") == Path("a/~") and files.expand_user(".") == Path(".")
    with pytest.raises(
        ValueError,
        match=r"~nosuchuser/x: there is no home folder for ~nosuchuser \(a file of that name is "
        r"./~",
    ):
        files.expand_user("~nosuchuser/x")
    Path("~lock.png").write_text("")  # a shell writes it so for *.png
    assert files.expand_user("~lock.png") == Path("~lock.png")
    Path("~").mkdir()  # made by others that do not expand
    assert files.expand_user("~/x") == tmp_path / "x" and files.expand_user("./~/x") == Path("~/x")
    # as the message says, and as a shell takes it; however often it is asked
    for text in ("./~", "./~root/x", "./~new"):
        assert (
            arguments.expanded_path(text)
            == arguments.expanded_path(arguments.expanded_path(text))
            == text
        )
    monkeypatch.setenv("HOME", "")  # would be the root of the disk
    with pytest.raises(ValueError, match="no home folder for ~"):
        files.expand_user("~/x")
