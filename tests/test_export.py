"""--export: the files hold the network, and nothing of the user's is lost."""

import copy
import dataclasses
import errno
import json
import logging
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from attention_model import build_model
from common.checkpoint import load_model
from common.errors import UserError
from data import to_input
from tests.helpers.environment import ROOT
from tests.helpers.runs import content_of, with_sample
from train_cifar100 import TASK
from training import export
from training.export_formats import (
    FORMATS,
    OPSET,
    Loaded,
    NormalizingNetwork,
    load_onnx,
    quiet,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
# name, trunk, (height, width): each family, way to combine, score and trunk, and two sizes that no
# pooling divides. vgg-att3-concat-pc in the full trunk is the run's that is exported below.
NETWORKS = [
    ("vgg", None, (32, 32)),
    ("vgg-gap", None, (33, 47)),
    ("vgg-pan", None, (32, 32)),
    ("vgg-att1-gate", None, (32, 32)),
    ("vgg-att2-indep-pc", None, (32, 32)),
    ("vgg-att3-concat-dp", "pooled", (50, 70)),
]


@pytest.fixture(params=FORMATS)
def ending(request):
    """Each format; .onnx where its packages are installed."""
    if request.param == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    return request.param


@pytest.fixture
def exported(cli, unhurt):
    """exported(file, ...) -> (status, output, error) of an export of the unhurt run's network."""
    return lambda file, *words: cli("--evaluate", unhurt / "last.pt", "--export", file, *words)


@pytest.fixture
def fake(monkeypatch):
    """fake(change) replaces .pt2 by a format that costs nothing: its network gives what ours does,
    with change(outputs) applied."""

    def replace(change):
        class Content:
            network = None

        def content(network, size, metadata):
            Content.network = network
            return b"content"

        def run(images):
            outputs = dict(Content.network(images))
            change(outputs)
            return outputs

        fake_format = dataclasses.replace(
            FORMATS[".pt2"], content=content, load=lambda path: Loaded(run, "a fake 1.0")
        )
        monkeypatch.setitem(FORMATS, ".pt2", fake_format)

    return replace


def used_network(name, trunk, size):
    """A network of 4 classes whose batch norm has seen images."""
    torch.manual_seed(0)
    network = build_model(name, 4, width=0.0625, trunk=trunk)
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(4, 3, *size))
    return network.eval()


def outputs_of(network, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        logits, maps = network(inputs, return_attention=True)
    return {"logits": logits, **maps}


def assert_close(outputs, expected):
    assert list(outputs) == list(expected)
    for name in expected:
        assert outputs[name].shape == expected[name].shape, name
        assert outputs[name].dtype == torch.float32
        assert (outputs[name] - expected[name]).abs().max() < 1e-4, name


# ---- the network in the file --------------------------------------------------------------------


@pytest.mark.parametrize("name, trunk, size", NETWORKS)
def test_the_file_holds_the_network_for_any_batch(tmp_path, ending, name, trunk, size):
    network = used_network(name, trunk, size)
    images = torch.randint(0, 256, (64, *size, 3), dtype=torch.uint8)
    as_float = images.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = outputs_of(network, (as_float - mean) / std)
    for level in network.levels:
        total = expected[level].sum((1, 2))
        assert level in network.sigmoid_levels or torch.allclose(total, torch.ones(64))

    path = tmp_path / f"network{ending}"
    normalizing = NormalizingNetwork(copy.deepcopy(network), MEAN, STD)
    maps = {"conv10": "gate in [0, 1]"} if name == "vgg-pan" else {}
    assert normalizing.roles() == {
        "logits": "before the softmax",
        **{level: maps.get(level, "attention map, sums to 1") for level in network.levels},
    }
    path.write_bytes(FORMATS[ending].content(normalizing, size, {"software": "s"}))
    assert FORMATS[ending].metadata(path) == {"software": "s"}
    run = FORMATS[ending].load(path).run
    for count in (1, 7, 64):
        first = {key: output[:count] for key, output in expected.items()}
        assert_close(run(as_float[:count]), first)


def test_a_pt2_network_is_tied_to_no_device_and_to_its_size(tmp_path):
    """On the device "meta" nothing is computed, but every device is checked."""
    network = used_network("vgg-att3-concat-dp", "pooled", (32, 32))
    path = tmp_path / "network.pt2"
    path.write_bytes(FORMATS[".pt2"].content(NormalizingNetwork(network, MEAN, STD), (32, 32), {}))
    loaded = torch.export.load(path).module()
    with pytest.raises((AssertionError, RuntimeError), match=r"size\(\)\[2\]|shape\[2\]"):
        loaded(torch.rand(2, 3, 31, 32))
    outputs = loaded.to("meta")(torch.rand(5, 3, 32, 32, device="meta"))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "logits": (5, 4),
        "conv7": (5, 8, 8),
        "conv10": (5, 4, 4),
        "conv13": (5, 2, 2),
    }


