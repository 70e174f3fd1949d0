"""Step solvers: their algebra, their order, and what they make of data for which the denoiser is exact."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvdp import Process, Schedule, UserError, sample
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.solvers import SOLVERS, make_solver
from dvdp.diffusion.timesteps import TIMESTEP_SPACINGS, step_grid
from dvdp.planning.planner import band_errors, generated_std, lift_losses
from tests.diffusion.exact import GaussianDenoiser, projectors, split
from tests.diffusion.strategies import few, schedules
from tests.diffusion.test_sampling import DEVIATIONS, generated

DETERMINISTIC = ("ddim", "dpm++2m", "deis2", "deis3")
FAST = ("dpm++2m", "sde-dpm++2m", "deis2", "deis3")


@few
@given(
    schedules(st.integers(8, 200)),
    st.sampled_from(sorted(SOLVERS)),
    st.sampled_from(sorted(TIMESTEP_SPACINGS)),
    st.data(),
)
def test_a_solver_moves_a_state_of_known_image_and_noise_to_where_the_process_has_it(
    schedule: Schedule, name: str, timestep_spacing: str, data: st.DataObject
) -> None:
    """signal_t x0 + noise_t z goes to signal_s x0 + noise_s z, or to as much noise where some of it is fresh."""
    steps = data.draw(st.integers(schedule.levels + 1, schedule.timesteps))
    process = Process(schedule)
    for level, times in step_grid(schedule, steps, timestep_spacing):
        table = make_solver(name)(process, times, level)
        signal, noise = (both[level:, times].T for both in (schedule.signal, schedule.noise))
        image, old = table.x * signal[:-1], table.x * noise[:-1]
        if table.prediction_type == "sample":
            image = image + table.history.sum(0)
        else:
            old = old + table.history.sum(0)
        # A state that is magnified a million times, where next to no signal is left, brings its rounding along.
        near = {"rtol": 1e-9, "atol": max(1e-9, 1e-15 * table.x.max().item())}
        torch.testing.assert_close(image, signal[1:], **near)
        # The posterior of Ho et al. and the reverse SDE keep the variance, deterministic solvers the noise itself.
        torch.testing.assert_close((old.square() + table.z.square()).sqrt(), noise[1:], **near)
        if name in DETERMINISTIC:
            assert not table.z.any()
            torch.testing.assert_close(old, noise[1:], **near)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_history_starts_anew_at_every_level_and_ends_before_the_clean_image(solver: str) -> None:
    schedule = Schedule.dvdp([300, 600])
    for level, times in step_grid(schedule, 15):
        table = make_solver(solver)(Process(schedule), times, level)
        assert not table.history[1:, 0].any()
        if level == 0:
            assert not table.history[1:, -1].any()
            assert not table.z[-1].any()


def by_the_book(solver: str, process: Process, denoiser: GaussianDenoiser, steps: int, start: Tensor) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. and its SDE form, for K = 0: scalars alone."""
    signal, noise = (table[0].tolist() for table in (process.schedule.signal, process.schedule.noise))
    x, before, h_before = start, None, math.nan
    source = ImageNoise(0, 0, len(x))
    source.normal(x.shape[1:], x.dtype)
    ((_, times),) = step_grid(process.schedule, steps)
    for t, s in pairwise(times):
        eps = denoiser(x, torch.full((len(x),), t))
        x0 = (x - noise[t] * eps) / signal[t]
        if s == 0:
            return x0
        h = math.log(signal[s] / noise[s]) - math.log(signal[t] / noise[t])
        extrapolated = x0 if before is None else x0 + (x0 - before) / (2 * h_before / h)
        if solver == "dpm++2m":
            x = noise[s] / noise[t] * x - signal[s] * (math.exp(-h) - 1) * extrapolated
        else:
            x = noise[s] / noise[t] * math.exp(-h) * x + signal[s] * (1 - math.exp(-2 * h)) * extrapolated
            x = x + noise[s] * math.sqrt(1 - math.exp(-2 * h)) * source.normal(x.shape[1:], x.dtype)
        before, h_before = x0, h
    raise AssertionError


