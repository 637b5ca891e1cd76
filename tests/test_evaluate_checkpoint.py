"""--evaluate: what it prints and writes, and what it leaves alone."""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_model
from data import cifar_sample, to_input
from explain.pictures import is_own_picture
from tests.helpers.environment import ROOT
from tests.helpers.runs import content_of, with_sample
from train_cifar100 import TASK
from training.environment import git_commit
from training.evaluate_checkpoint import precision_here, print_classes
from training.report import read_metrics

NAMES = (
    "evaluation.json",
    "predictions.csv",
    "classes.csv",
    "confused.png",
    "mistakes.png",
    "summary.png",
)


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def strict_json(path) -> dict:
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def wilson(correct: int, images: int) -> list[float]:
    """The two shares, in percent, that the measured one is 1.96 standard deviations away from."""
    z2, share = 1.959964**2, correct / images
    return sorted(100 * np.roots([1 + z2 / images, -2 * share - z2 / images, share**2]))


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def relabelled(labels):
    """The task on the sample of small_task, with other labels of the test images."""
    train, test = cifar_sample(classes=4, train_per_class=24, test_per_class=8)
    return with_sample(
        TASK, lambda config: (train, dataclasses.replace(test, labels=torch.tensor(labels)))
    )


@pytest.fixture(scope="module")
def shuffled():
    """A task whose test labels are random: the network makes mistakes of every kind."""
    return relabelled(np.random.default_rng(0).integers(0, 4, 32).tolist())


