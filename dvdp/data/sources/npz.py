"""Images in the arrays of an .npz file, which are read row by row and never unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dvdp.data.sources.base import Item, LeftOut
from dvdp.data.sources.shards import in_order
from dvdp.errors import UserError


class Npz:
    """One .npz file as guided-diffusion writes and scores it: images ``arr_0``, and perhaps their classes ``arr_1``.

    Raises:
        UserError: the path is missing, or is no .npz file, a damaged one, or one of other arrays.
    """

    needs: str | None = "an .npz file with arr_0, images of uint8 (n, h, w, 3), and perhaps arr_1, their classes"

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        if not path.is_file():
            raise UserError(f"dataset.path: found no file at '{path}', expected {self.needs}; correct the path.")
        self.left_out = LeftOut()
        found = arrays(path)
        images = found.get("arr_0")
        if images is None or not images.is_of_bytes or len(images.shape) != 4 or images.shape[3] != 3:
            raise UserError(f"dataset.path: found {described(found)} in '{path}', expected {self.needs}.")
        self._images, self.count = images, images.shape[0]
        self._classes = found["arr_1"].classes(self.count) if "arr_1" in found else None
        self.labels = in_order(self._classes or ())

    def __iter__(self) -> Iterator[Item]:
        for i, image in enumerate(self._images.rows()):
            yield Item(f"{i:06d}", self._classes[i] if self._classes else None, partial(np.array, image))


@dataclass(frozen=True)
class Array:
    """One of an .npz file, as its header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    is_fortran: bool
    """Its first axis is the fastest."""

    def __str__(self) -> str:
        pickled = ", which is pickled, so that reading it could run code," if self.dtype.hasobject else ""
        return f"{self.name} of {self.dtype} {self.shape}{' in Fortran order' * self.is_fortran}{pickled}"

    @property
    def is_of_bytes(self) -> bool:
        """Whether its rows can be images."""
        return self.dtype == np.uint8 and not self.is_fortran

    def rows(self) -> Iterator[NDArray[np.generic]]:
        """One by one, each read-only."""
        length = self.dtype.itemsize * math.prod(self.shape[1:])
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            _header(file)
            for _ in range(self.shape[0]):
                yield np.frombuffer(file.read(length), self.dtype).reshape(self.shape[1:])

    def classes(self, count: int) -> list[str]:
        """A class for each of so many images."""
        if self.shape != (count,) or self.dtype.kind not in "iu":
            raise UserError(
                f"dataset.path: found {self} in '{self.path}', expected whole numbers ({count},), a class an image."
            )
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            _header(file)
            numbers, places = np.unique(np.frombuffer(file.read(), self.dtype), return_inverse=True)
        names = [str(number) for number in numbers]
        return [names[place] for place in places]


def arrays(path: Path) -> dict[str, Array]:
    """Those of an .npz file by name; raises UserError if it is none, or is damaged."""
    found = {}
    with _opened(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, is_fortran, dtype = _header(file)
                if not dtype.hasobject and file.tell() + dtype.itemsize * math.prod(shape) != member.file_size:
                    raise ValueError(
                        f"{member.filename} has {member.file_size:,} bytes, other than {dtype} {shape} has"
                    )
            name = member.filename.removesuffix(".npy")
            found[name] = Array(path, name, shape, dtype, is_fortran)
    return found


def described(found: dict[str, Array]) -> str:
    """Some arrays, for people."""
    return ", ".join(map(str, list(found.values())[:5])) or "no arrays"


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    return shape, is_fortran, dtype


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    # The last four are zipfile's, for encrypted members, damaged fields and ways of compressing that it does not know,
    # and numpy's, for damaged headers.
    except (
        OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, LZMAError,
        RuntimeError, NotImplementedError, struct.error, TokenError,
    ) as error:  # fmt: skip
        raise UserError(
            f"dataset.path: '{path}' is no .npz file of numbers, or a damaged one ({' '.join(str(error).split())}),"
            " expected arrays as numpy.savez writes them; download it again."
        ) from None
