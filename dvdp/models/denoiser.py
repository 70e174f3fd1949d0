"""Networks as denoisers: whatever a network predicts, the sampler is given noise.

``epsilon`` and ``sample`` mean the noise and the clean image, ``v_prediction`` the velocity per band (Salimans & Ho
2022, scaled to unit size)

    v = (a eps - noise y) / r,    so that    eps = (noise x + r a v) / r^2,    which divides by no small signal.

Here ``y = x0 / 2^k``, the clean image of level k in units of its pixel range, so that outputs of all levels are of one
size; ``a = 2^k signal`` and ``r^2 = a^2 + noise^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvdp.config import PredictionType
from dvdp.diffusion.bands import scale, to_level, to_pixels
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
        a, noise, r = _polar(self.process, t, level, x.device)
        return scale(x, noise / r.square()) + scale(output, a / r)


def example(
    process: Process, prediction_type: PredictionType, level: int, t: Tensor, x0: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """States of ``level`` drawn from x0 (full size) with ``noise``, and what the network should predict for them."""
    x = process.diffuse(x0, t, noise)
    if prediction_type == "epsilon":
        return x, noise
    y = to_pixels(to_level(x0, level), level)
    if prediction_type == "sample":
        return x, y
    a, of_noise, r = _polar(process, t, level, x.device)
    return x, scale(noise, a / r) - scale(y, of_noise / r)


def _polar(process: Process, t: Tensor, level: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``a``, ``noise`` and ``r`` of the bands of a level."""
    signal, noise = process.signal_and_noise(t, level, device)
    a = 2**level * signal
    return a, noise, torch.hypot(a, noise)
