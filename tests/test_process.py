"""training/process.py: standard streams that are closed, broken or narrow, commands to paste, threads that wait."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from training import process

TINY = ["--sample", "--width", "0.015625", "--model", "vgg", "--image-size", "16", "--epochs", "1", "--device", "cpu",
        "--overlay-every", "0", "--set", "progressive=none"]


def shell(line, cwd, **environment):
    """A line for bash, with $PYTHON and $ROOT; environment on top of this one's."""
    environment = os.environ | {"PYTHON": sys.executable, "ROOT": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# ---- standard streams ------------------------------------------------------------------------------------------------

CLOSED = [" ".join(each) for count in range(4) for each in itertools.combinations(("<&-", ">&-", "2>&-"), count)]


@pytest.mark.parametrize("closed", CLOSED)
def test_streams_that_are_closed_are_opened_to_nowhere(tmp_path, closed):
    """As by cron or a daemon. The next file that is opened would else be standard error, and get its lines."""
    done = shell(f"""$PYTHON -c '
import os, sys
from training.process import open_standard_streams
open_standard_streams()
file = open("file", "wb")
assert file.fileno() > 2
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
os.write(2, b"raw")
sys.stdin.read()
' {closed} </dev/null""".replace("</dev/null", "" if "<&-" in closed else "</dev/null"), tmp_path)
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "out\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\nraw")


def test_training_with_every_stream_closed(tmp_path):
    done = shell(f"$PYTHON $ROOT/train_cifar100.py {' '.join(TINY)} --run-dir r <&- >&- 2>&-", tmp_path)
    assert done.returncode == 0 and (tmp_path / "r" / "last.pt").exists()
    assert (tmp_path / "r" / "metrics.csv").read_text().startswith("epoch,")


def test_a_reader_that_leaves_does_no_harm(tmp_path):
    done = shell("""$PYTHON -c '
import sys
from training.process import unbreakable_pipes
with unbreakable_pipes():
    for number in range(100000):
        print("a line", number)
        print("to standard error", file=sys.stderr)
open("done", "w").close()
' 2>&1 | head -n 1; echo ${PIPESTATUS[0]} > status""", tmp_path)
    assert done.stdout == "a line 0\n" or done.stdout == "to standard error\n"
    assert (tmp_path / "status").read_text() == "0\n" and (tmp_path / "done").exists()


def test_names_that_the_encoding_has_no_letters_for(tmp_path):
    done = shell("""$PYTHON -c '
import os
from training.process import open_standard_streams
open_standard_streams()
print("caf\\u00e9", os.fsdecode(b"caf\\xe9"))
'""", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 caf\\udce9\n")


# ---- commands to paste -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [b"plain", b"two words", b"it's", b'a"b', b"$HOME", b"-x", b"--resume", b"a\nb", b"tab\there",
                                  b"caf\xe9", "café".encode(), b"\xe9abc", b"back\\slash", b"*?[a]", b"a;rm b", b"\x1b[31m",
                                  b"!!", b"~x", b"#", b"\xf0\x9f\x90\xa6", b"\x01'\xff\\"])
def test_a_quoted_name_is_one_word_of_a_shell(name, tmp_path):
    text = os.fsdecode(name)
    done = subprocess.run(["bash", "-c", f"printf %s {process.quoted(text)}"], capture_output=True, cwd=tmp_path)
    assert done.stdout == (b"./" if name.startswith((b"-", b"~")) else b"") + name
    assert "\n" not in process.quoted(text)


def test_a_quoted_name_can_be_printed_in_ascii(monkeypatch):
    class Narrow:
        encoding = "ascii"
    monkeypatch.setattr(sys, "stdout", Narrow())
    assert process.quoted("café") == r"$'caf\xc3\xa9'"


def test_programs_are_this_environments(monkeypatch, tmp_path):
    for folder, name in (("env", "python"), ("env", "python3"), ("env", "torchrun"), ("other", "python")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path / "env"))
    assert process.program("python") == "python" and process.program("torchrun", "torch.distributed.run") == "torchrun"
    monkeypatch.setenv("PATH", str(tmp_path / "other"))     # the environment is not the shell's: not activated
    assert process.program("python") == "env/python3"
    assert process.program("torchrun", "torch.distributed.run") == "env/python3 -m torch.distributed.run"
    for folder in ("other", "env"):
        monkeypatch.chdir(tmp_path / folder)
        assert process.program("python") == str(tmp_path / "env" / "python3")


# ---- threads ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, settled", [({}, process.SPIN_COUNT), ({"GOMP_SPINCOUNT": ""}, process.SPIN_COUNT),
                                            ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_threads_soon_sleep_unless_the_user_says_otherwise(monkeypatch, given, settled):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    process.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == settled


def test_the_scripts_settle_before_they_load_pytorch(tmp_path):
    """libgomp reads its variables when it is loaded."""
    for script in ("train_cifar100.py", "train_cub.py", "cam.py"):
        lines = (Path(ROOT) / script).read_text().splitlines()
        settled = lines.index("    settle()    # before PyTorch is loaded")
        loads = [number for number, line in enumerate(lines) if line.startswith(("import ", "from ")) and not any(
            word in line for word in ("__future__", "argparse", "csv", "io", "sys", "collections", "pathlib"))]
        assert settled < min(loads), script
    done = shell("""$PYTHON -c '
import sys
from training.process import settle
settle()
assert "torch" not in sys.modules and "numpy" not in sys.modules
'""", tmp_path)
    assert done.returncode == 0, done.stderr
