"""A folder that the user named belongs to the user: what we did not write stays as it is, whatever
we do."""

import builtins
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

import cam
from common import files
from common.errors import UserError
from datasets.cifar import CIFAR100_ARCHIVE
from tests.helpers.environment import ROOT
from tests.helpers.makers import make_folders
from tests.helpers.runs import NARROW, assert_runs_equal, content_of, with_sample
from train_cifar100 import TASK
from training import commands, report, run_folder
from training.run import Run

NAMES = (
    "config.json",
    "metrics.csv",
    "last.pt",
    "last.prev.pt",
    "best.pt",
    "events.out.tfevents.1700000000.host.1.0",
)


def foreign_events(path: Path, tags=("loss/train", "accuracy"), first: dict | None = None) -> None:
    """A TensorBoard event file as other programs write it."""
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2", **(first or {})).SerializeToString())
        for step in range(5):
            for tag in tags:
                value = Summary.Value(tag=tag, simple_value=step / 3)
                writer.write(Event(step=step, summary=Summary(value=[value])).SerializeToString())


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder, by path: a file's bytes, a link's target, None for a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            f"-> {os.readlink(path)}"
            if path.is_symlink()
            else None
            if path.is_dir()
            else path.read_bytes()
        )
    return found


# ---- a run's folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("sanity", [False, True])
def test_a_folder_with_anything_that_a_run_writes_is_refused(cli, sanity):
    Path("exp").mkdir()
    Path("exp/metrics.csv").write_text("epoch,loss\n1,2.5\n2,2.25\n")
    foreign_events(Path("exp/events.out.tfevents.1700000000.host.1.0"))
    for name in ("best.pt", "last.prev.pt", ".notes.tmp"):
        Path("exp", name).write_text(name)
    before = everything(Path("exp"))
    words = ["--sanity"] * sanity + [*NARROW, "--epochs", 1, "--run-dir", "exp"]
    status, _, err = cli(*words)
    assert status == 2 and everything(Path("exp")) == before
    assert err == (
        "error: exp holds metrics.csv, last.prev.pt, best.pt and 1 more, which a run writes too: "
        "name another "
        "--run-dir, or move them away\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_name_alone_is_reason_enough(tmp_path, name):
    (tmp_path / "notes.txt").write_text("")
    run_folder.check_new(tmp_path)
    # not even a link that leads nowhere is written through or over
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(
        UserError, match=name if name not in ("config.json", "last.pt") else "a run already"
    ) as caught:
        run_folder.check_new(tmp_path)
    assert caught.value.status == 2


def test_other_files_in_a_new_runs_folder_are_nobodys_business(cli):
    shutil.copytree(Path(__file__).parent, "exp/tests")
    for name in (
        ".notes.tmp",
        ".last.pt.tmp",
        "events.tmp",
        "last.damaged.pt",
        ".learn-to-pay-attention-notes.tmp",
    ):
        Path("exp", name).write_text("mine")
    before = everything(Path("exp"))
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "exp")[0] == 0
    assert cli("--resume", "exp", "--epochs", 2)[0] == 0
    after = everything(Path("exp"))
    assert {name: after.get(name) for name in before} == before and "last.pt" in after


@pytest.fixture(scope="module")
def stopped(small_task, tmp_path_factory):
    """A run that was stopped after its first epoch, and the same run to its end."""
    folder, train = tmp_path_factory.mktemp("stopped"), Run.train
    words = [*NARROW, "--epochs", "2", "--val-fraction", "0.25"]
    with pytest.MonkeyPatch.context() as patch:

        def one_epoch(self):
            self.trainer.train_epoch()
            self.finish_epoch(lambda: False)
            self.save()
            raise KeyboardInterrupt

        patch.setattr(Run, "train", one_epoch)
        assert commands.main(small_task, [*words, "--run-dir", str(folder / "run")]) == 130
        patch.setattr(Run, "train", train)
    assert commands.main(small_task, [*words, "--run-dir", str(folder / "whole")]) == 0
    return folder