@pytest.mark.parametrize("solver", ["dpm++2m", "sde-dpm++2m"])
def test_dpm_solver_without_turning_points_is_the_published_one(solver: str) -> None:
    process, shape = Process(Schedule.ddpm()), (2, 1, 4, 4)
    denoiser = GaussianDenoiser(process, [0.7], torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 1, 4, 4))
    start = process.schedule.noise[0, -1] * ImageNoise(0, 0, 2).normal(shape[1:], torch.float64)
    found = sample(process, denoiser, shape, 20, solver, clip=False, dtype=torch.float64)
    torch.testing.assert_close(found, by_the_book(solver, process, denoiser, 20, start), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_integrates_a_polynomial_noise_exactly(order: int) -> None:
    """Where the predicted noise is a polynomial in t of a degree below the order, every step but the first is exact."""
    schedule = Schedule.dvdp([300, 600])
    level, times = step_grid(schedule, 20)[1]
    table = make_solver(f"deis{order}")(Process(schedule), times, level)

    def polynomial(t: float) -> float:
        return 1 - 3 * (t / 1000) + (7 * (t / 1000) ** 2 if order == 3 else 0)

    fine = 64
    for band in (1, 2):
        ratio = schedule.noise[band] / schedule.signal[band]
        for i in range(order - 1, len(times) - 1):
            t, s = times[i], times[i + 1]
            exact = sum(
                (ratio[u - 1] - ratio[u]).item() * polynomial(u - (k + 0.5) / fine) / fine
                for u in range(t, s, -1)
                for k in range(fine)
            )
            found = sum(table.history[j, i, band - 1].item() * polynomial(times[i - j]) for j in range(order))
            assert found == pytest.approx(schedule.signal[band, s].item() * exact, rel=1e-5)


# --- order ------------------------------------------------------------------------------------------------------

CHECKED = (6000, 3000, 1000)


def flow(process: Process, x: Tensor, t: int, s: int) -> Tensor:
    """The exact probability flow of Gaussian data from t to s, at the level of the steps between them."""
    level = process.level(s + 1)
    schedule, data = process.schedule, torch.tensor(DEVIATIONS[level:], dtype=torch.float64)
    before, after = (torch.hypot(schedule.signal[level:, u] * data, schedule.noise[level:, u]) for u in (t, s))
    parts = split(x, process.levels - level)
    return torch.stack([r * part for r, part in zip((after / before).tolist(), parts, strict=True)]).sum(0)


def error_of(solver: str, steps: int) -> float:
    """Largest error of the states at T_2, T_1 and t = 1000, relative to the exact flow from the same noise."""
    process, shape = Process(Schedule.dvdp([3000, 6000], timesteps=10_000)), (1, 1, 8, 8)
    found: dict[int, Tensor] = {}

    def keep(progress: Progress) -> None:
        if progress.s in CHECKED:
            found[progress.s] = progress.state

    denoiser = GaussianDenoiser(process, DEVIATIONS)
    sample(process, denoiser, shape, steps, solver, clip=False, dtype=torch.float64, callback=keep)
    source = ImageNoise(0, 0, 1)
    x = process.schedule.noise[2, -1] * source.normal((1, 2, 2), torch.float64)
    errors = []
    for t, s in pairwise((10_000, *CHECKED)):
        if t in (6000, 3000):
            level = process.level(t) + 1
            x = process.lift(x, level, source.normal((1, 8 >> (level - 1), 8 >> (level - 1)), torch.float64))
        x = flow(process, x, t, s)
        errors.append(((found[s] - x).norm() / x.norm()).item())
    return max(errors)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2), ("deis2", 2), ("deis3", 2)])
def test_errors_fall_with_the_order_of_the_solver(solver: str, order: int) -> None:
    coarse, fine = error_of(solver, 100), error_of(solver, 400)
    assert math.log(coarse / fine) / math.log(4) > order - 0.2, (coarse, fine)


def test_higher_orders_are_nearer_at_equal_steps() -> None:
    errors = {solver: error_of(solver, 100) for solver in DETERMINISTIC}
    assert errors["deis3"] < errors["deis2"] < errors["ddim"] / 3
    assert errors["dpm++2m"] < errors["ddim"] / 3


