"""The files that cam.py writes: formats, sizes, long names, predictions.csv."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from explain.output import (
    MAX_SIDE,
    PREDICTION_FIELDS,
    Overview,
    Picture,
    Prediction,
    Writer,
    file_name_part,
    images_in,
    peak_pixel,
    write_csv,
    write_predictions,
)
from explain.pictures import (
    FORMATS,
    attention_sheet,
    enlarge,
    is_own_picture,
    overlay,
    picture_bytes,
)

LAYER = "gradcam-encoder.layers.encoder_layer_11.ln_1"


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(out, picture, maps, inputs=(), **options):
    """The names of the files that a new writer adds, and the stem that it gives."""
    before = set(os.listdir(out)) if out.exists() else set()
    writer = Writer(out, inputs, raw=False, opacity=0.5, colors="inferno", **options)
    stem = writer.write_image(picture, maps, {}, "a title")
    return set(os.listdir(out)) - before, stem


# ---- formats and sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_run_replaces_its_own_pictures_and_no_others(tmp_path, name):
    picture, maps = Picture("photo", "photo", noise(32, 32)), {"cam": np.eye(4)}
    names = {f"photo-cam.{name}", f"photo-sheet.{name}"}
    assert write(tmp_path, picture, maps, picture_format=name) == (names, "photo")
    first = (tmp_path / f"photo-cam.{name}").read_bytes()
    assert write(tmp_path, picture, {"cam": np.eye(5)[::-1]}, picture_format=name)[0] == set()
    assert (tmp_path / f"photo-cam.{name}").read_bytes() != first
    Image.fromarray(noise(8, 8)).save(tmp_path / f"photo-sheet.{name}")
    users = (tmp_path / f"photo-sheet.{name}").read_bytes()
    assert write(tmp_path, picture, maps, picture_format=name)[1] == "photo-2"
    assert (tmp_path / f"photo-sheet.{name}").read_bytes() == users
    # an input of the run is never replaced, also with our mark in it
    (tmp_path / f"own-cam.{name}").write_bytes(picture_bytes(noise(8, 8), name))
    inputs = [tmp_path / f"own-cam.{name}"]
    picture = Picture("own", "own", noise(32, 32))
    assert write(tmp_path, picture, maps, inputs, picture_format=name)[1] == "own-2"


def test_own_pictures_of_each_format_are_no_inputs(tmp_path, capsys):
    for name in FORMATS:
        write(tmp_path, Picture("a", "a", noise(32, 32)), {"cam": np.eye(4)}, picture_format=name)
    Image.fromarray(noise(8, 8)).save(tmp_path / "photo.jpg")
    assert images_in(tmp_path) == [tmp_path / "photo.jpg"]
    out = capsys.readouterr().out
    assert out == f"{tmp_path}: passed over 6 of cam.py's own pictures\n"
    Image.fromarray(noise(8, 8)).save(tmp_path / "paper.pdf")
    images_in(tmp_path)
    assert "passed over 1 of 8 names without an ending of an image" in capsys.readouterr().out


def test_a_scale_multiplies_pictures_and_sheets(tmp_path):
    photo, maps = noise(240, 300), {"cam": np.random.default_rng(1).random((7, 7))}
    sizes = {}
    for scale in (1, 3):
        options = {"blend": "map", "scale": scale}
        write(tmp_path / str(scale), Picture("p", "p", photo), maps, **options)
        for kind in ("cam", "sheet"):
            with Image.open(tmp_path / str(scale) / f"p-{kind}.png") as image:
                sizes[kind, scale] = np.array(image.size)
    assert (sizes["cam", 1] == (300, 240)).all()
    for kind in ("cam", "sheet"):
        assert (sizes[kind, 3] == 3 * sizes[kind, 1]).all()
    drawn = np.asarray(Image.open(tmp_path / "3" / "p-cam.png"))
    assert (drawn == overlay(enlarge(photo, 720), maps["cam"], blend="map")).all()
    large = noise(20, 2 * MAX_SIDE)  # as cam.py gives it for this scale: shown at its own pixels
    write(tmp_path / "own", Picture("p", "p", large), maps, scale=2)
    drawn = np.asarray(Image.open(tmp_path / "own" / "p-cam.png"))
    assert (drawn == overlay(large, maps["cam"])).all()


def test_a_sheet_of_many_maps_has_rows_that_each_begin_with_the_input(tmp_path):
    draw = np.random.default_rng(2)
    photo, maps = noise(224, 224), {f"m{number}": draw.random((7, 7)) for number in range(13)}
    write(tmp_path, Picture("p", "p", photo), maps)
    sheet = np.asarray(Image.open(tmp_path / "p-sheet.png")).astype(int)
    places = []  # of the upper left corner, by the exact pixels
    for picture in (photo, *(overlay(photo, each) for each in maps.values())):
        starts = np.argwhere((sheet == picture[0, 0]).all(2))
        found = [
            (y, x)
            for y, x in starts
            if (sheet[y : y + 224, x : x + 224].shape == picture.shape)
            and (sheet[y : y + 224, x : x + 224] == picture).all()
        ]
        places.append(found)
    rows = [y for y, _ in places[0]]
    assert len(rows) == 3 and all(len(found) == 1 for found in places[1:])
    assert [y for ((y, _),) in places[1:]] == [rows[0]] * 5 + [rows[1]] * 5 + [rows[2]] * 3
    assert places[1][0][1] == places[6][0][1] == places[11][0][1] > places[0][0][1]


def test_the_sheet_of_a_selection_has_the_scale_and_the_format(tmp_path):
    overview = Overview()
    for seed in range(2):
        picture = Picture(f"{seed}", f"{seed}", noise(32, 32, seed))
        overview.add(picture, {"cam": np.eye(4)}, f"title {seed}")
    options = {"raw": False, "opacity": 0.4, "colors": "turbo", "blend": "map", "scale": 2}
    Writer(tmp_path, [], **options, picture_format="png").write_overview("set", overview)
    expected = attention_sheet(
        np.stack(overview.pixels),
        {"cam": np.stack([np.eye(4)] * 2)},
        overview.titles,
        opacity=0.4,
        color_map="turbo",
        blend="map",
        scale=2,
    )
    assert (np.asarray(Image.open(tmp_path / "set-sheet.png")) == expected).all()
    Writer(tmp_path, [], **options, picture_format="pdf").write_overview("set", overview)
    assert is_own_picture(tmp_path / "set-sheet.pdf")
    with pytest.raises(ValueError, match="unknown format 'gif'"):
        Writer(tmp_path, [], **options, picture_format="gif")


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["n", "é", "猫", "\U0001f426", os.fsdecode(b"\xe9")])
def test_names_as_long_as_a_file_system_takes(tmp_path, letter):
    """Two that differ in their last letter only, whatever each letter's number of bytes."""
    count = 251 // len(os.fsencode(letter))
    stems = [letter * (count - 1) + last for last in "ab"]
    maps = {LAYER: np.eye(4), f"{LAYER}-2": np.eye(4)}
    written = []
    for stem in stems:
        names, _ = write(tmp_path, Picture(stem, stem, noise(8, 8)), maps)
        again, _ = write(tmp_path, Picture(stem, stem, noise(8, 8, 1)), maps)
        assert not again  # the second run has the same names
        written.append(names)
    assert len(written[0] | written[1]) == 6
    assert max(len(os.fsencode(name)) for name in os.listdir(tmp_path)) < 255


