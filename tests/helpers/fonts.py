"""TrueType fonts made by hand: tests must not depend on those of the system."""

import struct
from pathlib import Path

EM = 1000  # units per em


def font_bytes(characters: str, missing: bool = True) -> bytes:
    """A TrueType font in which each of the characters is a bar, the later the wider, and any other
    a square; without ``missing`` any other is blank."""
    codes = sorted(set(map(ord, characters)))
    order = [characters.index(chr(code)) for code in codes]
    square = _box(800, 800) if missing else b""
    glyphs = [square, *(_box(100 + 40 * place, 700) for place in order)]
    offsets = [sum(map(len, glyphs[:n])) for n in range(len(glyphs) + 1)]
    count = len(glyphs)
    tables = {
        b"cmap": _cmap(codes),
        b"glyf": b"".join(glyphs) or b"\0\0\0\0",
        b"head": struct.pack(
            ">IIIIHHQQhhhhHHhhh",
            *(0x10000, 0x10000, 0, 0x5F0F3CF5, 0, EM, 0, 0, 0, 0, EM, EM, 0, 8, 2, 1, 0),
        ),
        b"hhea": struct.pack(">IhhhHhhhhhhhhhhhH", 0x10000, 800, -200, 0, EM, *[0] * 11, count),
        b"hmtx": b"".join(struct.pack(">Hh", 900, 50) for _ in glyphs),
        b"loca": struct.pack(f">{count + 1}I", *offsets),
        b"maxp": struct.pack(">IH13H", 0x10000, count, 4, 1, *[0] * 11),
    }
    start, directory, body = 12 + 16 * len(tables), b"", b""
    for tag, table in tables.items():
        directory += struct.pack(">4sIII", tag, 0, start + len(body), len(table))
        body += table + b"\0" * (-len(table) % 4)
    return struct.pack(">IHHHH", 0x10000, len(tables), 64, 2, 48) + directory + body


def collection_bytes(*fonts: bytes) -> bytes:
    """A collection (.ttc) of such fonts."""
    header = 12 + 4 * len(fonts)
    starts = [header + sum(map(len, fonts[:n])) for n in range(len(fonts))]
    moved = b"".join(_moved(font, start) for font, start in zip(fonts, starts, strict=True))
    return struct.pack(f">4sII{len(fonts)}I", b"ttcf", 0x10000, len(fonts), *starts) + moved


def write_font(path: Path, characters: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(font_bytes(characters))
    return path


def _moved(font: bytes, by: int) -> bytes:
    """The font at another place of a file: its directory counts from the file's beginning."""
    changed = bytearray(font)
    for table in range(struct.unpack_from(">H", font, 4)[0]):
        place = 12 + 16 * table + 8
        struct.pack_into(">I", changed, place, struct.unpack_from(">I", font, place)[0] + by)
    return bytes(changed)


def _box(width: int, height: int) -> bytes:
    """A rectangle: one contour of four points."""
    glyph = struct.pack(">hhhhh", 1, 50, 0, 50 + width, height) + struct.pack(">HH", 3, 0)
    glyph += bytes([1] * 4)  # on the curve; coordinates of two bytes, each from the one before
    glyph += struct.pack(">4h", 50, 0, width, 0) + struct.pack(">4h", 0, height, 0, -height)
    return glyph + b"\0" * (-len(glyph) % 4)


def _cmap(codes: list[int]) -> bytes:
    """Format 12: a group per character."""
    groups = b"".join(struct.pack(">III", code, code, n) for n, code in enumerate(codes, start=1))
    table = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes)) + groups
    return struct.pack(">HHHHI", 0, 1, 3, 10, 12) + table
