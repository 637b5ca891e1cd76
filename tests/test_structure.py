"""The house: which package imports which, how deep the loss lies, and what must not change."""

import ast
import hashlib
import subprocess
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attention_model import MODEL_NAMES, build_model
from tests.helpers.environment import ROOT
from tests.helpers.runs import NARROW

# What each room may import of the others: the arrows point down.
MAY_IMPORT = {
    "attention_model": set(),
    "common": {"attention_model"},
    "datasets": {"common"},
    "data": {"datasets", "common"},
    "explain": {"attention_model", "data", "common"},
    "training": {"attention_model", "data", "common", "explain"},
    "experiments": {"attention_model", "data", "common", "explain", "training"},
    "cam": {"explain", "data", "common"},
    "train_cifar10": {"train_cifar100", "training", "data", "common"},
    "train_cifar100": {"training", "data", "common"},
    "train_cub": {"training", "data", "common"},
    "train_folder": {"train_cifar100", "train_cub", "training", "data", "common"},
}
# Of explain, training needs the drawing alone: its sheets are those that cam.py draws.
OF_EXPLAIN = {"explain.charts", "explain.pictures"}
# Of common, what imports a network is the reader of checkpoints.
OF_THE_MODEL = {"common/checkpoint.py"}


def imports_of(path: Path) -> set[str]:
    """The modules of the project that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    rooms = {*MAY_IMPORT, "tests"}
    return {name for name in found if name.split(".")[0] in rooms}


def files_of(room: str) -> list[Path]:
    folder = Path(ROOT, room)
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [Path(ROOT, f"{room}.py")]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room):
    for path in files_of(room):
        others = {name for name in imports_of(path) if name.split(".")[0] != room}
        assert {name.split(".")[0] for name in others} <= MAY_IMPORT[room], path
        if room == "training":
            from_explain = {name for name in others if name.startswith("explain.")}
            assert {".".join(name.split(".")[:2]) for name in from_explain} <= OF_EXPLAIN, path
        if room == "common" and "attention_model" in others:
            assert str(path.relative_to(ROOT)) in OF_THE_MODEL, path


def test_no_test_imports_another():
    """What several tests share is in tests/helpers."""
    for path in Path(ROOT, "tests").rglob("*.py"):
        for name in imports_of(path):
            helpers = name == "tests" or name.startswith("tests.helpers")
            assert helpers or name.split(".")[0] != "tests", f"{path} imports {name}"


def test_the_root_holds_what_a_user_runs_or_imports():
    """And settings: nothing else."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    assert {name for name in done.stdout.split("\n") if name and "/" not in name} == {
        ".gitignore",
        "README.md",
        "attention_model.py",
        "cam.py",
        "data.py",
        "pyproject.toml",
        "requirements.txt",
        "train_cifar10.py",
        "train_cifar100.py",
        "train_cub.py",
        "train_folder.py",
    }


def test_from_the_command_to_the_loss_are_six_frames(cli, monkeypatch):
    depths, loss = [], F.cross_entropy

    def measured(*args, **options):
        if options.get("label_smoothing") is not None:  # an evaluation gives none
            own = [frame.filename for frame in traceback.extract_stack()]
            inside = [name for name in own if Path(name).is_relative_to(ROOT)]
            depths.append(sum("/tests/" not in name and "/.venv/" not in name for name in inside))
        return loss(*args, **options)

    monkeypatch.setattr(F, "cross_entropy", measured)
    assert cli(*NARROW, "--model", "vgg", "--epochs", 1)[0] == 0
    assert depths and max(depths) == 6  # main, train, Run.train, train_epoch, step, gradients


# Of each network with 100 classes: parameters, and a digest of the names and shapes of its state
# dict. Checkpoints hold these names: they never change.
STATE_DICTS = {
    "vgg": (15_038_116, "79e11476c2d76fab"),
    "vgg-gap": (14_774_436, "74ff0a7905a9284c"),
    "vgg-pan": (24_745_126, "b3a70bcd329d3260"),
    "vgg-att1-pc": (19_760_293, "cb994ad9d4d5a60c"),
    "vgg-att1-dp": (19_759_780, "737272648f5227fa"),
    "vgg-att1-gate": (20_022_436, "a2415bde5db85c12"),
    "vgg-att2-concat-pc": (19_813_030, "9aa5b3d910be4562"),
    "vgg-att2-concat-dp": (19_812_004, "bc8805a71a0f2bda"),
    "vgg-att2-concat-gate": (20_337_316, "b76396548fbfafdb"),
    "vgg-att2-indep-pc": (19_813_130, "9c496cb9c5333674"),
    "vgg-att2-indep-dp": (19_812_104, "461fd58add384312"),
    "vgg-att2-indep-gate": (20_337_416, "19205f3f0e0f1a06"),
    "vgg-att3-concat-pc": (19_971_751, "f5aaa55ec2c69a09"),
    "vgg-att3-concat-dp": (19_970_468, "091557dd25904f07"),
    "vgg-att3-concat-gate": (20_461_988, "09d711461be31684"),
    "vgg-att3-indep-pc": (19_971_951, "e30b2f81777af5d4"),
    "vgg-att3-indep-dp": (19_970_668, "e193360d8ac82323"),
    "vgg-att3-indep-gate": (20_462_188, "2648215ad89bde2e"),
    "vgg-att1-uniform": (14_775_460, "86015688167389eb"),
    "vgg-att2-concat-uniform": (14_827_684, "a2a43ef6c219c4f8"),
    "vgg-att2-indep-uniform": (14_827_784, "db51cb42a54b5e27"),
    "vgg-att3-concat-uniform": (14_853_796, "4964429708c9e6a7"),
    "vgg-att3-indep-uniform": (14_853_996, "0a7dbf723396ad7a"),
}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameters_and_the_names_in_checkpoints_stay(name):
    with torch.device("meta"):
        model = build_model(name, 100)
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    assert (sum(p.numel() for p in model.parameters()), digest) == STATE_DICTS[name]
