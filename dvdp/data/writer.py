"""Writes a store so that a kill at any moment costs the work since the last commit, and changes nothing in the result.

Everything goes into a folder beside the store's place, ``.<name>.part``: the files to be in ``store``, and what has
been found so far (:class:`Tally`) in ``progress-<count>``. Of a commit, digests and tally are written first and the
images, in one transaction of LMDB, last: the number of images in the shards then says which tally is theirs, and how
many digests. What was begun after that is done again, the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from dvdp.data.duplicates import Seen
from dvdp.data.lmdb_files import file_bytes, put, writable
from dvdp.data.moments import Moments
from dvdp.data.records import DIGEST_BYTES, Form, Records, decode
from dvdp.data.sources.base import MOST_NAMES
from dvdp.data.store import DIGESTS, METADATA, StoreMetadata, check_replaceable, key, shard_name
from dvdp.errors import UserError
from dvdp.files import sync_folder, write_atomically

#: Images are committed when they are at least so many, and so many bytes if they were raw. (A tally is as long as eight
#: raw images.)
_COMMIT_IMAGES, _COMMIT_BYTES = 64, 8 << 20


@dataclass
class Tally:
    """What has been found so far. All of it is committed with the images, and comes back with them."""

    moments: Moments
    label_counts: list[int]
    """Images of each label, then those without."""
    shard_starts: list[int] = field(default_factory=list)
    position: int = 0
    """Images of the source that are done, whatever became of them."""
    skipped: int = 0
    skipped_images: dict[str, str] = field(default_factory=dict)
    """Why, by name; of the first ones."""
    skipped_reasons: dict[str, int] = field(default_factory=dict)
    """Number of all of them, by the reason without its numbers."""
    duplicates: int = 0
    duplicate_images: dict[str, int] = field(default_factory=dict)
    """Index of the equal image in the store, by name; of the first ones."""

    def skip(self, name: str, reason: str, images: int = 1) -> None:
        """Count an image that cannot be read, or several of one reason under one name."""
        self.skipped += images
        if len(self.skipped_images) < MOST_NAMES:
            self.skipped_images[name] = reason
        kind = re.sub(r"\d[\d,.]*", "N", reason)
        if kind not in self.skipped_reasons and len(self.skipped_reasons) >= MOST_NAMES:
            kind = "other reasons"
        self.skipped_reasons[kind] = self.skipped_reasons.get(kind, 0) + images

    def leave_out(self, name: str, twin: int) -> None:
        """Count an image that equals one in the store."""
        self.duplicates += 1
        if len(self.duplicate_images) < MOST_NAMES:
            self.duplicate_images[name] = twin

    def write(self, path: Path, identity: str) -> None:
        """Into a file: a line of JSON, then the sums of pixels."""
        plain = asdict(replace(self, moments=replace(self.moments, pixels=None)))  # type: ignore[arg-type]
        head = json.dumps({"identity": identity, **plain}).encode()
        write_atomically(path, head + b"\n" + self.moments.pixels.astype("<i8").tobytes())

    @staticmethod
    def read(path: Path, identity: str, resolution: int) -> Tally:
        """From a file; raises ValueError if it belongs to something else."""
        head, pixels = path.read_bytes().split(b"\n", 1)
        tree = json.loads(head)
        if tree.pop("identity") != identity:
            raise ValueError(f"'{path}' is of something else")
        sums = np.frombuffer(pixels, "<i8").reshape(3, resolution, resolution)
        return Tally(**{**tree, "moments": Moments(**{**tree["moments"], "pixels": sums})})


class StoreWriter:
    """Writes a store; :meth:`finish` completes it, and leaving the block then puts it in its place.

    Left before, by an error or a kill, it keeps what is committed, and a writer of the same identity goes on with that:
    :attr:`tally` says from where.

    Args:
        path: the store's folder; a store that is there is replaced at the end.
        labels: names of the classes.
        deduplicate: leave out images that equal an earlier one.
        shard_bytes: a shard that has grown to this length is closed, and the next one begun.
        identity: names all that the store's content depends on; what is found of another identity is removed.

    Raises:
        UserError: something that is no store is at ``path``; or, at any time, writing fails, as on a full disk.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        source: str,
        form: Form,
        labels: Sequence[str] = (),
        deduplicate: bool = False,
        shard_bytes: int = 8 << 30,
        identity: str = "",
    ) -> None:
        check_replaceable(path)
        self._path, self._name, self._source, self._form, self._labels = path, name, source, form, tuple(labels)
        self._deduplicate, self._shard_bytes, self._identity = deduplicate, shard_bytes, identity
        raw = 3 * form.resolution**2
        self._commit_images = max(1, min(max(_COMMIT_IMAGES, _COMMIT_BYTES // raw), shard_bytes // raw))
        self._part = path.with_name(f".{path.name}.part")
        self._folder = self._part / "store"
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_digests: list[bytes] = []
        self._shard_length = 0
        self._seen: Seen | None = None
        self._metadata: StoreMetadata | None = None
        self.count = 0
        """Images so far."""
        self.tally = Tally(Moments.none(form.resolution), [0] * (len(self._labels) + 1))

    def __enter__(self) -> StoreWriter:
        with self._writing():
            if not self._resume():
                shutil.rmtree(self._part, ignore_errors=True)
                self._folder.mkdir(parents=True)
                (self._folder / DIGESTS).touch()
            for aside in self._folder.glob(".*.part"):  # Metadata that a kill cut short.
                aside.unlink()
            self._digests = (self._folder / DIGESTS).open("r+b")
            self._digests.truncate(self.count * DIGEST_BYTES)
            self._digests.seek(0, os.SEEK_END)
            if self._deduplicate:
                self._seen = Seen(self._part / "seen.mdb", self.count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is None and self._metadata:
            with self._writing():
                self._publish()
        elif not any(self._part.glob("progress-*")):
            shutil.rmtree(self._part, ignore_errors=True)

    def add(self, records: Records) -> list[int | None]:
        """Append images.

        Returns:
            For each the index of the equal image for which it was left out, or None.
        """
        self.tally.moments.add(records.moments)
        twins = [
            self._add(value, label, digest, content)
            for value, label, digest, content in zip(
                records.values, records.labels, records.digests, records.contents, strict=True
            )
        ]
        left_out = [
            decode(value, self._form)[0] for value, twin in zip(records.values, twins, strict=True) if twin is not None
        ]
        if left_out:
            self.tally.moments.add(Moments.of(left_out, self._form.resolution), sign=-1)
        return twins

    def checkpoint(self) -> None:
        """Commit, if there is enough: everything so far, with the tally as it is now."""
        if len(self._pending) >= self._commit_images:
            self._commit()

    def finish(self) -> StoreMetadata:
        """Commit the rest, write the metadata, and make all of it safe on disk."""
        self._commit()
        with self._writing():
            self._close()
            means = self.tally.moments.means()
            details, levels = self.tally.moments.std()
            with (self._folder / DIGESTS).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            starts = self.tally.shard_starts
            self._metadata = StoreMetadata(
                name=self._name,
                source=self._source,
                count=self.count,
                resolution=self._form.resolution,
                encoding=self._form.encoding,
                jpeg_quality=self._form.jpeg_quality,
                resize=self._form.resize,
                digest=digest,
                labels=self._labels,
                label_counts=tuple(self.tally.label_counts),
                skipped=self.tally.skipped,
                duplicates=self.tally.duplicates,
                means=means,
                detail_std=details,
                level_std=levels,
                shard_starts=tuple(starts),
                shard_bytes=tuple((self._folder / shard_name(i)).stat().st_size for i in range(len(starts))),
            )
            write_atomically(self._folder / METADATA, json.dumps(asdict(self._metadata), indent=2) + "\n")
        return self._metadata

    def _add(self, value: bytes, label: int, digest: bytes, content: bytes) -> int | None:
        if self._seen:
            first = self._seen.first(content, self.count)
            if first != self.count:
                return first
        self._pending.append((key(self.count), value))
        self._pending_digests.append(digest)
        self.tally.label_counts[label] += 1
        self.count += 1
        return None

    def _commit(self) -> None:
        with self._writing():
            starts = self.tally.shard_starts
            if self._pending and (not starts or self._shard_length >= self._shard_bytes):
                starts.append(self.count - len(self._pending))
                (self._folder / shard_name(len(starts) - 1)).unlink(missing_ok=True)  # Begun before a kill.
            self._digests.write(b"".join(self._pending_digests))
            self._digests.flush()
            os.fsync(self._digests.fileno())
            if self._seen:
                self._seen.commit()
            progress = self._part / f"progress-{self.count:08d}"
            self.tally.write(progress, self._identity)
            if self._pending:
                # Opened anew each time: pages that LMDB keeps in memory would carry traces of earlier commits into the
                # gaps of later ones, and bytes would depend on interruptions.
                with writable(self._folder / shard_name(len(starts) - 1)) as shard:
                    put(shard, self._pending, append=True)
                    self._shard_length = file_bytes(shard)
                sync_folder(self._folder)
            for old in self._part.glob("progress-*"):
                if old != progress:
                    old.unlink()
            self._pending, self._pending_digests = [], []

    def _resume(self) -> bool:
        """Go on with what is there, if that is ours."""
        import lmdb

        for path in sorted(self._part.glob("progress-????????"), reverse=True):
            # Whatever is not as we write it is not ours.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError, lmdb.Error):
                tally = Tally.read(path, self._identity, self._form.resolution)
                count, first = tally.moments.count, tally.shard_starts[-1]
                file = self._folder / shard_name(len(tally.shard_starts) - 1)
                if file.is_file() and (self._folder / DIGESTS).stat().st_size >= count * DIGEST_BYTES:
                    with writable(file) as shard:
                        whole = file.stat().st_size >= file_bytes(shard)
                        if whole and shard.stat()["entries"] == count - first:
                            self.tally, self.count, self._shard_length = tally, count, file_bytes(shard)
                            return True
        return False

    def _publish(self) -> None:
        sync_folder(self._folder)
        if self._path.exists():
            # A folder cannot be renamed over another one that is not empty.
            check_replaceable(self._path)
            shutil.rmtree(self._path)
        self._folder.rename(self._path)
        sync_folder(self._path.parent)
        shutil.rmtree(self._part, ignore_errors=True)

    def _close(self) -> None:
        if self._seen:
            self._seen.close()
        with contextlib.suppress(OSError):  # What a full disk did not take is not committed.
            self._digests.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        import lmdb

        try:
            yield
        except (OSError, lmdb.Error) as error:
            # LMDB calls a disk that fills up in the middle of a page an input/output error.
            reason = (error.strerror if isinstance(error, OSError) else str(error).split(": ")[-1]) or str(error)
            free = shutil.disk_usage(next(folder for folder in self._part.absolute().parents if folder.exists())).free
            raise UserError(
                f"data set: cannot write '{self._part}' ({reason}, {free:,} bytes free), expected free space on its"
                " disk and the right to write; mend that and run the same command, which goes on from here."
            ) from None
