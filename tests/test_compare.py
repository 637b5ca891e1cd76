"""--compare: the order of runs, what differs between them, and names that are no runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from tests.helpers.environment import ROOT
from training.compare import compare, cut_middle, ranges, shortened
from training.report import METRIC_FIELDS, to_line
from training.run_folder import write_config

REFERENCE = Path(ROOT, "runs/reference")
CONFIG = {
    "dataset": "cifar100",
    "recipe": "fast",
    "model": "vgg-gap",
    "seed": 0,
    "val_fraction": 0.0,
    "sample": False,
    "epochs": 2,
    "lr": 0.05,
    "data_dir": "data",
}
ROW = {
    "lr": 0.01,
    "train_loss": 1.25,
    "train_top1": 70.0,
    "eval_loss": 1.5,
    "eval_top1": 60.0,
    "eval_top5": 90.0,
    "images_per_second": 100.0,
    "seconds": 700.0,
    "peak_memory_mib": 10.0,
}


def make_run(folder, *rows, environment=None, data=None, record=None, **settings) -> Path:
    """A run's folder: its rows are ROW with these changes, two of them if none is given."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    images = "val images" if settings.get("val_fraction") else "test images"
    whole = {
        "config": CONFIG | settings,
        "environment": {"device": "CPU", "torch": "2.14.1"} | (environment or {}),
        "data": {"images": 50_000, images: 10_000, "classes": 100} | (data or {}),
        "sanity": False,
        "finished": False,
    }
    write_config(folder, whole | (record or {}))
    write_rows(folder, rows or ({}, {}))
    return folder