def test_a_resumed_run_touches_no_file_of_somebody_elses(cli, stopped):
    shutil.copytree(stopped / "run", "run")
    ours = set(everything(Path("run")))
    for number, tags in enumerate([("loss/train", "lr"), ("a",), ()]):
        foreign_events(Path("run", f"events.out.tfevents.17000{number}.host.1.0"), tags)
    foreign_events(
        Path("run/events.out.tfevents.9999999999.host"),
        first={"source_metadata": {"writer": "other"}},
    )
    Path("run/empty.tfevents").write_bytes(b"")
    Path("run/tfevents").mkdir()
    Path("run/last.damaged.pt").write_text("from long ago")
    Path("run/.last.pt.tmp").write_text("mine")
    Path("run/events.tmp").write_text("mine")
    before = {
        name: content for name, content in everything(Path("run")).items() if name not in ours
    }
    assert cli("--resume", "run")[0] == 0
    after = everything(Path("run"))
    assert {name: after.get(name) for name in before} == before
    for name in before:  # the comparison reads all event files
        shutil.rmtree(Path("run", name)) if Path("run", name).is_dir() else Path(
            "run", name
        ).unlink()
    assert_runs_equal("run", stopped / "whole")


def test_what_stands_where_a_resumed_run_writes_is_set_aside(cli, stopped):
    shutil.copytree(stopped / "run", "run")
    Path("run/last.prev.pt").write_text("a backup of something else")
    shutil.copy(stopped / "whole" / "last.pt", "other.pt")
    content = torch.load("other.pt", weights_only=True)
    content["config"]["seed"] = 7
    torch.save(content, "run/best.pt")  # another run's
    Path("run/config.json").write_text('{"name": "my web app"}')
    Path("run/last.damaged.pt").write_text("from long ago")
    best = Path("run/best.pt").read_bytes()
    status, out, _ = cli("--resume", "run")
    assert status == 0
    for name, other in (
        ("last.prev.pt", "last.prev.damaged.pt"),
        ("best.pt", "best.damaged.pt"),
        ("config.json", "config.damaged.json"),
    ):
        assert f"run/{name} is damaged, or not this run's: it is kept as {other}\n" in out
    assert Path("run/last.prev.damaged.pt").read_text() == "a backup of something else"
    assert Path("run/best.damaged.pt").read_bytes() == best
    assert json.loads(Path("run/config.damaged.json").read_text()) == {"name": "my web app"}
    assert Path("run/last.damaged.pt").read_text() == "from long ago"
    assert_runs_equal("run", stopped / "whole")


@pytest.mark.parametrize("name", ["last.pt", "last.prev.pt", "config.json"])
def test_what_cannot_be_read_now_is_not_damaged(cli, stopped, monkeypatch, name):
    """Rights that were changed, a disk or a network in trouble: nothing is moved, and no epoch is
    lost."""
    shutil.copytree(stopped / "run", "run")
    shutil.copy("run/last.pt", "run/last.prev.pt")
    before = everything(Path("run"))

    def refusing(opens):
        def refuse(file, *words, **options):
            if not isinstance(file, int) and os.fspath(file).endswith(f"run/{name}"):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return opens(file, *words, **options)

        return refuse

    with monkeypatch.context() as patch:
        for owner, attribute in ((io, "open"), (builtins, "open"), (Path, "read_text")):
            patch.setattr(owner, attribute, refusing(getattr(owner, attribute)))
        status, _, err = cli("--resume", "run")
    assert (status, err) == (1, f"error: run/{name}: Permission denied\n")
    assert everything(Path("run")) == before
    assert cli("--resume", "run")[0] == 0
    assert_runs_equal("run", stopped / "whole")


