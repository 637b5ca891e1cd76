"""What a run tells: metrics.csv, TensorBoard events, cutting them back on resume, attention
health."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tensorboard_http import tensorboard_over
from training import report as report_module
from training.attention_health import LevelHealth
from training.report import METRIC_FIELDS, Report, read_metrics, truncate_after

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


def _run(run_dir, epochs, *, start=True, finish=False):
    report = Report(run_dir)
    if start:
        report.start(
            "python train_cifar100.py --lr 0.1",
            {"lr": 0.1, "mean": [0.5, 0.4], "note": "a|b"},
            HPARAMS,
        )
    for epoch in epochs:
        report.epoch(_row(epoch, evaluated=epoch % 2 == 0))
        report.health(epoch, _health(float(epoch)))
        report.overlays(epoch, _sheet(epoch))
    if finish:
        report.finish(max(epochs), HPARAMS, {"top1": 77.5})
    report.close()
    return report


def _events(run_dir, purge=False):
    """{tag: [step, ...]} of everything in the event files (`purge`: of what TensorBoard would show
    of them)."""
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
        assert board.runs() == ["one", "stopped"]  # hparams made no run of their own
        tags = set(board.tags("scalars")["one"])
        assert tags >= {
            "loss/train",
            "loss/test",
            "top1/train",
            "top1/test",
            "top5/test",
            "learning_rate",
            "images_per_second",
            "peak_memory_mib",
            "attention/conv7/score_sd",
            "attention/conv7/entropy",
            "attention/conv7/gate_gradient",
            "attention/conv13/entropy",
            "final/top1",
        }
        assert "attention/conv13/gate_gradient" not in tags
        field = METRIC_FIELDS.index
        assert board.scalars("one", "loss/train") == [
            (epoch, pytest.approx(epoch + field("train_loss") / 7)) for epoch in range(1, 5)
        ]
        assert board.scalars("one", "top1/test") == [
            (epoch, pytest.approx(epoch + field("eval_top1") / 7)) for epoch in (2, 4)
        ]
        assert board.scalars("one", "attention/conv7/gate_gradient") == [
            (e, 3.0 * e) for e in range(1, 5)
        ]

        images = board.images("one", "attention/test images")
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
        metrics = {each["name"]["tag"]: each["value"] for each in groups["one"]["metricValues"]}
        assert metrics["final/top1"] == 77.5 and metrics["top1/test"] == pytest.approx(
            4 + field("eval_top1") / 7
        )
        assert groups["one"]["sessions"][0]["status"] == "STATUS_SUCCESS"
        # in the table before it is finished
        assert groups["stopped"]["sessions"][0]["status"] == "STATUS_UNKNOWN"


def test_a_val_split_is_called_so(tmp_path):
    report = Report(tmp_path, eval_name="val")
    report.epoch(_row(1))
    report.overlays(1, _sheet(1))
    assert {"loss/val", "top1/val", "top5/val", "attention/val images"} <= set(_events(tmp_path))
    assert not any("test" in tag for tag in _events(tmp_path))


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
    truncate_after(tmp_path / "hurt", 3)
    events = [name for name in _names(tmp_path / "hurt") if "tfevents" in name]
    assert len(events) == 1 and _names(tmp_path / "hurt") == [*events, "metrics.csv"]
    assert [row["epoch"] for row in read_metrics(tmp_path / "hurt" / "metrics.csv")] == [1, 2, 3]
    _run(tmp_path / "hurt", range(4, 7), start=False, finish=True)
    assert _events(tmp_path / "hurt") == _events(tmp_path / "unhurt")
    assert _events(tmp_path / "hurt")["loss/train"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "hurt" / "metrics.csv").read_text() == (
        tmp_path / "unhurt" / "metrics.csv"
    ).read_text()


def test_a_finished_run_can_be_made_longer(tmp_path):
    _run(tmp_path, range(1, 4), finish=True)
    truncate_after(tmp_path, 3)
    events = _events(tmp_path)
    assert events["loss/train"] == [1, 2, 3] and "command/text_summary" in events
    assert "final/top1" not in events and "_hparams_/session_end_info" not in events
    assert "_hparams_/session_start_info" in events
    _run(tmp_path, [4], start=False, finish=True)
    assert _events(tmp_path)["final/top1"] == [4] and "_hparams_/session_end_info" in _events(
        tmp_path
    )


def test_cut_back_after_a_kill_in_mid_write_and_twice(tmp_path):
    report = _run(tmp_path, range(1, 4))
    with open(report.events_path, "r+b") as file:
        file.truncate(os.path.getsize(report.events_path) - 7)  # the overlay of epoch 3 is broken
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.1,0.")
    truncate_after(tmp_path, 3)
    once = _events(tmp_path), (tmp_path / "metrics.csv").read_bytes()
    assert once[0]["attention/test images"] == [1, 2] and once[0]["attention/conv7/entropy"] == [
        1,
        2,
        3,
    ]
    assert once[1].count(b"\n") == 4 and once[1].endswith(b"\n")
    truncate_after(tmp_path, 3)
    assert (_events(tmp_path), (tmp_path / "metrics.csv").read_bytes()) == once
    assert len(_names(tmp_path)) == 2


def test_a_crash_before_the_old_files_are_removed_is_healed(tmp_path):
    old = _run(tmp_path, range(1, 4)).events_path
    shutil.copy(old, tmp_path / "copy")
    truncate_after(tmp_path, 2)
    (tmp_path / "copy").rename(old)  # as if we had been killed between the renaming and the removal
    assert _events(tmp_path)["loss/train"] == [1, 2, 3, 1, 2]
    # TensorBoard shows no doubles meanwhile
    assert _events(tmp_path, purge=True)["loss/train"] == [1, 2]
    truncate_after(tmp_path, 2)
    assert _events(tmp_path)["loss/train"] == [1, 2] and not old.exists()


def test_a_resumed_run_that_is_killed_and_cut_back_again(tmp_path):
    _run(tmp_path, range(1, 4))
    truncate_after(tmp_path, 2)
    _run(tmp_path, range(3, 5), start=False)
    truncate_after(tmp_path, 3)
    _run(tmp_path, range(4, 6), start=False)
    assert _events(tmp_path)["loss/train"] == [1, 2, 3, 4, 5]
    assert _events(tmp_path)["command/text_summary"] == [0]


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    _run(tmp_path, [1])
    truncate_after(tmp_path, -1)
    assert read_metrics(tmp_path / "metrics.csv") == [] and _events(tmp_path) == {}
    _run(tmp_path, [1, 2])
    events = _events(tmp_path)
    assert events["command/text_summary"] == [0] and events["loss/train"] == [1, 2]


def test_cut_back_where_nothing_was_written_yet(tmp_path):
    truncate_after(tmp_path, 5)
    assert _names(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("epoch,lr")  # killed in the very first write
    (tmp_path / "events.out.tfevents.1700000000.host.1").write_bytes(b"")
    truncate_after(tmp_path, 0)
    _run(tmp_path, [1])
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.csv")] == [1]
    assert _events(tmp_path)["loss/train"] == [1]


def test_event_files_sort_in_the_order_they_were_made(tmp_path, monkeypatch):
    # a clock that stands still
    monkeypatch.setattr(report_module.time, "time", lambda: 1700000000.0)
    made = [_run(tmp_path, [epoch], start=False).events_path for epoch in range(1, 13)]
    assert made == sorted(set(made))
    assert _events(tmp_path)["loss/train"] == list(range(1, 13))


def test_a_full_disk_is_an_error_that_names_the_file_and_spoils_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    report = _run(tmp_path, [1, 2])
    size, limits = report.events_path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    report = Report(tmp_path)
    report.epoch(_row(3))
    kept = report.events_path.read_bytes()
    # no file may grow past this
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            report.overlays(3, _sheet(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert size > 1000 and caught.value.filename == str(report.events_path)
    assert report.events_path.read_bytes() == kept
    report.overlays(3, _sheet(3))  # room again
    assert _events(tmp_path)["attention/test images"] == [1, 2, 3]


def test_a_vanished_folder_is_an_error_that_names_the_file(tmp_path):
    report = _run(tmp_path / "run", [1])
    report = Report(tmp_path / "run")
    report.epoch(_row(2))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="metrics.csv"):
        report.epoch(_row(3))
    with pytest.raises(FileNotFoundError, match="tfevents"):
        report.overlays(3, _sheet(3))
    report.close()
    report.close()
    with pytest.raises(ValueError, match="closed"):
        report.overlays(3, _sheet(3))
