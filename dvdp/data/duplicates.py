"""Equal images, known by the digest of their pixels."""

from __future__ import annotations

from pathlib import Path

from dvdp.data.lmdb_files import put, writable


class Seen:
    """Which image was the first with some content. Kept in an LMDB file: memory does not grow with the data set.

    To be committed before the images themselves.

    Args:
        count: images that are stored; what a kill left of later ones is forgotten.
    """

    def __init__(self, file: Path, count: int) -> None:
        self._environment = writable(file)
        self._pending: dict[bytes, int] = {}
        with self._environment.begin(write=True) as transaction:
            entries = ((content, int.from_bytes(index, "little")) for content, index in transaction.cursor())
            for content in [bytes(content) for content, index in entries if index >= count]:
                transaction.delete(content)

    def first(self, content: bytes, index: int) -> int:
        """Index of the first image with this content: ``index`` itself, if no earlier one has it."""
        found = self._pending.get(content)
        if found is None:
            with self._environment.begin() as transaction:
                value = transaction.get(content)
            found = index if value is None else int.from_bytes(value, "little")
        if found < index:
            return found
        self._pending[content] = index
        return index

    def commit(self) -> None:
        """Keep what is new."""
        items = sorted((content, index.to_bytes(8, "little")) for content, index in self._pending.items())
        put(self._environment, items, append=False)
        self._pending = {}

    def close(self) -> None:
        """What is not committed is forgotten."""
        self._environment.close()
