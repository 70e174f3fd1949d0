"""How certain a score is: the standard error of a Frechet distance, intervals, and which of two scores is better.

An interval is for the expected score at this number of samples, which is what settings are compared by. A bootstrap
would not do: n samples drawn again from n have fewer distinct ones, and their distance is too large by as much again as
that of the samples is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from dvdp.evaluation.published import Statistics

#: Of all intervals.
CONFIDENCE = 0.95
#: Of the samples: where no formula says how uncertain a score is, those of the parts do.
PARTS = 4
#: Rows of features in float64 at a time.
_ROWS = 4096


class Estimate(NamedTuple):
    """A score, lower is better, and how certain it is."""

    value: float
    error: float = math.inf
    """Standard error; infinite where it is not known."""
    freedom: float = math.inf
    """Degrees of freedom of the error."""

    @property
    def margin(self) -> float:
        """Half the width of the interval at :data:`CONFIDENCE`."""
        return _quantile(self.freedom) * self.error

    @property
    def text(self) -> str:
        """``2.26 ± 0.31``, in as many digits as the margin has two of; the value alone where its error is not known."""
        if not 0 < self.margin < math.inf:
            return f"{self.value:.2f}"
        digits = max(2, 1 - math.floor(math.log10(self.margin)))
        return f"{self.value:.{digits}f} ± {self.margin:.{digits}f}"


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of one setting's scores, one a seed.

    With several seeds the error is that of their mean (Student's t), which has both sources in it: training and
    samples. It is never smaller than that of the samples alone: two seeds may agree by chance. With one seed it is that
    of the samples, and says nothing of another training.
    """
    if len(estimates) == 1:
        return estimates[0]
    values, count = [each.value for each in estimates], len(estimates)
    mean = statistics.mean(values)
    samples = Estimate(mean, math.hypot(*(each.error for each in estimates)) / count)
    seeds = Estimate(mean, statistics.stdev(values) / math.sqrt(count), count - 1)
    return max((each for each in (seeds, samples) if 0 < each.margin < math.inf), key=_margin, default=Estimate(mean))


def difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """The interval of a's score less b's (Welch); all numbers where an error is not known."""
    variances = a.error**2, b.error**2
    both = sum(variances)
    spent = sum(v**2 / each.freedom for v, each in zip(variances, (a, b), strict=True) if math.isfinite(each.freedom))
    margin = _quantile(both**2 / spent if spent else math.inf) * math.sqrt(both)
    return a.value - b.value - margin, a.value - b.value + margin


def better(a: Estimate, b: Estimate) -> bool:
    """Whether a's score is lower than b's by more than chance explains: the interval of the difference is below 0."""
    return difference(a, b)[1] < 0


def frechet_error(features: Tensor, real: Statistics) -> float:
    """The standard error of a Frechet distance over draws of the samples, in closed form.

    The distance changes with each sample by its influence, the derivative by mean and covariance, whose variance over n
    samples is n times that of the distance. Where the two distributions are close, the distance is nearly quadratic in
    the sampling error, and the derivative at the samples counts that part of the variance twice. As it shrinks with
    1 / n, the samples' two halves show how large it is, and half of it is taken off.

    Args:
        features: (n, f) of the samples, n >= 4. It costs four eigenvalue problems of f x f and n f^2 operations.
    """
    root = _root(real.sigma)
    whole = _influence_variance(features, real, root)
    halves = [_influence_variance(part, real, root) for part in features.tensor_split(2)]
    # A distance that is all quadratic has half the variance that its derivative says, and none has less.
    variance = max(1.5 * whole - 0.5 * statistics.mean(halves), 0.5 * whole)
    return math.sqrt(variance / len(features))


def share_error(share: float, count: int) -> float:
    """The standard error of a share of so many samples; never 0, as one sample more of either kind may be the next."""
    expected = (share * count + 1) / (count + 2)
    return math.sqrt(expected * (1 - expected) / count)


def parts_error(scores: Sequence[float]) -> float:
    """The standard error of a score of all samples, from those of :data:`PARTS` parts, with one degree of freedom less.

    Close where the variance of a score shrinks as one over the number of samples.
    """
    return statistics.stdev(scores) / math.sqrt(len(scores))


def _influence_variance(features: Tensor, real: Statistics, root: NDArray[np.float64]) -> float:
    """Of the influence that each of the features (n, f) has on their distance.

    Args:
        root: the square root of the real images' covariance.
    """
    parts = [part.double().numpy() for part in features.split(_ROWS)]
    mean = sum(part.sum(0) for part in parts) / len(features)
    sigma = sum((part - mean).T @ (part - mean) for part in parts) / (len(features) - 1)
    # The derivative by the covariance is I - h h^T, where h h^T maps the samples' distribution to the real one.
    values, vectors = np.linalg.eigh(root @ sigma @ root)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    h = root @ vectors[:, kept] * values[kept] ** -0.25
    centred = (part - mean for part in parts)
    influence = [2 * x @ (mean - real.mu) + np.square(x).sum(1) - np.square(x @ h).sum(1) for x in centred]
    return float(np.concatenate(influence).var(ddof=1))


def _root(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """The square root of a covariance."""
    values, vectors = np.linalg.eigh(sigma.astype(np.float64))
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _quantile(freedom: float) -> float:
    """Of Student's t, two-sided."""
    return float(stdtrit(min(freedom, 1e9), (1 + CONFIDENCE) / 2))


def _margin(estimate: Estimate) -> float:
    return estimate.margin