@pytest.fixture
def evaluated(cli, unhurt, shuffled):
    """evaluate(...) -> (status, output, error) of an evaluation into out, on the CPU."""
    return lambda *words: cli(
        *("--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "out", *words),
        task=shuffled,
    )


# ---- what is printed ----------------------------------------------------------------------------


def test_evaluate_repeats_the_last_epochs_numbers(cli, unhurt):
    status, out, _ = cli("--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "out")
    row = read_metrics(unhurt / "metrics.csv")[-1]
    assert status == 0
    assert (
        f"loss {row['eval_loss']:.4f}   top-1 {row['eval_top1']:.2f} %   top-5 "
        f"{row['eval_top5']:.2f} %\n" in out
    )
    classes = [float(x) for x in re.findall(r"(\d+\.\d) % of 8", out)]
    assert len(classes) == 4 and sum(classes) / 4 == pytest.approx(row["eval_top1"], abs=0.1)
    assert classes == sorted(classes) and "top-1 of each class, worst first\n" in out


def test_evaluate_takes_the_settings_from_the_checkpoint(cli, unhurt, monkeypatch):
    for words in (["--sample"], ["--width", 0.5], ["--set", "dropout=0"], ["--run-dir", "x"]):
        status, _, err = cli("--evaluate", unhurt / "last.pt", *words)
        assert status == 2 and f"from the checkpoint: leave out {words[0]}" in err
    # emulated, it would take hours
    monkeypatch.setattr("common.device.cpu_has_bf16", lambda: False)
    here = [precision_here(name, torch.device("cpu")) for name in ("bf16", "fp16", "fp32")]
    assert here == ["auto", "auto", "fp32"]
    if torch.cuda.is_available():
        assert precision_here("fp16", torch.device("cuda")) == "fp16"


def test_sort_by_name_sorts_the_printed_classes_only(evaluated):
    status, out, err = evaluated("--sort", "name")
    assert status == 0, err
    table = out[out.index("top-1 of each class, by name\n") : out.index("\nIn out:")]
    names = re.findall(r"(\S+) +\d+\.\d % of", table)
    assert names == sorted(names) and len(names) == 4
    in_file = [row["class"] for row in rows_of("out/classes.csv")]
    assert sorted(in_file) == names and in_file != names  # the sample's are in another order
    before = content("out")
    assert evaluated("--sort", "accuracy")[0] == 0
    after = content("out")
    assert {name for name in NAMES if before[name] != after[name]} == {"evaluation.json"}


def test_classes_stand_in_columns_in_either_order(capsys):
    names, counts, correct = ("b", "a", "c"), [4, 4, 8], [3, 2, 4]
    print_classes(names, counts, correct)
    print_classes(names, counts, correct, "name")
    worst_first, by_name = capsys.readouterr().out.split("\n\n")[:2]
    assert re.findall(r"([abc]) +(\S+) % of (\d)", worst_first) == [
        ("a", "50.0", "4"),
        ("c", "50.0", "8"),
        ("b", "75.0", "4"),
    ]
    assert re.findall(r"([abc]) +\d", by_name) == ["a", "b", "c"]


# ---- what is written ----------------------------------------------------------------------------


def test_the_files_agree_with_each_other_and_with_what_is_printed(evaluated, unhurt):
    status, out, err = evaluated()
    assert status == 0, err
    record = strict_json("out/evaluation.json")
    predictions, classes = rows_of("out/predictions.csv"), rows_of("out/classes.csv")

    loss, top1, top5 = re.search(
        r"^loss (\S+)   top-1 (\S+) %   top-5 (\S+) %$", out, re.M
    ).groups()
    assert (f"{record['loss']:.4f}", f"{record['top1']:.2f}") == (loss, top1)
    assert f"{record['top5']:.2f}" == top5 == "100.00"  # of four classes
    ends = [
        *(f"{end:.4f}" for end in record["loss_95"]),
        *(f"{end:.2f}" for end in record["top1_95"] + record["top5_95"]),
    ]
    printed = re.search(r"^95 % intervals: (.*)$", out, re.M).group(1)
    assert re.findall(r"\d+\.\d+", printed) == ends

    right = sum(row["true"] == row["predicted"] for row in predictions)
    assert 0 < right < 32 and record["images"] == len(predictions) == 32
    assert record["top1"] == pytest.approx(100 * right / 32)
    losses = [float(row["loss"]) for row in predictions]
    assert record["loss"] == pytest.approx(sum(losses) / 32, abs=2e-6)
    spread = 1.96 * np.std(losses, ddof=1) / 32**0.5
    assert record["loss_95"] == pytest.approx(
        [record["loss"] - spread, record["loss"] + spread], abs=1e-4
    )

    assert sum(int(row["correct"]) for row in classes) == right
    for row in classes:
        name = row["class"]
        own = [each["predicted"] for each in predictions if each["true"] == name]
        assert (int(row["images"]), int(row["correct"])) == (len(own), own.count(name))
        assert float(row["top1"]) == pytest.approx(100 * own.count(name) / len(own), abs=0.005)
        ends = [float(row["low_95"]), float(row["high_95"])]
        assert ends == pytest.approx(wilson(own.count(name), len(own)), abs=0.0051)
        assert f"{name} " in out and f"{float(row['top1']):.1f} % of {len(own)}" in out
        assert int(row["predicted"]) == sum(each["predicted"] == name for each in predictions)
        others = [answer for answer in own if answer != name]
        assert int(row["times"]) == others.count(row["mistaken_for"])
        assert int(row["times"]) == max(others.count(answer) for answer in others)

    config = content_of(unhurt)["config"]
    assert record["checkpoint"] == str(unhurt / "last.pt")
    assert [record[name] for name in ("model", "width", "epochs")] == [
        config[name] for name in ("model", "width", "epochs")
    ]
    assert (record["epoch"], record["classes"], record["precision"]) == (4, 4, "fp32")
    assert record["data"] in out and record["device"] in out
    assert record["torch"] == torch.__version__ and record["git_commit"] == git_commit()
    assert record["command"].endswith(f"--evaluate {unhurt / 'last.pt'} --device cpu --out out")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", record["date"])


def test_predictions_against_the_network_itself(evaluated, unhurt, shuffled):
    """Of four classes there are four best, and so many columns."""
    assert evaluated()[0] == 0
    saved, (_, test) = content_of(unhurt), shuffled.data.sample(None)
    with torch.no_grad():
        inputs = to_input(test.images, saved["mean"], saved["std"], saved["input_size"])
        logits = load_model(saved)(inputs).double()
    rows = rows_of("out/predictions.csv")
    assert list(rows[0]) == [
        *("image", "true", "predicted", "probability", "predicted_2", "probability_2"),
        *("predicted_3", "probability_3", "predicted_4", "probability_4", "loss"),
    ]
    for i, (row, own) in enumerate(zip(rows, logits, strict=True)):
        probabilities = own.exp() / own.exp().sum()
        order = probabilities.argsort(descending=True).tolist()
        assert int(row["image"]) == i and row["true"] == test.class_names[test.labels[i]]
        for place, ending in enumerate(("", "_2", "_3", "_4")):
            assert row[f"predicted{ending}"] == test.class_names[order[place]]
            probability = probabilities[order[place]].item()
            assert float(row[f"probability{ending}"]) == pytest.approx(probability, abs=1e-5)
        assert float(row["loss"]) == pytest.approx(
            -probabilities[test.labels[i]].log().item(), abs=1e-4
        )


def test_names_with_commas_quotes_and_other_scripts_are_read_back(cli, unhurt):
    names = ("a, b", 'say "hi"', "Zürich 猫", "one\nline")
    saved = content_of(unhurt) | {"class_names": list(names)}
    torch.save(saved, "renamed.pt")
    train, test = cifar_sample(classes=4, train_per_class=24, test_per_class=8)
    sets = [dataclasses.replace(each, class_names=names) for each in (train, test)]
    task = with_sample(TASK, lambda config: sets)
    status, out, err = cli("--evaluate", "renamed.pt", "--device", "cpu", task=task)
    assert status == 0, err
    shown = [*names[:3], "one\\nline"]  # a line of the file is an image
    assert [row["class"] for row in rows_of("classes.csv")] == shown
    assert [row["true"] for row in rows_of("predictions.csv")] == shown * 8
    assert len(Path("predictions.csv").read_bytes().splitlines()) == 33


def test_the_files_go_beside_the_checkpoint_and_are_listed(cli, unhurt, shuffled):
    folder = Path("some run")
    folder.mkdir()
    (folder / "last.pt").symlink_to(unhurt / "last.pt")
    status, out, err = cli("--evaluate", folder / "last.pt", "--device", "cpu", task=shuffled)
    assert status == 0, err
    assert {path.name for path in folder.iterdir()} == {*NAMES, "last.pt"}
    block = out[out.index("In some run:\n") :].splitlines()
    assert [line.split()[0] for line in block[1:]] == list(NAMES)
    assert all(is_own_picture(folder / name) for name in NAMES if name.endswith(".png"))


def test_the_summary_has_the_curves_of_its_own_run_alone(cli, unhurt, small_task):
    heights = {}
    for folder in ("whole", "other", "alone"):
        Path(folder).mkdir()
        shutil.copy(unhurt / "last.pt", folder)
        if folder != "alone":
            shutil.copy(unhurt / "metrics.csv", folder)
            record = json.loads((unhurt / "config.json").read_text())
            record["config"]["seed"] += folder == "other"  # then it is another run's
            Path(folder, "config.json").write_text(json.dumps(record))
        status, _, err = cli("--evaluate", f"{folder}/last.pt", "--device", "cpu", task=small_task)
        assert status == 0, err
        heights[folder] = Image.open(f"{folder}/summary.png").height
    assert heights["whole"] > heights["other"] + 300  # the charts
    assert heights["other"] == heights["alone"]


@pytest.mark.skipif(not (ROOT / "data/cifar100").is_dir(), reason="no CIFAR-100 in data/")
def test_on_the_10000_test_images_the_files_agree_with_what_is_printed(cli):
    words = ["--data-dir", ROOT / "data", "--device", "cpu"]
    network = ["--model", "vgg-att1-pc", "--width", 0.0625, "--keep", "--run-dir", "s"]
    assert cli("--sanity", *network, *words, task=TASK)[0] == 0
    status, out, err = cli("--evaluate", "s/last.pt", *words, task=TASK)
    assert status == 0, err
    printed = re.search(r"^loss (\S+)   top-1 (\S+) %   top-5 (\S+) %$", out, re.MULTILINE).groups()
    assert "10,000 test images" in out
    rows, record = rows_of("s/predictions.csv"), strict_json("s/evaluation.json")
    assert [int(row["image"]) for row in rows] == list(range(10_000)) and record["images"] == 10_000
    best = [[row["predicted"], *(row[f"predicted_{n}"] for n in range(2, 6))] for row in rows]
    loss = sum(float(row["loss"]) for row in rows) / 10_000
    top1 = sum(row["true"] == found[0] for row, found in zip(rows, best, strict=True)) / 100
    top5 = sum(row["true"] in found for row, found in zip(rows, best, strict=True)) / 100
    assert printed == (f"{record['loss']:.4f}", f"{top1:.2f}", f"{top5:.2f}")
    assert (record["top1"], record["top5"]) == (pytest.approx(top1), pytest.approx(top5))
    assert record["loss"] == pytest.approx(loss, abs=1e-5)
    classes = rows_of("s/classes.csv")
    assert len(classes) == 100 and {row["images"] for row in classes} == {"100"}
    assert sum(int(row["correct"]) for row in classes) == round(100 * top1)
    assert sum(int(row["predicted"]) for row in classes) == 10_000


def test_missing_parents_of_out_are_made(evaluated):
    assert evaluated("--out", "a/b/c")[0] == 0
    assert {path.name for path in Path("a/b/c").iterdir()} == {*NAMES} and not Path("out").exists()


def test_numbers_that_are_none_are_null(cli, unhurt):
    saved = content_of(unhurt)
    for state in filter(None, (saved["model"], saved["ema"])):
        next(tensor for name, tensor in state.items() if "classifier" in name).fill_(float("nan"))
    torch.save(saved, "nan.pt")
    status, out, err = cli("--evaluate", "nan.pt", "--device", "cpu")
    assert status == 0 and "loss nan" in out, err
    record = strict_json("evaluation.json")
    assert record["loss"] is None and record["loss_95"] == [None, None]
    assert record["top1"] == 25 and is_own_picture(Path("mistakes.png"))


# ---- files of others, and earlier ones ----------------------------------------------------------


def test_a_second_evaluation_replaces_the_files_of_the_first(evaluated, cli, unhurt):
    assert evaluated()[0] == 0
    before = content("out")
    other = relabelled([3 - i % 4 for i in range(32)])
    words = ("--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "out")
    assert cli(*words, task=other)[0] == 0
    after = content("out")
    assert set(before) == set(after) == {*NAMES}
    assert not [name for name in NAMES if before[name] == after[name]]
    right = sum(row["true"] == row["predicted"] for row in rows_of("out/predictions.csv"))
    assert strict_json("out/evaluation.json")["top1"] == pytest.approx(100 * right / 32)


def test_files_of_somebody_elses_stay_and_ours_get_a_number(evaluated):
    Path("out").mkdir()
    Path("out/evaluation.json").write_text('{"top1": 99.0, "model": "mine"}')
    Path("out/predictions.csv").write_text("image,true,predicted\n0,cat,dog\n")
    Path("out/classes.csv").write_text("")
    for name in ("confused.png", "mistakes.png", "summary.png"):
        Image.new("RGB", (8, 8), "red").save(f"out/{name}")
    before = content("out")
    numbered = {f"{stem}-2.{ending}" for stem, ending in (name.split(".") for name in NAMES)}
    for _ in range(2):  # the second time, those with a number are ours
        status, out, err = evaluated()
        assert status == 0, err
        after = content("out")
        assert {name: after[name] for name in NAMES} == before and set(after) - {*NAMES} == numbered
        assert all(f"  {name} " in out for name in numbered)


def test_what_is_no_file_or_no_json_is_somebody_elses(evaluated):
    Path("out/classes.csv").mkdir(parents=True)
    os.mkfifo("out/predictions.csv")  # opening it would wait for ever
    Path("out/evaluation.json").write_text("[" * 50_000)
    Path("out/confused.png").symlink_to("nowhere")
    status, _, err = evaluated()
    assert status == 0, err
    assert Path("out/confused.png").is_symlink() and Path("out/predictions.csv").is_fifo()
    assert Path("out/evaluation.json").read_text() == "[" * 50_000
    assert {"confused-2.png", "predictions-2.csv", "classes-2.csv", "evaluation-2.json"} < {
        path.name for path in Path("out").iterdir()
    }


def test_without_mistakes_there_are_no_pictures_and_earlier_ones_go(evaluated, cli, unhurt):
    assert evaluated()[0] == 0
    Image.new("RGB", (8, 8), "red").save("out/mistakes.png")  # now somebody else's
    assert evaluated()[0] == 0 and Path("out/mistakes-2.png").exists()
    theirs = Path("out/mistakes.png").read_bytes()
    names = [row["class"] for row in rows_of("out/classes.csv")]
    labels = [names.index(row["predicted"]) for row in rows_of("out/predictions.csv")]
    status, out, err = cli(
        *("--evaluate", unhurt / "last.pt", "--device", "cpu", "--out", "out"),
        task=relabelled(labels),
    )
    assert status == 0 and "top-1 100.00 %" in out, err
    assert out.endswith("  There are no mistakes to show in confused.png and mistakes.png.\n")
    assert set(content("out")) == {*NAMES} - {"confused.png"}
    assert Path("out/mistakes.png").read_bytes() == theirs
    assert {(row["mistaken_for"], row["times"]) for row in rows_of("out/classes.csv")} == {
        ("", "0")
    }
    # classes that the network never gives have no images now
    empty = [row for row in rows_of("out/classes.csv") if row["images"] == "0"]
    assert all(row["top1"] == row["low_95"] == row["high_95"] == "" for row in empty)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_takes_no_files_loses_no_numbers(evaluated, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    if code == errno.ENOSPC:
        monkeypatch.setattr("common.files.os.fsync", fails)
    else:
        monkeypatch.setattr("common.files.open", fails, raising=False)
    status, out, err = evaluated()
    assert status == 1 and list(Path("out").iterdir()) == []
    assert re.search(r"^loss \S+   top-1 \S+ %", out, re.M) and len(re.findall("% of", out)) == 4
    assert err == (
        f"error: out/evaluation.json could not be written: {os.strerror(code)}. The results above "
        "are complete; --out FOLDER writes the files to another folder\n"
    )


def test_what_was_written_before_the_disk_was_full_stays_whole(evaluated, monkeypatch):
    assert evaluated()[0] == 0
    before, replace = content("out"), os.replace

    def full(source, target):
        if Path(target).name == "classes.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("common.files.os.replace", full)
    status, _, err = evaluated()
    assert status == 1 and "out/classes.csv could not be written: No space left" in err
    assert content("out").keys() == before.keys()
    assert content("out")["classes.csv"] == before["classes.csv"]


@pytest.mark.parametrize("words", ["notes.txt", "notes.txt/below", "nowhere/below"])
def test_an_out_that_is_no_folder_is_refused_before_the_evaluation(evaluated, words):
    Path("notes.txt").write_text("mine")
    Path("nowhere").symlink_to("missing")
    status, out, err = evaluated("--out", words)
    first = words.split("/")[0]
    assert (status, out, err) == (2, "", f"error: --out {words}: {first} is not a folder\n")
    assert Path("notes.txt").read_text() == "mine"


def test_out_and_sort_go_with_evaluate_alone(cli, unhurt):
    for words in (["--out", "x"], ["--sort", "name"]):
        for mode in ([], ["--resume", unhurt]):
            status, _, err = cli(*mode, *words)
            assert status == 2 and f"{words[0]} goes with --evaluate" in err
    assert not Path("x").exists()
