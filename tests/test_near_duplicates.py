"""near_duplicates.py against a comparison of all thumbnails with all others."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from datasets import near_duplicates
from datasets.decoding import thumbnails as thumbnails_of
from datasets.near_duplicates import groups_of, near_pairs


def photo(seed: int, side: int = 96) -> Image.Image:
    """Smooth blotches with grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((image + rng.integers(-8, 9, image.shape)).clip(0, 255).astype(np.uint8))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return thumbnails_of(np.stack([np.asarray(image.resize((32, 32), 2)) for image in images]))


def by_all_pairs(grid: np.ndarray) -> set[tuple[int, int]]:
    values, found = grid.astype(float), set()
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            contrast = max(min(values[i].std(), values[j].std()), 1 / 0.15)
            if np.sqrt(np.mean((values[i] - values[j]) ** 2)) <= 0.15 * contrast:
                found.add((i, j))
    return found


def test_a_thumbnail_is_the_mean_brightness_of_each_cell():
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 45, 3), dtype=np.uint8)
    rows, columns = ([i * side // 8 for i in range(9)] for side in (30, 45))
    for image, thumbnail in zip(images, thumbnails_of(images), strict=True):
        gray = np.floor(image @ (77 / 256, 150 / 256, 29 / 256))
        for y in range(8):
            for x in range(8):
                cell = gray[rows[y] : rows[y + 1], columns[x] : columns[x + 1]]
                assert thumbnail[8 * y + x] == int(cell.mean())


CHANGES = {
    "the same": lambda image: image,
    "smaller": lambda image: image.resize((41, 41), Image.Resampling.BILINEAR),
    "larger": lambda image: image.resize((300, 300), Image.Resampling.BICUBIC),
    "compressed": lambda image: compressed(image, 30),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.03),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_other_pictures_are_not(change):
    originals = [photo(seed) for seed in range(40)]
    copies = [CHANGES[change](image) for image in originals]
    groups = groups_of(thumbnails([*originals, *copies]))
    assert (groups[:40] == np.arange(40)).all()
    assert (groups[40:] == np.arange(40)).sum() >= 39
    assert set(groups[40:]) <= {*range(80)} and (groups[40:] <= np.arange(40, 80)).all()


def test_nearly_all_pairs_are_found_and_no_others():
    rng = np.random.default_rng(1)
    base = thumbnails([photo(seed) for seed in range(100)]).astype(int)
    noise = rng.normal(0, rng.uniform(0, 9, (200, 1)), (200, 64))
    grid = np.concatenate([base, (base[rng.integers(0, 100, 200)] + noise)]).clip(0, 255)
    grid = grid.astype(np.uint8)
    expected, found = by_all_pairs(grid), {tuple(sorted(p)) for p in near_pairs(grid).tolist()}
    assert found <= expected and len(expected) > 100
    assert len(found) >= 0.9 * len(expected)


def test_groups_are_connected_and_named_by_their_first():
    """A chain, whose ends differ; and many that are all alike, of which few are compared."""
    start, end = thumbnails([photo(0), photo(1)]).astype(float)
    chain = [start + (end - start) * i / 40 for i in range(41)]
    alike = np.full((500, 64), 128)
    order = np.random.default_rng(2).permutation(541)
    grid = np.concatenate([np.stack(chain), alike]).astype(np.uint8)[order]
    groups = groups_of(grid)
    of_chain = groups[order < 41]
    assert len(set(of_chain)) == 1 and of_chain[0] == np.nonzero(order < 41)[0][0]
    assert set(groups[order >= 41]) == {np.nonzero(order >= 41)[0][0]}


def test_one_picture_and_none():
    assert groups_of(np.zeros((1, 64), np.uint8)).tolist() == [0]
    assert groups_of(np.zeros((0, 64), np.uint8)).tolist() == []


def test_pictures_without_contrast_are_alike_only_if_their_brightness_is():
    grid = np.repeat(np.arange(0, 250, 5, dtype=np.uint8)[:, None], 64, 1)
    assert (groups_of(grid) == np.arange(50)).all()


def test_pairs_are_compared_in_blocks(monkeypatch):
    grid = thumbnails([photo(seed // 2) for seed in range(60)])
    expected = near_pairs(grid)
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    assert (near_pairs(grid) == expected).all()
