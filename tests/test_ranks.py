"""Several processes on the CPU (gloo): the mathematics of one process, one writer, and ranks that
stop or die."""

import multiprocessing
import os
import signal
import socket
import sys
from datetime import timedelta

import pytest
import torch

import train_cifar100
from tests.helpers.runs import NARROW, content_of, scalars_of, signal_after, with_sample
from training import commands
from training.ranks import Ranks, ranks_from_environment
from training.report import read_metrics

RUN = [*NARROW, "--epochs", "2", "--model", "vgg-att3-concat-pc", "--set", "progressive=none"]


def rank_process(
    folder: str, rank: int, count: int, port: int, words: list[str], hurt: tuple[int, int] | None
) -> None:
    """A rank's whole life, as torchrun starts it. ``hurt``: (signal, after how many steps) for this
    rank."""
    from data import cifar_sample

    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.stderr = open(f"stderr-{rank}", "w", buffering=1)
    sys.stdout = open(f"stdout-{rank}", "w", buffering=1)
    torch.set_num_threads(1)
    sets = cifar_sample(classes=4, train_per_class=24, test_per_class=8)
    task = with_sample(train_cifar100.TASK, lambda config: sets)
    if hurt:
        signal_after(pytest.MonkeyPatch(), hurt[1], hurt[0])
    os._exit(commands.main(task, words))


