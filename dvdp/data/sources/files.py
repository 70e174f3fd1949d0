"""The image files of a folder, a tar or a zip."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from stat import S_ISLNK
from typing import IO

from tqdm import tqdm

from dvdp.data.sources.base import UnreadableImageError
from dvdp.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: How a zip starts: with its first member, or with its end if it has none.
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")

Reader = Callable[[], bytes]
"""Gives a file's content; raises UnreadableImageError for this file alone, UserError for a damaged archive."""


def image_files(path: Path) -> Iterator[tuple[str, Reader]]:
    """(path within the root, its reader) of each image; to be read before going on to the next.

    ``path`` is a folder, a tar (also .gz, .xz, .bz2) or a zip, and may go on inside an archive:
    ``cifar10.tar.xz/train`` is what lies below ``train``.

    Order: of a folder, its files by name, then its subfolders by name; of an archive, that of its members. Images are
    known by :data:`IMAGE_SUFFIXES`; hidden files, links in an archive, and members that point outside of it are left
    out.

    Raises:
        UserError: the path is missing, or is no folder, tar or zip, or one that is damaged or encrypted.
    """
    found = next(parent for parent in (path, *path.parents, Path()) if parent.exists())
    if found != path and not found.is_file():
        raise UserError(
            f"dataset.path: found nothing at '{path}', expected a folder, tar or zip of images; correct the path."
        )
    if found.is_dir():
        yield from _walk(found, found, frozenset())
        return
    below = PurePosixPath(path.relative_to(found))
    for name, read in _zip_members(found) if _is_zip(found) else _tar_members(found):
        member = PurePosixPath(name)
        inside = not member.is_absolute() and ".." not in member.parts and member.is_relative_to(below)
        if inside and _is_shown_image(member):
            yield member.relative_to(below).as_posix(), read


def looked_through(path: Path) -> Iterator[tuple[str, Reader]]:
    """:func:`image_files` with a progress bar: to count them and look at their names."""
    return iter(tqdm(image_files(path), desc="looking for images", unit="", disable=None, leave=False))


def counted(path: Path, expected: int, content: str) -> int:
    """The number of images, which must be that of the data set; raises UserError if it is another."""
    count = sum(1 for _ in looked_through(path))
    if count != expected:
        raise UserError(
            f"dataset.path: found {count:,} images in '{path}', expected the {expected:,} of {content}; give these"
            " alone and whole, or read what you have with source image_folder."
        )
    return count


def fingerprint(path: Path) -> str:
    """Names the state of a source: another one when a file at or below ``path`` comes, goes, or is written.

    Goes by names, lengths and times of change. ``path`` may go on inside an archive, and links to folders are
    followed, as :func:`image_files` follows them.
    """
    found = next(parent for parent in (path, *path.parents, Path()) if parent.exists())
    files = _files_below(found) if found.is_dir() else [str(found)]
    digest = hashlib.sha256(f"{path.absolute()}\n".encode(errors="surrogateescape"))
    for file in tqdm(files, desc="looking for changes", unit="", disable=None, leave=False):
        state = "gone"
        with contextlib.suppress(OSError):
            status = os.stat(file)  # noqa: PTH116 (for millions of files, a Path each takes longer than all else)
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{file}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)  # noqa: PTH116 (as above)
        identity = (status.st_dev, status.st_ino)
        # Links may lead back, or twice to the same folder: what changes in it shows at its first place.
        folders[:] = [] if identity in seen else sorted(name for name in folders if not name.startswith("."))
        seen.add(identity)
        yield from (f"{parent}/{name}" for name in sorted(names) if not name.startswith("."))


def _is_shown_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _walk(root: Path, folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, Reader]]:
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity in above:
        return  # A link back to a folder that this one is in.
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"dataset.path: cannot list folder '{folder}' ({error.strerror}), expected one that may be read."
        ) from None
    for entry in entries:
        # A broken link is an image that cannot be read; a pipe or device is no image.
        if entry.suffix.lower() in IMAGE_SUFFIXES and (entry.is_file() or not entry.exists()):
            yield entry.relative_to(root).as_posix(), partial(_read_file, entry)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(root, entry, above | {identity})


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(error.strerror or type(error).__name__) from None


def _tar_members(path: Path) -> Iterator[tuple[str, Reader]]:
    with opened_tar(path) as archive:
        while (member := archive.next()) is not None:
            if member.isfile():
                yield member.name, partial(_read_tar_member, archive, member)
            # The archive would keep every member it has seen.
            archive.members.clear()  # type: ignore[attr-defined]


def _read_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _archive_errors(str(archive.name)), open_tar_member(archive, member) as file:
        return file.read()


@contextlib.contextmanager
def opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar; what is wrong with it is a UserError."""
    with _archive_errors(path), tarfile.open(path) as archive:
        yield archive


def open_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """A regular file of a tar."""
    file = archive.extractfile(member)
    assert file is not None, "only regular files are opened"
    return file


def _is_zip(path: Path) -> bool:
    # Not zipfile.is_zipfile, which takes a tar that ends with a zip for one, and a zip that is cut short for none.
    with _archive_errors(path), path.open("rb") as file:
        return file.read(4) in _ZIP_STARTS


def _zip_members(path: Path) -> Iterator[tuple[str, Reader]]:
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir() or S_ISLNK(member.external_attr >> 16):
                continue
            if member.flag_bits & 1:
                raise UserError(
                    f"dataset.path: '{path}' is encrypted ('{member.filename}'), expected an archive without a"
                    " password; unpack it and give the folder."
                )
            yield member.filename, partial(_read_zip_member, archive, member)


def _read_zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with _archive_errors(str(archive.filename)):
        return archive.read(member)


@contextlib.contextmanager
def _archive_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # The last three are zipfile's, for damaged names, damaged fields, and ways of compressing that it does not know.
    except (
        tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error, OSError,
        ValueError, struct.error, NotImplementedError,
    ) as error:  # fmt: skip
        raise UserError(
            f"dataset.path: '{path}' is no tar or zip, or a damaged one ({' '.join(str(error).split())}), expected a"
            " folder, or a whole .tar, .tar.gz, .tar.xz or .zip; unpack it or copy it again."
        ) from None