@pytest.mark.parametrize(
    "spoil, why",
    [
        # a German Excel
        (lambda text: text.replace(",", ";").encode(), "line 1: not the names of the columns"),
        (lambda text: text.encode("utf-16"), "line 1: not the names of the columns"),
        (lambda text: b"step,loss\n1,2\n", "line 1: not the names of the columns"),
        (lambda text: text.replace("\n1,", "\none,").encode(), "line 2: not a row of numbers"),
        (lambda text: text.replace("\n1,", "\n,").encode(), "line 2: not a row of numbers"),
    ],
)
def test_a_metrics_csv_that_cannot_be_read_is_set_aside_and_the_run_goes_on(
    cli, stopped, spoil, why
):
    shutil.copytree(stopped / "run", "run")
    spoilt = spoil(Path("run/metrics.csv").read_text())
    Path("run/metrics.csv").write_bytes(spoilt)
    status, out, _ = cli("--resume", "run")
    assert (
        status == 0
        and f"run/metrics.csv cannot be read ({why}" in out
        and "kept as metrics.damaged.csv" in out
    )
    assert Path("run/metrics.damaged.csv").read_bytes() == spoilt
    assert [row["epoch"] for row in report.read_metrics(Path("run/metrics.csv"))] == [2]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),  # Excel's "CSV UTF-8"
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode() + b"\n\r\n  \n,,,,,,,,,\r\n",
        lambda text: text.rstrip("\n").encode(),  # an editor that ends no last line
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n",
    ],
)
def test_a_metrics_csv_that_went_through_a_spreadsheet_or_an_editor(cli, stopped, spoil):
    shutil.copytree(stopped / "run", "run")
    Path("run/metrics.csv").write_bytes(spoil(Path("run/metrics.csv").read_text()))
    assert cli("--resume", "run")[0] == 0
    assert_runs_equal("run", stopped / "whole")
    assert (
        Path("run/metrics.csv").read_bytes().startswith(b"epoch,lr")
        and not Path("run/metrics.damaged.csv").exists()
    )


def test_a_metrics_csv_that_is_edited_while_the_run_goes_on(cli, monkeypatch):
    """Opened and saved in a spreadsheet in the morning: the run's end must not fail on it."""
    finish_epoch = Run.finish_epoch

    def edited(self, signals):
        result = finish_epoch(self, signals)
        Path("r/metrics.csv").write_text("my; notes\n")
        return result

    monkeypatch.setattr(Run, "finish_epoch", edited)
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1, "--run-dir", "r")[0] == 0
    assert content_of("r")["finished"]


def test_a_config_json_with_a_mark_of_its_encoding(cli, stopped):
    shutil.copytree(stopped / "run", "run")
    Path("run/config.json").write_bytes(b"\xef\xbb\xbf" + Path("run/config.json").read_bytes())
    assert cli("--resume", "run")[0] == 0
    assert not Path("run/config.damaged.json").exists()
    assert len(json.loads(Path("run/config.json").read_text())["commands"]) == 2


def test_another_folder_in_the_place_of_the_runs_is_not_written_to(cli, monkeypatch):
    """The run's folder was moved away, and an older run's copied back under its name."""
    save, saves = Run.save, []

    def moved(self):
        saves.append(1)
        if len(saves) == 2:
            Path("r").rename("moved")
            Path("r").mkdir()
            for name in NAMES:
                Path("r", name).write_text("an older run's")
        save(self)

    monkeypatch.setattr(Run, "save", moved)
    status, _, err = cli(*NARROW, "--model", "vgg", "--epochs", 2, "--run-dir", "r")
    assert (
        status == 1
        and "r is another folder now than the one that this run began in, and nothing was written "
        "there"
        in err
    )
    assert everything(Path("r")) == {name: b"an older run's" for name in NAMES}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        shutil.rmtree("r")
        Path("moved").rename("r")
        assert cli("--resume", "r")[0] == 0


def test_a_report_in_another_folder_is_not_written_to(tmp_path):
    written = report.Report(tmp_path / "r")
    row = dict.fromkeys(report.METRIC_FIELDS, 0.5)
    written.epoch(row | {"epoch": 1})
    (tmp_path / "r").rename(tmp_path / "moved")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.csv").write_text("theirs")
    with pytest.raises(OSError, match="it was there and is gone: bring the run's folder back"):
        written.epoch(row | {"epoch": 2})
    assert (tmp_path / "r" / "metrics.csv").read_text() == "theirs"


