"""Statistics of others: read from their files, checked as far as that goes, and never mixed up with ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dvdp.errors import UserError
from dvdp.evaluation.extractors import file_sha256
from dvdp.evaluation.published import read_statistics
from dvdp.evaluation.records import ScoreRecord, score_differences
from dvdp.evaluation.reference import export_statistics
from dvdp.evaluation.scores import score, score_published
from tests.evaluation.support import Arrays, Scoring, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:the reference is an .npz file")


@pytest.fixture(scope="module")
def samples(digits: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("samples"), digits.pixels[1::2])


@pytest.fixture(scope="module")
def exported(scoring: Scoring, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "digits.npz"
    export_statistics(scoring.reference, path)
    return path


def test_what_is_exported_is_what_others_read(scoring: Scoring, exported: Path) -> None:
    with np.load(exported, allow_pickle=False) as file:
        assert sorted(file.files) == ["mu", "sigma"]
        assert (file["mu"].dtype, file["sigma"].dtype) == (np.float64, np.float64)
        assert (file["mu"].shape, file["sigma"].shape) == ((64,), (64, 64))


def test_a_score_against_our_own_export_is_the_score_against_our_reference(
    scoring: Scoring, samples: Path, exported: Path
) -> None:
    ours = score(samples, scoring.reference, scoring.extractor, 500)
    theirs = score_published(samples, read_statistics(exported, 64), scoring.extractor, 500)
    names = ("fd_labels", "fd_labels_error", "fd_labels_infinity", "fd_labels_infinity_error")
    assert set(theirs.metrics) == set(names)
    for name in names:
        assert theirs.metrics[name] == pytest.approx(ours.metrics[name], rel=1e-9)


def test_the_record_names_the_file_and_warns_of_what_it_cannot_say(
    scoring: Scoring, samples: Path, exported: Path
) -> None:
    sampling = {"solver": "ddpm"}
    with pytest.warns(UserWarning, match=r"does not say how its images were cropped.*mirrored.*which weights"):
        record = score_published(samples, read_statistics(exported, 64), scoring.extractor, 500, sampling)
    assert record.reference_digest == f"npz {file_sha256(exported)}"
    assert (record.references, record.kid_subset, record.samples) == (0, 0, 500)
    assert len(record.warnings) == 1
    assert ScoreRecord.from_json(record.to_json()) == record


def test_it_compares_with_no_score_against_a_data_set_or_another_file(
    scoring: Scoring, samples: Path, exported: Path, tmp_path: Path
) -> None:
    published = read_statistics(exported, 64)
    record = score_published(samples, published, scoring.extractor, 500)
    assert score_differences(record, record) == []
    ours = score(samples, scoring.reference, scoring.extractor, 500)
    assert score_differences(record, ours) == ["references", "reference_digest", "kid_subset"]
    other = score_published(samples, dataclasses.replace(published, sha256="0" * 64), scoring.extractor, 500)
    assert score_differences(record, other) == ["reference_digest"]


def test_single_precision_and_further_arrays_are_taken(exported: Path, tmp_path: Path) -> None:
    with np.load(exported) as file:
        mu, sigma = file["mu"], file["sigma"]
    np.savez_compressed(
        tmp_path / "x.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32), mu_s=np.zeros(7), arr_0=np.ones(3)
    )
    found = read_statistics(tmp_path / "x.npz", 64).statistics
    assert (found.mu.dtype, found.sigma.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(found.sigma, sigma, rtol=1e-6, atol=1e-6)


def asymmetric(mu: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    return {"mu": mu, "sigma": sigma + np.triu(np.full_like(sigma, 0.1))}


def negative(mu: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    return {"mu": mu, "sigma": sigma - 2 * np.eye(len(sigma)) * np.trace(sigma)}


def infinite(mu: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    return {"mu": np.where(np.arange(len(mu)) == 3, np.inf, mu), "sigma": sigma}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (asymmetric, "a 'sigma' that is not symmetric"),
        (negative, "a 'sigma' with the negative eigenvalue"),
        (infinite, "numbers in 'mu' that are not finite"),
        (lambda mu, sigma: {"mu": mu, "sigma": np.full_like(sigma, np.nan)}, "numbers in 'sigma' that are not finite"),
        (lambda mu, sigma: {"mu": mu.astype(int), "sigma": sigma}, "'mu' of type int64"),
        (lambda mu, sigma: {"mu": mu[:-1], "sigma": sigma}, r"'mu' \(63,\) and 'sigma' \(64, 64\)"),
        (lambda mu, sigma: {"mu": mu, "sigma": np.diag(sigma)}, r"expected \(64,\) and \(64, 64\)"),
        (lambda mu, sigma: {"mu": np.zeros(2048), "sigma": np.eye(2048)}, "set evaluation.extractor to the one that"),
        (lambda mu, sigma: {"mean": mu, "cov": sigma}, "found mean, cov in .* expected 'mu' and 'sigma'"),
        (lambda mu, sigma: {"mu": mu.astype(object), "sigma": sigma}, r"no whole \.npz file of numbers"),
    ],
)
def test_what_is_no_mean_and_covariance_of_these_features_is_one_sentence(
    exported: Path, tmp_path: Path, change: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]], told: str
) -> None:
    with np.load(exported) as file:
        np.savez(tmp_path / "x.npz", **change(file["mu"], file["sigma"]))
    with pytest.raises(UserError, match=told) as error:
        read_statistics(tmp_path / "x.npz", 64)
    assert ". " not in str(error.value)


def test_missing_foreign_and_cut_files_are_one_sentence(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        read_statistics(tmp_path / "x.npz", 64)
    for content in (b"", b"text", exported.read_bytes()[:-40], exported.read_bytes()[:200]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"no whole \.npz file"):
            read_statistics(tmp_path / "x.npz", 64)
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(64))
    with pytest.raises(UserError, match=r"no whole \.npz file|no named arrays"):
        read_statistics(tmp_path / "x.npz", 64)


def test_an_export_has_the_name_that_numpy_reads(scoring: Scoring, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--export: found .*expected a name that ends in \.npz"):
        export_statistics(scoring.reference, tmp_path / "digits.npy")


def test_samples_of_a_resolution_that_the_extractor_does_not_take_are_an_error(
    scoring: Scoring, exported: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path, np.zeros((8, 3, 16, 16), np.uint8))
    with pytest.raises(UserError, match="found images of 16 px, expected 32 px"):
        score_published(tmp_path, read_statistics(exported, 64), scoring.extractor)
