"""README.md and docs/: their commands parse, their links and references lead somewhere, and their
Python runs."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cam
import train_cifar10
import train_cifar100
import train_cub
import train_folder
from experiments import __main__ as experiments
from tests.helpers.environment import ROOT
from tests.helpers.runs import config_of
from training import options

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "runs/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what refers to documents in comments and messages
SOURCES = [
    path
    for pattern in ("*.py", "*/*.py", "tests/*/*.py", "requirements.txt", ".ci/run")
    for path in sorted(ROOT.glob(pattern))
    if path.name != Path(__file__).name and ".venv" not in path.parts
]
TASKS = {
    "train_cifar100.py": train_cifar100.TASK,
    "train_cifar10.py": train_cifar10.TASK,
    "train_cub.py": train_cub.TASK,
    "train_folder.py": train_folder.TASK,
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- the README ---------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2200
    assert len(text.split("```")[0].split()) <= 150  # before the first command


def test_the_readme_begins_with_what_people_come_for():
    headings = [line for line in README.read_text().splitlines() if line.startswith("## ")]
    assert headings == [
        "## Results",
        "## Quick start",
        "## Train on CIFAR-100, birds, your own images",
        "## Stop, resume, evaluate, compare",
        "## See where it looks",
        "## In your own code",
        "## Models",
        "## Recipes",
        "## Your card",
        "## Files",
        "## Limits",
        "## Citation",
    ]
    commands = [line for line in README.read_text().splitlines() if ".venv/bin/python" in line]
    assert [command.split()[-2:] for command in commands[:3]] == [
        ["train_cifar100.py", "--sample"],
        ["pytest", "tests"],
        ["train_cifar100.py", "--sanity"],
    ]


@pytest.mark.parametrize("path", DOCUMENTS[2:], ids=name_of)
def test_a_document_says_first_for_whom_it_is(path):
    title, blank, *intro = path.read_text().splitlines()[:6]
    assert title.startswith("# ") and not blank and all(intro[:3]) and not intro[3]
    assert re.match("For (whoever|anyone|readers who) ", intro[0])


def test_the_readmes_network_answers_as_its_model_does(unhurt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unhurt, "RUN")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line]) <= 10
    scope = {}
    exec(compile(blocks[0], "README.md", "exec"), scope)
    network, batch = scope["network"], scope["batch"]
    small = np.asarray(Image.open("photo.jpg").resize((32, 32), Image.Resampling.BILINEAR))
    x = torch.tensor((small / 255 - network.mean) / network.std).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(batch.cpu(), x)
    logits, raw = network.model.cpu()(x, return_attention=True)
    torch.testing.assert_close(scope["logits"].cpu(), logits)
    best = logits.softmax(1)[0].topk(3)
    printed = ast.literal_eval(capsys.readouterr().out)
    assert [name for name, _ in printed] == [network.class_names[i] for i in best.indices]
    assert [p for _, p in printed] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert list(scope["maps"]) == ["conv7", "conv10", "conv13"]
    for level, found in scope["maps"].items():
        expected = F.interpolate(raw[level][None], (60, 80), mode="bilinear")[0, 0].detach()
        np.testing.assert_allclose(found, expected / expected.max(), atol=1e-4)
    assert scope["heat"].shape == (60, 80) and 0 <= scope["heat"].min() < scope["heat"].max() == 1


# ---- commands -----------------------------------------------------------------------------------


def code_of(text: str) -> list[str]:
    """The lines of code blocks that are not Python, and what stands between backticks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_of(text: str) -> list[str]:
    """Each command from its ``python`` or ``torchrun`` on."""
    pattern = r"(?:^|(?<=[\s'/(]))(?:python3? |torchrun --)(?:\"[^\"]*\"|[^'#&;\"])+"
    return [found.strip() for code in code_of(text) for found in re.findall(pattern, code)]


COMMANDS = [
    (name_of(path), command) for path in DOCUMENTS for command in commands_of(path.read_text())
]


def test_there_are_commands():
    assert len(COMMANDS) > 50
    assert len([command for name, command in COMMANDS if name == "README.md"]) > 20


@pytest.mark.parametrize("name, command", COMMANDS)
def test_the_options_of_a_command_parse(name, command):
    words = [word for word in shlex.split(command) if word != "..." and word[0] != "$"]
    scripts = [position for position, word in enumerate(words) if word.endswith(".py")]
    if words[1] == "-m":
        check_module(words[2:])
    elif words[1] == "-c":
        compile(words[2], name, "exec")
    else:
        script, given = words[scripts[0]], words[scripts[0] + 1 :]
        if script in TASKS:
            config_of(TASKS[script], *given)
        elif script == "cam.py":
            cam.make_parser().parse_args(given)
        else:
            assert (ROOT / script).is_file()


def check_module(words: list[str]) -> None:
    """Of ``python -m``: pytest's files and markers, and the options of the experiments."""
    module, *words = words
    assert module in ("pytest", "venv", "experiments")
    if module == "experiments":
        experiments.make_parser().parse_args(words)
    if module == "pytest":
        for word in words:
            assert not word.startswith("tests") or (ROOT / word).exists()
        if "-m" in words:
            marker = words[words.index("-m") + 1]
            assert f'"{marker}:' in (ROOT / "pyproject.toml").read_text()


# ---- links and references -----------------------------------------------------------------------


def headings_of(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_something(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in map(anchor_of, headings_of(target)), link


def references_in(text: str) -> list[tuple[str, str]]:
    """(document, section) of each ``docs/NAME.md, "Section"``, also over the end of a line."""
    text = re.sub(r"\"\s*\n\s*f?\"", "", text).replace('\\"', '"')  # adjacent string literals
    text = re.sub(r"\s*\n\s*(# )?", " ", text)
    return re.findall(r'(README|(?:docs|runs)/\w+\.md), "([^"]+)"', text)


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=name_of)
def test_references_name_a_section_that_is_there(path):
    text = path.read_text()
    for document in re.findall(r"\bdocs/\w+\.md", text):
        assert (ROOT / document).is_file(), document
    for document, section in references_in(text):
        headings = headings_of(README if document == "README" else ROOT / document)
        assert section in headings, (document, section)


def test_messages_refer_to_documents():
    """The test above looks at something."""
    found = {reference for path in SOURCES for reference in references_in(path.read_text())}
    assert ("docs/maps.md", "Reading the maps") in found
    assert ("docs/hardware.md", "Old cards") in found


def test_every_model_and_script_is_in_the_readme():
    text = README.read_text()
    for name in ("vgg", "vgg-gap", "vgg-pan", "vgg-att1-pc", "vgg-att2-concat-pc"):
        assert f"`{name}`" in text and name in options.MODEL_NAMES
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")):
        name = path.name if path.parent == ROOT else f"{path.parent.name}/"
        assert name in text, name
