"""The experiments: their list, how it is run, and the tables that come out."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from experiments import __main__ as command
from experiments import plan, tables
from experiments.__main__ import main, make_parser
from tests.helpers.environment import ROOT
from train_cifar100 import TASK
from training import options
from training.report import METRIC_FIELDS, to_line
from training.run_folder import lock

DOCUMENT = Path(ROOT, "docs/attention.md")
REFERENCE = Path(ROOT, "runs/reference/experiments")
SIZE = ("--width", "0.25", "--epochs", "5")


def run_folder(folder: Path, name: str, top1: float, **files) -> Path:
    """A finished run with this accuracy."""
    where = folder / name
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps({"finished": True, "config": {}}))
    row = dict.fromkeys(METRIC_FIELDS[1:], 1.0) | {"eval_top1": top1, "eval_top5": 80.0}
    (where / "metrics.csv").write_text(",".join(METRIC_FIELDS) + "\n" + to_line(5, row))
    for file, content in files.items():
        (where / f"{file}.json").write_text(json.dumps(content))
    return where


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.split("\n")[2:]]


# ---- the list -----------------------------------------------------------------------------------


def test_every_command_of_the_list_is_understood():
    runs = plan.plan(Path("runs/x"), "data", SIZE, "auto")
    assert len({run.name for run in runs}) == len(runs) == 3 * 10 + 3 * 3
    parser = options.make_parser(TASK)
    for run in runs:
        parser.parse_args(run.train)
        for _, (first, *words) in run.measures:
            if first == "-m":
                assert words[0] == "experiments"
                make_parser().parse_args(words[1:])
            else:
                assert first == "train_cifar100.py"
                parser.parse_args(words)
    measured = {run.name: [file for file, _ in run.measures] for run in runs}
    assert measured["vgg-0"] == []
    assert measured["vgg-att1-pc-1"] == [plan.MAPS]
    assert (
        measured["vgg-gap-2"]
        == measured["vgg-att3-concat-uniform-2"]
        == [plan.ATTACK, plan.TRANSFER]
    )
    assert measured["first50-vgg-gap-0"] == [plan.TRANSFER]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """run_all() of vgg-gap-0 alone -> (runs that failed, the commands that it ran)."""
    runs = plan.plan(tmp_path, "data", SIZE, "cpu")
    monkeypatch.setattr(plan, "plan", lambda *_: [run for run in runs if run.name == "vgg-gap-0"])

    def run_all(status=0, jobs=1):
        seen = []
        monkeypatch.setattr(
            plan.Commands, "run", lambda self, words, log: seen.append([*words]) or status
        )
        return plan.run_all(tmp_path, str(tmp_path), SIZE, "cpu", jobs), seen

    return run_all


def test_what_is_there_is_not_run_again(tmp_path, commands):
    where = tmp_path / "vgg-gap-0"
    failed, seen = commands()
    assert not failed
    assert [words[0] for words in seen] == ["train_cifar100.py", "train_cifar100.py", "-m"]
    assert seen[0][-2:] == ["--run-dir", str(where)] and "--evaluate" in seen[1]
    assert all(" ".join(words).count("--device cpu") == 1 for words in seen)

    run_folder(tmp_path, "vgg-gap-0", 50.0, attacks={})  # stopped in the middle of the training
    config = {"model": "vgg-gap", "seed": 0, "width": 0.25, "epochs": 5}
    (where / "config.json").write_text(json.dumps({"finished": False, "config": config}))
    assert commands(status=1) == (1, [["train_cifar100.py", "--resume", str(where)]])

    (where / "config.json").write_text(json.dumps({"finished": True, "config": config}))
    failed, seen = commands(jobs=2)  # trained, attacked, and not transferred
    assert not failed and [words[:3] for words in seen] == [["-m", "experiments", "transfer"]]


def test_a_run_of_another_length_is_not_taken_for_this_one(tmp_path, commands, capsys):
    where = run_folder(tmp_path, "vgg-gap-0", 50.0)
    config = {"model": "vgg-gap", "seed": 0, "width": 0.25, "epochs": 30}
    (where / "config.json").write_text(json.dumps({"finished": True, "config": config}))
    assert commands() == (1, [])
    assert f"there is another run in {where} (epochs 30): move it away" in capsys.readouterr().out


def test_one_process_at_a_time_runs_the_list(tmp_path, commands):
    with lock(tmp_path), pytest.raises(UserError, match="in use by another process"):
        commands()


def test_stopping_interrupts_each_command_once_and_starts_no_other(tmp_path):
    """A command that writes what it got: the first interrupt, not a second."""
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
        "print('ready', flush=True)\n"
        "time.sleep(1)"
    )
    commands, log = plan.Commands(dict(os.environ)), tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(commands.run, ["-c", code], log)
        while "ready" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.01)
        commands.stop()
        assert running.result() is None
    assert log.read_text().split() == ["ready", "interrupted"]
    assert commands.run(["-c", "print('another')"], log) is None
    assert "another" not in log.read_text()


def test_without_class_folders_all_but_the_first_classes_are_run(tmp_path, monkeypatch, capsys):
    names = []
    monkeypatch.setattr(plan, "run_one", lambda run, *_: names.append(run.name) or True)
    assert plan.run_all(tmp_path / "runs", str(tmp_path), SIZE, "cpu", jobs=1) == 0
    assert len(names) == 30 and not [name for name in names if name.startswith("first")]
    assert "Without the runs on 50 classes: " in capsys.readouterr().out


def test_what_is_kept_is_small_and_has_no_folders_of_the_machine(tmp_path):
    words = "python -m experiments maps /x/y/vgg-0/last.pt --data-dir some/data/folder"
    where = run_folder(tmp_path / "runs", "vgg-0", 60.0, replaced_maps={"a": [words]})
    (where / "last.pt").write_bytes(b"weights")
    unfinished = run_folder(tmp_path / "runs", "vgg-1", 60.0)
    (unfinished / "config.json").write_text("{}")
    assert plan.keep(tmp_path / "runs", tmp_path / "kept") == 1
    kept = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert kept == {"config.json", "metrics.csv", "replaced_maps.json"}
    content = json.loads((tmp_path / "kept/vgg-0/replaced_maps.json").read_text())
    assert content == {"a": [words.replace("/x/y/", "")]}
    assert plan.keep(tmp_path / "runs", tmp_path / "kept") == 1  # its own copy is replaced
    with pytest.raises(UserError, match="no finished run"):
        plan.keep(tmp_path / "kept/vgg-0", tmp_path / "x")


def test_nothing_of_others_is_replaced_by_what_is_kept(tmp_path):
    run_folder(tmp_path / "runs", "vgg-0", 60.0)
    (tmp_path / "kept/vgg-0").mkdir(parents=True)
    for kept in ("kept", "runs"):  # somebody's folder, and the runs themselves
        before = content_of_all(tmp_path)
        with pytest.raises(UserError, match="is no copy of"):
            plan.keep(tmp_path / "runs", tmp_path / kept)
        assert content_of_all(tmp_path) == before


def content_of_all(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the tables ---------------------------------------------------------------------------------


def test_quantiles_of_students_t():
    for freedom, quantile in {4: 2.776, 6: 2.447, 10: 2.228, 18: 2.101, 30: 2.042}.items():
        assert tables.t_quantile(freedom) == pytest.approx(quantile, abs=0.003)


def test_the_pooled_deviation_is_that_of_the_residuals():
    groups = [[1.0, 2.0, 4.0], [10.0, 12.0], [5.0]]
    residuals = np.concatenate([np.array(g) - np.mean(g) for g in groups])
    sd, freedom = tables.pooled(groups)
    assert freedom == 3 and sd == pytest.approx(np.sqrt((residuals**2).sum() / 3))


def test_the_table_of_networks(tmp_path):
    for seed, (gap, pc) in enumerate([(58.0, 59.0), (58.2, 59.4), (57.8, 59.2)]):
        run_folder(tmp_path, f"vgg-gap-{seed}", gap)
        run_folder(tmp_path, f"vgg-att1-pc-{seed}", pc)
    run_folder(tmp_path, "first50-vgg-gap-0", 99.0)
    first, second = cells(tables.networks(tables.read_runs(tmp_path)))
    # both have a standard deviation of 0.2, with 4 degrees of freedom in all
    half = 2.776 * 0.2 * np.sqrt(2 / 3)
    assert first[:4] == ["vgg-att1-pc", "59.00, 59.40, 59.20", "**59.20**", "0.20"]
    assert first[4] == f"+1.20 ± {half:.2f}"
    assert second[:5] == ["vgg-gap", "58.00, 58.20, 57.80", "**58.00**", "0.20", "control"]


def test_the_other_tables(tmp_path):
    def maps(lost):
        rows = [
            {"by": by, "of": of, "top1": 60 - lost, "top1_recalibrated": 61 - lost}
            for by in tables.BY
            for of in (("conv13", "g") if by in tables.BY[2:] else ("conv13",))
        ]
        rows.append({"by": "own", "of": "all", "top1": 60.0, "top1_recalibrated": 60.0})
        moved = {by: {"conv13": 0.25} for by in tables.BY[2:]}
        return {"top1": 60.0, "replaced": rows, "moved_by_g": moved, "between_images": moved}

    def attacked(top1):
        rows = [{"attack": "none", "strength": 0, "top1": 60.0}]
        return {"results": [*rows, {"attack": "pgd", "strength": 1.0, "top1": top1}]}

    def moved_to(top1):
        row = {"target": "birds", "classes": 40, "image_size": 64, "features": 320}
        return {"targets": [row | {"top1": top1}]}

    for seed, value in enumerate([1.0, 2.0, 3.0]):
        files = {"attacks": attacked(value), "transfer": moved_to(10 + value)}
        maps_file = {"replaced_maps": maps(value)}
        run_folder(tmp_path, f"vgg-att1-dp-{seed}", 60.0, **maps_file, **files)
        run_folder(tmp_path, f"vgg-gap-{seed}", 60.0, **files)
    runs = tables.read_runs(tmp_path)
    assert cells(tables.replaced(runs)) == [
        ["vgg-att1-dp", "conv13", "60.0", *["−2.0 (−3.0 to −1.0); −1.0"] * 4]
    ]
    assert [row[1:4] for row in cells(tables.query(runs))] == [
        [by, "−2.00 (−3.00 to −1.00)", "conv13 0.250"] for by in tables.BY[2:]
    ]
    none, pgd = cells(tables.attacks(runs))
    assert none == ["none", "vgg-att1-dp", *["60.0 (60.0 to 60.0)"] * 2, "0.0 ± 0.0"]
    assert pgd[:4] == ["PGD, 1/255", "vgg-att1-dp", *["2.0 (1.0 to 3.0)"] * 2]
    assert pgd[4] == f"0.0 ± {2.776 * np.sqrt(2 / 3):.1f}"
    assert cells(tables.transferred(runs))[0][:4] == [
        "CIFAR-100",
        "birds, 40 classes, 64 px",
        "vgg-att1-dp (320)",
        "12.0 (11.0 to 13.0)",
    ]


def test_tables_of_one_seed_have_no_intervals(tmp_path):
    run_folder(tmp_path, "vgg-gap-0", 58.0)
    run_folder(tmp_path, "vgg-att1-pc-0", 59.0)
    unfinished = run_folder(tmp_path, "vgg-0", 59.0)
    (unfinished / "config.json").write_text("{}")
    first, second = cells(tables.networks(tables.read_runs(tmp_path)))
    assert first[2:5] == ["**59.00**", "", "+1.00"] and second[4] == "control"
    (tmp_path / "vgg-gap-0/config.json").write_text("{}")
    with pytest.raises(UserError, match="no finished run of vgg-gap"):
        tables.read_runs(tmp_path)


def test_tables_are_filled_in_between_their_marks(tmp_path):
    run_folder(tmp_path, "vgg-gap-0", 58.0)
    run_folder(tmp_path, "vgg-gap-1", 59.0)
    runs = tables.read_runs(tmp_path)
    text = "before\n<!-- table: networks -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(text, runs)
    assert "old" not in filled and "| vgg-gap | 58.00, 59.00 |" in filled
    assert filled.startswith("before\n") and filled.endswith("after\n")
    assert tables.filled(filled, runs) == filled
    with pytest.raises(UserError, match="no table is called net; there are networks"):
        tables.filled(text.replace("networks", "net"), runs)


def test_the_document_has_the_tables_of_the_reference_runs():
    text = DOCUMENT.read_text()
    assert tables.filled(text, tables.read_runs(REFERENCE)) == text
    assert {match[2] for match in tables.SLOT.finditer(text)} == set(tables.TABLES)


# ---- the command --------------------------------------------------------------------------------


def test_maps_of_a_checkpoint(unhurt, small_task, monkeypatch, tmp_path, cli):
    monkeypatch.setattr(command, "CIFAR100", small_task.data)
    words = ["maps", str(unhurt / "last.pt"), "--out", "found", "--device", "cpu"]
    assert main(words) == main(words) == 0  # the second replaces its own file
    found = json.loads(Path("found/replaced_maps.json").read_text())
    assert os.listdir("found") == ["replaced_maps.json"]
    assert cli("--evaluate", unhurt / "last.pt", "--out", "found", "--device", "cpu")[0] == 0
    expected = json.loads(Path("found/evaluation.json").read_text())
    own = next(row["top1"] for row in found["replaced"] if row["by"] == "own")
    assert found["top1"] == own == pytest.approx(expected["top1"], abs=1e-3)
    assert [found[key] for key in ("model", "seed", "images")] == [
        expected[key] for key in ("model", "seed", "images")
    ]


def test_wrong_use(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in {
        ("tabels",): "invalid choice: 'tabels'",
        ("run", "--epoch", "3"): "--epochs",
        (): "COMMAND",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    for words, message in {
        ("tables", "--runs", "nowhere"): "nowhere holds no finished run",
        ("maps", "no.pt"): "no.pt: there is no such file",
    }.items():
        assert main(words) > 0 and message in capsys.readouterr().err
