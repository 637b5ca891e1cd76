"""What a file is that PyTorch or other programs wrote, by its first bytes and the names in it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """Files that are not read here."""

    name: str  # with its article
    remedy: str  # how the weights in it come into a file that is read


UNPACK = "unpack it, and name the file in it"
STATE_DICT = "where you trust it, make a state dict of it with "
TORCHSCRIPT = Kind(
    "a TorchScript file, which holds code",
    STATE_DICT + "torch.save(torch.jit.load(FILE).state_dict(), NEW)",
)
EXPORTED = Kind(
    "a program of torch.export (.pt2)",
    STATE_DICT + "torch.save(torch.export.load(FILE).state_dict, NEW)",
)
ONNX = Kind("an ONNX file", "save model.state_dict() of the network that it was made from")
SAFETENSORS = Kind(
    "a safetensors file",
    "make a PyTorch file of it with torch.save(safetensors.torch.load_file(FILE), NEW)",
)
NUMPY = Kind("a NumPy file", "save model.state_dict() with torch.save")
KERAS = Kind("an HDF5 file, as Keras writes it", "name a PyTorch file with model.state_dict()")
ZIP = Kind("a zip archive", UNPACK)
TAR = Kind("a tar archive", UNPACK)
POINTER = Kind("a Git LFS pointer to a file", "fetch the file with git lfs pull")
PAGE = Kind("a web page", "the download went wrong: fetch the file by its direct address")

FIRST_BYTES = {
    b"\x1f\x8b": Kind("a gzip archive", UNPACK),
    b"BZh": Kind("a bzip2 archive", UNPACK),
    b"\xfd7zXZ\x00": Kind("an xz archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": Kind("a 7z archive", UNPACK),
    b"\x93NUMPY": NUMPY,
    b"\x89HDF\r\n\x1a\n": KERAS,
    b"version https://git-lfs": POINTER,
}
ZIP_BYTES = b"PK\x03\x04"
# how torch.save begins a file without _use_new_zipfile_serialization: a number, pickled
LEGACY_NUMBER = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def kind_of(path: Path | str) -> Kind | None:
    """What a file is that ``torch.load(weights_only=True)`` cannot read; None for one that it
    perhaps can, or that is not known."""
    head, size = first_bytes(path)
    if head.startswith(ZIP_BYTES):
        return kind_of_archive(path)
    for start, kind in FIRST_BYTES.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return TAR
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return PAGE
    # the length of a JSON header, and its first byte
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return SAFETENSORS
    # fields of a protocol buffer: the version, one byte, then the name of the writer
    is_onnx = head[:1] == b"\x08" and head[2:3] == b"\x12"
    return ONNX if is_onnx or head and Path(path).suffix.lower() == ".onnx" else None


def kind_of_archive(path: Path | str) -> Kind | None:
    """The same for a file that begins as a zip archive does."""
    names = names_in(path)
    if not names:
        return None
    inside = {name.partition("/")[2] for name in names}  # torch.save puts all into one folder
    if "constants.pkl" in inside:
        return TORCHSCRIPT
    if "data.pkl" in inside:
        return None
    if "archive_format" in inside or "serialized_exported_program.json" in names:
        return EXPORTED
    return NUMPY if all(name.endswith(".npy") for name in names) else ZIP


def names_in(path: Path | str) -> list[str]:
    """The names in a zip archive; none of one that is damaged or cut short."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile):
        return []


def damage_of(path: Path | str) -> str | None:
    """Why a file cannot be one of ``torch.save``; None if it may be one."""
    if not Path(path).is_file():
        return None
    head, size = first_bytes(path)
    if not size:
        return "it is empty"
    if head.startswith(ZIP_BYTES):
        return None if names_in(path) else "it is cut short or damaged. Copy or download it again"
    return None if LEGACY_NUMBER in head[:32] else "it is no PyTorch file"


def first_bytes(path: Path | str) -> tuple[bytes, int]:
    """The first bytes of a file, and its size; nothing of one that cannot be read."""
    path = Path(path)
    try:
        if not path.is_file():  # reading from a pipe would take its bytes away
            return b"", 0
        with open(path, "rb") as file:
            return file.read(512), path.stat().st_size
    except OSError:
        return b"", 0
