"""A network as a denoiser: whatever it predicts, the sampler is given noise.

Clean images of level k are counted in units of the level's pixel range, 2^k, so that all levels ask for outputs of
one size. With ``a = 2^k signal``, ``x0 = 2^k y`` and ``r^2 = a^2 + noise^2``, the velocity per band is
``v = (a eps - noise y) / r`` (Salimans & Ho 2022, scaled to unit size). Then ``eps = (noise x + r a v) / r^2``, which
divides by no small signal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvdp import bands
from dvdp.config import Target
from dvdp.process import Process


class NetworkDenoiser:
    """``denoiser(x, t, labels) -> predicted noise`` from a network ``(x, t, level, labels) -> prediction``.

    Args:
        side: of full-size images; with the side of x it says the level.
        predicts: what the network's output means.
    """

    def __init__(self, network: nn.Module, process: Process, side: int, predicts: Target) -> None:
        self.network = network
        self.process = process
        self.side = side
        self.predicts = predicts

    def level(self, x: Tensor) -> int:
        """The level of a state, from its side."""
        return (self.side // x.shape[-1]).bit_length() - 1

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        level = self.level(x)
        output = self.network(x, t, level, labels).float()
        if self.predicts == "noise":
            return output
        if self.predicts == "clean":
            return self.process.predict_noise(x, t, 2**level * output, level)
        a, noise, r = _polar(self.process, level, t, x)
        return bands.scale(x, noise / r.square()) + bands.scale(output, a / r)


def target(process: Process, predicts: Target, level: int, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should predict for states of ``level`` drawn from x0 (full size) with ``noise``."""
    if predicts == "noise":
        return noise
    clean = bands.to_pixels(bands.to_level(x0, level), level)
    if predicts == "clean":
        return clean
    a, deviation, r = _polar(process, level, t, x0)
    return bands.scale(noise, a / r) - bands.scale(clean, deviation / r)


def _polar(process: Process, level: int, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a``, noise and ``r`` of the level's bands."""
    a, noise = 2**level * process.signal(t, level, like), process.noise(t, level, like)
    return a, noise, torch.hypot(a, noise)
