"""Small files in the formats that sources read."""

from __future__ import annotations

import io
import os
import signal
import stat
import struct
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvdp.data.sources import Item, Pixels
from dvdp.data.sources.base import LeftOut


def png(value: int = 0, size: tuple[int, int] = (5, 4)) -> bytes:
    return encoded(Image.new("RGB", size, (value, 0, 255 - value)))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_tree(root: Path, names: list[str]) -> Path:
    """Each image's red is its place in the list."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
    return root


def make_tar(path: Path, files: Mapping[str, bytes | None], mode: str = "w") -> Path:
    """None makes a folder."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def make_zip(path: Path, files: Mapping[str, bytes | None], kind: int = zipfile.ZIP_STORED) -> Path:
    """None makes a folder."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}/" if content is None else name, content or b"")
    return path


def add_link(path: Path, name: str, target: str) -> None:
    """A symbolic link in a zip, as Info-ZIP stores it."""
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, target)


def encrypt(path: Path) -> None:
    """Mark all members of a zip as encrypted, in both of their headers."""
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := content.find(header, place + 1)) >= 0:
            content[place + flags] |= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_images(root: Path, per_class: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def forked(function: Callable[[], object]) -> int:
    """Run it in a process of its own, and give its id; it ends with 0, or 1 after an exception."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class EndingSource:
    """Images of which the third ends the process that decodes it."""

    needs: str | None = None
    labels: tuple[str, ...] = ()
    left_out = LeftOut()
    count = 6

    def __init__(self, path: Path | None) -> None:
        pass

    def __iter__(self) -> Iterator[Item]:
        for i in range(self.count):
            image = partial(np.full, (8, 8, 3), i, np.uint8)
            yield Item(str(i), None, image, end_process if i == 2 else np.asarray)


def end_process(content: object) -> Pixels:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(content: bytes, *chunks: bytes) -> bytes:
    """A PNG with these chunks after its header."""
    return content[:33] + b"".join(chunks) + content[33:]


def segment(marker: int, data: bytes) -> bytes:
    """Of a JPEG."""
    return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data


def jpeg_with(content: bytes, *segments: bytes) -> bytes:
    """A JPEG with these segments at its start."""
    return content[:2] + b"".join(segments) + content[2:]


def icc(space: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A profile, version 4, of a colour space: ``RGB``, ``GRAY`` or ``CMYK``."""
    connection, kind = (b"Lab ", b"prtr") if space == b"CMYK" else (b"XYZ ", b"mntr")
    text = b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, 8, 28) + "test".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    place, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4x4s4s4s4s12x4s", 128 + len(body), b"\4\x30\0\0", kind, space.ljust(4), connection, b"acsp")
    return (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + body


def xyz(*values: float) -> bytes:
    """A colour in a profile."""
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    """A curve in a profile."""
    return b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", round(value * 65536))


#: The curve of sRGB, in a profile.
SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(value * 65536) for value in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
#: Of sRGB and Display P3, to XYZ under D50: red, green, blue.
SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3_PRIMARIES = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def rgb_profile(primaries: Sequence[Sequence[float]], curve: bytes = SRGB_CURVE) -> bytes:
    """Of a screen with these primaries."""
    colours = {b"rXYZ": primaries[0], b"gXYZ": primaries[1], b"bXYZ": primaries[2]}
    return icc(
        b"RGB", {**{k: xyz(*v) for k, v in colours.items()}, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)}
    )
