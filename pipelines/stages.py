"""The stages of ``dvc.yaml`` before the experiment, as plain functions.

Each imports what it needs when it is called: torch and albumentations take seconds, and most stages need but one.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from dvdp.config import Params
from dvdp.data.store import ImageStore
from pipelines.jobs.paths import DataPaths

logger = logging.getLogger("dvdp.stages")


def prepare_data(params: Params) -> None:
    """DVC stage ``prepare``: raw images to LMDB."""
    from dvdp.data.prepare import prepare

    places = DataPaths.of(params)
    metadata = prepare(params.dataset, places.store, places.data / "prepare.json")
    found = json.loads((places.data / "prepare.json").read_bytes())
    reasons = [f"{entry['images']:,} unreadable ({entry['reason']})" for entry in found["skipped_reasons"]]
    reasons += [f"{metadata.duplicates:,} duplicates"] if metadata.duplicates else []
    reasons += [f"{entry['files']:,} {entry['reason']}" for entry in found["left_out"]]
    logger.info(
        "%s images of %s px in %s, left out: %s",
        f"{metadata.count:,}", metadata.resolution, places.store, ", ".join(reasons) or "nothing",
    )  # fmt: skip


def verify_data(params: Params) -> str:
    """Check every image of the prepared data set; one line for people, or a UserError that names the damaged ones."""
    from dvdp.data.verify import verify

    store = DataPaths.of(params).store
    metadata = verify(store, max(1, params.dataset.workers))
    return f"{metadata.count:,} images in {store} are as they were prepared, digest {metadata.digest}"


def describe_data(params: Params) -> str:
    """The prepared data set in numbers, for people."""
    metadata = ImageStore(DataPaths.of(params).store).metadata
    encoding = metadata.encoding + (f" of quality {metadata.jpeg_quality}" if metadata.jpeg_quality else "")
    labels = [*zip(metadata.labels, metadata.label_counts, strict=False), ("none", metadata.label_counts[-1])]
    numbers = {
        "data set": f"{metadata.name}, from {metadata.source}, digest {metadata.digest}",
        "images": f"{metadata.count:,} of {metadata.resolution} px",
        "left out": f"{metadata.skipped:,} unreadable, {metadata.duplicates:,} duplicates",
        "stored as": f"{encoding}, {sum(metadata.shard_bytes):,} bytes, files: {len(metadata.shard_bytes)}",
        "labels": ", ".join(f"{label} {count:,}" for label, count in labels if count),
        # Of images in [-1, 1], as networks see them.
        "mean": ", ".join(f"{name} {x:.4f}" for name, x in zip(("red", "green", "blue"), metadata.means, strict=True)),
        "deviation": ", ".join(f"band {i} {x:.4f}" for i, x in enumerate(metadata.detail_std)),
        "of levels": ", ".join(f"level {i} {x:.4f}" for i, x in enumerate(metadata.level_std)),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in numbers.items() if text)


#: Images of a data set's contact sheet, at most, and how many pixels each is wide, at most.
SHEET_IMAGES, SHEET_SIDE = 64, 256


def data_sheet(params: Params, out: Path) -> Path:
    """A picture of images from all over the prepared data set."""
    import numpy as np
    from PIL import Image

    from dvdp.evaluation import figures

    store = ImageStore(DataPaths.of(params).store)
    chosen = np.unique(np.linspace(0, len(store) - 1, SHEET_IMAGES).round().astype(int)).tolist()
    shrink = math.ceil(store.metadata.resolution / SHEET_SIDE)
    tiles = [Image.fromarray(store[index][0].transpose(1, 2, 0)).reduce(shrink) for index in chosen]
    return figures.save_png(figures.grid(np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])), out)


def make_extractor(params: Params) -> None:
    """DVC stage ``extractor``: train the network that scores are made with (Inception needs no training)."""
    from dvdp.evaluation.extractors import inception_extractor, train_extractor

    places = DataPaths.of(params)
    if params.evaluation.extractor == "inception":
        places.extractor.mkdir(parents=True, exist_ok=True)
        inception_extractor(params.evaluation.inception_weights)
        return
    store = ImageStore(places.store)
    info = train_extractor(
        store,
        params.evaluation.extractor,
        params.evaluation.extractor_epochs,
        store.metadata.digest,
        places.extractor,
    )
    logger.info("extractor: %s, %.1f %% right on images held out", info.task, 100 * info.accuracy)


def make_references(params: Params) -> None:
    """DVC stage ``reference``: features of the real images."""
    from pipelines.jobs.cluster import cluster, on_worker
    from pipelines.jobs.device import worker_device
    from pipelines.jobs.score import extractor_of, for_worker, reference_on_worker

    places = DataPaths.of(params)
    # Whoever lacks both is told of what comes first.
    store = ImageStore(places.store).path
    asked = store.resolve(), for_worker(extractor_of(params)), places.reference.resolve()
    if params.cluster.gpu:
        with cluster(params.cluster) as slots, slots.hold(1):
            reference = on_worker(params.cluster, reference_on_worker, *asked, worker_device(params.cluster))
    else:
        reference = reference_on_worker(*asked, "cpu")
    logger.info("reference: %s images", f"{reference.count:,}")


def export_references(params: Params, out: Path) -> None:
    """The reference that is there, as an ``.npz`` file for others."""
    from dvdp.evaluation.reference import export_statistics

    export_statistics(DataPaths.of(params).reference, out)
    logger.info("reference: mean and covariance of the features of %s in %s", params.dataset.name, out)
