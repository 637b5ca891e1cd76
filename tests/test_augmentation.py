"""augmentation.py's zoom and colour jitter against plain references; crop, flip and cutout are in test_data.py."""
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference

from augmentation import Augmentation, normalise, resize

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def pictures(count=6, height=40, width=36):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear value of (H, W, 3) at a point in pixels, whose middles are at .5; clamped at the border."""
    y, x = (min(max(v - 0.5, 0), side - 1) for v, side in zip((y, x), image.shape))
    top, left = int(y), int(x)
    down, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    a, b = y - top, x - left
    return ((1 - a) * ((1 - b) * image[top, left] + b * image[top, right])
            + a * ((1 - b) * image[down, left] + b * image[down, right]))


def test_zoom_equals_a_loop_over_pixels():
    images, least, size = pictures(), 0.3, (20, 24)
    augmentation = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, zoom=least, size=size)
    batch = augmentation(images, generator(4))
    assert batch.shape == (6, 3, *size) and batch.is_contiguous(memory_format=torch.channels_last)
    draw = augmentation.draw(6, *size, generator(4))
    plain = normalise(images, MEAN, STD).permute(0, 2, 3, 1).double().numpy()
    for i, image in enumerate(plain):
        area = least + (1 - least) * draw.area[i].item()
        aspect = (4 / 3) ** (2 * draw.aspect[i].item() - 1)
        wide, high = min(1, math.sqrt(area * aspect)), min(1, math.sqrt(area / aspect))
        left, top = draw.place_x[i].item() * (1 - wide), draw.place_y[i].item() * (1 - high)
        for row, column in ((0, 0), (7, 11), (19, 23), (19, 0)):
            y, x = (top + high * (row + 0.5) / 20) * 40, (left + wide * (column + 0.5) / 24) * 36
            np.testing.assert_allclose(batch[i, :, row, column].numpy(), sampled(image, y, x), atol=2e-4)


def test_zoom_shows_parts_of_the_least_share_up_to_the_whole():
    """Each pixel of this picture holds its own place, so a batch tells which part of it was shown."""
    ramp = torch.arange(200, dtype=torch.uint8)
    image = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij") + (torch.zeros(200, 200, dtype=torch.uint8),), 2)
    augmentation = Augmentation(mean=(0,) * 3, std=(1 / 255,) * 3, pad=0, flip=False, zoom=0.4, size=(50, 50))
    shown = augmentation(image.repeat(300, 1, 1, 1), generator())
    high = (shown[:, 0, -1, 0] - shown[:, 0, 0, 0]) / 0.98 / 200     # from the first to the last pixel's middle
    wide = (shown[:, 1, 0, -1] - shown[:, 1, 0, 0]) / 0.98 / 200
    area = high * wide
    assert 0.38 < area.min() < 0.45 and 0.9 < area.max() < 1.02 and abs(area.mean() - 0.68) < 0.05
    assert (wide / high).max() < 1.36 and (wide / high).min() > 0.73 and (wide / high).std() > 0.1
    assert shown.min() >= 0 and shown.max() <= 199


@pytest.mark.parametrize("most", [0.2, 0.8])
def test_jitter_equals_torchvision(most):
    images = pictures()
    augmentation = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, jitter=most)
    batch = augmentation(images, generator(1))
    draw = augmentation.draw(6, 40, 36, generator(1))
    factors = 1 + most * (2 * draw.light - 1)
    assert len(set(factors.flatten().tolist())) == 18
    for image, (brightness, contrast, saturation), ours in zip(images, factors.tolist(), batch):
        theirs = image.permute(2, 0, 1).float() / 255
        theirs = reference.adjust_brightness(theirs, brightness)
        theirs = reference.adjust_contrast(theirs, contrast)
        theirs = reference.adjust_saturation(theirs, saturation)
        torch.testing.assert_close(ours, reference.normalize(theirs, MEAN, STD), atol=1e-4, rtol=1e-4)


def test_another_size_without_zoom_is_the_evaluations_resize():
    images = pictures()
    batch = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, size=(20, 18))(images, generator())
    assert torch.equal(batch, resize(normalise(images, MEAN, STD), (20, 18)))


def test_what_is_switched_off_leaves_the_rest_as_it_was():
    images = pictures()
    all_of_it = Augmentation(mean=MEAN, std=STD, pad=4, cutout=0)
    for changes in ({"zoom": 0.5}, {"jitter": 0.3}):
        other = Augmentation(mean=MEAN, std=STD, pad=4, **changes)
        for a, b in zip(all_of_it.draw(6, 40, 36, generator()), other.draw(6, 40, 36, generator())):
            assert torch.equal(a, b)
    assert torch.equal(all_of_it(images, generator()), all_of_it(images, generator()))
