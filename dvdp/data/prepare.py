"""From a source to a store: the `prepare` stage.

This process reads files and writes the store; other processes decode, resize and encode what lies in between. Chunks of
images go out and come back in the order of the source, so that nothing depends on how many processes there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dvdp.data.parallel import mapped
from dvdp.data.places import check_places, check_space, writing
from dvdp.data.records import Form, Records, Resize, encode
from dvdp.data.sources import SOURCES, ImageFolder, Item, Pixels, Source, UnreadableImageError
from dvdp.data.sources.base import totals
from dvdp.data.sources.files import fingerprint
from dvdp.data.store import StoreMetadata
from dvdp.data.writer import StoreWriter, Tally
from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from dvdp.text import FILE, LABEL, printable, shown

if TYPE_CHECKING:
    from dvdp.config import DatasetParams

logger = logging.getLogger("dvdp.data")

#: A chunk is as many images as are about so many bytes when raw, between so few and so many of them..
_RAW_BYTES, _FEWEST, _MOST = 4 << 20, 4, 256
#: .. and ends early when the source's own bytes are this many.
_SOURCE_BYTES = 16 << 20

#: Whose versions show in a store's bytes.
_LIBRARIES = ("albumentations", "lmdb", "numpy", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class _Raw:
    """An image as its source holds it, on its way to another process."""

    name: str
    label: int
    content: Any
    decode: Callable[[Any], Pixels]
    problem: str = ""
    """Why there is no content."""


@dataclass(frozen=True)
class _Prepared:
    """A chunk on its way back."""

    images: int
    """Read or skipped."""
    skipped: list[tuple[str, str]]
    """Name and reason."""
    names: list[str]
    """Of the others."""
    records: Records


def prepare(params: DatasetParams, out: Path, report: Path | None = None) -> StoreMetadata:
    """Read all images of the data set, resize them, and write them into a store.

    What an interrupted preparation of the same data set has done is kept, and gone on with. The result is the same.

    Args:
        out: the store's folder; replaced, at the very end, if it is there.
        report: a JSON file for what was found: counts, what was left out by reason and name, digest, std of the bands.
            Also written when too many are unreadable. The same images give the same report.

    Raises:
        UserError: store or report cannot be written where they are to be, the source is missing or wrong, there is no
            space for it, more than ``max_skipped`` of its images are unreadable, the disk is full, a worker was
            killed, or another preparation of the same store is running.
    """
    lock = out.with_name(f".{out.name}.lock")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with locked(lock, patience=0) as free:
        if not free:
            raise UserError(
                f"data set: another preparation of '{out}' is running and holds '{lock}'; wait for it, or end it."
            )
        check_places(out, report)
        source = _opened(params)
        labels = () if params.labels == "none" else source.labels
        for remark in _remarks(source):
            logger.info("%s", remark)
        quality = params.jpeg_quality if params.encoding == "jpeg" else None
        form = Form(params.resolution, params.encoding, quality, params.resize)
        if not params.deduplicate:
            check_space(out, form, source.count)
        with StoreWriter(
            out,
            name=params.name,
            source=params.source,
            form=form,
            labels=[shown(label, LABEL) for label in labels],
            deduplicate=params.deduplicate,
            shard_bytes=round(params.shard_gib * 2**30),
            identity=_identity(params, source),
        ) as writer:
            _fill(writer, source, labels, form, params, report)
            metadata = writer.finish()
            # Before the store is in place: a kill in between is made up for by the same command.
            _write_report(report, params, source, writer.tally, _of_store(metadata))
    return metadata


def _opened(params: DatasetParams) -> Source:
    try:
        if params.source == "image_folder":
            return ImageFolder(params.path, params.labels)
        return SOURCES[params.source](params.path)
    except OSError as error:  # Of the path as a whole, such as a name that is too long.
        raise UserError(
            f"dataset.path: cannot read '{params.path}' ({error.strerror}), expected a path that may be read; correct"
            " it."
        ) from None


def _remarks(source: Source) -> list[str]:
    """What to know about how labels were found."""
    return [f"labels: {printable(remark)}" for remark in getattr(source, "remarks", ())]


def _fill(
    writer: StoreWriter,
    source: Source,
    labels: Sequence[str],
    form: Form,
    params: DatasetParams,
    report: Path | None,
) -> None:
    """Write what is not there yet."""
    tally = writer.tally
    index = {label: i for i, label in enumerate(labels)}
    raws = (_raw(item, index) for item in islice(source, tally.position, None))
    chunks = mapped(partial(_prepared, form), _chunks(raws, form.resolution), params.workers)
    bar = tqdm(initial=tally.position, total=source.count, desc=f"prepare {params.name}", unit="image", disable=None)
    try:
        with contextlib.closing(chunks), bar:
            for chunk in chunks:
                for name, reason in chunk.skipped:
                    tally.skip(name, reason)
                    _check_skipped(tally, params, source, report)
                for name, twin in zip(chunk.names, writer.add(chunk.records), strict=True):
                    if twin is not None:
                        tally.leave_out(name, twin)
                tally.position += chunk.images
                writer.checkpoint()
                bar.update(chunk.images)
    except BrokenProcessPool:
        raise UserError(
            "dataset.workers: a process that prepares images was ended from outside, often for lack of memory; run the"
            f" same command, which goes on from here, with fewer than {params.workers}."
        ) from None
    if vanished := max(0, source.count - tally.position):
        tally.skip(f"{vanished:,} more", "not there any more when they were to be read", vanished)
        tally.position = source.count
    _check_skipped(tally, params, source, report)
    if not writer.count:
        raise UserError(f"dataset: all {source.count} images are unreadable, expected at least one.")


def _raw(item: Item, index: dict[str, int]) -> _Raw:
    name, label = shown(item.name, FILE), -1 if item.label is None or not index else index[item.label]
    try:
        return _Raw(name, label, item.read(), item.decode)
    except UnreadableImageError as error:
        return _Raw(name, label, b"", item.decode, str(error))


def _chunks(raws: Iterable[_Raw], resolution: int) -> Iterator[list[_Raw]]:
    most = min(max(_FEWEST, _RAW_BYTES // (3 * resolution**2)), _MOST)
    chunk: list[_Raw] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += memoryview(raw.content).nbytes
        if len(chunk) == most or size >= _SOURCE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _prepared(form: Form, chunk: list[_Raw]) -> _Prepared:
    """Runs in a worker."""
    transform = _transform(form.resolution, form.resize)
    skipped, names, labels, images = [], [], [], []
    for raw in chunk:
        try:
            if raw.problem:
                raise UnreadableImageError(raw.problem)
            images.append(transform(raw.decode(raw.content)))
        except UnreadableImageError as error:
            skipped.append((raw.name, str(error)))
        else:
            names.append(raw.name)
            labels.append(raw.label)
    return _Prepared(len(chunk), skipped, names, encode(images, labels, form))


@lru_cache(maxsize=1)
def _transform(resolution: int, resize: Resize) -> Callable[[Pixels], Pixels]:
    # Seconds to import, so only where it is needed, and after the first mistakes are found.
    from dvdp.data.transforms import prepare_transform

    return prepare_transform(resolution, resize)


def _check_skipped(tally: Tally, params: DatasetParams, source: Source, report: Path | None) -> None:
    if tally.skipped <= params.max_skipped * source.count:
        return
    _write_report(report, params, source, tally, {"failed": "too many unreadable images"})
    name, reason = next(iter(tally.skipped_images.items()))
    several = f"; {totals(tally.skipped_reasons)}" if len(tally.skipped_reasons) > 1 else ""
    raise UserError(
        f"dataset: found {tally.skipped} unreadable images among {source.count}, '{name}' first ({reason}{several}),"
        f" expected at most {params.max_skipped:g} of them by dataset.max_skipped; mend or remove them"
        + (f", '{report}' names them." if report else ".")
    )


def _identity(params: DatasetParams, source: Source) -> str:
    """Names all that a store's bytes depend on: params, source, code and libraries."""
    others = ("path", "workers", "flip", "max_skipped")
    shaping = {name: value for name, value in dataclasses.asdict(params).items() if name not in others}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    content = {
        **shaping,
        "files": fingerprint(params.path) if params.path else "",
        "count": source.count,
        "classes": source.labels,
        "code": code.hexdigest(),
        "libraries": [version(name) for name in _LIBRARIES],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _of_store(metadata: StoreMetadata) -> dict[str, Any]:
    *labelled, unlabelled = metadata.label_counts
    return {
        "count": metadata.count,
        "resolution": metadata.resolution,
        "encoding": metadata.encoding,
        "resize": metadata.resize,
        "digest": metadata.digest,
        # A list: DVC would make a column of each entry of a mapping.
        "labels": [{"label": label, "images": images} for label, images in zip(metadata.labels, labelled, strict=True)],
        "unlabelled": unlabelled,
        "detail_std": metadata.detail_std,
        "level_std": metadata.level_std,
    }


def _write_report(path: Path | None, params: DatasetParams, source: Source, tally: Tally, more: dict[str, Any]) -> None:
    if path is None:
        return
    content = {
        "name": params.name,
        "source": params.source,
        "images_found": source.count,
        "skipped": tally.skipped,
        "skipped_reasons": [{"reason": reason, "images": n} for reason, n in tally.skipped_reasons.items()],
        "skipped_images": tally.skipped_images,
        "duplicates": tally.duplicates,
        "duplicate_images": [{"image": name, "equals": index} for name, index in tally.duplicate_images.items()],
        "left_out": [
            {"reason": reason, "files": n, "names": [shown(name, FILE) for name in source.left_out.names[reason]]}
            for reason, n in source.left_out.counts.items()
        ],
        "remarks": list(_remarks(source)),
        **more,
    }
    with writing(path):
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