def test_looking_at_a_run_moves_nothing(cli, stopped, monkeypatch):
    """A run that is finished, or whose command or images are refused, keeps what lies in it."""

    def refuse(run, content):
        raise UserError("the data set has changed")

    shutil.copytree(stopped / "whole", "run")
    for name in ("last.prev.pt", "best.pt"):
        Path("run", name).write_text("somebody's")
    before = everything(Path("run"))
    assert "run is finished" in cli("--resume", "run")[1]
    assert cli("--resume", "run", "--epochs", 3, "--lr", 7)[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr(Run, "check_data", refuse)
        assert cli("--resume", "run", "--epochs", 3)[0] == 1
    after = everything(Path("run"))
    assert {name: after[name] for name in before if name != "config.json"} == {
        name: content for name, content in before.items() if name != "config.json"
    }


@pytest.mark.parametrize(
    "content",
    [
        "[1, 2]",
        '{"name": "my web app"}',
        '{"config": {"port": 80}}',
        '{"config": [1]}',
        '"text"',
        "",
    ],
)
def test_a_config_json_of_another_program_is_no_run(cli, stopped, content):
    for name in ("theirs", "ours"):
        Path("runs/cifar100", name).mkdir(parents=True)
    Path("runs/cifar100/theirs/config.json").write_text(content)
    assert cli("--resume")[::2] == (
        2,
        "error: --resume: there is no unfinished run in runs/cifar100; name the run's folder\n",
    )
    status, _, err = cli("--resume", "runs/cifar100/theirs")
    assert (
        status == 1
        and "config.json is damaged (" in err
        and "there is no checkpoint: start a new run" in err
    )
    shutil.copytree(stopped / "run", "runs/cifar100/ours", dirs_exist_ok=True)
    Path("runs/cifar100/ours/link").symlink_to("nowhere")
    os.utime("runs/cifar100/ours/last.pt", (1, 1))
    status, out, _ = cli("--resume")
    assert status == 0 and "Run directory runs/cifar100/ours;" in out
    assert Path("runs/cifar100/theirs/config.json").read_text() == content


# ---- two processes ------------------------------------------------------------------------------


def test_a_second_start_leaves_the_first_ones_folder(cli, small_task, monkeypatch):
    """The second comes while the first still decodes: its folder is empty, and locked."""

    def slow(config):
        second.append(cli(*NARROW, "--epochs", 1, "--run-dir", "exp", task=small_task))
        assert Path("exp").is_dir()
        return small_task.data.sample(config)

    second = []
    status, _, err = cli(
        *NARROW, *"--model vgg --epochs 1 --run-dir exp".split(), task=with_sample(small_task, slow)
    )
    assert (status, second[0][0]) == (0, 1), err
    assert (
        second[0][2] == "error: exp is in use by another process: wait for it, or stop it first\n"
    )
    assert content_of("exp")["finished"]


def test_starts_that_race_for_a_folder(tmp_path):
    """Each ends with its folder, or is told that another has it; none loses a folder that it
    holds."""
    race = f"""
import random, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from common.errors import UserError
from training import run_folder
random.seed(int(sys.argv[1]))
held = told = 0
ends = time.monotonic() + 2
while time.monotonic() < ends:
    run_dir = Path("runs/cifar100/exp")
    try:
        with run_folder.new_folder(iter([run_dir])):
            held += 1
            time.sleep(random.uniform(0, 0.003))
            assert not list(run_dir.iterdir())
            (run_dir / "mine").mkdir()
            (run_dir / "mine").rmdir()
    except UserError as error:
        assert "in use by another process" in str(error)
        told += 1
print(held, told)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", race, str(seed)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    counts = [list(map(int, out.split())) for out, _ in ended]
    assert all(held > 10 for held, _ in counts) and sum(told for _, told in counts) > 10, counts


def test_a_failed_download_leaves_no_folder(cli, monkeypatch):
    dead = dataclasses.replace(CIFAR100_ARCHIVE, url="http://127.0.0.1:9/c.tar.gz")
    monkeypatch.setattr("datasets.cifar.CIFAR100_ARCHIVE", dead)
    monkeypatch.setattr("datasets.download.PAUSE", 0.0)
    for words in ((), ("--run-dir", "a/b/c")):
        status, _, err = cli("--width", 0.0625, "--device", "cpu", *words)
        assert status == 1 and "nothing was kept" in err
        assert not list(Path().iterdir())
    Path("runs/cifar100").mkdir(parents=True)  # was there before
    assert cli("--width", 0.0625, "--device", "cpu")[0] == 1
    assert [str(path) for path in Path().rglob("*")] == ["runs", "runs/cifar100"]


# ---- what else is written -----------------------------------------------------------------------


def test_a_benchmark_replaces_nothing_but_a_benchmark(cli):
    tiny = "--benchmark 1 --sample --width 0.03125 --model vgg --device cpu --num-workers 0".split()
    for name, content in (
        ("notes.json", '{"a": 1}'),
        ("list.json", "[1]"),
        ("text.txt", "hello"),
        ("empty", ""),
    ):
        Path(name).write_text(content)
        status, _, err = cli(*tiny, "--json", name)
        assert (
            status == 2 and f"--json {name} is there already, and not written by --benchmark" in err
        )
        assert Path(name).read_text() == content
    Path("folder").mkdir()
    assert cli(*tiny, "--json", "folder")[0] == 2
    assert cli(*tiny, "--json", "gone/b.json")[::2] == (
        2,
        "error: --json gone/b.json: there is no folder gone\n",
    )
    for _ in range(2):
        status, _, err = cli(*tiny, "--json", "b.json")
        assert status == 0, err
    assert json.loads(Path("b.json").read_text())["model"] == "vgg"


def test_cam_writes_over_its_own_pictures_only(stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        "cat.png"
    )
    words = [
        "--checkpoint",
        str(stopped / "whole" / "last.pt"),
        *"--out out --raw --device cpu".split(),
    ]
    Path("out").mkdir()
    shutil.copy("cat.png", "out/cat-sheet.png")  # a picture, but not one that we made
    Path("out/dog-conv7.npy").write_bytes(b"numbers of somebody's")
    shutil.copy("cat.png", "dog.png")
    before = everything(Path("out"))
    assert cam.main([*words, "cat.png", "dog.png"]) == 0
    assert "(written as cat-2)" in capsys.readouterr().out
    after = everything(Path("out"))
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name.endswith("sheet.png")} == {
        "cat-sheet.png",
        "cat-2-sheet.png",
        "dog-2-sheet.png",
    }
    assert cam.main([*words, "cat.png", "dog.png"]) == 0  # once more: the same files, again
    assert everything(Path("out")) == after
    assert cam.main([*words, "--opacity", "0.9", "cat.png", "dog.png"]) == 0
    assert set(everything(Path("out"))) == set(after) and everything(Path("out")) != after
    shutil.copy("cat.png", "out/cat-2-conv7.png")  # one of ours that was drawn on and saved again
    assert cam.main([*words, "cat.png"]) == 0
    assert (
        Path("out/cat-2-conv7.png").read_bytes() == Path("cat.png").read_bytes()
        and Path("out/cat-3-conv7.png").exists()
    )


def test_a_table_of_measures_replaces_only_one(stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--checkpoint",
        str(stopped / "whole" / "last.pt"),
        *"--dataset sample --index 0-9 --measure --method attention --out out --device cpu".split(),
    ]
    Path("out").mkdir()
    Path("out/measures.csv").write_text("metres,feet\n1,3.28\n")
    for _ in range(2):
        assert cam.main(words) == 0
        assert "Written to out/measures-2.csv\n" in capsys.readouterr().out
    assert Path("out/measures.csv").read_text() == "metres,feet\n1,3.28\n"


# ---- random trees -------------------------------------------------------------------------------

ANYWHERE = (
    "notes.txt",
    "photo.png",
    ".hidden",
    "two words",
    "caf\u00e9",
    os.fsdecode(b"caf\xe9"),
    "line\nbreak",
    "-x",
    ".notes.tmp",
    ".last.pt.tmp",
    "last.pt~",
    "config.json.bak",
    "metrics.csv.tmp",
    "events.tmp",
    "metrics.tmp",
    ".download-queue",
    ".unpack-mine",
    ".learn-to-pay-attention-notes.tmp",
    ".learn-to-pay-attention-0123.tmp",
    "train",
    "runs",
    "data",
    "last.damaged.pt",
    "metrics.damaged.csv",
    "config.damaged.json",
    "LAST.PT",
    "desktop.ini",
    "cifar-100-python.tar.gz.part",
)
OF_RUNS = (
    *NAMES,
    "summary.png",
    "evaluation.json",
    "predictions.csv",
    "classes.csv",
    "mistakes.png",
    "events.out.tfevents.9999999999.host.2",
    "x.tfevents",
    "events.out.tfevents.1.merged",
)
OF_CAM = (
    "photo-conv7.png",
    "photo-sheet.png",
    "photo-gradcam.png",
    "photo-conv7.npy",
    "cifar100-test-sheet.png",
    "cifar100-test-00000-conv7.png",
    "cifar100-test-00001-sheet.png",
    "measures.csv",
    "photo-2-sheet.png",
)
OF_CACHES = (
    "cifar100-train-0123456789abcdef0123.pt",
    "cifar100-test-ffffffffffffffffffff.pt",
    ".cifar100-train-x.pt.1.tmp",
)


def plant(folder: Path, rng: random.Random, names: tuple[str, ...], count: int) -> None:
    """So many files, links and folders of somebody else's, none over what is there; most are old
    enough to be left over."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in rng.sample(names, min(count, len(names))):
        path = folder / name
        if os.path.lexists(path):
            continue
        kind = rng.choice(
            (
                "bytes",
                "bytes",
                "text",
                "empty",
                "link",
                "dangling",
                "folder",
                "folder",
                "events",
                "picture",
            )
        )
        if kind in ("bytes", "text", "empty"):
            path.write_bytes(
                {
                    "bytes": rng.randbytes(rng.randint(1, 300)),
                    "text": b"epoch,lr\n1,2\n",
                    "empty": b"",
                }[kind]
            )
        elif kind == "link":
            path.symlink_to(ROOT / "requirements.txt")
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "folder":
            path.mkdir()
            for inner in rng.sample(names, rng.randint(0, 2)):
                (path / inner).write_bytes(rng.randbytes(20))
        elif kind == "events":
            foreign_events(path, rng.choice((("loss/train",), ("loss", "top1"), ())))
        else:
            Image.fromarray(np.frombuffer(rng.randbytes(300), np.uint8).reshape(10, 10, 3)).save(
                path, "PNG"
            )
        if rng.random() < 0.7:
            os.utime(path, (1e9, 1e9), follow_symlinks=False)


@pytest.fixture(scope="module")
def made_before(tmp_path_factory):
    """Four tiny pictures in class folders, and a run on them that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    make_folders(folder / "data", size=(16, 16), per_class=2)
    with pytest.MonkeyPatch.context() as patch:

        def one_epoch(self):
            self.trainer.train_epoch()
            self.finish_epoch(lambda: False)
            self.save()
            raise KeyboardInterrupt

        patch.setattr(Run, "train", one_epoch)
        patch.chdir(folder)
        assert commands.main(TASK, [*TINY, "--epochs", "2", "--run-dir", "run"]) == 130
    shutil.rmtree(folder / "data" / ".cache")
    shutil.copy(folder / "data/cifar100/test/cat/000.png", folder / "photo.png")
    return folder


TINY = (
    "--data-dir data --model vgg-att1-pc --width 0.015625 --device cpu "
    "--batch-size 2 --precision fp32 --num-workers 0 --overlay-every 0 --set progressive=none"
).split()


def through_everything(made_before: Path, home: Path, seed: int) -> None:
    """One random tree in the run's folder, the output folder and the data folder."""
    rng = random.Random(seed)
    shutil.copytree(made_before, home)
    os.chdir(home)
    ours = everything(home)
    plant(home / "new", rng, ANYWHERE + OF_RUNS * (seed % 3 == 0), rng.randint(0, 6))
    plant(home / "sane", rng, ANYWHERE + OF_RUNS * (seed % 3 == 1), rng.randint(0, 6))
    plant(home / "run", rng, ANYWHERE + OF_RUNS * 2, rng.randint(0, 12))
    plant(home / "out", rng, ANYWHERE + OF_CAM * 2, rng.randint(0, 12))
    plant(home / "data", rng, tuple({*ANYWHERE} - {"train"}), rng.randint(0, 6))
    plant(home / "data" / ".cache", rng, ANYWHERE + OF_CACHES, rng.randint(0, 6))
    before = {name: content for name, content in everything(home).items() if name not in ours}
    for folder, words in (("new", ["--epochs", "1"]), ("sane", ["--sanity"])):
        status = commands.main(TASK, [*TINY, *words, "--run-dir", folder])
        there = [name.partition("/")[2] for name in before if name.startswith(f"{folder}/")]
        assert status == 2 * any(
            name in (*NAMES, "summary.png")
            or name.split("/")[0] == "train"
            or "tfevents" in name
            and "/" not in name
            for name in there
        ), (seed, folder)
    assert commands.main(TASK, ["--resume", "run", "--device", "cpu"]) == 0, seed
    assert content_of("run")["finished"]
    assert commands.main(TASK, ["--evaluate", "run/last.pt", "--device", "cpu"]) == 0, seed
    words = ["photo.png"] if seed % 2 else ["--dataset", "cifar100", "--index", "0,1"]
    assert (
        cam.main(
            ["--checkpoint", "run/last.pt", *words, "--out", "out", "--raw", "--device", "cpu"]
        )
        == 0
    ), seed
    after = everything(home)
    aside = [
        name for name in after if name.startswith("run/last.prev.damaged") and name.count("/") == 1
    ]
    for name, content in before.items():
        if name == "run/last.prev.pt":  # where this run writes its own: kept under another name
            assert content in [after[each] for each in aside], (seed, name)
        elif name.startswith("run/last.prev.pt/"):
            assert content in [after.get(f"{each}/{name.rpartition('/')[2]}") for each in aside], (
                seed,
                name,
            )
        else:
            assert name in after and after[name] == content, (seed, name)
    assert not [path for path in home.rglob("*") if files.TEMPORARY.fullmatch(path.name)], seed
    shutil.rmtree(home)


def some_trees(made_before: Path, folder: Path, seeds: list[int]) -> None:
    """A process's life: what it is told to say goes to a file."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder / f"said-{seeds[0]}", "w", buffering=1)
    for seed in seeds:
        through_everything(made_before, folder / str(seed), seed)


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.campaign)])
def test_random_trees_of_foreign_files_are_there_afterwards_byte_for_byte(
    made_before, tmp_path, count
):
    """Through a new run, a sanity pass, a resumed run, an evaluation and cam.py; in two
    processes."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        ["tests.test_foreign_files", "torch._dynamo", "torch.utils.tensorboard.summary"]
    )
    halves = [
        fork.Process(target=some_trees, args=(made_before, tmp_path, list(range(first, count, 2))))
        for first in (0, 1)
    ]
    for process in halves:
        process.start()
    for process in halves:
        process.join(600)
    said = "".join(
        (tmp_path / f"said-{first}").read_text()[-2000:]
        for first in (0, 1)
        if halves[first].exitcode
    )
    assert [process.exitcode for process in halves] == [0, 0], said
