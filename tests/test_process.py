"""What surrounds a process: standard streams that are closed, broken or narrow, commands to paste,
threads that wait, signals, and pipes."""

import ast
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import process
from tests.helpers.environment import ROOT
from tests.helpers.makers import first_lines
from tests.helpers.runs import NARROW, assert_runs_equal, signal_after
from train_cifar100 import TASK
from training import commands
from training.signals import Signals

TINY = (
    "--sample --width 0.015625 --model vgg --image-size 16 --epochs 1 --device cpu "
    "--overlay-every 0 --set progressive=none"
).split()


def shell(line, cwd, **environment):
    """A line for bash, with $PYTHON and $ROOT; environment on top of this one's."""
    environment = (
        os.environ
        | {"PYTHON": sys.executable, "ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
        | environment
    )
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


# ---- standard streams ---------------------------------------------------------------------------

CLOSED = [
    " ".join(each)
    for count in range(4)
    for each in itertools.combinations(("<&-", ">&-", "2>&-"), count)
]


@pytest.mark.parametrize("closed", CLOSED)
def test_streams_that_are_closed_are_opened_to_nowhere(tmp_path, closed):
    """As by cron or a daemon. The next file that is opened would else be standard error, and get
    its lines."""
    done = shell(
        f"""$PYTHON -c '
import os, sys
from common.process import open_standard_streams
open_standard_streams()
file = open("file", "wb")
assert file.fileno() > 2
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
os.write(2, b"raw")
sys.stdin.read()
' {closed} </dev/null""".replace("</dev/null", "" if "<&-" in closed else "</dev/null"),
        tmp_path,
    )
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "out\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\nraw")


def test_training_with_every_stream_closed(tmp_path):
    done = shell(
        f"$PYTHON $ROOT/train_cifar100.py {' '.join(TINY)} --run-dir r <&- >&- 2>&-", tmp_path
    )
    assert done.returncode == 0 and (tmp_path / "r" / "last.pt").exists()
    assert (tmp_path / "r" / "metrics.csv").read_text().startswith("epoch,")


def test_a_reader_that_leaves_does_no_harm(tmp_path):
    done = shell(
        """$PYTHON -c '
import sys
from common.process import unbreakable_pipes
with unbreakable_pipes():
    for number in range(100000):
        print("a line", number)
        print("to standard error", file=sys.stderr)
open("done", "w").close()
' 2>&1 | head -n 1; echo ${PIPESTATUS[0]} > status""",
        tmp_path,
    )
    assert done.stdout == "a line 0\n" or done.stdout == "to standard error\n"
    assert (tmp_path / "status").read_text() == "0\n" and (tmp_path / "done").exists()


def test_names_that_the_encoding_has_no_letters_for(tmp_path):
    done = shell(
        """$PYTHON -c '
import os
from common.process import open_standard_streams
open_standard_streams()
print("caf\\u00e9", os.fsdecode(b"caf\\xe9"))
'""",
        tmp_path,
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 caf\\udce9\n")


# ---- commands to paste --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"plain",
        b"two words",
        b"it's",
        b'a"b',
        b"$HOME",
        b"-x",
        b"--resume",
        b"a\nb",
        b"tab\there",
        b"caf\xe9",
        "café".encode(),
        b"\xe9abc",
        b"back\\slash",
        b"*?[a]",
        b"a;rm b",
        b"\x1b[31m",
        b"!!",
        b"~x",
        b"#",
        b"\xf0\x9f\x90\xa6",
        b"\x01'\xff\\",
    ],
)
def test_a_quoted_name_is_one_word_of_a_shell(name, tmp_path):
    text = os.fsdecode(name)
    done = subprocess.run(
        ["bash", "-c", f"printf %s {process.quoted(text)}"], capture_output=True, cwd=tmp_path
    )
    assert done.stdout == (b"./" if name.startswith((b"-", b"~")) else b"") + name
    assert "\n" not in process.quoted(text)


def test_a_quoted_name_can_be_printed_in_ascii(monkeypatch):
    class Narrow:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Narrow())
    assert process.quoted("café") == r"$'caf\xc3\xa9'"


