"""The fault campaign: a small real run is hurt again and again, goes on with --resume, and must end
equal to the run that never was. The long part: python -m pytest tests/test_campaign.py -m campaign
-s
"""

import collections
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_cifar100
from common.checkpoint import SINCE_FORMAT_2, read_checkpoint
from common.errors import UserError
from common.files import temporary_in
from data import cifar_sample
from datasets import decoding, image_cache
from tests.helpers.runs import NARROW, assert_runs_equal
from training import commands, run_folder
from training import run as run_module
from training.report import METRIC_FIELDS
from training.trainer import Trainer

EPOCHS = 16  # of six steps each, a checkpoint after every step
NEW = [word for word in NARROW if word != "--sample"]
NEW += [
    "--epochs",
    str(EPOCHS),
    *"--image-size 16 --set progressive=none --set dropout=0.5 --overlay-every 8".split(),
]
# How a process is hurt while it runs, and the exit codes that this may give: 0 when it was at its
# end already.
SIGNALS = {
    "SIGKILL": (-9,),
    "SIGTERM": (143, -15),
    "SIGINT": (130,),
    "SIGINT twice": (130,),
    "SIGUSR1": (138, -10),
    "SIGUSR2": (140, -12),
}  # the negative ones: before its first step
HOOKS = {
    "disk full": (1,),
    "loss not a number": (1,),
    "out of memory": (1,),
    "folder gone for a while": (1,),
    "folder read-only": (1,),
    "folder read-only at the start": (1,),
    "a second process": (-9,),
    "two starts at once": (-9,),
    "standard streams closed": (143,),
}
# The cache of decoded images is removed first; what then happens to the process that makes it.
CACHE = {
    "killed while the cache is written": (-9,),
    "decoding worker killed": (-9,),
    "no home, no place for the cache": (-9,),
}
# What is done to the data while no process runs, and what the next one says; then the data come
# back.
DATA = {
    "an image fewer": "it had 96 training images and has 95 now",
    "a class more": "its classes are not those",
    "an image in another class": "96 training images and has 96 with other labels",
    "data folder moved away": "give --data-dir, the folder that holds them now",
}
# What is done to the files of a run that has been stopped by SIGKILL.
DAMAGE = (
    "last.pt cut short",
    "last.pt emptied",
    "last.pt with a flipped bit",
    "last.pt of another run",
    "last.pt lost",
    "last.pt of an older version",
    "config.json cut short",
    "metrics.csv cut short",
    "events cut short",
    "half-written files beside it",
    "cache cut short",
    "metrics.csv through a spreadsheet",
    "somebody's files beside it",
    "somebody's last.prev.pt",
)
KINDS = (*SIGNALS, *HOOKS, *CACHE, *DATA, *DAMAGE)


