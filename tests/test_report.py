"""What a run tells: metrics.csv, TensorBoard events, cutting them back on resume, attention
health."""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.environment import ROOT
from tests.helpers.tensorboard_http import tensorboard_over
from training import event_files
from training.attention_health import LevelHealth
from training.report import METRIC_FIELDS, Report, read_metrics, truncate_after
from training.trainer import StepPoint

HPARAMS = {"model": "vgg-gap", "lr": 0.1, "batch_size": 128, "compile": False, "micro_batch": None}


def _row(epoch, evaluated=True):
    row = {name: epoch + index / 7 for index, name in enumerate(METRIC_FIELDS)} | {"epoch": epoch}
    return row if evaluated else row | {"eval_loss": None, "eval_top1": None, "eval_top5": None}


def _health(value):
    return {
        "conv7": LevelHealth(value, 2 * value, 0.5, 3 * value),
        "conv13": LevelHealth(value, value, 0.25, None),
    }


def _sheet(epoch):
    """Blocks of 10x10 pixels of one colour each, as an enlarged image has."""
    return (
        np.random.default_rng(epoch)
        .integers(0, 256, (4, 6, 3), dtype=np.uint8)
        .repeat(10, 0)
        .repeat(10, 1)
    )


def _run(run_dir, epochs, *, start=True, finish=False, hparams=HPARAMS):
    """Epochs of four steps, with points of the curves by step at the second and the fourth."""
    report = Report(run_dir)
    if start:
        report.start(
            "python train_cifar100.py --lr 0.1", {"lr": 0.1, "mean": [0.5, 0.4], "note": "a|b"}
        )
    report.tabs(hparams)
    for epoch in epochs:
        for step in (4 * epoch - 2, 4 * epoch):
            report.steps([StepPoint(step, 3.0 / step, 0.1 * step)])
        report.epoch(_row(epoch, evaluated=epoch % 2 == 0))
        report.health(epoch, _health(float(epoch)))
        report.overlays(epoch, [_sheet(epoch), _sheet(-epoch % 100)])
    if finish:
        report.finish()
    report.close()
    return report


def _events(run_dir, purge=False):
    """{tag: [step, ...]} of everything in the event files (`purge`: of what TensorBoard would show
    of them); of those of the training curves, with "train/" before the tag."""
    run_dir = Path(run_dir)
    folders = [("", run_dir), ("train/", run_dir / "train")]
    return {
        prefix + tag: steps
        for prefix, folder in folders
        if folder.is_dir()
        for tag, steps in _events_in(folder, purge).items()
    }


