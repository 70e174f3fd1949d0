"""LMDB, one file each: the only module that opens our own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dvdp.errors import UserError

#: A new file's map; it doubles as the file grows, and is part of the file.
_FIRST_MAP_BYTES = 1 << 20

#: Files that this process reads: LMDB allows a file to be opened only once in each.
_readable: dict[tuple[int, int], tuple[int, Any]] = {}


def readable(file: Path) -> Any:
    """The environment of a file that is complete, opened at most once in each process.

    Raises:
        UserError: it is no LMDB file, or cut short; or this process may open no more files.
    """
    import lmdb

    identity = (file.stat().st_dev, file.stat().st_ino)
    pid, environment = _readable.get(identity, (0, None))
    if environment is not None and pid == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # Came with a fork; the parent keeps its own.
    try:
        environment = lmdb.open(
            str(file), subdir=False, create=False, readonly=True, lock=False, readahead=False, meminit=False,
            max_spare_txns=4,
        )  # fmt: skip
    except lmdb.Error as error:
        reason = str(error).split(": ")[-1]
        if reason == os.strerror(errno.EMFILE):
            raise UserError(
                f"data set: '{file}' cannot be opened ({reason}), expected a process that may hold all files of the"
                " store; raise `ulimit -n`, or run `dvdp prepare` with a larger dataset.shard_gib."
            ) from None
        raise UserError(
            f"data set: '{file}' is no LMDB file ({reason}), expected one that `dvdp prepare` wrote; move it away and"
            " run that."
        ) from None
    # Reading a page beyond the end of the file would kill the process.
    if file.stat().st_size < file_bytes(environment):
        environment.close()
        raise UserError(
            f"data set: '{file}' is cut short, found {file.stat().st_size:,} bytes, expected"
            f" {file_bytes(environment):,}; copy it again, or run `dvdp prepare`."
        )
    _readable[identity] = (os.getpid(), environment)
    return environment


def writable(file: Path) -> Any:
    """The environment of a file to write, made if it is missing.

    One writer and no lock file: what is written then depends on the records alone. Every transaction is on disk once
    it is committed, and one that is not leaves no trace that counts.
    """
    import lmdb

    # 0: as it is in the file.
    return lmdb.open(str(file), subdir=False, map_size=0 if file.exists() else _FIRST_MAP_BYTES, lock=False)


def put(environment: Any, items: Iterable[tuple[bytes, bytes]], append: bool) -> None:
    """Write records in one transaction.

    Args:
        append: their keys are in order, and come after all that are there.
    """
    import lmdb

    items = list(items)
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value, append=append)
            return
        except lmdb.MapFullError:
            # The transaction is undone.
            environment.set_mapsize(2 * environment.info()["map_size"])


def file_bytes(environment: Any) -> int:
    """How long its file must be."""
    pages: int = environment.info()["last_pgno"] + 1
    return pages * int(environment.stat()["psize"])
