"""Intervals hold what they say they hold, as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvdp.evaluation.fidelity import Features, compare, distance, errors, statistics_of
from dvdp.evaluation.intervals import Estimate, better, difference, frechet_error, over_seeds, share_error
from dvdp.evaluation.published import Statistics
from dvdp.evaluation.records import ScoreRecord

FEATURES, DRAWS = 16, 200
#: Three standard errors of a share of 95 % of the draws.
CHANCE = 3 * math.sqrt(0.95 * 0.05 / DRAWS)
REAL = Statistics(np.zeros(FEATURES), np.diag(np.linspace(0.5, 2, FEATURES)))
SCALES = np.sqrt(np.diag(REAL.sigma))
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "the real one": lambda source, shape: source.normal(size=shape) * SCALES,
    "one near it": lambda source, shape: source.normal(0.1, 1.1, size=shape) * SCALES,
    "one far from it": lambda source, shape: source.normal(1, 1.5, size=shape),
    "one with long tails": lambda source, shape: source.exponential(size=shape) * SCALES,
}


def scored(kind: str, count: int, seed: int) -> Estimate:
    features = torch.from_numpy(DISTRIBUTIONS[kind](np.random.default_rng(seed), (count, FEATURES)))
    return Estimate(distance(features, REAL), frechet_error(features, REAL))


@pytest.mark.parametrize("count", [32, 256])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_interval_of_a_score_holds_the_expected_score_at_its_sample_count(kind: str, count: int) -> None:
    found = [scored(kind, count, seed) for seed in range(DRAWS)]
    expected = np.mean([each.value for each in found])
    inside = np.mean([abs(each.value - expected) < each.margin for each in found])
    assert inside == pytest.approx(0.95, abs=CHANCE)


def test_fewer_samples_than_features_still_have_an_interval() -> None:
    found = [scored("one near it", 12, seed) for seed in range(DRAWS)]
    expected = np.mean([each.value for each in found])
    # On the safe side: it is too wide rather than too narrow.
    assert np.mean([abs(each.value - expected) < each.margin for each in found]) > 0.95 - CHANCE


def test_of_two_equal_settings_one_seems_better_no_more_often_than_in_one_of_twenty() -> None:
    pairs = [(scored("one near it", 64, seed), scored("one near it", 64, DRAWS + seed)) for seed in range(DRAWS)]
    assert np.mean([better(a, b) or better(b, a) for a, b in pairs]) < 0.05 + CHANCE


def test_a_setting_that_is_better_by_far_is_told_from_each_draw() -> None:
    near, far = scored("one near it", 64, 0), scored("one far from it", 64, 1)
    assert better(near, far)
    assert not better(far, near)
    assert difference(near, far)[1] < 0 < difference(far, near)[0]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_seeds_holds_the_expected_score_of_all_seeds(seeds: int) -> None:
    source, count = np.random.default_rng(seeds), 1000
    values = 5 + source.normal(0, 1, size=(count, seeds)) + source.normal(0, 0.5, size=(count, seeds))
    found = [over_seeds([Estimate(value, 0.5) for value in line]) for line in values]
    inside = np.mean([abs(each.value - 5) < each.margin for each in found])
    assert inside == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / count))


def test_seeds_that_agree_by_chance_are_no_more_certain_than_their_samples() -> None:
    same = over_seeds([Estimate(110.35, 0.6), Estimate(110.35, 0.8)])
    assert (same.value, same.error) == (110.35, pytest.approx(0.5))
    assert over_seeds([Estimate(110.35), Estimate(110.35)]).margin == math.inf


def test_a_score_without_an_error_is_never_better_nor_worse() -> None:
    assert not better(Estimate(1.0), Estimate(100.0, 0.1))
    assert not better(Estimate(1.0, 0.1), Estimate(100.0))
    assert better(Estimate(1.0, 0.1), Estimate(100.0, 0.1))


ESTIMATES = st.builds(Estimate, st.floats(0, 1e3), st.floats(1e-6, 1e3), st.sampled_from([1.0, 2.0, 9.0, math.inf]))


@given(ESTIMATES, ESTIMATES)
def test_a_difference_is_the_opposite_of_its_opposite_and_wider_than_either_error_alone(
    a: Estimate, b: Estimate
) -> None:
    low, high = difference(a, b)
    assert (low, high) == pytest.approx(tuple(-end for end in reversed(difference(b, a))))
    assert high - low >= 2 * 1.95 * math.hypot(a.error, b.error)
    assert not (better(a, b) and better(b, a))


@pytest.mark.parametrize("name", ["precision_labels", "recall_labels", "kd_labels"])
@pytest.mark.parametrize(("features", "scale"), [(16, 0.8), (64, 0.9), (8, 1.1)])
def test_the_interval_of_precision_recall_and_kid_holds_the_expected_value(
    name: str, features: int, scale: float, secondary: Callable[[int, float], list[ScoreRecord]]
) -> None:
    found = [record.estimate_of(name) for record in secondary(features, scale)]
    expected = np.mean([each.value for each in found])
    inside = np.mean([abs(each.value - expected) < each.margin for each in found])
    # Parts of the samples say it roughly; too wide is on the safe side.
    assert inside > 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(found)) - 0.03


@pytest.fixture(scope="module")
def secondary() -> Callable[[int, float], list[ScoreRecord]]:
    """Scores of forty draws of 256 samples."""

    @cache
    def drawn(features: int, scale: float) -> list[ScoreRecord]:
        random = torch.Generator().manual_seed(features)
        real = torch.randn(800, features, generator=random, dtype=torch.float64)
        statistics = statistics_of(real)
        found = []
        for _ in range(40):
            rows = scale * torch.randn(256, features, generator=random, dtype=torch.float64) + 0.1
            metrics = compare(Features(rows, rows), real, statistics, "labels", 50)
            metrics |= errors(rows, real, "labels", 50, metrics["precision_labels"])
            found.append(ScoreRecord(metrics, "labels", "e", 256, 800, "d", "none", 32, 50, "torch-fidelity"))
        return found

    return drawn


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_share_is_never_certain(some: int, more: int) -> None:
    assert 0 < share_error(some / (some + more), some + more) <= 0.5
