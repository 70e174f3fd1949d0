"""The dimensionality-varying process itself: one equation, one method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dvdp.diffusion import bands
from dvdp.diffusion.bands import Pyramid
from dvdp.diffusion.schedule import Schedule
from dvdp.errors import UserError

Variance = Literal["fixed_small", "fixed_large"]

#: (signal, noise, level) -> tables of factors, one for each image that is combined: of (T+1, n) all, in float64.
Factors = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]


class StepCoefficients(NamedTuple):
    """A reverse step, linear per band: ``x_s = x * x_t + x0 * clean + z * standard normal``.

    Each is (..., n), n bands of the level, finest first, float64.
    """

    x: Tensor
    x0: Tensor
    z: Tensor


class Process:
    """Forward and reverse equations on states that shrink at the turning points of a schedule.

    Throughout, a state of level k has resolution H / 2^k and K - k + 1 bands, and one call handles one level. ``t`` is an
    int or an integer tensor (B,). Where ``t`` is a tensor, passing ``level`` avoids a device synchronisation.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._tables: dict[tuple[Factors, int, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

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
                f"image resolution: found {resolution}, expected a multiple of {2**self.levels} for {self.levels} turning"
                " points; resize the images or use fewer turning points."
            )

    def factors(self, of: Factors, t: int | Tensor, level: int, like: Tensor) -> tuple[Tensor, ...]:
        """What the bands of a level are multiplied by at ``t``, for :func:`dvdp.diffusion.bands.combine`.

        Args:
            of: makes the tables, once for each level, type and device; a function of a module, not made for the call.
            like: of which type and where.

        Returns:
            For each image (n,) or (B, n), finest band first; (1,) or (B, 1) where all bands have the same.
        """
        key = (of, level, like.device, like.dtype)
        if key not in self._tables:
            # Noise that is white, as all our schedules have it, stays one number for all bands.
            signal, noise = (bands.merge(table[level:].T) for table in (self.schedule.signal, self.schedule.noise))
            self._tables[key] = tuple(table.to(like) for table in of(signal, noise, level))
        return tuple(table[t] for table in self._tables[key])

    def diffuse(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given clean images (5, 6).

        Args:
            x0: (B, C, H, W) clean images at full size, in [-1, 1].
            t: timesteps of one level.
            noise: (B, C, H / 2^k, W / 2^k) standard normal; its size says the level.
        """
        level = (x0.shape[-1] // noise.shape[-1]).bit_length() - 1
        return self.state(bands.to_level(x0, level), t, noise, level)

    def state(self, clean: Tensor | Pyramid, t: int | Tensor, noise: Tensor, level: int) -> Tensor:
        """x_t from the clean image of a level (5, 6), which :meth:`diffuse` halves first."""
        of_clean, of_noise = self.factors(_state, t, level, noise)
        return bands.combine((clean, of_clean), (noise, of_noise))

    def predict_clean(self, x: Tensor | Pyramid, t: int | Tensor, eps: Tensor, level: int | None = None) -> Tensor:
        """The clean image of the state's level that a predicted noise implies (10)."""
        of_x, of_eps = self.factors(_clean_from_noise, t, self.level(t) if level is None else level, eps)
        return bands.combine((x, of_x), (eps, of_eps))

    def predict_noise(self, x: Tensor | Pyramid, t: int | Tensor, x0: Tensor, level: int | None = None) -> Tensor:
        """The noise that a clean image of the state's level implies; the inverse of :meth:`predict_clean`."""
        of_x, of_x0 = self.factors(_noise_from_clean, t, self.level(t) if level is None else level, x0)
        return bands.combine((x, of_x), (x0, of_x0))

    def posterior(self, t: Tensor, s: Tensor, level: int, variance: Variance = "fixed_small") -> StepCoefficients:
        """q(x_s | x_t, x_0) per band, from t to any s < t of the same level (8, 9).

        With ``l = signal_t / signal_s`` and ``n2 = noise_t^2 - l^2 noise_s^2``: mean
        ``(l noise_s^2 / noise_t^2) x_t + (signal_s n2 / noise_t^2) x_0``, variance ``noise_s^2 n2 / noise_t^2``
        (the lower choice; the upper one is ``n2``). A step to s = 0 returns x_0.
        """
        signal_t, noise_t = self._bands(t, level)
        signal_s, noise_s = self._bands(s, level)
        ratio = signal_t / signal_s
        n2 = noise_t.square() - ratio.square() * noise_s.square()
        lower = noise_s.square() * n2 / noise_t.square()
        chosen = lower if variance == "fixed_small" else torch.where(noise_s > 0, n2, 0.0)
        return StepCoefficients(
            x=ratio * noise_s.square() / noise_t.square(),
            x0=signal_s * n2 / noise_t.square(),
            z=chosen.sqrt(),
        )

    def implicit(self, t: Tensor, s: Tensor, level: int, eta: float = 0.0) -> StepCoefficients:
        """DDIM (Song et al. 2021) per band: ``signal_s x_0 + sqrt(noise_s^2 - v) eps + sqrt(v) z``.

        ``v`` is eta^2 times the lower variance of :meth:`posterior`, and eps is what x_t and x_0 imply.
        """
        signal_t, noise_t = self._bands(t, level)
        signal_s, noise_s = self._bands(s, level)
        deviation = eta * self.posterior(t, s, level).z
        along = (noise_s.square() - deviation.square()).clamp(min=0).sqrt() / noise_t
        return StepCoefficients(x=along, x0=signal_s - along * signal_t, z=deviation)

    def lift(self, x: Tensor, level: int, noise: Tensor, data_std: float = 0.0) -> Tensor:
        """From a state of ``level`` at T_level to one of ``level - 1`` at the same time (11).

        ``x^{k-1} = D^T x^k + d (z - D^T D z)`` with ``d = noise[k-1, T_k]``: the band that comes back is pure noise.
        With a data deviation, ``d^2 = noise^2 + signal^2 data_std^2`` is the variance that the band has in the
        forward process (eq. 9 of Jing et al., *Subspace Diffusion Generative Models*).

        Args:
            x: (B, C, h, w), the state at the level being left.
            noise: (B, C, 2h, 2w) standard normal.
            data_std: of the band that comes back, per coefficient.
        """
        turning_point = self.schedule.turning_points[level - 1]
        signal = self.schedule.signal[level - 1, turning_point].item()
        deviation = math.hypot(self.schedule.noise[level - 1, turning_point].item(), signal * data_std)
        return bands.up(x) + deviation * bands.detail(noise)

    def _bands(self, t: Tensor, level: int) -> tuple[Tensor, Tensor]:
        return self.schedule.signal[level:, t].movedim(0, -1), self.schedule.noise[level:, t].movedim(0, -1)


def _state(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``x = signal clean + noise eps``."""
    return signal, noise


def _clean_from_noise(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``clean = (x - noise eps) / signal``."""
    return 1 / signal, -noise / signal


def _noise_from_clean(signal: Tensor, noise: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """``eps = (x - signal clean) / noise``; infinite at t = 0, where nobody asks."""
    return 1 / noise, -signal / noise