def _events_in(run_dir, purge):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(run_dir),
        size_guidance={"scalars": 0, "images": 0, "tensors": 0},
        purge_orphaned_data=purge,
    )
    accumulator.Reload()
    steps = {
        tag: [each.step for each in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }
    steps |= {
        tag: [each.step for each in accumulator.Images(tag)] for tag in accumulator.Tags()["images"]
    }
    steps |= {
        tag: [each.step for each in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }
    return steps | {tag: [0] for tag in accumulator.summary_metadata if tag.startswith("_hparams_")}


def _names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def test_tensorboard_shows_a_finished_run_over_http(tmp_path):
    _run(tmp_path / "one", range(1, 5), finish=True)
    _run(tmp_path / "stopped", range(1, 3))
    with tensorboard_over(tmp_path) as board:
        # hparams made no run of their own
        assert board.runs() == ["one", "one/train", "stopped", "stopped/train"]
        assert set(board.tags("scalars")["one"]) == {
            "results/accuracy, top-1 %",
            "results/loss",
            "results/top-5 accuracy, %",
            "run/learning rate",
            "run/learning rate by step",
            "run/images per second",
            "run/peak memory, MiB",
            "run/seconds",
            "spatial attention/conv7/score_sd",
            "spatial attention/conv7/entropy",
            "spatial attention/conv7/gate_gradient",
            "spatial attention/conv13/score_sd",
            "spatial attention/conv13/entropy",
        }
        # the same tags as the test set's: in one chart
        assert set(board.tags("scalars")["one/train"]) == {
            "results/accuracy, top-1 %",
            "results/loss",
            "results/loss by step",
        }
        field = METRIC_FIELDS.index
        assert board.scalars("one/train", "results/loss") == [
            (epoch, pytest.approx(epoch + field("train_loss") / 7)) for epoch in range(1, 5)
        ]
        assert board.scalars("one", "results/accuracy, top-1 %") == [
            (epoch, pytest.approx(epoch + field("eval_top1") / 7)) for epoch in (2, 4)
        ]
        assert board.scalars("one", "spatial attention/conv7/gate_gradient") == [
            (e, 3.0 * e) for e in range(1, 5)
        ]
        by_step = range(2, 17, 2)
        assert board.scalars("one/train", "results/loss by step") == [
            (step, pytest.approx(3 / step)) for step in by_step
        ]
        assert board.scalars("one", "run/learning rate by step") == [
            (step, pytest.approx(0.1 * step)) for step in by_step
        ]
        charts = {
            chart["title"]: chart["multiline"]["tag"]
            for category in board.custom_scalars()["category"]
            for chart in category["chart"]
        }
        tags = {tag for run in board.runs() for tag in board.tags("scalars")[run]}
        shown = {
            title: {tag for tag in tags if any(re.search(each, tag) for each in patterns)}
            for title, patterns in charts.items()
        }
        assert shown["accuracy, top-1 %"] == {"results/accuracy, top-1 %"}
        assert shown["loss"] == {"results/loss"}
        assert len(shown["entropy"]) == 2 and len(shown) == 7

        images = board.images("one", "spatial attention/Test images 1")
        assert [step for step, _ in images] == [1, 2, 3, 4]
        for step, encoded in images:
            picture = Image.open(io.BytesIO(encoded))
            errors = np.abs(np.asarray(picture, dtype=int) - _sheet(step))
            assert picture.size == (60, 40) and errors.mean() < 2 and errors.max() < 40

        assert "python train_cifar100.py --lr 0.1" in board.text("one", "command/text_summary")
        assert "<td>[0.5, 0.4]</td>" in board.text("one", "configuration/text_summary")
        assert '<td>"a|b"</td>' in board.text("one", "configuration/text_summary").replace(
            "&#124;", "|"
        )

        groups = {group["name"]: group for group in board.hparams()}
        assert groups["one"]["hparams"] == {
            "model": "vgg-gap",
            "lr": 0.1,
            "batch_size": 128.0,
            "compile": "False",
            "micro_batch": "None",
        }
        metrics = groups["one"]["metricValues"]
        first, second = ({"group": "", **each["name"]} for each in metrics[:2])
        assert first == {"group": "", "tag": "results/accuracy, top-1 %"}
        assert second == {"group": "train", "tag": "results/accuracy, top-1 %"}
        assert metrics[0]["value"] == pytest.approx(4 + field("eval_top1") / 7)
        assert groups["one"]["sessions"][0]["status"] == "STATUS_SUCCESS"
        # in the table before it is finished
        assert groups["stopped"]["sessions"][0]["status"] == "STATUS_UNKNOWN"


def test_a_val_split_is_called_so(tmp_path):
    report = Report(tmp_path, eval_name="val")
    report.epoch(_row(1))
    report.overlays(1, [_sheet(1)])
    tags = set(_events(tmp_path))
    assert {"results, val/loss", "train/results, val/loss"} <= tags
    assert "spatial attention/Val images 1" in tags
    assert not any("est" in tag or tag.startswith("results/") for tag in tags)


def test_metrics_come_back_exactly(tmp_path):
    _run(tmp_path, range(1, 4))
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines()[0] == ",".join(METRIC_FIELDS) and len(text.splitlines()) == 4
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3] and isinstance(rows[0]["epoch"], int)
    for row in rows:
        wanted = _row(row["epoch"], evaluated=row["epoch"] % 2 == 0)
        for name in ("lr", "train_loss", "train_top1", "eval_loss", "eval_top1", "eval_top5"):
            assert row[name] == wanted[name]  # in full: bit for bit
        assert row["seconds"] == pytest.approx(wanted["seconds"], abs=0.01)


def test_numpy_and_tensor_numbers_are_welcome(tmp_path):
    report = Report(tmp_path)
    report.epoch(
        _row(1)
        | {"lr": np.float64(0.1), "train_loss": torch.tensor(0.5), "train_top1": np.float32(0.25)}
    )
    row = read_metrics(tmp_path / "metrics.csv")[0]
    assert (row["lr"], row["train_loss"], row["train_top1"]) == (0.1, 0.5, 0.25)
    with pytest.raises(ValueError, match="eval_top5"):
        report.epoch({name: value for name, value in _row(2).items() if name != "eval_top5"})


def test_a_broken_row_is_named(tmp_path):
    path = tmp_path / "metrics.csv"
    _run(tmp_path, [1])
    path.write_text(path.read_text() + "2,oops\n")
    with pytest.raises(ValueError, match="metrics.csv, line 3"):
        read_metrics(path)


def test_cut_back_then_on_has_neither_gaps_nor_doubles(tmp_path):
    _run(tmp_path / "unhurt", range(1, 7), finish=True)
    _run(tmp_path / "hurt", range(1, 6))
    truncate_after(tmp_path / "hurt", 3, 12)
    events = [name for name in _names(tmp_path / "hurt") if "tfevents" in name]
    assert len(events) == 1 and _names(tmp_path / "hurt") == [*events, "metrics.csv", "train"]
    assert len(_names(tmp_path / "hurt" / "train")) == 1
    assert [row["epoch"] for row in read_metrics(tmp_path / "hurt" / "metrics.csv")] == [1, 2, 3]
    _run(tmp_path / "hurt", range(4, 7), start=False, finish=True)
    assert _events(tmp_path / "hurt") == _events(tmp_path / "unhurt")
    assert _events(tmp_path / "hurt")["train/results/loss"] == [1, 2, 3, 4, 5, 6]
    assert _events(tmp_path / "hurt")["train/results/loss by step"] == list(range(2, 25, 2))
    assert (tmp_path / "hurt" / "metrics.csv").read_text() == (
        tmp_path / "unhurt" / "metrics.csv"
    ).read_text()


def test_a_finished_run_can_be_made_longer(tmp_path):
    _run(tmp_path / "r", range(1, 4), finish=True)
    assert "_hparams_/session_end_info" in _events(tmp_path / "r")
    truncate_after(tmp_path / "r", 3, 12)
    events = _events(tmp_path / "r")
    assert events["train/results/loss"] == [1, 2, 3] and "command/text_summary" in events
    assert not any(tag.startswith("_hparams_") for tag in events)
    _run(tmp_path / "r", [4], start=False, hparams=HPARAMS | {"epochs": 4}, finish=True)
    assert "_hparams_/session_end_info" in _events(tmp_path / "r")
    with tensorboard_over(tmp_path) as board:
        [group] = board.hparams()
        assert group["hparams"]["epochs"] == 4  # of the longer run
        assert group["sessions"][0]["status"] == "STATUS_SUCCESS"


def test_an_epoch_that_is_cut_back_keeps_its_points_up_to_the_checkpoint(tmp_path):
    _run(tmp_path, [1, 2])
    truncate_after(tmp_path, 1, 6)
    events = _events(tmp_path)
    assert events["train/results/loss by step"] == events["run/learning rate by step"] == [2, 4, 6]
    assert events["train/results/loss"] == [1] and events["run/seconds"] == [1]
    truncate_after(tmp_path, -1, 2)  # stopped in the first epoch
    assert _events(tmp_path) == {
        "train/results/loss by step": [2],
        "run/learning rate by step": [2],
    }


def test_the_curves_of_an_older_run_get_their_places_of_today(tmp_path):
    shutil.copytree(ROOT / "tests/fixtures/880d17b/cifar100", tmp_path / "old")
    before = _events(tmp_path / "old")
    for _ in range(2):  # as after a crash, and again
        truncate_after(tmp_path / "old", 1, 100)
        events = _events(tmp_path / "old")
        assert events["train/results/loss"] == events["results/loss"] == [1]
        assert events["train/results/accuracy, top-1 %"] == [1]
        assert events["spatial attention/conv7/entropy"] == [1]
        assert before["loss/train"] == before["loss/test"] == [1]
        assert not {tag for tag in events if tag in before} - {
            "command/text_summary",
            "configuration/text_summary",
        }


def test_cut_back_after_a_kill_in_mid_write_and_twice(tmp_path):
    report = _run(tmp_path, range(1, 4))
    path = report.events_paths[""]
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 7)  # the second overlay of epoch 3 is broken
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.1,0.")
    truncate_after(tmp_path, 3, 12)
    once = _events(tmp_path), (tmp_path / "metrics.csv").read_bytes()
    assert once[0]["spatial attention/Test images 2"] == [1, 2]
    assert once[0]["spatial attention/Test images 1"] == [1, 2, 3]
    assert once[0]["spatial attention/conv7/entropy"] == [1, 2, 3]
    assert once[1].count(b"\n") == 4 and once[1].endswith(b"\n")
    truncate_after(tmp_path, 3, 12)
    assert (_events(tmp_path), (tmp_path / "metrics.csv").read_bytes()) == once
    assert len(_names(tmp_path)) == 3 and len(_names(tmp_path / "train")) == 1


