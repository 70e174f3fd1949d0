"""Scores of generated images against a reference, and the record of all that they depend on.

``make_reference`` runs once per data set and extractor; ``score`` compares samples with it, ``score_published`` with
statistics that others publish. All figures are torch-fidelity's, which is imported when the first score is made, or
equal to them (:mod:`dvdp.evaluation.coverage`).
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from dvdp.errors import UserError
from dvdp.evaluation.copies import Seen, find_copies
from dvdp.evaluation.extractors import Extractor
from dvdp.evaluation.extrapolation import counts_for, extrapolate
from dvdp.evaluation.intervals import frechet_error
from dvdp.evaluation.published import Published, Statistics
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import FEWEST, read_features, read_reference
from dvdp.evaluation.samples import SampleShards
from dvdp.files import write_atomically

#: Below this many samples a ``fid`` does not compare with published ones.
INCEPTION_SAMPLES = 10_000


def score(
    samples: Path | Sequence[Path],
    reference: Path,
    extractor: Extractor,
    count: int | None = None,
    kid_subset: int = 100,
    sampling: Mapping[str, Any] | None = None,
    gpu: bool = False,
    nearest: Path | None = None,
) -> ScoreRecord:
    """Score the first ``count`` generated images against a reference. It repeats to the bit.

    Distances, precision and recall have their standard errors beside them (:mod:`dvdp.evaluation.intervals`). With
    samples enough, the record also has the distance of infinitely many, see :mod:`dvdp.evaluation.extrapolation`.
    ``copies`` is the share of samples that are taken for copies of training images (:mod:`dvdp.evaluation.copies`).

    Args:
        samples: as :class:`SampleShards` takes them.
        reference: the folder that :func:`make_reference` wrote; nothing in it is changed.
        extractor: the one the reference was made with.
        count: all of them by default.
        sampling: EMA profile, solver, steps, seed, ...: kept in the record.
        nearest: CSV file to write with the nearest training images of every sample.

    Raises:
        UserError: fewer images than asked for, a KID subset larger than either set, images of another resolution than
            the reference's, a reference that is missing, damaged or made with another extractor.
    """
    from dvdp.evaluation.fidelity import LIBRARY, compare, errors, features_of

    real = read_reference(reference)
    made_with = (real.extractor, real.extractor_sha256, real.library)
    wanted = (extractor.name, extractor.sha256, LIBRARY)
    if made_with != wanted:
        raise UserError(
            f"reference: found '{reference}' made with {' '.join(made_with)}, expected {' '.join(wanted)};"
            " run `dvdp reference` again."
        )
    images = _first(SampleShards(samples), count, real.resolution, f"'{reference}'")
    if kid_subset > min(len(images), real.count):
        raise UserError(
            f"evaluation.kid_subset: found {kid_subset}, expected at most {min(len(images), real.count)}, the smaller"
            f" of {len(images)} samples and {real.count} references; take smaller subsets or more images."
        )
    seen = Seen(images)
    known, features = read_features(reference, real), features_of(seen, extractor, gpu)
    copies = find_copies(seen.thumbnails, features.pooled, known.thumbnails, known.rows)
    if nearest is not None:
        write_atomically(nearest, copies.table())
    metrics = compare(features, known.rows, known.statistics, extractor.name, kid_subset)
    precision = next(value for name, value in metrics.items() if name.startswith("precision"))
    metrics |= errors(features.pooled, known.rows, extractor.name, kid_subset, precision)
    record = ScoreRecord(
        metrics={**metrics, "copies": float(copies.found.double().mean())},
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        samples=len(images),
        references=real.count,
        reference_digest=real.data_digest,
        preprocessing=extractor.preprocessing,
        resolution=real.resolution,
        kid_subset=kid_subset,
        library=LIBRARY,
        sampling=_plain(sampling),
        warnings=_remarks(extractor, len(images), real.count),
    )
    return _judged(record, features.pooled, known.statistics, extractor.features)


def score_published(
    samples: Path | Sequence[Path],
    published: Published,
    extractor: Extractor,
    count: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    gpu: bool = False,
) -> ScoreRecord:
    """The Frechet distance alone, to statistics that others publish; see :func:`score` for the arguments.

    Args:
        published: from :func:`dvdp.evaluation.published.read_statistics`. How its images were prepared cannot be
            checked: the record says so, and names the file, so that it compares with no score against another.

    Raises:
        UserError: fewer images than asked for, or of a resolution that the extractor does not take.
    """
    from dvdp.evaluation.fidelity import LIBRARY, distance, features_of, frechet_name

    shards = SampleShards(samples)
    images = _first(shards, count, extractor.resolution or shards.resolution, "the extractor's training images")
    features = features_of(images, extractor, gpu).pooled
    record = ScoreRecord(
        metrics={frechet_name(extractor.name): distance(features, published.statistics)},
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        samples=len(images),
        references=0,
        reference_digest=published.digest,
        preprocessing=extractor.preprocessing,
        resolution=shards.resolution,
        kid_subset=0,
        library=LIBRARY,
        sampling=_plain(sampling),
        warnings=[*_remarks(extractor, len(images)), published.warning],
    )
    return _judged(record, features, published.statistics, extractor.features)


def _first(shards: SampleShards, count: int | None, resolution: int, where: str) -> Subset:
    """The images to score, checked."""
    count = len(shards) if count is None else count
    if shards.resolution != resolution:
        raise UserError(
            f"samples: found images of {shards.resolution} px, expected {resolution} px as in {where};"
            " score them against a reference of their own data set."
        )
    if count > len(shards):
        raise UserError(
            f"evaluation.samples: found {count}, expected at most {len(shards)}, the number of images sampled;"
            " sample more or score fewer."
        )
    if count < FEWEST:
        raise UserError(f"evaluation.samples: found {count}, expected at least {FEWEST}; score more images.")
    return Subset(shards, range(count))


def _judged(record: ScoreRecord, rows: Tensor, real: Statistics, features: int) -> ScoreRecord:
    """The record with its error and, of enough samples, the distance of infinitely many; says its warnings."""
    from dvdp.evaluation.fidelity import distances

    for remark in record.warnings:
        warnings.warn(remark, stacklevel=3)
    counts, name = counts_for(record.samples, features), record.headline
    record = dataclasses.replace(record, metrics={**record.metrics, f"{name}_error": frechet_error(rows, real)})
    if not counts:
        return record
    found = {**distances(rows, real, counts[:-1]), record.samples: record.metrics[name]}
    line = extrapolate(found)
    return dataclasses.replace(
        record,
        metrics={**record.metrics, f"{name}_infinity": line.infinity, f"{name}_infinity_error": line.error},
        counts=[{"samples": count, "distance": value} for count, value in found.items()],
    )


def _plain(sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(sampling or {})))
    return found


def _remarks(extractor: Extractor, samples: int, references: int | None = None) -> list[str]:
    found = []
    for what, number in (("samples", samples), ("references", references)):
        if number is not None and number < extractor.features:
            found.append(
                f"{number} {what} are fewer than the extractor's {extractor.features} features: their covariance is not"
                " known in every direction, and most of the Frechet distance is the bias of so few; take more."
            )
    if extractor.name == "inception" and samples < INCEPTION_SAMPLES:
        found.append(f"fid of {samples} samples, fewer than {INCEPTION_SAMPLES}, compares with no published one.")
    return found
