"""Forward, reverse and lift against dense Gaussian algebra and the textbook."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvdp import Process, Schedule, UserError
from dvdp.diffusion import bands
from dvdp.diffusion.process import Variance
from tests.diffusion.exact import as_matrix, combine, down_matrix, projectors, split
from tests.diffusion.strategies import few, images, schedules, seeds

SIDE = 8
short = schedules(st.integers(2, 12))
times = st.floats(0, 1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def level_tables(schedule: Schedule, level: int, t: int) -> tuple[Tensor, Tensor]:
    """(S, N): the level's dense signal and noise matrices at t."""
    P = projectors(SIDE >> level, schedule.levels - level)
    return combine(schedule.signal[level:, t], P), combine(schedule.noise[level:, t], P)


def times_of_level(schedule: Schedule, level: int, a: float, b: float) -> tuple[int, int]:
    """s < t of one level, T_k <= s < t <= T_{k+1}, from two numbers in [0, 1]."""
    low, high = schedule.span(level)
    s = low + round(a * (high - low - 1))
    return s, s + 1 + round(b * (high - s - 1))


# --- forward ---------------------------------------------------------------------------------------------------


def test_level_changes_just_after_each_turning_point() -> None:
    process = Process(Schedule.dvdp([300, 600]))
    expected = {0: 0, 1: 0, 300: 0, 301: 1, 600: 1, 601: 2, 1000: 2}
    for t, level in expected.items():
        assert process.level(t) == level
        assert process.level(torch.tensor([t, t])) == level
    assert process.level(torch.tensor([301, 600, 450])) == 1
    assert process.levels == 2


@pytest.mark.parametrize("t", [-1, 1001, torch.tensor([-1, 5]), torch.tensor([900, 1001])])
def test_timestep_outside_the_process_is_refused(t: int | Tensor) -> None:
    with pytest.raises(UserError, match=r"t: found .* expected timesteps of 0 to 1000\.$"):
        Process(Schedule.dvdp([300])).level(t)


def test_timesteps_of_two_levels_are_refused() -> None:
    with pytest.raises(UserError, match=r"levels 0 to 1, expected one level"):
        Process(Schedule.dvdp([300])).level(torch.tensor([300, 301]))


@pytest.mark.parametrize("resolution", [2, 30, 33])
def test_resolution_that_cannot_be_halved_is_refused(resolution: int) -> None:
    with pytest.raises(UserError, match=rf"image resolution: found {resolution}, expected a multiple of 4"):
        Process(Schedule.dvdp([300, 600])).check_resolution(resolution)


@few
@given(short, times, times, seeds)
def test_diffuse_is_the_sum_over_bands(schedule: Schedule, a: float, b: float, seed: int) -> None:
    process = Process(schedule)
    x0 = images(SIDE, 2, 3, seed)
    for level in range(schedule.levels + 1):
        _, t = times_of_level(schedule, level, a, b)
        resolution = SIDE >> level
        z = images(resolution, 2, 3, seed + 1)
        # What the bands of the whole image become when the level's halvings are applied.
        expected = torch.zeros_like(z)
        for band, (v, noise) in enumerate(
            zip(split(x0, schedule.levels)[level:], split(z, schedule.levels - level), strict=True), start=level
        ):
            low = v
            for _ in range(level):
                low = bands.down(low)
            expected += schedule.signal[band, t] * low + schedule.noise[band, t] * noise
        close(process.diffuse(x0, t, z), expected)
        close(process.diffuse(x0, torch.tensor([t, t]), z), expected)
    # Every sample at its own time.
    first_and_last = [1, schedule.span(0)[1]]
    z = images(SIDE, 2, 3, seed + 1)
    each = [process.diffuse(x0[i : i + 1], t, z[i : i + 1]) for i, t in enumerate(first_and_last)]
    close(process.diffuse(x0, torch.tensor(first_and_last), z), torch.cat(each))


