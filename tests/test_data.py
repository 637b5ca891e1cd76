"""Sets of images: parts, splits, statistics, seeds."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import ImageSet, channel_statistics, place_on, split_validation, stable_seed
from tests.helpers.makers import image_set


def test_image_set():
    whole = image_set()
    boxed = ImageSet(
        whole.images, whole.labels, whole.class_names, "x", torch.arange(80.0).view(20, 4)
    )
    part = boxed.subset([4, 2])
    assert len(part) == 2 and part.image_size == (18, 24) and part.labels.tolist() == [1, 2]
    assert torch.equal(part.images, whole.images[[4, 2]]) and part.boxes[0].tolist() == [
        16,
        17,
        18,
        19,
    ]
    assert whole.to("cpu").boxes is None and torch.equal(place_on(boxed, "cpu").boxes, boxed.boxes)


def test_place_on_a_gpu_by_a_tenth_of_its_free_memory(monkeypatch):
    whole, moved = image_set(), []
    monkeypatch.setattr(ImageSet, "to", lambda self, device: moved.append(device) or self)
    for free, expected in (
        (whole.images.nbytes * 10, [torch.device("cuda")]),
        (whole.images.nbytes * 10 - 1, []),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        moved.clear()
        place_on(whole, "cuda")
        assert moved == expected


def test_split_validation_takes_a_share_of_each_class():
    whole = image_set(63, classes=3)
    whole.images[:, 0, 0, 0] = torch.arange(63, dtype=torch.uint8)
    train, validation = split_validation(whole, 0.2, seed=7)
    assert torch.bincount(validation.labels).tolist() == [4, 4, 4] and len(train) == 51
    ids = [s.images[:, 0, 0, 0].tolist() for s in (train, validation)]
    assert sorted(ids[0] + ids[1]) == list(range(63)) and validation.labels.tolist() == [
        i % 3 for i in ids[1]
    ]
    assert torch.equal(validation.images, split_validation(whole, 0.2, seed=7)[1].images)
    assert not torch.equal(validation.images, split_validation(whole, 0.2, seed=8)[1].images)
    kept, _ = split_validation(whole, 0.999, seed=0)
    assert torch.bincount(kept.labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 0.001, float("nan")])
def test_split_validation_refuses_useless_fractions(fraction):
    with pytest.raises(UserError, match="--val-fraction"):
        split_validation(image_set(), fraction, 0)


def test_channel_statistics():
    whole = image_set(50)
    mean, std = channel_statistics(whole)
    pixels = whole.images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), atol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), atol=1e-12)
    flat = ImageSet(
        torch.full((2, 16, 16, 3), 9, dtype=torch.uint8), torch.zeros(2).long(), ("a",), "x"
    )
    assert channel_statistics(flat)[1] == (1 / 255,) * 3


def test_stable_seed_is_the_same_everywhere():
    assert stable_seed("order", 0, 1) == stable_seed("order", 0, 1) == 4602570500139554110
    assert stable_seed(1, 23) != stable_seed(12, 3)
