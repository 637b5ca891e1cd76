"""augmentation.py against loops over single images and torchvision, and the batches of an epoch."""

import math
import random
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference

from data import Augmentation, TrainBatches, resize, split_validation
from datasets import augmentation
from datasets.augmentation import normalize
from tests.helpers.makers import image_set

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


# ---- crop, flip and cutout -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "height,width,pad,cutout", [(18, 24, 4, 7), (32, 32, 4, 8), (9, 7, 3, 12), (16, 16, 0, 0)]
)
@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_equals_a_loop_over_single_images(height, width, pad, cutout, flip):
    images = image_set(40, height, width).images
    augmentation = Augmentation(mean=MEAN, std=STD, pad=pad, flip=flip, cutout=cutout)
    batch = augmentation(images, torch.Generator().manual_seed(5))
    draw = augmentation.draw(40, height, width, torch.Generator().manual_seed(5))
    assert batch.dtype == torch.float32 and batch.shape == (40, 3, height, width)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(images.numpy()):
        top, left, flipped, y, x = (int(value[i]) for value in draw[:5])
        expected = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")[
            top : top + height, left : left + width
        ]
        if flip and flipped:
            expected = expected[:, ::-1]
        expected = (expected / 255.0 - np.array(MEAN)) / np.array(STD)
        if cutout:
            y, x = y - cutout // 2, x - cutout // 2
            expected[max(y, 0) : max(y + cutout, 0), max(x, 0) : max(x + cutout, 0)] = 0
        np.testing.assert_allclose(batch[i].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_draws_cover_their_ranges_and_differ_between_images():
    draw = Augmentation(mean=MEAN, std=STD, pad=4).draw(
        4000, 10, 12, torch.Generator().manual_seed(0)
    )
    for values, end in zip(draw[:5], (9, 9, 2, 10, 12), strict=True):
        counts = torch.bincount(values.long(), minlength=end)
        assert len(counts) == end and counts.min() > 4000 / end * 0.7


def test_padding_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="reflect padding of 4 px"):
        Augmentation(mean=MEAN, std=STD)(image_set(2, 4, 9).images, torch.Generator())


def test_normalise_and_resize():
    images = image_set().images
    plain = normalize(images, MEAN, STD)
    expected = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(plain.permute(0, 2, 3, 1).double(), expected, atol=2e-6, rtol=0)
    assert resize(plain, None) is plain and resize(plain, (18, 24)) is plain
    small = resize(plain, (9, 12))  # half the size
    assert small.shape == (20, 3, 9, 12) and small.is_contiguous(memory_format=torch.channels_last)
    # antialiased
    assert abs(small.mean() - plain.mean()) < 0.02 and small.std() < 0.7 * plain.std()


# ---- zoom and jitter -----------------------------------------------------------------------------


