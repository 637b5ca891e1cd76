"""cub_sample.py: the same pixels everywhere, decided by the mark alone, and the same birds from the
disk."""

import functools
import hashlib
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import cub_sample
from datasets.cifar_sample import CELLS, MARKS
from datasets.cub import CUB_FOLDER
from datasets.cub_sample import MARK_CELL, PART_NAMES, WORDS, draw_bird, write_cub_sample
from tests.helpers.makers import listing
from tests.helpers.makers import load_birds as load


def draw(label, seed):
    return draw_bird(
        np.random.Philox(key=np.array([seed, 99], dtype=np.uint64)).random_raw(WORDS), label
    )


def test_the_same_pixels_on_every_machine():
    """If this fails after a change to cub_sample.py, the sample has changed, and results on it with
    it."""
    digest = hashlib.sha256()
    for seed in range(4):
        picture, box, parts = draw(seed, seed)
        for array in (
            picture,
            box.astype("<i8"),
            parts.astype("<f8"),
            np.array(picture.shape, "<i8"),
        ):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "366a9a6f65dd15e8f20c0a64f3ea284ec7271d8db253b1d7b81c18723d54e61b"


def test_only_the_mark_knows_the_class_and_the_box_holds_the_parts():
    reach, kinds = CELLS * MARK_CELL / 2, set()
    for seed in range(24):
        label = seed % len(MARKS)
        (one, box, parts), (other, other_box, other_parts) = (
            draw(label, seed),
            draw((label + 1) % len(MARKS), seed),
        )
        height, width = one.shape[:2]
        assert 224 <= min(height, width) <= 248 and 256 <= max(height, width) <= 280
        assert (box == other_box).all() and (parts == other_parts).all()
        x0, y0, x1, y1 = box
        assert 0 < x0 < x1 < width and 0 < y0 < y1 < height
        assert (parts > [x0, y0]).all() and (parts < [x1, y1]).all()
        (x, y), eye = parts[PART_NAMES.index("mark")], parts[PART_NAMES.index("eye")].astype(int)
        assert x0 < x - reach < x + reach < x1 and y0 < y - reach < y + reach < y1
        tile = np.s_[int(y - reach) : int(y + reach), int(x - reach) : int(x + reach)]
        pattern = np.array([list(row) for row in list(MARKS.values())[label].split()]) == "#"
        cells = (
            one[tile].astype(int).sum(-1)[MARK_CELL // 2 :: MARK_CELL, MARK_CELL // 2 :: MARK_CELL]
        )
        ink, paper = cells[1:-1, 1:-1][pattern], np.append(cells[1:-1, 1:-1][~pattern], cells[0])
        assert len(set(ink)) == len(set(paper)) == 1 and abs(ink[0] - paper[0]) >= 3 * 96
        assert (one[eye[1], eye[0]] == 10).all() and (one[tile] != other[tile]).any()
        one[tile] = other[tile] = 0
        assert (one == other).all()
        kinds.add((height > width, eye[0] > x))
    assert len(kinds) == 4  # upright and not, facing left and right


def test_the_sample_on_disk(tmp_path):
    write_cub_sample(tmp_path, seed=3, classes=3, train_per_class=2, test_per_class=1)
    train, test = load(tmp_path, image_size=64, crop="whole")
    assert train.class_names == tuple(MARKS)[:3] and train.part_names == PART_NAMES
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and test.labels.tolist() == [0, 1, 2]
    assert (train.parts[..., 2] == 1).all() and len(
        {image.numpy().tobytes() for image in train.images}
    ) == 6
    assert (train.parts[..., :2] > train.boxes[:, None, :2]).all()
    assert (train.parts[..., :2] < train.boxes[:, None, 2:]).all()
    first = draw_bird(np.random.Philox(key=np.array([3, 2], dtype=np.uint64)).random_raw(WORDS), 0)[
        0
    ]
    stored = Image.open(tmp_path / CUB_FOLDER / "images/001.ring/ring_0001.jpg")
    drawn, stored = (
        np.asarray(image.convert("L")).astype(int) for image in (Image.fromarray(first), stored)
    )
    assert stored.shape == drawn.shape and abs(stored - drawn).max() < 16


def test_cub_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small = functools.partial(
        cub_sample, image_size=64, classes=2, train_per_class=3, test_per_class=2
    )
    train, test = small()
    assert listing(tmp_path) == []
    assert (len(train), len(test), train.image_size) == (
        6,
        4,
        (64, 64),
    ) and train.source == "built-in sample (seed 0)"
    assert (train.boxes == torch.tensor([0.0, 0, 64, 64])).all() and train.parts.shape == (6, 3, 3)
    assert torch.equal(train.images, small()[0].images) and not torch.equal(
        train.images, small(seed=1)[0].images
    )
    assert small(margin=0.1)[0].boxes[:, 0].min() > 3
    for classes in (1, 13):
        with pytest.raises(ValueError, match="2 to 12"):
            cub_sample(classes=classes)
