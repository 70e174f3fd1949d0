"""Samples beside the training images that are nearest to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dvdp.data.store import ImageStore
from dvdp.evaluation import figures
from dvdp.evaluation.copies import read_pairs
from dvdp.evaluation.reference import read_reference
from dvdp.evaluation.samples import SampleShards
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.score import nearest_path

COUNT = 12


def nearest_table(job: Job) -> Path:
    """The nearest training images of every sample of a scored job, CSV."""
    return nearest_path(job.score_path(read_reference(DataPaths.of(job.params).reference).sha256))


def draw_nearest(job: Job, picture: Path) -> Path:
    """The samples that are closest to training images, each above the nearest of those in pixels and in features."""
    pairs = read_pairs(nearest_table(job), COUNT)
    samples, store = SampleShards(job.samples), ImageStore(DataPaths.of(job.params).store)
    rows = {
        job.name: np.stack([samples[pair.sample].numpy() for pair in pairs]),
        "nearest in pixels": np.stack([store[pair.in_pixels][0] for pair in pairs]),
        "nearest in features": np.stack([store[pair.in_features][0] for pair in pairs]),
    }
    return figures.save_png(figures.contact_sheet(rows, columns=COUNT), picture)