def pictures(count=6, height=40, width=36):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear value of (H, W, 3) at a point in pixels, whose middles are at .5; clamped at the
    border."""
    y, x = (min(max(v - 0.5, 0), side - 1) for v, side in zip((y, x), image.shape[:2], strict=True))
    top, left = int(y), int(x)
    down, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    a, b = y - top, x - left
    return (1 - a) * ((1 - b) * image[top, left] + b * image[top, right]) + a * (
        (1 - b) * image[down, left] + b * image[down, right]
    )


def test_zoom_equals_a_loop_over_pixels():
    images, least, size = pictures(), 0.3, (20, 24)
    augmentation = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, zoom=least, size=size)
    batch = augmentation(images, generator(4))
    assert batch.shape == (6, 3, *size) and batch.is_contiguous(memory_format=torch.channels_last)
    draw = augmentation.draw(6, *size, generator(4))
    plain = normalize(images, MEAN, STD).permute(0, 2, 3, 1).double().numpy()
    for i, image in enumerate(plain):
        area = least + (1 - least) * draw.area[i].item()
        aspect = (4 / 3) ** (2 * draw.aspect[i].item() - 1)
        wide, high = min(1, math.sqrt(area * aspect)), min(1, math.sqrt(area / aspect))
        left, top = draw.place_x[i].item() * (1 - wide), draw.place_y[i].item() * (1 - high)
        for row, column in ((0, 0), (7, 11), (19, 23), (19, 0)):
            y, x = (top + high * (row + 0.5) / 20) * 40, (left + wide * (column + 0.5) / 24) * 36
            np.testing.assert_allclose(
                batch[i, :, row, column].numpy(), sampled(image, y, x), atol=2e-4
            )


def test_zoom_shows_parts_of_the_least_share_up_to_the_whole():
    """Each pixel of this picture holds its own place, so a batch tells which part of it was
    shown."""
    ramp = torch.arange(200, dtype=torch.uint8)
    image = torch.stack(
        torch.meshgrid(ramp, ramp, indexing="ij") + (torch.zeros(200, 200, dtype=torch.uint8),), 2
    )
    augmentation = Augmentation(
        mean=(0,) * 3, std=(1 / 255,) * 3, pad=0, flip=False, zoom=0.4, size=(50, 50)
    )
    shown = augmentation(image.repeat(300, 1, 1, 1), generator())
    # from the first to the last pixel's middle
    high = (shown[:, 0, -1, 0] - shown[:, 0, 0, 0]) / 0.98 / 200
    wide = (shown[:, 1, 0, -1] - shown[:, 1, 0, 0]) / 0.98 / 200
    area = high * wide
    assert 0.38 < area.min() < 0.45 and 0.9 < area.max() < 1.02 and abs(area.mean() - 0.68) < 0.05
    assert (wide / high).max() < 1.36 and (wide / high).min() > 0.73 and (wide / high).std() > 0.1
    assert shown.min() >= 0 and shown.max() <= 199


def operation(name: str, images: torch.Tensor, amount=1.0, sign=1.0, fill=MEAN) -> torch.Tensor:
    """One of TrivialAugment's, at one strength for all images or one for each."""
    amounts, signs = (
        torch.as_tensor(value).expand(len(images), 1, 1, 1) for value in (amount, sign)
    )
    changed, counts = (
        images.clone(),
        [len(images) if each == name else 0 for each in augmentation.OPERATIONS],
    )
    augmentation._operate(changed, amounts, amounts * signs, counts, fill)
    return changed


@pytest.mark.parametrize("most", [0.2, 0.8])
def test_jitter_equals_torchvision(most):
    images = pictures()
    augmentation = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, jitter=most)
    batch = augmentation(images, generator(1))
    draw = augmentation.draw(6, 40, 36, generator(1))
    factors = 1 + most * (2 * draw.light - 1)
    assert len(set(factors.flatten().tolist())) == 18
    for image, (brightness, contrast, saturation), ours in zip(
        images, factors.tolist(), batch, strict=True
    ):
        theirs = image.permute(2, 0, 1).float() / 255
        theirs = reference.adjust_brightness(theirs, brightness)
        theirs = reference.adjust_contrast(theirs, contrast)
        theirs = reference.adjust_saturation(theirs, saturation)
        torch.testing.assert_close(
            ours, reference.normalize(theirs, MEAN, STD), atol=1e-4, rtol=1e-4
        )


# ---- TrivialAugment ------------------------------------------------------------------------------


