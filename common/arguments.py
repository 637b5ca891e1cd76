"""What the command lines of all scripts share: types of options, and how a wrong word is told."""

from __future__ import annotations

import argparse
import itertools

from common.files import expand_user

MAX_DIGITS = 40  # characters; Python itself refuses some thousands


MAX_WORKERS = 256


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return (
            action.help if action.default in (None, [], False) else super()._get_help_string(action)
        )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options of a command line. A shell makes an empty word of a variable that is not set, and
    no option means anything by one. Exits with status 2 where argv is wrong."""
    for before, word in itertools.pairwise(["", *argv]):
        name, equals, value = word.partition("=")
        if not word.strip():
            parser.error(f"{before if before.startswith('--') else 'an argument'} is empty")
        if name.startswith("--") and equals and not value.strip():
            parser.error(f"{name} is empty")
    return parser.parse_args(argv)


def expanded_path(text: str) -> str:
    """A file or folder, ~ expanded: a shell leaves it as it is behind the = of --option=~/x."""
    try:
        expanded = str(expand_user(text))
        # what is expanded once more stays itself
        return f"./{expanded}" if expanded.startswith("~") else expanded
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def int_at_least(least: int, most: int = 2**31 - 1):
    def number(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise argparse.ArgumentTypeError(
                f"{text[:MAX_DIGITS]}... is not between {least} and {most}"
            )
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is {f'below {least}' if value < least else f'above {most}'}"
            )
        return value

    number.__name__ = "whole number"
    return number


def positive(most: float):
    def number(text: str) -> float:
        value = float(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is {f'above {most:g}' if value > most else 'not above 0'}"
            )
        return value

    number.__name__ = "number above 0"
    return number


def at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def auto_or_whole(text: str) -> int | str:
    return text if text == "auto" else int_at_least(1)(text)


def was_given(name: str, argv: list[str]) -> bool:
    words = (f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}")
    return any(word == w or word.startswith(w + "=") for word in argv for w in words)


# argparse puts these into its "invalid ... value".
at_least_0.__name__, fraction.__name__ = "number of 0 or more", "fraction"
auto_or_whole.__name__ = "auto or whole number"
