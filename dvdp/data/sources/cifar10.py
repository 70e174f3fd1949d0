"""CIFAR-10."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

from dvdp.data.sources.base import Item, LeftOut
from dvdp.data.sources.files import open_tar_member, opened_tar
from dvdp.errors import UserError

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_CIFAR10_RECORD = 1 + 3 * 32 * 32


class Cifar10:
    """The training split of CIFAR-10 from its official binary archive, in the order of its files.

    ``path``: the archive, or a folder of its ``data_batch_*.bin``; without it the archive is downloaded once, to
    ``$XDG_CACHE_HOME/dvdp`` (``~/.cache/dvdp``).

    Raises:
        UserError: the path is missing, the checksum is wrong, the download fails, or a file is not of CIFAR-10.
    """

    needs: str | None = None
    labels: tuple[str, ...] = CIFAR10_LABELS
    left_out = LeftOut()

    def __init__(self, path: Path | None, url: str = CIFAR10_URL, md5: str = CIFAR10_MD5) -> None:
        self._path = path or _downloaded(url, md5)
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
            try:
                yield [
                    (p.name, p.stat().st_size, partial(_open_file, p))
                    for p in sorted(self._path.glob("data_batch_*.bin"))
                ]
            except OSError as error:
                raise UserError(
                    f"dataset.path: cannot read '{error.filename}' ({error.strerror}), expected a file of CIFAR-10;"
                    " unpack the binary version again."
                ) from None
            return
        with opened_tar(self._path) as archive:
            members = {PurePosixPath(m.name).name: m for m in archive.getmembers() if m.isfile()}
            yield [
                (name, members[name].size, partial(open_tar_member, archive, members[name]))
                for name in sorted(members)
                if name.startswith("data_batch_") and name.endswith(".bin")
            ]


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


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
