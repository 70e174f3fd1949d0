"""Small files in the formats that sources read."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


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
