"""Step solvers: how the reverse process goes down the timesteps of a level.

A solver turns the timesteps of one level into tables, one entry a step and band; a network call serves all bands. With
``lambda = log(signal / noise)`` per band and ``h = lambda_s - lambda_t`` for a step from t to s. Solvers that look back
start afresh at every level, for a lift brings a band with no history. A step to s = 0 returns the predicted clean
image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

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


#: (process, falling timesteps of a level, level) -> its steps.
Solver = Callable[[Process, Sequence[int], int], Steps]


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
    return SOLVERS[solver](eta, variance)


def _ancestral(process: Process, times: Sequence[int], level: int, variance: Variance) -> Steps:
    """The posterior q(x_s | x_t, x_0) (8, 9)."""
    step = process.posterior(*_ends(times), level, variance)
    return Steps("sample", step.x, step.x0[None], step.z)


def _implicit(process: Process, times: Sequence[int], level: int, eta: float) -> Steps:
    """DDIM (Song et al. 2021)."""
    step = process.implicit(*_ends(times), level, eta)
    return Steps("sample", step.x, step.x0[None], step.z)


def _dpm_solver(process: Process, times: Sequence[int], level: int) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022): ``(noise_s / noise_t) x_t + signal_s (1 - e^-h) D``, order 2.

    ``D = x0 + (x0 - x0_before) h / (2 h_before)`` extrapolates the clean image to the middle of the step.
    """
    signal, noise, h = _log_snr_steps(process, times, level)
    forward = _look_back(signal[1:] * -torch.expm1(-h), h)
    return Steps("sample", noise[1:] / noise[:-1], forward, torch.zeros_like(h))


def _stochastic_dpm_solver(process: Process, times: Sequence[int], level: int) -> Steps:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022), with the noise of the reverse SDE.

    ``(noise_s / noise_t) e^-h x_t + signal_s (1 - e^-2h) D + noise_s sqrt(1 - e^-2h) z``.
    """
    signal, noise, h = _log_snr_steps(process, times, level)
    replaced = -torch.expm1(-2 * h)
    forward = _look_back(signal[1:] * replaced, h)
    return Steps("sample", noise[1:] / noise[:-1] * (-h).exp(), forward, noise[1:] * replaced.sqrt())


def _exponential_integrator(process: Process, times: Sequence[int], level: int, order: int) -> Steps:
    """DEIS (Zhang & Chen 2023), with polynomials in t: ``d(x / signal) = eps d(noise / signal)``.

    The predicted noise is extrapolated by the polynomial through the last ``order`` predictions, and integrated
    exactly against the table of ``noise / signal``, which is linear between timesteps.
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


#: Solvers by name: (eta, variance) -> solver.
SOLVERS: dict[str, Callable[[float, Variance], Solver]] = {
    "ddpm": lambda eta, variance: lambda process, times, level: _ancestral(process, times, level, variance),
    "ddim": lambda eta, variance: lambda process, times, level: _implicit(process, times, level, eta),
    "dpm++2m": lambda eta, variance: _dpm_solver,
    "sde-dpm++2m": lambda eta, variance: _stochastic_dpm_solver,
    "deis2": lambda eta, variance: lambda process, times, level: _exponential_integrator(process, times, level, 2),
    "deis3": lambda eta, variance: lambda process, times, level: _exponential_integrator(process, times, level, 3),
}


def _ends(times: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(times[:-1]), torch.tensor(times[1:])


def _log_snr_steps(process: Process, times: Sequence[int], level: int) -> tuple[Tensor, Tensor, Tensor]:
    """signal and noise (steps + 1, n) along the grid, and h (steps, n), infinite where it ends at t = 0."""
    signal = process.schedule.signal[level:, list(times)].T
    noise = process.schedule.noise[level:, list(times)].T
    return signal, noise, (signal / noise).log().diff(dim=0)


def _look_back(forward: Tensor, h: Tensor) -> Tensor:
    """Weights of x0 and of the x0 before, (2, steps, n), of ``forward * D``; D is x0 in the first and last step."""
    half = torch.zeros_like(h)
    half[1:] = h[1:] / (2 * h[:-1])
    half[h.isinf()] = 0
    return torch.stack([forward * (1 + half), -forward * half])


def _lagrange(nodes: Sequence[int], j: int, t: Tensor) -> Tensor:
    """The polynomial that is 1 at node j and 0 at the others, at times t."""
    value = torch.ones_like(t, dtype=torch.float64)
    for i, node in enumerate(nodes):
        if i != j:
            value = value * (t - node) / (nodes[j] - node)
    return value
