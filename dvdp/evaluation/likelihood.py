"""The variational bound on the likelihood of 8-bit images, in bits per dimension.

The bound is that of the ancestral chain over all T timesteps (Ho et al. 2020, eq. 5), with the process's own tables.
Bands are orthonormal parts of an image, so its KL divergences are sums over the bands that each level holds:

    prior       KL( q(x_T | x_0) || N(0, noise_T^2) ), of the coarsest band
    level k     sum of KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ) over the timesteps t > 1 of the level
    lift k      KL( q(band k-1 of x_{T_k} | x_0) || N(0, d^2) ), d the deviation that the lift draws the band with
    decoder     -log p(x_0 | x_1): a normal distribution about the predicted clean image, over the 256 values of a pixel

With K = 0 this is the bound of DDPM. It is that of the variance which ancestral sampling has: ``fixed_small`` takes
that of q(x_{t-1} | x_t, x_0), so that only the means differ, and ``fixed_large`` adds what the variances differ by. As
in DDPM, the decoder has the small variance of the step from t = 2 to 1 with either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dvdp.diffusion.bands import energies, scale, to_level
from dvdp.diffusion.process import Process, Variance
from dvdp.diffusion.randomness import ImageNoise, derive_seed
from dvdp.diffusion.sampling import Denoiser
from dvdp.errors import UserError
from dvdp.models.pixels import to_float
from dvdp.out_of_memory import in_batches

#: The bound's name in records.
METRIC = "bits_per_dim"
#: Half the distance between two values of a pixel, in [-1, 1].
_HALF = 1 / 255
#: Successive multiples of it, less whole numbers, lie evenly between 0 and 1.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Bound:
    """The bound on the negative log-likelihood of images, lower is better."""

    terms: dict[str, Tensor]
    """Of ``prior``, ``level_K``, ``lift_K``, .., ``level_0``, ``decoder``, in the order of sampling: (n,) float64, bits
    per dimension of each image."""

    @property
    def images(self) -> Tensor:
        """(n,) bits per dimension: settings were given the same noise, so that they compare image by image."""
        return torch.stack(list(self.terms.values())).sum(0)

    @property
    def bits(self) -> float:
        """Bits per dimension, the mean over the images."""
        return float(self.images.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean, over images, timesteps and noise."""
        return float(self.images.std()) / math.sqrt(len(self.images))

    @property
    def metrics(self) -> dict[str, float]:
        """:data:`METRIC` with its error, number of images and terms, for a record."""
        terms = {f"{METRIC}_{name}": float(bits.mean()) for name, bits in self.terms.items()}
        return {METRIC: self.bits, f"{METRIC}_error": self.error, f"{METRIC}_images": len(self.images), **terms}


