"""Scores are what they are called, depend on what they say, and repeat."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity

from dvdp.errors import UserError
from dvdp.evaluation import extractors, fidelity
from dvdp.evaluation.extractors import Extractor, inception_extractor, load_network, train_extractor
from dvdp.evaluation.fidelity import features_of, metric_names
from dvdp.evaluation.records import ScoreRecord, score_differences
from dvdp.evaluation.reference import anchors, make_reference, read_reference
from dvdp.evaluation.samples import SampleShards
from dvdp.evaluation.scores import score
from tests.data.support import contents
from tests.evaluation.support import Arrays, Scoring, write_pngs, write_shards
from tests.logs import hearing

SAMPLING = {"solver": "ddpm", "steps": 250, "seed": 0, "ema": "halflife 20000, ramp 0.1"}


def features(extractor: Extractor, pixels: np.ndarray) -> np.ndarray:
    network, _ = load_network(extractor.path)
    with torch.inference_mode():
        return network.features(torch.from_numpy(np.ascontiguousarray(pixels))).double().numpy()


class Unpickled:
    """Fails the test that reads it."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a file was unpickled",)


@pytest.fixture(scope="module")
def samples(digits: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The odd digits, in shards of 100."""
    return write_shards(tmp_path_factory.mktemp("samples"), digits.pixels[1::2])


@pytest.fixture(scope="module")
def record(scoring: Scoring, samples: Path) -> ScoreRecord:
    return score(samples, scoring.reference, scoring.extractor, 500, 100, SAMPLING)


def test_frechet_distance_is_the_textbook_formula(
    scoring: Scoring, digits: Arrays, samples: Path, record: ScoreRecord
) -> None:
    a, b = features(scoring.extractor, digits.pixels[1::2][:500]), features(scoring.extractor, scoring.images.pixels)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert record.metrics["fd_labels"] == pytest.approx(expected, rel=1e-3)


def test_all_metrics_are_those_of_torch_fidelity_itself(
    scoring: Scoring, digits: Arrays, record: ScoreRecord, tmp_path: Path
) -> None:
    """Its public function, on the same images as PNG files, without any cache of ours."""
    pngs = [
        write_pngs(tmp_path / name, pixels)
        for name, pixels in (("a", digits.pixels[1::2][:500]), ("b", scoring.images.pixels))
    ]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(pngs[0]),
        input2=str(pngs[1]),
        feature_extractor="dvdp-convnet",
        feature_extractor_weights_path=str(scoring.extractor.path),
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=100,
        prc_neighborhood=3,
        save_cpu_ram=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    for name, ours in metric_names("labels").items():
        assert record.metrics[ours] == pytest.approx(theirs[name], rel=1e-6), ours


def test_inception_score_is_the_textbook_formula(scoring: Scoring, digits: Arrays, record: ScoreRecord) -> None:
    network, _ = load_network(scoring.extractor.path)
    with torch.inference_mode():
        classes = network(torch.from_numpy(digits.pixels[1::2][:500].copy())).double().softmax(1).numpy()
    order = np.random.RandomState(2020).permutation(500)
    parts = classes[order].reshape(10, 50, 10)
    divergences = (parts * np.log(parts / parts.mean(1, keepdims=True))).sum(2).mean(1)
    assert record.metrics["is_labels"] == pytest.approx(np.exp(divergences).mean(), rel=1e-4)
    assert 5 < record.metrics["is_labels"] <= 10


@pytest.mark.filterwarnings("ignore:fd_labels of blurred")
def test_kernel_distance_is_the_textbook_formula(scoring: Scoring, digits: Arrays, tmp_path: Path) -> None:
    pixels = digits.pixels[1::2][:80]
    make_reference(scoring.images.part(slice(80)), "eighty", scoring.extractor, tmp_path / "reference")
    found = score(write_shards(tmp_path / "s", pixels), tmp_path / "reference", scoring.extractor, 80, 80).metrics
    a, b = features(scoring.extractor, pixels), features(scoring.extractor, scoring.images.pixels[:80])
    n, d = a.shape
    aa, bb, ab = (((x @ y.T) / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    unbiased = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (aa, bb)) - 2 * ab.mean()
    assert found["kd_labels"] == pytest.approx(unbiased, rel=1e-3)
    assert found["kd_labels_std"] == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_are_not_swapped(scoring: Scoring, tmp_path: Path) -> None:
    zeros = scoring.images.pixels[scoring.images.labels == 0]
    noise = np.random.default_rng(0).integers(0, 256, zeros.shape, dtype=np.uint8)
    one_class = score(
        write_shards(tmp_path / "one", zeros), scoring.reference, scoring.extractor, kid_subset=20
    ).metrics
    assert one_class["precision_labels"] == 1
    assert one_class["recall_labels"] < 0.3
    mixed = np.concatenate([scoring.images.pixels, np.tile(noise, (12, 1, 1, 1))[: len(scoring.images)]])
    with_noise = score(write_shards(tmp_path / "mixed", mixed), scoring.reference, scoring.extractor).metrics
    assert with_noise["precision_labels"] == pytest.approx(0.5, abs=0.05)
    assert with_noise["recall_labels"] == 1


def test_precision_and_recall_are_the_textbook_formulas(scoring: Scoring, digits: Arrays, record: ScoreRecord) -> None:
    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(scipy.spatial.distance.cdist(centres, centres), axis=1)[:, 3]
        return float((scipy.spatial.distance.cdist(points, centres) <= radii).any(1).mean())

    a, b = features(scoring.extractor, digits.pixels[1::2][:500]), features(scoring.extractor, scoring.images.pixels)
    assert record.metrics["precision_labels"] == pytest.approx(covered(a, b), abs=0.005)
    assert record.metrics["recall_labels"] == pytest.approx(covered(b, a), abs=0.005)


def test_real_images_held_out_score_better_than_blurred_and_noised_ones(scoring: Scoring) -> None:
    found = anchors(scoring.reference, 200, 100)
    distances = {name: anchor.metrics["fd_labels"] for name, anchor in found.items()}
    assert distances["real"] * 2 < distances["blurred"] < distances["noised"]
    for anchor in found.values():
        assert (anchor.samples, anchor.references) == (200, len(scoring.images) - 200)
    assert found == anchors(scoring.reference, 200, 100)
    assert read_reference(scoring.reference).warnings == []


def test_new_real_images_score_as_the_anchor_of_their_number_says(
    extractor: Extractor, digits: Arrays, tmp_path: Path
) -> None:
    """Those of the anchor are held out of the reference that the new ones are compared with."""
    order = np.random.default_rng(0).permutation(len(digits))
    make_reference(digits.part(order[:897]), "half", extractor, tmp_path / "reference")
    anchor = anchors(tmp_path / "reference", 150, 50)["real"]
    found = [
        score(
            write_shards(tmp_path / str(first), digits.pixels[order[first : first + 150]]),
            tmp_path / "reference",
            extractor,
            150,
            50,
        )
        for first in range(897, 1797, 150)
    ]
    # A reference of 747 instead of 897 images adds a tenth to the distance at most.
    expected = statistics.mean(each.metrics["fd_labels"] for each in found)
    assert expected == pytest.approx(anchor.metrics["fd_labels"], rel=0.15)
    spread = statistics.stdev(each.metrics["fd_labels"] for each in found)
    assert anchor.spreads["fd_labels"] == pytest.approx(spread, rel=0.6)


def test_at_most_half_of_a_small_data_set_is_held_out(scoring: Scoring) -> None:
    for anchor in anchors(scoring.reference, 10_000, 100).values():
        assert anchor.samples == len(scoring.images) // 2
        assert anchor.samples + anchor.references == len(scoring.images)


@pytest.mark.filterwarnings("ignore:fd_labels of noised")
def test_an_extractor_that_sees_no_blur_is_warned_about(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 3, 1, 1), dtype=np.uint8)
    flat = Arrays(np.tile(colours, (1, 1, 16, 16)), np.arange(40) % 2)
    train_extractor(flat, "labels", 1, "flat", tmp_path)
    with pytest.warns(UserWarning, match="fd_labels of blurred real images"):
        reference = make_reference(flat, "flat", extractors.load_extractor(tmp_path), tmp_path / "reference")
    assert "blurred" in reference.warnings[0]
    assert read_reference(tmp_path / "reference") == reference


def test_a_set_scores_zero_against_itself(scoring: Scoring, tmp_path: Path) -> None:
    found = score(write_shards(tmp_path, scoring.images.pixels), scoring.reference, scoring.extractor).metrics
    assert 0 <= found["fd_labels"] < 1e-6
    assert found["precision_labels"] == found["recall_labels"] == 1


def test_only_inception_is_called_fid() -> None:
    names = {"fid", "kid", "kid_std", "precision", "recall", "is", "is_std"}
    assert set(metric_names("inception").values()) == names
    for task in ("labels", "rotation"):
        names = {f"{name}_{task}" for name in ("fd", "kd", "precision", "recall")} | {f"kd_{task}_std"}
        # Quarter turns are no classes of images.
        names |= {"is_labels", "is_labels_std"} if task == "labels" else set()
        assert set(metric_names(task).values()) == names


def test_score_repeats_to_the_bit_and_leaves_the_reference_alone(
    scoring: Scoring, samples: Path, record: ScoreRecord
) -> None:
    before = contents(scoring.reference)
    assert score(samples, scoring.reference, scoring.extractor, 500, 100, SAMPLING) == record
    assert contents(scoring.reference) == before


def test_features_of_images_that_do_not_fit_at_once_are_the_same_in_smaller_batches(
    scoring: Scoring, digits: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [torch.from_numpy(pixels) for pixels in digits.pixels[:150]]
    whole, forward = features_of(images, scoring.extractor), extractors.FeatureNetwork.features  # type: ignore[arg-type]

    def limited(self: extractors.FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, images)

    monkeypatch.setattr(extractors.FeatureNetwork, "features", limited)
    said: list[str] = []
    with hearing(said.append):
        found = features_of(images, scoring.extractor)  # type: ignore[arg-type]
    for one, two in zip(whole, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert [line.partition(";")[0] for line in said] == [
        f"score, features by labels: memory ran out with {count} images at a time" for count in (64, 32)
    ]


def test_score_depends_on_the_first_images_alone(
    scoring: Scoring, samples: Path, digits: Arrays, record: ScoreRecord, tmp_path: Path
) -> None:
    other = write_shards(tmp_path, digits.pixels[1::2][:500], shard=64)
    assert score(other, scoring.reference, scoring.extractor, None, 100, SAMPLING) == record


def test_record_holds_all_that_the_score_depends_on(scoring: Scoring, record: ScoreRecord) -> None:
    assert (record.samples, record.references, record.resolution) == (500, len(scoring.images), 32)
    assert record.reference_digest == "digest-of-even-digits"
    assert (record.extractor, record.extractor_sha256) == ("labels", scoring.extractor.sha256)
    assert record.library.startswith("torch-fidelity ")
    assert record.sampling == SAMPLING


def test_record_survives_json(record: ScoreRecord) -> None:
    assert ScoreRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("text", ["", "[1]", '{"metrics": {}}', '{"other": 1}'])
def test_what_is_no_record_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"scores/x\.json: found something else than a score record"):
        ScoreRecord.from_json(text, "scores/x.json")


def test_comparable_names_the_fields_that_matter(record: ScoreRecord) -> None:
    assert score_differences(record, record) == []
    other_seed = dataclasses.replace(record, sampling={**SAMPLING, "seed": 1}, warnings=["beware"])
    assert score_differences(record, other_seed) == []
    metrics = {name: value + 1 for name, value in record.metrics.items()}
    assert score_differences(record, dataclasses.replace(record, metrics=metrics)) == []
    for name in ("extractor_sha256", "samples", "references", "reference_digest", "preprocessing", "library"):
        assert score_differences(record, dataclasses.replace(record, **{name: "other"})) == [name]
    assert score_differences(record, dataclasses.replace(record, metrics={"fid": 1.0})) == ["metrics"]
    # Of a release without extrapolation and inception score.
    earlier = {name: record.metrics[name] for name in ("fd_labels", "precision_labels")}
    assert score_differences(record, dataclasses.replace(record, metrics=earlier, counts=[])) == []
    conditional = dataclasses.replace(record, sampling={**SAMPLING, "num_classes": 10})
    assert score_differences(record, conditional) == ["sampling.num_classes"]
    fewer_steps = dataclasses.replace(record, sampling={**SAMPLING, "steps": 50, "ema": None})
    assert score_differences(record, fewer_steps) == ["sampling.ema", "sampling.steps"]


def test_new_data_in_an_old_folder_gives_new_scores(
    scoring: Scoring, samples: Path, digits: Arrays, tmp_path: Path
) -> None:
    nines = digits.part(digits.labels == 9)
    shutil.copytree(scoring.reference, tmp_path / "old")
    make_reference(nines, "digest-of-nines", scoring.extractor, tmp_path / "old")
    make_reference(nines, "digest-of-nines", scoring.extractor, tmp_path / "new")
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    found = [score(samples, tmp_path / name, scoring.extractor, 200) for name in ("old", "new")]
    assert found[0] == found[1]
    assert found[0].metrics["fd_labels"] > 20


def test_few_samples_are_warned_about_in_the_record_too(scoring: Scoring, samples: Path) -> None:
    with pytest.warns(UserWarning, match="63 samples are fewer than the extractor's 64 features"):
        found = score(samples, scoring.reference, scoring.extractor, 63, 50)
    assert len(found.warnings) == 1


def test_more_samples_than_there_are_names_both_numbers(scoring: Scoring, samples: Path) -> None:
    with pytest.raises(UserError, match="found 899, expected at most 898"):
        score(samples, scoring.reference, scoring.extractor, 899)


def test_a_kid_subset_larger_than_a_set_is_an_error(scoring: Scoring, samples: Path) -> None:
    with pytest.raises(UserError, match="kid_subset: found 101, expected at most 100"):
        score(samples, scoring.reference, scoring.extractor, 100, 101)


def test_too_few_samples_for_neighbours_are_an_error(scoring: Scoring, samples: Path) -> None:
    with pytest.raises(UserError, match="found 3, expected at least 4"):
        score(samples, scoring.reference, scoring.extractor, 3, 2)


def test_samples_of_another_resolution_are_an_error(scoring: Scoring, tmp_path: Path) -> None:
    write_shards(tmp_path, np.zeros((8, 3, 16, 16), np.uint8))
    with pytest.raises(UserError, match="found images of 16 px, expected 32 px"):
        score(tmp_path, scoring.reference, scoring.extractor, 8, 4)


def test_a_reference_of_another_extractor_is_an_error(scoring: Scoring, samples: Path) -> None:
    other = dataclasses.replace(scoring.extractor, sha256="0" * 64)
    with pytest.raises(UserError, match=r"made with labels .* run `dvdp reference` again"):
        score(samples, scoring.reference, other)


def test_an_extractor_of_another_resolution_is_an_error(scoring: Scoring, tmp_path: Path) -> None:
    small = Arrays(np.zeros((8, 3, 16, 16), np.uint8), np.zeros(8))
    with pytest.raises(UserError, match="trained on 32 px images for a data set of 16 px"):
        make_reference(small, "small", scoring.extractor, tmp_path)


def damage_features(folder: Path) -> None:
    path = folder / "features.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def remove_features(folder: Path) -> None:
    (folder / "features.safetensors").unlink()


def change_field(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "reference.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: "another"}))

    return change


@pytest.mark.parametrize(
    "harm", [damage_features, remove_features, *map(change_field, ("data_digest", "features", "preprocessing"))]
)
def test_a_reference_that_was_changed_is_never_read(
    scoring: Scoring, samples: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(scoring.reference, folder)
    harm(folder)
    with pytest.raises(UserError, match=r"missing or changed.* run `dvdp reference` again"):
        score(samples, folder, scoring.extractor)


def test_a_reference_that_somebody_else_made_is_never_unpickled(
    scoring: Scoring, samples: Path, tmp_path: Path
) -> None:
    shutil.copytree(scoring.reference, tmp_path / "reference")
    features, about = tmp_path / "reference" / "features.safetensors", tmp_path / "reference" / "reference.json"
    features.write_bytes(pickle.dumps({"features": Unpickled()}))
    described = {**json.loads(about.read_text()), "sha256": extractors.file_sha256(features)}
    about.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"no whole safetensors file .* run `dvdp reference` again"):
        score(samples, tmp_path / "reference", scoring.extractor)


class Touches:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_reference_of_the_earlier_format_is_refused_without_running_it(
    scoring: Scoring, samples: Path, tmp_path: Path
) -> None:
    """Its features were pickles, named in ``reference.json`` with their SHA-256, in torch-fidelity's cache."""
    folder = tmp_path / "reference"
    folder.mkdir()
    about = json.loads((scoring.reference / "reference.json").read_text())
    name = f"labels-{about['count']}x{about['resolution']}px-{'0' * 32}"
    for kind in ("features-pooled", "stat-fid-pooled"):
        torch.save(Touches(tmp_path / "run"), folder / f"{name}-dvdp-convnet-{kind}.pt")
    files = {path.name: extractors.file_sha256(path) for path in folder.glob("*.pt")}
    del about["sha256"]
    (folder / "reference.json").write_text(json.dumps({**about, "anchors": {}, "files": files}))
    with pytest.raises(UserError, match=r"describes none, expected one of ours; run `dvdp reference` again\.$"):
        score(samples, folder, scoring.extractor)
    assert not (tmp_path / "run").exists()


def test_inception_weights_that_are_swapped_after_their_check_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(Touches(tmp_path / "run"), weights)
    swapped = Extractor("inception", weights, extractors.INCEPTION_SHA256, 2048, "", None)
    with pytest.raises(UserError, match=r"^evaluation\.inception_weights: found SHA-256 "):
        fidelity._network(swapped, False)
    # Even where the digest is that of the planted file.
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.file_sha256(weights))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fidelity._network(swapped, False)
    assert not (tmp_path / "run").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_missing_or_foreign_reference_is_an_error(scoring: Scoring, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        score(samples, tmp_path, scoring.extractor)
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(UserError, match="describes none"):
        score(samples, tmp_path, scoring.extractor)


def test_shards_are_read_in_image_order(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
    folder = write_shards(tmp_path, pixels, shard=4)
    for shards in (SampleShards(folder), SampleShards(list(folder.iterdir()))):
        assert len(shards) == 10
        assert np.array_equal(np.stack([shards[i].numpy() for i in range(10)]), pixels)


def test_shards_are_mapped_and_never_read_whole(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, np.zeros((1000, 3, 64, 64), np.uint8), shard=300)
    tracemalloc.start()
    try:
        shards = SampleShards(folder)
        assert sum(int(shards[i].sum()) for i in range(len(shards))) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(shards) == 1000
    assert peak < 300 * 3 * 64 * 64 / 4


def test_a_gap_between_shards_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, np.zeros((10, 3, 4, 4), np.uint8), shard=4)
    (tmp_path / "00000004.npy").unlink()
    with pytest.raises(UserError, match=r"00000008\.npy' where image 4 should follow"):
        SampleShards(tmp_path)


def test_no_shards_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no \.npy files"):
        SampleShards(tmp_path)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 3, 4, 8), np.uint8)],
)
def test_shards_of_another_kind_are_an_error(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "00000000.npy", array)
    with pytest.raises(UserError, match="expected uint8"):
        SampleShards(tmp_path)


