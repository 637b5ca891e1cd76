"""Every test runs from the repository's root or elsewhere alike: the modules are found by path."""

import http.server
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# for processes
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
pytest.register_assert_rewrite("tests.helpers.makers", "tests.helpers.runs")

from common.process import share_cores  # noqa: E402 - once the path is set
from tests.helpers.environment import GPU  # noqa: E402 - the same

# before PyTorch is loaded: beside other programs the tests would take many times as long
share_cores()


@pytest.fixture(autouse=True)
def fresh_notices():
    """What a program says only once, it says anew in every test."""
    from datasets import image_files

    image_files.print_once.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Without a GPU, the tests that need one are skipped here, not one by one: pytest -rs says so
    in one line."""
    if item.get_closest_marker("gpu") and GPU == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip(
                "no CUDA GPU here (GPU_TESTS_ON=cpu runs these tests on the CPU, to test them)"
            )


@pytest.fixture(scope="session")
def small_task():
    """train_cifar100.py's task on a sample of 96 training and 32 test pictures."""
    from data import cifar_sample
    from tests.helpers.runs import with_sample
    from train_cifar100 import TASK

    sets = cifar_sample(classes=4, train_per_class=24, test_per_class=8)
    return with_sample(TASK, lambda config: sets)


@pytest.fixture(scope="session")
def unhurt(small_task, tmp_path_factory):
    """Four epochs of six steps, never disturbed, with dropout, so that the random state counts."""
    from tests.helpers.runs import NARROW
    from training import commands

    folder = tmp_path_factory.mktemp("unhurt") / "run"
    assert (
        commands.main(
            small_task, [*NARROW, "--epochs", "4", "--set", "dropout=0.5", "--run-dir", str(folder)]
        )
        == 0
    )
    return folder


@pytest.fixture
def cli(small_task, tmp_path, monkeypatch, capsys):
    """cli("--epochs", 2) -> (exit status, standard output, standard error), run in an empty
    folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words, task=small_task):
        from training import commands

        status = commands.main(task, [str(word) for word in words])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def root(tmp_path):
    """A data folder with BIRDS in CUB's layout."""
    from datasets.cub import CUB_FOLDER
    from tests.helpers.makers import BIRDS

    folder, rng = tmp_path / "data" / CUB_FOLDER, np.random.default_rng(0)
    (folder / "parts").mkdir(parents=True)
    tables = {
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
        "bounding_boxes": [],
        "parts/part_locs": [],
        "classes": ["4 004.Blue_bird", "1 001.Red_bird"],
        "parts/parts": ["1 left eye", "2 tail"],
    }
    for i, (name, label, train, (width, height), box, parts) in BIRDS.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        tables["images"].append(f"{i} {name}")
        tables["image_class_labels"].append(f"{i} {label}")
        tables["train_test_split"].append(f"{i} {train}")
        tables["bounding_boxes"].append(f"{i} {' '.join(map(str, box))}")
        tables["parts/part_locs"] += [
            f"{i} {p} {x} {y} {seen}" for p, (x, y, seen) in enumerate(parts, 1)
        ]
    for name, lines in tables.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture
def serve(monkeypatch):
    """serve(Handler, content=...) starts a server of that handler with these attributes on the
    loopback interface and returns its address; download.py asks again without a pause."""
    servers = []
    monkeypatch.setattr("datasets.download.PAUSE", 0.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")

    def start(handler, **attributes):
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (handler,), attributes)
        )
        servers.append(server)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def without_nohup():
    """The tests may themselves run under nohup, where SIGHUP is ignored and so does not end a
    run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