def write_rows(folder, rows):
    lines = [to_line(epoch, ROW | row) for epoch, row in enumerate(rows, start=1)]
    (folder / "metrics.csv").write_text(",".join(METRIC_FIELDS) + "\n" + "".join(lines))


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """shown("a", "b") -> the lines of their comparison, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        assert compare([str(word) for word in words]) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    return call


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused("a", "b") -> (exit status, message)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(UserError) as error:
            compare([str(word) for word in words])
        return error.value.status, str(error.value)

    return call


def names_of(lines) -> list[str]:
    """The names in the first table, in its order."""
    return [line.split()[-1] for line in lines[1 : lines.index("")]]


def row_of(name, lines) -> list[str]:
    """The cells of what differs."""
    return next(line.split()[1:] for line in lines if line.split()[:1] == [name])


# ---- the table ----------------------------------------------------------------------------------


def test_the_best_run_is_first_and_what_differs_stands_below(shown):
    make_run("runs/a", {}, {"eval_top1": 60.129, "seconds": 534.0})
    make_run("runs/b", {}, {"eval_top1": 61.0, "eval_loss": 1.23456}, lr=0.1, model="vgg")
    assert shown("runs/a", "runs/b/config.json") == [
        "   test top-1  top-5    loss  train top-1  train loss  epoch  train s  run, in runs",
        "1       61.00  90.00  1.2346        70.00      1.2500    2/2    1,400  b",
        "2       60.13  90.00  1.5000        70.00      1.2500    2/2    1,234  a",
        "",
        "setting  1    2",
        "model    vgg  vgg-gap",
        "lr       0.1  0.05",
    ]


def test_of_equal_accuracies_the_lower_loss_is_first(shown):
    make_run("high", {"eval_loss": 1.6})
    make_run("low", {"eval_loss": 1.4, "eval_top1": 59.99999999999999})  # rounded elsewhere
    make_run("no-loss", {"eval_loss": float("nan")})
    assert names_of(shown("no-loss", "high", "low")) == ["low", "high", "no-loss"]


def test_runs_without_an_accuracy_are_last(shown):
    unfinished = make_run("none")
    (unfinished / "metrics.csv").unlink()
    lost = make_run("lost", record={"finished": True})
    (lost / "metrics.csv").unlink()
    write_rows(make_run("header"), ())
    make_run("nan", {"eval_top1": float("nan"), "train_loss": float("nan")})
    make_run("empty", {"eval_top1": None, "eval_loss": None, "seconds": None})
    make_run("bad", {"eval_top1": 0.0, "eval_loss": 9.0})
    lines = shown("none", "lost", "header", "nan", "empty", "bad")
    assert names_of(lines) == ["bad", "nan", "empty", "none", "lost", "header"]
    assert lines[2].split() == "2 nan 90.00 1.5000 70.00 nan 1/2 700 nan".split()
    assert lines[3].split() == "3 - 90.00 - 70.00 1.2500 1/2 0 empty".split()
    assert lines[4].split() == "4 - - - - - no epoch yet - none".split()
    assert lines[5].split() == "5 - - - - - no metrics.csv - lost".split()


def test_no_checkpoint_is_read(shown):
    for name in "ab":
        (make_run(name) / "last.pt").write_text("not a checkpoint")
    assert names_of(shown("a/last.pt", "b/last.pt")) == ["a", "b"]


def test_names_are_those_below_the_folder_that_all_share(shown, tmp_path):
    make_run("runs/cifar100/a")
    make_run("runs/cub/b")
    make_run("runs/cub/b/within", {"eval_top1": 1.0})
    make_run("c")
    assert names_of(shown("runs/cifar100/a", "runs/cub/b")) == ["cifar100/a", "cub/b"]
    assert names_of(shown("runs/cub/b", "runs/cub/b/within")) == ["b", "b/within"]
    assert names_of(shown("runs/cub/b", "c")) == ["runs/cub/b", "c"]
    mixed = [str(tmp_path / "c"), "runs/cub/b"]
    assert names_of(shown(*mixed)) == mixed
    lines = shown(tmp_path / "c", tmp_path / "runs/cub/b")
    assert lines[0].endswith(f"run, in {tmp_path}") and names_of(lines) == ["c", "runs/cub/b"]


def test_unprintable_names_are_escaped(shown):
    names = [os.fsdecode(b"caf\xe9"), "two\nlines"]
    for name in names:
        make_run(name, data_dir=name)
    lines = shown(*names)
    assert names_of(lines) == ["caf\\xe9", "two\\nlines"]
    assert row_of("data_dir", lines) == ["caf\\xe9", "two\\nlines"]


# ---- seeds --------------------------------------------------------------------------------------


def test_three_seeds_on_a_gpu_have_the_mean_of_the_readme(shown):
    lines = shown(*(REFERENCE / f"gpu-cifar100-pc-{seed}" for seed in range(3)))
    assert "These differ in no setting but the seed: top-1 mean 78.67 %, sd 0.22 (3 runs)" in lines
    assert row_of("seed", lines) == ["1", "2", "0"]
    assert row_of("git_commit", lines) == ["5677650", "5677650", "e5b65af"]


def seed_lines(lines) -> list[str]:
    return [line for line in lines if "seed:" in line]


def test_where_and_how_a_run_runs_is_no_difference_but_its_length_is(shown):
    make_run("a", {}, {"eval_top1": 60.0})
    make_run("b", {}, {"eval_top1": 62.0}, seed=1, data_dir="/data")
    make_run("c", {}, {}, {"eval_top1": 90.0}, seed=2, epochs=3)
    assert seed_lines(shown("a", "b")) == [
        "These differ in no setting but the seed: top-1 mean 61.00 %, sd 1.41 (2 runs)"
    ]
    assert not seed_lines(shown("a", "c"))
    assert seed_lines(shown("a", "b", "c")) == [
        "2, 3 differ in no setting but the seed: top-1 mean 61.00 %, sd 1.41 (2 runs)"
    ]


def test_only_runs_at_their_end_count_for_the_mean(shown):
    for seed, top1 in enumerate((60.0, 62.0, 10.0)):
        make_run(str(seed), {}, {"eval_top1": top1}, seed=seed)
    write_rows(Path("2"), [{"eval_top1": 10.0}])
    assert seed_lines(shown(*"012")) == [
        "These differ in no setting but the seed: top-1 mean 61.00 %, sd 1.41 "
        "(2 runs; 1 unfinished)"
    ]
    assert not seed_lines(shown(*"02"))


def test_a_repeated_seed_is_said(shown):
    for name, seed, top1 in (("a", 0, 60.0), ("b", 1, 62.0), ("c", 1, 64.0)):
        make_run(name, {}, {"eval_top1": top1}, seed=seed)
    assert seed_lines(shown(*"abc")) == [
        "These differ in no setting but the seed: top-1 mean 62.00 %, sd 2.00 (3 runs of 2 seeds)"
    ]
    assert not seed_lines(shown(*"bc"))


# ---- comparable or not --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"val_fraction": 0.2}, "evaluated on"),
        ({"data": {"test images": 500}}, "evaluated on"),
        ({"dataset": "cub", "data": {"classes": 200}}, "dataset, classes"),
        ({"sample": True}, "sample"),
    ],
)
def test_runs_on_other_images_are_not_comparable(shown, other, reason):
    make_run("a")
    make_run("b", seed=1, **other)
    lines = shown("a", "b")
    assert lines[4] == (
        f"Their accuracies are not comparable: they were evaluated on different images ({reason})."
    )
    assert not seed_lines(lines) and names_of(lines) == ["a", "b"]
    assert lines[0].split()[0] == ("eval" if "val_fraction" in other else "test")


def test_what_an_old_run_did_not_write_down_says_nothing_about_its_images(shown):
    make_run("a")
    make_run("b", record={"config": {n: v for n, v in CONFIG.items() if n != "sample"}})
    assert shown("a", "b")[4:] == ["setting  1      2", "sample   false  -"]


def test_other_training_images_are_a_difference_and_leave_accuracies_comparable(shown):
    make_run("a")
    make_run("b", data={"images": 1000})
    lines = shown("a", "b")
    assert lines[4:] == [
        "No setting differs.",
        "",
        "data             1       2",
        "training images  50,000  1,000",
    ]


def test_all_on_held_out_images_says_val(shown):
    make_run("a", val_fraction=0.1)
    make_run("b", val_fraction=0.1, lr=0.1)
    lines = shown("a", "b")
    assert lines[0].split()[0] == "val" and "comparable" not in "".join(lines)


# ---- what differs -------------------------------------------------------------------------------


def test_equal_runs_differ_in_nothing(shown):
    make_run("a")
    make_run("b", lr=0.050, epochs=2.0)
    assert shown("a", "b")[4:] == [
        "Nothing differs: the same settings, data, device, PyTorch and commit."
    ]


def test_the_environment_is_compared_too(shown):
    commit = "0123456789abcdef"
    make_run("a", environment={"git_commit": commit, "numpy": "1"})
    make_run("b", environment={"git_commit": f"{commit}+changes", "device": "H100", "numpy": "2"})
    assert shown("a", "b")[4:] == [
        "No setting differs.",
        "",
        "environment  1        2",
        "device       CPU      H100",
        "git_commit   0123456  0123456+changes",
    ]


def test_values_are_as_a_user_types_them(shown):
    values = {
        "flip": (True, False, "true", "false"),
        "warmup": (1.0, 0.00001, "1", "1e-05"),
        "trunk": ("", "pooled", '""', "pooled"),
        "image_size": (None, 64, "none", "64"),
        "input_size": ([32, 32], [64, 48], "32x32", "64x48"),
    }
    make_run("a", **{name: value[0] for name, value in values.items()})
    make_run("b", **{name: value[1] for name, value in values.items()})
    lines = shown("a", "b")
    for name, value in values.items():
        assert row_of(name, lines) == list(value[2:])


def test_settings_of_newer_runs_have_the_values_that_older_ones_used(shown):
    make_run("old")
    make_run("new", muon=0.3, zoom=0.0, margin=0.1)
    lines = shown("old", "new")
    assert row_of("muon", lines) == ["0", "0.3"]
    assert row_of("margin", lines) == ["-", "0.1"]
    assert not any(line.startswith("zoom") for line in lines)


def test_long_values_are_cut_where_they_stay_different():
    path = "/a/long/folder/that/nobody/wants/to/read/last.pt"
    assert cut_middle(path, 24) == "/a/long...o/read/last.pt"
    assert shortened(["none", path], 24) == ["none", "/a/long...o/read/last.pt"]
    other = path.replace("folder", "things")
    assert shortened([other, path], 24) == [
        "/a/long/t...ts/to/read/last.pt",
        "/a/long/f...ts/to/read/last.pt",
    ]
    assert shortened([path, path], 100) == [path, path]


def test_long_values_are_cut_only_as_far_as_the_columns_need(shown):
    for number, name in enumerate("abcd"):
        start = f"/home/somebody/runs/cifar100/the-run-{name}/last.pt"
        make_run(name, {"eval_top1": 60.0 - number}, init_from=start)
    make_run("e", {"eval_top1": 1.0})

    def starts(*names):
        return row_of("init_from", shown(*names))

    assert starts("a", "e") == ["/home/somebod...s/cifar100/the-run-a/last.pt", "none"]
    assert starts("a", "b") == [f"/home/som...00/the-run-{name}/last.pt" for name in "ab"]
    assert starts("a", "b", "c") == [f"/home/s...-run-{name}/last.pt" for name in "abc"]
    assert starts(*"abcd")[1] == "(1);"


def test_no_line_ends_within_a_value(shown):
    for number in range(9):
        device = f"CPU, {number + 1} threads, AMD EPYC"
        make_run(str(number), {"eval_top1": 60.0 - number}, environment={"device": device})
    lines = shown(*map(str, range(9)))
    values = lines[lines.index("environment  value (runs)") + 1 :]
    assert len(values) == 5 and max(map(len, values)) <= 100
    cells = "; ".join(line[13:].rstrip(";") for line in values).split("; ")
    assert cells == [f"CPU, {n} threads, AMD EPYC ({n})" for n in range(1, 10)]


def test_columns_that_do_not_fit_become_the_runs_of_each_value(shown):
    for number in range(12):
        rows = [{"eval_top1": 60.0 - number}]
        model = "vgg-att3-concat-pc" if number in (0, 1, 2, 5, 6, 9) else "vgg-gap"
        make_run(f"{number:02}", *rows, model=model, lr=0.1 * (number == 11), device="a b " * 5)
    lines = shown(*sorted(os.listdir()))
    assert lines[lines.index("") + 1 :] == [
        "setting  value (runs)",
        "model    vgg-att3-concat-pc (1-3, 6, 7, 10); vgg-gap (4, 5, 8, 9, 11, 12)",
        "lr       0 (1-11); 0.1 (12)",
    ]
    assert ranges([1, 2, 4, 5, 6, 9]) == "1, 2, 4-6, 9"


def test_all_reference_runs_fit_in_100_columns(shown):
    lines = shown(*sorted(REFERENCE.iterdir()))
    end = lines.index("")
    assert len(names_of(lines)) == 44
    assert [line[:7] for line in lines[1:end]] == sorted(line[:7] for line in lines[1:end])
    differing = lines[lines.index("setting           value (runs)") :]
    assert max(map(len, differing)) <= 100
    assert "28-30 differ in no setting but the seed: top-1 mean 55.94 %, sd 0.28 (3 runs)" in lines
    assert lines[end + 1].endswith("(dataset, classes, evaluated on).")


# ---- what is no run -----------------------------------------------------------------------------


def test_what_a_star_names_besides_runs_is_left_out(shown):
    for name in "ab":
        make_run(f"runs/{name}")
    make_run("runs/pass", record={"sanity": True})
    Path("runs/README.md").write_text("notes")
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text('{"architectures": []}')
    Path("runs/gone").symlink_to("nowhere")
    lines = shown(*sorted(Path("runs").iterdir()))
    assert names_of(lines) == ["a", "b"]
    assert lines[4] == "Left out: README.md, gone, other (no run); pass (sanity pass)"


def test_two_runs_are_needed(refused):
    make_run("runs/a")
    make_run("runs/pass", record={"sanity": True})
    Path("empty").mkdir()
    needs = "--compare needs two runs"
    assert refused("runs/a") == (2, f"{needs}: name another beside runs/a")
    assert refused("runs/a", "empty", "runs/pass") == (
        2,
        f"{needs}, and these do not count: empty (no run); pass (sanity pass)",
    )
    assert refused("runs") == (2, f"{needs}, and runs is none. Those in it: --compare runs/*")


def test_a_run_is_named_once(refused):
    for name in "ab":
        make_run(name)
    Path("link").symlink_to("a")
    assert refused("a", "b", "a") == (2, "--compare: a is named twice")
    assert refused("a", "a/last.pt")[1].startswith("--compare: there is no a/last.pt")
    assert refused("a/config.json", "link", "b") == (
        2,
        "--compare: link is named twice, first as a/config.json",
    )


def test_a_name_without_a_file_gets_the_nearest(refused):
    for name in ("first-run", "another"):
        make_run(f"runs/{name}")
    assert refused("runs/another", "runs/frist-run") == (
        2,
        "--compare: there is no runs/frist-run (did you mean runs/first-run?)",
    )
    for name in ("runs/xyz", "nowhere/first-run"):
        assert refused("runs/another", name) == (
            2,
            f"--compare: there is no {name}; name runs by their folders",
        )


def test_damaged_files_are_named(refused):
    for name in "ab":
        make_run(name)
    config = Path("b/config.json").read_text()
    Path("b/config.json").write_text(config[:100])
    status, message = refused("a", "b")
    assert status == 1 and message.startswith("b/config.json is damaged (")
    assert message.endswith("): leave this run out")
    Path("b/config.json").write_text(config)
    with open("b/metrics.csv", "a") as file:
        file.write("x\n\n")
    assert refused("a", "b") == (
        1,
        "b/metrics.csv, line 4: not a row of numbers: repair this line, or leave the run out",
    )


# ---- on the command line ------------------------------------------------------------------------


def test_the_command_compares_real_runs(cli, unhurt):
    shutil.copytree(unhurt, "changed")
    record = json.loads(Path("changed/config.json").read_text())
    record["config"]["dropout"] = 0.25
    write_config(Path("changed"), record)
    lines = Path("changed/metrics.csv").read_text().splitlines(keepends=True)
    Path("changed/metrics.csv").write_text("".join(lines[:2]))
    status, out, err = cli("--compare", unhurt / "last.pt", "changed")
    assert (status, err) == (0, "")
    first, second = (line.split() for line in out.split("\n")[1:3])
    by_name = {first[-1]: first, second[-1]: second}
    assert by_name["changed"][6] == "1/4" and by_name[str(unhurt)][6] == "4/4"
    cell = float(lines[1].split(",")[METRIC_FIELDS.index("eval_top1")])
    assert by_name["changed"][1] == f"{cell:.2f}"
    dropout = {"changed": "0.25", str(unhurt): "0.5"}
    assert row_of("dropout", out.split("\n")) == [dropout[first[-1]], dropout[second[-1]]]
    status, _, err = cli("--compare", unhurt, "changed", "--epochs", 3, "--sort", "name")
    assert status == 2 and "--sort goes with --evaluate" in err
    status, _, err = cli("--compare", unhurt, "changed", "--epochs", 3)
    assert status == 2 and err == "error: --compare only reads the runs: leave out --epochs\n"
    assert cli("--compare", "changed") == (
        2,
        "",
        "error: --compare needs two runs: name another beside changed\n",
    )
