"""Copies of training images are found, and new images are not taken for any."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import binom

from dvdp.evaluation.copies import (
    FALSE_ALARMS,
    NEIGHBOURS,
    Copies,
    Seen,
    copies_sentence,
    false_alarms,
    find_copies,
    read_pairs,
    surely_copies,
)
from dvdp.evaluation.fidelity import features_of
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import read_features, read_reference
from dvdp.evaluation.samples import SampleShards
from dvdp.evaluation.scores import score
from tests.evaluation.support import Arrays, Scoring, write_shards

COUNT = 400


def looked_for(pixels: np.ndarray, scoring: Scoring, folder: Path) -> Copies:
    images = Seen(SampleShards(write_shards(folder, np.ascontiguousarray(pixels))))
    features = features_of(images, scoring.extractor).pooled
    known = read_features(scoring.reference, read_reference(scoring.reference))
    return find_copies(images.thumbnails, features, known.thumbnails, known.rows)


def thumbnails(pixels: np.ndarray) -> torch.Tensor:
    images = Seen([torch.from_numpy(image) for image in pixels])  # type: ignore[arg-type]
    for index in range(len(images)):
        images[index]
    return images.thumbnails


def each(pixels: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    images = [change(Image.fromarray(image.transpose(1, 2, 0))) for image in pixels]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def jpeg(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=75)
    return Image.open(content)


def noise(pixels: np.ndarray) -> np.ndarray:
    noised = pixels + np.random.default_rng(0).normal(0, 10, pixels.shape)
    return noised.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels,
        noise,
        lambda pixels: each(pixels, jpeg),
        lambda pixels: pixels[..., ::-1],
        lambda pixels: each(pixels, lambda image: image.filter(ImageFilter.BoxBlur(1))),
    ],
    ids=["equal", "noised", "JPEG", "mirrored", "blurred"],
)
def test_planted_copies_are_found(change: Callable[[np.ndarray], np.ndarray], scoring: Scoring, tmp_path: Path) -> None:
    found = looked_for(change(scoring.images.pixels[:COUNT]), scoring, tmp_path)
    assert found.found.double().mean() >= 0.95
    right = found.pixels.places == torch.arange(COUNT)
    assert right.double().mean() >= 0.95


def test_at_most_one_in_a_hundred_new_images_is_taken_for_a_copy(
    scoring: Scoring, digits: Arrays, tmp_path: Path
) -> None:
    found = looked_for(digits.pixels[1::2], scoring, tmp_path)
    assert found.found.double().mean() <= 0.01


def test_false_alarms_are_as_many_as_said_over_many_data_sets() -> None:
    """Whatever images look like: the real ones that are left out show how close new ones are."""
    shares = []
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        spread = torch.rand(24, generator=random) ** 4
        images = torch.randn(1200, 24, generator=random) * spread
        small = (128 + 40 * images).round().clamp(0, 255).to(torch.uint8).reshape(-1, 3, 2, 4)
        shares.append(find_copies(small[:400], images[:400], small[400:], images[400:]).found.double().mean().item())
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= false_alarms(800) + 2 * error


def test_closeness_is_the_ratio_of_distances() -> None:
    random = torch.Generator().manual_seed(0)
    points, real = torch.randn(40, 5, generator=random), 100 + 3 * torch.randn(300, 5, generator=random)
    small = torch.zeros(340, 3, 2, 2, dtype=torch.uint8)
    found = find_copies(small[:40], points + 100, small[40:], real).features
    distances = np.sort(np.linalg.norm((points + 100).double()[:, None] - real.double()[None], axis=2), axis=1)
    np.testing.assert_allclose(found.closeness, distances[:, 0] / distances[:, NEIGHBOURS - 1], rtol=1e-4)
    own = np.linalg.norm(real.double()[:, None] - real.double()[None], axis=2)
    others = np.sort(own + np.diag(np.full(300, np.inf)), axis=1)
    known = np.sort(others[:, 0] / others[:, NEIGHBOURS - 1])
    assert found.threshold == pytest.approx(known[0], rel=1e-4), "a 400th of 301 is none, so the closest counts"


def test_where_images_are_there_twice_only_equal_ones_are_copies(scoring: Scoring, digits: Arrays) -> None:
    small = thumbnails(np.tile(scoring.images.pixels, (2, 1, 1, 1)))
    new = thumbnails(np.stack([scoring.images.pixels[7], digits.pixels[1]]))
    found = find_copies(new, torch.rand(2, 4), small, torch.rand(len(small), 4))
    assert found.pixels.threshold == 0
    assert found.pixels.copies.tolist() == [True, False]


def test_images_that_cannot_be_told_apart_are_no_copies() -> None:
    plain = torch.full((20, 3, 4, 4), 9, dtype=torch.uint8)
    found = find_copies(plain[:5], torch.zeros(5, 2), plain, torch.zeros(20, 2))
    assert found.pixels.closeness.tolist() == [1.0] * 5


def test_a_score_says_which_samples_are_copies_and_of_what(scoring: Scoring, digits: Arrays, tmp_path: Path) -> None:
    pixels = digits.pixels[1::2][:200].copy()
    pixels[50:70] = scoring.images.pixels[300:320]
    table = tmp_path / "nearest.csv"
    samples = write_shards(tmp_path / "samples", pixels)
    record = score(samples, scoring.reference, scoring.extractor, nearest=table)
    assert 20 / 200 <= record.metrics["copies"] <= 23 / 200
    assert surely_copies(record)
    closest = read_pairs(table, 20)
    assert {pair.sample: pair.in_pixels for pair in closest} == {50 + i: 300 + i for i in range(20)}
    assert all(pair.copy and pair.closeness_in_pixels == 0 for pair in closest)
    everything = read_pairs(table, 1000)
    assert sorted(pair.sample for pair in everything) == list(range(200))
    assert sum(pair.copy for pair in everything) == round(200 * record.metrics["copies"])


def with_copies(record: ScoreRecord, found: int) -> ScoreRecord:
    return dataclasses.replace(record, metrics={**record.metrics, "copies": found / record.samples})


@pytest.fixture(scope="module")
def record(scoring: Scoring, digits: Arrays, tmp_path_factory: pytest.TempPathFactory) -> ScoreRecord:
    samples = write_shards(tmp_path_factory.mktemp("samples"), digits.pixels[1::2][:200])
    return score(samples, scoring.reference, scoring.extractor)


def test_false_alarms_alone_are_seldom_taken_for_copies(record: ScoreRecord) -> None:
    """One model in a hundred, and 3 % of copies are enough to say so of 200 samples."""
    first = next(n for n in range(200) if surely_copies(with_copies(record, n)))
    assert binom.sf(first - 1, record.samples, false_alarms(record.references)) < 0.01
    assert first <= 6
    assert not surely_copies(with_copies(record, 0))


def test_what_was_found_is_said(record: ScoreRecord) -> None:
    assert copies_sentence(with_copies(record, 50)) == (
        "50 of 200 samples are taken for copies of training images, where false alarms are up to 0.4 %."
    )
    assert copies_sentence(with_copies(record, 0)).startswith("No sign of copies: 0 of 200")
    unknown = dataclasses.replace(record, metrics={"fd_labels": 1.0}, references=0)
    assert copies_sentence(unknown).startswith("Nobody has looked")
    assert not surely_copies(unknown)
    assert false_alarms(10_000) == pytest.approx(2 * FALSE_ALARMS, rel=0.01)
