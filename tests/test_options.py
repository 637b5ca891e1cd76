"""The command lines of the scripts: --help, and errors of two lines with the nearest name."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cam
import train_cifar10
import train_cifar100
import train_cub
import train_folder
from common.arguments import parse
from common.errors import UserError
from tests.helpers.environment import ROOT
from tests.helpers.runs import config_of
from training import commands, options, recipe_help
from training.config_checks import check_recipe

TASKS = {
    "train_cifar100.py": train_cifar100.TASK,
    "train_cifar10.py": train_cifar10.TASK,
    "train_cub.py": train_cub.TASK,
    "train_folder.py": train_folder.TASK,
}
SCRIPTS = (*TASKS, "cam.py")


def parser_of(script):
    if script == "cam.py":
        return cam.make_parser()
    return options.make_parser(TASKS[script])


@pytest.fixture
def help_of(monkeypatch):
    """help_of("cam.py", columns=80) -> the text of --help."""

    def call(script, columns=100):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}"])
        monkeypatch.setenv("COLUMNS", str(columns))
        return parser_of(script).format_help()

    return call


@pytest.fixture
def error_of(monkeypatch, capsys, tmp_path):
    """error_of("cam.py", "--epoch 3") -> the first line of the error, without the script's name."""
    monkeypatch.chdir(tmp_path)

    def call(script, words):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}"])
        argv = shlex.split(words)
        status = cam.main(argv) if script == "cam.py" else commands.main(TASKS[script], argv)
        out, err = capsys.readouterr()
        first, second = err.splitlines()
        assert status == 2 and not out
        assert first.startswith(f"{script}: error: ")
        assert second == f"{script} --help lists all options."
        return first.removeprefix(f"{script}: error: ")

    return call


def flat(text):
    return " ".join(text.split())


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, expected",
    [
        (
            "train_cifar100.py",
            [
                "--image-size IMAGE_SIZE side to which images are resized, in pixels "
                "(default: that of the images)",
                "--epochs EPOCHS epochs to train (fast: 30, paper: 300)",
                "images per optimizer step (default: 128)",
                "peak learning rate, at full width, of all weights but the 3x3 filters that Muon "
                "moves; see muon and lr_by_width below (fast: 0.05, paper: 0.1)",
                "or a last.pt (default: none)",
                "at most a quarter of the run (default: 0)",
            ],
        ),
        (
            "train_cub.py",
            [
                "resized, in pixels (fast: 224, paper: 80)",
                "epochs to train (fast: 60, paper: 320)",
                "images per optimizer step (fast: 32, paper: 128)",
                "below (fast: 0.02, paper: 0.01)",
                "or a last.pt (fast: imagenet, paper: must be given)",
                "at most a quarter of the run (fast: 2, paper: 0)",
            ],
        ),
    ],
)
def test_help_has_the_values_of_the_recipes(help_of, script, expected):
    for columns in (80, 100):
        text = flat(help_of(script, columns))
        assert all(words in text for words in expected), text
        assert "the recipe's" not in text


def test_every_constant_has_a_meaning():
    """And no meaning is left over."""
    names = [name for task in TASKS.values() for name in options.constants_of(task.recipes)]
    assert set(names) == set(recipe_help.CONSTANTS)
    for task in TASKS.values():
        first, *others = task.recipes.values()
        assert all(recipe.keys() == first.keys() for recipe in others)


def test_the_table_of_constants_has_the_values_of_both_recipes(help_of):
    def table(script, columns):
        text = help_of(script, columns)
        return text[text.index("constants of the recipe (--set NAME=VALUE):") :]

    wide = table("train_cifar100.py", 100)
    assert "\n  NAME              FAST    PAPER   MEANING\n" in wide
    assert "\n  muon              0.3     0       rate of Muon for the 3x3 filters" in wide
    assert "\n  trivial_augment   true    false   change each image" in wide
    assert '\n  trunk             ""      ""      full, or pooled' in wide
    assert "\n  weight_decay      0.0005  0.0005  of SGD" in wide
    # a long value moves the next one to a new line
    assert f"\n  progressive       0.5:0.3 0.75:0.5\n{' ' * 28}none    small images first" in wide
    assert "double-halve\n" + " " * 36 + "linear" in table("train_cub.py", 100)
    for script, task in TASKS.items():
        for columns in (80, 100):
            text = table(script, columns)
            assert max(map(len, text.splitlines())) <= columns
            for name in options.constants_of(task.recipes):
                assert f"\n  {name} " in text and recipe_help.CONSTANTS[name] in flat(text)
    help_of("train_cub.py", columns=10)