def test_long_names_of_maps_are_cut_and_stay_different(tmp_path):
    maps = {"block." * 60 + last: np.eye(4) for last in "ab"} | {"a/b": np.eye(4)}
    names, _ = write(tmp_path, Picture("p", "p", noise(8, 8)), maps)
    assert len(names) == 4 and "p-a_b.png" in names
    assert write(tmp_path, Picture("n" * 300, "n" * 300, noise(8, 8)), maps)[0]
    writer = Writer(tmp_path, [], raw=True, opacity=0.5, colors="inferno")
    for _ in range(11):  # with two digits behind it
        stem = writer.write_image(
            Picture("m" * 300, "m" * 300, noise(8, 8)), {LAYER: np.eye(4)}, {}, ""
        )
    assert stem.endswith("-11") and len(os.listdir(tmp_path)) == 4 + 4 + 3 * 11


def test_short_names_stay_as_they_are():
    assert file_name_part("photo", 5) == "photo"
    cut = file_name_part("photos of cats and dogs", 20)
    assert cut.startswith("photos of c-") and len(cut) == 20
    assert file_name_part("猫" * 100, 50).startswith("猫" * 13 + "-")  # no half letter


# ---- predictions.csv ----------------------------------------------------------------------------


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_a_line_per_image(tmp_path):
    best = [(f"class {n}", 0.5**n) for n in range(1, 8)]
    path = write_predictions(
        tmp_path / "predictions.csv",
        [
            Prediction("a.png", "cat", best, {"conv7": (3, 4), "cam": None}),
            Prediction("b.png", None, best[:2], {"conv7": (0, 0), "layer4": (7, 9)}),
        ],
    )
    first, second = rows_of(path)
    assert list(first) == [
        *PREDICTION_FIELDS,
        *(f"peak_{name}_{axis}" for name in ("conv7", "cam", "layer4") for axis in "xy"),
    ]
    assert first["file"] == "a.png" and first["class"] == "cat" and second["class"] == ""
    assert [first[f"predicted_{n}"] for n in range(1, 6)] == [f"class {n}" for n in range(1, 6)]
    assert [first[f"probability_{n}"] for n in (1, 5)] == ["0.5", "0.0312"]
    assert second["predicted_2"] == "class 2" and second["predicted_3"] == ""
    assert second["probability_3"] == second["peak_cam_x"] == first["peak_layer4_y"] == ""
    assert (first["peak_conv7_x"], first["peak_conv7_y"], first["peak_cam_x"]) == ("3", "4", "")
    assert (second["peak_conv7_x"], second["peak_layer4_y"]) == ("0", "9")


