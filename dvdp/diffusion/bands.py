"""Orthogonal frequency bands of an image, by 2x2 averaging.

``D`` (:func:`down`) is 2x2 mean-pooling times 2 and ``D^T`` (:func:`up`) nearest-neighbour upsampling divided
by 2. Then ``D D^T = I``, so norms are kept: a *level-k image* has 1/2^k of the resolution, and pixels up to 2^k times
as large. Band ``i < K`` of an image is what level ``i`` holds and level ``i + 1`` does not
(``y - D^T D y`` of the level-i image); band ``K`` is the level-K image.

Every linear map of the paper, ``U diag(f_0 .. f_K) U^T x`` (eqs. 3-11), is :func:`scale`, and a sum of several,
which is all that the process ever computes, is :func:`combine`.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class Pyramid:
    """An image (B, C, h, w) of any level and its halvings, each computed when first asked for, and only once."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @cached_property
    def half(self) -> Pyramid:
        """``D`` of the image."""
        return Pyramid(down(self.image))


def down(x: Tensor) -> Tensor:
    """``D``: (..., h, w) -> (..., h/2, w/2). Both resolutions must be even."""
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


def scale(x: Tensor | Pyramid, factors: Tensor) -> Tensor:
    """Multiply each band of ``x`` by its factor: ``U diag(factors) U^T x``; arguments as of :func:`combine`."""
    return combine((x, factors))


def combine(*terms: tuple[Tensor | Pyramid, Tensor]) -> Tensor:
    """``sum_j U diag(f_j) U^T x_j``; the coarser bands of all images are added up before they are enlarged, once.

        combine((x, [f]))             = f x
        combine((x, [f, *coarser]))   = f x + up(combine((down(x), coarser - f)))

    Args:
        terms: images (B, C, h, w) of one level, each with its factors, (n+1,) or (B, n+1): finest band first, the
            n-times halved image last; h and w divisible by 2^n. So a single factor is that of all bands.
    """
    pyramids = [(x if isinstance(x, Pyramid) else Pyramid(x), f) for x, f in terms]
    (first, f), *others = [(x.image, f[..., 0, None, None, None]) for x, f in pyramids]
    result = f * first
    for x, f in others:
        result = torch.addcmul(result, f, x)
    coarser = [(x.half, f[..., 1:] - f[..., :1]) for x, f in pyramids if f.shape[-1] > 1]
    return result + up(combine(*coarser)) if coarser else result


def merge(factors: Tensor) -> Tensor:
    """Factors (.., n) of bands, as (.., 1) if all bands have the same, so that nothing is halved for them."""
    return factors[..., :1] if (factors == factors[..., :1]).all() else factors


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
