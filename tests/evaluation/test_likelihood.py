"""The variational bound against closed forms of exact denoisers, and against the bound of DDPM written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule
from dvdp.config import PredictionType
from dvdp.diffusion.bands import scale
from dvdp.diffusion.process import Variance
from dvdp.diffusion.randomness import ImageNoise, derive_seed, generator
from dvdp.errors import UserError
from dvdp.evaluation.likelihood import entered, variational_bound
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.pixels import to_float
from tests.diffusion.exact import GaussianDenoiser, split

#: Of the bands of CIFAR-10 at turning points {50, 100}, finest first.
DEVIATIONS = (0.144, 0.374, 0.879)
#: Of bands of images that do not reach 0 or 255.
SMALL = (0.05, 0.1, 0.2)


def gaussian(std: tuple[float, ...], count: int, resolution: int = 8) -> Tensor:
    """(count, 3, side, side) float64 of independent bands with these deviations."""
    z = torch.randn((count, 3, resolution, resolution), generator=generator("gaussian images"), dtype=torch.float64)
    return sum((s * band for s, band in zip(std, split(z, len(std) - 1), strict=True)), torch.zeros(()))


def gaussian_images(count: int) -> Tensor:
    """uint8 (count, 3, 8, 8) of bands of deviation SMALL."""
    return ((gaussian(SMALL, count) + 1) * 127.5).round().to(torch.uint8)


def powers(x: Tensor, levels: int) -> list[float]:
    """Mean square of each band's coefficients."""
    return [band.square().mean().item() / n for band, n in zip(split(x.double(), levels), shares(levels), strict=True)]


