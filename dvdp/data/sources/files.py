"""The members of a folder, a tar or a zip: images, and what is left out and why."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from operator import attrgetter
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import IO, Any, Self

import numpy as np
from tqdm import tqdm

from dvdp.data.sources.base import LeftOut, UnreadableImageError
from dvdp.data.sources.formats import HEAD_BYTES, IMAGE_SUFFIXES, reason_against
from dvdp.errors import UserError

#: How a zip starts: with its first member, or with its end if it has none.
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")

#: Names of what systems put beside files.
_THUMBNAILS = frozenset({"@eadir", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db"})
_SYSTEM = frozenset({"__macosx", "$recycle.bin", "#recycle", "system volume information", "desktop.ini", "lost+found"})

#: Masks and thumbnails by their stems, if the file that they belong to lies beside them.
_BESIDE = re.compile(
    r"(?P<base>.+?)(?:[._-](?P<mask>masks?|seg|segm|segmentation|trimap|matte|labelmap)[._-]?\d*"
    r"|[._-]thumb(?:nail|s)?|-\d{2,4}x\d{2,4})",
    re.IGNORECASE,
)

_HIDDEN, _THUMBNAIL = "hidden", "thumbnail"
_TAR_KINDS = {tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "hard link"}

_BLOCK = 1 << 18
#: An image file that is longer is not read into memory. Pillow opens none with so many pixels.
_MOST_BYTES = 1 << 30
#: Bytes of the header before each member of a zip, without its name.
_ZIP_HEADER = 30

#: What reading a damaged archive raises. The last three are zipfile's, for damaged names, damaged fields, and ways of
#: compressing that it does not know.
_DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error, OSError,
    ValueError, struct.error, NotImplementedError,
)  # fmt: skip

Reader = Callable[[], bytes]
"""Gives a file's content; raises UnreadableImageError for this file alone, UserError for a damaged archive."""


@dataclass(frozen=True)
class Member:
    """One entry of a folder or an archive; folders are none, but for those that cannot be listed."""

    name: str
    """Its path within the root, with "/", as it is; :mod:`dvdp.text` makes it printable."""
    left_out: str
    """Why it is not read as an image, in a few words that many members share; "" for an image."""
    read: Reader
    """Its content. To be called, once, before going on to the next member."""


def members(path: Path) -> Iterator[Member]:
    """Every member of a source, images and others, in the order in which images are read.

    ``path`` is a folder, a tar (also .gz, .xz, .bz2) or a zip, and may go on inside an archive:
    ``cifar10.tar.xz/train`` is what lies below ``train``.

    Order: of a folder, its files by name, then its subfolders by name; of an archive, that of its members.

    Images are known by :data:`IMAGE_SUFFIXES`, and all other files by their first bytes. These are left out:

    - ``hidden``: in a name or a folder that begins with "." or belongs to the system (``__MACOSX``);
    - ``thumbnail``, ``mask``: ``@eaDir``, ``Thumbs.db``; ``a.seg.png``, ``a_mask.png``, ``a_thumb.jpg`` beside ``a``;
    - ``link``: in an archive, or in a folder one that leads back to a folder that it is in; ``hard link`` of a tar;
    - ``outside``: a member of an archive that points outside of it; ``no file``: a pipe or a device;
    - ``unreadable (..)``: a folder that cannot be listed, a file of unknown format that cannot be opened;
    - ``other format``, or one that this installation does not read, with what to install.

    A file of labels (``dataset.json``, ``metadata.jsonl``, a CSV, webdataset's ``.cls``) is a member too, left out as
    ``other format``. Find it by its name, and call its ``read`` before going on, as for an image: of an archive nothing
    can be read later. It may come before or after the images that it is about, so read it in a first pass.

    Raises:
        UserError: the path is missing, or is no folder, tar or zip, or one that is damaged or encrypted.
    """
    found = _found(path)
    if found.is_dir():
        for name, file, why in _entries(str(found)):
            read = partial(_read_file, file)
            yield Member(name, why or _by_content(name, partial(_head_of_file, file)), read)
        return
    below = path.relative_to(found).parts
    yield from _zip_members(found, below) if _is_zip(found) else _tar_members(found, below)


def image_files(path: Path) -> Iterator[tuple[str, Reader]]:
    """(path within the root, its reader) of each image among the :func:`members`, in their order."""
    return ((member.name, member.read) for member in members(path) if not member.left_out)


def looked_through(path: Path, left_out: LeftOut) -> Iterator[Member]:
    """The images among the :func:`members`, with a progress bar: to count them and look at their names.

    The other members are added to ``left_out``.
    """
    for member in tqdm(members(path), desc="looking for images", unit="", disable=None, leave=False):
        if member.left_out:
            left_out.add(member.name, member.left_out)
        else:
            yield member


