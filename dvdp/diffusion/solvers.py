"""Solvers: how the reverse process goes down the timesteps of a level.

A solver is a function of (process, falling timesteps of one level, level). It returns tables, one entry for each step
and band, because every solver here is linear: the sampler applies them, and the planner computes the variance of the
samples from them. All work per band, with ``lambda = log(signal / noise)`` and ``h = lambda_s - lambda_t`` for a step
from t to s. Solvers with a history start afresh at every level, because a lift adds a band that has none. A step to
s = 0 returns the predicted clean image.

A new solver is one function and one line of :data:`SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dvdp.diffusion.process import Process, Variance
from dvdp.errors import UserError, did_you_mean


class Steps(NamedTuple):
    """The steps of one level, linear per band: ``x_s = x x_t + sum_j history[j] p_j + z * standard normal``.

    ``p_0`` is the prediction at t, ``p_1`` that of the step before, and so on; its weight is 0 where there is none.
    """

    prediction_type: Literal["sample", "epsilon"]
    """What the ``p_j`` are; epsilon is what the (clipped) clean image implies."""
    x: Tensor
    """(steps, n), n bands of the level, finest first, float64, as all."""
    history: Tensor
    """(order, steps, n)."""
    z: Tensor
    """(steps, n)."""


Solver = Callable[[Process, Sequence[int], int], Steps]


def ddpm(process: Process, times: Sequence[int], level: int, variance: Variance = "fixed_small") -> Steps:
    """Ancestral sampling (Ho et al. 2020): x_s is drawn from q(x_s | x_t, x_0), :meth:`Process.posterior`."""
    step = process.posterior(torch.tensor(times[:-1]), torch.tensor(times[1:]), level, variance)
    return Steps("sample", step.x, step.x0[None], step.z)


def ddim(process: Process, times: Sequence[int], level: int, eta: float = 0.0) -> Steps:
    """DDIM (Song et al. 2021): ``signal_s x_0 + sqrt(noise_s^2 - v) eps + sqrt(v) z``, :meth:`Process.ddim`."""
    step = process.ddim(torch.tensor(times[:-1]), torch.tensor(times[1:]), level, eta)
    return Steps("sample", step.x, step.x0[None], step.z)


def dpm_solver_2m(process: Process, times: Sequence[int], level: int) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022): ``(noise_s / noise_t) x_t + signal_s (1 - e^-h) D``, order 2."""
    signal, noise, h = _log_snr_steps(process, times, level)
    history = signal[1:] * -torch.expm1(-h) * _extrapolation(h)
    return Steps("sample", noise[1:] / noise[:-1], history, torch.zeros_like(h))


def sde_dpm_solver_2m(process: Process, times: Sequence[int], level: int) -> Steps:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022), with the noise of the reverse SDE, order 2.

    ``(noise_s / noise_t) e^-h x_t + signal_s (1 - e^-2h) D + noise_s sqrt(1 - e^-2h) z``.
    """
    signal, noise, h = _log_snr_steps(process, times, level)
    added = -torch.expm1(-2 * h)
    history = signal[1:] * added * _extrapolation(h)
    return Steps("sample", noise[1:] / noise[:-1] * (-h).exp(), history, noise[1:] * added.sqrt())


def deis(process: Process, times: Sequence[int], level: int, order: int) -> Steps:
    """DEIS (Zhang & Chen 2023), with polynomials in t: ``d(x / signal) = eps d(noise / signal)``.

    ``x_s = (signal_s / signal_t) x_t + signal_s * integral from t to s of P(u) d(noise_u / signal_u)``, where P is the
    polynomial through the last ``order`` predictions of eps. The table of ``noise / signal`` is linear between
    timesteps.
    """
    signal, noise = process.schedule.signal[level:], process.schedule.noise[level:]
    ratio = noise / signal
    weights = torch.zeros(order, len(times) - 1, len(signal), dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(times)):
        # The step to s = 0 is of order 1: it returns the clean image.
        nodes = [times[i - j] for j in range(min(order, i + 1) if s > 0 else 1)]
        after = torch.arange(t, s, -1)
        change = ratio[:, after - 1] - ratio[:, after]
        for j in range(len(nodes)):
            # Simpson's rule is exact for the mean of a polynomial of degree 3 between two timesteps.
            mean = sum(w * _lagrange(nodes, j, after - d) for w, d in ((1 / 6, 0.0), (2 / 3, 0.5), (1 / 6, 1.0)))
            weights[j, i] = signal[:, s] * (change * mean).sum(dim=1)
    x = (signal[:, list(times[1:])] / signal[:, list(times[:-1])]).T
    return Steps("epsilon", x, weights, torch.zeros_like(x))


SOLVERS: dict[str, Callable[..., Steps]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpm_solver_2m,
    "sde-dpm++2m": sde_dpm_solver_2m,
    "deis2": partial(deis, order=2),
    "deis3": partial(deis, order=3),
}


def make_solver(solver: str, eta: float = 0.0, variance: Variance = "fixed_small") -> Solver:
    """A solver by its name in :data:`SOLVERS`.

    Args:
        eta: of ``ddim``, 0 to 1; 1 has the variance of ancestral sampling.
        variance: of ``ddpm``, the ``"fixed_small"`` or ``"fixed_large"`` choice.

    Raises:
        UserError: an argument is out of range.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta: found {eta}, expected a number from 0 to 1.")
    if variance not in ("fixed_small", "fixed_large"):
        raise UserError(f"variance: found '{variance}', expected 'fixed_small' or 'fixed_large'.")
    if solver not in SOLVERS:
        raise UserError(
            f"solver: found '{solver}'{did_you_mean(solver, SOLVERS)}, expected one of {', '.join(SOLVERS)}."
        )
    options: dict[str, dict[str, Any]] = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}}
    return partial(SOLVERS[solver], **options.get(solver, {}))


def _log_snr_steps(process: Process, times: Sequence[int], level: int) -> tuple[Tensor, Tensor, Tensor]:
    """signal and noise (steps + 1, n) along the grid, and h (steps, n), infinite where it ends at t = 0."""
    signal = process.schedule.signal[level:, list(times)].T
    noise = process.schedule.noise[level:, list(times)].T
    return signal, noise, (signal / noise).log().diff(dim=0)


def _extrapolation(h: Tensor) -> Tensor:
    """Weights of x0 and of the x0 before, (2, steps, n), in ``D = x0 + (x0 - x0_before) h / (2 h_before)``.

    D is the clean image in the middle of the step; it is x0 in the first step and in one to t = 0.
    """
    half = torch.zeros_like(h)
    half[1:] = h[1:] / (2 * h[:-1])
    half[h.isinf()] = 0
    return torch.stack([1 + half, -half])


def _lagrange(nodes: Sequence[int], j: int, t: Tensor) -> Tensor:
    """The polynomial that is 1 at node j and 0 at the others, at times t."""
    value = torch.ones_like(t, dtype=torch.float64)
    for i, node in enumerate(nodes):
        if i != j:
            value = value * (t - node) / (nodes[j] - node)
    return value
