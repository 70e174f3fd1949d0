"""Orthogonal frequency bands of an image, by 2x2 averaging.

``D`` (:func:`down`) is 2x2 mean-pooling times 2 and ``D^T`` (:func:`up`) nearest-neighbour upsampling divided
by 2. Then ``D D^T = I``, so norms are kept: a *level-k image* has 1/2^k of the resolution, and pixels up to 2^k times
as large. Band ``i < K`` of an image is what level ``i`` holds and level ``i + 1`` does not
(``y - D^T D y`` of the level-i image); band ``K`` is the level-K image.

Every linear map of the paper, ``U diag(f_0 .. f_K) U^T x`` (eqs. 4 to 11), is :func:`scale`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def down(x: Tensor) -> Tensor:
    """``D``: (..., h, w) -> (..., h/2, w/2). Both sides must be even."""
    return pool(x, 2)


def pool(x: Tensor, divisor: int) -> Tensor:
    """Sums of 2x2 pixels over a power of two: (..., h, w) -> (..., h/2, w/2); 4 takes the mean."""
    if x.device.type != "cpu":
        return F.avg_pool2d(x, 2, divisor_override=divisor)
    # A CPU adds whole rows several times as fast as it pools.
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * (1 / divisor)


def up(x: Tensor) -> Tensor:
    """``D^T``: (..., h, w) -> (..., 2h, 2w)."""
    if x.device.type != "cpu":
        return F.interpolate(x / 2, scale_factor=2, mode="nearest")
    # A CPU repeats several times as fast as it interpolates.
    return (x / 2).repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def to_level(x: Tensor, level: int) -> Tensor:
    """``D^level x``: the level-``level`` image of a full-size image (B, C, H, W)."""
    for _ in range(level):
        x = down(x)
    return x


def to_pixels(x: Tensor, level: int) -> Tensor:
    """A level-``level`` image in the pixel range of level 0, for looking at."""
    return x / 2**level


def scale(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply each band of ``x`` by its factor: ``U diag(f_0 .. f_n) U^T x`` without a matrix.

        scale(x, [f])             = f x
        scale(x, [f, *coarser])   = f x + D^T scale(D x, coarser - f)

    Args:
        x: (B, C, h, w), of any level; h and w are divisible by 2^n.
        factors: (n+1,) or (B, n+1), finest band first. A single factor is that of all bands.
    """
    factors = factors.to(x)
    f, coarser = factors[..., 0, None, None, None], factors[..., 1:]
    return f * x + up(scale(down(x), coarser - factors[..., :1])) if coarser.shape[-1] else f * x


def detail(x: Tensor) -> Tensor:
    """The finest band of ``x``: ``x - D^T D x``."""
    return x - up(down(x))


def energies(x: Tensor, levels: int) -> Tensor:
    """Mean square per coefficient of each band: (B, C, H, W) -> (B, levels+1), in float64.

    A band below the last has 3/4 of the coefficients of its level; the last has all of them.
    """
    x = x.double()
    result = []
    for _ in range(levels):
        low = down(x)
        result.append((x.square().flatten(1).sum(1) - low.square().flatten(1).sum(1)) / (0.75 * x[0].numel()))
        x = low
    result.append(x.square().flatten(1).mean(1))
    return torch.stack(result, dim=1)
