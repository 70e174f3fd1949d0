"""A network as a denoiser: whatever it predicts, the sampler is given noise.

Per band, with ``r^2 = signal^2 + noise^2``, the velocity is ``v = (signal eps - noise x0) / r`` (Salimans & Ho 2022,
scaled to unit size). Then ``eps = (noise x + r signal v) / r^2``, which divides by no small signal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvdp import bands
from dvdp.config import Target
from dvdp.process import Process


class NetworkDenoiser:
    """``denoiser(x, t) -> predicted noise`` from a network ``(x, t, level) -> prediction``.

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

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.level(x)
        output = self.network(x, t, level).float()
        if self.predicts == "noise":
            return output
        if self.predicts == "clean":
            return self.process.predict_noise(x, t, output, level)
        signal, noise = self.process.signal(t, level, x), self.process.noise(t, level, x)
        r = torch.hypot(signal, noise)
        return bands.scale(x, noise / r.square()) + bands.scale(output, signal / r)


def target(process: Process, predicts: Target, level: int, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should predict for states of ``level`` drawn from x0 (full size) with ``noise``."""
    if predicts == "noise":
        return noise
    clean = bands.to_level(x0, level)
    if predicts == "clean":
        return clean
    signal, deviation = process.signal(t, level, x0), process.noise(t, level, x0)
    r = torch.hypot(signal, deviation)
    return bands.scale(noise, signal / r) - bands.scale(clean, deviation / r)
