"""Types of command-line options, and their errors, for all scripts."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

from common.files import expand_user

MAX_DIGITS = 40  # characters; Python itself refuses several thousand
MAX_WORKERS = 256  # processes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Hides None, False and empty defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line. Exits with status 2 if it is wrong.

    Empty words are errors: a shell makes one of an unset variable, and no option takes one.
    """
    for before, word in itertools.pairwise(["", *argv]):
        name, equals, value = word.partition("=")
        if not word.strip():
            parser.error(f"{before if before.startswith('--') else 'an argument'} is empty")
        if name.startswith("--") and equals and not value.strip():
            parser.error(f"{name} is empty")
    return parser.parse_args(argv)


def was_given(name: str, argv: list[str]) -> bool:
    """Whether the option of this dest, or its --no- form, is on the command line."""
    dashed = name.replace("_", "-")
    options = (f"--{dashed}", f"--no-{dashed}")
    words = {word.partition("=")[0] for word in argv}
    return any(option in words for option in options)


# ---- types of options ---------------------------------------------------------------------------


def expanded_path(text: str) -> str:
    """A file or folder with ~ expanded, which a shell does not do in --option=~/x."""
    try:
        expanded = str(expand_user(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    # a second expansion must not change the result
    return f"./{expanded}" if expanded.startswith("~") else expanded


def int_at_least(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an integer option from ``least`` to ``most``."""

    def number(text: str) -> int:
        if len(text) > MAX_DIGITS:
            shortened = f"{text[:MAX_DIGITS]}..."
            raise argparse.ArgumentTypeError(f"{shortened} is not between {least} and {most}")
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return value

    number.__name__ = "whole number"
    return number


def positive(most: float) -> Callable[[str], float]:
    """The type of a float option above 0, up to ``most``."""

    def number(text: str) -> float:
        value = float(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most:g}")
        if not value > 0:  # NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
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


# argparse shows these names in "invalid ... value"
at_least_0.__name__ = "number of 0 or more"
fraction.__name__ = "fraction"
auto_or_whole.__name__ = "auto or whole number"
