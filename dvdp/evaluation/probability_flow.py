"""The likelihood of images by the probability-flow ODE, for any process here (Song et al. 2021, Sec. 4.3).

In the angle ``phi = atan(noise / signal)`` of a band and at unit size, ``w = x / r`` with ``r^2 = signal^2 + noise^2``,
the flow is ``dw / dphi = signal / r eps - noise / r x0``, the velocity: it stands still for white noise of unit size,
so that few steps lose little. It runs from t = 1 to T, and the log-density changes by the trace of its Jacobian. At
each T_k the band that the state loses has the density of what the lift draws, and at T the coarsest band that of what
sampling starts with. There is no clipping, as sampling by this flow has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dvdp.diffusion.bands import detail, down, scale
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import ImageNoise, derive_seed
from dvdp.diffusion.sampling import Denoiser
from dvdp.diffusion.timesteps import step_grid
from dvdp.evaluation.likelihood import Bound, band_sizes, check_images, decoder, drawn_std, term_names
from dvdp.models.pixels import to_float


def flow_likelihood(
    process: Process,
    denoiser: Denoiser,
    images: Tensor,
    steps: int = 100,
    probes: int | None = 1,
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Bound:
    """The negative log-likelihood of 8-bit images in bits per dimension.

    ``log p(x_0 | x_1) + log p(x_1) - log q(x_1 | x_0)``, whose middle term the flow gives; where the noise at t = 1 is
    about one step of the 8 bits, as in the linear schedule, the two others lose less than 0.001 bits of it.

    Args:
        denoiser: predicts the noise, and gradients go through it; without guidance.
        images: uint8 (n, C, H, W).
        steps: of Heun's method, two evaluations each; as :func:`dvdp.diffusion.timesteps.step_grid` has them, even in
            the log-SNR.
        probes: of Hutchinson's estimate of the trace, each a backward pass; None for the exact trace, which takes one
            for each dimension.
        labels: (n,) classes of the images, for a class-conditional denoiser.

    Returns:
        Terms as those of the variational bound. ``level_k`` is the change of volume, negative where states spread.

    Raises:
        UserError: as :func:`dvdp.evaluation.likelihood.variational_bound`; steps that do not fit.
    """
    check_images(process, images)
    total: dict[str, list[Tensor]] = {name: [] for name in term_names(process)}
    signal, noise = process.schedule.signal[:, 1], process.schedule.noise[:, 1]
    # What x_1 leaves open of a clean image, where the data is smooth on that scale.
    variance = float((noise[-1] / signal[-1]).square())
    for first in range(0, len(images), batch):
        part = images[first : first + batch].to(device)
        given = None if labels is None else labels[first : first + batch].to(device)
        source = ImageNoise(derive_seed(seed, "likelihood"), first, len(part), device)
        z = source.normal(part.shape[1:])
        with torch.no_grad():
            x0, lost = to_float(part), decoder(process, denoiser, part, z, variance, given)
        log_noise = float(torch.tensor(band_sizes(process, x0), dtype=torch.float64) @ noise.log())
        lost = lost - log_noise - (z.double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
        terms = flow_density(process, denoiser, process.diffuse(x0, 1, z), steps, probes, source, given)
        for name, nats in {**terms, "decoder": lost}.items():
            total[name].append(nats.cpu() / (x0[0].numel() * math.log(2)))
    return Bound({name: torch.cat(parts) for name, parts in total.items()})


def flow_density(
    process: Process,
    denoiser: Denoiser,
    x: Tensor,
    steps: int,
    probes: int | None,
    source: ImageNoise,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """``-log p(x_1)`` of states at t = 1, (n, C, H, W), by term: each (n,) nats.

    Args:
        source: noise of the images, for the probes.
    """
    terms: dict[str, Tensor] = {}
    grid = dict(step_grid(process.schedule, steps, "logsnr"))
    sizes = torch.tensor(band_sizes(process, x), dtype=torch.float64)
    for level in range(process.levels + 1):
        low, high = process.schedule.span(level)
        # There is no noise to predict at t = 0, and a level's network knows no t before T_k + 1.
        start = max(low, 1)
        times = [start, *([low + 1] if level else []), *(t for t in reversed(grid[level]) if t > low + 1)]
        directions = list(_probes(x, probes, source))
        x, spread = scale(x, 1 / _polar(process, start, level)[1]), x.new_zeros(len(x), dtype=torch.float64)

        def velocity(
            w: Tensor, t: int, angle: Tensor, level: int = level, probes: list[Tensor] = directions
        ) -> tuple[Tensor, Tensor]:
            return _velocity(process, denoiser, w, t, level, angle, probes, labels)

        for s, t in pairwise(times):
            angle = _polar(process, t, level)[0] - _polar(process, s, level)[0]
            known = s if s > low else t
            before, trace_before = velocity(x, known, angle)
            after, trace_after = velocity(x + scale(before, angle), t, angle)
            if s == low:
                before, trace_before = after, trace_after
            x = x + scale((before + after) / 2, angle)
            spread += (trace_before + trace_after) / 2
        growth = (_polar(process, high, level)[1] / _polar(process, start, level)[1]).log()
        terms[f"level_{level}"] = -spread - float((sizes[level:] * growth).sum())
        x = scale(x, _polar(process, high, level)[1])
        leaving, std = (detail(x) if level < process.levels else x).double(), drawn_std(process, level)
        energy = leaving.square().flatten(1).sum(1)
        nats = (energy / std**2 + sizes[level].item() * math.log(2 * math.pi * std**2)) / 2
        terms["prior" if level == process.levels else f"lift_{level + 1}"] = nats
        if level < process.levels:
            x = down(x)
    return terms


def _velocity(
    process: Process,
    denoiser: Denoiser,
    w: Tensor,
    t: int,
    level: int,
    angle: Tensor,
    probes: list[Tensor],
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The velocity at a state of unit size, and the trace of its Jacobian times the angles of the bands, (n,)."""
    signal, noise = process.signal_and_noise(t, level)
    r = torch.hypot(signal, noise)
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        x = scale(w, r)
        eps = denoiser(x, torch.full((len(x),), t, device=x.device), *(() if labels is None else (labels,)))
        v = scale(eps, signal / r) - scale(process.predict_clean(x, t, eps, level), noise / r)
        trace = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        for probe in probes:
            (gradient,) = torch.autograd.grad(v, w, scale(probe, angle), retain_graph=True)
            trace += (gradient * probe).double().flatten(1).sum(1) / len(probes)
    return v.detach(), trace


def _probes(x: Tensor, count: int | None, source: ImageNoise) -> Iterator[Tensor]:
    """Of mean square 1 in each direction: random signs, or the directions themselves."""
    if count is not None:
        yield from (source.normal(x.shape[1:], x.dtype).sign() for _ in range(count))
        return
    size = x[0].numel()
    yield from (row.reshape(x.shape[1:]).expand_as(x) for row in size**0.5 * torch.eye(size, device=x.device).to(x))


def _polar(process: Process, t: int, level: int) -> tuple[Tensor, Tensor]:
    """phi and r of the bands of a level, each (bands,)."""
    signal, noise = process.signal_and_noise(t, level)
    return torch.atan2(noise.expand_as(signal), signal), torch.hypot(signal, noise)
