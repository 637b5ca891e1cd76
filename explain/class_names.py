"""Class names from a file of the user's."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from common.errors import UserError, printable

LARGEST = 16 * 2**20  # bytes of a file with class names


def read_class_names(path: str | Path, count: int) -> tuple[str, ...]:
    """The names of ``count`` classes from a UTF-8 file, in the order of the network's outputs.

    A name per line; or JSON, where the file ends in .json or begins as JSON does: a list of names,
    {"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1}, or {"0": ["n01440764", "tench"]} as published
    for ImageNet, whose names may repeat: these get their id in parentheses.

    Raises:
        UserError: the file cannot be read, a name is blank or there twice, a number is missing, or
            there are more or fewer than ``count``.
    """
    shown, text = printable(path), read_text(path)
    try:
        if Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
            names = checked_names(names_of_json(text), "class", 0)
        else:
            names = checked_names(lines_of(text), "line", 1)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from None
    if len(names) != count:
        raise UserError(
            f"{shown} has {len(names)} class name{'s' * (len(names) != 1)}, "
            f"and the network {count} class{'es' * (count != 1)}"
        )
    return names


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises UserError."""
    path, shown = Path(path), printable(path)
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise UserError(f"{shown} is too large for a list of class names")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"class names {shown}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"class names {shown}: this is a folder, not a file") from None
    except OSError as error:
        raise UserError(f"class names {shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8 text: save the class names as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """The lines without the blank ones at the end."""
    return re.split("\r\n|\r|\n", text.rstrip()) if text.strip() else []


def checked_names(names: list[str], unit: str, first: int) -> tuple[str, ...]:
    """The names, each on one line and without space around it. ``unit`` and ``first``: what is
    counted in the messages, and from which number on. Raises ValueError."""
    numbers = {}
    for number, name in enumerate((" ".join(name.split()) for name in names), start=first):
        if not name:
            raise ValueError(f"{unit} {number} is blank")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"{unit} {number} holds half of a character")
        if name in numbers:
            raise ValueError(
                f"{unit} {number} is {name}, as {unit} {numbers[name]}: "
                "each class needs a name of its own"
            )
        numbers[name] = number
    return tuple(numbers)


# ---- JSON ---------------------------------------------------------------------------------------


def names_of_json(text: str) -> list[str]:
    """The names of a list or of a table, in order. Raises ValueError."""
    try:
        content = json.loads(text, object_pairs_hook=list_of_pairs)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"this is no JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("this JSON is no list of class names") from None
    if isinstance(content, Table):
        return unique_by_id(in_order(content))
    if isinstance(content, list):
        return unique_by_id(content)
    raise ValueError('expected a JSON list of names, {"0": "cat"} or {"cat": 0}')


class Table(list):
    """The pairs of a JSON object, in which a key may stand twice."""


def list_of_pairs(pairs: list[tuple[str, object]]) -> Table:
    return Table(pairs)


def in_order(table: Table) -> list[object]:
    """The names of {"0": "cat"} or {"cat": 0} by number. Raises ValueError."""
    if table and all(type(value) is int for _, value in table):
        table = Table((value, name) for name, value in table)
    by_number = {}
    for key, name in table:
        if isinstance(key, str):
            if not key.isascii() or not key.isdigit() or len(key) > 9:
                raise ValueError(f'{short(key)} is no class number: expected {{"0": "cat"}}')
            key = int(key)
        if key in by_number:
            raise ValueError(f"class {key} is there twice: {short(by_number[key])}, {short(name)}")
        by_number[key] = name
    missing = [number for number in range(len(by_number)) if number not in by_number]
    if missing:
        raise ValueError(
            f"class {missing[0]} is missing: {len(by_number)} classes are numbered "
            f"0 to {len(by_number) - 1}"
        )
    return [by_number[number] for number in range(len(by_number))]


def unique_by_id(entries: list[object]) -> list[str]:
    """The names of "cat" or ["n01440764", "tench"]. Of the latter, those that are there twice get
    their id. Raises ValueError."""
    pairs = []
    for number, entry in enumerate(entries):
        pair = ["", entry] if isinstance(entry, str) else entry
        is_pair = isinstance(pair, list) and not isinstance(pair, Table) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"class {number} is {short(entry)}: expected a name")
        pairs.append(pair)
    counts = Counter(name for _, name in pairs)
    return [
        f"{name} ({identity})" if identity and counts[name] > 1 else name
        for identity, name in pairs
    ]


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