def test_programs_are_this_environments(monkeypatch, tmp_path):
    for folder, name in (
        ("env", "python"),
        ("env", "python3"),
        ("env", "torchrun"),
        ("other", "python"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path / "env"))
    assert (
        process.program("python") == "python"
        and process.program("torchrun", "torch.distributed.run") == "torchrun"
    )
    # the environment is not the shell's: not activated
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert process.program("python") == "env/python3"
    assert (
        process.program("torchrun", "torch.distributed.run")
        == "env/python3 -m torch.distributed.run"
    )
    for folder in ("other", "env"):
        monkeypatch.chdir(tmp_path / folder)
        assert process.program("python") == str(tmp_path / "env" / "python3")


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, settled",
    [
        ({}, process.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": ""}, process.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_soon_sleep_unless_the_user_says_otherwise(monkeypatch, given, settled):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    process.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == settled


def test_the_scripts_settle_before_they_load_pytorch(tmp_path):
    """libgomp reads its variables when it is loaded."""
    light = "__future__ argparse csv io sys collections pathlib typing".split()
    for script in ("train_cifar100.py", "train_cub.py", "cam.py"):
        source = (Path(ROOT) / script).read_text()
        settled = source.splitlines().index("    settle()  # before PyTorch is loaded") + 1
        loads = [
            statement.lineno
            for statement in ast.parse(source).body
            if isinstance(statement, (ast.Import, ast.ImportFrom))
            and not any(word in ast.unparse(statement) for word in light)
        ]
        assert settled < min(loads), script
    done = shell(
        """$PYTHON -c '
import sys
from common.process import settle
settle()
assert "torch" not in sys.modules and "numpy" not in sys.modules
'""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


# ---- signals, threads, pipes --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])  # SIGUSR2: in the campaign
def test_signals_of_batch_systems_save_and_end_the_run(cli, monkeypatch, unhurt, number):
    signal_after(monkeypatch, 3, number)
    status, out, _ = cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "hurt")
    assert (
        status == 128 + number
        and f"Stopped by {signal.Signals(number).name}; everything is saved" in out
    )
    assert cli("--resume", "hurt")[0] == 0
    assert_runs_equal("hurt", unhurt)


def test_the_documented_job_for_slurm_resumes_until_the_run_is_finished(tmp_path):
    """With an srun that is signalled twice, and a scontrol that says what it was asked."""
    job = re.search(
        r"```\n(#!/bin/bash\n#SBATCH .*?)```", (ROOT / "docs/hardware.md").read_text(), re.DOTALL
    )[1]
    for name, body in (
        (
            "srun",
            'echo "$*" >> asked; mkdir -p runs/cifar100/night; '
            "touch runs/cifar100/night/config.json\n"
            "[ $(wc -l < asked) -lt 3 ] && exit 138; exit 0",
        ),
        ("scontrol", 'echo "$*" >> requeued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for _ in range(3):
        subprocess.run(["bash", "-c", job], cwd=tmp_path, env=environment, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    start = "--cpus-per-task=4 .venv/bin/python train_cifar100.py --device cuda"
    assert asked == [f"{start} --run-dir runs/cifar100/night"] + 2 * [
        f"{start} --resume runs/cifar100/night"
    ]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2


def test_a_run_in_a_thread(cli, unhurt):
    """A notebook server, an application: Python handles signals in the main thread alone."""
    status = []
    thread = threading.Thread(
        target=lambda: status.append(
            cli(*NARROW, "--epochs", 4, "--set", "dropout=0.5", "--run-dir", "r")[0]
        )
    )
    thread.start()
    thread.join()
    assert status == [0]
    assert_runs_equal("r", unhurt)
    for words in (
        ["--sanity", "--sample", "--model", "vgg", "--width", 0.03125],
        ["--evaluate", "r/last.pt"],
    ):
        thread = threading.Thread(target=lambda words=words: status.append(cli(*words)[0]))
        thread.start()
        thread.join()
    assert status == [0, 0, 0]


def test_signal_handlers_that_are_not_pythons_come_through(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: called.append((number, handler)))
    called = []
    with Signals():
        pass
    assert {handler for _, handler in called[len(called) // 2 :]} == {signal.SIG_DFL}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A checkpoint of a run on the whole built-in sample."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    assert (
        commands.main(
            TASK,
            [
                *"--sample --model vgg --width 0.015625 --epochs 1 --device cpu --run-dir".split(),
                str(folder),
            ],
        )
        == 0
    )
    return folder / "last.pt"


def test_a_closed_pipe_stops_no_files(tmp_path, sampled):
    """... | head -1; at the same time."""
    script, tiny = (
        os.path.join(ROOT, "train_cifar100.py"),
        ["--sample", "--model", "vgg", "--width", "0.03125"],
    )
    assert (
        first_lines(
            [
                [script, "--evaluate", str(sampled), "--device", "cpu"],
                [script, "--benchmark", "1", *tiny, "--num-workers", "0", "--json", "b.json"],
                [script, "--sanity", *tiny, "--run-dir", "s"],
            ],
            tmp_path,
        )
        == [(0, 1, "")] * 3
    )
    assert all((tmp_path / name).exists() for name in ("b.json", "s/summary.png", "s/metrics.csv"))
