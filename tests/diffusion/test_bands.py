"""The bands against dense matrices, and the algebra that everything else leans on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvdp.diffusion import bands
from tests.diffusion.exact import as_matrix, combine, down_matrix, projectors, split
from tests.diffusion.strategies import few, images, seeds

shapes = st.tuples(st.sampled_from([8, 16]), st.integers(1, 3), st.integers(1, 3))
levels = st.integers(0, 3)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@few
@given(shapes, seeds)
def test_down_undoes_up_to_the_last_bit(shape: tuple[int, int, int], seed: int) -> None:
    x = images(*shape, seed)
    assert torch.equal(bands.down(bands.up(x)), x)


def test_down_and_up_are_one_matrix_and_its_transpose() -> None:
    D = as_matrix(bands.down, 8)
    close(D, down_matrix(8))
    close(as_matrix(bands.up, 4), D.T)
    close(D @ D.T, torch.eye(16, dtype=torch.float64))


def test_projections_are_an_orthogonal_decomposition() -> None:
    unit = torch.eye(4, dtype=torch.float64)
    P = [as_matrix(partial(bands.scale, factors=f), 16) for f in unit]
    for i, p in enumerate(P):
        close(p, p.T)
        for j, q in enumerate(P):
            close(p @ q, p if i == j else torch.zeros_like(p))
        close(p, projectors(16, 3)[i])
    assert [round(p.trace().item()) for p in P] == [192, 48, 12, 4]
    close(sum(P, torch.zeros(())), torch.eye(256, dtype=torch.float64))


@few
@given(st.sampled_from([8, 16]), levels, st.data())
def test_scale_is_the_dense_matrix(resolution: int, n: int, data: st.DataObject) -> None:
    factors = torch.tensor(data.draw(st.lists(st.floats(-5, 5), min_size=n + 1, max_size=n + 1)), dtype=torch.float64)
    close(as_matrix(partial(bands.scale, factors=factors), resolution), combine(factors, projectors(resolution, n)))


@few
@given(shapes, levels, seeds)
def test_each_sample_takes_its_own_factors(shape: tuple[int, int, int], n: int, seed: int) -> None:
    x = images(*shape, seed)
    factors = torch.rand(len(x), n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = bands.scale(x, factors)
    for row, image, f in zip(together, x, factors, strict=True):
        close(row, bands.scale(image.unsqueeze(0), f)[0])


def test_one_factor_is_that_of_all_bands() -> None:
    x = images(8, 2, 3, 0)
    close(bands.scale(x, torch.tensor([0.3])), bands.scale(x, torch.full((3,), 0.3)))


@few
@given(shapes, levels, seeds)
def test_scaling_twice_multiplies_and_by_one_changes_no_bit(shape: tuple[int, int, int], n: int, seed: int) -> None:
    x = images(*shape, seed)
    f, g = torch.rand(2, n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(bands.scale(bands.scale(x, f), g), bands.scale(x, f * g))
    assert torch.equal(bands.scale(x, torch.ones(n + 1)), x)


@few
@given(shapes, seeds)
def test_finest_band_is_what_halving_drops(shape: tuple[int, int, int], seed: int) -> None:
    x = images(*shape, seed)
    close(bands.detail(x), split(x, 1)[0])
    close(bands.detail(x) + bands.up(bands.down(x)), x)
    close(bands.down(bands.detail(x)), torch.zeros_like(bands.down(x)))


@few
@given(shapes, levels, seeds)
def test_energies_are_mean_squares_that_sum_to_the_norm(shape: tuple[int, int, int], n: int, seed: int) -> None:
    x = images(*shape, seed)
    resolution, _, channels = shape
    energies = bands.energies(x.float(), n)
    assert energies.dtype == torch.float64
    sizes = [round(p.trace().item()) * channels for p in projectors(resolution, n)]
    for i, band in enumerate(split(x.float().double(), n)):
        close(energies[:, i], band.square().flatten(1).sum(1) / sizes[i])
    close(energies @ torch.tensor(sizes, dtype=torch.float64), x.float().double().square().flatten(1).sum(1))


@few
@given(shapes, levels, seeds)
def test_to_level_is_down_again_and_again(shape: tuple[int, int, int], level: int, seed: int) -> None:
    x = images(*shape, seed)
    expected = x
    for _ in range(level):
        expected = bands.down(expected)
    close(bands.to_level(x, level), expected)


@pytest.mark.parametrize("level", range(4))
def test_pixels_grow_with_the_level_and_to_pixels_takes_that_back(level: int) -> None:
    white = torch.ones(1, 3, 8, 8)
    reduced = bands.to_level(white, level)
    assert torch.equal(reduced, torch.full_like(reduced, 2.0**level))
    assert torch.equal(bands.to_pixels(reduced, level), torch.ones_like(reduced))
