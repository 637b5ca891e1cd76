"""Pictures of attention maps: colors, overlays, contact sheets."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from explain.pictures import (
    COLOR_MAPS,
    PAPER,
    attention_sheet,
    colorize,
    enlarge,
    overlay,
    shorten,
    shown,
    unit_range,
)


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", COLOR_MAPS)
def test_colours_grow_lighter_all_the_way(name):
    # more steps would meet the rounding to uint8
    colors = colorize(np.linspace(0, 1, 65)[None], name)[0]
    linear = (colors / 255.0) ** 2.2
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).all()
    assert luminance[-1] > 10 * luminance[0]


def test_colours_at_and_between_the_anchors():
    anchors = np.array(COLOR_MAPS["inferno"])
    assert (colorize(np.linspace(0, 1, 9)[None])[0] == anchors).all()
    assert np.abs(colorize(np.array([[1 / 16]]))[0, 0] - anchors[:2].mean(axis=0)).max() <= 0.5
    outside = colorize(np.array([[-3.0, np.nan, 7.0]]))[0]
    assert (outside == anchors[[0, 0, 8]]).all() and outside.dtype == np.uint8
    with pytest.raises(ValueError, match="viridis"):
        colorize(np.zeros((2, 2)), "jet")


def test_unit_range_uses_all_of_it_and_shows_flat_maps_flat():
    values = np.array([[-2.0, 0.0], [1.0, 6.0]])
    assert unit_range(values) == pytest.approx((values + 2) / 8)
    rounding = np.float32(1 / 1024) * (1 + np.random.default_rng(0).uniform(-1e-6, 1e-6, (32, 32)))
    for flat in (np.zeros((4, 4)), np.full((4, 4), 1 / 16), rounding, np.full((4, 4), np.nan)):
        assert (unit_range(flat) == 0.5).all()
    assert unit_range(np.array([[np.nan, 1.0], [2.0, 3.0]])) == pytest.approx(
        np.array([[0, 0], [0.5, 1.0]])
    )
    # a real difference of one per cent is shown
    assert np.ptp(unit_range(np.array([[1.0, 1.01]]))) == 1


def test_overlay_between_the_image_and_the_colours():
    image, attention = _image(24, 40), np.random.default_rng(1).random((24, 40))
    assert (overlay(image, attention, opacity=0) == image).all()
    assert (overlay(image, attention, opacity=1) == colorize(unit_range(attention))).all()
    half = overlay(image, attention, opacity=0.5).astype(float)
    assert np.abs(half - (image / 2.0 + colorize(unit_range(attention)) / 2.0)).max() <= 0.5
    assert (overlay(image, np.zeros((3, 5)), opacity=1) == colorize(np.array([[0.5]]))[0, 0]).all()
    with pytest.raises(ValueError, match="uint8"):
        overlay(image.astype(np.float32), attention)


def test_overlay_puts_the_peak_where_the_map_has_it():
    attention = np.zeros((4, 8))
    attention[1, 6] = 1.0  # its cell in a 32 x 64 image: rows 8 to 15, columns 48 to 55
    shown = overlay(np.zeros((32, 64, 3), np.uint8), attention, opacity=1).astype(int).sum(axis=2)
    bright = np.argwhere(shown == shown.max())
    assert bright.mean(axis=0) == pytest.approx((11.5, 51.5))


def test_enlarge_repeats_pixels_by_a_whole_factor():
    image = _image(32, 48)
    large = enlarge(image, min_side=100)
    assert large.shape == (128, 192, 3)
    assert (large == np.kron(image, np.ones((4, 4, 1), np.uint8))).all()
    assert enlarge(image, min_side=32) is image


def test_sheet_holds_the_pictures_in_their_places():
    images = np.stack([_image(32, 32, seed) for seed in range(16)])
    maps = {
        level: np.random.default_rng(2).random((16, side, side))
        for level, side in (("conv7", 32), ("conv10", 16), ("conv13", 8))
    }
    sheet = attention_sheet(
        images, maps, [f"true: apple / seen: pear 0.{n:02d}" for n in range(16)]
    )
    assert sheet.dtype == np.uint8 and 1000 <= sheet.shape[1] <= 1600
    places = []
    for picture in (
        enlarge(images[0]),
        overlay(enlarge(images[0]), maps["conv13"][0]),
        enlarge(images[1]),
        overlay(enlarge(images[15]), maps["conv13"][15]),
    ):
        starts = np.argwhere((sheet == picture[0, 0]).all(axis=2))
        places += [
            (y, x) for y, x in starts if np.array_equal(sheet[y : y + 128, x : x + 128], picture)
        ]
    (y0, x0), (y13, x13), (y1, x1), (y15, x15) = places  # each is there, and once
    assert y0 == y13 == y1 and x0 < x13 < x1 and x15 == sheet.shape[1] - x0 - 128 and y15 > y0
    border = np.concatenate(
        [
            sheet[:10].reshape(-1, 3),
            sheet[-10:].reshape(-1, 3),
            sheet[:, :10].reshape(-1, 3),
            sheet[:, -10:].reshape(-1, 3),
        ]
    )
    assert (border == PAPER).all()  # nothing runs into the margins


@pytest.mark.parametrize(
    "count, size, levels",
    [(1, (32, 32), 0), (1, (16, 200), 1), (3, (224, 160), 3), (5, (64, 32), 2)],
)
def test_sheet_of_any_size_keeps_margins_and_shows_the_legend(count, size, levels):
    images = np.stack([_image(*size, seed) for seed in range(count)])
    maps = {f"a level with a long name {n}": np.zeros((count, 7, 5)) for n in range(levels)}
    sheet = attention_sheet(images, maps, ["a very long title " * 20] * count)
    assert (sheet[:, :10] == PAPER).all() and (sheet[:, -10:] == PAPER).all()
    legend = colorize(np.linspace(0, 1, 120)[None])[0]
    rows = np.argwhere((sheet == legend[-1]).all(axis=2))
    assert any(np.array_equal(sheet[y, x - 119 : x + 1], legend) for y, x in rows)


def test_headings_may_have_several_lines_and_be_equal():
    images, maps = np.stack([_image(32, 32)]), {"a": np.eye(8)[None], "b": np.eye(8)[None, ::-1]}
    plain = attention_sheet(images, maps, ["a title"])
    headed = attention_sheet(
        images, maps, ["a title"], headings={"a": "gradcam\n63 % crane", "b": "gradcam\n63 % crane"}
    )
    assert headed.shape == (plain.shape[0] + 20, *plain.shape[1:])
    assert (headed[80:] == plain[60:]).all()  # all but the headings as it was
    assert (attention_sheet(images, maps, ["a title"], headings={"a": "a"}) == plain).all()


@pytest.mark.parametrize(
    "size, expected",
    [
        ((32, 32), (224, 224)),
        ((50, 80), (150, 240)),
        ((100, 300), (96, 288)),
        ((4000, 10), (288, 1)),
        ((1, 1), (224, 224)),
        ((1, 100_000), (1, 288)),
    ],
)
def test_shown_size(size, expected):
    """Enlarged by a whole factor, without growing beyond the greatest side or in memory, or shrunk
    to it."""
    assert shown(_image(*size), 224, 288).shape == (*expected, 3)


def test_sheet_refuses_counts_that_differ():
    images = np.stack([_image(8, 8)] * 3)
    with pytest.raises(ValueError, match="2 of conv7"):
        attention_sheet(images, {"conv7": np.zeros((2, 4, 4))})
    with pytest.raises(ValueError, match="titles"):
        attention_sheet(images, {}, ["one"])


def test_shortened_titles_fit():
    font = ImageFont.load_default(size=14)
    text = "true: a class with a long name / seen: another class 0.82"
    assert shorten(text, font, 1000) == text
    for width in (300, 120, 40):
        short = shorten(text, font, width)
        assert (
            short.endswith("...") and text.startswith(short[:-3]) and font.getlength(short) <= width
        )


def test_sheet_survives_a_png(tmp_path):
    sheet = attention_sheet(np.stack([_image(32, 32)]), {"conv7": np.eye(8)[None]}, ["a title"])
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == sheet).all()
