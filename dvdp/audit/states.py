"""True and generated states at turning points, and how they are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dvdp.audit.result import FREE, StateComparison
from dvdp.data.loading import Images
from dvdp.diffusion import bands
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import ImageNoise, derive_seed
from dvdp.diffusion.sampling import Denoiser
from dvdp.models.classes import Classes
from dvdp.models.pixels import to_float

#: States and real images that are looked at at a time.
CHUNK = 64
#: Orthonormal: white noise stays white. The sum of the colours, and what is left of them.
_COLOURS = [[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited: a denoiser in its process, the data set, and the way of sampling."""

    process: Process
    denoiser: Denoiser
    images: Images
    sampling: Mapping[str, Any]
    """Arguments of :func:`dvdp.diffusion.sampling.sample`: steps, solver, seed, ..."""
    batch: int = 128
    device: torch.device | str = "cpu"
    classes: Classes | None = None
    """None for an unconditional denoiser."""

    @property
    def resolution(self) -> int:
        """Of the images, in pixels."""
        return self.images[0][0].shape[-1]

    @property
    def seed(self) -> int:
        """Of the sampling; it also chooses the real images, and the noise in true states."""
        return self.sampling.get("seed", 0)


class States(NamedTuple):
    """What is kept of states of one level."""

    energies: Tensor
    """(n, bands) float64: mean square per coefficient of each band of the process, finest of the level first."""
    averages: Tensor
    """(n, at most 24) float64; see :func:`describe`."""
    sizes: Tensor
    """(n, f) float64, of the bands finer than the averages; see :func:`describe`."""

    @property
    def features(self) -> Tensor:
        """(n, about 30): what the Frechet distance is taken of."""
        return torch.cat([self.averages, self.sizes], dim=1)


def real_images(subject: Subject, first: int, count: int) -> Tensor:
    """Real images number ``first`` on, uint8 (count, 3, H, W)."""
    return torch.from_numpy(np.stack([image for image, _ in _real(subject, first, count)]))


def _real(subject: Subject, first: int, count: int) -> list[tuple[NDArray[np.uint8], int]]:
    """Drawn as samples of a perfect model are, each for itself, so that one may come twice; with their labels."""
    indices = [derive_seed(subject.seed, "audit image", first + i) % len(subject.images) for i in range(count)]
    return [subject.images[index] for index in indices]


def labels_of(subject: Subject, start: str, first: int, count: int) -> Tensor | None:
    """The labels of images number ``first`` on: drawn, or those of the real ones whose true states they start from."""
    if subject.classes is None:
        return None
    if start == FREE:
        return subject.classes.draw(subject.seed, first, count)
    return torch.tensor([label for _, label in _real(subject, first, count)])


def true_states(subject: Subject, k: int, lifted: bool, first: int, count: int) -> Tensor:
    """Diffused real images at T_k: (count, 3, h, w) of level k, or of level k - 1 as a perfect lift would leave them.

    Both are of the same images with the same noise.
    """
    clean = to_float(real_images(subject, first, count)).to(subject.device)
    resolution = subject.resolution >> (k - 1)
    source = ImageNoise(derive_seed(subject.seed, "audit", k), first, count, subject.device)
    noise = source.normal((3, resolution, resolution))
    t = subject.process.schedule.turning_points[k - 1]
    return subject.process.diffuse(clean, t, noise if lifted else bands.down(noise))


def describe(x: Tensor, halvings: int) -> States:
    """What is kept of states (n, 3, h, w) of a level from which the process goes on to halve so often.

    The features are few, so that a few hundred states tell their covariance: 4 x 4 averages of the sum of colours, 2 x
    2 averages of the two differences, and for each finer band its root mean square in the whole state. Of a noisy state
    these coarse averages are what holds signal, at every level; the finer bands hold mostly noise, of whose signal the
    size tells most.
    """
    x = x.double()
    mixed = torch.einsum("ij,njhw->nihw", torch.tensor(_COLOURS, dtype=x.dtype, device=x.device), x)
    resolution = x.shape[-1]
    finer = 0
    while (resolution >> finer) > 4 and (resolution >> finer) % 2 == 0:
        finer += 1
    size = min(4, resolution)
    averages = torch.cat([_averages(mixed[:, :1], size), _averages(mixed[:, 1:], max(1, size // 2))], dim=1)
    sizes = bands.energies(x, finer)[:, :finer].sqrt()
    return States(bands.energies(x, halvings).cpu(), averages.cpu(), sizes.cpu())


def join(parts: Sequence[States]) -> States:
    """Several as one."""
    return States(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def compare_states(subject: Subject, k: int, generated: States) -> StateComparison:
    """Generated states just before the lift at T_k beside as many true ones."""
    # torch-fidelity, which other parts of an audit do without.
    from dvdp.evaluation.fidelity import frechet

    count = len(generated.energies)
    true = join(
        [
            describe(true_states(subject, k, False, first, min(CHUNK, count - first)), subject.process.levels - k)
            for first in range(0, count, CHUNK)
        ]
    )
    energies, expected = generated.energies.mean(0), true.energies.mean(0)
    relative = [states.energies.std(0) / states.energies.mean(0) / math.sqrt(count) for states in (generated, true)]
    errors = (energies / expected).sqrt() / 2 * torch.hypot(*relative)
    # In their own std: features are of several kinds, and turning points should compare.
    unit = true.features.std(0).clamp(min=1e-12)
    ours, theirs = (states.features.div(unit).split([count // 2, count - count // 2]) for states in (generated, true))
    pairs = [(a, b) for a in ours for b in theirs]
    averages = slice(generated.averages.shape[1])
    return StateComparison(
        turning_point=subject.process.schedule.turning_points[k - 1],
        level=k,
        generated=tuple(energies.sqrt().tolist()),
        true=tuple(expected.sqrt().tolist()),
        errors=tuple(errors.tolist()),
        # Over pairs of halves, as the floor: a distance between few states is too large, and so both are alike.
        mean_difference=sum(_apart(a[:, averages], b[:, averages]) for a, b in pairs) / len(pairs),
        mean_floor=_apart(*(part[:, averages] for part in theirs)),
        distance=sum(frechet(a, b) for a, b in pairs) / len(pairs),
        distance_floor=frechet(*theirs),
    )


def _averages(x: Tensor, size: int) -> Tensor:
    """(n, c, side, side) -> (n, c * size^2): means of so many patches, times the patch's side, as D does."""
    return F.adaptive_avg_pool2d(x, size).flatten(1) * (x.shape[-1] / size)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.mean(0) - b.mean(0)).square().mean().sqrt().item()
