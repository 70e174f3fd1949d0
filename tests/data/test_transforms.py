"""Resize and crop when preparing, flip when training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dvdp.data.records import Resize
from dvdp.data.transforms import prepare_transform, train_transform

RANDOM = np.random.default_rng(0)


def noise(height: int, width: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 500), (32, 32), (33, 32), (640, 480)])
def test_any_size_becomes_a_square_of_the_resolution(size: tuple[int, int]) -> None:
    image = prepare_transform(32)(noise(*size))
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = noise(32, 32)
    np.testing.assert_array_equal(prepare_transform(32)(image), image.transpose(2, 0, 1))


def test_the_centre_is_kept() -> None:
    image = np.zeros((16, 48, 3), dtype=np.uint8)
    image[:, 16:32, 0] = 255  # The middle third is red.
    prepared = prepare_transform(8)(image)
    assert (prepared[0] == 255).all()
    assert not prepared[1:].any()


def test_shrinking_averages_over_areas() -> None:
    image = noise(64, 64)
    means = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(prepare_transform(16)(image) - means).max() <= 0.5 + 1e-6


def areas(source: int, target: int) -> np.ndarray:
    """(target, source): the share of each pixel of a line in each of a shorter one."""
    edges = np.arange(target + 1) * source / target
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * target / source


@pytest.mark.parametrize(("source", "target"), [(64, 16), (100, 32), (37, 36), (427, 64)])
def test_shares_of_pixels_are_weighted_by_area(source: int, target: int) -> None:
    image, weights = noise(source, source), areas(source, target)
    expected = np.einsum("ih,jw,hwc->cij", weights, weights, image)
    assert np.abs(prepare_transform(target)(image) - expected).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_at_whole_factors_the_average_is_the_box_filter_of_pillow(factor: int) -> None:
    image = noise(256, 256)
    box = np.asarray(Image.fromarray(image).resize((256 // factor,) * 2, Image.Resampling.BOX)).astype(float)
    error = np.square(prepare_transform(256 // factor)(image).transpose(1, 2, 0) - box).mean()
    assert 10 * np.log10(255**2 / error) > 52


@pytest.mark.parametrize("resize", ["lanczos", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resolution"), [((640, 427), 64), ((31, 90), 32), ((33, 33), 32), ((7, 9), 32), ((1, 1), 8)]
)
def test_pillows_filters_are_pillows_to_the_bit(resize: Resize, size: tuple[int, int], resolution: int) -> None:
    image = noise(size[1], size[0])
    side, (width, height) = min(size), size
    # As dataset_tool.py of EDM and StyleGAN has it with --transform=center-crop.
    square = image[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    resampling = Image.Resampling[resize.upper()]
    expected = np.asarray(Image.fromarray(square).resize((resolution, resolution), resampling))
    np.testing.assert_array_equal(prepare_transform(resolution, resize)(image).transpose(1, 2, 0), expected)


def test_enlarging_is_smooth() -> None:
    step = np.repeat(np.array([[0] * 4 + [200] * 4], dtype=np.uint8), 8, axis=0)
    enlarged = prepare_transform(32)(np.repeat(step[:, :, None], 3, axis=2)).astype(int)
    assert np.abs(np.diff(enlarged, axis=2)).max() < 80  # Nearest-neighbour would jump by 200.
    assert enlarged[:, :, 4].max() < 20
    assert enlarged[:, :, 27].min() > 180


def test_a_flip_is_a_function_of_its_seed_and_happens_half_of_the_time() -> None:
    image = noise(8, 8).transpose(2, 0, 1)
    mirrored = image[:, :, ::-1]
    first, second = train_transform(), train_transform()
    flips = []
    for seed in range(2000):
        result = first(image, seed)
        np.testing.assert_array_equal(result, second(image, seed))
        flips.append(np.array_equal(result, mirrored))
        assert flips[-1] or np.array_equal(result, image)
    assert abs(np.mean(flips) - 0.5) < 0.05
    assert np.array_equal(first(image, 7), mirrored) == flips[7], "earlier draws change nothing"
