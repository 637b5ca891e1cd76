"""What a training script defines: its recipes and its data set."""

from __future__ import annotations

from dataclasses import dataclass

from data import DataSource


@dataclass(frozen=True)
class Task:
    """The recipes of a script, each a dict of all defaults, and the source of its images."""

    description: str
    recipes: dict[str, dict]  # the first is the default
    short: dict[str, dict]  # a recipe's changes for runs under options.SHORT_RUN epochs
    sample: dict[str, dict]  # a recipe's changes for a run on the built-in sample: its size
    model: str  # the default network
    data: DataSource

    @property
    def dataset(self) -> str:
        """The name of the data set ("cifar100")."""
        return self.data.name

    @property
    def runs(self) -> str:
        """The folder of all runs, in words."""
        return "runs/<name of the folder>" if self.data.is_own else f"runs/{self.dataset}"