def test_names_of_any_kind_are_written_safely(tmp_path):
    names = ['a,b".png', "line\nbreak.png", "x\udce9.png", "猫, é.png", "' ; \\.png"]
    path = write_predictions(
        tmp_path / "p.csv", [Prediction(name, name, [(name, 1.0)], {}) for name in names]
    )
    expected = ['a,b".png', r"line\nbreak.png", r"x\xe9.png", "猫, é.png", "' ; \\.png"]
    rows = rows_of(path)
    assert [row["file"] for row in rows] == expected == [row["class"] for row in rows]
    assert [row["predicted_1"] for row in rows] == expected


def test_predictions_replace_their_own_and_no_table_of_the_users(tmp_path):
    path = tmp_path / "predictions.csv"
    one = Prediction("a.png", None, [("cat", 1.0)], {"cam": (1, 2)})
    assert write_predictions(path, [one]) == path
    other = one._replace(peaks={"conv7, of a\nlayer": (3, 4)})
    assert write_predictions(path, [other]) == path  # with other maps
    assert rows_of(path)[0]["peak_conv7, of a\nlayer_x"] == "3"
    for users in (
        path.read_text().replace("probability_5", "probability_5,my notes"),
        "file,class\na.png,cat\n",
        ",".join(PREDICTION_FIELDS),  # cut short
        "\0",
    ):
        path.write_text(users)
        assert write_predictions(path, [one]) == tmp_path / "predictions-2.csv"
        assert path.read_text() == users
    path.unlink()
    os.mkfifo(path)  # opening it would wait
    assert write_predictions(path, [one]) == tmp_path / "predictions-2.csv"


def test_a_table_replaces_one_of_the_same_columns(tmp_path):
    rows = [{"map": "cam", "share": 0.123456}]
    assert write_csv(tmp_path / "m.csv", rows) == write_csv(tmp_path / "m.csv", rows)
    assert (tmp_path / "m.csv").read_text() == "map,share\ncam,0.1235\n"
    assert write_csv(tmp_path / "m.csv", [{"map": "cam"}]) == tmp_path / "m-2.csv"


# ---- peaks --------------------------------------------------------------------------------------


def test_the_peak_is_the_center_of_the_highest_pixel_in_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 40, 2)
        values = rng.random((height, width)) if height * width > 1 else np.ones((1, 2))
        x0, y0 = rng.integers(0, 500, 2)
        x1, y1 = x0 + rng.integers(1, 900), y0 + rng.integers(1, 900)
        row, column = np.unravel_index(values.argmax(), values.shape)
        if np.ptp(values) == 0:
            continue
        x, y = peak_pixel(values, (x0, y0, x1, y1))
        assert x == int(x0 + (column + 0.5) * (x1 - x0) / values.shape[1]) and x0 <= x < x1
        assert y == int(y0 + (row + 0.5) * (y1 - y0) / values.shape[0]) and y0 <= y < y1


def test_of_several_highest_pixels_the_one_nearest_to_their_mean_is_the_peak():
    values = np.zeros((9, 9))
    values[2, 2:7] = 1  # the middle of a bar
    assert peak_pixel(values, (0, 0, 9, 9)) == (4, 2)
    values[:] = 0
    values[4, 0] = values[4, 8] = values[3, 3] = 1  # their mean, near (4, 4), is low
    assert peak_pixel(values, (0, 0, 9, 9)) == (3, 3)
    enlarged = np.full((5, 5), 0.2)
    enlarged[1:4, 1:4] = 1 + 1e-9 * np.random.default_rng(0).random((3, 3))  # rounding
    assert peak_pixel(enlarged, (0, 0, 5, 5)) == (2, 2)


def test_a_map_without_a_peak_has_none():
    for values in (
        np.zeros((4, 4)),
        np.full((4, 4), 0.25),
        np.full((3, 3), np.nan),
        np.full((4, 4), 1 / 1024) * (1 + 1e-6 * np.random.default_rng(0).random((4, 4))),
    ):
        assert peak_pixel(values, (0, 0, 10, 10)) is None
    values = np.zeros((4, 4), np.float32)
    values[0, 3], values[2, 2] = np.nan, 0.5
    assert peak_pixel(values, (10, 20, 14, 24)) == (12, 22)
