"""The sampler end to end, with denoisers that are exact: whatever is off is the process's own doing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule, UserError, sample
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.timesteps import step_grid
from tests.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, digits, projectors, split

#: Deviations of bands 0, 1, 2 of CIFAR-10, about.
DEVIATIONS = (0.144, 0.374, 0.879)

SOLVERS: dict[str, dict[str, Any]] = {
    "ancestral, lower": {"solver": "ddpm", "variance": "fixed_small"},
    "ancestral, upper": {"solver": "ddpm", "variance": "fixed_large"},
    "ddim": {"solver": "ddim"},
    "ddim, eta 0.5": {"solver": "ddim", "eta": 0.5},
}
POINTS: dict[int, tuple[int, ...]] = {0: (), 1: (300,), 2: (300, 600)}


def step_by_the_book(
    solver: dict[str, Any], signal_t: float, noise_t: float, signal_s: float, noise_s: float
) -> tuple[float, float, float]:
    """(a, b, c) of x_s = a x_t + b x_0 + c z in one band, from the published equations."""
    if noise_s == 0:
        return 0.0, 1.0, 0.0
    # q(x_s | x_t, x_0) is the product of two normal densities in x_s: q(x_t | x_s) and q(x_s | x_0).
    ratio = signal_t / signal_s
    added = noise_t**2 - ratio**2 * noise_s**2
    precision = ratio**2 / added + 1 / noise_s**2
    if solver["solver"] == "ddpm":
        variance = 1 / precision if solver["variance"] == "fixed_small" else added
        return ratio / added / precision, signal_s / noise_s**2 / precision, math.sqrt(variance)
    # signal_s x_0 + along eps + sigma z, with eps = (x_t - signal_t x_0) / noise_t.
    sigma = solver.get("eta", 0.0) / math.sqrt(precision)
    along = math.sqrt(noise_s**2 - sigma**2)
    return along / noise_t, signal_s - along * signal_t / noise_t, sigma


def generated(
    schedule: Schedule, band: int, deviation: float, steps: int, solver: dict[str, Any]
) -> tuple[float, float]:
    """(mean, deviation) of what the sampler makes of a normal band of mean 1, in closed form.

    The band is born as white noise at its turning point (or at T) and goes down the grid from there.
    """
    mean, variance = 0.0, float("nan")
    born = False
    for level, times in step_grid(schedule, steps):
        if level > band:
            continue
        if not born:
            variance, born = schedule.noise[band, times[0]].item() ** 2, True
        for t, s in pairwise(times):
            at = (schedule.signal[band, t], schedule.noise[band, t], schedule.signal[band, s], schedule.noise[band, s])
            signal_t, noise_t, signal_s, noise_s = (value.item() for value in at)
            a, b, c = step_by_the_book(solver, signal_t, noise_t, signal_s, noise_s)
            # E[x_0 | x_t] = gain x_t + offset.
            gain = signal_t * deviation**2 / (signal_t**2 * deviation**2 + noise_t**2)
            offset = 1 - gain * signal_t
            mean = (a + b * gain) * mean + b * offset
            variance = (a + b * gain) ** 2 * variance + c**2
    return mean, math.sqrt(variance)


def check_against_closed_form(
    schedule: Schedule, steps: int, solver: dict[str, Any], images: int, mean: Tensor | None = None
) -> None:
    K, resolution, channels = schedule.levels, 8, 24
    process = Process(schedule)
    denoiser = GaussianDenoiser(process, DEVIATIONS, mean)
    x = sample(
        process, denoiser, (images, channels, resolution, resolution), steps, clip=False, dtype=torch.float64, **solver
    )
    sizes = [round(p.trace().item()) * channels * images for p in projectors(resolution, K)]
    means = split(mean, K) if mean is not None else [torch.zeros(1)] * (K + 1)
    for band, values in enumerate(split(x, K)):
        expected_mean, expected = generated(schedule, band, DEVIATIONS[band], steps, solver)
        found = ((values - expected_mean * means[band]).square().sum() / sizes[band]).sqrt().item()
        # A sample deviation is off by 1 / sqrt(2 n), relatively: five of those.
        assert found == pytest.approx(expected, rel=5 / math.sqrt(2 * sizes[band])), (band, found, expected)
        if mean is not None:
            scale = (values.mean(0) * means[band]).sum() / means[band].square().sum()
            error = expected / (images * means[band].square().sum().item()) ** 0.5
            assert scale.item() == pytest.approx(expected_mean, abs=5 * error), band


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("levels", POINTS)
def test_gaussian_data_strided(levels: int, steps: int, solver: dict[str, Any]) -> None:
    check_against_closed_form(Schedule.dvdp(POINTS[levels]), steps, solver, images=128)


@pytest.mark.parametrize("solver", [SOLVERS["ancestral, lower"], SOLVERS["ddim"]], ids=["ancestral", "ddim"])
@pytest.mark.parametrize("levels", POINTS)
def test_gaussian_data_every_step(levels: int, solver: dict[str, Any]) -> None:
    check_against_closed_form(Schedule.dvdp(POINTS[levels]), 1000, solver, images=32)


def test_gaussian_data_every_step_upper_variance() -> None:
    check_against_closed_form(Schedule.dvdp(POINTS[2]), 1000, SOLVERS["ancestral, upper"], images=32)


def test_mean_of_gaussian_data_is_found() -> None:
    mean = torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for solver in SOLVERS.values():
        check_against_closed_form(Schedule.dvdp(POINTS[2]), 50, solver, images=64, mean=mean)


def test_subspace_diffusion_loses_detail_at_early_turning_points_and_dvdp_does_not() -> None:
    """The paper's Fig. 4 in closed form, then with the sampler itself."""
    ddim = SOLVERS["ddim"]

    def kept(schedule: Schedule) -> float:
        return generated(schedule, 0, DEVIATIONS[0], 1000, ddim)[1] / DEVIATIONS[0]

    found = {
        point: (kept(Schedule.dvdp([point], floor=0.01)), kept(Schedule.subspace([point]))) for point in (50, 100, 600)
    }
    assert found[50] == pytest.approx((0.975, 0.761), abs=1e-3)
    assert found[100] == pytest.approx((0.985, 0.911), abs=1e-3)
    assert found[600] == pytest.approx((0.989, 0.989), abs=1e-3)
    check_against_closed_form(Schedule.subspace([50]), 1000, ddim, images=32)
    check_against_closed_form(Schedule.dvdp([50], floor=0.01), 1000, ddim, images=32)