def a_run(folder: str, words: list[str], hook: str, after: int) -> None:
    """A process's whole life: main() in ``folder``, saving after every step; ``hook`` happens at
    step ``after`` (0: before the first)."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("said", "a", buffering=1)
    torch.set_num_threads(1)
    run_module.SAVE_EVERY, run_module.SAVE_SHARE = 0.0, 1e9
    step, steps = Trainer.step, []
    if hook == "folder read-only at the start":
        read_only("hurt")
    elif hook == "no home, no place for the cache":
        os.environ["HOME"] = "/nonexistent"
        read_only("data")
    elif hook == "decoding worker killed":
        os.environ["MAIN_PROCESS"] = str(os.getpid())
        decoding._decode_chunk, decoding.CHUNK = decode_or_die, 8
    elif hook == "standard streams closed":
        sys.stdin = sys.stdout = sys.stderr = None
        os.closerange(0, 3)
    elif hook == "killed while the cache is written":

        def die_in_the_middle(content, file):
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        image_cache.torch = types.SimpleNamespace(**vars(torch) | {"save": die_in_the_middle})

    def hooked(self, images, labels):
        steps.append(1)
        if len(steps) == after:
            if hook == "disk full":  # nothing can be written any more, as if by another program
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
                )
            elif hook == "loss not a number":
                images = images * float("nan")
            elif hook == "out of memory":

                def scarce(images):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

                self.run_model = scarce
            elif hook == "folder read-only":
                read_only("hurt")
            elif hook == "standard streams closed":
                os.kill(os.getpid(), signal.SIGTERM)
            # until the loss stops the run, some checkpoints later
            elif hook == "folder gone for a while":
                os.rename("hurt", "moved")
        if hook == "folder gone for a while" and len(steps) == after + 3:
            images = images * float("nan")
        return step(self, images, labels)

    Trainer.step = hooked
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os._exit(commands.main(train_cifar100.TASK, words))


def read_only(folder: str) -> None:
    """Also for root, who gives up what lets him pass over modes (capset of no capability)."""
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0


def decode_or_die(*args):
    """The main process decodes; a worker is killed."""
    if os.environ["MAIN_PROCESS"] != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return DECODE_CHUNK(*args)


DECODE_CHUNK = decoding._decode_chunk


class Campaign:
    """A run in ``folder``/hurt that is hurt until it has come to its end."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.tried, self.heard = (
            folder,
            random.Random(seed),
            collections.Counter(),
            0,
        )
        self.theirs: dict[Path, bytes] = {}  # files of somebody else's in the run's folder
        self.set_aside = 0  # that stood where the run writes
        # forks from a process that has imported everything
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(
            ["tests.test_campaign", "torch._dynamo", "torch.utils.tensorboard.summary"]
        )
        self.last, self.config, self.data = (
            folder / "hurt" / "last.pt",
            folder / "hurt" / "config.json",
            folder / "data",
        )

    def start(self, *words: str, hook: str = "", after: int = 0):
        process = self.fork.Process(target=a_run, args=(str(self.folder), list(words), hook, after))
        process.start()
        return process

    def go(self, hook: str = "", after: int = 0, workers: int = 0):
        words = ["--resume", "hurt"] if self.config.exists() else [*NEW, "--run-dir", "hurt"]
        return self.start(*words, "--num-workers", str(workers), hook=hook, after=after)

    def steps_saved(self) -> int:
        content = run_folder.read_last(self.folder / "hurt") if self.config.exists() else None
        return content["position"]["epoch"] * 6 + content["position"]["step"] if content else 0

    def hurt(self, kind: str) -> None:
        """One fault. Asserts the exit code, and that nothing that was saved is lost."""
        self.tried[kind] += 1
        if (
            self.steps_saved() > 6 * EPOCHS - 12
            or kind == "two starts at once"
            and self.config.exists()
        ):
            self.finish()  # too near its end to be hurt: another run
            self.theirs.clear()
            shutil.rmtree(self.folder / "hurt")
        if kind not in (*SIGNALS, "two starts at once") and not self.steps_saved():
            process = self.go()
            self.await_writes(process, 1)
            os.kill(process.pid, signal.SIGKILL)
            process.join(600)
        before, self.heard = self.steps_saved(), len(self.all_said())
        if kind == "two starts at once":
            codes, process = HOOKS[kind], self.race()
        elif kind in DATA:
            codes, process = (1,), self.with_other_data(kind)
        elif kind in CACHE:
            shutil.rmtree(self.data / ".cache", ignore_errors=True)
            codes, process = CACHE[kind], self.go(kind, workers=int(kind.startswith("decoding")))
            if kind != "killed while the cache is written":
                self.await_writes(process, self.rng.randint(1, 3))
                os.kill(process.pid, signal.SIGKILL)
            process.join(600)
            assert {
                "killed": True,
                "decoding": "a decoding worker failed" in self.said(),
                "no": "no cache in data/.cache (" in self.said(),
            }[kind.split()[0]], self.said()[-2000:]
            for path in (self.data / ".cache").glob(".*.tmp"):
                os.utime(path, (0, 0))  # an hour later
        elif kind in HOOKS:
            codes, process = (
                HOOKS[kind],
                self.go(kind, 0 if kind.endswith("start") else self.rng.randint(1, 4)),
            )
            if kind == "a second process":
                self.await_writes(process, self.rng.randint(1, 3))
                second = self.start("--resume", "hurt")
                second.join(600)
                assert second.exitcode == 1 and "is in use by another process" in self.said()
                os.kill(process.pid, signal.SIGKILL)
            process.join(600)
            if (self.folder / "moved").exists() and (self.folder / "hurt").exists():
                self.bring_back()
            elif (self.folder / "moved").exists():
                os.rename(self.folder / "moved", self.folder / "hurt")
        else:
            codes, process = SIGNALS.get(kind, (-9,)), self.go()
            # To damage the last checkpoint there has to be one before it.
            self.await_writes(
                process,
                self.rng.randint(2, 4)
                if kind in DAMAGE
                else self.rng.randint(int(kind == "SIGINT twice"), 4),
            )
            time.sleep(self.rng.uniform(0, 0.05))
            number = getattr(signal, kind.split()[0], signal.SIGKILL)
            for _ in range(2 if kind == "SIGINT twice" else 1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                time.sleep(0.01)
            process.join(600)
        os.chmod(self.folder / "hurt", 0o755)
        os.chmod(self.data, 0o755)
        # 0: the run was at its end already; not where it could not get there.
        codes = (*codes, 0) if kind in (*SIGNALS, *CACHE, *DAMAGE, "a second process") else codes
        assert process.exitcode in codes, (kind, process.exitcode, self.said()[-2000:])
        if kind in DAMAGE:
            self.damage(kind)
        # The checkpoint before the last one may have to serve: one step earlier, as each step is
        # saved.
        assert self.steps_saved() >= before - (kind in DAMAGE), kind
        assert "Traceback" not in self.said(), self.said()[-3000:]

    def race(self):
        """Two processes that start the same new run: one trains, and is killed, and the other one
        is told."""
        both = [self.go(), self.go()]
        while not (ended := [process for process in both if process.exitcode is not None]):
            time.sleep(0.002)
        winner = both[ended[0] is both[0]]
        assert ended[0].exitcode in (1, 2) and (
            "in use by another process" in self.said() or "holds a run already" in self.said()
        )
        while not self.last.exists() and winner.exitcode is None:
            time.sleep(0.002)
        os.kill(winner.pid, signal.SIGKILL)
        winner.join(600)
        return winner

    def with_other_data(self, kind: str):
        """A process that finds other images than the run had, and says so."""
        first = self.data / "cifar100" / "train" / "class 0"
        if kind == "a class more":
            for split in ("train", "test"):
                shutil.copytree(
                    first.parent.parent / split / "class 0", first.parent.parent / split / "class 9"
                )
        elif kind == "data folder moved away":
            self.data.rename(self.folder / "elsewhere")
        else:
            shutil.move(
                first / "0.png",
                self.folder / "0.png"
                if kind.endswith("fewer")
                else first.parent / "class 1" / "z.png",
            )
        process = self.go()
        process.join(600)
        assert DATA[kind] in self.said()
        shutil.rmtree(self.folder / "elsewhere" if kind == "data folder moved away" else self.data)
        shutil.copytree(self.folder / "calm" / ".." / "data", self.data)
        return process

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
            data, content = bytearray(self.last.read_bytes()), read_checkpoint(self.last)
            if not (run / "last.prev.pt").exists():  # killed between two renames
                shutil.copy(self.last, run / "last.prev.pt")
            self.last.unlink()  # killed between two others, both are one file
            if kind.endswith("cut short"):
                self.last.write_bytes(data[: rng.randrange(len(data))])
            elif kind.endswith("emptied"):
                self.last.write_bytes(b"")
            elif kind.endswith("flipped bit"):
                data[rng.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << rng.randrange(8)
                self.last.write_bytes(data)
            elif kind.endswith("older version"):
                config = {
                    name: value
                    for name, value in content["config"].items()
                    if name not in SINCE_FORMAT_2
                }
                del content["transferred"], content["labels"]
                torch.save(content | {"format": 1, "config": config | {"init_from": ""}}, self.last)
                self.config.write_text(
                    json.dumps(run_folder.read_config(run) | {"config": config | {"init_from": ""}})
                )
            elif kind.endswith("another run"):
                shutil.copy(self.folder / "other" / "last.pt", self.last)
        elif kind.startswith("config.json"):
            self.config.write_bytes(self.config.read_bytes()[: rng.randrange(200)])
        elif kind == "metrics.csv through a spreadsheet":
            path = run / "metrics.csv"  # not there before the first epoch's end
            rows = path.read_text() if path.exists() else ",".join(METRIC_FIELDS) + "\n"
            path.write_bytes(b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode() + b"\r\n")
        elif kind.startswith("metrics.csv"):
            # a row that was torn by a power cut: the epoch after the last checkpoint
            with open(run / "metrics.csv", "a") as file:
                file.write(f"{EPOCHS + 1},0.01,2.")
        elif kind.startswith("events"):
            newest = max(run.glob("*tfevents*"))
            newest.write_bytes(newest.read_bytes() + b"\x18\0\0\0\0\0\0\0torn")
        elif kind == "somebody's files beside it":
            for name in (
                ".notes.tmp",
                "last.damaged.pt",
                "events.out.tfevents.9999999999.theirs.1",
                "best.pt",
                "events.tmp",
            ):
                self.theirs[run / name] = rng.randbytes(30)
                (run / name).write_bytes(self.theirs[run / name])
        elif kind == "somebody's last.prev.pt":
            (run / "last.prev.pt").unlink(missing_ok=True)
            (run / "last.prev.pt").write_bytes(b"somebody's")
            self.set_aside += 1
        elif kind.startswith("cache"):
            for cache in (self.data / ".cache").glob("*.pt"):
                cache.write_bytes(cache.read_bytes()[: rng.randrange(5000)])
        elif kind.startswith("half-written"):
            for half in (b"half", b"{"):
                temporary_in(run).write_bytes(half)

    def all_said(self) -> str:
        said = self.folder / "said"
        return said.read_text() if said.exists() else ""

    def said(self) -> str:
        """Since the last fault began."""
        return self.all_said()[self.heard :]

    def finish(self) -> None:
        process = self.go()
        process.join(600)
        assert process.exitcode == 0, self.said()[-3000:]
        assert_runs_equal(self.folder / "hurt", self.folder / "calm")
        assert all(path.read_bytes() == content for path, content in self.theirs.items())
        kept = [path.read_bytes() for path in (self.folder / "hurt").glob("last.prev.damaged*.pt")]
        assert kept.count(b"somebody's") == self.set_aside
        self.set_aside = 0
        assert "Traceback" not in self.all_said()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run that nothing happens to, and another run, of another seed."""
    folder = tmp_path_factory.mktemp("calm")
    for split, images in zip(
        ("train", "test"),
        cifar_sample(classes=4, train_per_class=24, test_per_class=8),
        strict=True,
    ):
        for number, (image, label) in enumerate(
            zip(images.images.numpy(), images.labels.tolist(), strict=True)
        ):
            path = folder / "data" / "cifar100" / split / f"class {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    campaign = Campaign(folder, 0)
    both = [
        campaign.start(*NEW, "--num-workers", "0", "--run-dir", "calm"),
        campaign.start(
            *NEW,
            "--num-workers",
            "0",
            "--seed",
            "1",
            "--run-dir",
            "other",
            hook="loss not a number",
            after=3,
        ),
    ]
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 1], campaign.said()
    return folder


def hurt_runs(calm: Path, folder: Path, faults: list[list[str]]) -> collections.Counter:
    """A run for each list, with its place in there as the seed; two at a time, as most of them is
    waiting. Returns how often each kind was tried."""
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(
            lambda seed: hurt_run(calm, folder / str(seed), seed, faults[seed]), range(len(faults))
        )
        return sum((run.tried for run in runs), collections.Counter())


def hurt_run(calm: Path, folder: Path, seed: int, kinds: list[str]) -> Campaign:
    folder.mkdir()
    for name in ("calm", "other"):
        (folder / name).symlink_to(calm / name)
    shutil.copytree(calm / "data", folder / "data")
    campaign = Campaign(folder, seed)
    for kind in kinds:
        campaign.hurt(kind)
    campaign.finish()
    return campaign


def test_short_campaign(calm, tmp_path):
    """Every kind of fault once, in an order and at moments drawn from a seed; and a run that is
    killed ten times."""
    kinds = list(KINDS)
    random.Random(5).shuffle(kinds)
    tried = hurt_runs(calm, tmp_path, [kinds[::2], kinds[1::2], ["SIGKILL"] * 10])
    assert tried == collections.Counter(KINDS) + collections.Counter({"SIGKILL": 10})


@pytest.mark.campaign
def test_long_campaign(calm, tmp_path):
    """200 faults; prints the table for runs/README.md."""
    rng, began = random.Random(0), time.monotonic()
    faults = [kind for _ in range(200 // len(KINDS) + 1) for kind in KINDS][:200]
    rng.shuffle(faults)
    tried = hurt_runs(calm, tmp_path, [faults[first : first + 20] for first in range(0, 200, 20)])
    print(
        f"\n{sum(tried.values())} faults in {time.monotonic() - began:.0f} s; every run ended "
        "equal to the unhurt one\n"
    )
    for kind in KINDS:
        print(f"| {kind} | {tried[kind]} | {tried[kind]} |")


def test_a_damaged_checkpoint_never_replaces_the_good_one_before_it(calm, tmp_path):
    """The campaign's find: the first save after a resume made a damaged last.pt the one before,
    over the good one."""
    shutil.copytree(calm / "calm", tmp_path / "run")
    good = (tmp_path / "run" / "last.prev.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    content = run_folder.read_last(tmp_path / "run")
    run_folder.prepare_to_write(tmp_path / "run", content["config"])
    assert (tmp_path / "run" / "last.pt").read_bytes() == good and not (
        tmp_path / "run" / "last.prev.pt"
    ).exists()
    assert (tmp_path / "run" / "last.damaged.pt").read_bytes() == b"damaged"
    run_folder.save_checkpoint(tmp_path / "run", content)
    for name in ("last.pt", "last.prev.pt"):
        assert read_checkpoint(tmp_path / "run" / name)["position"] == content["position"]


def test_a_checkpoint_of_another_run_is_refused(calm, tmp_path):
    shutil.copytree(calm / "calm", tmp_path / "run")
    shutil.copy(calm / "other" / "last.pt", tmp_path / "run" / "last.pt")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    content = run_folder.read_last(tmp_path / "run")
    assert content["config"]["seed"] == settings["seed"] == 0
    (tmp_path / "run" / "last.prev.pt").unlink()
    with pytest.raises(
        UserError, match="last.pt belongs to another run: seed is 1 in it, and 0 in"
    ):
        run_folder.read_last(tmp_path / "run")
