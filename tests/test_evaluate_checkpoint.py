"""--evaluate."""

import re

import pytest
import torch

from training.evaluate_checkpoint import precision_here
from training.report import read_metrics


def test_evaluate_repeats_the_last_epochs_numbers(cli, unhurt):
    status, out, _ = cli("--evaluate", unhurt / "last.pt", "--device", "cpu")
    row = read_metrics(unhurt / "metrics.csv")[-1]
    assert status == 0
    assert (
        f"loss {row['eval_loss']:.4f}   top-1 {row['eval_top1']:.2f} %   top-5 "
        f"{row['eval_top5']:.2f} %" in out
    )
    classes = [float(x) for x in re.findall(r"(\d+\.\d) % of 8", out)]
    assert len(classes) == 4 and sum(classes) / 4 == pytest.approx(row["eval_top1"], abs=0.1)
    assert classes == sorted(classes)


def test_evaluate_takes_the_settings_from_the_checkpoint(cli, unhurt, monkeypatch):
    for words in (["--sample"], ["--width", 0.5], ["--set", "dropout=0"], ["--run-dir", "x"]):
        status, _, err = cli("--evaluate", unhurt / "last.pt", *words)
        assert status == 2 and f"from the checkpoint: leave out {words[0]}" in err
    # emulated, it would take hours
    monkeypatch.setattr("common.device.cpu_has_bf16", lambda: False)
    here = [precision_here(name, torch.device("cpu")) for name in ("bf16", "fp16", "fp32")]
    assert here == ["auto", "auto", "fp32"]
    if torch.cuda.is_available():
        assert precision_here("fp16", torch.device("cuda")) == "fp16"
