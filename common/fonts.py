"""Fonts for text in any script. The font that Pillow brings has English letters only: what it lacks
is drawn in a font of the system.

    font = TextFont(14)
    font.getlength("photo of a 猫")                                         # in pixels
    draw_text(draw, (20, 40), "photo of a 猫", (0, 0, 0), font, "ls")       # as ImageDraw.text

No table of a font file is read: Pillow draws a character that a font lacks as the font's sign for
"missing", and so it does U+10FFFF, which no font has.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import time
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import ImageDraw, ImageFont

from common.errors import printable

ENDINGS = (".ttf", ".otf", ".ttc", ".otc")
# Fonts to try first, by the beginning of their file names without spaces, hyphens and underscores:
# those of Linux distributions, macOS and Windows with many letters, or those of a widely used
# script, that read well at 14 pixels.
KNOWN = (
    *("dejavusans.", "notosansregular", "notosanscjk", "sourcehansans", "notosanssc"),
    *("wqymicrohei", "wqyzenhei", "droidsansfallback", "liberationsansregular", "freesans."),
    *("notosansarabic", "notosanshebrew", "notosansdevanagari", "notosansthai", "unifont."),
    *("pingfang", "hiraginosansgb", "applesdgothicneo", "arialunicode", "geneva"),
    *("segoeui.", "msyh.", "msyhl.", "simsun", "yugothm", "meiryo.", "malgun.", "nirmala."),
    *("arial.", "tahoma.", "verdana."),
)
# Parts of the names of fonts that draw a sign or nothing for each character.
NO_LETTERS = ("lastresort", "blank", "wingdings", "webdings", "dingbats")
# Parts of the names of fonts that are tried last.
STYLES = (
    *("bold", "italic", "oblique", "black", "thin", "light", "condensed", "narrow"),
    *("mono", "math"),
)
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode categories
MISSING = "\U0010ffff"  # no character, by definition
LEFT_TO_RIGHT = "\u200e"  # an invisible mark
CHECK_SIZE = 24  # pixels: the signs of most scripts differ
# Seconds that a process looks through unknown fonts, in all. A thousand take a quarter of a second
# from memory; a network drive should not delay a run.
SEARCH_SECONDS = 5.0
SHOWN_LETTERS = 8  # missing letters that a note names, at most

# What has the letters, by the first word of their Unicode names: a font, and its package.
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "IDEOGRAPHIC")
EUROPEAN = ("LATIN", "GREEK", "CYRILLIC")
FONT_OF = {
    **dict.fromkeys(EAST_ASIAN, "Noto Sans CJK (Debian, Ubuntu: fonts-noto-cjk)"),
    **dict.fromkeys(EUROPEAN, "DejaVu Sans (Debian, Ubuntu: fonts-dejavu-core)"),
}
OTHER_FONT = "Noto Sans (Debian, Ubuntu: fonts-noto-core)"


# ---- one font -----------------------------------------------------------------------------------


class Face:
    """A font at all sizes. ``open_at(size)`` opens it; it may raise OSError."""

    def __init__(self, open_at: Callable[[int], ImageFont.FreeTypeFont]):
        self.at = functools.cache(open_at)
        self._has: dict[str, bool] = {}

    def has(self, characters: Iterable[str]) -> bool:
        """Whether it draws all these characters; False if it cannot be read."""
        for character in characters:
            if character not in self._has:
                self._has[character] = self._draws(character)
            if not self._has[character]:
                return False
        return True

    def _draws(self, character: str) -> bool:
        try:
            look = self._look(character)
            # a font may have an empty glyph for each character that it does not draw
            return any(look[0]) and look != self._missing
        except (OSError, ValueError):  # damaged, or of bitmaps of other sizes
            return False

    @functools.cached_property
    def _missing(self) -> tuple[bytes, tuple[int, int], float]:
        return self._look(MISSING)

    def _look(self, character: str) -> tuple[bytes, tuple[int, int], float]:
        mask = self._simple.getmask(character)
        return bytes(mask), mask.size, self._simple.getlength(character)

    @functools.cached_property
    def _simple(self) -> ImageFont.FreeTypeFont:
        """Without a layout engine, which may draw something else for what the font lacks."""
        return self.at(CHECK_SIZE).font_variant(layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def default_face() -> Face:
    """The font that Pillow brings."""
    return Face(ImageFont.load_default)


@functools.cache
def named_face(*names: str) -> Face:
    """The first of these font files that the system has, or else the font that Pillow brings."""
    for name in names:
        try:
            ImageFont.truetype(name, CHECK_SIZE)
        except OSError:
            continue
        return Face(functools.partial(ImageFont.truetype, name))
    return default_face()


def faces_in(path: Path) -> Iterator[Face]:
    """The fonts of a file: a collection (.ttc, .otc) has several. None of a damaged file."""
    count = _count(path)
    for index in range(count):
        face = Face(functools.partial(ImageFont.truetype, str(path), index=index))
        try:
            face.at(CHECK_SIZE)
        except (OSError, ValueError):
            continue
        yield face


def _count(path: Path) -> int:
    """How many fonts a file says it has."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return 0
    # a damaged file may name any number
    return min(64, int.from_bytes(start[8:12], "big")) if start[:4] == b"ttcf" else 1