@pytest.fixture
def ranks(tmp_path):
    """ranks(words, count=2, hurt={}) -> exit codes, of processes that share a new folder."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        ["tests.test_ranks", "torch._dynamo", "torch.utils.tensorboard.summary"]
    )

    def call(*words, count=2, hurt=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            fork.Process(
                target=rank_process,
                args=(
                    str(tmp_path),
                    rank,
                    count,
                    port,
                    [str(w) for w in words],
                    (hurt or {}).get(rank),
                ),
            )
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            if process.is_alive():  # it would keep pytest from ending
                process.kill()
                process.join()
        return [process.exitcode for process in processes]

    return call


def test_two_ranks_are_one_process_with_halves_as_micro_batches(ranks, tmp_path):
    """Plain batch norm, no dropout: parameters to 1e-5 after 12 steps, and rank 0 alone writes."""
    assert ranks(*RUN, "--run-dir", "two") == [0, 0]
    assert ranks(*RUN, "--run-dir", "one", "--micro-batch", 8, count=1) == [0]
    two, one = content_of(tmp_path / "two"), content_of(tmp_path / "one")
    for weights in ("model", "ema"):
        for name, value in one[weights].items():
            # of rank 0's halves there, of all halves here
            if not name.endswith(("running_mean", "running_var", "tracked")):
                torch.testing.assert_close(
                    two[weights][name], value, atol=1e-5, rtol=1e-5, msg=name
                )
    assert list(two["model"]) == list(one["model"])  # no "module." in front
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("two", "one")]
    for a, b in zip(*rows, strict=True):
        assert (
            a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            and a["train_top1"] == b["train_top1"]
        )
        assert a["eval_loss"] > 0 and a["lr"] == b["lr"]
    assert [step for step, _ in scalars_of(tmp_path / "two")["train/results/loss"]] == [1, 2]
    assert len(list((tmp_path / "two").glob("*tfevents*"))) == 1
    assert (tmp_path / "stdout-1").read_text() == ""


def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(ranks, tmp_path):
    assert ranks(*RUN, "--run-dir", "r", hurt={1: (signal.SIGTERM, 4)}) == [143, 143]
    content = content_of(tmp_path / "r")
    assert (content["position"]["epoch"], content["position"]["step"]) == (0, 4)
    assert content["position"]["sums"][2] == 4 * 16  # of both ranks
    assert "--resume r" in (tmp_path / "stdout-0").read_text()
    assert ranks("--resume", "r", "--device", "cpu", count=1, hurt={0: (signal.SIGTERM, 5)}) == [
        143
    ]
    assert ranks("--resume", "r", "--device", "cpu") == [0, 0]
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2] and content_of(tmp_path / "r")["finished"]


def test_a_rank_that_dies_ends_the_run_with_a_checkpoint(ranks, tmp_path):
    first, second = ranks(*RUN, "--run-dir", "r", hurt={1: (signal.SIGKILL, 3)})
    assert (first, second) == (1, -signal.SIGKILL)
    said = (tmp_path / "stderr-0").read_text()
    assert (
        "rank 0 lost the others" in said and "step 3 is saved" in said and "Traceback" not in said
    )
    assert content_of(tmp_path / "r")["position"]["step"] == 3
    assert ranks("--resume", "r", "--device", "cpu", count=1) == [0]


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two GPUs: SyncBatchNorm has no CPU code, NCCL a GPU a rank",
)
def test_two_gpus_are_one_that_sees_the_whole_batch(ranks, tmp_path):
    words = [*RUN, "--device", "cuda", "--no-compile"]
    assert ranks(*words, "--run-dir", "two") == [0, 0]
    assert ranks(*words, "--run-dir", "one", count=1) == [0]
    two, one = content_of(tmp_path / "two")["model"], content_of(tmp_path / "one")["model"]
    for name, value in one.items():  # the running statistics, too
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_shares_are_those_of_tensor_split():
    for total in range(0, 30):
        for count in range(1, 6):
            parts = [list(range(total))[Ranks(rank, count).share(total)] for rank in range(count)]
            assert parts == [part.tolist() for part in torch.arange(total).tensor_split(count)]


def test_variables_that_were_left_over(monkeypatch, capsys, tmp_path):
    """From another program, or from a shell that once was torchrun's."""
    monkeypatch.chdir(tmp_path)
    whole = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }

    def environment(**change):
        for name in whole:
            monkeypatch.delenv(name, raising=False)
        for name, value in change.items():
            monkeypatch.setenv(name, value)

    for alone in (
        {},
        dict.fromkeys(whole, ""),
        {"RANK": "3"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"LOCAL_RANK": "x"},
    ):
        environment(**alone)
        assert ranks_from_environment() == Ranks(0, 1, 0)
    environment(**whole)
    assert ranks_from_environment() == Ranks(0, 2, 0)
    for change, said in (
        (
            {"MASTER_ADDR": ""},
            "says RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=29500 without MASTER_ADDR, as",
        ),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "without MASTER_ADDR, MASTER_PORT, as"),
        ({"RANK": "", "LOCAL_RANK": ""}, "without RANK, LOCAL_RANK, as"),
        ({"RANK": "2"}, "says RANK=2"),
        ({"RANK": "-1"}, "says RANK=-1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9999"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5"),
    ):
        environment(**whole | change)
        assert commands.main(train_cifar100.TASK, RUN) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert (
            "start with torchrun, or without it unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR "
            "MASTER_PORT" in error
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_never_come(monkeypatch, capsys, tmp_path, rank):
    """Rank 0 waits for them; rank 1 asks at an address where nobody answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.ranks.RENDEZVOUS_TIMEOUT", timedelta(seconds=0.2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (
        ("RANK", rank),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", rank),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, value)
    assert commands.main(train_cifar100.TASK, RUN) == 1
    out, error = capsys.readouterr()
    assert (
        f"error: rank {rank} has not met the 1 others at 127.0.0.1:{port} (" in error
        and "unset RANK" in error
    )
    assert (rank == "0") == (
        f"Waiting for 2 ranks to meet at 127.0.0.1:{port}, as RANK, WORLD_SIZE" in out
    )
    assert not list(tmp_path.iterdir())


def test_rank_0s_error_is_the_only_one(ranks, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "best.pt").write_text("mine")
    assert ranks(*RUN, "--run-dir", "r") == [2, 1]
    assert "r holds best.pt, which a run writes too" in (tmp_path / "stderr-0").read_text()
    said = (tmp_path / "stderr-1").read_text()
    assert "rank 1 lost the others" in said and "Traceback" not in said


def test_wrong_use(monkeypatch, capsys, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == Ranks(0, 1, 0)
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ):
        monkeypatch.setenv(name, value)
    assert ranks_from_environment() == Ranks(1, 2, 1)
    assert commands.main(train_cifar100.TASK, ["--sanity"]) == 2
    assert "start them without torchrun" in capsys.readouterr().err
    assert commands.main(train_cifar100.TASK, ["--device", "cuda:1"]) == 2
    assert "give --nproc-per-node at most that" in capsys.readouterr().err