@pytest.mark.parametrize("folder, tag", [("", "results/loss"), ("train", "results/loss by step")])
def test_a_crash_before_the_old_files_are_removed_is_healed(tmp_path, folder, tag):
    old = _run(tmp_path, range(1, 5)).events_paths[folder]
    shutil.copy(old, tmp_path / "copy")
    before = _events_in(tmp_path / folder, False)[tag]
    truncate_after(tmp_path, 2, 8)
    kept = _events_in(tmp_path / folder, False)[tag]
    assert kept == [step for step in before if step <= (2 if folder == "" else 8)] != before
    (tmp_path / "copy").rename(old)  # as if we had been killed between the renaming and the removal
    assert _events_in(tmp_path / folder, False)[tag] == before + kept
    # TensorBoard shows no doubles meanwhile
    assert _events_in(tmp_path / folder, True)[tag] == kept
    truncate_after(tmp_path, 2, 8)
    assert _events_in(tmp_path / folder, False)[tag] == kept and not old.exists()


def test_a_resumed_run_that_is_killed_and_cut_back_again(tmp_path):
    _run(tmp_path, range(1, 4))
    truncate_after(tmp_path, 2, 8)
    _run(tmp_path, range(3, 5), start=False)
    truncate_after(tmp_path, 3, 12)
    _run(tmp_path, range(4, 6), start=False)
    assert _events(tmp_path)["train/results/loss"] == [1, 2, 3, 4, 5]
    assert _events(tmp_path)["train/results/loss by step"] == list(range(2, 21, 2))
    assert _events(tmp_path)["command/text_summary"] == [0]


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    _run(tmp_path, [1])
    truncate_after(tmp_path, -1)
    assert read_metrics(tmp_path / "metrics.csv") == [] and _events(tmp_path) == {}
    _run(tmp_path, [1, 2])
    events = _events(tmp_path)
    assert events["command/text_summary"] == [0] and events["train/results/loss"] == [1, 2]


