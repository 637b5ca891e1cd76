"""The fault campaign: a small real run is hurt again and again, goes on with --resume, and must end equal to the run that
never was. The long part: python -m pytest tests/test_campaign.py -m campaign -s
"""
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train_cifar100
from tests.test_command_line import NARROW, assert_runs_equal
from training import checkpoint, commands, run as run_module
from training.loop import Trainer
from training.options import UserError

EPOCHS = 16     # of six steps each, a checkpoint after every step
NEW = [*NARROW, "--epochs", str(EPOCHS), "--set", "dropout=0.5", "--overlay-every", "4"]
# How a process is hurt while it runs, and the exit codes that this may give: 0 when it was at its end already.
SIGNALS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,), "SIGINT twice": (130,)}   # -15: before its first step
HOOKS = {"disk full": (1,), "loss not a number": (1,), "out of memory": (1,), "folder gone for a while": (1,),
         "a second process": (-9,)}
# What is done to the files of a run that has been stopped by SIGKILL.
DAMAGE = ("last.pt cut short", "last.pt emptied", "last.pt with a flipped bit", "last.pt of another run", "last.pt lost",
          "config.json cut short", "metrics.csv cut short", "events cut short", "half-written files beside it")
KINDS = (*SIGNALS, *HOOKS, *DAMAGE)


def a_run(folder: str, words: list[str], hook: str, after: int) -> None:
    """A process's whole life: main() in ``folder``, saving after every step; ``hook`` happens at step ``after``."""
    from sample_data import cifar_sample
    os.chdir(folder)
    sys.stdout = sys.stderr = open("said", "a", buffering=1)
    torch.set_num_threads(1)
    sets = cifar_sample(classes=4, train_per_class=24, test_per_class=8)
    task = dataclasses.replace(train_cifar100.TASK, sample=lambda config: sets)
    run_module.SAVE_EVERY, run_module.SAVE_SHARE = 0.0, 1e9
    step, steps = Trainer.step, []

    def hooked(self, images, labels):
        steps.append(1)
        if len(steps) == after:
            if hook == "disk full":     # nothing can be written any more, as if by another program
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            elif hook == "loss not a number":
                images = images * float("nan")
            elif hook == "out of memory":
                def scarce(images):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                self.run_model = scarce
            elif hook == "folder gone for a while":     # until the loss stops the run, some checkpoints later
                os.rename("hurt", "moved")
        if hook == "folder gone for a while" and len(steps) == after + 3:
            images = images * float("nan")
        return step(self, images, labels)
    Trainer.step = hooked
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os._exit(commands.main(task, words))


class Campaign:
    """A run in ``folder``/hurt that is hurt until it has come to its end."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.tried = folder, random.Random(seed), collections.Counter()
        self.fork = multiprocessing.get_context("forkserver")  # forks from a process that has imported everything
        self.fork.set_forkserver_preload(["tests.test_campaign", "torch._dynamo", "torch.utils.tensorboard.summary"])
        self.last, self.config = folder / "hurt" / "last.pt", folder / "hurt" / "config.json"

    def start(self, *words: str, hook: str = "", after: int = 0):
        process = self.fork.Process(target=a_run, args=(str(self.folder), list(words), hook, after))
        process.start()
        return process

    def go(self, hook: str = "", after: int = 0):
        words = ["--resume", "hurt"] if self.config.exists() else [*NEW, "--run-dir", "hurt"]
        return self.start(*words, hook=hook, after=after)

    def steps_saved(self) -> int:
        content = checkpoint.read_last(self.folder / "hurt") if self.config.exists() else None
        return content["position"]["epoch"] * 6 + content["position"]["step"] if content else 0

    def hurt(self, kind: str) -> None:
        """One fault. Asserts the exit code, and that nothing that was saved is lost."""
        self.tried[kind] += 1
        before = self.steps_saved()
        if kind in HOOKS:
            codes, process = HOOKS[kind], self.go(kind, self.rng.randint(1, 4))
            if kind == "a second process":
                self.await_writes(process, self.rng.randint(1, 3))
                second = self.start("--resume", "hurt")
                second.join(60)
                assert second.exitcode == 1 and "is in use by another process" in self.said()
                os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            if (self.folder / "moved").exists() and (self.folder / "hurt").exists():
                self.bring_back()
            elif (self.folder / "moved").exists():
                os.rename(self.folder / "moved", self.folder / "hurt")
        else:
            codes, process = SIGNALS.get(kind, (-9,)), self.go()
            # To damage the last checkpoint there has to be one before it.
            self.await_writes(process, self.rng.randint(2, 4) if kind in DAMAGE else self.rng.randint(0, 4))
            time.sleep(self.rng.uniform(0, 0.05))
            number = getattr(signal, kind.split()[0], signal.SIGKILL)
            for _ in range(2 if kind == "SIGINT twice" else 1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                time.sleep(0.01)
            process.join(60)
        assert process.exitcode in (*codes, 0), (kind, process.exitcode, self.said()[-2000:])
        if kind in DAMAGE:
            self.damage(kind)
        # The checkpoint before the last one may have to serve: one step earlier, as each step is saved.
        assert self.steps_saved() >= before - (kind in DAMAGE), kind
        assert "Traceback" not in self.said(), self.said()[-3000:]

    def await_writes(self, process, count: int) -> None:
        """Wait until the process has begun and has saved so many times more, or has ended."""
        def written(path):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_mtime_ns
        for path, times in ((self.config, 1), (self.last, count)):
            for _ in range(times):
                seen = written(path)
                while written(path) == seen and process.exitcode is None:
                    time.sleep(0.002)

    def bring_back(self) -> None:
        """The folder that was renamed comes back; what was written in its absence is newer."""
        shutil.copytree(self.folder / "hurt", self.folder / "moved", dirs_exist_ok=True)
        shutil.rmtree(self.folder / "hurt")
        os.rename(self.folder / "moved", self.folder / "hurt")

    def damage(self, kind: str) -> None:
        """Harm the files of the stopped run, where it has the ones that have to take over."""
        run, rng = self.folder / "hurt", self.rng
        if kind.startswith("last.pt"):
            assert (run / "last.prev.pt").exists()
            data = bytearray(self.last.read_bytes())
            if kind.endswith("cut short"):
                self.last.write_bytes(data[:rng.randrange(len(data))])
            elif kind.endswith("emptied"):
                self.last.write_bytes(b"")
            elif kind.endswith("flipped bit"):
                data[rng.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << rng.randrange(8)
                self.last.write_bytes(data)
            elif kind.endswith("another run"):
                shutil.copy(self.folder / "other" / "last.pt", self.last)
            else:
                self.last.unlink()
        elif kind.startswith("config.json"):
            self.config.write_bytes(self.config.read_bytes()[:rng.randrange(200)])
        elif kind.startswith("metrics.csv"):
            # a row that was torn by a power cut: the epoch after the last checkpoint
            with open(run / "metrics.csv", "a") as file:
                file.write(f"{EPOCHS + 1},0.01,2.")
        elif kind.startswith("events"):
            newest = max(run.glob("*tfevents*"))
            newest.write_bytes(newest.read_bytes() + b"\x18\0\0\0\0\0\0\0torn")
        elif kind.startswith("half-written"):
            (run / ".last.pt.tmp").write_bytes(b"half")
            (run / ".config.json.tmp").write_bytes(b"{")

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def finish(self) -> None:
        process = self.go()
        process.join(300)
        assert process.exitcode == 0, self.said()[-3000:]
        assert_runs_equal(self.folder / "hurt", self.folder / "calm")
        left = [path.name for path in (self.folder / "hurt").iterdir() if path.name.endswith(".tmp")]
        assert not left and "Traceback" not in self.said()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run that nothing happens to, and another run, of another seed."""
    folder = tmp_path_factory.mktemp("calm")
    campaign = Campaign(folder, 0)
    both = [campaign.start(*NEW, "--run-dir", "calm"),
            campaign.start(*NEW, "--seed", "1", "--run-dir", "other", hook="loss not a number", after=3)]
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 1], campaign.said()
    return folder


