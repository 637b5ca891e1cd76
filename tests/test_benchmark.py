"""--benchmark: the table's numbers add up, the arithmetic is counted, and what it writes can be
read."""

import copy
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F

from attention_model import build_model
from common.device import cpu_has_bf16
from tests.helpers.trainers import CONFIG, Batches, make_trainer
from training import benchmark
from training.trainer import Trainer


def test_benchmark_prints_a_table_and_writes_it(cli, tmp_path):
    status, out, err = cli(
        *(
            "--benchmark 5 --sample --width 0.0625 --batch-size 8 --device cpu "
            "--precision fp32 --num-workers 0 --json b.json"
        ).split()
    )
    assert status == 0, err
    result = json.loads((tmp_path / "b.json").read_text())
    for word in ("training step", "the plain way", f"{result['ratio']:.2f}", "fp32, channels_last"):
        assert word in out
    assert result["ratio"] == pytest.approx(
        result["images_per_second"] / result["baseline_images_per_second"]
    )
    assert result["step_ms"] == pytest.approx(
        1000 * result["batch_size"] / result["images_per_second"]
    )
    assert set(result["parts_ms"]) == set(benchmark.PARTS) and min(result["parts_ms"].values()) > 0
    assert result["flop_per_second"] == pytest.approx(
        result["flop_an_image"] * result["images_per_second"]
    )
    assert 0 < result["share_of_matrix_rate"] < 1
    assert not list(tmp_path.glob("runs/*/*"))
    status, _, err = cli("--json", "b.json")
    assert status == 2 and "--json goes with --benchmark" in err


def test_a_plain_way_that_does_not_fit_loses_nothing(cli, monkeypatch, tmp_path):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(benchmark, "baseline", full)
    status, out, err = cli(
        *(
            "--benchmark 1 --sample --width 0.0625 --batch-size 8 --device cpu "
            "--precision fp32 --json b.json"
        ).split()
    )
    assert status == 0, err
    assert "out of memory" in out and json.loads((tmp_path / "b.json").read_text())["ratio"] is None


def test_the_arithmetic_is_that_of_the_convolutions():
    """vgg-gap, by hand: 2 operations a multiply-add; forward, and twice that backward, but for the
    image's gradient."""
    ours = make_trainer(model="vgg-gap", width=1 / 16)
    side, macs, first, channels = 32, 0, None, 3
    for number, block in enumerate(((4, 4), (8, 8), (16,) * 3, (32,) * 3, (32,) * 3), start=1):
        side //= 2 if number > 3 else 1
        for wide in block:
            layer = channels * wide * 9 * side**2
            first = first or layer
            macs, channels = macs + layer, wide
    macs += 32 * 4
    assert benchmark.flops_per_image(ours) == 2 * (3 * macs - first)


def test_full_width_is_what_the_paper_file_says():
    """3.8 GMAC an image forward (PAPER: 1804.02391's VGG-att3 at 32x32)."""
    with torch.device("meta"):
        model = build_model("vgg-att3-concat-pc", 100)
        images = torch.empty(1, 3, 32, 32)
    with benchmark.FlopCounterMode(display=False) as counter:
        model.eval()(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(3.8, abs=0.1)


def test_parts_are_told_apart(monkeypatch):
    ours, clock = make_trainer(), [0.0]
    monkeypatch.setattr(benchmark, "synced_time", lambda device: clock[0])

    def taking(seconds, work):
        def call(*args, **kwargs):
            clock[0] += seconds
            return work(*args, **kwargs)

        return call

    ours.run_model, ours.gradients = taking(1.0, ours.run_model), taking(2.0, ours.gradients)
    ours.precision.scaler.step = taking(4.0, ours.precision.scaler.step)
    batches = iter(ours.batches.all)
    found = benchmark.parts(ours, iter(taking(8.0, lambda: next(batches)), None), 3)
    assert found == {"data": 8000, "forward": 1000, "backward": 2000, "optimizer": 4000}
    assert ours.gradients.__name__ == "call"  # put back


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no native bf16")
def test_a_default_step_beats_plain_fp32():
    """Full width, 100 classes, batch 32, in turn, in one run: the trainer's whole step by default
    settings (bf16, channels_last, Muon, moving average) against the same network in fp32 and NCHW
    with torch's SGD."""
    torch.manual_seed(0)
    plain = build_model("vgg-att3-concat-pc", 100, dropout=0.0)
    ours = Trainer(
        CONFIG | {"model": "vgg-att3-concat-pc", "batch_size": 32},
        copy.deepcopy(plain),
        Batches(32),
        torch.device("cpu"),
        precision="bf16",
    )
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = ours.batches.all[0]

    def plain_step(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()

    seconds = {step: math.inf for step in (ours.step, plain_step)}
    for _ in range(20):  # the least of each: what the machine does when it is left alone
        for step in seconds:
            started = time.perf_counter()
            step(
                images.contiguous(memory_format=torch.channels_last)
                if step == ours.step
                else images,
                labels,
            )
            seconds[step] = min(seconds[step], time.perf_counter() - started)
        ratio = seconds[plain_step] / seconds[ours.step]
        if ratio >= 1.9:
            break
    print(f"{ratio:.2f} times the images a second of plain fp32")
    assert ratio >= 1.9
