"""The expected score of a setting, fitted to settings that were trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from dvdp.planning.planner import Plan

#: Settings that a fit needs.
FEWEST = 8
#: Nats below which lifts lose nothing that could matter.
_NOTHING = 1e-3


@dataclass(frozen=True)
class Fit:
    """A small model of the scores of trained settings."""

    expected: Callable[[Plan], float | None]
    """The score of a plan once it is trained; None for one that is unlike all those that were."""
    rank_correlation: float
    """Spearman's, of the scores with those that models fitted without each setting expect of it."""


def fit(plans: Sequence[Plan], scores: Sequence[float]) -> Fit:
    """A ridge regression of the log score on three numbers of a plan; see :func:`_features`."""
    left_out = [
        _regression([*plans[:i], *plans[i + 1 :]], [*scores[:i], *scores[i + 1 :]])(plan)
        for i, plan in enumerate(plans)
    ]
    seen, regression = np.array([_features(plan) for plan in plans]), _regression(plans, scores)
    low, high = seen.min(axis=0), seen.max(axis=0)

    def expected(plan: Plan) -> float | None:
        features = _features(plan)
        return regression(plan) if (low <= features).all() and (features <= high).all() else None

    return Fit(expected, float(spearmanr(left_out, scores).statistic))


def _regression(plans: Sequence[Plan], scores: Sequence[float]) -> Callable[[Plan], float]:
    """With a penalty of 1 on the weights of the standardised features."""
    features = np.array([_features(plan) for plan in plans])
    # What hardly differs among the settings cannot say much of others.
    centre, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 0.1)
    ridge = Ridge(alpha=1.0).fit((features - centre) / scale, np.log(scores))
    return lambda plan: math.exp(ridge.predict([(_features(plan) - centre) / scale])[0])


def _features(plan: Plan) -> NDArray[np.float64]:
    """How seldom level 0 is trained (the log of its share), how many lifts there are, and the log of what they lose."""
    lost = math.log10(sum(plan.lift_losses) + _NOTHING)
    return np.array([math.log(plan.shares[0]), len(plan.turning_points), lost])