# ---- the fonts of the system --------------------------------------------------------------------


def font_folders() -> list[Path]:
    """The usual font folders of Linux, macOS and Windows, the system's and the user's."""
    home, environment = os.path.expanduser("~"), os.environ
    if sys.platform == "win32":
        local = environment.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
        return [
            Path(environment.get("WINDIR") or r"C:\Windows", "Fonts"),
            Path(local, "Microsoft", "Windows", "Fonts"),
        ]
    if sys.platform == "darwin":
        # newer systems download PingFang into the last one
        return [
            Path(home, "Library", "Fonts"),
            Path("/Library/Fonts"),
            Path("/System/Library/Fonts"),
            Path("/System/Library/AssetsV2"),
        ]
    data = environment.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share")
    shared = environment.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [
        Path(data, "fonts"),
        Path(home, ".fonts"),
        *(Path(folder, "fonts") for folder in shared.split(":") if folder),
        Path("/usr/local/share/fonts"),
        Path("/usr/share/fonts"),
        Path("/run/current-system/sw/share/X11/fonts"),  # NixOS
    ]


class SystemFonts:
    """The fonts in some folders, by the characters that they have.

    Files are opened as characters ask for them: well-known fonts first, then all others, for at
    most SEARCH_SECONDS.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self.nowhere: set[str] = set()  # characters that no font has
        self.seconds_left = SEARCH_SECONDS

    @functools.cached_property
    def files(self) -> list[Path]:
        """Font files, the best known first."""
        found = {}
        for folder in dict.fromkeys(self.folders):
            for parent, _, names in os.walk(folder):
                found |= {Path(parent, n): None for n in names if n.lower().endswith(ENDINGS)}
        return sorted(
            (path for path in found if not any(word in _plain(path) for word in NO_LETTERS)),
            key=lambda path: (_rank(path), str(path)),
        )

    @functools.cached_property
    def faces(self) -> list[Face]:
        """The fonts in use: the well-known ones, and others that had what these lack."""
        known = [path for path in self.files if _rank(path)[0] < len(KNOWN)]
        return [face for path in known for face in faces_in(path)]

    def look_for(self, characters: Iterable[str]) -> set[str]:
        """Look for fonts that have these characters. Returns those that no font has."""
        wanted = {c for c in characters if c not in self.nowhere}
        missing = {c for c in wanted if not any(face.has(c) for face in self.faces)}
        if missing:
            self._search_others(missing)
        return self.nowhere.intersection(characters)

    def _search_others(self, missing: set[str]) -> None:
        """Add fonts beyond the well-known ones until they have all of ``missing``; what is left
        of it is nowhere."""
        start = time.monotonic()
        for path in self.files:
            if not missing or time.monotonic() - start > self.seconds_left:
                break
            if _rank(path)[0] < len(KNOWN):
                continue
            for face in faces_in(path):
                had = {c for c in missing if face.has(c)}
                if had:
                    self.faces.append(face)
                    missing -= had
        self.seconds_left -= time.monotonic() - start
        self.nowhere |= missing


def _plain(path: Path) -> str:
    return path.name.lower().translate({ord(c): None for c in " -_"})


def _rank(path: Path) -> tuple[int, bool]:
    """The place in KNOWN, upright fonts of normal weight before others."""
    name = _plain(path)
    known = (place for place, start in enumerate(KNOWN) if name.startswith(start))
    styled = any(word in name for word in STYLES)
    return (len(KNOWN) if styled else next(known, len(KNOWN))), styled


@functools.cache
def system_fonts() -> SystemFonts:
    return SystemFonts(font_folders())


# ---- text ---------------------------------------------------------------------------------------


class TextFont:
    """The font of a size for text in any script: ``face``, by default the one that Pillow brings,
    and for a text with characters that it lacks one of ``fonts`` (the system's) that has them all.
    If no font has all, each part of the text has its own."""

    def __init__(self, size: int, face: Face | None = None, fonts: SystemFonts | None = None):
        self.size = size
        self.face = face or default_face()
        self.fonts = fonts or system_fonts()

    def getlength(self, text: str) -> float:
        """The width of a text in pixels."""
        return sum(font.getlength(part) for part, font in self.parts(text))

    def parts(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text as it is drawn, in parts of one font each. A letter that no font has loses its
        accent."""
        text = as_drawn(text)
        face = self.face_of(text)
        if not face:
            lacking = self.lacking(text)
            text = "".join(unaccented(c) if c in lacking else c for c in text)
        # words from right to left stand alone: not every font has the marks around them
        words = text.split(LEFT_TO_RIGHT)
        parts = [[(word, face)] if face else self._faces_of(word) for word in words if word]
        fonts = [(part, self.open(face)) for word in parts for part, face in word]
        return [(_without_marks(part, font), font) for part, font in fonts]

    def _faces_of(self, text: str) -> list[tuple[str, Face]]:
        """A text in parts of one font each."""
        parts: list[tuple[str, Face]] = []
        for character in text:
            # first the font before it, so that a word has one
            face = self.face_of(character, *(face for _, face in parts[-1:])) or self.face
            if parts and parts[-1][1] is face:
                parts[-1] = parts[-1][0] + character, face
            else:
                parts.append((character, face))
        return parts

    def face_of(self, text: str, *first: Face) -> Face | None:
        """A font that has all the characters of a text; ``first`` are tried first."""
        characters = with_ink(text)
        for face in (*first, self.face, default_face()):
            if face.has(characters):
                return face
        self.fonts.look_for(characters)
        return next((face for face in self.fonts.faces if face.has(characters)), None)

    def lacking(self, text: str) -> set[str]:
        """The characters that no font has."""
        others = {c for c in with_ink(text) if not (self.face.has(c) or default_face().has(c))}
        return self.fonts.look_for(others)

    def open(self, face: Face) -> ImageFont.FreeTypeFont:
        try:
            return face.at(self.size)
        except (OSError, ValueError):  # of bitmaps of other sizes
            return default_face().at(self.size)


def font_for(text: str, size: int, fonts: SystemFonts | None = None) -> ImageFont.FreeTypeFont:
    """A font that has all the characters of a text: the one that Pillow brings, else one of
    ``fonts`` (the system's). If none has all, one that has the most."""
    font, characters = TextFont(size, fonts=fonts), with_ink(as_drawn(text))
    candidates = (font.face_of(text), font.face, *font.fonts.faces)
    return font.open(max(filter(None, candidates), key=lambda face: sum(map(face.has, characters))))


def draw_text(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    ink: tuple[int, int, int],
    font: TextFont,
    anchor: str = "ls",
) -> None:
    """Draw a line of text, as ImageDraw.text does. anchor: l, m or r (left, middle, right) and m or
    s (middle, baseline)."""
    parts = font.parts(text)
    if not parts:
        return
    if len(parts) == 1:
        draw.text(xy, parts[0][0], ink, parts[0][1], anchor)
        return
    (x, y), length = xy, font.getlength(text)
    x -= {"l": 0.0, "m": length / 2, "r": length}[anchor[0]]
    if anchor[1] == "m":  # halfway between the highest and the lowest of the first font
        ascent, descent = parts[0][1].getmetrics()
        y += (ascent - descent) / 2
    for part, part_font in parts:
        draw.text((x, y), part, ink, part_font, "ls")
        x += part_font.getlength(part)


def as_drawn(text: str) -> str:
    """The text with each letter and its accents as one character where there is one: macOS has file
    names of several."""
    return text if text.isascii() else _in_order(unicodedata.normalize("NFC", text))


def _without_marks(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text without what only a layout engine knows as invisible."""
    if text.isascii() or font.layout_engine != ImageFont.Layout.BASIC:
        return text
    return "".join(c for c in text if unicodedata.category(c) != "Cf" and not is_selector(c))


def _in_order(text: str) -> str:
    """The text with invisible marks around words that are written from right to left: the numbers
    and signs beside them would change sides."""
    kinds = "".join(map(_direction, text))
    runs = list(re.finditer("R(?:[Rm ]*[Rm])?", kinds))
    if not runs:
        return text
    ends = [0, *(end for run in runs for end in run.span()), len(text)]
    return LEFT_TO_RIGHT.join(text[start:end] for start, end in itertools.pairwise(ends))


def _direction(character: str) -> str:
    """R: of a script from right to left; m: a mark on a letter; a space; or something else."""
    kind = unicodedata.bidirectional(character)
    return {"R": "R", "AL": "R", "NSM": "m", "WS": " "}.get(kind, "o")


def with_ink(text: str) -> list[str]:
    """The characters of a text that a font has to have: no spaces, no invisible marks."""
    return [
        character
        for character in dict.fromkeys(text)
        if unicodedata.category(character) not in INVISIBLE and not is_selector(character)
    ]


def is_selector(character: str) -> bool:
    """Whether it chooses a variant of the character before it."""
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def unaccented(text: str) -> str:
    """Letters without their accents: é -> e."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c)) or text


# ---- lines --------------------------------------------------------------------------------------


def shorten(text: str, font: ImageFont.FreeTypeFont | TextFont, width: float) -> str:
    """The text on one line, its end replaced by "..." if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep and font.getlength(text[:keep].rstrip() + "...") > width:
        keep -= 1
    return text[:keep].rstrip() + "..."


def wrap(
    text: str, font: ImageFont.FreeTypeFont | TextFont, width: float, most: int | None = None
) -> list[str]:
    """A text in lines of at most ``width`` pixels, at most ``most`` of them. They end after a
    space, or within a word that is wider. Together they are the text, or its beginning and
    "..."."""
    lines: list[str] = []
    while text:
        count = _fitting(text, font, width)
        if count < len(text):
            if len(lines) + 1 == most:
                count = _fitting(text, font, width, "...")
                return [*lines, text[:count].rstrip() + "..."]
            space = text.rfind(" ", 0, count + 1) + 1
            # a shorter line may have another font, and be wider
            if space and font.getlength(text[:space].rstrip()) <= width:
                count = space
        lines.append(text[:count])
        text = text[count:]
    return lines


def _fitting(
    text: str, font: ImageFont.FreeTypeFont | TextFont, width: float, end: str = ""
) -> int:
    """How many characters of a text fit into ``width`` pixels, with ``end`` behind them; at least
    1."""

    def length(count: int) -> float:
        return font.getlength(text[:count].rstrip() + end)

    counts = range(1, min(len(text), int(width)) + 1)  # a character has at least a pixel
    count = max(1, bisect_right(counts, width, key=length))
    # one character more may change the font of those before it, and make them narrower
    while count > 1 and length(count) > width:
        count -= 1
    return count


# ---- names that cannot be drawn -----------------------------------------------------------------


def drawable_names(
    names: Sequence[str], word: str = "class", fonts: SystemFonts | None = None
) -> tuple[list[str], str | None]:
    """Names as a picture can show them, on one line: one with a letter that no font has becomes
    ``word`` and its number from 0, as in "class 17". And a note on what is missing and what to
    install, for the caller to print once; None if nothing is."""
    font = TextFont(CHECK_SIZE, fonts=fonts)
    names = [printable(name) for name in names]
    lacking = font.lacking("".join(map(as_drawn, names)))
    lacking -= {c for c in lacking if not font.lacking(unaccented(c))}
    bad = [number for number, name in enumerate(names) if lacking.intersection(as_drawn(name))]
    if not bad:
        return names, None
    shown = list(names)
    for number in bad:
        shown[number] = f"{word} {number}"
    return shown, note_on(lacking, len(bad), len(names), shown[bad[0]])


def note_on(lacking: set[str], bad: int, count: int, example: str) -> str:
    """What is missing, and what to install: ``bad`` of ``count`` names have letters that no font
    has, those of ``lacking``."""
    letters = sorted(lacking)
    named = " ".join(letters[:SHOWN_LETTERS])
    if len(letters) > SHOWN_LETTERS:
        named += f" and {len(letters) - SHOWN_LETTERS:,} more"
    installed = dict.fromkeys(FONT_OF.get(_script(letter), OTHER_FONT) for letter in letters)
    if count == 1:
        names = f'the name is "{example}"'
    else:
        others = " and so on" if bad > 1 else ""
        names = f'{bad:,} of {count:,} names are "{example}"{others}'
    return (
        f"no font here has {named}: in the pictures {names}. "
        f"To see the letters, install {', '.join(installed)}"
    )


def _script(letter: str) -> str:
    """The first word of a character's Unicode name: LATIN, CJK, ..."""
    return unicodedata.name(letter, "").split(" ")[0]
