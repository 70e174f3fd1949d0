"""What is known of images holds in what is drawn, under every solver, at every level; and the rest fits it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule, UserError, sample
from dvdp.diffusion.bands import down, to_level
from dvdp.diffusion.conditional import (
    LUMINANCE,
    known_bands,
    known_luminance,
    known_pixels,
    state_of_bands,
    timestep_of,
)
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.solvers import SOLVERS
from dvdp.diffusion.timesteps import step_grid
from tests.diffusion.exact import DenseGaussianDenoiser, EmpiricalDenoiser, GaussianDenoiser, digits, split

POINTS = {0: (), 1: (500,), 2: (300, 600)}
STD = {0: (0.5,), 1: (0.3, 0.9), 2: (0.15, 0.4, 0.9)}


def gaussian(levels: int) -> tuple[Process, GaussianDenoiser]:
    process = Process(Schedule.dvdp(POINTS[levels]))
    return process, GaussianDenoiser(process, STD[levels])


def pictures(count: int, resolution: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images with much detail, of which some pixels are at the ends of the range."""
    x = torch.randn(count, 3, resolution, resolution, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return (0.7 * x).clamp(-1, 1)


def check_true_images(x: Tensor) -> None:
    assert x.isfinite().all()
    assert x.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("levels", POINTS)
@pytest.mark.parametrize("known", [1, 2])
def test_images_have_the_bands_that_are_known_and_detail_of_their_own(solver: str, levels: int, known: int) -> None:
    process, denoiser = gaussian(levels)
    coarse = to_level(pictures(6), known)
    how: dict[str, Any] = {"solver": solver, "constraint": known_bands(coarse, known)}
    start = state_of_bands(process, coarse, known, 6)
    assert (start is None) == (known > levels)
    whole = sample(process, denoiser, (6, 3, 8, 8), 12, **how)
    for images in (whole, sample(process, denoiser, (6, 3, 8, 8), 12, start=start, **how)):
        torch.testing.assert_close(to_level(images, known), coarse, rtol=0, atol=1e-6)
        check_true_images(images)
        assert split(images.double(), known)[0].std() > 0.05, "the detail is drawn"
    assert not torch.equal(whole[0], sample(process, denoiser, (6, 3, 8, 8), 12, seed=1, **how)[0])


def test_known_bands_of_a_mean_at_the_end_of_the_range_leave_no_room_for_detail() -> None:
    process, denoiser = gaussian(1)
    coarse = 2 * torch.tensor([1.0, -1.0, 0.0, 0.999]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    x = sample(process, denoiser, (5, 3, 4, 4), 8, constraint=known_bands(coarse, 1))
    torch.testing.assert_close(down(x), coarse.expand(5, 3, 2, 2), rtol=0, atol=1e-6)
    check_true_images(x)
    assert torch.equal(x[:, :, :2, :2], torch.ones(5, 3, 2, 2))


@pytest.mark.parametrize("levels", [1, 2])
def test_the_detail_below_known_bands_has_the_law_of_the_data(levels: int) -> None:
    """Bands are independent here, so what is known of one says nothing of others."""
    process, denoiser = gaussian(levels)
    coarse = to_level(pictures(200, dtype=torch.float64), levels)
    how: dict[str, Any] = {"dtype": torch.float64, "clip": False}
    free = sample(process, denoiser, (200, 3, 8, 8), 100, **how)
    how |= {
        "constraint": known_bands(coarse, levels, clip=False),
        "start": state_of_bands(process, coarse, levels, 200),
    }
    given = sample(process, denoiser, (200, 3, 8, 8), 100, **how)
    for band in range(levels):
        expected, found = (split(x, levels)[band].std().item() for x in (free, given))
        assert found == pytest.approx(expected, rel=0.03), band


def test_sampling_with_known_bands_starts_at_their_turning_point() -> None:
    process, denoiser = gaussian(2)
    coarse, seen = to_level(pictures(2), 1), list[Progress]()
    start = state_of_bands(process, coarse, 1, 2, seed=3)
    assert start is not None
    assert start[1] == 300
    sample(process, denoiser, (2, 3, 8, 8), 12, start=start, constraint=known_bands(coarse, 1), callback=seen.append)
    assert [p.t for p in seen] == step_grid(process.schedule, 12)[-1][1][:-1]
    assert torch.equal(start[0], state_of_bands(process, coarse, 1, 2, seed=3)[0])  # type: ignore[index]
    # Of the forward process: noise of the schedule around the signal that is left.
    many = state_of_bands(process, coarse[:1], 1, 4000)
    assert many is not None
    signal = sum(process.schedule.signal[1 + i, 300] * band for i, band in enumerate(split(coarse[:1].double(), 1)))
    torch.testing.assert_close(many[0].double().mean(0, keepdim=True), signal, rtol=0, atol=0.06)
    assert many[0].std(0).mean().item() == pytest.approx(process.schedule.noise[1, 300].item(), rel=0.02)


def correlated(resolution: int) -> Tensor:
    """The covariance of pixels that are the more alike the nearer they are."""
    place = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 2, indexing="ij"), dim=-1).flatten(0, 1).double()
    return 0.25 * torch.exp(-torch.cdist(place, place) / 4)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "deis2"])