def checked(path: Path, expected: int, content: str) -> LeftOut:
    """The files beside the images, whose number must be that of the data set; raises UserError if it is another."""
    left_out = LeftOut()
    count = sum(1 for _ in looked_through(path, left_out))
    if count != expected:
        beside = f" and {left_out}" if left_out.counts else ""
        raise UserError(
            f"dataset.path: found {count:,} images{beside} in '{path}', expected the {expected:,} of {content};"
            " give these alone and whole, or read what you have with source image_folder."
        )
    return left_out


def fingerprint(path: Path) -> str:
    """Names the state of a source: another one when a file at or below ``path`` comes, goes, or is written.

    Goes by names, lengths and times of change. ``path`` may go on inside an archive, and links to folders are
    followed, as :func:`members` follows them.
    """
    found = path.parent if is_pattern(path) else _found(path)
    files = (file for _, file, why in _entries(str(found)) if why != _HIDDEN) if found.is_dir() else [str(found)]
    digest = hashlib.sha256(f"{path.absolute()}\n".encode(errors="surrogateescape"))
    for file in tqdm(files, desc="looking for changes", unit="", disable=None, leave=False):
        state = "gone"
        with contextlib.suppress(OSError):
            status = os.stat(file)  # noqa: PTH116 (for millions of files, a Path each takes longer than all else)
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{file}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def is_pattern(path: Path) -> bool:
    """Whether it names files of a folder by a "*", and is no file itself."""
    return "*" in path.name and not path.exists()


def _found(path: Path) -> Path:
    """The part of the path that exists: all of it, or an archive inside of which it goes on."""
    for found in (path, *path.parents):
        try:
            kind = found.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(
                f"dataset.path: cannot read '{found}' ({error.strerror}), expected a folder, tar or zip of images;"
                " correct the path or the right to read it."
            ) from None
        if S_ISREG(kind) or (found == path and S_ISDIR(kind)):
            return found
        break
    raise UserError(
        f"dataset.path: found nothing at '{path}', expected a folder, tar or zip of images; correct the path."
    )


def _by_name(parts: Iterable[str]) -> str:
    """Why a file is left out that has these names in its path, or ""."""
    for part in parts:
        name = part.lower()
        if name.startswith(".") or name in _SYSTEM:
            return _HIDDEN
        if name in _THUMBNAILS or name.endswith(".thm"):
            return _THUMBNAIL
    return ""


def _by_neighbours(name: str, stems: Callable[[], Collection[str]]) -> str:
    """Why an image of this path is left out if there are others of these paths, without suffixes; or ""."""
    folder, slash, file = name.rpartition("/")
    stem, suffix = os.path.splitext(file)  # noqa: PTH122 (as above)
    match = _BESIDE.fullmatch(stem)
    if not match or suffix.lower() not in IMAGE_SUFFIXES or folder + slash + match["base"] not in stems():
        return ""
    return "mask" if match["mask"] else _THUMBNAIL


def _by_content(name: str, head: Callable[[], bytes]) -> str:
    """Why a file of this name and beginning is left out, or ""."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (as above)
    if suffix in IMAGE_SUFFIXES:
        return ""
    try:
        return reason_against(suffix, head())
    except OSError as error:
        return _unreadable(error)


def _stems(names: Iterable[str]) -> frozenset[str]:
    split = (os.path.splitext(name) for name in names)  # noqa: PTH122 (as above)
    return frozenset(stem for stem, suffix in split if suffix.lower() in IMAGE_SUFFIXES)


def _unreadable(error: OSError) -> str:
    return f"unreadable ({error.strerror or type(error).__name__})"


def _check_length(length: int) -> None:
    if length > _MOST_BYTES:
        raise UnreadableImageError(f"longer than {_MOST_BYTES:,} bytes")


# Folders


def _entries(root: str) -> Iterator[tuple[str, str, str]]:
    """(name within root, path, why it is left out by its name and kind) of all files, and of folders without a list."""
    pending = [("", root, "", 0)]
    above: list[tuple[int, int]] = []  # The folders that the present one is in.
    while pending:
        name, folder, why, depth = pending.pop()
        del above[depth:]
        try:
            status = os.stat(folder)  # noqa: PTH116 (as above)
            with os.scandir(folder) as found:
                entries = sorted(found, key=attrgetter("name"))
        except OSError as error:
            if folder == root:
                raise UserError(
                    f"dataset.path: cannot list folder '{folder}' ({error.strerror}), expected one that may be read."
                ) from None
            yield name, folder, why or _unreadable(error)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            yield name, folder, why or "link"
            continue
        above.append(identity)
        stems = cache(partial(_stems, [entry.name for entry in entries]))
        folders = []
        for entry in entries:
            inside = f"{name}/{entry.name}" if name else entry.name
            left = why or _by_name([entry.name])
            try:
                if entry.is_dir():
                    folders.append((inside, entry.path, left, depth + 1))
                    continue
                if not entry.is_file():
                    entry.stat()  # Raises for a broken link.
                    left = left or "no file"
            except OSError as error:
                if not entry.name.lower().endswith(IMAGE_SUFFIXES):
                    left = left or _unreadable(error)
            yield inside, entry.path, left or _by_neighbours(entry.name, stems)
        pending.extend(reversed(folders))


def _head_of_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (as above)
        return file.read(HEAD_BYTES)


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (as above)
            _check_length(os.fstat(file.fileno()).st_size)
            return file.read()
    except OSError as error:
        raise UnreadableImageError(error.strerror or type(error).__name__) from None


# Archives


def _archived(name: str, below: tuple[str, ...]) -> tuple[str, str] | None:
    """(path within root, why it is left out by its name) of a member, or None if it is no part of the source."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts:
        return name, "outside"
    if parts[: len(below)] != below or not parts:
        return None
    # A source may be a single member.
    parts = parts[len(below) :] or parts[-1:]
    return "/".join(parts), _by_name(parts)


