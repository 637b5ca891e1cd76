"""Fonts for text in any script, and what is said of letters that no font has. The fonts are made by
hand: those of the system may be any."""

import os
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common import fonts
from common.fonts import (
    Face,
    SystemFonts,
    TextFont,
    as_drawn,
    default_face,
    draw_text,
    drawable_names,
    faces_in,
    font_folders,
    font_for,
    shorten,
    unaccented,
    with_ink,
    wrap,
)
from tests.helpers.fonts import collection_bytes, font_bytes, write_font

CAT, DOG, BIRD = "猫犬鳥"
INK = (0, 0, 0)


@pytest.fixture
def none(tmp_path):
    return SystemFonts([tmp_path / "gone"])


def drawn(draw):
    """The picture (60, 300) that ``draw`` draws, black on white; True where there is ink."""
    image = Image.new("L", (300, 60), 255)
    draw(ImageDraw.Draw(image))
    return np.asarray(image) < 128


def drawn_text(text, font, xy=(10, 40), anchor="ls"):
    return drawn(lambda draw: draw_text(draw, xy, text, 0, font, anchor))


# ---- which font ---------------------------------------------------------------------------------


def test_the_font_of_pillow_has_english_and_no_more():
    face = default_face()
    assert all(map(face.has, "ABCXYZabcxyz0123456789.,:;%()+-'\"/_"))
    for letter in f"éßЖΩ{CAT}अ\U0001f408\udce9":
        assert not face.has(letter)
        # Pillow draws the same sign for each of them
        assert bytes(ImageFont.load_default(24).getmask(letter)) == bytes(
            ImageFont.load_default(24).getmask("\U0010ffff")
        )


def test_a_font_has_what_it_does_not_draw_as_missing(tmp_path):
    (face,) = faces_in(write_font(tmp_path / "a.ttf", f"{CAT}Ж"))
    assert face.has(f"{CAT}Ж") and not face.has(f"{CAT}Ж{DOG}") and not face.has("A")
    (tmp_path / "blank.ttf").write_bytes(font_bytes(CAT, missing=False))
    (face,) = faces_in(tmp_path / "blank.ttf")
    assert face.has(CAT) and not face.has(DOG)


def test_each_font_of_a_collection_counts(tmp_path):
    (tmp_path / "both.ttc").write_bytes(collection_bytes(font_bytes("ab"), font_bytes(CAT)))
    first, second = faces_in(tmp_path / "both.ttc")
    assert first.has("ab") and not first.has(CAT) and second.has(CAT) and not second.has("a")
    found = font_for(CAT, 30, SystemFonts([tmp_path]))
    mine = ImageFont.truetype(str(tmp_path / "both.ttc"), 30, index=1)
    assert bytes(found.getmask(CAT)) == bytes(mine.getmask(CAT))


def test_the_font_for_a_text_has_all_of_it(tmp_path):
    write_font(tmp_path / "a.ttf", CAT)
    write_font(tmp_path / "deep" / "er" / "two.OTF", f"{CAT}{DOG}abc")
    system = SystemFonts([tmp_path])
    for text, path in ((f"{CAT} {CAT}", "a.ttf"), (f"abc {DOG}{CAT}", "deep/er/two.OTF")):
        assert font_for(text, 14, system).path == str(tmp_path / path)
    assert font_for("plain text", 14, system).getname() == ImageFont.load_default(14).getname()
    # none has all: the one that has the most
    assert font_for(f"{CAT}{DOG}Ж", 14, system).path == str(tmp_path / "deep/er/two.OTF")


def test_well_known_fonts_come_first_and_upright_ones(tmp_path):
    for name in ("aaa.ttf", "NotoSansCJK-Bold.ttc", "Noto Sans CJK-Regular.ttc", "msyh.ttc"):
        write_font(tmp_path / name, CAT)
    write_font(tmp_path / "LastResort.otf", f"{CAT}{DOG}")  # draws a sign for each script
    system = SystemFonts([tmp_path])
    assert [path.name for path in system.files] == [
        "Noto Sans CJK-Regular.ttc",
        "msyh.ttc",
        "aaa.ttf",
        "NotoSansCJK-Bold.ttc",
    ]
    assert font_for(CAT, 14, system).path.endswith("Noto Sans CJK-Regular.ttc")
    assert system.look_for(CAT + DOG) == {DOG}