def test_parameters_without_effect_are_left_out():
    network = used_network("vgg-att3-concat-pc", None, (32, 32))
    unused = network.parameters_without_gradient()
    counts = {name: p.numel() for name, p in network.named_parameters()}
    inputs = torch.randn(2, 3, 32, 32)
    before = outputs_of(network, inputs)
    normalizing = NormalizingNetwork(network, MEAN, STD)
    left = sum(p.numel() for p in normalizing.parameters())
    assert left == sum(counts.values()) - sum(counts[name] for name in unused) + len(unused)
    assert left < 0.8 * sum(counts.values())
    assert_close(outputs_of(network, inputs), before)


# ---- the command --------------------------------------------------------------------------------


def printed_program(out: str) -> str:
    """The lines of Python at the end of the output."""
    lines = out.split("To run it without this project:\n")[1].splitlines()
    assert all(line.startswith("  ") for line in lines)
    return "\n".join(line[2:] for line in lines)


def test_the_printed_lines_run_the_file_without_the_project(
    exported, unhurt, small_task, tmp_path, ending
):
    status, out, err = exported(f"new/folder/network{ending}")
    assert status == 0 and err == ""
    assert [path.name for path in Path("new/folder").iterdir()] == [f"network{ending}"]

    saved, (_, test) = content_of(unhurt), small_task.data.sample(None)
    torch.save(test.images.permute(0, 3, 1, 2) / 255, "images.pt")
    program = printed_program(out)
    last = program.splitlines()[-1]
    # the same once more, with images of ours
    again = re.sub(r"torch\.rand\(.*?\)", "torch.load('images.pt')", last)
    again = re.sub(
        r"np\.random\.rand\(.*?\)", "__import__('torch').load('images.pt').numpy()", again
    )
    assert again != last
    program += (
        f"\n{again}\n"
        "import sys, torch\n"
        "assert 'attention_model' not in sys.modules\n"
        "if 'outputs' not in globals():\n"
        "    outputs = dict(logits=logits, conv7=conv7, conv10=conv10, conv13=conv13)\n"
        "outputs = {name: torch.as_tensor(output) for name, output in outputs.items()}\n"
        "torch.save([outputs, about], 'outputs.pt')\n"
    )
    (tmp_path / "program.py").write_text(program)
    others = [each for each in os.environ["PYTHONPATH"].split(os.pathsep) if each != str(ROOT)]
    done = subprocess.run(
        [sys.executable, "program.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(others)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outputs, about = torch.load("outputs.pt")
    inputs = to_input(test.images, saved["mean"], saved["std"], saved["input_size"])
    assert_close(outputs, outputs_of(load_model(saved), inputs))

    if ending == ".pt2":
        about = json.loads(about["metadata.json"])
    else:
        about = {key: tolerant_json(value) for key, value in about.items()}
    assert about["class_names"] == list(test.class_names)
    assert about["input_size"] == [32, 32] and about["mean"] == list(saved["mean"])
    assert about["std"] == list(saved["std"]) and about["model"] == saved["config"]["model"]
    assert about["software"] == "learn-to-pay-attention" and about["torch"] == torch.__version__
    assert about["checkpoint"] == str(unhurt / "last.pt")
    assert about["inputs"] == {
        "images": "(batch, 3, 32, 32) float32, RGB in [0, 1]: the whole picture, resized; "
        "normalization is inside"
    }
    assert about["outputs"] == {
        "logits": "(batch, 4), before the softmax",
        "conv7": "(batch, 32, 32), attention map, sums to 1",
        "conv10": "(batch, 16, 16), attention map, sums to 1",
        "conv13": "(batch, 8, 8), attention map, sums to 1",
    }


def tolerant_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_what_is_printed_about_the_file_and_that_the_next_export_replaces_it(exported, ending):
    status, out, err = exported(f"network{ending}")
    assert (status, err) == (0, "")
    mib = Path(f"network{ending}").stat().st_size / 2**20
    made = torch.__version__ if ending == ".pt2" else f"opset {OPSET}"
    assert re.search(rf"^network{ending}: {mib:.1f} MiB, float32, .*{re.escape(made)}", out, re.M)
    assert (
        "  input   images  (batch, 3, 32, 32) float32, RGB in [0, 1]: the whole picture, resized; "
        in out
    )
    assert "  output  conv13  (batch, 8, 8), attention map, sums to 1\n" in out
    runtime, difference = re.search(
        r"run on 4 random images \((.*)\): the largest difference from the network is (\S+)\.\n",
        out,
    ).groups()
    assert runtime.startswith("PyTorch" if ending == ".pt2" else "onnxruntime")
    assert 0 <= float(difference) <= 1e-4
    before = Path(f"network{ending}").read_bytes()
    assert exported(f"./network{ending}")[0] == 0
    assert Path(f"network{ending}").read_bytes() != before  # it has another command line


def test_without_onnxruntime_the_evaluator_of_onnx_compares(exported, monkeypatch):
    pytest.importorskip("onnx")
    images = torch.rand(5, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        status, out, err = exported("network.onnx")
        in_evaluator = load_onnx(Path("network.onnx")).run(images)
    assert (status, err) == (0, "")
    assert "(onnx.reference " in out and ", as onnxruntime is not installed): the largest" in out
    pytest.importorskip("onnxruntime")
    assert_close(in_evaluator, load_onnx(Path("network.onnx")).run(images))


@pytest.mark.parametrize(
    "config, part",
    [
        ({}, "the whole picture"),
        ({"crop": "whole", "margin": 0.1}, "the whole picture"),
        ({"crop": "center"}, "the centered square"),
        (
            {"crop": "box", "margin": 0.1},
            "the object's box with a margin of 0.1 of its longer side",
        ),
    ],
)
def test_the_file_says_which_part_of_a_picture_to_give_it(config, part):
    assert export.part_seen(config) == part


def test_an_export_needs_no_images(cli, unhurt, fake):
    def lost(config):
        raise UserError("the images are lost")

    fake(lambda outputs: None)
    status, out, _ = cli(
        *("--evaluate", unhurt / "last.pt", "--export", "n.pt2"), task=with_sample(TASK, lost)
    )
    assert status == 0 and "(a fake 1.0): the largest difference from the network is 0." in out


def test_a_checkpoint_in_the_middle_of_an_epoch_is_exported_with_a_remark(cli, unhurt, fake):
    fake(lambda outputs: None)
    saved = content_of(unhurt)
    saved["position"]["step"] = 3
    torch.save(saved, "middle.pt")
    status, out, _ = cli("--evaluate", "middle.pt", "--export", "n.pt2")
    assert status == 0 and "It was saved in the middle of an epoch" in out


# ---- what is not written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda outputs: outputs["conv10"].add_(2e-4), "its conv10 differs from the network's by"),
        (lambda outputs: outputs["conv7"].fill_(torch.nan), "its conv7 differs"),
        (
            lambda outputs: outputs.update(logits=outputs["logits"][:, :3]),
            "its logits has shape (1, 3), the network's (1, 4)",
        ),
        (
            lambda outputs: outputs["another"],
            "it could not be loaded and run again ('another')",
        ),
    ],
)
def test_a_file_that_differs_from_the_network_is_not_written(exported, fake, change, message):
    fake(change)
    status, _, err = exported("new/network.pt2")
    assert status == 1 and err.startswith(f"error: new/network.pt2 was not written: {message}")
    assert len(err.splitlines()) == 1 and not list(Path().iterdir())


def test_the_tolerance_is_relative_for_large_logits_only():
    def difference(expected, by):
        values = torch.full((2, 3), expected)
        return export.checked_difference(
            "logits", values + by, values, Path("n.pt2"), FORMATS[".pt2"]
        )

    assert difference(0.5, 0.9e-4) == pytest.approx(0.9e-4, rel=1e-2)
    assert difference(-50.0, 0.004) == pytest.approx(0.004, rel=1e-2)
    for expected, by in ((0.5, 1.1e-4), (-50.0, 0.006)):
        with pytest.raises(UserError, match="its logits differs from the network's"):
            difference(expected, by)


def test_a_network_that_diverged_is_not_exported(cli, unhurt):
    saved = content_of(unhurt)
    for state in filter(None, (saved["model"], saved["ema"])):
        next(tensor for name, tensor in state.items() if "classifier" in name).fill_(torch.nan)
    torch.save(saved, "nan.pt")
    status, _, err = cli("--evaluate", "nan.pt", "--export", "nan.pt2")
    assert status == 1 and "outputs are not finite numbers, so its training diverged" in err
    assert not Path("nan.pt2").exists()


def test_what_does_not_fit_one_onnx_file_is_refused(exported, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr("training.export_formats.ONNX_BYTES", 1000)
    status, _, err = exported("network.onnx")
    assert status == 1 and "an ONNX file holds less than 2 GiB: export to a .pt2 file" in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_takes_no_files(exported, fake, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    fake(lambda outputs: None)
    if code == errno.ENOSPC:
        monkeypatch.setattr("common.files.os.fsync", fails)
    else:
        monkeypatch.setattr("common.files.open", fails, raising=False)
    status, _, err = exported("new/network.pt2")
    assert (status, err) == (1, f"error: new/network.pt2: {os.strerror(code)}\n")
    assert not list(Path().iterdir())


# ---- files that are there already ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.write_text(""),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: os.mkfifo(path),  # opening it would wait for ever
        lambda path: torch.save({"software": "learn-to-pay-attention"}, path),
    ],
)
def test_a_file_of_somebody_elses_stays(exported, ending, make):
    path = Path(f"network{ending}")
    make(path)
    before = path.read_bytes() if path.is_file() else path.lstat().st_ino
    status, out, err = exported(path)
    assert (status, out) == (2, "")
    assert f"--export {path} is there already, and not written by --export" in err
    assert before == (path.read_bytes() if path.is_file() else path.lstat().st_ino)
    assert list(Path().iterdir()) == [path]


@pytest.mark.parametrize("content", ['{"software": "another"}', "[]", "{", "[" * 50_000])
def test_a_pt2_file_of_another_program_stays(exported, content):
    with zipfile.ZipFile("network.pt2", "w") as archive:
        archive.writestr("archive/extra/metadata.json", content)
    before = Path("network.pt2").read_bytes()
    status, _, err = exported("network.pt2")
    assert status == 2 and "not written by --export" in err
    assert Path("network.pt2").read_bytes() == before


def test_a_link_to_an_export_is_not_followed(exported, unhurt):
    with zipfile.ZipFile("v1.pt2", "w") as archive:
        archive.writestr("metadata.json", '{"software": "learn-to-pay-attention"}')
    before = Path("v1.pt2").read_bytes()
    Path("newest.pt2").symlink_to("v1.pt2")
    assert exported("newest.pt2")[0] == 2
    assert Path("newest.pt2").is_symlink() and Path("v1.pt2").read_bytes() == before


# ---- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["network.pt", "network", "network.PT2", ".onnx", "network.onnx.gz"]
)
def test_another_ending_is_refused_before_anything_is_read(cli, name):
    status, out, err = cli("--evaluate", "none.pt", "--export", name)
    assert (status, out) == (2, "")
    assert err == (
        f"error: --export {name}: the name must end in .pt2 (PyTorch's torch.export) or .onnx\n"
    )