# --- the distribution of real images ----------------------------------------------------------------------------


def chosen(process: Process, images: Tensor, count: int, **how: Any) -> Tensor:
    """Sample, assert that every sample is one of the images, and count how often each came."""
    x = sample(process, EmpiricalDenoiser(process, images), (count, *images.shape[1:]), dtype=torch.float64, **how)
    distance, nearest = torch.cdist(x.flatten(1), images.flatten(1)).min(dim=1)
    assert distance.max() < 1e-3, f"a sample is {distance.max():.3g} from the nearest image"
    return torch.bincount(nearest, minlength=len(images))


def chi_square(counts: Tensor) -> float:
    """Of equal shares, in std of its law under equal shares (about normal)."""
    expected = counts.sum().item() / len(counts)
    freedom = len(counts) - 1
    return ((counts - expected).square().sum().item() / expected - freedom) / math.sqrt(2 * freedom)


SCHEDULES = {
    "ddpm": Schedule.ddpm(),
    "dvdp 50": Schedule.dvdp([50], floor=0.01),
    "dvdp 300": Schedule.dvdp([300]),
    "dvdp 600": Schedule.dvdp([600]),
    "dvdp 300, 600": Schedule.dvdp([300, 600]),
}


FAST: dict[str, dict[str, Any]] = {
    name: {"solver": name, "timestep_spacing": "quadratic"} for name in ("dpm++2m", "sde-dpm++2m", "deis2", "deis3")
}