def shares(levels: int) -> list[float]:
    """Of all coefficients, in each band."""
    return [0.75 / 4**band for band in range(levels)] + [1 / 4**levels]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_without_turning_points_it_is_the_bound_of_ddpm(variance: Variance) -> None:
    T, images = 12, gaussian_images(3)
    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (3 * x + t[:, None, None, None] / T).sin()

    bound = variational_bound(Process(Schedule.ddpm(T)), denoiser, images, variance, timesteps=None, seed=5)

    # Ho et al. 2020, eqs. 5 to 13.
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).mul(1000 / T).clamp(max=0.999)
    abar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    posterior = beta * (1 - before) / (1 - abar)
    ours = posterior if variance == "fixed_small" else beta
    noise, x0 = ImageNoise(derive_seed(5, "likelihood"), 0, 3), to_float(images).double()
    # Sampling starts with noise of the deviation at T, which is 1 to 1e-5 for T = 1000.
    expected = {"prior": abar[-1] * x0.square() / (1 - abar[-1]) / 2, "level_0": torch.zeros_like(x0)}
    for i in range(T):
        x = abar[i].sqrt() * x0 + (1 - abar[i]).sqrt() * noise.normal((3, 8, 8)).double()
        clean = ((x - (1 - abar[i]).sqrt() * denoiser(x, torch.full((3,), i + 1))) / abar[i].sqrt()).clamp(-1, 1)
        if i == 0:
            upper, lower = ((x0 - clean + side / 255) / posterior[1].sqrt() for side in (1, -1))
            upper[images == 255], lower[images == 0] = math.inf, -math.inf
            cdf = torch.special.ndtr
            expected["decoder"] = -torch.where(lower > 0, cdf(-lower) - cdf(-upper), cdf(upper) - cdf(lower)).log()
            continue
        mean, predicted = (
            (before[i].sqrt() * beta[i] * y + (1 - beta[i]).sqrt() * (1 - before[i]) * x) / (1 - abar[i])
            for y in (x0, clean)
        )
        off = (mean - predicted).square()
        expected["level_0"] += ((posterior[i] + off) / ours[i] - 1 + (ours[i] / posterior[i]).log()) / 2
    assert list(bound.terms) == ["prior", "level_0", "decoder"]
    for name, nats in expected.items():
        bits = nats.flatten(1).mean(1) / math.log(2)
        torch.testing.assert_close(bound.terms[name], bits, rtol=1e-4, atol=1e-9)
    assert bound.bits == pytest.approx(sum(term.mean().item() for term in bound.terms.values()))
    assert bound.error == pytest.approx(sum(bound.terms.values(), torch.zeros(3)).std().item() / 3**0.5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("process", ["dvdp", "subspace"])
def test_terms_of_gaussian_bands_are_those_of_the_closed_form(process: str, variance: Variance) -> None:
    schedule = (Schedule.dvdp if process == "dvdp" else Schedule.subspace)([20, 35], 50)
    subject, images = Process(schedule, None if process == "dvdp" else SMALL), gaussian_images(256)
    denoiser = GaussianDenoiser(subject, SMALL)
    found = variational_bound(subject, denoiser, images, variance, timesteps=None, batch=256)
    expected = dict.fromkeys(found.terms, 0.0)
    power = powers(to_float(images), 2)
    for band, (share, end) in enumerate(zip(shares(2), (20, 35, 50), strict=True)):
        signal, noise = schedule.signal[band].tolist(), schedule.noise[band].tolist()
        for t in range(2, end + 1):
            forward = noise[t] ** 2 - (signal[t] / signal[t - 1] * noise[t - 1]) ** 2
            exact = noise[t - 1] ** 2 * forward / noise[t] ** 2
            ours = exact if variance == "fixed_small" else forward
            gain = signal[t] * SMALL[band] ** 2 / (signal[t] ** 2 * SMALL[band] ** 2 + noise[t] ** 2)
            error = (1 - gain * signal[t]) ** 2 * power[band] + (gain * noise[t]) ** 2
            off = (signal[t - 1] * forward / noise[t] ** 2) ** 2 * error
            level = sum(t > turning_point for turning_point in (20, 35))
            kl = ((exact + off) / ours - 1 - math.log(exact / ours)) / 2
            expected[f"level_{level}"] += share * kl / math.log(2)
        drawn = noise[end] ** 2 + (signal[end] * subject.band_std[band] if band < 2 else 0) ** 2
        kl = ((noise[end] ** 2 + signal[end] ** 2 * power[band]) / drawn - 1 - math.log(noise[end] ** 2 / drawn)) / 2
        expected["prior" if band == 2 else f"lift_{band + 1}"] = share * kl / math.log(2)
    assert list(found.terms) == ["prior", "level_2", "lift_2", "level_1", "lift_1", "level_0", "decoder"]
    del expected["decoder"]
    for name, bits in expected.items():
        assert found.terms[name].mean().item() == pytest.approx(bits, rel=5e-3), name


def test_lifts_of_the_bands_of_cifar10() -> None:
    x = gaussian(DEVIATIONS, 64)
    lost = [std / power**0.5 for std, power in zip(DEVIATIONS, powers(x, 2), strict=True)]
    x = sum((factor * band for factor, band in zip(lost, split(x, 2), strict=True)), torch.zeros(()))

    def lifts(process: Process) -> float:
        terms = entered(process, x)
        return sum(float(terms[name].mean()) for name in ("lift_1", "lift_2")) / (x[0].numel() * math.log(2))

    assert lifts(Process(Schedule.dvdp([50, 100]))) == pytest.approx(0.0054, abs=5e-5)
    assert lifts(Process(Schedule.subspace([50, 100]))) == pytest.approx(0.5406, abs=5e-5)
    assert lifts(Process(Schedule.subspace([50, 100]), DEVIATIONS)) == pytest.approx(0.3931, abs=5e-5)


def test_a_few_timesteps_are_right_on_the_average() -> None:
    process, images = Process(Schedule.dvdp([30], 100)), gaussian_images(128)
    denoiser = GaussianDenoiser(process, SMALL[1:])
    every, some = (variational_bound(process, denoiser, images, timesteps=count, batch=128) for count in (None, 16))
    assert every.error < some.error < 3 * every.error
    assert abs(some.bits - every.bits) < 2 * some.error
    torch.testing.assert_close(some.terms["decoder"], every.terms["decoder"])


def test_an_image_has_the_same_bound_in_any_company() -> None:
    process, images = Process(Schedule.dvdp([30], 100)), gaussian_images(9)
    denoiser = GaussianDenoiser(process, SMALL[1:])
    all_at_once = variational_bound(process, denoiser, images, seed=3)
    in_parts = variational_bound(process, denoiser, images[:5], seed=3, batch=2)
    torch.testing.assert_close(in_parts.images, all_at_once.images[:5], rtol=1e-5, atol=1e-6)
    assert not torch.equal(all_at_once.images, variational_bound(process, denoiser, images, seed=4).images)


def test_settings_are_given_the_same_timesteps_and_noise() -> None:
    """Where turning points change nothing, images differ among themselves far more than settings do."""
    images = gaussian_images(16)
    whole, halved = (Process(Schedule.subspace(points, 100), [0.1] * (len(points) + 1)) for points in ([], [80]))
    found = [variational_bound(each, GaussianDenoiser(each, each.band_std), images) for each in (whole, halved)]
    assert (found[0].images - found[1].images).std() < 0.02 * found[0].images.std()


def test_what_the_network_predicts_does_not_change_it() -> None:
    process, images = Process(Schedule.dvdp([5], 10)), gaussian_images(4)
    exact = GaussianDenoiser(process, SMALL[1:])

    def velocity(x: Tensor, t: Tensor, level: int) -> Tensor:
        signal, noise = process.signal_and_noise(t, level)
        r = torch.hypot(2**level * signal, noise)
        y = process.predict_clean(x, t, exact(x, t), level) / 2**level
        return scale(exact(x, t), 2**level * signal / r) - scale(y, noise / r)

    outputs: dict[PredictionType, Callable[[Tensor, Tensor, int], Tensor]] = {
        "epsilon": lambda x, t, level: exact(x, t),
        "sample": lambda x, t, level: process.predict_clean(x, t, exact(x, t), level) / 2**level,
        "v_prediction": velocity,
    }

    class Network(torch.nn.Module):
        def __init__(self, output: Callable[[Tensor, Tensor, int], Tensor]) -> None:
            super().__init__()
            self.output = output

        def forward(self, x: Tensor, t: Tensor, level: int, labels: Tensor | None) -> Tensor:
            return self.output(x, t, level)

    expected = variational_bound(process, exact, images, timesteps=None)
    for target, output in outputs.items():
        found = variational_bound(process, NetworkDenoiser(Network(output), process, 8, target), images, timesteps=None)
        torch.testing.assert_close(found.images, expected.images, rtol=1e-4, atol=1e-4)


def test_each_image_is_given_its_own_class() -> None:
    process, labels = Process(Schedule.dvdp([30], 100)), torch.arange(6)
    images = (40 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)

    def denoiser(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Knows that a class has one image."""
        clean = to_float(40 * labels)[:, None, None, None] * torch.ones_like(x) * 4 / x.shape[-1]
        return process.predict_noise(x, t, clean)

    terms = variational_bound(process, denoiser, images, labels=labels, batch=4).terms
    for name in ("level_1", "level_0"):
        assert terms[name].abs().max() < 1e-5


def test_bad_input_is_one_sentence() -> None:
    process, images = Process(Schedule.dvdp([30], 100)), gaussian_images(4)
    denoiser = GaussianDenoiser(process, SMALL[1:])
    with pytest.raises(UserError, match="found 1 images, expected at least 2"):
        variational_bound(process, denoiser, images[:1])
    with pytest.raises(UserError, match="found 7, expected a multiple of 2"):
        variational_bound(process, denoiser, images[..., :7])
    with pytest.raises(UserError, match="found a process of 1 timestep"):
        variational_bound(Process(Schedule.ddpm(1)), denoiser, images)
