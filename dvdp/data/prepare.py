"""From a source to a store: the `prepare` stage."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dvdp.config import DatasetParams
from dvdp.data.sources import SOURCES, UnreadableImageError
from dvdp.data.store import StoreMetadata, StoreWriter
from dvdp.errors import UserError
from dvdp.files import locked, write_atomically

#: Unreadable images that the report names; beyond, it only counts them.
MOST_NAMES = 100


def prepare(params: DatasetParams, out: Path, report: Path | None = None) -> StoreMetadata:
    """Read all images of the data set, resize them, and write them into a store.

    Args:
        out: the store's folder; replaced, at the very end, if it is there.
        report: a JSON file for what was found: counts, unreadable images by name, digest, deviations of the bands.
            Also written when too many are unreadable. The same images give the same report.

    Raises:
        UserError: the source is missing or wrong, more than ``max_skipped`` of its images are unreadable, or another
            preparation of the same store is running.
    """
    lock = out.with_name(f".{out.name}.lock")
    with locked(lock, patience=0) as free:
        if not free:
            raise UserError(
                f"data set: another preparation of '{out}' is running and holds '{lock}'; wait for it, or end it."
            )
        source = SOURCES[params.source](params.path)
        # Seconds to import, so after the first mistakes are found.
        from dvdp.data.transforms import prepare_transform

        transform = prepare_transform(params.resolution)
        skipped: dict[str, str] = {}
        labels: Counter[str | None] = Counter()
        index = {label: i for i, label in enumerate(source.labels)}
        with StoreWriter(
            out,
            name=params.name,
            source=params.source,
            resolution=params.resolution,
            encoding=params.encoding,
            labels=source.labels,
        ) as writer:
            for item in tqdm(source, total=source.count, desc=f"prepare {params.name}", unit="image", disable=None):
                try:
                    image = item.load()
                except UnreadableImageError as error:
                    skipped[item.name] = str(error)
                    if len(skipped) > params.max_skipped * source.count:
                        break
                    continue
                writer.add(transform(image), -1 if item.label is None else index[item.label])
                labels[item.label] += 1

            found = {
                "name": params.name,
                "source": params.source,
                "images_found": source.count,
                "skipped": len(skipped),
                "skipped_images": dict(list(skipped.items())[:MOST_NAMES]),
            }
            if len(skipped) > params.max_skipped * source.count:
                _write_report(report, {**found, "failed": "too many unreadable images"})
                name, reason = next(iter(skipped.items()))
                raise UserError(
                    f"dataset: found {len(skipped)} unreadable images among {source.count}, '{name}' first ({reason}),"
                    f" expected at most {params.max_skipped:g} of them by dataset.max_skipped; mend or remove them"
                    + (f", '{report}' names them." if report else ".")
                )
            if not labels:
                raise UserError(f"dataset: all {source.count} images are unreadable, expected at least one.")
            metadata = writer.finish(len(skipped))
        _write_report(
            report,
            {
                **found,
                "count": metadata.count,
                "resolution": metadata.resolution,
                "encoding": metadata.encoding,
                "digest": metadata.digest,
                # A list: DVC would make a column of each entry of a mapping.
                "labels": [{"label": label, "images": labels[label]} for label in metadata.labels],
                "unlabelled": labels[None],
                "detail_deviations": metadata.detail_deviations,
                "level_deviations": metadata.level_deviations,
            },
        )
        return metadata


def _write_report(path: Path | None, content: dict[str, Any]) -> None:
    if path:
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
