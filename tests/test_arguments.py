"""The parser of the scripts' command lines: its help and its errors."""

import sys

import pytest

from common.arguments import ArgumentParser, int_at_least, nearest, one_of, parse, split_unknown


@pytest.fixture
def error_of(monkeypatch, capsys):
    """error_of("--epoch", "3") -> the error of a small parser, without the program's name and the
    line that every error ends with."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    parser = ArgumentParser(instead={"weight_decay": "--set weight_decay=VALUE"})
    parser.add_argument("--epochs", type=int_at_least(1))
    parser.add_argument("--batch-size", type=int_at_least(1))
    colors = ("red", "green", "blue")
    parser.add_argument("--color", **one_of(colors))
    layers = tuple(f"layer-{number}" for number in range(10))
    parser.add_argument("--layer", **one_of(layers))
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--sanity", action="store_true")
    modes.add_argument("--resume", nargs="?", const=True)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            parse(parser, list(words))
        out, err = capsys.readouterr()
        first, second = err.splitlines()
        assert stop.value.code == 2 and not out
        assert second == "train.py --help lists all options."
        assert first.startswith("train.py: error: ")
        return first.removeprefix("train.py: error: ")

    return call


@pytest.mark.parametrize(
    "words, error",
    [
        (["--epoch", "3"], "unrecognized option --epoch (did you mean --epochs?)"),
        (["--epoch=3"], "unrecognized option --epoch (did you mean --epochs?)"),
        (["-epochs", "3"], "unrecognized option -epochs (did you mean --epochs?)"),
        (["--EPOCHS", "3"], "unrecognized option --EPOCHS (did you mean --epochs?)"),
        (["--epochs 3"], "unrecognized option --epochs 3 (did you mean --epochs?)"),
        (["--batchsize", "3"], "unrecognized option --batchsize (did you mean --batch-size?)"),
        (["--batch_size", "3"], "unrecognized option --batch_size (did you mean --batch-size?)"),
        (["--batch", "3"], "unrecognized option --batch (did you mean --batch-size?)"),
        (
            ["--weight-decay", "0.1"],
            "unrecognized option --weight-decay (did you mean --set weight_decay=VALUE?)",
        ),
        (["--wait"], "unrecognized option --wait"),
        (["--wait=\nno"], "unrecognized option --wait"),
        (["--wa\nit"], r"unrecognized option --wa\nit"),
        (["---"], "unrecognized option ---"),
        (["-"], "unexpected argument - (a value needs its option)"),
        (["-3"], "unexpected argument -3 (a value needs its option)"),
        (["last.pt"], "unexpected argument last.pt (a value needs its option)"),
        (["--epochs", "3", "4"], "unexpected argument 4 (a value needs its option)"),
        (
            ["--epoch", "3", "--wait", "-1", "--colour=red", "last.pt"],
            "unrecognized option --epoch (did you mean --epochs?), unrecognized option --wait, "
            "unrecognized option --colour (did you mean --color?), "
            "unexpected argument last.pt (a value needs its option)",
        ),
        (["--color", "Rde"], "--color: invalid choice 'Rde' (choose red, green, blue)"),
        (["--color", "gren"], "--color: invalid choice 'gren' (did you mean green?)"),
        (["--color", "BLUE"], "--color: invalid choice 'BLUE' (did you mean blue?)"),
        (["--layer", "layer_3"], "--layer: invalid choice 'layer_3' (did you mean layer-3?)"),
        (["--layer", "conv"], "--layer: invalid choice 'conv' (--help lists the 10 names)"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--epochs", "0"], "--epochs: 0 is below 1"),
        (["--epochs", "many"], "--epochs: invalid whole number value: 'many'"),
        (["--epochs", ""], "--epochs is empty"),
        (["--epochs= "], "--epochs is empty"),
        ([""], "an argument is empty"),
        (["--sanity", "--resume"], "--resume: not allowed with --sanity"),
        (["--sanity=1"], "--sanity: ignored explicit argument '1'"),
    ],
)
def test_an_error_is_two_lines_with_the_nearest_name(error_of, words, error):
    assert error_of(*words) == error


def test_an_image_in_a_second_place_is_named(capsys):
    parser = ArgumentParser(prog="cam.py")
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--top-k")
    with pytest.raises(SystemExit):
        parse(parser, ["a.jpg", "--top-k", "2", "b.jpg"])
    assert capsys.readouterr().err.splitlines() == [
        "cam.py: error: unexpected argument b.jpg (list every IMAGE in one place)",
        "cam.py --help lists all options.",
    ]


def test_the_value_of_an_unknown_option_is_not_an_error_of_its_own():
    words = ["--a", "1", "2", "--b=3", "4", "--c", "--d", "-.5", "--", "x"]
    assert split_unknown(words) == (["--a", "--b", "--c", "--d"], ["2", "4", "x"])


def test_nearest_takes_the_beginning_of_one_name_and_a_misspelling():
    names = ("--micro-batch", "--batch-size", "--benchmark", "--evaluate", "--epochs", "--lr")
    for word, name in {
        "--eval": "--evaluate",
        "--bench": "--benchmark",
        "--epocs": "--epochs",
        "--eopchs": "--epochs",
        "--Micro_Batch": "--micro-batch",
        "--b": None,  # begins two
        "--l": None,  # begins one, but too short to tell
        "--lrs": "--lr",
        "--checkpoint": None,
        "--": None,
    }.items():
        assert nearest(word, names) == name, word


def test_help_keeps_names_whole_and_the_lines_of_the_epilog(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    parser = ArgumentParser(epilog="examples:\n  train --one\n      this")
    names = [f"vgg-att3-concat-{end}" for end in ("pc", "dp", "gate")]
    parser.add_argument("--model", default="vgg", metavar="NAME", help=", ".join(names))
    text = parser.format_help()
    assert all(name in text for name in names) and "(default: vgg)" in text
    assert text.endswith("examples:\n  train --one\n      this\n")
