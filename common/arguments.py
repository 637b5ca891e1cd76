"""The command-line parser of all scripts: its help, its errors, and the types of options."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from common.errors import printable
from common.files import expand_user

MAX_DIGITS = 40  # characters; Python itself refuses several thousand
MAX_WORKERS = 256  # processes
MAX_LISTED = 6  # choices that an error lists
# similarity (difflib's, 0 to 1) from which a name is suggested; at the usual 0.6, cam.py's
# --checkpoint would suggest --checkpoint-activations
SIMILAR = 0.75
MIN_PREFIX = 3  # characters from which the beginning of one name only suggests it


# ---- parser -------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Hides None, False and empty defaults. Keeps the lines of descriptions and of the epilog."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # no line ends within a name such as vgg-att3-concat-pc
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are two lines: what is wrong, with the nearest name, and how to list
    the options. Options are not abbreviated.

    ``instead``: what to type for the names of options that this parser does not have.
    """

    def __init__(self, *, instead: Mapping[str, str] | None = None, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.instead = {bare(name): text for name, text in (instead or {}).items()}

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.describe_unknown(unknown))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        # argparse's "argument --resume: not allowed with argument --sanity"
        message = message.removeprefix("argument ")
        message = message.replace("not allowed with argument ", "not allowed with ")
        self.exit(
            2,
            f"{self.prog}: error: {printable(message)}\n{self.prog} --help lists all options.\n",
        )

    def describe_unknown(self, words: list[str]) -> str:
        """What is wrong with the words that the parser has no use for."""
        # argparse has no public list of a parser's options
        known = [name for action in self._actions for name in action.option_strings]
        options, others = split_unknown(words)
        errors = []
        for option in options:
            meant = self.instead.get(bare(option)) or nearest(option, known)
            errors.append(f"unrecognized option {option}{did_you_mean(meant)}")
        positional = [action.metavar for action in self._actions if not action.option_strings]
        reason = "a value needs its option"
        if positional:  # argparse takes those of one place only
            reason = f"list every {positional[0]} in one place"
        errors += [f"unexpected argument {word} ({reason})" for word in others]
        return ", ".join(errors)


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
    option = as_option(name)
    options = (option, f"--no-{option[2:]}")
    words = {word.partition("=")[0] for word in argv}
    return any(option in words for option in options)


def as_option(name: str) -> str:
    """ "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def split_unknown(words: list[str]) -> tuple[list[str], list[str]]:
    """Words that a parser has no use for: (names of options, other words). A word after an option
    is its value, and in neither list."""
    options, others = [], []
    value_follows = False
    for word in words:
        name, equals, _ = word.partition("=")
        if is_option(word):
            options.append(name)
        elif not value_follows and word != "--":
            others.append(word)
        value_follows = is_option(word) and not equals
    return options, others


def is_option(word: str) -> bool:
    with contextlib.suppress(ValueError):
        float(word)  # a negative number
        return False
    return word.startswith("-") and word not in ("-", "--")


# ---- nearest names ------------------------------------------------------------------------------


def bare(name: str) -> str:
    """A name without what is often mistyped: dashes, underscores and case."""
    return name.replace("-", "").replace("_", "").casefold()


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The only name that begins with ``word``, or else the one spelled most alike; None if none is
    near."""
    by_bare = {bare(name): name for name in names}
    begun = [key for key in by_bare if key.startswith(bare(word))]
    if len(begun) == 1 and len(bare(word)) >= MIN_PREFIX:
        return by_bare[begun[0]]
    close = difflib.get_close_matches(bare(word), by_bare, n=1, cutoff=SIMILAR)
    return by_bare[close[0]] if close else None


def did_you_mean(name: str | None) -> str:
    """The end of an error message; nothing without a name."""
    return f" (did you mean {name}?)" if name else ""


# ---- types of options ---------------------------------------------------------------------------


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """add_argument's keywords for an option that takes one of ``names``: unlike that of ``choices``
    alone, its error has the nearest one."""
    names = tuple(names)

    def name(text: str) -> str:
        if text in names:
            return text
        hint = did_you_mean(nearest(text, names))
        if not hint and len(names) <= MAX_LISTED:
            hint = f" (choose {', '.join(names)})"
        elif not hint:
            hint = f" (--help lists the {len(names)} names)"
        raise argparse.ArgumentTypeError(f"invalid choice {text!r}{hint}")

    return {"choices": names, "type": name}


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
