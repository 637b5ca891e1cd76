"""What a run ran on: versions, device, threads, git commit, command line."""

from __future__ import annotations

import functools
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from common.device import device_name


def environment(device: torch.device) -> dict:
    """What a run ran on, for config.json: versions, device, threads, git commit."""
    others = {name: version(name) for name in ("torchvision", "numpy", "tensorboard", "pillow")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **others,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


@functools.cache
def git_commit() -> str | None:
    """This code's commit when the run began, with "+changes" where files differ from it; None
    outside a checkout."""
    try:
        commit = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "-uno").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def short_commit(commit: str) -> str:
    """A commit's first 7 digits, and whether files differed from it."""
    commit, plus, changes = commit.partition("+")
    return commit[:7] + plus + changes


def git(*words: str) -> str:
    """What git prints about this checkout."""
    here = Path(__file__).resolve().parent
    return subprocess.run(
        ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
    ).stdout


def command_line(argv: list[str]) -> str:
    """The command line of this process, for a shell."""
    program = Path(sys.argv[0])
    is_module = program.name == "__main__.py"
    words = ["-m", program.parent.name] if is_module else [program.name]
    return shlex.join(["python", *words, *argv])
