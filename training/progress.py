"""The progress of a run, on the screen and in log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from training.ranks import ranks_from_environment
from training.trainer import Trainer


class Progress:
    """The progress of the current epoch: a bar in a terminal or a notebook, a line per minute in a
    log file."""

    def __init__(self, trainer: Trainer, epochs: int):
        self.title = f"epoch {trainer.position.epoch + 1}/{epochs}"
        self.steps, self.start = len(trainer.batches), trainer.position.step
        self.batch_size = trainer.batches.images_per_step
        self.printed_at = self.began = time.monotonic()
        self.checks = [(self.began, self.start)]  # (time, steps) at each check
        interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.live = interactive and ranks_from_environment().is_main
        self.bar = tqdm(
            total=self.steps * self.batch_size,
            initial=self.start * self.batch_size,
            desc=self.title,
            unit=" images",
            leave=False,
            disable=not self.live,
            unit_scale=True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def at(self, step: int, loss: float) -> None:
        """After ``step`` steps of the epoch, whose mean loss so far is ``loss``."""
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(step * self.batch_size - self.bar.n)
        now = time.monotonic()
        self.checks.append((now, step))
        if not self.live and now - self.printed_at >= 60:
            self.printed_at = now
            steps_per_second = (step - self.start) / (now - self.began)
            images_per_second = steps_per_second * self.batch_size
            left = format_duration((self.steps - step) / steps_per_second)
            print(
                f"{self.title}  step {step}/{self.steps}  loss {loss:.3f}  "
                f"{images_per_second:.0f} images/s  {left} left in this epoch",
                flush=True,
            )

    def seconds_per_step(self) -> float:
        """In the later half of the steps: the first ones may have waited for a compiler."""
        end, last = self.checks[-1]
        began, first = next(
            c for c in reversed(self.checks[:-1]) if c[1] <= (self.start + last) / 2
        )
        return (end - began) / (last - first)


def epoch_line(
    row: Mapping[str, float],
    epochs: int,
    eval_name: str,
    trained_at: Sequence[tuple[int, int]],
    full_size: tuple[int, int],
    *,
    averaged: bool,
) -> str:
    """The line that is printed after an epoch.

    Args:
        row: its line of metrics.csv.
        trained_at: (height, width) of the images in its first and last step.
        full_size: (height, width) of the evaluation.
        averaged: whether the moving average was evaluated."""
    trained = " to ".join(dict.fromkeys(map(in_pixels, trained_at)))
    average = ", moving average" if averaged else ""
    lags = " (lags while training images are smaller)" if trained_at[1] != full_size else ""
    return (
        f"epoch {row['epoch']}/{epochs}  "
        f"train ({trained}) loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2f} %  "
        f"{eval_name} ({in_pixels(full_size)}{average}) loss {row['eval_loss']:.4f}, "
        f"top-1 {row['eval_top1']:.2f} %, top-5 {row['eval_top5']:.2f} %{lags}  "
        f"{row['images_per_second']:.0f} images/s, {row['seconds']:.1f} s"
    )


def in_pixels(size: tuple[int, int]) -> str:
    """(height, width) as text: 32 px, 24x36 px."""
    height, width = size
    return f"{height} px" if height == width else f"{height}x{width} px"


def format_duration(seconds: float) -> str:
    """Seconds as text: 42 s, 3 min 10 s, 5 h 02 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