def hurt_run(calm: Path, folder: Path, seed: int, kinds) -> Campaign:
    for name in ("calm", "other"):
        (folder / name).symlink_to(calm / name)
    campaign = Campaign(folder, seed)
    campaign.go().terminate()
    for kind in kinds:
        campaign.hurt(kind)
    campaign.finish()
    return campaign


def test_short_campaign(calm, tmp_path):
    """Every kind of fault once, in an order and at moments drawn from a seed."""
    kinds = list(KINDS)
    random.Random(5).shuffle(kinds)
    campaign = hurt_run(calm, tmp_path, 5, kinds)
    assert set(campaign.tried) == set(KINDS)


@pytest.mark.campaign
def test_long_campaign(calm, tmp_path):
    """200 faults; prints the table for runs/README.md."""
    rng, tried, began = random.Random(0), collections.Counter(), time.monotonic()
    faults = [kind for _ in range(200 // len(KINDS) + 1) for kind in KINDS][:200]
    rng.shuffle(faults)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        tried += hurt_run(calm, folder, number, faults[20 * number:20 * number + 20]).tried
    print(f"\n{sum(tried.values())} faults in {time.monotonic() - began:.0f} s; every run ended equal to the unhurt one\n")
    for kind in KINDS:
        print(f"| {kind} | {tried[kind]} | {tried[kind]} |")


def test_a_damaged_checkpoint_never_replaces_the_good_one_before_it(calm, tmp_path):
    """The campaign's find: the first save after a resume made a damaged last.pt the one before, over the good one."""
    shutil.copytree(calm / "calm", tmp_path / "run")
    good = (tmp_path / "run" / "last.prev.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    content = checkpoint.read_last(tmp_path / "run", mend=True)
    assert (tmp_path / "run" / "last.pt").read_bytes() == good and not (tmp_path / "run" / "last.prev.pt").exists()
    assert (tmp_path / "run" / "last.damaged.pt").read_bytes() == b"damaged"
    checkpoint.save_checkpoint(tmp_path / "run", content)
    for name in ("last.pt", "last.prev.pt"):
        assert checkpoint.read_checkpoint(tmp_path / "run" / name)["position"] == content["position"]


def test_a_checkpoint_of_another_run_is_refused(calm, tmp_path):
    shutil.copytree(calm / "calm", tmp_path / "run")
    shutil.copy(calm / "other" / "last.pt", tmp_path / "run" / "last.pt")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    content = checkpoint.read_last(tmp_path / "run")
    assert content["config"]["seed"] == settings["seed"] == 0
    (tmp_path / "run" / "last.prev.pt").unlink()
    with pytest.raises(UserError, match="last.pt belongs to another run: seed is 1 in it, and 0 in"):
        checkpoint.read_last(tmp_path / "run")
