"""What the tests of whole runs have in common: a small one's options, and how one is stopped, how
two are compared."""

import dataclasses
import io
import os
import signal
from pathlib import Path

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoint import read_checkpoint
from common.files import TEMPORARY
from training import options
from training.report import read_metrics
from training.trainer import Trainer

DRAWN = "--sample --width 0.0625 --batch-size 16 --device cpu --precision fp32".split()
# tensorboard takes a picture's checksum in Python: it would be half of a test's time
NARROW = [*DRAWN, "--overlay-every", "0"]
MEASURED = ("images_per_second", "seconds", "peak_memory_mib")  # differ from run to run
MEASURED_TAGS = ("run/images per second", "run/seconds", "run/peak memory, MiB")


def config_of(task, *words) -> dict:
    """What a script makes of its command line."""
    return options.resolve(options.make_parser(task).parse_args(list(map(str, words))), task)


def signal_after(patch, count: int, number: int = signal.SIGTERM) -> list:
    """This process sends itself the signal when its runs have made so many steps. Returns a list of
    all steps made since."""
    step, steps = Trainer.step, []

    def signalled(self, *batch):
        step(self, *batch)
        steps.append(1)
        if len(steps) == count:
            os.kill(os.getpid(), number)

    patch.setattr(Trainer, "step", signalled)
    return steps


def content_of(run_dir) -> dict:
    return read_checkpoint(Path(run_dir) / "last.pt")


def assert_equal(a, b, where=""):
    """Deep equality, bit for bit, of what a checkpoint holds."""
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), (where, a, b)


def scalars_of(run_dir) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run by tag, those of its training by "train/" and the tag."""
    curves = {}
    for prefix, folder in (("", Path(run_dir)), ("train/", Path(run_dir, "train"))):
        if folder.is_dir():
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            curves |= {
                f"{prefix}{tag}": [(e.step, e.value) for e in events.Scalars(tag)]
                for tag in events.Tags()["scalars"]
                if tag not in MEASURED_TAGS
            }
    return curves


def pictures_of(run_dir) -> list[Image.Image]:
    """TensorBoard's first picture of a run in each epoch, the last epoch's last."""
    events = EventAccumulator(str(run_dir), size_guidance={"images": 0}).Reload()
    first = min(events.Tags()["images"])
    return [Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images(first)]


def assert_runs_equal(hurt, unhurt):
    """Checkpoint, metrics.csv and TensorBoard curves, but for time and memory."""
    a, b = content_of(hurt), content_of(unhurt)
    for content in (a, b):
        content["position"].pop("seconds")
    assert_equal(a, b)
    rows = [
        [
            {k: v for k, v in row.items() if k not in MEASURED}
            for row in read_metrics(Path(d) / "metrics.csv")
        ]
        for d in (hurt, unhurt)
    ]
    assert rows[0] == rows[1]
    curves = scalars_of(hurt)
    assert curves == scalars_of(unhurt)
    epochs = list(range(1, len(rows[0]) + 1))
    [loss] = {"train/results/loss", "train/results, val/loss"} & curves.keys()
    assert [step for step, _ in curves[loss]] == epochs
    assert not [p.name for p in Path(hurt).iterdir() if TEMPORARY.fullmatch(p.name)]


def with_sample(task, sample):
    """The task with another built-in sample: sample(config) -> (train, test)."""
    return dataclasses.replace(task, data=dataclasses.replace(task.data, sample=sample))
