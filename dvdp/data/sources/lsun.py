"""LSUN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dvdp.data.sources.base import Item, LeftOut, UnreadableImageError, decode
from dvdp.errors import UserError

_FILE = "data.mdb"
#: Records looked at to tell LSUN from other LMDBs; one of them may be damaged.
_PROBED = 10


class Lsun:
    """One category of LSUN from the LMDB that its zip unpacks to, in the order of its keys.

    Values are image files (WebP or JPEG), keys are their names. There are no labels.

    Raises:
        UserError: the path is missing, is a file, or holds no LMDB, one that is cut short, or one of no images.
    """

    needs: str | None = "the folder that a zip of LSUN unpacks to, such as bedroom_train_lmdb"
    labels: tuple[str, ...] = ()
    left_out = LeftOut()

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        self._path = path
        with self._opened() as environment, environment.begin() as transaction:
            self.count: int = environment.stat()["entries"]
            if not any(_is_image(value) for _, value in islice(transaction.cursor(), _PROBED)):
                raise UserError(
                    f"dataset.path: found {self.count:,} records in the LMDB of '{self._path}', and no image files"
                    " among the first, expected LSUN's own, an image file each; give what its zip unpacks to."
                )

    def __iter__(self) -> Iterator[Item]:
        with self._opened() as environment, environment.begin() as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                yield Item(key.decode(errors="surrogateescape"), None, partial(self._read, transaction, key), decode)

    def _read(self, transaction: Any, key: bytes) -> bytes:
        with self._errors():
            content: bytes = transaction.get(key)
        return content

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import lmdb

        file = self._path / _FILE
        if self._path.is_file():
            raise UserError(
                f"dataset.path: '{self._path}' is a file, expected the folder that holds {_FILE}; an LMDB cannot be"
                " read inside a zip, so unpack it and give the folder."
            )
        if not file.is_file():
            raise UserError(
                f"dataset.path: found no {_FILE} in '{self._path}', expected {self.needs}; correct the path."
            )
        with (
            self._errors(),
            lmdb.open(
                str(self._path), create=False, readonly=True, lock=False, readahead=False, meminit=False
            ) as environment,
        ):
            # Reading a page beyond the end of the file would kill the process.
            whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < whole:
                raise UserError(
                    f"dataset.path: '{file}' is cut short, found {file.stat().st_size:,} bytes, expected {whole:,};"
                    " copy or unpack it again."
                )
            yield environment

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import lmdb

        try:
            yield
        except lmdb.Error as error:
            raise UserError(
                f"dataset.path: '{self._path / _FILE}' is no LMDB file, or a damaged one"
                f" ({str(error).split(': ')[-1]}), expected one of LSUN; unpack its zip again."
            ) from None


def _is_image(content: bytes) -> bool:
    try:
        decode(content)
    except UnreadableImageError:
        return False
    return True
