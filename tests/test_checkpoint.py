"""Checkpoints, written and read."""

import errno
import os
import pickle
import zipfile

import pytest
import torch

from common.checkpoint import FORMAT, load_model, read_checkpoint
from common.errors import UserError
from tests.helpers.trainers import CONFIG, make_trainer
from training import run_folder


@pytest.fixture
def saved(tmp_path):
    """A run folder with two checkpoints, the content of the last, and its path."""
    ours = make_trainer()
    content = {
        "format": FORMAT,
        **ours.state(),
        "config": CONFIG | {"trunk": ""},
        "class_names": list("abcd"),
        "input_size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "rng": run_folder.random_states(),
    }
    run_folder.save_checkpoint(tmp_path, content | {"mark": "first"})
    run_folder.save_checkpoint(tmp_path, content | {"mark": "second"})
    return tmp_path, content


def test_checkpoint_round_trip(saved):
    folder, content = saved
    back = read_checkpoint(folder / "last.pt")
    assert back["mark"] == "second" and read_checkpoint(folder / "last.prev.pt")["mark"] == "first"
    assert back["config"] == content["config"] and back["rng"]["python"] == content["rng"]["python"]
    for name, value in content["model"].items():
        assert torch.equal(back["model"][name], value)
    assert not [name for name in back["model"] if name.startswith(("module.", "_orig_mod."))]
    assert {p.name for p in folder.iterdir()} == {"last.pt", "last.prev.pt"}
    model = load_model(back)
    assert not model.training and torch.equal(
        model.state_dict()["trunk.block1.0.conv.weight"],
        content["ema"]["trunk.block1.0.conv.weight"],
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "cut short"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (
            lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
            "damaged|could not be read|no checkpoint",
        ),
        (lambda data: b"not a checkpoint at all", "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_over(
    saved, capsys, damage, message
):
    folder, _ = saved
    path = folder / "last.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert run_folder.read_last(folder)["mark"] == "first"
    assert "Resuming from the checkpoint before it" in capsys.readouterr().out


def test_every_flipped_byte_of_a_tensor_is_found(saved):
    folder, _ = saved
    path = folder / "last.pt"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda i: i.file_size)
    middle = record.header_offset + record.file_size // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": Harmful()}, tmp_path / "a.pt")
    with open(tmp_path / "b.pt", "wb") as file:
        pickle.dump(Harmful(), file)
    for name, message in (("a.pt", "is refused"), ("b.pt", "no checkpoint")):
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_what_is_not_ours_says_so(tmp_path, saved):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match="not a checkpoint of this project: it has no format, model"
    ):
        read_checkpoint(tmp_path / "other.pt")
    torch.save(saved[1] | {"format": 99}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="format 99, and this code reads format 2"):
        read_checkpoint(tmp_path / "newer.pt")
    new = {"zoom", "jitter", "transfer_lr", "freeze_epochs"}
    older = saved[1] | {
        "format": 1,
        "config": {k: v for k, v in saved[1]["config"].items() if k not in new}
        | {"init_from": None},
    }
    del older["transferred"]
    torch.save(older, tmp_path / "older.pt")
    read = read_checkpoint(tmp_path / "older.pt")
    assert (
        read["config"] == saved[1]["config"] and read["transferred"] == [] and read["format"] == 2
    )
    # what it did
    was = {
        "muon": 0.0,
        "ema_share": 1.0,
        "progressive_from": 0,
        "trivial_augment": False,
        "lr_by_width": 0.0,
    }
    before = saved[1] | {"config": {k: v for k, v in saved[1]["config"].items() if k not in was}}
    torch.save(before, tmp_path / "before.pt")
    assert read_checkpoint(tmp_path / "before.pt")["config"] == saved[1]["config"] | was
    with pytest.raises(UserError, match="there is no such file"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a folder; name the checkpoint in it"):
        read_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(saved, monkeypatch):
    folder, content = saved

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match="No space left on device. What was saved before is untouched"
    ):
        run_folder.save_checkpoint(folder, content | {"mark": "third"})
    monkeypatch.undo()
    assert run_folder.read_last(folder)["mark"] == "second"
    assert {p.name for p in folder.iterdir()} == {"last.pt", "last.prev.pt"}


def test_a_missing_run_folder_is_made_again(saved, tmp_path):
    run_folder.save_checkpoint(tmp_path / "gone" / "run", saved[1])
    assert run_folder.read_last(tmp_path / "gone" / "run")
