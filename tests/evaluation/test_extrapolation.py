"""The distance of infinitely many samples, where it is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dvdp.evaluation.extrapolation import counts_for, extrapolate
from dvdp.evaluation.fidelity import distance, distances
from dvdp.evaluation.published import Statistics
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.samples import SampleShards
from dvdp.evaluation.scores import score
from tests.evaluation.support import Arrays, Scoring, write_shards


def gaussian(count: int, seed: int, shift: float = 0.1) -> tuple[torch.Tensor, Statistics, float]:
    """Features of a normal distribution, the statistics of another, and the true distance between the two."""
    scales = np.linspace(0.7, 1.3, 64)
    rows = np.random.default_rng(seed).normal(size=(count, 64)) * scales + shift
    truth = 64 * shift**2 + np.square(scales - 1).sum()
    return torch.from_numpy(rows), Statistics(np.zeros(64), np.eye(64)), float(truth)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [256, 1000, 4000])
def test_the_true_distance_of_normal_distributions_is_found_where_that_of_the_samples_is_far_off(
    count: int, seed: int
) -> None:
    features, real, truth = gaussian(count, seed)
    line = extrapolate(distances(features, real, counts_for(count, 64)))
    excess = distance(features, real) - truth
    assert excess > 800 / count
    assert abs(line.infinity - truth) < excess / 3
    assert 0 < line.error < excess / 5


def test_a_model_that_only_seems_worse_for_its_fewer_samples_is_recognised() -> None:
    (few, real, _), (many, _, _) = gaussian(512, 0), gaussian(4000, 1, shift=0.15)
    assert distance(few, real) > distance(many, real)
    ends = [extrapolate(distances(f, real, counts_for(len(f), 64))).infinity for f in (few, many)]
    assert ends[0] < ends[1]


def test_a_line_is_followed_exactly() -> None:
    line = extrapolate({count: 3 + 500 / count for count in (100, 150, 200, 400, 1000)})
    assert line.infinity == pytest.approx(3)
    assert line.error == pytest.approx(0, abs=1e-9)


def test_counts_rise_from_a_tenth_to_all_and_stay_above_the_features() -> None:
    assert counts_for(50_000, 2048) == [5000, 10_000, 15_000, 20_000, 25_000, 30_000, 35_000, 40_000, 45_000, 50_000]
    assert (counts_for(256, 64)[0], counts_for(256, 64)[-1]) == (128, 256)
    assert counts_for(255, 64) == counts_for(4, 64) == []


def test_subsets_repeat() -> None:
    features, real, _ = gaussian(300, 0)
    assert distance(features, real, 150) == distance(features, real, 150)


def test_the_record_holds_the_extrapolation_and_all_that_it_rests_on(
    scoring: Scoring, digits: Arrays, tmp_path: Path
) -> None:
    samples = write_shards(tmp_path, digits.pixels[1::2])
    record = score(samples, scoring.reference, scoring.extractor, 500)
    assert record.headline == "fd_labels"
    assert [point["samples"] for point in record.counts] == counts_for(500, 64)
    assert record.counts[-1] == {"samples": 500, "distance": record.metrics["fd_labels"]}
    line = extrapolate({int(point["samples"]): point["distance"] for point in record.counts})
    assert record.metrics["fd_labels_infinity"] == line.infinity < record.metrics["fd_labels"]
    assert record.metrics["fd_labels_infinity_error"] == line.error
    assert ScoreRecord.from_json(record.to_json()) == record


def test_images_are_read_once_for_all_metrics_and_counts(
    scoring: Scoring, digits: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    read: list[int] = []

    class Counting(SampleShards):
        def __getitem__(self, index: int) -> torch.Tensor:
            read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("dvdp.evaluation.scores.SampleShards", Counting)
    score(write_shards(tmp_path, digits.pixels[1:801:2]), scoring.reference, scoring.extractor)
    assert read == [*range(400)]


def test_too_few_samples_are_not_extrapolated(scoring: Scoring, digits: Arrays, tmp_path: Path) -> None:
    record = score(write_shards(tmp_path, digits.pixels[:255]), scoring.reference, scoring.extractor)
    assert "fd_labels_infinity" not in record.metrics
    assert record.counts == []
