"""The prepared data set: equal square images in one or more LMDB files (shards).

A store is a folder with

- ``data-00000.mdb``, ``data-00001.mdb``, ..: the images as :mod:`dvdp.data.records`, key: the image's index, 8 digits;
- ``digests.bin``: the digest of every record, 32 bytes each, in order; its own SHA-256 names the data set;
- ``metadata.json``: :class:`StoreMetadata`, written last.

The same images give the same bytes on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvdp.data.lmdb_files import readable
from dvdp.data.records import Encoding, Form, Resize, decode
from dvdp.errors import UserError

FORMAT_VERSION = 2
METADATA = "metadata.json"
DIGESTS = "digests.bin"


@dataclass(frozen=True)
class StoreMetadata:
    """All there is to know about a store without reading its images."""

    name: str
    """``dataset.name``."""
    source: str
    """``dataset.source``."""
    count: int
    resolution: int
    """Side of the images, in pixels."""
    encoding: Encoding
    jpeg_quality: int | None
    """Of encoding jpeg."""
    digest: str
    """SHA-256 over the records' digests in order, so of pixels and labels: the same for raw and png."""
    labels: tuple[str, ...]
    """Names of the classes; a label is an index into them. Empty if there are none."""
    label_counts: tuple[int, ...]
    """Images of each label, then those without."""
    skipped: int
    """Images of the source that could not be read."""
    duplicates: int
    """Images of the source that were left out, as they equal an earlier one."""
    means: tuple[float, ...]
    """Of red, green and blue, of images in [-1, 1]."""
    detail_std: tuple[float, ...]
    """Standard deviation, over the data set and per coefficient, of band i = 0, 1, .. of images in [-1, 1]."""
    level_std: tuple[float, ...]
    """The same of the level-k image, k = 0, 1, ..: one more than there are details."""
    shard_starts: tuple[int, ...]
    """Index of the first image of each shard."""
    shard_bytes: tuple[int, ...]
    """Length of each shard's file."""
    resize: Resize = "area"
    """``dataset.resize``."""
    channels: int = 3
    version: int = FORMAT_VERSION

    @property
    def form(self) -> Form:
        """How the images were resized, and are kept."""
        return Form(self.resolution, self.encoding, self.jpeg_quality, self.resize)

    def band_std(self, levels: int) -> tuple[float, ...]:
        """Of the ``levels + 1`` bands of a process with that many turning points, finest first.

        Raises:
            UserError: more levels than the store knows.
        """
        if levels >= len(self.level_std):
            raise UserError(
                f"turning_points: found {levels}, expected at most {len(self.level_std) - 1} for the band"
                f" std of data set '{self.name}' at {self.resolution} px."
            )
        return (*self.detail_std[:levels], self.level_std[levels])

    def model_metadata(self, levels: int) -> dict[str, Any]:
        """What a model with that many turning points keeps of its data (JSON); see :func:`dvdp.training.loop.train`."""
        return {
            "band_std": self.band_std(levels),
            "labels": self.labels,
            "label_counts": self.label_counts,
        }


class ImageStore:
    """Reads a store. Can be pickled and forked: each process opens a shard for itself, at its first read.

    Args:
        path: the store's folder.

    Raises:
        UserError: there is no store, or it is half-written, damaged or foreign, in any of its shards.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata = _read_metadata(self.path)
        self._opened: tuple[int, dict[int, Any]] = (os.getpid(), {})
        for shard in range(len(self.metadata.shard_starts)):
            self._environment(shard)

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (3, side, side) and label, -1 for none."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = bisect_right(self.metadata.shard_starts, index) - 1
        with self._environment(shard).begin(buffers=True) as transaction:
            return decode(transaction.get(key(index)), self.metadata.form)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Several images: (n, 3, side, side)."""
        return np.stack([self[index][0] for index in indices])

    def _environment(self, shard: int) -> Any:
        pid, environments = self._opened
        if pid != os.getpid():
            environments = {}
            self._opened = (os.getpid(), environments)
        if shard not in environments:
            environments[shard] = self._open(shard)
        return environments[shard]

    def _open(self, shard: int) -> Any:
        file, metadata = self.path / shard_name(shard), self.metadata
        if not file.is_file():
            raise UserError(
                f"data set: '{file}' is missing, expected {len(metadata.shard_starts)} files by {METADATA} beside it;"
                " copy the folder again, or run `dvdp prepare`."
            )
        if file.stat().st_size < metadata.shard_bytes[shard]:
            raise UserError(
                f"data set: '{file}' is cut short, found {file.stat().st_size:,} bytes, expected"
                f" {metadata.shard_bytes[shard]:,}; copy it again, or run `dvdp prepare`."
            )
        environment = readable(file)
        first, end = (*metadata.shard_starts, metadata.count)[shard : shard + 2]
        entries = environment.stat()["entries"]
        if entries != end - first:
            raise UserError(
                f"data set: '{file}' holds {entries} images, expected {end - first} by {METADATA} beside it;"
                " run `dvdp prepare` again."
            )
        return environment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, {})}


def key(index: int) -> bytes:
    """Of an image, in its shard."""
    return b"%08d" % index


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"data-{shard:05d}.mdb"


def check_replaceable(path: Path) -> None:
    """Raise UserError if something that is no store is at ``path``."""
    # Stores of format 1 were one LMDB in its usual files.
    ours = (METADATA, DIGESTS, "data-?????.mdb", "data.mdb", "lock.mdb")
    if path.exists() and not (path.is_dir() and all(any(p.match(name) for name in ours) for p in path.iterdir())):
        raise UserError(
            f"data set: '{path}' is no store and would be overwritten, expected a store or nothing there;"
            " give another folder."
        )


def _read_metadata(path: Path) -> StoreMetadata:
    file = path / METADATA
    if not file.is_file():
        if any(path.glob("*.mdb")):
            raise UserError(
                f"data set: '{path}' holds LMDB files without {METADATA}, so it is half-written, of an older version or"
                " another program's; move it away and run `dvdp prepare`."
            )
        raise UserError(
            f"data set: found no store at '{path}', expected a folder with {METADATA}; run `dvdp prepare` first."
        )
    tree: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        # Stores of before say nothing of it.
        tree = {"resize": "area", **json.loads(file.read_bytes())}
    if tree.get("version") != FORMAT_VERSION or set(tree) != {field.name for field in fields(StoreMetadata)}:
        raise UserError(
            f"data set: '{path}' is a store of format {tree.get('version', 'unknown')}, expected {FORMAT_VERSION};"
            " run `dvdp prepare` again."
        )
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    return StoreMetadata(**plain)