def test_colour_operations_equal_torchvision():
    images = pictures().permute(0, 3, 1, 2)
    for name, theirs in (
        ("brightness", reference.adjust_brightness),
        ("saturation", reference.adjust_saturation),
        ("contrast", reference.adjust_contrast),
        ("sharpness", reference.adjust_sharpness),
    ):
        for sign in (-1.0, 1.0):
            ours = operation(name, images.float() / 255, 0.7, sign).clamp(0, 1)
            torch.testing.assert_close(
                ours, theirs(images.float() / 255, 1 + 0.99 * 0.7 * sign), atol=1e-4, rtol=0
            )
    for amount in (0.0, 0.3, 0.8, 1.0):
        bits = 8 - round(6 * amount)
        assert torch.equal(
            (255 * operation("posterize", images.float() / 255, amount)).round().byte(),
            reference.posterize(images, bits),
        )
        torch.testing.assert_close(
            operation("solarize", images.float() / 255, amount),
            reference.solarize(images.float() / 255, 1 - amount),
        )
    images[0] = 77  # nothing to stretch
    torch.testing.assert_close(
        operation("autocontrast", images.float() / 255),
        reference.autocontrast(images.float() / 255),
    )
    large = torch.cat(
        [pictures(2, 256, 256) // 2, torch.full((1, 256, 256, 3), 77, dtype=torch.uint8)]
    ).permute(0, 3, 1, 2)
    ours, theirs = (
        255 * operation("equalize", large.float() / 255),
        reference.equalize(large).float(),
    )
    assert (ours - theirs).abs().max() < 3  # which counts in whole steps of a 255th of the pixels
    assert torch.equal(ours[2].round(), theirs[2])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_geometric_operations_equal_a_loop_over_pixels(sign):
    """Where a pixel's colour comes from, in pixels from the middle; outside the picture there is
    the mean."""
    images, fill, m = pictures().permute(0, 3, 1, 2).float() / 255, np.array(MEAN), 0.4 * sign
    (height, width), turn = images.shape[2:], math.radians(135) * m
    sources = {
        "shear_x": lambda y, x: (y, x + 0.99 * m * y),
        "shear_y": lambda y, x: (y + 0.99 * m * x, x),
        "translate_x": lambda y, x: (y, x + m * width / 2),
        "translate_y": lambda y, x: (y + m * height / 2, x),
        "rotate": lambda y, x: (
            math.sin(turn) * x + math.cos(turn) * y,
            math.cos(turn) * x - math.sin(turn) * y,
        ),
    }
    for name, source in sources.items():
        moved = operation(name, images, 0.4, sign)
        plain, seen = images.permute(0, 2, 3, 1).double().numpy(), 0
        for row, column in ((0, 0), (20, 18), (33, 5), (7, 30), (39, 35)):
            y, x = source(row + 0.5 - height / 2, column + 0.5 - width / 2)
            y, x = y + height / 2, x + width / 2
            inside = 0.5 <= y <= height - 0.5 and 0.5 <= x <= width - 0.5
            outside = not (-0.5 <= y <= height + 0.5 and -0.5 <= x <= width + 0.5)
            for i in range(6):
                if inside:
                    np.testing.assert_allclose(
                        moved[i, :, row, column].numpy(),
                        sampled(plain[i], y, x),
                        atol=1e-3,
                        err_msg=name,
                    )
                elif outside:
                    np.testing.assert_allclose(
                        moved[i, :, row, column].numpy(), fill, atol=1e-5, err_msg=name
                    )
            seen += inside
        assert seen >= 2, name


def test_trivial_augment_gives_every_operation_its_share_of_a_batch():
    images = torch.randint(60, 200, (280, 12, 10, 3), dtype=torch.uint8, generator=generator())
    before = images.clone()
    ours = Augmentation(mean=(0,) * 3, std=(1 / 255,) * 3, pad=0, flip=False, trivial_augment=True)
    first, again, other = (ours(images, generator(seed)).permute(0, 2, 3, 1) for seed in (3, 3, 4))
    assert (
        torch.equal(images, before) and torch.equal(first, again) and not torch.equal(first, other)
    )
    for batch, seed in ((first, 3), (other, 4)):
        drawn = generator(seed)
        ours.draw(280, 12, 10, drawn)
        strength = torch.rand(280, 2, generator=drawn)
        for place in range(14):
            amount, sign = strength[place::14, :, None, None, None].unbind(1)
            name, chosen = (
                list(augmentation.OPERATIONS)[(seed + place) % 14],
                images[place::14].permute(0, 3, 1, 2) / 255,
            )
            expected = operation(name, chosen, amount, torch.where(sign < 0.5, -1.0, 1.0), (0,) * 3)
            torch.testing.assert_close(
                batch[place::14], (255 * expected).round().clamp(0, 255).permute(0, 2, 3, 1)
            )
    assert first.min() >= 0 and first.max() <= 255
    half = ours(images[100:], generator(3), slice(100, 280), 280).permute(0, 2, 3, 1)
    assert torch.equal(half, first[100:])


def test_another_size_without_zoom_is_the_evaluations_resize():
    images = pictures()
    batch = Augmentation(mean=MEAN, std=STD, pad=0, flip=False, size=(20, 18))(images, generator())
    assert torch.equal(batch, resize(normalize(images, MEAN, STD), (20, 18)))


def test_what_is_switched_off_leaves_the_rest_as_it_was():
    images = pictures()
    all_of_it = Augmentation(mean=MEAN, std=STD, pad=4, cutout=0)
    for changes in ({"zoom": 0.5}, {"jitter": 0.3}, {"trivial_augment": True}):
        other = Augmentation(mean=MEAN, std=STD, pad=4, **changes)
        for a, b in zip(
            all_of_it.draw(6, 40, 36, generator()), other.draw(6, 40, 36, generator()), strict=True
        ):
            assert torch.equal(a, b)
    assert torch.equal(all_of_it(images, generator()), all_of_it(images, generator()))


# ---- batches -------------------------------------------------------------------------------------


def batches(images=None, seed=1, batch_size=6):
    augmentation = Augmentation(mean=MEAN, std=STD, cutout=5)
    return TrainBatches(
        images or image_set(), batch_size, seed=seed, augmentation=augmentation, device="cpu"
    )


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_batches_are_determined_by_seed_and_epoch():
    assert same(batches().epoch(3), batches().epoch(3))
    assert not same(batches().epoch(3), batches().epoch(4))
    assert not same(batches().epoch(3), batches(seed=2).epoch(3))
    reused = batches()
    list(reused.epoch(0))
    assert same(reused.epoch(3), batches().epoch(3))


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_start_step_goes_on_where_the_epoch_was_left(start):
    assert same(list(batches().epoch(2))[start:], batches().epoch(2, start_step=start))


def test_interleaved_epochs_do_not_disturb_each_other():
    shared = batches()
    pairs = list(zip(shared.epoch(0), shared.epoch(1), strict=True))
    assert same([p[0] for p in pairs], batches().epoch(0)) and same(
        [p[1] for p in pairs], batches().epoch(1)
    )


def test_global_random_states_are_neither_read_nor_moved():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = list(batches().epoch(0))
    split_validation(image_set(), 0.2, 0)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert same(first, batches().epoch(0))


def test_an_epoch_holds_each_image_once():
    numbered = image_set(20)
    numbered.images[:] = torch.arange(20, dtype=torch.uint8)[:, None, None, None]
    plain = Augmentation(mean=(0, 0, 0), std=(1 / 255,) * 3)
    loader = TrainBatches(numbered, 5, seed=0, augmentation=plain, device="cpu")
    seen = [(x[:, 0, 0, 0].round().long(), y) for x, y in loader.epoch(0)]
    assert [len(y) for _, y in seen] == [5, 5, 5, 5] and len(loader) == 4
    order = torch.cat([x for x, _ in seen])
    assert sorted(order.tolist()) == list(range(20)) and order.tolist() != list(range(20))
    # labels go with their images
    assert torch.equal(torch.cat([y for _, y in seen]), numbered.labels[order])


def test_number_of_steps():
    assert len(batches()) == 3 and len(list(batches().epoch(0))) == 3
    few = batches(batch_size=64)
    assert len(few) == 1 and [len(y) for _, y in few.epoch(0)] == [20]


def per_image_loader(images):
    """What the speed is compared with: a torch DataLoader of 2 workers over torchvision's per-image
    transforms."""
    from torchvision import transforms as T

    transform = T.Compose(
        [
            T.ToPILImage(),
            T.RandomCrop(32, padding=4, padding_mode="reflect"),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
            T.RandomErasing(p=1.0, scale=(1 / 16, 1 / 16), ratio=(1, 1)),
        ]
    )
    pairs = [(transform, image.permute(2, 0, 1)) for image in images]
    return torch.utils.data.DataLoader(PerImage(pairs), batch_size=256, num_workers=2)


class PerImage(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        transform, image = self.pairs[index]
        return transform(image)


def rate(iterator, windows, steps):
    """Images a second in the best of some windows of some steps; the first batch, which starts
    things up, is free."""
    next(iterator)
    best = 0.0
    for _ in range(windows):
        start = time.perf_counter()
        count = sum(len(next(iterator)) for _ in range(steps))
        best = max(best, count / (time.perf_counter() - start))
    return best


def test_ten_times_the_speed_of_a_loader_with_two_workers():
    images = image_set(8192, 32, 32)
    # Windows of 6 batches: as workers hold 2 batches each ready, a shorter one could find them all
    # waiting
    theirs = rate(iter(per_image_loader(images.images[: 13 * 256])), windows=2, steps=6)
    augmentation = Augmentation(mean=MEAN, std=STD, cutout=8)
    ours = TrainBatches(images, 512, seed=0, augmentation=augmentation, device="cpu")
    best, threads = 0.0, torch.get_num_threads()
    try:
        for count in {1, threads}:  # beside other busy processes, one thread is often the faster
            torch.set_num_threads(count)
            best = max(
                best, *(rate((x for x, _ in ours.epoch(e)), windows=5, steps=3) for e in range(4))
            )
    finally:
        torch.set_num_threads(threads)
    print(f"{best:,.0f} images/s against {theirs:,.0f}: {best / theirs:.1f} times")
    assert best >= 10 * theirs