class _Header(tarfile.TarInfo):
    """Of a tar's member. One that does not parse is an error, and not the end of the tar as tarfile has it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class _Streams(io.RawIOBase):
    """The content of a file of bz2 or xz streams. What follows them is an error, and not ignored as by bz2 and lzma."""

    def __init__(self, file: IO[bytes], new: Callable[[], Any]) -> None:
        self._file, self._new, self._current = file, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if not self._current.eof:
                block = self._file.read(_BLOCK) if self._current.needs_input else b""
                if self._current.needs_input and not block:
                    raise EOFError("it ends in the middle of a compressed stream")
            else:
                # Streams may be padded with zeros.
                block = self._current.unused_data.lstrip(b"\0")
                while not block and (more := self._file.read(_BLOCK)):
                    block = more.lstrip(b"\0")
                if not block:
                    return 0
                self._current = self._new()
            data = self._current.decompress(block, len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _streamed_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar whose members are read in their order."""
    with _archive_errors(path), path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        content: Any = None
        if start.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=file)
        elif start.startswith(b"BZh"):
            content = io.BufferedReader(_Streams(file, bz2.BZ2Decompressor), _BLOCK)
        elif start.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")):
            content = io.BufferedReader(_Streams(file, lzma.LZMADecompressor), _BLOCK)
        with tarfile.open(str(path), "r|" if content else "r:", content or file, tarinfo=_Header) as archive:
            yield archive


def _tar_entries(path: Path, below: tuple[str, ...]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str, str]]:
    """Its members, but for folders: each with its path within root, and why it is left out by its name and kind."""
    with _streamed_tar(path) as archive:
        last = "its start"
        while (member := _next(path, archive, last)) is not None:
            last = f"'{member.name}'"
            # The archive would keep every member it has seen.
            archive.members.clear()  # type: ignore[attr-defined]
            found = None if member.isdir() else _archived(member.name, below)
            if found:
                kind = "" if member.isfile() else _TAR_KINDS.get(member.type, "no file")
                yield archive, member, found[0], found[1] or kind


def _next(path: Path, archive: tarfile.TarFile, last: str) -> tarfile.TarInfo | None:
    """The next member; None at the end, after which there must be nothing but zeros."""
    try:
        member = archive.next()
        while member is None and (block := archive.fileobj.read(_BLOCK)):
            if block.strip(b"\0"):
                raise tarfile.ReadError("more data follow its end mark")
    except _DAMAGE as error:
        raise _damaged(path, error, f" after {last}, at byte {archive.offset:,} of the tar") from None
    return member


def _tar_members(path: Path, below: tuple[str, ...]) -> Iterator[Member]:
    status = path.stat()
    stems = partial(_tar_bases, path, below, status.st_size, status.st_mtime_ns)
    for archive, member, name, why in _tar_entries(path, below):
        why = why or _by_neighbours(name, stems)
        read = partial(_read_tar_member, archive, member)
        if not why and not name.lower().endswith(IMAGE_SUFFIXES):
            with _archive_errors(path):
                file: Any = open_tar_member(archive, member)
                why = _by_content(name, partial(file.peek, HEAD_BYTES))
            read = partial(_read_opened, path, file, member.size)
        yield Member(name, why, read)


