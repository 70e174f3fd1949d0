"""How much signal and how much noise each band holds at each timestep.

A :class:`Schedule` is two tables. With them the forward process is (eqs. 5, 6)

    x_t = sum_i signal[i, t] v_i + noise[i, t] z_i

where ``v_i`` is band i of the clean image (see :mod:`dvdp.diffusion.bands`) and ``z`` is standard normal. DDPM,
subspace diffusion and DVDP are three ways to fill the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvdp.diffusion.spans import level_shares, level_spans
from dvdp.errors import UserError, did_you_mean


@dataclass(frozen=True, eq=False)
class Schedule:
    """Signal and noise of K+1 bands over T timesteps.

    Attributes:
        signal: (K+1, T+1) float64, the paper's lambda-bar; column 0 is clean data (1).
        noise: (K+1, T+1) float64, the paper's sigma-bar; column 0 is clean data (0).
        turning_points: T_1 < .. < T_K, where the state halves its resolution.

    Raises:
        UserError: unless 0 < T_1 < .. < T_K < T, signal > 0, noise > 0 from t = 1 on, and signal / noise falls
            strictly in every band. The last is what makes eq. 7 a Markov chain.
    """

    signal: Tensor
    noise: Tensor
    turning_points: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        K, T = len(self.turning_points), self.timesteps
        level_spans(self.turning_points, T)
        if self.signal.shape != (K + 1, T + 1) or self.noise.shape != (K + 1, T + 1):
            raise UserError(
                f"schedule: found tables of shape {tuple(self.signal.shape)} and {tuple(self.noise.shape)},"
                f" expected one row for each of the {K + 1} bands."
            )
        if self.signal.dtype != torch.float64 or self.noise.dtype != torch.float64:
            raise UserError("schedule: the tables must be float64.")
        if not (self.signal > 0).all():
            raise UserError("schedule: some signal is not above 0; raise schedule.floor or schedule.shift.")
        if not ((self.signal[:, 0] == 1).all() and (self.noise[:, 0] == 0).all()):
            raise UserError("schedule: column 0 must be clean data, signal 1 and noise 0.")
        if not (self.noise[:, 1:] > 0).all():
            raise UserError("schedule: some noise after t = 0 is not above 0; lower schedule.shift.")
        ratio = self.signal[:, 1:] / self.noise[:, 1:]
        if not (ratio.diff(dim=1) < 0).all():
            raise UserError(
                "schedule: signal / noise must fall strictly with t in every band; bring schedule.shift nearer 0."
            )

    @property
    def timesteps(self) -> int:
        """T."""
        return self.signal.shape[1] - 1

    @property
    def levels(self) -> int:
        """K, the number of turning points; levels are numbered 0 .. K."""
        return len(self.turning_points)

    def span(self, level: int) -> tuple[int, int]:
        """(T_k, T_{k+1}): the state lives at ``level`` for T_k < t <= T_{k+1}."""
        return level_spans(self.turning_points, self.timesteps)[level]

    def shares(self) -> list[float]:
        """The share of timesteps that each level holds, finest level first."""
        return level_shares(self.turning_points, self.timesteps)

    @staticmethod
    def ddpm(timesteps: int = 1000, base: str = "linear", shift: float = 0.0) -> Schedule:
        """Denoising diffusion (Ho et al. 2020): one band, no turning point. See :func:`alpha_bar`."""
        return Schedule.subspace((), timesteps, base, shift)

    @staticmethod
    def subspace(
        turning_points: Sequence[int], timesteps: int = 1000, base: str = "linear", shift: float = 0.0
    ) -> Schedule:
        """Subspace diffusion (Jing et al. 2022), discrete, as the paper compares with it (Sec. 5.3).

        Every band is attenuated alike, so what a turning point drops still holds signal.
        """
        abar = alpha_bar(timesteps, base, shift).expand(len(turning_points) + 1, -1)
        return Schedule(abar.sqrt(), (1 - abar).sqrt(), tuple(turning_points))

    @staticmethod
    def dvdp(
        turning_points: Sequence[int],
        timesteps: int = 1000,
        base: str = "linear",
        shift: float = 0.0,
        attenuation: str = "cosine",
        floor: float = 0.1,
    ) -> Schedule:
        """The dimensionality-varying process: band i is attenuated to nearly nothing at T_{i+1}, then dropped.

        ``signal[i, t] = sqrt(abar_t) a_i(t)``, where ``a_i`` falls from 1 at t = 0 to ``floor`` at T_{i+1} and
        ``a_K = 1``; ``noise[i, t] = sqrt(1 - abar_t)`` in all bands, so that the noise stays white at every level.

        Args:
            attenuation: the shape of the fall, a key of :data:`ATTENUATIONS`.
            floor: the "controllable" residue of a band's signal at its turning point, in (0, 1].
        """
        if not 0 < floor <= 1:
            raise UserError(f"floor: found {floor}, expected a number above 0 and at most 1.")
        if attenuation not in ATTENUATIONS:
            raise UserError(
                f"attenuation: found '{attenuation}'{did_you_mean(attenuation, ATTENUATIONS)},"
                f" expected one of {', '.join(ATTENUATIONS)}."
            )
        abar = alpha_bar(timesteps, base, shift)
        t = torch.arange(timesteps + 1, dtype=torch.float64)
        fall = ATTENUATIONS[attenuation]
        signal = [
            abar.sqrt() * (floor + (1 - floor) * fall((t / max(turning_point, 1)).clamp(max=1)))
            for turning_point in turning_points
        ]
        return Schedule(
            torch.stack([*signal, abar.sqrt()]),
            (1 - abar).sqrt().expand(len(turning_points) + 1, -1),
            tuple(turning_points),
        )


#: The fall of a band's signal from 1 to 0 as its part of the way to the turning point goes from 0 to 1.
ATTENUATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda part: torch.where(part < 1, (math.pi / 2 * part).cos(), 0.0),
    "squared_cosine": lambda part: torch.where(part < 1, (math.pi / 2 * part).cos().square(), 0.0),
    "circular": lambda part: (1 - part.square()).sqrt(),
    "linear": lambda part: 1 - part,
}


def alpha_bar(timesteps: int = 1000, base: str = "linear", shift: float = 0.0) -> Tensor:
    """alpha-bar: the squared signal of the base schedule, (T+1,) float64, from 1 at t = 0 towards 0.

    The paper's eq. 2 prints alpha where this is meant, the product of all (1 - beta) up to t.

    Args:
        timesteps: T.
        base: ``"linear"``: beta from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020), scaled so that other T of
            100 or more end alike. ``"cosine"``: Nichol & Dhariwal 2021, with beta at most 0.999.
        shift: added to the log-SNR, in nats; ``2 log(64 / resolution)`` is the resolution shift of *simple diffusion*
            (Hoogeboom et al. 2023).
    """
    if timesteps < 1:
        raise UserError(f"timesteps: found {timesteps}, expected a whole number of at least 1.")
    if base == "linear":
        beta = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * (1000 / timesteps)
        beta = beta.clamp(max=0.999)
    elif base == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        curve = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    else:
        raise UserError(
            f"base: found '{base}'{did_you_mean(base, ['linear', 'cosine'])}, expected 'linear' or 'cosine'."
        )
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    if shift == 0:
        return abar
    return torch.cat([abar[:1], torch.sigmoid(torch.logit(abar[1:]) + shift)])
