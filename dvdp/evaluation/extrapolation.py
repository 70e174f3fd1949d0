"""The Frechet distance of infinitely many samples, from that of some (Chong & Forsyth 2020).

The distance of n samples is too large by about c / n, and c differs from model to model, so that at one n a worse model
may well score better. Distances at several n lie on a line over 1 / n, which is followed to 0.

The line is one only where n is well above the number of features, and it corrects for the samples alone: what the
number of real images adds is the same for all models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

#: Counts that a line is laid through.
COUNTS = 10
#: The smallest count is a tenth of the samples, but at least this many times the features (Chong & Forsyth: 2.4);
#: below, the distances bend away from the line. As many again is the least that a line needs to show its direction.
LEAST = 2


class Line(NamedTuple):
    """Distances over 1 / n."""

    infinity: float
    """Where it ends: the distance of infinitely many samples. Unlike a distance it may fall below 0."""
    error: float
    """Standard error of ``infinity`` from how far the distances lie off the line. The counts share samples, so that
    another draw of all samples differs by more."""


def counts_for(samples: int, features: int) -> list[int]:
    """Rising counts to measure at, the last of them ``samples``; none if the samples are too few to extrapolate."""
    first = max(samples // 10, LEAST * features)
    if samples < 2 * first:
        return []
    return [int(count) for count in np.linspace(first, samples, COUNTS).round()]


def extrapolate(distances: Mapping[int, float]) -> Line:
    """Least squares through distances by count, of at least three counts."""
    counts = np.array(list(distances), dtype=np.float64)
    values = np.array(list(distances.values()))
    inputs = np.stack([np.ones_like(counts), 1 / counts], axis=1)
    found, *_ = np.linalg.lstsq(inputs, values, rcond=None)
    variance = np.square(values - inputs @ found).sum() / (len(counts) - 2)
    return Line(float(found[0]), float(np.sqrt(variance * np.linalg.inv(inputs.T @ inputs)[0, 0])))