@lru_cache(maxsize=1)
def _tar_bases(path: Path, below: tuple[str, ...], size: int, changed: int) -> frozenset[str]:
    """The images that masks and thumbnails belong to: paths without suffixes.

    As an image can come after its mask, the tar is read once more for them; but only if it holds names of masks.
    """
    wanted: set[str] = set()
    stems = array("q")
    for _, _, name, why in _tar_entries(path, below):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 (as above)
        if suffix.lower() in IMAGE_SUFFIXES and not why:
            # Eight bytes of each, as there may be millions.
            stems.append(hash(stem))
            folder, slash, file = stem.rpartition("/")
            if match := _BESIDE.fullmatch(file):
                wanted.add(folder + slash + match["base"])
    there = np.isin(np.array([hash(base) for base in wanted], np.int64), np.frombuffer(stems, np.int64))
    return frozenset(base for base, found in zip(wanted, there, strict=True) if found)


def _read_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _check_length(member.size)
    with _archive_errors(str(archive.name)), open_tar_member(archive, member) as file:
        return file.read()


def _read_opened(path: Path, file: IO[bytes], length: int) -> bytes:
    _check_length(length)
    with _archive_errors(path), file:
        return file.read()


@contextlib.contextmanager
def opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar whose members are read in any order; what is wrong with it is a UserError."""
    with _archive_errors(path), tarfile.open(path, tarinfo=_Header) as archive:
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


def _zip_members(path: Path, below: tuple[str, ...]) -> Iterator[Member]:
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        _check_directory(path, archive)
        found = [(_archived(_zip_name(member), below), member) for member in archive.infolist()]
        entries = [(*entry, member) for entry, member in found if entry and not _zip_name(member).endswith("/")]
        stems = cache(lambda: _stems(name for name, why, _ in entries if not why))
        for name, why, member in entries:
            if not why and S_ISLNK(member.external_attr >> 16):
                why = "link"
            elif member.flag_bits & 1:
                raise UserError(
                    f"dataset.path: '{path}' is encrypted ('{member.filename}'), expected an archive without a"
                    " password; unpack it and give the folder."
                )
            why = why or _by_neighbours(name, stems) or _by_content(name, partial(_head_in_zip, archive, member))
            yield Member(name, why, partial(_read_zip_member, archive, member))


def _zip_name(member: zipfile.ZipInfo) -> str:
    name = member.filename
    if not member.flag_bits & 0x800:
        # Without the mark of UTF-8 it is in code page 437, or in UTF-8 all the same by some programs, as of macOS.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    # Some programs for Windows separate folders by backslashes, which the format forbids.
    return name.replace("\\", "/") if member.create_system == 0 else name


def _head_in_zip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with _archive_errors(str(archive.filename)), archive.open(member) as file:
        return file.read(HEAD_BYTES)


def _read_zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    _check_length(member.file_size)
    with _archive_errors(str(archive.filename)):
        return archive.read(member)


def _check_directory(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile if the zip holds members that its directory does not list, or anything after its end."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - 22 - 0xFFFF))
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        number, comment = struct.unpack_from("<10xH8xH", tail, end)
        # Zip64 has the number elsewhere, and programs without it count from 0 again after 65,535.
        listed = len(archive.infolist())
        if number not in (listed & 0xFFFF, 0xFFFF):
            raise zipfile.BadZipFile(f"its directory lists {listed:,} members, its end {number:,}")
        if start + end + 22 + comment != size:
            raise zipfile.BadZipFile(f"{size - start - end - 22 - comment:,} bytes follow its end")
        previous, place = None, 0
        for member in [*sorted(archive.infolist(), key=attrgetter("header_offset")), None]:
            begin = member.header_offset if member else archive.start_dir
            # Local headers have extra fields that the directory does not show: only longer gaps are looked into.
            if not 0 <= begin - place <= _ZIP_HEADER:
                if previous:
                    file.seek(previous.header_offset + 26)
                    place = previous.header_offset + _ZIP_HEADER + previous.compress_size
                    place += sum(struct.unpack("<2H", file.read(4)))
                file.seek(place)
                if place > begin or b"PK\x03\x04" in file.read(min(begin - place, _ZIP_HEADER)):
                    after = f"after '{previous.filename}'" if previous else "at its start"
                    raise zipfile.BadZipFile(f"its directory does not list what lies {after}")
            if member:
                name = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
                previous, place = member, begin + _ZIP_HEADER + len(name) + member.compress_size


@contextlib.contextmanager
def _archive_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path | str, error: Exception, where: str = "") -> UserError:
    return UserError(
        f"dataset.path: '{path}' is no tar or zip, or a damaged one ({' '.join(str(error).split())}{where}), expected a"
        " folder, or a whole .tar, .tar.gz, .tar.xz or .zip; unpack it or copy it again."
    )