def test_help_has_the_changes_for_short_runs(help_of):
    note = "fast in runs of fewer than 10 epochs: muon 0.6, trivial_augment false, progressive 0.5"
    assert note in flat(help_of("train_cifar100.py"))
    assert "fewer than 10 epochs" not in help_of("train_cub.py")


def examples_in(text, script):
    """The command lines at the end of a help text, without the script's name."""
    end = text[text.index("\nexamples") :]
    assert max(map(len, end.splitlines())) <= 80
    commands = re.findall(rf"^  python {re.escape(script)} (.*)$", end, re.MULTILINE)
    assert len(commands) == end.count("python ") == 4
    return [shlex.split(words) for words in commands]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_in_the_help_parse(help_of, script):
    parsed = [parse(parser_of(script), argv) for argv in examples_in(help_of(script, 80), script)]
    if script == "cam.py":
        assert [cam.misuse(args) for args in parsed] == [None] * 4
        assert [bool(args.images) for args in parsed] == [True, False, False, True]
        assert [args.measure for args in parsed] == [False, False, True, False]
        return
    sanity, new, resume, evaluate = parsed
    assert sanity.sanity and resume.resume is options.NEWEST
    assert evaluate.evaluate.endswith("RUN/last.pt")
    assert new.epochs and new.set


