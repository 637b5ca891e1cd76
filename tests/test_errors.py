"""Errors that a user can mend, and exit statuses."""

import pytest
import torch

from common.errors import Interrupted, UserError, exit_status, is_oom_error


def test_what_may_be_out_of_memory_is_so_on_a_full_gpu_only(monkeypatch):
    vague = RuntimeError("GET was unable to find an engine to execute this computation")
    assert not is_oom_error(vague) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 2**30, 11 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    for reserved, full in ((8 * 2**30, True), (9 * 2**30, False)):  # 5 and 6 of 11 GiB to be had
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda reserved=reserved: reserved)
        assert is_oom_error(vague) is full
        assert not is_oom_error(RuntimeError("a mistake of ours"))


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("no such thing", 2), 2, "error: no such thing\n"),
        (UserError("a.png is bad"), 1, "error: a.png is bad\n"),
        (
            MemoryError(),
            1,
            "error: out of memory outside the training step: MemoryError\nIs another program",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            1,
            "outside the training step: CUDA out of memory.\nIs another",
        ),
        (PermissionError(13, "Permission denied", "runs"), 1, "error: runs: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (Interrupted(15), 143, ""),
    ],
)
def test_what_a_user_can_mend_is_told_without_a_traceback(capsys, error, status, words):
    with exit_status("Stopped.") as told:
        raise error
    assert told.code == status
    assert words in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        with exit_status(""):
            torch.zeros(2) @ torch.zeros(3)
