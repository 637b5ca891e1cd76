"""State dicts in files of other programs: where they are in the file, and under which prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import REQUIRED, is_state_dict, read_plain
from common.errors import UserError, printable
from common.file_kinds import damage_of, kind_of

# The words of a key or prefix that mean a moving average, and those that mean the network.
AVERAGED = {"ema", "swa", "avg", "averaged"}
USUAL = set("model module net network state dict weights checkpoint orig mod".split())
DEPTH = 2  # {"checkpoint": {"model": ...}}


@dataclass
class Found:
    """A state dict in a file, with the names that the network has."""

    key: str  # in the file: "ema", "checkpoint.model"; empty if the file is the state dict
    prefix: str  # that the names have in the file: "module."
    state: dict[str, Tensor]
    left_out: int  # entries beside, without the prefix
    fitting: int  # of the network's names, how many it has
    incomplete: str = ""  # where a moving average is that has fewer of them

    @property
    def words(self) -> set[str]:
        return set(re.findall("[a-z]+", f"{self.key}.{self.prefix}".lower()))

    @property
    def is_average(self) -> bool:
        return bool(self.words & AVERAGED)

    @property
    def is_usual(self) -> bool:
        return self.words <= USUAL

    @property
    def origin(self) -> list[str]:
        """What was taken, in words, where it is not the file as it is."""
        said = [f"from '{self.key}'"] if self.key else []
        if self.incomplete:
            said.append(f"as {self.incomplete} is incomplete")
        if self.prefix:
            said.append(f"without the prefix {self.prefix}")
        return said

    @property
    def place(self) -> str:
        """Where it is in the file, in words."""
        parts = [f"'{self.key}'"] if self.key else []
        return " ".join(parts + [f"under {self.prefix}"] * bool(self.prefix))


# ---- read ---------------------------------------------------------------------------------------


def read_state_dicts(path: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file, by their keys: {"model": ..., "ema": ...}, or {"": ...} if the
    file is one. Its code never runs. Raises UserError, and OSError as ``read_plain`` does."""
    shown = printable(path)
    if Path(path).is_dir():
        raise UserError(f"{shown} is a folder: name the file with the weights in it")
    kind = kind_of(path)
    if kind:
        raise UserError(f"{shown} is {kind.name}: {kind.remedy}")
    damage = damage_of(path)
    if damage:
        raise UserError(f"{shown} could not be read: {damage}")
    content = read_plain(
        path,
        otherwise=". Where it was made, save the numbers alone: "
        "torch.save(model.state_dict(), NEW)",
    )
    if isinstance(content, dict) and all(name in content for name in REQUIRED):
        raise UserError(f"{shown} is a checkpoint of this project: give it as the checkpoint", 2)
    found = state_dicts_in(content)
    if not found:
        raise UserError(f"{shown} holds no state dict: save model.state_dict()")
    return found


def state_dicts_in(content: object, key: str = "", depth: int = DEPTH) -> dict[str, dict]:
    """The state dicts in a value and in the dicts in it, by their keys."""
    if not isinstance(content, dict) or not content:
        return {}
    if all(map(is_plain, content.values())) and is_state_dict(content):
        return {key: content}
    found = {}
    for name, value in content.items():
        if depth and isinstance(name, str):
            found |= state_dicts_in(value, f"{key}.{name}".lstrip("."), depth - 1)
    return found


def is_plain(value: object) -> bool:
    """Whether this is a tensor of plain numbers, neither sparse nor quantized."""
    return torch.is_tensor(value) and value.layout == torch.strided and not value.is_quantized


# ---- choose -------------------------------------------------------------------------------------


def chosen(path: str, states: dict[str, dict[str, Tensor]], names: Collection[str]) -> Found:
    """The state dict, and the prefix in it, with the most of a network's names: a moving average
    rather than the weights that it is of. Raises UserError if there are several."""
    all_found = [each for key, state in states.items() for each in by_prefix(key, state, names)]
    most = max(each.fitting for each in all_found)
    best = [each for each in all_found if each.fitting == most]
    averages = [each for each in best if each.is_average]
    usual = [each for each in best if each.is_usual]
    group = averages or usual or best
    if 2 * most < len(names):  # another network's: whatever prefix was found is none
        return Found(group[0].key, "", states[group[0].key], 0, most)
    if len(group) > 1:
        places = ", ".join(each.place for each in group)
        raise UserError(
            f"{printable(path)} holds the network several times: {places}. Save one of them"
        )
    partial = [each.place for each in all_found if each.is_average and 0 < each.fitting < most]
    if partial and not averages:
        return replace(group[0], incomplete=partial[0])
    return group[0]


def by_prefix(key: str, state: dict[str, Tensor], names: Collection[str]) -> Iterator[Found]:
    """A state dict under each prefix that the first of a network's names has in it, or under
    none."""
    first = next(iter(names))
    ends = [name.removesuffix(first) for name in state if f".{name}".endswith(f".{first}")]
    for prefix in ends or [""]:
        inside = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        fitting = sum(name in inside for name in names)
        yield Found(key, prefix, inside, len(state) - len(inside), fitting)
