"""How far what a turning point would drop is from Gaussian, by a trained network's own word.

The orthogonal Fisher divergence (eq. 14 of Jing et al., *Subspace Diffusion Generative Models*, 2022), by which they
choose where to halve: at t, a band that would be dropped has the score ``s = -eps / noise``, which a network predicts,
where normal numbers of the same variance ``V = signal^2 std^2 + noise^2`` have ``-x / V``. The divergence is

    E |s + x / V|^2 / E |x / V|^2,

0 for a Gaussian band, and the larger the more of its structure stands out of the noise. For the exact score, by
Stein's identity ``E <s, -x / V> = E |x / V|^2``, it equals ``E |s|^2 / E |x / V|^2 - 1``: how much longer the score is
than that of normal numbers. A network's score is not exact, and its errors add to the divergence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from dvdp.diffusion import bands
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import generator
from dvdp.diffusion.sampling import Denoiser

#: Images in one call of the network.
_BATCH = 64


def orthogonal_divergences(
    process: Process,
    denoiser: Denoiser,
    images: Tensor,
    times: Sequence[int],
    halvings: int,
    seed: int = 0,
    labels: Tensor | None = None,
) -> list[list[float | None]]:
    """The divergence of each of the finest bands at each of some timesteps.

    Args:
        denoiser: predicts the noise, as for :func:`dvdp.diffusion.sampling.sample`.
        images: (n, C, H, W) clean images in [-1, 1], on the denoiser's device.
        times: candidates for a turning point, 1 .. T.
        halvings: how many bands to look at: dropping the first k of them halves the resolution k times.
        labels: (n,) classes of the images, -1 for none, for a class-conditional denoiser.

    Returns:
        For each time, for band 0 .. halvings - 1; None where the process has dropped the band already.
    """
    rows: list[list[float | None]] = []
    for t in tqdm(times, desc="divergence", unit="t", delay=2, disable=None):
        dropped = min(process.level(t), halvings)
        rows.append([*[None] * dropped, *_divergences(process, denoiser, images, t, halvings - dropped, seed, labels)])
    return rows


def _divergences(
    process: Process, denoiser: Denoiser, images: Tensor, t: int, count: int, seed: int, labels: Tensor | None
) -> list[float]:
    """Of the finest ``count`` bands of the state at t."""
    level = process.level(t)
    noise = process.schedule.noise[level:, t]
    # Below the process's coarsest band, bands are parts of that.
    noises = torch.stack([noise[min(band, len(noise) - 1)] for band in range(count)]) if count else noise[:0]
    off, energy = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    z = torch.randn(
        (len(images), images.shape[1], images.shape[2] >> level, images.shape[3] >> level),
        generator=generator(seed, "divergence", t),
    ).to(images)
    still = process.diffuse(images, t, torch.zeros_like(z))
    variances = bands.energies(still, count)[:, :count].mean(0).cpu() + noises.square()
    with torch.no_grad():
        for first in range(0, len(images), _BATCH):
            part = slice(first, first + _BATCH)
            x = process.diffuse(images[part], t, z[part])
            conditions = () if labels is None else (labels[part].to(x.device),)
            eps = denoiser(x, torch.full((len(x),), t, device=x.device), *conditions)
            for band in range(count):
                score, gaussian = -bands.detail(eps) / noises[band], -bands.detail(x) / variances[band]
                off[band] += (score - gaussian).double().square().sum().cpu()
                energy[band] += gaussian.double().square().sum().cpu()
                eps, x = bands.down(eps), bands.down(x)
    return (off / energy).tolist()