def test_diffused_images_have_the_promised_mean_and_white_noise() -> None:
    process = Process(Schedule.dvdp([300, 600]))
    n, x0 = 20_000, images(SIDE, 1, 1, seed=0)
    for t in (200, 500, 800):
        level = process.level(t)
        resolution = SIDE >> level
        x = process.diffuse(x0.expand(n, -1, -1, -1), t, images(resolution, n, 1, seed=t)).flatten(1)
        S, _ = level_tables(process.schedule, level, t)
        mean = S @ bands.to_level(x0, level).flatten()
        sigma = process.schedule.noise[0, t].item()
        assert ((x.mean(0) - mean).abs() < 5 * sigma / n**0.5).all()
        assert ((x.T.cov() / sigma**2 - torch.eye(resolution * resolution)).abs() < 6 * 2**0.5 / n**0.5).all()


def test_noise_may_differ_from_band_to_band() -> None:
    """None of our schedules has it so; theirs is white, and takes one multiplication."""
    white = Schedule.dvdp([300])
    factors = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    process = Process(Schedule(white.signal, white.noise * factors, white.turning_points))
    z = images(SIDE, 2, 3, seed=1)
    found = process.diffuse(images(SIDE, 2, 3, seed=0), 200, z)
    expected = Process(white).diffuse(images(SIDE, 2, 3, seed=0), 200, bands.scale(z, factors[:, 0]))
    close(found, expected)


def test_clean_images_are_diffused_to_themselves_at_0() -> None:
    x0 = images(SIDE, 2, 3, seed=0)
    assert torch.equal(Process(Schedule.dvdp([300])).diffuse(x0, 0, images(SIDE, 2, 3, seed=1)), x0)


@few
@given(short, times, times, seeds)
def test_clean_image_and_noise_imply_each_other(schedule: Schedule, a: float, b: float, seed: int) -> None:
    process = Process(schedule)
    x0 = images(SIDE, 2, 3, seed)
    for level in range(schedule.levels + 1):
        t = torch.tensor([times_of_level(schedule, level, *pair)[1] for pair in ((a, b), (b, a))])
        z = images(SIDE >> level, 2, 3, seed + 1)
        x, clean = process.diffuse(x0, t, z), bands.to_level(x0, level)
        # Division by signal or noise magnifies the rounding.
        signal, noise = schedule.signal[level:, t], schedule.noise[level:, t]
        tolerance = 1e-13 / min(signal.min().item(), noise.min().item())
        close(process.predict_clean(x, t, z), clean, tolerance)
        close(process.predict_noise(x, t, clean), z, tolerance)
        close(process.predict_noise(x, t, process.predict_clean(x, t, z, level), level), z, tolerance)


# --- reverse ---------------------------------------------------------------------------------------------------


