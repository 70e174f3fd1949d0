"""The small feature network learns, repeats, and answers mistakes with one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dvdp.errors import UserError
from dvdp.evaluation import extractors
from dvdp.evaluation.extractors import (
    FEATURES,
    FILE,
    Extractor,
    FeatureNetwork,
    file_sha256,
    inception_extractor,
    load_extractor,
    load_network,
    train_extractor,
)
from tests.evaluation.support import Arrays


def test_digits_are_classified_on_the_held_out_tenth(extractor: Extractor) -> None:
    _, info = load_network(extractor.path)
    assert info.accuracy > 0.95
    assert (info.task, info.classes, info.resolution, info.data_digest) == ("labels", 10, 32, "digest-of-digits")


def test_json_beside_the_weights_says_the_same(extractor: Extractor) -> None:
    about = json.loads((extractor.path.parent / "extractor.json").read_text())
    assert about.pop("sha256") == extractor.sha256 == file_sha256(extractor.path)
    assert about == dataclasses.asdict(load_network(extractor.path)[1])


def test_every_feature_is_alive_and_weighs_about_the_same(extractor: Extractor, digits: Arrays) -> None:
    network, _ = load_network(extractor.path)
    with torch.inference_mode():
        features = network.features(torch.from_numpy(digits.pixels[:600]))
    deviation = features.std(0)
    assert features.shape == (600, FEATURES)
    assert deviation.min() > 0.5
    assert deviation.max() < 2
    assert torch.linalg.matrix_rank(torch.cov(features.double().T)) == FEATURES


def test_training_repeats_to_the_bit_and_follows_the_seed(digits: Arrays, tmp_path: Path) -> None:
    images = digits.part(slice(200))
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_extractor(images, "rotation", 1, "digest", tmp_path / name, seed)
        torch.rand(1)
    contents = [(tmp_path / name / FILE).read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    torch.set_rng_state(state)


def test_training_leaves_the_global_random_state_alone(digits: Arrays, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_extractor(digits.part(slice(40)), "labels", 1, "digest", tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_rotation_needs_no_labels(digits: Arrays, tmp_path: Path) -> None:
    unlabelled = Arrays(digits.pixels, np.full(len(digits), -1))
    info = train_extractor(unlabelled, "rotation", 3, "digest", tmp_path)
    assert (info.task, info.classes) == ("rotation", 4)
    assert info.accuracy > 0.6
    assert load_extractor(tmp_path).name == "rotation"


@pytest.mark.parametrize("resolution", [4, 12, 16, 32, 48, 100, 128, 256])
def test_all_sides_give_64_features(resolution: int) -> None:
    network = FeatureNetwork(resolution, 3).eval()
    with torch.inference_mode():
        assert network.features(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)).shape == (2, FEATURES)


def test_labels_without_labels_is_an_error_that_suggests_rotation(digits: Arrays, tmp_path: Path) -> None:
    labels = digits.labels.copy()
    labels[[3, 7]] = -1
    with pytest.raises(UserError, match=r"2 of 1797 images have no label.*set evaluation.extractor to rotation"):
        train_extractor(Arrays(digits.pixels, labels), "labels", 1, "digest", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_single_class_is_an_error_that_suggests_rotation(digits: Arrays, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"single class.*rotation"):
        train_extractor(Arrays(digits.pixels, 0 * digits.labels), "labels", 1, "digest", tmp_path)


def test_too_few_images_are_an_error(digits: Arrays, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 19 images, expected at least 20"):
        train_extractor(digits.part(slice(19)), "labels", 1, "digest", tmp_path)


def test_a_missing_extractor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        load_extractor(tmp_path)


def test_a_foreign_or_cut_file_is_an_error(extractor: Extractor, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(extractor.path.read_bytes()[:1000])
    for name, problem in (("foreign", "of another kind or version"), ("cut", "no whole safetensors file")):
        with pytest.raises(UserError, match=problem):
            load_network(tmp_path / f"{name}.safetensors")


def test_weights_of_another_version_are_refused(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "KIND", "dvdp extractor 2")
    with pytest.raises(UserError, match=r"another kind or version, expected 'dvdp extractor 2'.*run `dvdp extractor`"):
        load_network(extractor.path)


def test_only_the_known_inception_weights_get_through(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        inception_extractor(tmp_path / "missing.pth")
    (tmp_path / "other.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"found SHA-256 .* expected 6726825d"):
        inception_extractor(tmp_path / "other.pth")


def test_inception_without_a_network_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded .*evaluation\.inception_weights"):
        inception_extractor()
