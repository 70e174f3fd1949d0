"""The exponential moving average of the weights, held apart from the live network."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Averaged weights in a network of their own, :attr:`network`, which is never trained or copied back.

    Args:
        halflife: images after which an old weight counts half.
        ramp: the half-life is at most this share of the images seen (Karras et al. 2022), so that the start of a
            run is forgotten.
        average: a copy of the network, which will hold the averages; made here where there is none.
    """

    def __init__(self, network: nn.Module, halflife: float, ramp: float, average: nn.Module | None = None) -> None:
        self.network = (copy.deepcopy(network) if average is None else average).eval().requires_grad_(False)
        self.halflife = halflife
        self.ramp = ramp
        self._live: list[torch.Tensor] = list(network.parameters())
        self._mean: list[torch.Tensor] = list(self.network.parameters())

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """After a step on ``batch`` images that made it ``images`` in all."""
        halflife = min(self.halflife, self.ramp * images)
        torch._foreach_lerp_(self._mean, self._live, 1 - 0.5 ** (batch / halflife))
