"""Mean and std of a data set from sums over its images.

All sums are whole numbers: neither the order of images nor how they are grouped over processes and interruptions shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_HALVINGS = 4
#: Pixels that are looked at together.
_PART = 1 << 18


@dataclass
class Moments:
    """Sums over images (3, side, side)."""

    count: int
    pixels: NDArray[Any]
    """Sum of the images, (3, side, side), whole numbers."""
    squares: list[int]
    """For k = 0, 1, ..: 4^k times the sum of squares of the level-k images of 2p - 255, p being pixels."""

    @staticmethod
    def none(resolution: int) -> Moments:
        """Of no images."""
        return Moments(0, np.zeros((3, resolution, resolution), np.int64), [0] * (halvings(resolution) + 1))

    @staticmethod
    def of(images: Sequence[NDArray[np.uint8]], resolution: int) -> Moments:
        """Of some images in memory."""
        if not len(images):
            return Moments.none(resolution)
        part = max(1, _PART // images[0].size)
        parts = [
            _squares(2 * np.stack(images[first : first + part]).astype(np.int32) - 255)
            for first in range(0, len(images), part)
        ]
        # Sums travel between processes: 257 images of 255 fit into two bytes.
        pixels: NDArray[Any] = np.stack(images).sum(axis=0, dtype=np.uint16 if len(images) <= 257 else np.int64)
        return Moments(len(images), pixels, [sum(map(int, s)) for s in zip(*parts, strict=True)])

    def add(self, other: Moments, sign: int = 1) -> None:
        """Add the sums of other images, or take them away."""
        self.count += sign * other.count
        self.pixels = self.pixels + sign * other.pixels.astype(np.int64)
        self.squares = [a + sign * b for a, b in zip(self.squares, other.squares, strict=True)]

    def means(self) -> tuple[float, ...]:
        """Of red, green and blue, of images in [-1, 1]."""
        _, height, width = self.pixels.shape
        sums = self.pixels.sum(axis=(1, 2)).tolist()
        return tuple(round(s / (self.count * height * width) / 127.5 - 1, 6) for s in sums)

    def std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Standard deviation over images, per coefficient of images in [-1, 1]: of the details, and of the levels.

        Detail band i is what the level-i image holds and the level-(i+1) image does not (:mod:`dvdp.diffusion.bands`).
        """
        of_mean = _squares(2 * self.pixels / self.count - 255)
        # 4^k times the squares of a level, over its pixels of which there are 4^k times fewer: one divisor for all.
        levels = [
            (total / self.count - mean) / self.pixels.size for total, mean in zip(self.squares, of_mean, strict=True)
        ]
        details = [(fine - coarse / 4) / 0.75 for fine, coarse in pairwise(levels)]
        return _std(details), _std(levels)


def halvings(resolution: int) -> int:
    """How often a resolution is halved for its std: as long as it is even, and at most :data:`MOST_HALVINGS` times."""
    return next(k for k in range(MOST_HALVINGS + 1) if k == MOST_HALVINGS or resolution % 2 ** (k + 1))


def _squares(images: NDArray[Any]) -> list[Any]:
    """For each level: sum of squares of its 2^k x 2^k blocks' sums. Whole numbers below 2^63 stay exact."""
    result = []
    for level in range(halvings(images.shape[-1]) + 1):
        if level:
            rows = images[..., ::2, :] + images[..., 1::2, :]
            images = rows[..., ::2] + rows[..., 1::2]
        result.append(np.square(images, dtype=np.result_type(images.dtype, np.int64)).sum())
    return result


def _std(variances: Sequence[float]) -> tuple[float, ...]:
    # Of 2p - 255, so twice 127.5; what should be nothing may be below it by rounding.
    return tuple(round(float(max(0.0, variance)) ** 0.5 / 255, 6) for variance in variances)