def test_cut_back_where_nothing_was_written_yet(tmp_path):
    truncate_after(tmp_path, 5)
    assert _names(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("epoch,lr")  # killed in the very first write
    (tmp_path / "events.out.tfevents.1700000000.host.1").write_bytes(b"")
    truncate_after(tmp_path, 0)
    _run(tmp_path, [1])
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.csv")] == [1]
    assert _events(tmp_path)["train/results/loss"] == [1]


def test_event_files_sort_in_the_order_they_were_made(tmp_path, monkeypatch):
    # a clock that stands still
    monkeypatch.setattr(event_files.time, "time", lambda: 1700000000.0)
    made = [_run(tmp_path, [epoch], start=False).events_paths[""] for epoch in range(1, 13)]
    assert made == sorted(set(made))
    assert _events(tmp_path)["train/results/loss"] == list(range(1, 13))


def test_a_full_disk_is_an_error_that_names_the_file_and_spoils_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    report = _run(tmp_path, [1, 2])
    size, limits = report.events_paths[""].stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    report = Report(tmp_path)
    report.epoch(_row(3))
    kept = report.events_paths[""].read_bytes()
    # no file may grow past this
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            report.overlays(3, [_sheet(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert size > 1000 and caught.value.filename == str(report.events_paths[""])
    assert report.events_paths[""].read_bytes() == kept
    report.overlays(3, [_sheet(3)])  # room again
    assert _events(tmp_path)["spatial attention/Test images 1"] == [1, 2, 3]


def test_a_vanished_folder_is_an_error_that_names_the_file(tmp_path):
    report = _run(tmp_path / "run", [1])
    report = Report(tmp_path / "run")
    report.epoch(_row(2))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="metrics.csv"):
        report.epoch(_row(3))
    with pytest.raises(FileNotFoundError, match="tfevents"):
        report.overlays(3, [_sheet(3)])
    report.close()
    report.close()
    with pytest.raises(ValueError, match="closed"):
        report.overlays(3, [_sheet(3)])
