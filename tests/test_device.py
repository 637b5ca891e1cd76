"""Precision, compilation and memory of a device."""

import math
import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch

from common.device import Precision, choose_compile, choose_precision, persist_compile_cache
from common.errors import UserError
from tests.helpers.trainers import CPU, make_trainer


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_a_cpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr("common.device.cpu_has_bf16", lambda: has_bf16)
    assert choose_precision("auto", CPU) == expected
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize(
    "name, native, expected",
    [
        ("NVIDIA H100 80GB HBM3", True, "bf16"),
        ("NVIDIA GeForce RTX 2080 Ti", False, "fp16"),
        ("NVIDIA GeForce GTX 1080 Ti", False, "fp16"),
        ("NVIDIA GeForce GTX 1660 Ti", False, "fp32"),
    ],
)
def test_auto_precision_on_a_gpu(monkeypatch, name, native, expected):
    """Turing and older emulate bf16: emulation must not count. GTX 16xx give NaN in fp16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_bf16_runs_and_its_maps_are_float32():
    ours = make_trainer()
    ours.precision = Precision("bf16", CPU)
    images, labels = ours.batches.all[0]
    ours.model.train()
    ours.step(images, labels)
    assert math.isfinite(ours.checked_loss())
    with ours.precision.context():
        logits, maps = ours.model.eval()(images, return_attention=True)
    assert logits.dtype == torch.bfloat16 and {m.dtype for m in maps.values()} == {torch.float32}
    for attention_map in maps.values():
        torch.testing.assert_close(attention_map.sum((1, 2)), torch.ones(8))


def test_compiling_and_checkpointing_where_the_statistics_would_be_wrong(monkeypatch):
    assert not choose_compile("auto", CPU, False)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    assert choose_compile(True, CPU, False) and not choose_compile(False, CPU, True)
    with pytest.raises(UserError, match="wrong batch-norm statistics in PyTorch 2.6.0"):
        choose_compile(True, CPU, True)


def test_where_compiled_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    persist_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    persist_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(
        tmp_path / "cache" / "learn-to-pay-attention"
    )
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    persist_compile_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="asks glibc's malloc, which took no such setting before 2.35",
)
def test_large_blocks_are_kept_from_one_step_to_the_next():
    """In a process of its own: what is free in this one's heap by now would count."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
        import ctypes, torch
        from common.device import tune_malloc
        libc = ctypes.CDLL(None)

        class Mallinfo(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
        libc.mallinfo2.restype = Mallinfo
        blocks = [torch.empty(10 * 2**20) for _ in range(6)]    # 40 MiB each
        # each mapped on its own: given back when it is freed
        assert libc.mallinfo2().hblks >= 6
        del blocks
        tune_malloc()
        mapped = libc.mallinfo2().hblks
        blocks = [torch.empty(10 * 2**20) for _ in range(6)]
        heap = libc.mallinfo2().arena
        assert libc.mallinfo2().hblks == mapped and heap >= 240 * 2**20
        del blocks
        assert libc.mallinfo2().arena >= heap
        """),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