@torch.no_grad()
def variational_bound(
    process: Process,
    denoiser: Denoiser,
    images: Tensor,
    variance: Variance = "fixed_small",
    clip: bool = True,
    timesteps: int | None = 32,
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Bound:
    """The variational bound, term by term.

    Settings with the same T and base are given the same timesteps and the same noise (halved as the state is), whatever
    their turning points.

    Args:
        denoiser: predicts the noise, as for :func:`dvdp.diffusion.sampling.sample`; without guidance.
        images: uint8 (n, C, H, W).
        variance: of the ancestral steps.
        clip: keep the predicted clean image in the pixel range of its level, as sampling does.
        timesteps: of each image, beside the decoder's: one from each of as many parts of t = 2 .. T in which the
            log-SNR falls equally. None for every timestep.
        labels: (n,) classes of the images, for a class-conditional denoiser: the bound is then given the class.
        seed: of timesteps and noise; those of image i do not depend on the number of images.
        batch: images that the denoiser is called with at once; fewer where memory runs out.

    Raises:
        UserError: fewer than 2 images, an image that cannot be halved K times, fewer than 2 timesteps of the process.
        OutOfMemory: there is no memory for one image at a time.
    """
    check_images(process, images)
    dimensions = images[0].numel()
    total: dict[str, list[Tensor]] = {name: [] for name in term_names(process)}

    def bound(first: int, count: int) -> dict[str, Tensor]:
        part = images[first : first + count].to(device)
        x0, terms = to_float(part), {name: part.new_zeros(len(part), dtype=torch.float64) for name in total}
        conditions = None if labels is None else labels[first : first + count].to(device)
        source = ImageNoise(derive_seed(seed, "likelihood"), first, count, device)
        chosen = _timesteps(process, timesteps, seed, first, count)
        terms["decoder"] = decoder(process, denoiser, part, source.normal(x0.shape[1:]), _variance(process), conditions)
        for t, weight in chosen:
            noise = source.normal(x0.shape[1:])
            levels = torch.bucketize(t, torch.tensor(process.schedule.turning_points, dtype=t.dtype))
            for level in levels.unique().tolist():
                # By places and not by a mask, whose number of images a GPU would be waited for.
                here = (levels == level).nonzero().flatten()
                there = here.to(device)
                given = () if conditions is None else (conditions[there],)
                kl = _step(process, denoiser, x0[there], t[here], level, noise[there], variance, clip, *given)
                terms[f"level_{level}"][there] += weight[here].to(device) * kl
        return {**terms, **entered(process, x0)}

    for _, terms in in_batches(bound, 0, len(images), batch, torch.device(device), "likelihood"):
        for name, nats in terms.items():
            total[name].append(nats.cpu() / (dimensions * math.log(2)))
    return Bound({name: torch.cat(parts) for name, parts in total.items()})


def entered(process: Process, x0: Tensor) -> dict[str, Tensor]:
    """The KL divergences of what enters the chain as noise: ``prior`` and each ``lift_k``, (n,) nats of each image."""
    schedule, K = process.schedule, process.levels
    power, sizes = energies(x0, K), band_sizes(process, x0)
    terms = {}
    for band, t in enumerate((*schedule.turning_points, schedule.timesteps)):
        signal, noise = schedule.signal[band, t].item(), schedule.noise[band, t].item()
        drawn = drawn_std(process, band) ** 2
        kl = (noise**2 + signal**2 * power[:, band]) / drawn - 1 - math.log(noise**2 / drawn)
        terms["prior" if band == K else f"lift_{band + 1}"] = sizes[band] * kl / 2
    return terms


def decoder(
    process: Process,
    denoiser: Denoiser,
    images: Tensor,
    noise: Tensor,
    variance: float,
    labels: Tensor | None = None,
) -> Tensor:
    """``-log p(x_0 | x_1)`` of uint8 images (n, C, H, W), (n,) nats: Ho et al. 2020, eq. 13.

    Args:
        noise: z of x_1, of the images' shape.
        variance: of a pixel.
    """
    x0 = to_float(images)
    x = process.diffuse(x0, 1, noise)
    t = torch.ones(len(x), dtype=torch.int64, device=x.device)
    eps = denoiser(x, t, *(() if labels is None else (labels,)))
    mean, std = process.predict_clean(x, 1, eps, 0).double().clamp(-1, 1), math.sqrt(variance)
    off = x0.double() - mean
    # The lowest and the highest value have all that lies beyond them; of the rest, the side with the smaller
    # probabilities is taken, of which differences are exact.
    inner, outer = (-off.abs() + _HALF) / std, (-off.abs() - _HALF) / std
    log_inner, log_outer = (torch.special.log_ndtr(edge) for edge in (inner, outer))
    between = log_inner + (-torch.expm1(log_outer - log_inner)).log()
    lowest, highest = (torch.special.log_ndtr((side * off + _HALF) / std) for side in (1, -1))
    return -torch.where(images == 0, lowest, torch.where(images == 255, highest, between)).flatten(1).sum(1)


def band_sizes(process: Process, x0: Tensor) -> list[float]:
    """Coefficients of each band of a full-size image, finest band first."""
    levels = [x0[0].numel() / 4**level for level in range(process.levels + 1)]
    return [fine * 0.75 for fine in levels[:-1]] + levels[-1:]


def drawn_std(process: Process, band: int) -> float:
    """Of a band where it enters the chain: as :meth:`Process.lift` draws it, and at T of the coarsest one."""
    t = (*process.schedule.turning_points, process.schedule.timesteps)[band]
    signal, noise = process.schedule.signal[band, t].item(), process.schedule.noise[band, t].item()
    return math.hypot(noise, signal * process.band_std[band]) if band < process.levels else noise


def term_names(process: Process) -> list[str]:
    """Of a likelihood, in the order of sampling."""
    lifted = [name for k in range(process.levels, 0, -1) for name in (f"level_{k}", f"lift_{k}")]
    return ["prior", *lifted, "level_0", "decoder"]


def check_images(process: Process, images: Tensor) -> None:
    """Raise UserError unless they have a likelihood under the process."""
    for side in images.shape[-2:]:
        process.check_resolution(side)
    if len(images) < 2:
        raise UserError(f"likelihood: found {len(images)} images, expected at least 2; take more.")
    if process.schedule.timesteps < 2:
        raise UserError("likelihood: found a process of 1 timestep, expected at least 2; raise schedule.timesteps.")


def _step(
    process: Process,
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    level: int,
    noise: Tensor,
    variance: Variance,
    clip: bool,
    *labels: Tensor,
) -> Tensor:
    """KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ) of images at timesteps of one level, each above 1; (n,) nats."""
    x = process.diffuse(x0, t, to_level(noise, level))
    predicted = process.predict_clean(x, t, denoiser(x, t.to(x.device), *labels), level)
    if clip:
        predicted = predicted.clamp(-(2.0**level), 2.0**level)
    exact, ours = process.posterior(t, t - 1, level), process.posterior(t, t - 1, level, variance)
    off = scale((to_level(x0, level) - predicted).double(), exact.x0 / ours.z).square().flatten(1).sum(1)
    narrower = (exact.z / ours.z).square()
    sizes = torch.tensor(band_sizes(process, x0)[level:], dtype=torch.float64)
    return (off + ((narrower - 1 - narrower.log()) * sizes).sum(1).to(off.device)) / 2


def _variance(process: Process) -> float:
    """Of a pixel in the decoder of DDPM: the small variance of the step from t = 2 to 1, the mean over the bands."""
    two = torch.tensor(2)
    small = process.posterior(two, two - 1, 0).z.square()
    share = [0.75 / 4**band for band in range(process.levels)] + [1 / 4**process.levels]
    return float((small * torch.tensor(share, dtype=torch.float64)).sum())


def _timesteps(
    process: Process, count: int | None, seed: int, first: int, images: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Timesteps 2 .. T of the images, each (n,), with what they stand for: one over how often they are drawn."""
    schedule = process.schedule
    if count is None:
        for t in range(2, schedule.timesteps + 1):
            yield torch.full((images,), t), torch.ones(images, dtype=torch.float64)
        return
    # Of the coarsest band, which no turning point attenuates.
    share = (schedule.noise[-1, 1:] / schedule.signal[-1, 1:]).log().diff()
    share = share / share.sum()
    start = derive_seed(seed, "timesteps") / 2**63
    shift = (start + _GOLDEN * torch.arange(first, first + images, dtype=torch.float64)) % 1
    for part in range(count):
        index = torch.searchsorted(share.cumsum(0), (part + shift) / count).clamp(max=len(share) - 1)
        yield index + 2, 1 / (count * share[index])