@pytest.mark.parametrize("solver", [*SOLVERS.values(), *FAST.values()], ids=[*SOLVERS, *FAST])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_samples_are_training_images_all_about_equally_often(schedule: Schedule, solver: dict[str, Any]) -> None:
    counts = chosen(Process(schedule), digits(50, 16), 500, steps=50, **solver)
    assert (counts > 0).sum() >= 49
    assert chi_square(counts) < 4


def test_deep_process_on_more_and_larger_images() -> None:
    process = Process(Schedule.dvdp([200, 400, 600]))
    counts = chosen(process, digits(200, 32), 64, steps=100)
    # Of 64 draws from 200 about 55 differ.
    assert (counts > 0).sum() > 45


@pytest.mark.parametrize("solver", [SOLVERS["ancestral, lower"], SOLVERS["ddim"]], ids=["ancestral", "ddim"])
@pytest.mark.parametrize("point", [50, 100])
def test_detail_that_the_coarse_image_does_not_settle_survives_dvdp_alone(point: int, solver: dict[str, Any]) -> None:
    """Every digit is there twice, sharp and blurred, with the same coarse image.

    An early turning point of subspace diffusion drops the signal that tells the two apart, and what it lifts looks
    blurred; DVDP has attenuated that signal, so its lift favours neither.
    """
    sharp = digits(25, 16)
    images = torch.cat([sharp, sharp - split(sharp, 1)[0]])
    count = 500
    by_dvdp = chosen(Process(Schedule.dvdp([point], floor=0.01)), images, count, steps=200, **solver)
    assert chi_square(by_dvdp) < 4
    assert by_dvdp[:25].sum().item() == pytest.approx(count / 2, abs=4 * math.sqrt(count) / 2)
    by_subspace = chosen(Process(Schedule.subspace([point])), images, count, steps=200, **solver)
    # Of 500 draws about one in ten times a single one.
    assert by_subspace[:25].sum() <= 2
    assert chi_square(by_subspace) > 30


