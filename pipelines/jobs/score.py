"""Scoring of a job's samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dvdp.config import Params, Run
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor, inception_extractor, load_extractor
from dvdp.evaluation.published import Published, read_statistics
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import Anchor, Reference, anchors, make_reference, read_reference
from dvdp.evaluation.scores import score, score_published
from dvdp.files import write_atomically
from dvdp.identity import evaluation_hash
from pipelines.jobs.cluster import Held, on_worker
from pipelines.jobs.device import worker_device
from pipelines.jobs.job import Sampled
from pipelines.jobs.likelihood import check_likelihood, has_likelihood, likelihood_job
from pipelines.jobs.paths import DataPaths


def extractor_of(params: Params) -> Extractor:
    """The extractor that ``evaluation`` asks for."""
    if params.evaluation.extractor == "inception":
        return inception_extractor(params.evaluation.inception_weights)
    return load_extractor(DataPaths.of(params).extractor)


def for_worker(extractor: Extractor) -> Extractor:
    """The same, found from any folder."""
    return dataclasses.replace(extractor, path=extractor.path.resolve())


def on_this_node(extractor: Extractor) -> Extractor:
    """The same; Inception that was downloaded on the driver's node is downloaded here too."""
    return inception_extractor() if extractor.name == "inception" and not extractor.path.is_file() else extractor


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
    check_likelihood(params)


def score_job(
    job: Sampled, held: Held | None = None, statistics: Path | None = None, remarks: Sequence[str] = ()
) -> ScoreRecord:
    """Score the samples against the reference, and bound the likelihood of real images, unless that is done.

    Args:
        held: slots of the cluster, of which all but one are given back: a worker scores, in a process of its own. None
            to score in this process, on its CPU.
        statistics: an ``.npz`` file to score against in place of the reference.
        remarks: to keep among the record's warnings.
    """
    extractor, evaluation, params = extractor_of(job.params), job.params.evaluation, job.params.cluster
    published = None if statistics is None else read_statistics(statistics, extractor.features)
    path = _record(job, published)
    if path.exists():
        return _with_likelihood(ScoreRecord.from_json(path.read_text(), str(path)), job, held, published)
    samples = job.samples.resolve()
    how: dict[str, Any] = {"count": evaluation.samples, "sampling": _how(job.run)}
    if published:
        scoring = partial(score_published, samples, published, **how)
    else:
        how |= {"kid_subset": evaluation.kid_subset, "nearest": nearest_path(path).resolve()}
        scoring = partial(score, samples, DataPaths.of(job.params).reference.resolve(), **how)
    if held is None:
        record = scoring(extractor=extractor)
    else:
        held.keep(1)
        on = params.threads, worker_device(params)
        record = on_worker(params, score_on_worker, scoring, for_worker(extractor), *on)
    record = dataclasses.replace(record, warnings=[*record.warnings, *remarks])
    write_atomically(path, record.to_json())
    return _with_likelihood(record, job, held, published)


def _with_likelihood(record: ScoreRecord, job: Sampled, held: Held | None, published: Published | None) -> ScoreRecord:
    """The record with what does not depend on samples, and is kept beside it; none beside statistics of others."""
    if published:
        return record
    if held and not has_likelihood(job):
        held.keep(1)
    return dataclasses.replace(record, metrics={**record.metrics, **likelihood_job(job, held)})


def is_scored(job: Sampled, statistics: Path | None = None) -> bool:
    """Whether :func:`score_job` has nothing to do."""
    published = None if statistics is None else read_statistics(statistics, extractor_of(job.params).features)
    return _record(job, published).exists() and (published is not None or has_likelihood(job))


def _record(job: Sampled, published: Published | None) -> Path:
    return job.score_path(published.digest if published else read_reference(DataPaths.of(job.params).reference).sha256)


def score_on_worker(
    scoring: Callable[..., ScoreRecord], extractor: Extractor, threads: int, device: str
) -> ScoreRecord:
    """The work of :func:`score_job`."""
    torch.set_num_threads(threads)
    return scoring(extractor=on_this_node(extractor), gpu=device == "cuda")


def reference_on_worker(store: Path, extractor: Extractor, out: Path, device: str) -> Reference:
    """Features of the images of a store, see :func:`dvdp.evaluation.reference.make_reference`."""
    images = ImageStore(store)
    return make_reference(images, images.metadata.digest, on_this_node(extractor), out, device == "cuda")


def nearest_path(score: Path) -> Path:
    """Of the nearest training images of every sample, beside the score record."""
    return score.with_name(f"{score.stem}.nearest.csv")


def anchors_of(params: Params, held: Held | None = None) -> dict[str, Anchor]:
    """What as many real images as are scored score themselves, see :func:`dvdp.evaluation.reference.anchors`.

    Args:
        held: a slot of the cluster: a worker measures it, unless that is done. None to do so in this process.
    """
    folder, evaluation = DataPaths.of(params).reference, params.evaluation
    name = evaluation_hash(evaluation, "anchors", read_reference(folder).sha256)
    path = params.cluster.storage / "anchors" / f"{name}.json"
    # Of 50,000 Inception features it takes minutes.
    if not path.exists():
        asked, cluster = (folder.resolve(), evaluation.samples, evaluation.kid_subset), params.cluster
        found = on_worker(cluster, anchors_on_worker, cluster.threads, *asked) if held else anchors(*asked)
        write_atomically(
            path, json.dumps({title: dataclasses.asdict(anchor) for title, anchor in found.items()}) + "\n"
        )
    return {title: Anchor(**anchor) for title, anchor in json.loads(path.read_text()).items()}


def anchors_on_worker(threads: int, folder: Path, samples: int, kid_subset: int) -> dict[str, Anchor]:
    """The work of :func:`anchors_of`."""
    torch.set_num_threads(threads)
    return anchors(folder, samples, kid_subset)


def _how(run: Run) -> dict[str, Any]:
    """Where samples come from, for their record."""
    return {
        **run.sampling.options(),
        "lift": run.sampling.lift,
        "num_classes": run.model.num_classes,
        "ema_halflife_images": run.training.ema_halflife_images,
        "ema_ramp": run.training.ema_ramp,
    }
