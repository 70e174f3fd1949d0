"""The likelihood by the probability-flow ODE against closed forms of Gaussian data, and the variational bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule
from dvdp.diffusion.process import Variance
from dvdp.diffusion.randomness import ImageNoise
from dvdp.errors import UserError
from dvdp.evaluation.likelihood import variational_bound
from dvdp.evaluation.probability_flow import flow_density, flow_likelihood
from dvdp.models.pixels import to_float
from tests.diffusion.exact import GaussianDenoiser
from tests.evaluation.test_likelihood import DEVIATIONS, SMALL, gaussian, gaussian_images, powers, shares

#: With the deviations of the data, and steps enough.
PROCESSES = {
    "ddpm": (Process(Schedule.ddpm()), (0.3,), 100),
    "dvdp": (Process(Schedule.dvdp([300])), DEVIATIONS[1:], 200),
    "subspace": (Process(Schedule.subspace([50, 100])), DEVIATIONS, 75),
    "subspace with the data's variance": (Process(Schedule.subspace([50, 100]), DEVIATIONS), DEVIATIONS, 40),
}


def exact_density(process: Process, std: Sequence[float], x: Tensor) -> float:
    """``-log p(x_1)`` in bits per dimension: bands go linearly to T_k, where the lift's density may not be theirs."""
    schedule, nats = process.schedule, 0.0
    ends = (*schedule.turning_points, schedule.timesteps)
    for band, (share, power, end) in enumerate(
        zip(shares(process.levels), powers(x, process.levels), ends, strict=True)
    ):
        signal, noise = schedule.signal[band].tolist(), schedule.noise[band].tolist()
        here, there = ((signal[t] * std[band]) ** 2 + noise[t] ** 2 for t in (1, end))
        drawn = noise[end] ** 2 + (signal[end] * process.band_std[band] if band < process.levels else 0.0) ** 2
        own = (power / here + math.log(2 * math.pi * here)) / 2
        nats += share * (own + (power / here * (there / drawn - 1) - math.log(there / drawn)) / 2)
    return nats / math.log(2)


@pytest.mark.parametrize("name", PROCESSES)
def test_density_of_gaussian_states_is_that_of_the_closed_form(name: str) -> None:
    process, std, steps = PROCESSES[name]
    side = 2**process.levels
    x0, source = gaussian(std, 8, side)[:, :1], ImageNoise(0, 0, 8)
    x = process.diffuse(x0, 1, source.normal((1, side, side)).double())
    found = flow_density(process, GaussianDenoiser(process, std), x, steps, None, source)
    bits = sum(term.mean().item() for term in found.values()) / (side**2 * math.log(2))
    assert bits == pytest.approx(exact_density(process, std, x), abs=1e-3)


def test_random_probes_find_the_trace_on_the_average() -> None:
    process, std, _ = PROCESSES["dvdp"]
    x, denoiser = gaussian(std, 64, 4)[:, :1], GaussianDenoiser(process, std)
    exact, one, four = (
        torch.stack(list(flow_density(process, denoiser, x, 20, probes, ImageNoise(0, 0, 64)).values())).sum(0)
        for probes in (None, 1, 4)
    )
    assert 0 < (four - exact).std() < 0.7 * (one - exact).std()
    assert abs((four - exact).mean()) < 3 * (four - exact).std() / 8


def test_gaussian_images_have_their_entropy() -> None:
    process, images = Process(Schedule.ddpm()), gaussian_images(64)
    found = flow_likelihood(process, GaussianDenoiser(process, [0.1]), images, steps=150)
    # The density of the data, on a grid of 2 / 255.
    power = to_float(images).double().square().mean().item()
    exact = (power / 0.1**2 + math.log(2 * math.pi * 0.1**2)) / 2 / math.log(2) + math.log2(127.5)
    assert found.bits == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("turning_points", [(), (300, 600)])
def test_it_is_below_the_bound(turning_points: tuple[int, ...], variance: Variance) -> None:
    process, images = Process(Schedule.dvdp(turning_points)), gaussian_images(16)
    denoiser = GaussianDenoiser(process, SMALL[2 - process.levels :])
    bound = variational_bound(process, denoiser, images, variance)
    flow = flow_likelihood(process, denoiser, images, steps=40)
    assert list(flow.terms) == list(bound.terms)
    # Random timesteps and noise in the one, random directions in the other.
    assert (flow.images < bound.images).double().mean() > 0.7
    assert flow.bits < bound.bits


def test_classes_images_and_steps_are_checked_and_used() -> None:
    process, images = Process(Schedule.dvdp([30], 100)), gaussian_images(4)
    seen = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return x

    flow_likelihood(process, denoiser, images, steps=5, labels=torch.arange(4), batch=2)
    assert sorted(map(tuple, seen)) == [(0, 1)] * (len(seen) // 2) + [(2, 3)] * (len(seen) // 2)
    with pytest.raises(UserError, match="found 1 images"):
        flow_likelihood(process, denoiser, images[:1])
    with pytest.raises(UserError, match="steps: found 1, expected at least 2"):
        flow_likelihood(process, denoiser, images, steps=1, labels=torch.arange(4))
