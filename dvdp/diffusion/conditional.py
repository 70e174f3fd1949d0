"""What is known of the images that are drawn, as constraints of :func:`dvdp.diffusion.sampling.sample`.

Each function returns a :data:`~dvdp.diffusion.sampling.Constraint`, which replaces in a predicted clean image what is
known of it and leaves the rest to the denoiser (its projection on what is known, as in DDNM, Wang et al. 2023). So all
solvers keep it at every level, and the last step returns images that have it.

Known tensors are of n images, or of one for all of them; they are at full size but for :func:`known_bands`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dvdp.diffusion.bands import scale, to_level, up
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import ImageNoise, derive_seed
from dvdp.diffusion.sampling import Constraint
from dvdp.errors import UserError

#: Of red, green and blue in what an eye takes for brightness (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def known_bands(coarse: Tensor, level: int, clip: bool = True) -> Constraint:
    """Super-resolution: ``D^level x`` is known, and with it all bands from ``level`` on.

    Args:
        coarse: (n, C, H / 2^level, W / 2^level), pixels in [-2^level, 2^level].
        clip: detail is made smaller where it would leave the pixel range.
    """

    def constrain(x0: Tensor, at: int, places: slice) -> Tensor:
        known = _of(coarse, places).to(x0)
        if at >= level:
            return to_level(known, at - level).expand_as(x0)
        halvings = level - at
        base = _enlarge(known, halvings)
        detail = x0 - _enlarge(to_level(x0, halvings), halvings)
        if not clip:
            return base + detail
        size = 2**halvings
        above, below = (_enlarge(F.max_pool2d(each, size), halvings) * size for each in (detail, -detail))
        return base + _share_within(base, above, below, 2.0**at) * detail

    return constrain


def known_pixels(images: Tensor, known: Tensor) -> Constraint:
    """Inpainting: some pixels are known; at level k those of whose 2^k x 2^k pixels all are.

    Args:
        images: (n, C, H, W) in [-1, 1].
        known: (n, 1, H, W), true where a pixel is known.
    """

    def constrain(x0: Tensor, at: int, places: slice) -> Tensor:
        unknown = F.max_pool2d((~_of(known, places)).to(x0), 2**at) > 0
        return torch.where(unknown, x0, to_level(_of(images, places).to(x0), at))

    return constrain


def known_luminance(grey: Tensor, weights: tuple[float, ...] = LUMINANCE, clip: bool = True) -> Constraint:
    """Colourisation: a weighted mean over the channels is known of every pixel.

    Args:
        grey: (n, 1, H, W) in [-1, 1].
        weights: of the channels, each at least 0, 1 in sum.
        clip: colour is made paler where it would leave the pixel range.
    """

    def constrain(x0: Tensor, at: int, places: slice) -> Tensor:
        known = to_level(_of(grey, places).to(x0), at)
        of_channel = torch.tensor(weights, dtype=x0.dtype, device=x0.device)[:, None, None]
        missing = known - (of_channel * x0).sum(dim=1, keepdim=True)
        # The nearest image with this mean, as its grey and a colour that does not move the mean.
        colour = x0 + of_channel / of_channel.square().sum() * missing - known
        if not clip:
            return known + colour
        above, below = (each.amax(dim=1, keepdim=True) for each in (colour, -colour))
        return known + _share_within(known, above, below, 2.0**at) * colour

    return constrain


def state_of_bands(
    process: Process, coarse: Tensor, level: int, count: int, seed: int = 0, first: int = 0
) -> tuple[Tensor, int] | None:
    """Where sampling may start when ``D^level x`` is known: the state at T_level, of that level, before the lift.

    All its bands are known there, so no step of ``level`` or above has anything to find out.

    Args:
        coarse: as in :func:`known_bands`.
        count: of images, number ``first`` on of a seed.

    Returns:
        For ``start`` of :func:`dvdp.diffusion.sampling.sample`; None where the process has no such level.
    """
    if not 1 <= level <= process.levels:
        return None
    t = process.schedule.turning_points[level - 1]
    source = ImageNoise(derive_seed(seed, "known bands"), first, count, coarse.device)
    signal, noise = process.signal_and_noise(t, level)
    return scale(coarse, signal) + scale(source.normal(coarse.shape[1:], coarse.dtype), noise), t


def timestep_of(strength: float, timesteps: int) -> int:
    """The timestep that image to image starts from: ``strength`` of all T, at least 1.

    Raises:
        UserError: the strength is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise UserError(
            f"strength: found {strength}, expected a number above 0 and at most 1, which starts from noise."
        )
    return max(1, round(strength * timesteps))


def _of(known: Tensor, places: slice) -> Tensor:
    return known if len(known) == 1 else known[places]


def _enlarge(x: Tensor, levels: int) -> Tensor:
    for _ in range(levels):
        x = up(x)
    return x


def _share_within(base: Tensor, above: Tensor, below: Tensor, limit: float) -> Tensor:
    """The largest share, up to 1, of changes by up to ``above`` and ``-below`` that keeps ``base`` within the limit."""
    least = torch.finfo(base.dtype).tiny
    shares = ((limit - base) / above.clamp(min=least), (limit + base) / below.clamp(min=least))
    return torch.minimum(*shares).clamp(0, 1)