def conditioned(schedule: Schedule, level: int, s: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Brute force: the chain's joint law of (x_s, x_t) given x_0, conditioned on x_t.

    Returns:
        (A, B, lower, upper): mean A x_t + B x_0, its covariance, and the covariance of x_t given x_s, all dense.
    """
    P = projectors(SIDE >> level, schedule.levels - level)
    size = P[0].shape[0]
    eye, zero = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    mean, cov = eye, zero  # of x_u given x_0
    to_t, cov_given_s = eye, zero  # of x_u given x_s
    mean_s, cov_s = mean, cov
    for u in range(1, t + 1):
        before, after = schedule.signal[level:, u - 1], schedule.signal[level:, u]
        ratio = after / before
        added = schedule.noise[level:, u].square() - ratio.square() * schedule.noise[level:, u - 1].square()
        R, Q = combine(ratio, P), combine(added, P)
        mean, cov = R @ mean, R @ cov @ R.T + Q
        if u == s:
            mean_s, cov_s = mean, cov
        if u > s:
            to_t, cov_given_s = R @ to_t, R @ cov_given_s @ R.T + Q
    gain = cov_s @ to_t.T @ torch.linalg.inv(cov)
    return gain, mean_s - gain @ mean, cov_s - gain @ to_t @ cov_s, cov_given_s


@few
@given(short, times, times)
def test_posterior_is_the_markov_chain_conditioned_on_both_ends(schedule: Schedule, a: float, b: float) -> None:
    process = Process(schedule)
    for level in range(schedule.levels + 1):
        s, t = times_of_level(schedule, level, a, b)
        A, B, lower, upper = conditioned(schedule, level, s, t)
        P = projectors(SIDE >> level, schedule.levels - level)
        expected: dict[Variance, Tensor] = {
            "fixed_small": lower,
            "fixed_large": upper if s else torch.zeros_like(upper),
        }
        for choice, covariance in expected.items():
            step = process.posterior(torch.tensor(t), torch.tensor(s), level, choice)
            close(combine(step.x, P), A)
            close(combine(step.x0, P), B)
            close(combine(step.z.square(), P), covariance)


@pytest.mark.parametrize(("level", "s", "t"), [(2, 600, 1000), (2, 987, 988), (1, 300, 600), (0, 140, 300), (0, 1, 2)])
def test_posterior_of_a_full_length_process(level: int, s: int, t: int) -> None:
    schedule = Schedule.dvdp([300, 600])
    A, B, lower, upper = conditioned(schedule, level, s, t)
    P = projectors(SIDE >> level, 2 - level)
    expected: dict[Variance, Tensor] = {"fixed_small": lower, "fixed_large": upper}
    for choice, covariance in expected.items():
        step = Process(schedule).posterior(torch.tensor(t), torch.tensor(s), level, choice)
        close(combine(step.x, P), A)
        close(combine(step.x0, P), B)
        close(combine(step.z.square(), P), covariance)


@few
@given(short, times, times)
def test_forward_chain_gives_the_tables(schedule: Schedule, a: float, b: float) -> None:
    """Eq. 7 compounded from 0 is eqs. 5, 6; otherwise the test above would condition another process."""
    for level in range(schedule.levels + 1):
        _, t = times_of_level(schedule, level, a, b)
        _, _, _, from_start = conditioned(schedule, level, 0, t)
        _, N = level_tables(schedule, level, t)
        close(from_start, N @ N)


@few
@given(short, times, times, seeds)
def test_posterior_keeps_the_marginals(schedule: Schedule, a: float, b: float, seed: int) -> None:
    """x_s drawn from q(x_s | x_t, x_0) has the law of eqs. 5, 6 at s: so also across strides and for DDIM."""
    process = Process(schedule)
    for level in range(schedule.levels + 1):
        s, t = (torch.tensor(u) for u in times_of_level(schedule, level, a, b))
        signal_t, noise_t = schedule.signal[level:, t], schedule.noise[level:, t]
        for step in (
            process.posterior(t, s, level),
            *(process.ddim(t, s, level, eta) for eta in (0.0, 0.5, 1.0)),
        ):
            close(step.x * signal_t + step.x0, schedule.signal[level:, s])
            close((step.x * noise_t).square() + step.z.square(), schedule.noise[level:, s].square())


@few
@given(short)
def test_a_step_to_0_returns_the_clean_image_to_the_last_bit(schedule: Schedule) -> None:
    process = Process(schedule)
    t = torch.arange(1, schedule.span(0)[1] + 1)
    for step in (
        process.posterior(t, torch.zeros_like(t), 0),
        process.posterior(t, torch.zeros_like(t), 0, "fixed_large"),
        process.ddim(t, torch.zeros_like(t), 0, eta=1.0),
    ):
        assert (step.x == 0).all()
        assert (step.z == 0).all()
        assert (step.x0 == 1).all()


def textbook_alpha_bar() -> Tensor:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def test_without_turning_points_it_is_the_textbook_ddpm_posterior() -> None:
    process, abar = Process(Schedule.ddpm()), textbook_alpha_bar()
    t = torch.arange(1, 1001)
    alpha = abar[t] / abar[t - 1]
    beta = 1 - alpha
    # Ho et al. 2020, eqs. 6 and 7.
    lower = process.posterior(t, t - 1, 0)
    close(lower.x[:, 0], alpha.sqrt() * (1 - abar[t - 1]) / (1 - abar[t]))
    close(lower.x0[:, 0], abar[t - 1].sqrt() * beta / (1 - abar[t]))
    close(lower.z[:, 0].square(), (1 - abar[t - 1]) / (1 - abar[t]) * beta)
    upper = process.posterior(t, t - 1, 0, "fixed_large")
    close(upper.x, lower.x)
    close(upper.x0, lower.x0)
    close(upper.z[1:, 0].square(), beta[1:])
    assert upper.z[0] == 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 20, 250])
def test_without_turning_points_it_is_the_textbook_ddim_update(eta: float, stride: int) -> None:
    process, abar = Process(Schedule.ddpm()), textbook_alpha_bar()
    t = torch.arange(stride, 1001, stride)
    s = t - stride
    x, eps, z = torch.randn(3, len(t), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Song et al. 2021, eqs. 12 and 16.
    x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
    sigma = eta * ((1 - abar[s]) / (1 - abar[t])).sqrt() * (1 - abar[t] / abar[s]).sqrt()
    expected = abar[s].sqrt() * x0 + (1 - abar[s] - sigma**2).clamp(min=0).sqrt() * eps + sigma * z
    step = process.ddim(t, s, 0, eta)
    close(step.x[:, 0] * x + step.x0[:, 0] * x0 + step.z[:, 0] * z, expected)


@few
@given(short, times, times)
def test_ddim_with_eta_1_is_ancestral_sampling(schedule: Schedule, a: float, b: float) -> None:
    process = Process(schedule)
    for level in range(schedule.levels + 1):
        s, t = (torch.tensor(u) for u in times_of_level(schedule, level, a, b))
        for one, other in zip(process.ddim(t, s, level, 1.0), process.posterior(t, s, level), strict=True):
            close(one, other, 1e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_coefficients_of_many_steps_at_once_are_those_of_each(variance: Variance) -> None:
    process = Process(Schedule.dvdp([300, 600]))
    t, s = torch.tensor([600, 500, 301]), torch.tensor([500, 301, 300])
    together = process.posterior(t, s, 1, variance)
    for i in range(3):
        for row, alone in zip(together, process.posterior(t[i], s[i], 1, variance), strict=True):
            assert row.shape == (3, 2)
            assert row.dtype == torch.float64
            close(row[i], alone)


# --- lift ------------------------------------------------------------------------------------------------------


@few
@given(short, seeds)
def test_halving_undoes_the_lift(schedule: Schedule, seed: int) -> None:
    process = Process(schedule)
    for level in range(1, schedule.levels + 1):
        resolution = SIDE >> level
        x = images(resolution, 2, 3, seed)
        close(bands.down(process.lift(x, level, images(2 * resolution, 2, 3, seed + 1))), x, 1e-14)


@few
@given(short)
def test_lifted_state_is_the_diffused_image_without_the_signal_that_was_dropped(schedule: Schedule) -> None:
    process = Process(schedule)
    for level in range(1, schedule.levels + 1):
        t, resolution = schedule.turning_points[level - 1], SIDE >> level
        S_low, N_low = level_tables(schedule, level, t)
        S, N = level_tables(schedule, level - 1, t)
        nothing = torch.zeros(1, 1, 2 * resolution, 2 * resolution, dtype=torch.float64)
        from_state = as_matrix(partial(process.lift, level=level, noise=nothing), resolution)
        no_state = torch.zeros(1, 1, resolution, resolution, dtype=torch.float64)
        from_noise = as_matrix(partial(process.lift, no_state, level), 2 * resolution)
        # Its mean, as a map of the level-1 finer clean image.
        dropped = schedule.signal[level - 1, t] * projectors(2 * resolution, 1)[0]
        close(from_state @ S_low @ down_matrix(2 * resolution), S - dropped)
        # Its covariance: that of the diffused image, white.
        covariance = from_state @ N_low @ N_low @ from_state.T + from_noise @ from_noise.T
        close(covariance, N @ N)
        close(covariance, schedule.noise[0, t] ** 2 * torch.eye(4 * resolution * resolution, dtype=torch.float64))