# --- the loop itself --------------------------------------------------------------------------------------------


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is neither linear nor good; elementwise, so that batches cannot matter."""
    return 1.5 * torch.tanh(x) + 0.1 * torch.sin(t.to(x.dtype)).reshape(-1, 1, 1, 1)


def weigh(bands: Sequence[Tensor], weights: Iterable[float]) -> Tensor:
    """The sum of bands, each times its weight."""
    return torch.stack([w * band for w, band in zip(weights, bands, strict=True)]).sum(0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("levels", POINTS)
def test_sampler_is_the_equations_step_by_step(levels: int, solver: dict[str, Any], clip: bool) -> None:
    schedule, resolution, n = Schedule.dvdp(POINTS[levels]), 8, 3
    K, T = schedule.levels, schedule.timesteps
    source = ImageNoise(5, 2, n)

    def draw(level: int) -> Tensor:
        return source.normal((3, resolution >> level, resolution >> level), torch.float64)

    x = schedule.noise[K, T] * draw(K)
    for level, times in step_grid(schedule, 12):
        if level < K:
            finest = split(draw(level), 1)[0]
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) / 2 + schedule.noise[level, times[0]] * finest
        for t, s in pairwise(times):
            signal_t, noise_t, signal_s, noise_s = (
                table[level:, u].tolist() for u in (t, s) for table in (schedule.signal, schedule.noise)
            )
            noiseless = x - weigh(split(bent(x, torch.full((n,), t)), K - level), noise_t)
            x0 = weigh(split(noiseless, K - level), (1 / signal for signal in signal_t))
            if clip:
                x0 = x0.clamp(-(2**level), 2**level)
            steps = [
                step_by_the_book(solver, *tables) for tables in zip(signal_t, noise_t, signal_s, noise_s, strict=True)
            ]
            a, b, c = zip(*steps, strict=True)
            x = weigh(split(x, K - level), a) + weigh(split(x0, K - level), b)
            if any(c):
                x = x + weigh(split(draw(level), K - level), c)
    found = sample(
        Process(schedule),
        bent,
        (n, 3, resolution, resolution),
        12,
        seed=5,
        first=2,
        clip=clip,
        dtype=torch.float64,
        **solver,
    )
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_textbook_ddpm_and_ddim_sample_the_same_images() -> None:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    process, shape = Process(Schedule.ddpm()), (2, 3, 4, 4)
    how: dict[str, Any] = {"steps": 1000, "clip": False, "dtype": torch.float64}
    for solver in ("ddpm", "ddim"):
        source = ImageNoise(0, 0, 2)
        x = (1 - abar[1000]).sqrt() * source.normal(shape[1:], torch.float64)
        for t in range(1000, 0, -1):
            eps = bent(x, torch.full((2,), t)) / 1.5
            if solver == "ddim":
                x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
                x = abar[t - 1].sqrt() * x0 + (1 - abar[t - 1]).sqrt() * eps
            else:
                # Ho et al. 2020, algorithm 2.
                x = (x - beta[t - 1] / (1 - abar[t]).sqrt() * eps) / (1 - beta[t - 1]).sqrt()
                if t > 1:
                    variance = beta[t - 1] * (1 - abar[t - 1]) / (1 - abar[t])
                    x = x + variance.sqrt() * source.normal(shape[1:], torch.float64)
        found = sample(process, lambda x, t: bent(x, t) / 1.5, shape, solver=solver, **how)
        torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_sampling_goes_on_from_a_state_at_a_turning_point(solver: str) -> None:
    """Deterministic solvers end where the whole way ends, from the states before and after a lift."""
    process, shape = Process(Schedule.dvdp([300, 600])), (2, 3, 8, 8)
    how: dict[str, Any] = {"steps": 20, "solver": solver, "dtype": torch.float64}
    seen: dict[tuple[int, int], Tensor] = {}
    whole = sample(process, bent, shape, callback=lambda p: seen.update({(p.level, p.s): p.state}), **how)

    source = ImageNoise(0, 0, 2)
    source.normal((3, 2, 2), torch.float64)
    lifted = process.lift(seen[2, 600], 2, source.normal((3, 4, 4), torch.float64))
    second = source.normal((3, 8, 8), torch.float64)
    calls: list[Progress] = []
    middle = sample(process, bent, shape, start=(lifted, 600), callback=calls.append, **how)
    assert [(p.nfe, p.total_nfe) for p in calls] == [(i, 12) for i in range(1, 13)]
    torch.testing.assert_close(calls[5].state, seen[1, 300])
    # The draws of its own lift are the first of every image: other noise than on the whole way.
    assert not torch.equal(middle, whole)
    end = sample(process, bent, shape, start=(process.lift(seen[1, 300], 1, second), 300), **how)
    torch.testing.assert_close(end, whole)

    before = sample(process, bent, shape, start=(seen[1, 300], 300), **how)
    first = ImageNoise(0, 0, 2).normal((3, 8, 8), torch.float64)
    after = sample(process, bent, shape, start=(process.lift(seen[1, 300], 1, first), 300), **how)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(("resolution", "t"), [(8, 600), (2, 300), (4, 500), (4, 1000)])
def test_a_state_that_is_at_no_turning_point_is_refused(resolution: int, t: int) -> None:
    with pytest.raises(UserError, match=r"start: found a state of .* expected one at a turning point, \[300, 600\]"):
        sample(
            Process(Schedule.dvdp([300, 600])),
            bent,
            (1, 3, 8, 8),
            20,
            start=(torch.zeros(1, 3, resolution, resolution), t),
        )
