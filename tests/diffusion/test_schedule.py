"""What the tables promise, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvdp import Schedule, UserError
from dvdp.diffusion.schedule import ATTENUATIONS, alpha_bar
from tests.diffusion.strategies import few, schedules


@few
@given(schedules(st.integers(2, 60) | st.just(1000)))
def test_every_schedule_is_a_markov_chain_from_clean_data(schedule: Schedule) -> None:
    signal, noise, K, T = schedule.signal, schedule.noise, schedule.levels, schedule.timesteps
    assert signal.shape == noise.shape == (K + 1, T + 1)
    assert signal.dtype == noise.dtype == torch.float64
    assert (signal[:, 0] == 1).all()
    assert (noise[:, 0] == 0).all()
    assert (signal > 0).all()
    assert (noise[:, 1:] > 0).all()
    step = signal[:, 1:] / signal[:, :-1]
    # The variance that eq. 7 adds in one step.
    assert (noise[:, 1:].square() - step.square() * noise[:, :-1].square() > 0).all()


@few
@given(schedules(st.integers(2, 60)))
def test_spans_tile_the_timesteps(schedule: Schedule) -> None:
    spans = [schedule.span(k) for k in range(schedule.levels + 1)]
    assert spans[0][0] == 0
    assert spans[-1][1] == schedule.timesteps
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert tuple(low for low, _ in spans[1:]) == schedule.turning_points
    assert sum(schedule.shares()) == pytest.approx(1)
    assert schedule.shares() == [(high - low) / schedule.timesteps for low, high in spans]


def test_linear_base_is_the_textbook_alpha_bar() -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bar()[1:], expected, rtol=1e-12)
    schedule = Schedule.ddpm()
    np.testing.assert_allclose(schedule.signal[0, 1:], np.sqrt(expected), rtol=1e-12)
    np.testing.assert_allclose(schedule.noise[0, 1:], np.sqrt(1 - expected), rtol=1e-12)


def test_cosine_base_is_the_textbook_alpha_bar() -> None:
    curve = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = alpha_bar(base="cosine")
    # The cap of beta at 0.999 bites in the last step alone.
    np.testing.assert_allclose(abar[:1000], curve[:1000] / curve[0], rtol=1e-9)
    assert abar[1000].item() == pytest.approx(abar[999].item() * 0.001)


@pytest.mark.parametrize("timesteps", [100, 250, 4000])
def test_linear_base_with_other_timesteps_ends_about_where_1000_do(timesteps: int) -> None:
    logs = alpha_bar(timesteps)[-1].log(), alpha_bar(1000)[-1].log()
    assert logs[0].item() == pytest.approx(logs[1].item(), rel=0.1)


@few
@given(st.floats(-8, 4), st.sampled_from(["linear", "cosine"]), st.sampled_from([10, 1000]))
def test_shift_is_added_to_the_log_snr(shift: float, base: str, timesteps: int) -> None:
    plain, shifted = alpha_bar(timesteps, base)[1:], alpha_bar(timesteps, base, shift)[1:]
    moved = torch.logit(shifted) - torch.logit(plain)
    torch.testing.assert_close(moved, torch.full_like(moved, shift), rtol=0, atol=1e-8)


@few
@given(schedules(st.integers(2, 60)))
def test_noise_is_white_and_the_last_band_is_ddpm(schedule: Schedule) -> None:
    assert torch.equal(schedule.noise, schedule.noise[:1].expand_as(schedule.noise))
    variance = schedule.signal[-1].square() + schedule.noise[-1].square()
    torch.testing.assert_close(variance, torch.ones_like(variance))


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("points", [[600], [300, 600], [1, 2, 999], [200, 400, 600, 800]])
def test_attenuation_falls_from_one_to_the_floor_at_the_turning_point(attenuation: str, points: list[int]) -> None:
    schedule = Schedule.dvdp(points, attenuation=attenuation, floor=0.05)
    fall = schedule.signal / Schedule.ddpm().signal
    for band, point in enumerate(points):
        assert fall[band, 0] == 1
        assert (fall[band, : point + 1].diff() < 0).all()
        torch.testing.assert_close(fall[band, point:], torch.full((1001 - point,), 0.05, dtype=torch.float64))
    torch.testing.assert_close(fall[-1], torch.ones(1001, dtype=torch.float64))


def test_cosine_attenuation_is_the_documented_curve() -> None:
    schedule = Schedule.dvdp([300], floor=0.2)
    expected = [(0.2 + 0.8 * math.cos(math.pi / 2 * t / 300)) for t in range(301)]
    np.testing.assert_allclose((schedule.signal[0] / schedule.signal[1])[:301], expected, rtol=1e-12)


@few
@given(schedules(st.integers(2, 60)))
def test_without_attenuation_dvdp_is_subspace_diffusion_and_without_turning_points_ddpm(
    schedule: Schedule,
) -> None:
    T, points = schedule.timesteps, schedule.turning_points
    subspace, dvdp = Schedule.subspace(points, T), Schedule.dvdp(points, T, floor=1)
    assert dvdp.turning_points == subspace.turning_points == points
    torch.testing.assert_close(dvdp.signal, subspace.signal, rtol=1e-15, atol=0)
    assert torch.equal(dvdp.noise, subspace.noise)
    ddpm = Schedule.ddpm(T)
    for other in (Schedule.subspace((), T), Schedule.dvdp((), T)):
        assert torch.equal(other.signal, ddpm.signal)
        assert torch.equal(other.noise, ddpm.noise)
    assert torch.equal(subspace.signal[0], ddpm.signal[0])


def _tables(points: tuple[int, ...] = (), **columns: Any) -> None:
    """Build a K = 0, T = 4 schedule with some columns spoilt: t1=(signal, noise), ..."""
    signal = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6]], dtype=torch.float64)
    noise = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    for name, (s, n) in columns.items():
        signal[0, int(name[1:])], noise[0, int(name[1:])] = s, n
    Schedule(signal, noise, points)


BAD: dict[str, tuple[str, Any]] = {
    "turning points out of order": ("turning_points", lambda: Schedule.dvdp([600, 300])),
    "turning point twice": ("turning_points", lambda: Schedule.dvdp([300, 300])),
    "turning point at 0": ("turning_points", lambda: Schedule.dvdp([0])),
    "turning point below 0": ("turning_points", lambda: Schedule.subspace([-5])),
    "turning point at T": ("turning_points", lambda: Schedule.subspace([1000])),
    "turning point beyond T": ("turning_points", lambda: Schedule.dvdp([30], timesteps=20)),
    "no timesteps": ("timesteps", lambda: Schedule.ddpm(0)),
    "unknown base": ("'linear'", lambda: Schedule.ddpm(base="liner")),
    "unknown attenuation": ("'cosine'", lambda: Schedule.dvdp([300], attenuation="cosin")),
    "floor at 0": ("floor", lambda: Schedule.dvdp([300], floor=0.0)),
    "floor above 1": ("floor", lambda: Schedule.dvdp([300], floor=1.5)),
    "floor not a number": ("floor", lambda: Schedule.dvdp([300], floor=math.nan)),
    "shift that swallows the signal": ("shift", lambda: Schedule.ddpm(shift=-2000.0)),
    "shift that swallows the noise": ("noise", lambda: Schedule.ddpm(shift=60.0)),
    "shift not a number": ("signal", lambda: Schedule.ddpm(shift=math.nan)),
    "a row too few": ("shape", lambda: _tables((2,))),
    "float32": ("float64", lambda: Schedule(torch.ones(1, 3), torch.zeros(1, 3))),
    "no signal": ("signal", lambda: _tables(t4=(0.0, 0.4))),
    "SNR that stands still": ("noise", lambda: _tables(t2=(0.9, 0.1))),
    "SNR that rises": ("noise", lambda: _tables(t3=(0.9, 0.1))),
    "no noise": ("noise", lambda: _tables(t1=(0.9, 0.0))),
    "noise below 0": ("noise", lambda: _tables(t3=(0.7, -0.5), t4=(0.7, -0.4))),
    "signal at 0 not 1": ("column 0", lambda: _tables(t0=(0.95, 0.0))),
    "noise at 0": ("column 0", lambda: _tables(t0=(1.0, 0.01))),
}


@pytest.mark.parametrize(("names", "build"), BAD.values(), ids=BAD.keys())
def test_bad_schedule_is_refused_in_one_sentence(names: str, build: Any) -> None:
    with pytest.raises(UserError) as caught:
        build()
    text = str(caught.value)
    assert names in text
    assert text.endswith(".")
    assert ". " not in text
    assert "\n" not in text