# --- Gaussian data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep_spacing", sorted(TIMESTEP_SPACINGS))
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("points", [(), (300, 600)])
def test_samples_of_gaussian_data_have_the_std_that_is_planned(
    points: tuple[int, ...], solver: str, timestep_spacing: str
) -> None:
    schedule, resolution, channels, images = Schedule.dvdp(points), 8, 24, 96
    data = DEVIATIONS[: len(points)] + DEVIATIONS[-1:]
    how: dict[str, Any] = {"steps": 15, "solver": solver, "timestep_spacing": timestep_spacing}
    process = Process(schedule)
    x = sample(
        process,
        GaussianDenoiser(process, data),
        (images, channels, resolution, resolution),
        clip=False,
        dtype=torch.float64,
        **how,
    )
    sizes = [round(p.trace().item()) * channels * images for p in projectors(resolution, len(points))]
    for band, expected in enumerate(generated_std(schedule, data, **how)):
        found = (split(x, len(points))[band].square().sum() / sizes[band]).sqrt().item()
        assert found == pytest.approx(expected, rel=5 / math.sqrt(2 * sizes[band])), band


@pytest.mark.parametrize("how", [{"solver": "ddpm", "variance": "fixed_large"}, {"solver": "ddim", "eta": 0.5}])
def test_planned_std_is_that_of_the_published_equations(how: dict[str, Any]) -> None:
    schedule = Schedule.dvdp([300, 600])
    expected = [generated(schedule, band, DEVIATIONS[band], 50, how)[1] for band in range(3)]
    assert generated_std(schedule, DEVIATIONS, 50, **how) == pytest.approx(expected, rel=1e-9)


def test_twenty_steps_of_the_best_solver_lose_no_more_than_a_point_to_turning_points() -> None:
    """What few steps cost in a band is what they cost without turning points, with the grid made for it."""
    how: dict[str, Any] = {"steps": 20, "solver": "dpm++2m", "timestep_spacing": "quadratic"}
    found = band_errors(Schedule.dvdp([300, 600]), DEVIATIONS, **how)
    without = [band_errors(Schedule.ddpm(), [deviation], **how)[0] for deviation in DEVIATIONS]
    for error, base in zip(found, without, strict=True):
        assert abs(error) <= abs(base) + 0.01
    ddim = band_errors(Schedule.dvdp([300, 600]), DEVIATIONS, **{**how, "solver": "ddim"})
    assert max(map(abs, found)) < max(map(abs, ddim)) / 3


def test_a_lift_with_the_datas_variance_keeps_what_subspace_diffusion_loses() -> None:
    """An early turning point drops signal that the lift, told the data's deviation, brings back in variance."""
    schedule, data = Schedule.subspace([50]), (DEVIATIONS[0], DEVIATIONS[-1])
    plain = generated_std(schedule, data, 1000, solver="ddim")
    matched = generated_std(schedule, data, 1000, solver="ddim", lift="data")
    assert plain[0] / data[0] == pytest.approx(0.761, abs=1e-3)
    assert matched[0] / data[0] == pytest.approx(0.990, abs=1e-3)
    assert matched[1] == plain[1]

    process, shape = Process(schedule, data), (64, 24, 8, 8)
    denoiser = GaussianDenoiser(process, data)
    x = sample(process, denoiser, shape, 20, "ddim", clip=False, dtype=torch.float64)
    found = (split(x, 1)[0].square().sum() / (48 * 64 * 24)).sqrt().item()
    expected = generated_std(schedule, data, 20, "ddim", lift="data")[0]
    assert found == pytest.approx(expected, rel=5 / math.sqrt(2 * 48 * 64 * 24))


def test_a_lift_loses_what_the_divergence_of_two_normal_numbers_says() -> None:
    schedule = Schedule.dvdp([300, 600])
    first, second = lift_losses(schedule, DEVIATIONS, resolution=32)
    for loss, band, coefficients in ((first, 0, 3 * 768), (second, 1, 3 * 192)):
        T = schedule.turning_points[band]
        noise = torch.distributions.Normal(0.0, schedule.noise[band, T])
        true = torch.distributions.Normal(0.0, torch.hypot(schedule.signal[band, T] * DEVIATIONS[band], noise.stddev))
        assert loss == pytest.approx(coefficients * torch.distributions.kl_divergence(true, noise).item(), rel=1e-6)


def test_band_std_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(UserError, match=r"band_std: found 2 numbers, expected one for each of 3 bands\."):
        Process(Schedule.dvdp([300, 600]), band_std=[0.1, 0.2])
