"""Pictures of attention maps: colors, overlays, contact sheets, files."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageFont

from common.errors import UserError
from common.fonts import shorten
from explain.pictures import (
    COLOR_MAPS,
    FORMATS,
    PAPER,
    attention_sheet,
    colorize,
    enlarge,
    is_own_picture,
    legend_notes,
    overlay,
    picture_bytes,
    png_bytes,
    shown,
    unit_range,
)


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _luminance(name):
    # more steps would meet the rounding to uint8
    colors = colorize(np.linspace(0, 1, 65)[None], name)[0]
    return (colors / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("name", ["inferno", "viridis"])
def test_colors_grow_lighter_all_the_way(name):
    luminance = _luminance(name)
    assert (np.diff(luminance) > 0).all()
    assert luminance[-1] > 10 * luminance[0]


@pytest.mark.parametrize("name", ["turbo", "jet"])
def test_turbo_and_jet_are_lightest_in_the_middle(name):
    luminance = _luminance(name)
    assert 0.4 < luminance.argmax() / 64 < 0.7
    assert luminance.max() > 4 * max(luminance[0], luminance[-1])


def test_colors_at_and_between_the_anchors():
    for name, colors in COLOR_MAPS.items():
        anchors = np.array(
            [[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in colors.split()]
        )
        count = len(anchors)
        assert (colorize(np.linspace(0, 1, count)[None], name)[0] == anchors).all()
        between = colorize(np.array([[0.5 / (count - 1)]]), name)[0, 0]
        assert np.abs(between - anchors[:2].mean(axis=0)).max() <= 0.5
        outside = colorize(np.array([[-3.0, np.nan, 7.0]]), name)[0]
        assert (outside == anchors[[0, 0, -1]]).all() and outside.dtype == np.uint8
    with pytest.raises(ValueError, match="viridis"):
        colorize(np.zeros((2, 2)), "hot")


def test_colors_are_those_of_their_names():
    """Of matplotlib 3.11's tables at 0, 0.1, ..., 1, and the formula of MATLAB's jet."""
    expected = {
        "inferno": "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f37819 fca50a f6d746 fcffa4",
        "viridis": "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
        "turbo": "30123b 4559cb 3e9bfe 19d5cd 46f884 a4fc3c e1dd37 fea431 f05b12 c32503 7a0403",
    }
    steps = np.linspace(0, 1, 11)
    for name, colors in expected.items():
        table = np.frombuffer(bytes.fromhex(colors), np.uint8).reshape(-1, 3).astype(int)
        assert np.abs(colorize(steps[None], name)[0] - table).max() <= 2, name
    fine = np.linspace(0, 1, 201)
    jet = 255 * np.clip(1.5 - np.abs(4 * fine[:, None] - (3, 2, 1)), 0, 1)
    assert np.abs(colorize(fine[None], "jet")[0] - jet).max() <= 1


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


def test_an_even_overlay_lies_between_the_gray_image_and_the_colors():
    image, attention = _image(24, 40), np.random.default_rng(1).random((24, 40))
    assert (overlay(image, attention, opacity=0) == image).all()
    colors = colorize(unit_range(attention))
    assert (overlay(image, attention, opacity=1) == colors).all()  # without an outline
    gray = (image @ (0.299, 0.587, 0.114))[..., None]
    for opacity, share in ((0.5, 0.75), (0.8, 0.75), (0.25, 0.375)):
        below = (1 - share) * image + share * gray
        shown = overlay(image, attention, opacity, outline=0).astype(float)
        assert np.abs(shown - ((1 - opacity) * below + opacity * colors)).max() <= 0.51
    assert (overlay(image, np.zeros((3, 5)), opacity=1) == colorize(np.array([[0.5]]))[0, 0]).all()
    with pytest.raises(ValueError, match="uint8"):
        overlay(image.astype(np.float32), attention)
    with pytest.raises(ValueError, match="even, map"):
        overlay(image, attention, blend="soft")


def test_an_overlay_by_the_map_leaves_the_image_where_the_map_is_low():
    image, attention = _image(24, 40), np.linspace(0, 1, 24 * 40).reshape(24, 40)
    shown = overlay(image, attention, 0.5, blend="map", outline=0).astype(float)
    low, high = attention <= 0.1, attention >= 0.6
    assert (shown[low] == image[low]).all() and low.sum() > 90
    alpha = 1 - 0.5**1.5  # more than 0.5
    expected = (1 - alpha) * image + alpha * colorize(attention)
    assert np.abs(shown - expected)[high].max() <= 0.51
    half = attention == attention[7, 20]
    alpha *= (attention[7, 20] - 0.1) / 0.5
    expected = (1 - alpha) * image + alpha * colorize(attention)
    assert 0 < alpha < 0.6 and np.abs(shown - expected)[half].max() <= 0.51
    assert (overlay(image, attention, 0, blend="map") == image).all()
    alone = overlay(image, attention, 1, blend="map", outline=0)
    assert (alone[high] == colorize(attention)[high]).all() and (alone[low] == image[low]).all()


def test_white_stays_white_where_a_map_is_low():
    white, attention = np.full((64, 64, 3), 255, np.uint8), np.zeros((8, 8))
    attention[2, 2] = 1
    shown = overlay(white, attention, blend="map")
    assert (
        (shown[32:] == 255).all() and (shown[:, 32:] == 255).all() and (shown[20, 20] < 255).any()
    )


@pytest.mark.parametrize("blend", ["even", "map"])
def test_the_outline_is_a_circle_at_half_height(blend):
    y, x = np.mgrid[:120, :160]
    distance = np.hypot(x - 80, y - 60)
    cone = np.clip(1 - distance / 80, 0, 1)  # 0.5 at a distance of 40 pixels
    image = np.full((120, 160, 3), 128, np.uint8)
    plain = overlay(image, cone, blend=blend, outline=0).astype(int)
    lined = overlay(image, cone, blend=blend, outline=2).astype(int)
    changed = (plain != lined).any(axis=2)
    away = np.abs(distance - 40)
    assert changed[away < 2.5].all() and not changed[away > 3.6].any()
    assert (lined[away < 0.5] > 240).all()  # light, ...
    assert (lined[(away > 2) & (away < 2.8)] < 120).all()  # ... with dark edges
    # one pixel wide by default, and wider in a large picture
    assert (overlay(image, cone, blend=blend) == overlay(image, cone, blend=blend, outline=1)).all()
    large = np.zeros((600, 800, 3), np.uint8)
    assert (overlay(large, cone, blend=blend) == overlay(large, cone, blend=blend, outline=2)).all()


def test_there_is_no_outline_where_the_map_does_not_cross_half_its_height():
    """A ridge that just misses it, and flat maps."""
    image = _image(40, 60)
    ridge = np.full((40, 60), 0.49)
    ridge[:, 30] = 0.4999
    ridge[0, 0], ridge[39, 59] = 0, 1
    plain, lined = (overlay(image, ridge, outline=width) for width in (0, 1))
    changed = np.argwhere((plain != lined).any(axis=2))
    assert len(changed) and (changed > (34, 54)).all()  # only around the one high value
    for flat in (np.zeros((7, 7)), np.full((3, 5), 0.3), np.full((4, 4), np.nan)):
        assert (overlay(image, flat) == overlay(image, flat, outline=0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2, 2), (3, 500)])
def test_overlays_of_any_size(size):
    for blend in ("even", "map"):
        assert overlay(_image(*size), np.eye(3), blend=blend).shape == (*size, 3)


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


def test_a_sheet_with_a_scale_is_drawn_larger_not_enlarged():
    images, maps = np.stack([_image(32, 32, 1), _image(32, 32, 2)]), {"conv7": np.eye(8)[None]}
    maps["conv7"] = np.stack([np.eye(8), np.eye(8)[::-1]])
    options = {"headings": {"conv7": "two\nlines"}, "blend": "map"}
    plain = attention_sheet(images, maps, ["one", "two"], **options)
    large = attention_sheet(images, maps, ["one", "two"], scale=3, **options)
    assert large.shape == (3 * plain.shape[0], 3 * plain.shape[1], 3)
    reduced = np.asarray(Image.fromarray(large).reduce(3))
    assert np.abs(reduced.astype(int) - plain).mean() < 3  # things are at their places
    enlarged = plain.repeat(3, axis=0).repeat(3, axis=1)
    text = slice(0, 3 * 60)
    assert (large[text] != enlarged[text]).any()  # letters have more detail
    side = enlarge(images[0], 128).shape[0] * 3
    top, left = np.argwhere((large == images[0][0, 0]).all(axis=2))[0]
    assert (large[top : top + side, left : left + side] == enlarge(images[0], side)).all()
    picture = overlay(enlarge(images[0], side), maps["conv7"][0], blend="map", outline=3)
    starts = np.argwhere((large == picture[0, 0]).all(axis=2))
    found = [np.array_equal(large[y : y + side, x : x + side], picture) for y, x in starts]
    assert sum(found) == 1


def test_a_larger_picture_has_the_photos_own_pixels():
    photo = _image(900, 1200)
    assert (shown(photo, 224, 400, scale=3) == photo).all()
    assert shown(photo, 224, 1024, scale=2).shape == (1536, 2048, 3)
    assert (shown(_image(50, 80), 224, 400, scale=2) == enlarge(_image(50, 80), 500)).all()


def test_the_legend_says_what_is_drawn():
    assert legend_notes(0.5, "even")[0] == (
        "each map from its own lowest to its own highest value; outlined at half height; "
        "flat maps in one medium color"
    )
    assert "clear where it is low" in legend_notes(0.5, "map")[0]
    assert not any("outline" in note for note in legend_notes(1, "even") + legend_notes(0, "map"))


# ---- files --------------------------------------------------------------------------------------


def _pdf_parts(content):
    """(width, height) of the page of a PDF in points, and its picture."""
    box = re.search(rb"/MediaBox \[ 0 0 (\S+) (\S+) \]", content)
    start = content.index(b"stream\n", content.index(b"/DCTDecode")) + len(b"stream\n")
    image = Image.open(io.BytesIO(content[start : content.index(b"endstream", start)]))
    return tuple(map(float, box.groups())), np.asarray(image)


@pytest.mark.parametrize("scale", [1, 3])
def test_pictures_keep_their_colors_and_their_size_on_paper(scale):
    sheet = attention_sheet(
        np.stack([_image(32, 32)]), {"conv7": np.eye(8)[None]}, ["a title"], scale=scale
    )
    inches = np.array(sheet.shape[1::-1]) / (144 * scale)
    png = Image.open(io.BytesIO(picture_bytes(sheet, "png", scale)))
    assert (np.asarray(png) == sheet).all()
    jpg = Image.open(io.BytesIO(picture_bytes(sheet, "jpg", scale)))
    points, in_pdf = _pdf_parts(picture_bytes(sheet, "pdf", scale))
    assert jpg.size == png.size == in_pdf.shape[1::-1]
    for pixels in (np.asarray(jpg), in_pdf):
        assert np.abs(pixels.astype(int) - sheet).mean() < 2
    # the frames are red against green in neighboring pixels: no color is halved
    edge = np.zeros((16, 16, 3), np.uint8)
    edge[:, ::2, 0] = edge[:, 1::2, 1] = 255
    stored = np.asarray(Image.open(io.BytesIO(picture_bytes(edge, "jpg"))))
    assert np.abs(stored.astype(int) - edge).max() < 60
    assert np.array(points) / 72 == pytest.approx(inches)
    for image in (png, jpg):
        assert np.array(image.size) / image.info["dpi"] == pytest.approx(inches, rel=1e-3)


def test_own_pictures_are_known_in_each_format_and_others_are_not(tmp_path):
    pixels = _image(20, 30)
    for name in FORMATS:
        own, other = tmp_path / f"own.{name}", tmp_path / f"other.{name}"
        own.write_bytes(picture_bytes(pixels, name))
        Image.fromarray(pixels).save(other)
        assert is_own_picture(own) and not is_own_picture(other)
        assert picture_bytes(pixels, name) == own.read_bytes()  # the same file for the same picture
    Image.fromarray(pixels).save(tmp_path / "said.jpg", comment="learn-to-pay-attention, and more")
    Image.fromarray(pixels).save(tmp_path / "said.pdf", producer="another")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"learn-to-pay-attention")
    for name in ("said.jpg", "said.pdf", "empty.png", "text.png", "gone.png", "."):
        assert not is_own_picture(tmp_path / name)


def test_own_pictures_are_known_whatever_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow then refuses to open them
    for name in FORMATS:
        (tmp_path / name).write_bytes(picture_bytes(_image(100, 100), name))
        assert is_own_picture(tmp_path / name)


def test_a_picture_too_large_for_its_format_is_said():
    long = np.zeros((2, 65_501, 3), np.uint8)
    for name in ("jpg", "pdf"):
        with pytest.raises(UserError, match="65,501 x 2 pixels is too large for .*--format png"):
            picture_bytes(long, name)
    assert Image.open(io.BytesIO(png_bytes(long))).size == (65_501, 2)