def test_options_without_effect_are_refused(exported):
    words = "--device cpu --precision fp32 --out out --sort name --data-dir d --set dropout=0"
    status, out, err = exported("network.pt2", *words.split())
    assert (status, out) == (2, "")
    assert "writes float32 on the CPU: leave out " in err
    assert set(err.strip().split("leave out ")[1].split(", ")) == {
        word for word in words.split() if word.startswith("--")
    }


def test_export_goes_with_evaluate(cli):
    for words in ([], ["--sanity"], ["--benchmark"]):
        status, _, err = cli(*words, "--export", "network.pt2")
        assert status == 2 and "error: --export goes with --evaluate\n" in err


def test_a_checkpoint_or_folder_that_is_none(cli, unhurt):
    status, _, err = cli("--evaluate", "none.pt", "--export", "new/network.pt2")
    assert (status, err) == (1, "error: none.pt: there is no such file\n")
    Path("damaged.pt").write_bytes((unhurt / "last.pt").read_bytes()[:5000])
    status, _, err = cli("--evaluate", "damaged.pt", "--export", "new/network.pt2")
    assert status == 1 and err.startswith("error: damaged.pt is no checkpoint")
    status, _, err = cli("--evaluate", "damaged.pt", "--export", "damaged.pt/network.pt2")
    assert status == 2 and "damaged.pt is not a folder" in err
    assert [path.name for path in Path().iterdir()] == ["damaged.pt"]


def test_without_the_package_onnx_the_error_says_how_to_install_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = exported("network.onnx")
    assert status == 1 and err.startswith("error: an .onnx file needs the package onnx (")
    assert err.endswith("-m pip install onnx onnxruntime\n") and len(err.splitlines()) == 2
    assert not list(Path().iterdir())


# ---- noise --------------------------------------------------------------------------------------


def test_the_exporters_talk_is_silenced_and_errors_are_not(caplog):
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        logging.getLogger("torch.onnx").warning("talk")
        logging.getLogger("torch.onnx").error("a real error")
    assert not caught and [record.message for record in caplog.records] == ["a real error"]
    with pytest.raises(RuntimeError, match="also real"), quiet():
        raise RuntimeError("also real")
    assert logging.root.manager.disable == disabled
