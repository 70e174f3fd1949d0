"""Whether a store still holds what was written into it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dvdp.data.parallel import mapped
from dvdp.data.records import DIGEST_BYTES, digests_of
from dvdp.data.store import DIGESTS, ImageStore, StoreMetadata
from dvdp.errors import UserError

#: Damaged images that are named; beyond, they are only counted.
MOST_NAMES = 20
#: Images that one task checks.
_CHUNK = 256


def verify(path: Path, workers: int = 1) -> StoreMetadata:
    """Check every image of a store, pixels and label, against its digest.

    Args:
        workers: processes that do it; 0 does it in this one, which damage to the structure of an LMDB file can crash.

    Raises:
        UserError: there is no store, or it is damaged; the text names the first of the damaged images.
    """
    store = ImageStore(path)
    count = len(store)
    _check_digests(store)
    damaged: list[int] = []
    results = mapped(partial(_damaged, store), _spans(count), workers)
    bar = tqdm(total=count, desc=f"verify {store.metadata.name}", unit="image", disable=None)
    try:
        with closing(results), bar:
            for span, found in zip(_spans(count), results, strict=True):
                damaged += found
                bar.update(len(span))
    except BrokenProcessPool:
        raise UserError(
            f"data set: reading '{path}' crashed at image {bar.n} or soon after, so that one of its files is damaged"
            " beyond naming images, or memory ran out; run `dvdp prepare` again."
        ) from None
    if damaged:
        named = ", ".join(map(str, damaged[:MOST_NAMES])) + (", .." if len(damaged) > MOST_NAMES else "")
        raise UserError(
            f"data set: found {len(damaged):,} of {count:,} images damaged in '{path}' (number {named}), expected"
            " each to match its digest; run `dvdp prepare` again."
        )
    return store.metadata


def _spans(count: int) -> Iterator[range]:
    return (range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))


def _check_digests(store: ImageStore) -> None:
    file = store.path / DIGESTS
    found = "nothing"
    if file.is_file():
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != store.metadata.digest:
        raise UserError(
            f"data set: '{file}' has SHA-256 {found}, expected {store.metadata.digest} by the metadata beside it; copy"
            " the folder again, or run `dvdp prepare`."
        )


def _damaged(store: ImageStore, span: range) -> list[int]:
    """Runs in a worker."""
    with (store.path / DIGESTS).open("rb") as file:
        file.seek(span.start * DIGEST_BYTES)
        return [index for index in span if not _matches(store, index, file.read(DIGEST_BYTES))]


def _matches(store: ImageStore, index: int, digest: bytes) -> bool:
    try:
        pixels, label = store[index]
    except Exception:  # LMDB and decoders raise whatever they trip over.
        return False
    return digests_of(pixels, label)[1] == digest
