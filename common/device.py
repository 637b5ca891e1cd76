"""The device, its precision, compilation and memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from common.errors import UserError
from common.files import expand_user

# ---- device -------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """--device as a torch.device. Raises UserError if it does not exist."""
    if (
        name in ("auto", "cuda")
        and torch.distributed.is_initialized()
        and torch.cuda.is_available()
    ):
        return torch.device("cuda", torch.cuda.current_device())  # each rank has its own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):  # torch takes cuda:300 for cuda:44
        raise UserError(f"--device {name}: expected auto, cpu, cuda, or cuda:N", 2)
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {name}: PyTorch {torch.__version__} sees no CUDA GPU here. Check "
                'nvidia-smi. Which PyTorch fits which card: docs/hardware.md, "Old cards"'
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
            )
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}, {cpu_name()}"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synced_time(device: torch.device) -> float:
    """A clock in seconds, read after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- precision ----------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(name: str, device: torch.device) -> str:
    """--precision as bf16, fp16 or fp32. Raises UserError for fp16 on a CPU.

    auto: bf16 where it is native, else fp16 on CUDA and fp32 on CPUs. fp32 on a GTX 16xx, too,
    whose convolutions give NaN in fp16 (github.com/pytorch/pytorch/issues/77955).
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError(
            "fp16 needs a GPU, and there is none here (nvidia-smi must list it): "
            "a run in fp16 can be resumed on a GPU only; "
            "a new one can use --precision bf16 (if the CPU has it) or fp32",
            2,
        )
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
        return "fp32" if "GTX 16" in torch.cuda.get_device_name(device) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX). Emulated bf16 is hundreds of
    times slower than fp32."""
    checks = (
        getattr(torch.cpu, name, lambda: False)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check() for check in checks)


class Precision:
    """bf16, fp16 with a loss scaler, or fp32, as context and scaler."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.dtype = DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def context(self) -> AbstractContextManager:
        """For the forward pass; the weights and the optimizer stay in float32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def off(self) -> AbstractContextManager:
        """Inside the context: float32 stays float32, and the backward pass uses the types of the
        forward pass."""
        return torch.autocast(self.device.type, enabled=False)


# ---- compilation --------------------------------------------------------------------------------

COMPILES_CHECKPOINTS = (2, 15)  # the first PyTorch version that was seen to do it right


def choose_compile(
    asked: bool | str, device: torch.device, checkpoint_activations: bool, ranks: int = 1
) -> bool:
    """--compile; auto is on where it pays: one GPU that Triton supports (compute capability 7.0).
    The compiler stops at every SyncBatchNorm.

    Not with --checkpoint-activations: PyTorch 2.6 then updates the batch-norm statistics twice;
    2.15 does not (measured). Raises UserError if both are asked for and the version is older.
    """
    if asked == "auto":
        return (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device) >= (7, 0)
            and not checkpoint_activations
            and ranks == 1
        )
    if asked and checkpoint_activations and torch_version() < COMPILES_CHECKPOINTS:
        raise UserError(
            "--compile with --checkpoint-activations gives wrong batch-norm statistics in PyTorch "
            f"{torch.__version__}: leave one of them out, or install PyTorch 2.15",
            2,
        )
    return bool(asked)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def persist_compile_cache() -> None:
    """Let torch.compile cache its results in the user's cache folder, so that the next run starts
    fast even after a reboot; its default is in /tmp. TORCHINDUCTOR_CACHE_DIR overrides it. Call it
    before anything is built: importing the compiler fixes the folder, and several modules do."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(OSError, ValueError):  # no home, or a read-only one: /tmp then
        folder = expand_user(home) / "learn-to-pay-attention"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


# ---- memory -------------------------------------------------------------------------------------


def tune_malloc() -> None:
    """On a CPU, let the C library keep the memory of large tensors from step to step. By default it
    returns every block over 32 MiB to the system at once, and the next step pays for each page
    again: a tenth of the time of a quarter-width step on images of 32 px. glibc only; no effect
    with other C libraries."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # some versions refuse it, and would do worse with the other one alone
        if mallopt(mmap_threshold, 2**30):
            mallopt(trim_threshold, 2**31 - 1)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
