"""The digits as arrays, and an extractor trained on them once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dvdp.evaluation.extractors import Extractor, load_extractor, train_extractor
from dvdp.evaluation.reference import make_reference
from tests.evaluation.support import Arrays, Scoring


@pytest.fixture(scope="session")
def digits() -> Arrays:
    """(1797, 3, 32, 32) uint8."""
    source = load_digits()
    small = (source.images * 255 / 16).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small]
    return Arrays(np.repeat(np.stack(large)[:, None], 3, axis=1), source.target)


@pytest.fixture(scope="session")
def extractor(digits: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    folder = tmp_path_factory.mktemp("extractor")
    train_extractor(digits, "labels", 10, "digest-of-digits", folder)
    return load_extractor(folder)


@pytest.fixture(scope="session")
def scoring(digits: Arrays, extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Scoring:
    """The even digits are the references, so that the odd ones can play the samples."""
    images = digits.part(slice(0, None, 2))
    folder = tmp_path_factory.mktemp("reference")
    make_reference(images, "digest-of-even-digits", extractor, folder)
    return Scoring(images, extractor, folder)
