"""A network as a denoiser: whatever it prediction_type, the sampler is given noise.

Clean images of level k are counted in units of the level's pixel range, 2^k, so that all levels ask for outputs of
one size. With ``a = 2^k signal``, ``x0 = 2^k y`` and ``r^2 = a^2 + noise^2``, the velocity per band is
``v = (a eps - noise y) / r`` (Salimans & Ho 2022, scaled to unit size). Then ``eps = (noise x + r a v) / r^2``,
which divides by no small signal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvdp.config import PredictionType
from dvdp.diffusion import bands
from dvdp.diffusion.bands import Pyramid
from dvdp.diffusion.process import Process


class NetworkDenoiser:
    """``denoiser(x, t, labels) -> predicted noise`` from a network ``(x, t, level, labels) -> prediction``.

    Args:
        resolution: of full-size images; with the resolution of x it says the level.
        prediction_type: what the network's output means.
    """

    def __init__(self, network: nn.Module, process: Process, resolution: int, prediction_type: PredictionType) -> None:
        self.network = network
        self.process = process
        self.resolution = resolution
        self.prediction_type = prediction_type

    def level(self, x: Tensor) -> int:
        """The level of a state, from its resolution."""
        return (self.resolution // x.shape[-1]).bit_length() - 1

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        level = self.level(x)
        output = self.network(x, t, level, labels).float()
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "sample":
            return self.process.predict_noise(x, t, 2**level * output, level)
        of_x, of_v = self.process.factors(_noise_from_velocity, t, level, output)
        return bands.combine((x, of_x), (output, of_v))


def example(
    process: Process, prediction_type: PredictionType, level: int, t: Tensor, x0: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """States of ``level`` drawn from x0 (full size) with ``noise``, and what the network should predict for them."""
    clean = Pyramid(bands.to_level(x0, level))
    x = process.state(clean, t, noise, level)
    if prediction_type == "epsilon":
        return x, noise
    if prediction_type == "sample":
        return x, bands.to_pixels(clean.image, level)
    of_clean, of_noise = process.factors(_velocity, t, level, noise)
    return x, bands.combine((clean, of_clean), (noise, of_noise))


def _velocity(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``v = (a eps - noise x0 / 2^k) / r``."""
    a, r = _polar(signal, noise, level)
    return -noise / r / 2**level, a / r


def _noise_from_velocity(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``eps = (noise x + r a v) / r^2``."""
    a, r = _polar(signal, noise, level)
    return noise / r.square(), a / r


def _polar(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``a`` and ``r``."""
    a = 2**level * signal
    return a, torch.hypot(a, noise)