@pytest.mark.parametrize("levels", POINTS)
def test_a_hole_agrees_with_its_surroundings_the_more_often_steps_are_resampled(levels: int, solver: str) -> None:
    """The covariance of pixels in the hole with those around it, over the one that the data has."""
    process, covariance, n = Process(Schedule.dvdp(POINTS[levels])), correlated(8), 250
    random = torch.randn(n, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (random @ torch.linalg.cholesky(covariance).T).reshape(n, 1, 8, 8)
    known = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    known[..., 5:] = False
    inside, outside = (~known).flatten(), known.flatten()
    denoiser = DenseGaussianDenoiser(process, covariance)

    def agreement(drawn: Tensor) -> float:
        x = drawn.flatten(1)
        expected = covariance[inside][:, outside]
        return ((x[:, inside].T @ x[:, outside] / n * expected).sum() / expected.square().sum()).item()

    how: dict[str, Any] = {"solver": solver, "clip": False, "constraint": known_pixels(images, known)}
    found = []
    for resampling in (1, 3, 8):
        x = sample(process, denoiser, (n, 1, 8, 8), 20, resampling=resampling, dtype=torch.float64, **how)
        torch.testing.assert_close(x[:, :, :, :5], images[:, :, :, :5], rtol=0, atol=1e-6)
        found.append(agreement(x) / agreement(images))
    assert found[0] < 0.7
    assert all(b > a + 0.07 for a, b in pairwise(found)), found
    assert 0.85 < found[-1] < 1.05, found


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("levels", POINTS)
def test_known_pixels_stay_and_holes_are_true_images(solver: str, levels: int) -> None:
    process, denoiser = gaussian(levels)
    images, known = pictures(4), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    how: dict[str, Any] = {"solver": solver, "constraint": known_pixels(images, known), "resampling": 2, "jump": 3}
    x = sample(process, denoiser, (4, 3, 8, 8), 12, **how)
    torch.testing.assert_close(torch.where(known, x, 0), torch.where(known, images, 0), rtol=0, atol=1e-6)
    check_true_images(x)
    assert not torch.allclose(x, images)


def test_a_hole_in_an_image_of_the_data_is_filled_with_what_belongs_there() -> None:
    """Of the empirical law of some digits, half of each of which is known."""
    process, images = Process(Schedule.dvdp([300, 600])), digits(12, 16)
    known = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    known[..., 8:] = False
    constraint = known_pixels(images, known)

    def right(resampling: int) -> int:
        how: dict[str, Any] = {"constraint": constraint, "resampling": resampling, "dtype": torch.float64}
        x = sample(process, EmpiricalDenoiser(process, images), (12, 1, 16, 16), 30, **how)
        return int(((x - images).abs().amax(dim=(1, 2, 3)) < 1e-3).sum())

    assert right(1) <= 9
    assert right(5) >= 11


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("levels", POINTS)
def test_colours_are_drawn_for_a_grey_that_is_known(solver: str, levels: int) -> None:
    process, denoiser = gaussian(levels)
    weights = torch.tensor(LUMINANCE)[:, None, None]
    grey = (weights * pictures(4)).sum(1, keepdim=True)
    x = sample(process, denoiser, (4, 3, 8, 8), 12, solver=solver, constraint=known_luminance(grey))
    torch.testing.assert_close((weights * x).sum(1, keepdim=True), grey, rtol=0, atol=1e-6)
    check_true_images(x)
    assert (x - grey).std() > 0.1


def test_a_grey_changes_only_what_it_measures_where_nothing_is_clipped() -> None:
    """The law of what a linear measurement does not see is that of the data."""
    x0 = pictures(3, dtype=torch.float64)
    weights = torch.tensor(LUMINANCE, dtype=torch.float64)[:, None, None]
    grey = torch.full((1, 1, 8, 8), 0.1, dtype=torch.float64)
    found = known_luminance(grey, clip=False)(x0, 0, slice(0, 3))
    moved = found - x0
    along = weights / weights.square().sum() * (weights * moved).sum(1, keepdim=True)
    torch.testing.assert_close(moved, along)


@pytest.mark.parametrize("t", [1, 120, 300, 301, 600, 777, 1000])
def test_image_to_image_starts_from_the_forward_process_at_any_timestep(t: int) -> None:
    process, denoiser = gaussian(2)
    images, seen = pictures(3, dtype=torch.float64), list[Progress]()
    states: list[Tensor] = []

    def spy(x: Tensor, at: Tensor) -> Tensor:
        states.append(x)
        return denoiser(x, at)

    sample(process, spy, (3, 3, 8, 8), 30, image=(images, t), callback=seen.append, dtype=torch.float64)
    level = process.level(t)
    z = ImageNoise(0, 0, 3).normal((3, 8 >> level, 8 >> level), torch.float64)
    torch.testing.assert_close(states[0], process.diffuse(images, t, z))
    whole = [at for _, times in step_grid(process.schedule, 30) for at in times[:-1]]
    assert [p.t for p in seen] == [t, *(at for at in whole if at < t)]
    assert [p.nfe for p in seen] == list(range(1, seen[-1].total_nfe + 1))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_image_to_image_keeps_the_law_of_the_data_and_the_less_of_an_image_the_stronger(solver: str) -> None:
    process, denoiser = gaussian(2)
    how: dict[str, Any] = {"solver": solver, "clip": False, "dtype": torch.float64}
    random = ImageNoise(5, 0, 150)
    noise = split(random.normal((3, 8, 8), torch.float64), 2)
    images = sum((std * band for std, band in zip(STD[2], noise, strict=True)), torch.zeros(()))
    kept = []
    for strength in (0.01, 0.1, 0.25, 1.0):
        x = sample(process, denoiser, (150, 3, 8, 8), 60, image=(images, timestep_of(strength, 1000)), **how)
        for band, std in enumerate(STD[2]):
            # A band that is drawn anew has what the solver makes of it in 60 steps.
            ratio = split(x, 2)[band].norm() / split(images, 2)[band].norm()
            assert 0.7 < ratio < 1.1, (strength, band, std)
        kept.append((x * images).sum().item() / images.square().sum().item())
    assert kept[0] > 0.95
    assert all(b < a - 0.05 for a, b in pairwise(kept)), kept
    assert kept[-1] < 0.1


@pytest.mark.parametrize("options", [{"resampling": 3}, {"resampling": 2, "jump": 4}, {"image": 700}])
def test_images_do_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    process, denoiser = gaussian(2)
    images = pictures(5, dtype=torch.float64)
    how: dict[str, Any] = {"constraint": known_pixels(images, images[:, :1] > 0), "dtype": torch.float64, **options}
    if "image" in how:
        how["image"] = (images, how["image"])
    whole = sample(process, denoiser, (5, 3, 8, 8), 12, **how)
    torch.testing.assert_close(sample(process, denoiser, (5, 3, 8, 8), 12, batch=1, **how), whole)


@pytest.mark.parametrize(("resampling", "jump"), [(1, 1), (3, 1), (2, 4), (2, 100)])
def test_resampling_makes_each_jump_so_often_and_ends_where_it_would(resampling: int, jump: int) -> None:
    process, denoiser = gaussian(2)
    seen: list[Progress] = []
    sample(process, denoiser, (1, 3, 8, 8), 20, resampling=resampling, jump=jump, callback=seen.append)
    expected: list[tuple[int, int]] = []
    for _, times in step_grid(process.schedule, 20):
        steps = list(pairwise(times))
        length = len(steps) if resampling == 1 else jump
        for first in range(0, len(steps), length):
            expected += steps[first : first + length] * resampling
    assert [(p.t, p.s) for p in seen] == expected
    assert [p.nfe for p in seen] == list(range(1, 20 * resampling + 1))
    assert seen[0].total_nfe == 20 * resampling


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_resampling_without_anything_known_keeps_the_law_of_the_data(solver: str) -> None:
    process, std = gaussian(2)[0], (0.5, 0.7, 0.9)
    how: dict[str, Any] = {"solver": solver, "clip": False, "dtype": torch.float64, "resampling": 3, "jump": 2}
    bands = split(sample(process, GaussianDenoiser(process, std), (60, 3, 8, 8), 200, **how), 2)
    for band, coefficients, expected in zip(bands, (48, 12, 4), std, strict=True):
        assert (band.square().sum() / (180 * coefficients)).sqrt().item() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resampling": 0}, "^resampling: found 0, expected a whole number of at least 1.$"),
        ({"jump": 0}, "^jump: found 0, expected a whole number of at least 1.$"),
        (
            {"image": (torch.zeros(1, 3, 4, 4), 300)},
            r"^image: found \(1, 3, 4, 4\) and t = 300, expected images \(1, 3,",
        ),
        ({"image": (torch.zeros(1, 3, 8, 8), 0)}, r"^image: found \(1, 3, 8, 8\) and t = 0, expected images"),
        (
            {"image": (torch.zeros(1, 3, 8, 8), 5), "start": (torch.zeros(1, 3, 4, 4), 300)},
            "^start: found it beside im",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    process, denoiser = gaussian(2)
    with pytest.raises(UserError, match=sentence):
        sample(process, denoiser, (1, 3, 8, 8), 12, **options)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_one_sentence(strength: float) -> None:
    with pytest.raises(UserError, match=rf"^strength: found {strength}, expected a number above 0 and at most 1"):
        timestep_of(strength, 1000)
