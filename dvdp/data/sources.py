"""Where images come from. Every source streams them, always in the same order, and unpacks nothing to disk.

A source is made from the ``dataset`` section of params.yaml by :data:`SOURCES`; making it looks through names and
checksums, so that mistakes show before any work. Iterating it yields an :class:`Item` for each image.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from dvdp.config import DatasetParams
from dvdp.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_CIFAR10_RECORD = 1 + 3 * 32 * 32

Pixels = NDArray[np.uint8]


class UnreadableImageError(Exception):
    """This one image cannot be read; the text says why."""


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """Its path within the source, or its number."""
    label: str | None
    load: Callable[[], Pixels]
    """Gives uint8 (h, w, 3), or raises UnreadableImageError. To be called before going on to the next item."""


class Source(Protocol):
    """Images and what is known before reading them."""

    count: int
    labels: tuple[str, ...]
    """Names of the classes, sorted; empty if there are none."""

    def __iter__(self) -> Iterator[Item]: ...


def decode(content: bytes) -> Pixels:
    """An image file as uint8 (h, w, 3) RGB, turned as its EXIF says.

    Grey is repeated, 16 bits are scaled to 8, transparent pixels are laid over white, and of an animation the first
    frame is taken.

    Raises:
        UnreadableImageError: it cannot be decoded, or its pixels have no agreed range (32-bit).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise UnreadableImageError("floating-point pixels")
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.int64)
                if grey.min() < 0 or grey.max() > 65535:
                    raise UnreadableImageError("32-bit pixels")
                return np.repeat(np.round(grey / 257).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            else:
                rgb = image.convert("RGB")
            return np.asarray(rgb)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("no image in a known format") from None
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        raise UnreadableImageError(" ".join(f"{type(error).__name__}: {error}".split())) from None


class Digits:
    """scikit-learn's 1797 handwritten digits, 8 px, white on black."""

    def __init__(self, params: DatasetParams) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = np.round(data.images * (255 / 16)).astype(np.uint8)
        self._targets = [str(target) for target in data.target]
        self.count = len(self._images)
        self.labels = tuple(sorted(set(self._targets)))

    def __iter__(self) -> Iterator[Item]:
        for i, (image, target) in enumerate(zip(self._images, self._targets, strict=True)):
            yield Item(f"{i:05d}", target, partial(np.repeat, image[:, :, None], 3, axis=2))


class ImageFolder:
    """The image files of a folder, or of a tar (also .gz, .xz, .bz2) of one.

    ``path`` may go on inside the tar: ``cifar10.tar.xz/train`` reads what lies below ``train``.

    Label: the name of the folder that holds the image; none if that is the root, which is the deepest folder below
    which all images lie. So ``<class>/x.png``, ``<split>/<class>/x.png`` and ``<only folder>/<class>/x.png`` have
    their classes, and a folder of nothing but images has none.

    Order: of a folder, its files by name, then its subfolders by name; of a tar, that of its members. Images are
    known by :data:`IMAGE_SUFFIXES`; hidden files, links in a tar, and members that point outside of it are left out.

    Raises:
        UserError: the path is missing, or is no folder and no tar, or holds no images.
    """

    def __init__(self, params: DatasetParams) -> None:
        if params.path is None:
            raise UserError("dataset.path: found nothing, expected the folder or tar of images to read.")
        # The path may go on inside a tar.
        self._path = next(path for path in (params.path, *params.path.parents, Path()) if path.exists())
        self._below = PurePosixPath(params.path.relative_to(self._path))
        if self._path != params.path and not self._path.is_file():
            raise UserError(
                f"dataset.path: found nothing at '{params.path}', expected a folder or tar of images; correct the path."
            )
        self.count = 0
        folders: set[tuple[str, ...]] = set()
        for name, _ in tqdm(self._files(), desc="looking for images", unit="", disable=None, leave=False):
            self.count += 1
            folders.add(PurePosixPath(name).parts[:-1])
        if not self.count:
            raise UserError(
                f"dataset.path: found no images in '{params.path}', expected files that end in"
                f" {', '.join(IMAGE_SUFFIXES)}."
            )
        self._root = next(iter(folders))
        for folder in folders:
            while self._root != folder[: len(self._root)]:
                self._root = self._root[:-1]
        self.labels = tuple(sorted({folder[-1] for folder in folders if folder != self._root}))

    def __iter__(self) -> Iterator[Item]:
        for name, read in self._files():
            folder = PurePosixPath(name).parts[:-1]
            yield Item(name, None if folder == self._root else folder[-1], partial(_read_and_decode, read))

    def _files(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """(path within the root, its reader) of each image."""
        return self._walk(self._path, set()) if self._path.is_dir() else self._members()

    def _walk(self, folder: Path, above: set[tuple[int, int]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
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
                yield entry.relative_to(self._path).as_posix(), entry.read_bytes
        for entry in entries:
            if entry.is_dir():
                yield from self._walk(entry, above | {identity})

    def _members(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        with _open_tar(self._path) as archive:
            while (member := archive.next()) is not None:
                path = PurePosixPath(member.name)
                inside = not path.is_absolute() and ".." not in path.parts and path.is_relative_to(self._below)
                shown = not any(part.startswith(".") for part in path.parts)
                if inside and shown and member.isfile() and path.suffix.lower() in IMAGE_SUFFIXES:
                    yield path.relative_to(self._below).as_posix(), partial(_read_member, archive, member)
                # The archive would keep every member it has seen.
                archive.members.clear()  # type: ignore[attr-defined]


class Cifar10:
    """The training split of CIFAR-10 from its official binary archive, in the order of its files.

    ``path``: the archive, or a folder of its ``data_batch_*.bin``; without it the archive is downloaded once, to
    ``$XDG_CACHE_HOME/dvdp`` (``~/.cache/dvdp``).

    Raises:
        UserError: the path is missing, the checksum is wrong, the download fails, or a file is not of CIFAR-10.
    """

    labels: tuple[str, ...] = CIFAR10_LABELS

    def __init__(self, params: DatasetParams, url: str = CIFAR10_URL, md5: str = CIFAR10_MD5) -> None:
        self._path = params.path or _downloaded(url, md5)
        if not self._path.exists():
            raise UserError(
                f"dataset.path: found nothing at '{self._path}', expected cifar-10-binary.tar.gz, or leave it out to"
                " download that."
            )
        if self._path.is_file():
            _check_md5(self._path, md5)
        self.count = 0
        with self._batches() as batches:
            for name, size, _ in batches:
                if size == 0 or size % _CIFAR10_RECORD:
                    raise UserError(
                        f"dataset.path: '{name}' in '{self._path}' has {size:,} bytes, expected a multiple of"
                        f" {_CIFAR10_RECORD:,}; download the binary version again."
                    )
                self.count += size // _CIFAR10_RECORD
        if not self.count:
            raise UserError(
                f"dataset.path: found no data_batch_*.bin in '{self._path}', expected the binary version of CIFAR-10."
            )

    def __iter__(self) -> Iterator[Item]:
        with self._batches() as batches:
            for name, size, open_batch in batches:
                with open_batch() as file:
                    for i in range(size // _CIFAR10_RECORD):
                        record = np.frombuffer(file.read(_CIFAR10_RECORD), dtype=np.uint8)
                        if record[0] >= len(CIFAR10_LABELS):
                            raise UserError(
                                f"dataset.path: image {i} of '{name}' in '{self._path}' has class {record[0]},"
                                " expected 0 to 9; download the binary version again."
                            )
                        pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                        yield Item(f"{name}/{i:05d}", CIFAR10_LABELS[record[0]], partial(np.array, pixels))

    @contextmanager
    def _batches(self) -> Iterator[list[tuple[str, int, Callable[[], IO[bytes]]]]]:
        """(name, bytes, opener) of each file, by name: the archive itself has them in another order."""
        if self._path.is_dir():
            yield [
                (p.name, p.stat().st_size, partial(_open_file, p)) for p in sorted(self._path.glob("data_batch_*.bin"))
            ]
            return
        with _open_tar(self._path) as archive:
            members = {PurePosixPath(m.name).name: m for m in archive.getmembers() if m.isfile()}
            yield [
                (name, members[name].size, partial(_open_member, archive, members[name]))
                for name in sorted(members)
                if name.startswith("data_batch_") and name.endswith(".bin")
            ]


#: Each source by the name that ``dataset.source`` gives it.
SOURCES: dict[str, Callable[[DatasetParams], Source]] = {
    "digits": Digits,
    "image_folder": ImageFolder,
    "cifar10": Cifar10,
}


def _read_and_decode(read: Callable[[], bytes]) -> Pixels:
    try:
        content = read()
    except OSError as error:
        raise UnreadableImageError(error.strerror or type(error).__name__) from None
    return decode(content)


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None, "only regular files are opened"
    return file


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _tar_errors(str(archive.name)), _open_member(archive, member) as file:
        return file.read()


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with _tar_errors(path), tarfile.open(path) as archive:
        yield archive


@contextmanager
def _tar_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, LZMAError, zlib.error, OSError) as error:
        raise UserError(
            f"dataset.path: '{path}' is no tar, or a damaged one ({' '.join(str(error).split())}), expected a folder,"
            " or a whole .tar, .tar.gz or .tar.xz; unpack it or copy it again."
        ) from None


def _check_md5(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise UserError(
            f"dataset.path: '{path}' has MD5 {found}, expected {expected} of the official cifar-10-binary.tar.gz;"
            " download it again."
        )


def _downloaded(url: str, md5: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvdp"
    path = folder / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, aside.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        _check_md5(aside, md5)
        aside.rename(path)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"dataset.path: found nothing, and downloading {url} failed ({error}); fetch that file by other means and"
            " give its path."
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return path
