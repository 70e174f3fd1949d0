"""The dimensionality-varying process: each function is one equation of the paper (see :mod:`dvdp`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dvdp.diffusion.bands import detail, scale, to_level, up
from dvdp.diffusion.schedule import Schedule
from dvdp.errors import UserError

Variance = Literal["fixed_small", "fixed_large"]


class StepCoefficients(NamedTuple):
    """A reverse step, linear per band: ``x_s = x * x_t + x0 * clean + z * standard normal``.

    Each is (..., n), n bands of the level, finest first, float64.
    """

    x: Tensor
    x0: Tensor
    z: Tensor


class Process:
    """Forward and reverse equations on states whose resolution is halved at the turning points of a schedule.

    Throughout, a state of level k has resolution H / 2^k and K - k + 1 bands, and one call handles one level. ``t`` is
    an int or an integer tensor (B,). Where ``t`` is a tensor, passing ``level`` avoids a device synchronisation.

    Args:
        band_std: std of the data's K + 1 bands per coefficient, finest first; :meth:`lift` uses them if they are given.

    Raises:
        UserError: ``band_std`` is not one number for each band.
    """

    def __init__(self, schedule: Schedule, band_std: Sequence[float] | None = None) -> None:
        self.schedule = schedule
        self.band_std = [0.0] * (self.levels + 1) if band_std is None else [float(std) for std in band_std]
        if len(self.band_std) != self.levels + 1:
            raise UserError(
                f"band_std: found {len(self.band_std)} numbers, expected one for each of {self.levels + 1} bands."
            )
        #: White noise, which all our schedules have, is the same in every band: one factor serves them all.
        self._white = bool((schedule.noise == schedule.noise[:1]).all())
        self._tables = {torch.device("cpu"): (schedule.signal, schedule.noise)}

    @property
    def levels(self) -> int:
        """K; levels are numbered 0 .. K."""
        return self.schedule.levels

    def level(self, t: int | Tensor) -> int:
        """The level k at which the state lives at ``t``: T_k < t <= T_{k+1}; clean data (t = 0) is at level 0.

        Raises:
            UserError: t is outside 0 .. T, or a tensor that spans several levels.
        """
        first, last = (t, t) if isinstance(t, int) else (int(t.min()), int(t.max()))
        if first < 0 or last > self.schedule.timesteps:
            raise UserError(f"t: found {first} to {last}, expected timesteps of 0 to {self.schedule.timesteps}.")
        levels = [sum(bound > T for T in self.schedule.turning_points) for bound in (first, last)]
        if levels[0] != levels[1]:
            raise UserError(f"t: found timesteps of levels {levels[0]} to {levels[1]}, expected one level a call.")
        return levels[0]

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError unless an image of this resolution can be halved K times."""
        if resolution % 2**self.levels:
            raise UserError(
                f"image resolution: found {resolution}, expected a multiple of {2**self.levels} for {self.levels}"
                " turning points; resize the images or use fewer turning points."
            )

    def signal_and_noise(
        self, t: int | Tensor, level: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """``signal[i, t]`` and ``noise[i, t]`` of a level's bands, each (n,) or (B, n), float64, finest band first.

        Where the noise is white it is (1,) or (B, 1).
        """
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = (self.schedule.signal.to(device), self.schedule.noise.to(device))
        signal, noise = (table[level:, t].movedim(0, -1) for table in self._tables[device])
        return signal, noise[..., :1] if self._white else noise

    def diffuse(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """``x_t = signal_t x0 + noise_t z`` (5, 6).

        Args:
            x0: (B, C, H, W) clean images at full size, in [-1, 1].
            t: timesteps of one level.
            noise: z, (B, C, H / 2^k, W / 2^k) standard normal; its size says the level.
        """
        level = (x0.shape[-1] // noise.shape[-1]).bit_length() - 1
        signal_t, noise_t = self.signal_and_noise(t, level, x0.device)
        return scale(to_level(x0, level), signal_t) + scale(noise, noise_t)

    def predict_clean(self, x: Tensor, t: int | Tensor, eps: Tensor, level: int | None = None) -> Tensor:
        """``x0 = (x_t - noise_t eps) / signal_t`` (10): the clean image of the state's level that the noise implies."""
        signal_t, noise_t = self.signal_and_noise(t, self.level(t) if level is None else level, x.device)
        return scale(x - scale(eps, noise_t), 1 / signal_t)

    def predict_noise(self, x: Tensor, t: int | Tensor, x0: Tensor, level: int | None = None) -> Tensor:
        """``eps = (x_t - signal_t x0) / noise_t``: the inverse of :meth:`predict_clean`, for t > 0."""
        signal_t, noise_t = self.signal_and_noise(t, self.level(t) if level is None else level, x.device)
        return scale(x - scale(x0, signal_t), 1 / noise_t)

    def posterior(self, t: Tensor, s: Tensor, level: int, variance: Variance = "fixed_small") -> StepCoefficients:
        """q(x_s | x_t, x_0) per band (10; 8 and 9 in general), from t to any s < t of the same level.

        With ``l = signal_t / signal_s`` and ``n2 = noise_t^2 - l^2 noise_s^2``: mean
        ``(l noise_s^2 / noise_t^2) x_t + (signal_s n2 / noise_t^2) x_0``, variance ``noise_s^2 n2 / noise_t^2``
        (``fixed_small``) or ``n2`` (``fixed_large``). A step to s = 0 returns x_0.
        """
        signal_t, noise_t = self.signal_and_noise(t, level)
        signal_s, noise_s = self.signal_and_noise(s, level)
        ratio = signal_t / signal_s
        n2 = noise_t.square() - ratio.square() * noise_s.square()
        small, large = noise_s.square() * n2 / noise_t.square(), torch.where(noise_s > 0, n2, 0.0)
        return StepCoefficients(
            x=ratio * noise_s.square() / noise_t.square(),
            x0=signal_s * n2 / noise_t.square(),
            z=(small if variance == "fixed_small" else large).sqrt(),
        )

    def ddim(self, t: Tensor, s: Tensor, level: int, eta: float = 0.0) -> StepCoefficients:
        """``signal_s x_0 + sqrt(noise_s^2 - v) eps + sqrt(v) z`` (DDIM, Song et al. 2021, eq. 12), per band.

        ``v`` is eta^2 times the small variance of :meth:`posterior`; eps is :meth:`predict_noise` of x_0.
        """
        signal_t, noise_t = self.signal_and_noise(t, level)
        signal_s, noise_s = self.signal_and_noise(s, level)
        std = eta * self.posterior(t, s, level).z
        eps = (noise_s.square() - std.square()).clamp(min=0).sqrt()
        return StepCoefficients(x=eps / noise_t, x0=signal_s - eps / noise_t * signal_t, z=std)

    def lift(self, x: Tensor, level: int, noise: Tensor) -> Tensor:
        """``x^{k-1} = D^T x^k + d (z - D^T D z)`` with ``d = noise[k-1, T_k]`` (11): the band that comes back is noise.

        With the data's ``band_std``, ``d^2 = noise^2 + signal^2 band_std^2``, the variance that the band has in the
        forward process (eq. 9 of Jing et al., *Subspace Diffusion Generative Models*).

        Args:
            x: (B, C, h, w), the state at T_k, of ``level`` k.
            noise: z, (B, C, 2h, 2w) standard normal.
        """
        band, turning_point = level - 1, self.schedule.turning_points[level - 1]
        signal, std = (table[band, turning_point].item() for table in (self.schedule.signal, self.schedule.noise))
        return up(x) + math.hypot(std, signal * self.band_std[band]) * detail(noise)