def test_damaged_fonts_are_passed_over(tmp_path):
    whole = font_bytes(CAT)
    rng = np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(whole[: rng.integers(len(whole))] if number % 2 else whole)
        for place in rng.integers(0, max(1, len(damaged)), 30 * (number % 2 == 0)):
            damaged[place] = rng.integers(256)
        (tmp_path / f"a{number}.ttf").write_bytes(damaged)
    (tmp_path / "b.ttf").write_bytes(b"")
    (tmp_path / "b.ttc").write_bytes(b"ttcf\0\1\0\0\xff\xff\xff\xff")
    (tmp_path / "c.ttf").mkdir()
    (tmp_path / "d.ttf").symlink_to("nowhere")
    write_font(tmp_path / "z.ttf", f"{CAT}{DOG}")
    assert font_for(CAT + DOG, 14, SystemFonts([tmp_path])).path == str(tmp_path / "z.ttf")


def test_a_font_that_has_other_sizes_only_is_not_used():
    def fixed(size):
        raise OSError("invalid pixel size")

    assert not Face(fixed).has("a")
    letters = TextFont(
        14, Face(lambda size: fixed(size) if size == 14 else default_face().at(size))
    )
    assert letters.getlength("abc") == ImageFont.load_default(14).getlength("abc")


def test_the_search_is_quick_and_happens_once(tmp_path, monkeypatch):
    source = write_font(tmp_path / "source.ttf", "Ж")
    for number in range(1500):
        os.link(source, tmp_path / f"x{number}.ttf")
    system, started = SystemFonts([tmp_path]), time.perf_counter()
    assert system.look_for(CAT) == {CAT}
    assert time.perf_counter() - started < 5
    opened = []
    monkeypatch.setattr(fonts, "faces_in", lambda path: opened.append(path) or [])
    assert system.look_for(CAT + CAT) == {CAT} and not opened
    system.seconds_left = 0.0  # used up: nothing more is opened
    assert system.look_for(DOG) == {DOG} and not opened


def test_the_usual_folders_and_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts.os.path, "expanduser", lambda path: str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS", "WINDIR", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for platform, expected in (
        ("linux", ["/usr/share/fonts", f"{tmp_path}/.local/share/fonts"]),
        ("darwin", ["/System/Library/Fonts", f"{tmp_path}/Library/Fonts"]),
        ("win32", [f"{tmp_path}/AppData/Local/Microsoft/Windows/Fonts"]),
    ):
        monkeypatch.setattr(fonts.sys, "platform", platform)
        assert {*expected} <= {path.as_posix() for path in font_folders()}


# ---- text ---------------------------------------------------------------------------------------


def test_english_is_drawn_as_before(none):
    font = TextFont(15, fonts=none)
    for anchor in ("ls", "ms", "rs", "lm", "rm"):
        expected = drawn(
            lambda draw, anchor=anchor: draw.text(
                (150, 30), "input 87 %", 0, ImageFont.load_default(15), anchor
            )
        )
        assert (drawn_text("input 87 %", font, (150, 30), anchor) == expected).all()
    assert drawn_text("in\u200dput\ufe0f", font).sum() == drawn_text("input", font).sum()
    assert not drawn_text("", font, anchor="lm").any() and font.getlength("") == 0
    assert font.getlength("input") == ImageFont.load_default(15).getlength("input")


