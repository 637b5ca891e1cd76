"""What several test files make and load: sets, data folders, small networks."""

import functools
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from attention_model import build_model
from common.checkpoint import FORMAT
from common.errors import UserError
from data import ImageSet, load_cifar100, load_cub
from datasets import image_cache

BIRD_SIZE = 24  # that load_birds resizes pictures to
# id: name, class id, train, (width, height), box x y width height, parts x y visible
BIRDS = {
    3: (
        "001.Red_bird/a.png",
        1,
        1,
        (50, 40),
        (3.2, 4.6, 20.5, 15.1),
        ((5.0, 6.0, 1), (12.5, 9.5, 1)),
    ),
    4: (
        "001.Red_bird/b.png",
        1,
        0,
        (40, 60),
        (0.0, 10.0, 40.0, 30.0),
        ((1.0, 2.0, 1), (0.0, 0.0, 0)),
    ),
    7: (
        "004.Blue_bird/c.png",
        4,
        1,
        (64, 64),
        (30.0, 30.0, 50.0, 20.4),
        ((63.9, 35.0, 1), (0.0, 0.0, 0)),
    ),
    9: (
        "004.Blue_bird/d.png",
        4,
        0,
        (33, 31),
        (1.0, 1.0, 9.0, 9.0),
        ((2.0, 3.0, 1), (9.9, 10.0, 1)),
    ),
    12: (
        "004.Blue_bird/e.png",
        4,
        1,
        (31, 70),
        (-4.0, 20.5, 20.0, 60.0),
        ((3.0, 30.0, 1), (4.0, 5.0, 1)),
    ),
}


def torchvisions(name, dtype=torch.float64, classes=7):
    import torchvision  # not above: decoding workers import this file

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=classes).to(dtype).eval()


def untrained(path, name, task_config, dataset, classes, size=32, width=1 / 16):
    """A checkpoint of a network that was not trained, with batch norm that normalizes by
    something."""
    torch.manual_seed(0)
    config = task_config | {
        "model": name,
        "width": width,
        "dataset": dataset,
        "sample": False,
        "image_size": size,
        "num_workers": 0,
        "trunk": "pooled",
        "pool4": 2,
    }
    model = build_model(name, len(classes), width=width, trunk="pooled")
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    torch.save(
        {
            "format": FORMAT,
            "model": model.state_dict(),
            "ema": None,
            "config": config,
            "class_names": list(classes),
            "input_size": [size, size],
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "position": {"epoch": 1},
        },
        path,
    )
    return path


def image_set(count=20, height=18, width=24, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))
    return ImageSet(images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]), "a test")


def make_folders(
    root, classes=("cat", "dog"), per_class=3, size=(20, 16), ending="png", name="cifar100"
):
    """Class folders under root/name; returns the pixels by path."""
    rng, pixels = np.random.default_rng(0), {}
    for split in ("train", "test"):
        for label in classes:
            folder = root / name / split / label
            folder.mkdir(parents=True)
            for i in range(per_class):
                array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / f"{i:03d}.{ending}")
                pixels[folder / f"{i:03d}.{ending}"] = array
    return pixels


def load_cifar(root, **options):
    return load_cifar100(root, download=False, progress=False, **options)


def load_birds(root, **options):
    return load_cub(
        root, **{"image_size": BIRD_SIZE, "download": False, "progress": False, **options}
    )


def fails(load, root, *words, **options):
    """The load fails with one line that holds every word."""
    with pytest.raises(UserError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


cifar_fails = functools.partial(fails, load_cifar)
birds_fail = functools.partial(fails, load_birds)


def decoded_anew(load, root, monkeypatch, **options):
    """The splits that were decoded rather than read from the cache, and what was loaded."""
    titles, decode = [], image_cache.decoded_chunks

    def spy(*args, **options):
        titles.append(options["title"])
        return decode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decoded_chunks", spy)
        loaded = load(root, **options)
    return titles, loaded


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def first_lines(commands, folder):
    """Scripts with their words, all at once, each `2>&1 | head -n 1`: [(exit status, lines read,
    what the shell complains of)]."""
    started = [
        subprocess.Popen(
            [
                "bash",
                "-c",
                f"{shlex.join([sys.executable, *words])} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}",
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in commands
    ]
    ended = [(process, *process.communicate(timeout=300)) for process in started]
    return [(process.returncode, len(out.splitlines()), error) for process, out, error in ended]


def orthogonalized(matrix, iterations=3):
    """Muon's polynomial on the singular values, in float64: what the matrix products come to."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v