@pytest.mark.parametrize("script", TASKS)
def test_the_example_of_a_new_run_can_be_run(help_of, script):
    words = examples_in(help_of(script), script)[1]
    config = config_of(TASKS[script], *words, "--device", "cpu")
    check_recipe(config)
    assert config["epochs"] == 90 and config["dropout"] == 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_as_they_are_started(script):
    """With the name by which they are started, and with the exit status."""
    start, environment = [sys.executable, str(Path(ROOT, script))], {"COLUMNS": "100", "PATH": ""}
    done = subprocess.run([*start, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr
    assert f"\n  python {script} " in done.stdout


@pytest.mark.parametrize("script", ["train_cub.py", "cam.py"])
def test_a_wrong_option_of_a_started_script(script):
    start = [sys.executable, str(Path(ROOT, script))]
    done = subprocess.run([*start, "--devise", "cpu"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        f"{script}: error: unrecognized option --devise (did you mean --device?)",
        f"{script} --help lists all options.",
    ]


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [name for name in TASKS if name != "train_folder.py"])
@pytest.mark.parametrize(
    "words, error",
    [
        ("--recipe fats", "--recipe: invalid choice 'fats' (did you mean fast?)"),
        ("--recipe quick", "--recipe: invalid choice 'quick' (choose fast, paper)"),
    ],
)
def test_errors_of_the_names_of_recipes(error_of, script, words, error):
    assert error_of(script, words) == error


@pytest.mark.parametrize("script", TASKS)
@pytest.mark.parametrize(
    "words, error",
    [
        ("--epoch 3", "unrecognized option --epoch (did you mean --epochs?)"),
        ("-epochs 3", "unrecognized option -epochs (did you mean --epochs?)"),
        ("--batch_size=64", "unrecognized option --batch_size (did you mean --batch-size?)"),
        ("--eval last.pt", "unrecognized option --eval (did you mean --evaluate?)"),
        ("--momentum 0.8", "unrecognized option --momentum (did you mean --set momentum=VALUE?)"),
        ("--learning-rate 1", "unrecognized option --learning-rate (did you mean --lr?)"),
        ("runs/x/last.pt", "unexpected argument runs/x/last.pt (a value needs its option)"),
        (
            "--model vgg-att3-concat",
            "--model: invalid choice 'vgg-att3-concat' (did you mean vgg-att3-concat-pc?)",
        ),
        ("--model resnet", "--model: invalid choice 'resnet' (--help lists the 23 names)"),
        ("--precision bf61", "--precision: invalid choice 'bf61' (did you mean bf16?)"),
        ("--sanity --resume", "--resume: not allowed with --sanity"),
        ("--epochs", "--epochs: expected one argument"),
        ("--epochs 0", "--epochs: 0 is below 1"),
        ("--json b.json", "--json goes with --benchmark"),
    ],
)
def test_errors_of_the_training_scripts(error_of, script, words, error):
    assert error_of(script, words) == error


@pytest.mark.parametrize(
    "words, error",
    [
        ("--method grad-cam", "--method: invalid choice 'grad-cam' (did you mean gradcam?)"),
        ("--method lime", "--method: invalid choice 'lime' (--help lists the 7 names)"),
        ("--dataset cifar", "--dataset: invalid choice 'cifar' (did you mean cifar10?)"),
        ("--split tests", "--split: invalid choice 'tests' (did you mean test?)"),
        ("--crop Box", "--crop: invalid choice 'Box' (did you mean box?)"),
        ("--color inferno", "unrecognized option --color (did you mean --colors?)"),
        ("a.jpg --topk 3", "unrecognized option --topk (did you mean --top-k?)"),
        ("--target 3 --top-k 3", "--top-k: not allowed with --target"),
        ("a.jpg --raw b.jpg", "unexpected argument b.jpg (list every IMAGE in one place)"),
    ],
)
def test_errors_of_cam(error_of, words, error):
    assert error_of("cam.py", words) == error


@pytest.mark.parametrize(
    "script, other, hints",
    [
        (
            "train_cifar100.py",
            "cam.py",
            {"--checkpoint": " (did you mean --evaluate, --resume or --init-from?)"},
        ),
        (
            "train_cub.py",
            "cam.py",
            {
                "--checkpoint": " (did you mean --evaluate, --resume or --init-from?)",
                "--crop": " (did you mean --set crop=VALUE?)",
            },
        ),
        ("cam.py", "train_cifar100.py", {}),
    ],
)
def test_an_option_of_another_script_gets_no_false_hint(error_of, script, other, hints):
    def options_of(name):
        return set(re.findall(r"(?<![\w-])--[a-z-]+", parser_of(name).format_usage()))

    foreign = options_of(other) - options_of(script)
    assert hints.keys() <= foreign and len(foreign) > 15
    for option in foreign:
        expected = f"unrecognized option {option}{hints.get(option, '')}"
        assert error_of(script, f"{option}=1") == expected


@pytest.mark.parametrize(
    "pair, error",
    [
        ("lr_bywidth=1", "no constant is called lr_bywidth (did you mean lr_by_width?)"),
        ("lr-by=1", "no constant is called lr-by (did you mean lr_by_width?)"),
        ("width=0.5", "no constant is called width (did you mean --width?)"),
        ("epohcs=3", "no constant is called epohcs (did you mean --epochs?)"),
        ("nothing=1", "no constant is called nothing"),
        ("muon", "expected NAME=VALUE"),
    ],
)
def test_a_wrong_name_in_set_gets_the_nearest(pair, error):
    for task in TASKS.values():
        with pytest.raises(UserError) as caught:
            config_of(task, "--set", pair)
        assert caught.value.status == 2
        assert str(caught.value) == f"--set {pair}: {error}\n--help lists all names."
    with pytest.raises(UserError, match="--set image-size=64: use --image-size 64 for this one"):
        config_of(train_cifar100.TASK, "--set", "image-size=64")


def test_hints_know_every_option_of_the_config():
    for task in TASKS.values():
        constants = options.constants_of(task.recipes)
        recipe = next(iter(task.recipes.values()))
        hinted = {*options.WITH_OPTION, *(name for name in recipe if name not in constants)}
        assert config_of(task).keys() - {*constants} - {"dataset"} == hinted
    own = train_folder.TASK, "--set", "skip-unreadble=true"
    with pytest.raises(UserError, match="did you mean --skip-unreadable"):
        config_of(*own)