def test_pickles_and_half_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "00000000.npy"
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"no whole \.npy file"):
        SampleShards(tmp_path)
    np.save(path, np.zeros((9, 3, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no whole \.npy file"):
        SampleShards(tmp_path)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extractor:
    """With random weights: the figures mean nothing, but the path is the one of the real file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:
        # The network can only be built with weights: none are loaded this once.
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    torch.save(network.state_dict(), weights)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.file_sha256(weights))
    return inception_extractor(weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inception_from_a_local_file_gives_fid(inception: Extractor, digits: Arrays, tmp_path: Path) -> None:
    reference = make_reference(digits.part(slice(16)), "digits", inception, tmp_path / "reference")
    assert reference.features == 2048
    samples = write_shards(tmp_path / "samples", digits.pixels[16:28])
    record = score(samples, tmp_path / "reference", inception, 12, 8)
    # Twelve samples are too few for parts of them.
    metrics = {"fid", "fid_error", "kid", "kid_std", "precision", "precision_error", "recall", "is", "is_std", "copies"}
    assert set(record.metrics) == metrics
    assert len(record.warnings) == 3
    assert "compares with no published one" in record.warnings[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fid_and_inception_score_are_those_of_torch_fidelitys_command_line(
    inception: Extractor, digits: Arrays, tmp_path: Path
) -> None:
    make_reference(digits.part(slice(16)), "digits", inception, tmp_path / "reference")
    record = score(write_shards(tmp_path / "samples", digits.pixels[16:28]), tmp_path / "reference", inception, 12, 8)
    folders = [
        str(write_pngs(tmp_path / name, pixels))
        for name, pixels in (("a", digits.pixels[16:28]), ("b", digits.pixels[:16]))
    ]
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--fid", "--isc", "--cpu", "--json", "--silent"]
    command += ["--no-cache", "--save-cpu-ram", "--feature-extractor-weights-path", str(inception.path)]
    done = subprocess.run([*command, "--input1", folders[0], "--input2", folders[1]], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    for key, name in (("frechet_inception_distance", "fid"), ("inception_score_mean", "is")):
        assert record.metrics[name] == pytest.approx(theirs[key], rel=1e-4), name


def test_scorers_in_threads_of_one_process_leave_each_other_their_flags(
    digits: Arrays, extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's flags are the process's: the first of two to end must not take them from the other, nor leave its own."""
    begun, seen = threading.Event(), []

    def network(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        begun.set()
        time.sleep(0.1)
        flags = torch.backends.cudnn
        seen.append((flags.deterministic, flags.benchmark, flags.allow_tf32))
        return (torch.zeros(len(images), 2),) * 2

    monkeypatch.setattr(fidelity, "_network", lambda *_: network)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    short, long = (
        SampleShards(write_shards(tmp_path / str(batches), digits.pixels[: batches * fidelity.BATCH]))
        for batches in (1, 3)
    )
    first = threading.Thread(target=fidelity.features_of, args=(short, extractor))
    first.start()
    assert begun.wait(5)
    fidelity.features_of(long, extractor)
    first.join()
    assert seen == [(True, False, False)] * 4
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic
