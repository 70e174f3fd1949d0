"""The prepared data set: an LMDB of equal square images.

Key: the image's index, 8 digits. Value: label (little-endian int32, -1 for none), then the pixels: raw uint8 (3, side,
side), or PNG. Key ``metadata``: :class:`StoreMetadata` as JSON. The same images give the same bytes on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage

from dvdp import bands
from dvdp.errors import UserError
from dvdp.files import sync_folder

Encoding = Literal["raw", "png"]

FORMAT_VERSION = 1
MOST_HALVINGS = 4
_METADATA = b"metadata"
_FILE = "data.mdb"
#: Images are written in transactions of about this size, from a map of one eighth of it upwards.
_TRANSACTION_BYTES = 8 << 20


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
    digest: str
    """SHA-256 over label (int32) and pixels of every image in order: the same for both encodings."""
    labels: tuple[str, ...]
    """Names of the classes; a label is an index into them. Empty if there are none."""
    skipped: int
    """Images of the source that could not be read."""
    detail_deviations: tuple[float, ...]
    """Standard deviation, over the data set and per coefficient, of band i = 0, 1, .. of images in [-1, 1]."""
    level_deviations: tuple[float, ...]
    """The same of the level-k image, k = 0, 1, ..: one more than there are details."""
    channels: int = 3
    version: int = FORMAT_VERSION

    def band_deviations(self, levels: int) -> tuple[float, ...]:
        """Of the ``levels + 1`` bands of a process with that many turning points, finest first.

        Raises:
            UserError: more levels than the store knows.
        """
        if levels >= len(self.level_deviations):
            raise UserError(
                f"turning_points: found {levels}, expected at most {len(self.level_deviations) - 1} for the band"
                f" deviations of data set '{self.name}' at {self.resolution} px."
            )
        return (*self.detail_deviations[:levels], self.level_deviations[levels])


class ImageStore:
    """Reads a store. Can be pickled and forked: each process opens the file for itself, at its first read.

    Args:
        path: the store's folder.

    Raises:
        UserError: there is no store, or it is half-written, damaged or foreign.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._opened: tuple[int, Any] | None = None
        self.metadata: StoreMetadata = _read_metadata(self.path, self._environment())

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image (3, side, side) and label, -1 for none."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        with self._environment().begin(buffers=True) as transaction:
            value = transaction.get(_key(index))
            pixels = _decode(value[4:], self.metadata.encoding, self.metadata.resolution)
            return pixels, int.from_bytes(value[:4], "little", signed=True)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Several images: (n, 3, side, side)."""
        return np.stack([self[index][0] for index in indices])

    def _environment(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _environment(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class StoreWriter:
    """Writes a store aside; :meth:`finish` puts it in its place, whole. Leaving without that removes it.

    Args:
        path: the store's folder; a store that is there is replaced at the end.
        labels: names of the classes.

    Raises:
        UserError: something that is no store is at ``path``.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        source: str,
        resolution: int,
        encoding: Encoding = "raw",
        labels: Sequence[str] = (),
    ) -> None:
        _check_replaceable(path)
        self._path, self._name, self._source, self._labels = path, name, source, tuple(labels)
        self._resolution, self._encoding = resolution, encoding
        self._count = 0
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_images: list[NDArray[np.uint8]] = []
        self._pending_bytes = 0
        self._digest = hashlib.sha256()
        self._statistics = _BandStatistics(resolution)

    def __enter__(self) -> StoreWriter:
        import lmdb

        self._aside = self._path.with_name(f".{self._path.name}.part")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        # One writer and no lock file: the bytes then depend on the images alone. Synchronised once, at the end.
        self._lmdb = lmdb.open(
            str(self._aside), map_size=_TRANSACTION_BYTES // 8, lock=False, sync=False, metasync=False
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lmdb.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, image: NDArray[np.uint8], label: int = -1) -> None:
        """Append an image (3, side, side)."""
        if image.shape != (3, self._resolution, self._resolution) or image.dtype != np.uint8:
            raise ValueError(f"image {self._count}: {image.dtype} {image.shape}")
        head = label.to_bytes(4, "little", signed=True)
        self._digest.update(head)
        self._digest.update(image.tobytes())
        value = head + _encode(image, self._encoding)
        self._pending.append((_key(self._count), value))
        self._pending_images.append(image)
        self._pending_bytes += image.size
        self._count += 1
        if self._pending_bytes >= _TRANSACTION_BYTES:
            self._flush()

    def finish(self, skipped: int = 0) -> StoreMetadata:
        """Write the metadata, make all of it safe on disk, and move it to its place."""
        self._flush()
        details, levels = self._statistics.deviations()
        metadata = StoreMetadata(
            name=self._name,
            source=self._source,
            count=self._count,
            resolution=self._resolution,
            encoding=self._encoding,
            digest=self._digest.hexdigest(),
            labels=self._labels,
            skipped=skipped,
            detail_deviations=details,
            level_deviations=levels,
        )
        self._put([(_METADATA, json.dumps(asdict(metadata), sort_keys=True).encode())])
        self._lmdb.sync(True)
        self._lmdb.close()
        sync_folder(self._aside)
        if self._path.exists():
            # A folder cannot be renamed over another one that is not empty.
            _check_replaceable(self._path)
            shutil.rmtree(self._path)
        self._aside.rename(self._path)
        sync_folder(self._path.parent)
        return metadata

    def _flush(self) -> None:
        if self._pending:
            self._put(self._pending)
            self._statistics.add(np.stack(self._pending_images))
            self._pending, self._pending_images, self._pending_bytes = [], [], 0

    def _put(self, items: list[tuple[bytes, bytes]]) -> None:
        import lmdb

        while True:
            try:
                with self._lmdb.begin(write=True) as transaction:
                    for key, value in items:
                        transaction.put(key, value, append=True)
                return
            except lmdb.MapFullError:
                # The transaction is undone; the new size is part of the file, so it must not depend on the machine.
                self._lmdb.set_mapsize(2 * self._lmdb.info()["map_size"])


class _BandStatistics:
    """Standard deviation of each band over the data set.

    Works on pixels minus 127.5: all sums of one image are then exact, so that the number of threads cannot show.
    """

    def __init__(self, side: int) -> None:
        self.halvings = 0
        while self.halvings < MOST_HALVINGS and side % 2 ** (self.halvings + 1) == 0:
            self.halvings += 1
        self.count = 0
        self.total = torch.zeros(1, 3, side, side, dtype=torch.float64)
        self.energies = torch.zeros(2, self.halvings + 1, dtype=torch.float64)

    def add(self, images: NDArray[np.uint8]) -> None:
        for part in torch.from_numpy(images).split(max(1, (1 << 20) // images[0].size)):
            centred = part.double() - 127.5
            self.count += len(part)
            self.total += centred.sum(dim=0, keepdim=True)
            self.energies += self._energies(centred).sum(dim=0)

    def _energies(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 2, halvings + 1): details (the last is unused), and whole levels."""
        levels = [bands.to_level(images, k).square().flatten(1).mean(1) for k in range(self.halvings + 1)]
        return torch.stack([bands.energies(images, self.halvings), torch.stack(levels, dim=1)], dim=1)

    def deviations(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the details (finest first), and of the levels."""
        variance = self.energies / self.count - self._energies(self.total / self.count)[0]
        details, levels = (variance.clamp(min=0).sqrt() / 127.5).tolist()
        return tuple(round(d, 6) for d in details[:-1]), tuple(round(d, 6) for d in levels)


def _key(index: int) -> bytes:
    return b"%08d" % index


def _encode(image: NDArray[np.uint8], encoding: Encoding) -> bytes:
    if encoding == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(value: Any, encoding: Encoding, side: int) -> NDArray[np.uint8]:
    if encoding == "raw":
        return np.frombuffer(value, dtype=np.uint8).reshape(3, side, side).copy()
    with PillowImage.open(io.BytesIO(value)) as image:
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


#: Open environments of this process: LMDB allows a file to be opened only once in each.
_environments: dict[tuple[int, int], tuple[int, Any]] = {}


def _environment(path: Path) -> Any:
    import lmdb

    file = path / _FILE
    if not file.is_file():
        raise UserError(f"data set: found no store at '{path}', expected an LMDB folder; run `dvdp prepare` first.")
    identity = (file.stat().st_dev, file.stat().st_ino)
    pid, environment = _environments.get(identity, (0, None))
    if environment is not None and pid == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # Came with a fork; the parent keeps its own.
    try:
        environment = lmdb.open(
            str(path), create=False, readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=4
        )
    except lmdb.Error as error:
        raise UserError(
            f"data set: '{file}' is no LMDB file ({str(error).split(': ')[-1]}), expected one that `dvdp prepare`"
            " wrote; move it away and run that."
        ) from None
    # Reading a page beyond the end of the file would kill the process.
    if file.stat().st_size < (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]:
        environment.close()
        raise UserError(
            f"data set: '{file}' is cut short, found {file.stat().st_size:,} bytes, expected more; copy it again, or"
            " run `dvdp prepare`."
        )
    _environments[identity] = (os.getpid(), environment)
    return environment


def _read_metadata(path: Path, environment: Any) -> StoreMetadata:
    with environment.begin() as transaction:
        value = transaction.get(_METADATA)
        entries = environment.stat()["entries"]
    if value is None:
        raise UserError(
            f"data set: '{path}' holds an LMDB without our metadata, so it is half-written or another program's;"
            " move it away and run `dvdp prepare`."
        )
    tree: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        tree = dict(json.loads(value))
    if tree.get("version") != FORMAT_VERSION or set(tree) != {field.name for field in fields(StoreMetadata)}:
        raise UserError(
            f"data set: '{path}' is a store of format {tree.get('version', 'unknown')}, expected {FORMAT_VERSION};"
            " run `dvdp prepare` again."
        )
    tree = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    metadata = StoreMetadata(**tree)
    if entries != metadata.count + 1:
        raise UserError(
            f"data set: '{path}' holds {entries - 1} images, expected {metadata.count} by its metadata;"
            " run `dvdp prepare` again."
        )
    return metadata


def _check_replaceable(path: Path) -> None:
    if path.exists() and not (path.is_dir() and all(p.name in (_FILE, "lock.mdb") for p in path.iterdir())):
        raise UserError(
            f"data set: '{path}' is no store and would be overwritten, expected a store or nothing there;"
            " give another folder."
        )