def test_a_text_of_scripts_that_no_one_font_has_is_drawn_part_by_part(tmp_path):
    for name, characters in (("a", CAT + DOG), ("b", "ЖЯ")):
        write_font(tmp_path / f"{name}.ttf", characters)
    font = TextFont(20, fonts=SystemFonts([tmp_path]))
    assert [part for part, _ in font.parts(f"cat {CAT}{DOG} ЖЯ 5")] == [
        "cat ",
        f"{CAT}{DOG} ",
        "ЖЯ ",
        "5",
    ]
    text = f"cat {CAT}Ж"
    lengths = [
        ImageFont.load_default(20).getlength("cat "),
        *(
            ImageFont.truetype(str(tmp_path / f"{name}.ttf"), 20).getlength(letter)
            for name, letter in (("a", CAT), ("b", "Ж"))
        ),
    ]
    assert font.getlength(text) == pytest.approx(sum(lengths))
    left = drawn_text(text, font)
    expected = np.zeros_like(left)
    for part, x in zip(("cat ", CAT, "Ж"), 10 + np.cumsum([0, *lengths]), strict=False):
        expected |= drawn_text(part, font, (float(x), 40))
    assert (left == expected).all() and left.any()
    # the same at its middle and its right end
    end = 10 + sum(lengths)
    for x, anchor in ((10 + sum(lengths) / 2, "ms"), (end, "rs")):
        assert (drawn_text(text, font, (x, 40), anchor) == left).mean() > 0.99
    ascent, descent = ImageFont.load_default(20).getmetrics()
    assert (drawn_text(text, font, (10, 40 - (ascent - descent) / 2), "lm") == left).all()


def test_accents_join_their_letters_and_fall_where_no_font_has_them(tmp_path, none):
    write_font(tmp_path / "e.ttf", "caféx")
    joined = TextFont(14, fonts=SystemFonts([tmp_path])).parts("cafe\u0301")
    assert [part for part, _ in joined] == ["caf\u00e9"]
    assert TextFont(14, fonts=none).parts("cafe\u0301")[0][0] == "cafe"
    assert unaccented("Ångström crème brûlée") == "Angstrom creme brulee"
    assert unaccented("ø") == "ø" and unaccented("\u0301") == "\u0301"
    assert with_ink("a b\u200d\ufe0f\u00a0\tb") == ["a", "b"]


def test_what_stands_beside_words_from_right_to_left_stays_there(tmp_path):
    mark = "\u200e"
    assert as_drawn("بطريق, seen: قط أسود 37 %") == (
        f"{mark}بطريق{mark}, seen: {mark}قط أسود{mark} 37 %"
    )
    assert as_drawn("猫 é 37 %") == "猫 é 37 %"
    write_font(tmp_path / "a.ttf", "بطريق")
    write_font(tmp_path / "b.ttf", CAT)
    parts = TextFont(14, fonts=SystemFonts([tmp_path])).parts(f"{CAT} بطريق: 5")
    assert [part for part, _ in parts] == [f"{CAT} ", "بطريق", ": 5"]


def test_lines_fit_where_the_font_changes(tmp_path):
    write_font(tmp_path / "a.ttf", f"abcdefghij .{CAT}")
    font = TextFont(14, fonts=SystemFonts([tmp_path]))
    text = f"abc def ghij {CAT} abc " * 6
    for width in (40, 60, 100, 150):
        lines = wrap(text, font, width)
        assert "".join(lines) == text
        assert all(font.getlength(line.rstrip()) <= width for line in lines)
        cut = wrap(text, font, width, 2)
        assert len(cut) == 2 and font.getlength(cut[1]) <= width
        short = shorten(text, font, width)
        assert short.endswith("...") and font.getlength(short) <= width


# ---- names that cannot be drawn -----------------------------------------------------------------


def test_names_without_a_font_become_numbers_with_one_note(tmp_path, none):
    names = ["cat", CAT, "crème", f"{DOG} and {BIRD}", "two\nlines", "x\udce9"]
    shown, note = drawable_names(names, fonts=none)
    assert shown == ["cat", "class 1", "crème", "class 3", "two\\nlines", "x\\xe9"]
    assert note == (
        f"no font here has {' '.join(sorted(CAT + DOG + BIRD))}: in the pictures 2 of 6 names are "
        '"class 1" and so on. To see the letters, install Noto Sans CJK '
        "(Debian, Ubuntu: fonts-noto-cjk)"
    )
    write_font(tmp_path / "a.ttf", CAT + DOG + BIRD)
    assert drawable_names(names[:4], fonts=SystemFonts([tmp_path])) == (names[:4], None)
    assert drawable_names([], fonts=none) == ([], None)


def test_a_note_names_few_letters_and_a_font_for_each_script(none):
    shown, note = drawable_names([f"{'аЖЯбвгдеё'}क"], "image", none)
    assert shown == ["image 0"]
    assert "and 2 more: in the pictures the name is" in note
    assert "DejaVu Sans (Debian, Ubuntu: fonts-dejavu-core), Noto Sans (Debian" in note
