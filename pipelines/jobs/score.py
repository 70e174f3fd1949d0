"""Scoring of a job's samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dvdp.config import Params, Run
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor, inception_extractor, load_extractor
from dvdp.evaluation.published import read_statistics
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import Anchor, anchors, read_reference
from dvdp.evaluation.scores import score, score_published
from dvdp.files import write_atomically
from dvdp.identity import evaluation_hash
from pipelines.jobs.job import Sampled
from pipelines.jobs.paths import DataPaths


def extractor_of(params: Params) -> Extractor:
    """The extractor that ``evaluation`` asks for."""
    if params.evaluation.extractor == "inception":
        return inception_extractor(params.evaluation.inception_weights)
    return load_extractor(DataPaths.of(params).extractor)


def _gpu_here(params: Params) -> bool:
    # Scores are made in this process, which may be on a machine without the workers' GPUs.
    return params.cluster.gpu and torch.cuda.is_available()


def check_scorable(params: Params) -> None:
    """Raise UserError now for what scoring would miss after all training: extractor or reference."""
    places = DataPaths.of(params)
    extractor, reference = extractor_of(params), read_reference(places.reference)
    digest = ImageStore(places.store).metadata.digest
    if (reference.extractor_sha256, reference.data_digest) != (extractor.sha256, digest):
        raise UserError(
            f"reference: found '{places.reference}' made with another extractor or data set, expected the extractor"
            f" '{extractor.name}' and '{places.store}' as they are now; run `dvdp reference` again."
        )
    if params.evaluation.kid_subset > reference.count:
        raise UserError(
            f"evaluation.kid_subset: found {params.evaluation.kid_subset}, expected at most the {reference.count}"
            " images of the data set; take smaller subsets."
        )


def score_job(job: Sampled, statistics: Path | None = None, remarks: Sequence[str] = ()) -> ScoreRecord:
    """Score the samples against the reference, unless that is done.

    Args:
        statistics: an ``.npz`` file to score against in place of the reference.
        remarks: to keep among the record's warnings.
    """
    places, evaluation, gpu = DataPaths.of(job.params), job.params.evaluation, _gpu_here(job.params)
    extractor = extractor_of(job.params)
    published = None if statistics is None else read_statistics(statistics, extractor.features)
    path = job.score_path(published.digest if published else read_reference(places.reference).sha256)
    if path.exists():
        return ScoreRecord.from_json(path.read_text(), str(path))
    how = _how(job.run)
    if published:
        record = score_published(job.samples, published, extractor, evaluation.samples, how, gpu)
    else:
        asked = evaluation.samples, evaluation.kid_subset
        record = score(job.samples, places.reference, extractor, *asked, how, gpu, nearest_path(path))
    record = dataclasses.replace(record, warnings=[*record.warnings, *remarks])
    write_atomically(path, record.to_json())
    return record


def nearest_path(score: Path) -> Path:
    """Of the nearest training images of every sample, beside the score record."""
    return score.with_name(f"{score.stem}.nearest.csv")


def anchors_of(params: Params) -> dict[str, Anchor]:
    """What as many real images as are scored score themselves, see :func:`dvdp.evaluation.reference.anchors`."""
    folder, evaluation = DataPaths.of(params).reference, params.evaluation
    name = evaluation_hash(evaluation, "anchors", read_reference(folder).sha256)
    path = params.cluster.storage / "anchors" / f"{name}.json"
    # Of 50,000 Inception features it takes minutes.
    if not path.exists():
        found = anchors(folder, evaluation.samples, evaluation.kid_subset)
        write_atomically(
            path, json.dumps({title: dataclasses.asdict(anchor) for title, anchor in found.items()}) + "\n"
        )
    return {title: Anchor(**anchor) for title, anchor in json.loads(path.read_text()).items()}


def _how(run: Run) -> dict[str, Any]:
    """Where samples come from, for their record."""
    return {
        **run.sampling.options(),
        "lift": run.sampling.lift,
        "num_classes": run.model.num_classes,
        "ema_halflife_images": run.training.ema_halflife_images,
        "ema_ramp": run.training.ema_ramp,
    }
