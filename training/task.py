"""What a training script brings: its recipes and its data set."""

from __future__ import annotations

from dataclasses import dataclass

from data import DataSource


@dataclass(frozen=True)
class Task:
    """The recipes of a script, each a dict of every default, and where its images come from."""

    description: str
    recipes: dict[str, dict]  # the first is the default
    short: dict[str, dict]  # what a recipe changes for runs under options.SHORT_RUN epochs
    model: str  # default network
    data: DataSource

    @property
    def dataset(self) -> str:
        """ "cifar100": names the folder of the runs."""
        return self.data.name
