"""What the method's tests compare with: dense matrices, and denoisers that are exact without training.

Nothing here calls dvdp.diffusion.bands, so a mistake there cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dvdp import Process


def down_matrix(resolution: int) -> Tensor:
    """D as a matrix, (resolution^2 / 4, resolution^2): 1/2 for each pixel of a 2x2 block."""
    pairs = torch.eye(resolution // 2, dtype=torch.float64).repeat_interleave(2, dim=1) / 2**0.5
    return torch.kron(pairs, pairs)


@cache
def projectors(resolution: int, levels: int) -> list[Tensor]:
    """The orthogonal projections on bands 0 .. levels, each (resolution^2, resolution^2)."""
    to_level = [torch.eye(resolution * resolution, dtype=torch.float64)]
    for level in range(levels):
        to_level.append(down_matrix(resolution >> level) @ to_level[-1])
    onto = [matrix.T @ matrix for matrix in to_level]
    return [fine - coarse for fine, coarse in pairwise(onto)] + onto[-1:]


def combine(factors: Tensor, projections: Sequence[Tensor]) -> Tensor:
    """U diag(factors) U^T as a dense matrix."""
    return sum((f * p for f, p in zip(factors, projections, strict=True)), torch.zeros(()))


def as_matrix(function: Callable[[Tensor], Tensor], resolution: int) -> Tensor:
    """The matrix of a linear map of images (B, 1, side, side), by applying it to every basis vector."""
    basis = torch.eye(resolution * resolution, dtype=torch.float64).reshape(-1, 1, resolution, resolution)
    return function(basis).flatten(1).T


def split(x: Tensor, levels: int) -> list[Tensor]:
    """The bands of images (B, C, h, w) as levels+1 full-size images that sum to them."""
    flat = x.flatten(2)
    return [(flat @ p.to(x.dtype)).reshape(x.shape) for p in projectors(x.shape[-1], levels)]


def reduce(x: Tensor, level: int) -> Tensor:
    """D^level x by matrices."""
    for _ in range(level):
        resolution = x.shape[-1]
        x = (x.flatten(2) @ down_matrix(resolution).T.to(x.dtype)).reshape(
            *x.shape[:2], resolution // 2, resolution // 2
        )
    return x


class GaussianDenoiser:
    """Exact for data whose band i is normal with one deviation and a mean image.

    Args:
        process: gives the tables.
        std: of bands 0 .. K.
        mean: (1, C, H, W), or None for zero.
    """

    def __init__(self, process: Process, std: Sequence[float], mean: Tensor | None = None) -> None:
        self.schedule, self.std, self.mean = process.schedule, std, mean

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        K = self.schedule.levels
        level = sum(int(t[0]) > bound for bound in self.schedule.turning_points)
        mean = torch.zeros_like(x[:1]) if self.mean is None else reduce(self.mean.to(x.dtype), level)
        result = torch.zeros_like(x)
        parts = zip(split(x, K - level), split(mean, K - level), strict=True)
        for band, (x_band, mean_band) in enumerate(parts, start=level):
            signal, noise = (
                table[band, t.cpu()].to(x)[:, None, None, None] for table in (self.schedule.signal, self.schedule.noise)
            )
            variance = signal**2 * self.std[band] ** 2 + noise**2
            result += noise * (x_band - signal * mean_band) / variance
        return result


class EmpiricalDenoiser:
    """Exact for the distribution that puts equal weight on each of some images (N, C, H, W)."""

    def __init__(self, process: Process, images: Tensor) -> None:
        self.schedule = process.schedule
        self.bands = {
            level: torch.stack(split(reduce(images, level), process.levels - level))
            for level in range(process.levels + 1)
        }

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        now = int(t[0])
        level = sum(now > bound for bound in self.schedule.turning_points)
        signal = self.schedule.signal[level:, now].to(x.dtype)
        noise = self.schedule.noise[level:, now].to(x.dtype)
        x_bands, images = torch.stack(split(x, len(signal) - 1)).flatten(2), self.bands[level].to(x.dtype).flatten(2)
        log_weight = torch.zeros(len(x), images.shape[1], dtype=x.dtype)
        for band in range(len(signal)):
            distance = torch.cdist(x_bands[band], signal[band] * images[band])
            log_weight -= distance.square() / (2 * noise[band] ** 2)
        weight = log_weight.softmax(dim=1)
        clean = torch.einsum("bn,knp->kbp", weight, images)
        eps = (x_bands - signal[:, None, None] * clean) / noise[:, None, None]
        return eps.sum(0).reshape(x.shape)


def digits(count: int, resolution: int) -> Tensor:
    """scikit-learn's handwritten digits, enlarged from 8 px: (count, 1, side, side) float64 in [-1, 1]."""
    small = torch.from_numpy(load_digits().images[:count]).unsqueeze(1) / 8 - 1
    return torch.nn.functional.interpolate(small, size=(resolution, resolution), mode="bilinear", align_corners=False)


class DenseGaussianDenoiser:
    """Exact for images (1, H, W) that are normal with mean zero and any covariance (H W, H W) of their pixels."""

    def __init__(self, process: Process, covariance: Tensor) -> None:
        self.process, self.schedule = process, process.schedule
        self.resolution = round(len(covariance) ** 0.5)
        self.covariances = [covariance]
        for level in range(process.levels):
            down = down_matrix(self.resolution >> level)
            self.covariances.append(down @ self.covariances[-1] @ down.T)
        self.maps: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        now = int(t[0])
        if now not in self.maps:
            level = sum(now > bound for bound in self.schedule.turning_points)
            bands = projectors(self.resolution >> level, self.schedule.levels - level)
            signal, noise = combine(self.schedule.signal[level:, now], bands), self.schedule.noise[-1, now]
            total = signal @ self.covariances[level] @ signal + noise**2 * torch.eye(len(signal), dtype=torch.float64)
            # Of E[noise z | x], where x = signal v + noise z.
            self.maps[now] = noise * torch.linalg.inv(total)
        return (x.flatten(1) @ self.maps[now].to(x.dtype).T).reshape(x.shape)
