"""Classifier-free guidance (Ho & Salimans 2022), and what keeps guided images within their range.

A denoiser that was trained with ``training.label_dropout`` knows the noise with and without a label. A scale w mixes
them to ``(1 - w) eps_without + w eps_with``: 1 is no guidance, 0 the unconditional model. Levels may have scales of
their own; a guided step takes both halves in one batch of twice the images, and costs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dvdp.diffusion.process import Process
from dvdp.errors import UserError


def scale_by_level(scale: float | Sequence[float], levels: int) -> list[float]:
    """The scale of each of ``levels`` levels, finest first.

    Raises:
        UserError: a list has another length, or a scale is below 0.
    """
    scales = [float(scale)] * levels if isinstance(scale, int | float) else [float(each) for each in scale]
    if len(scales) != levels or not all(0 <= each < float("inf") for each in scales):
        raise UserError(
            f"guidance_scale: found {scale}, expected a number of at least 0, or one for each of {levels} levels,"
            " finest first."
        )
    return scales


def guided(
    denoiser: Callable[..., Tensor], process: Process, level: int, scale: float, rescale: float = 0.0
) -> Callable[..., Tensor]:
    """A class-conditional denoiser under guidance at a level; at a scale of 1 the denoiser itself.

    Args:
        rescale: phi of Lin et al. 2023 (*Common Diffusion Noise Schedules*, eqs. 14 to 16), 0 to 1: how far the
            predicted clean image is scaled to the std, over its pixels, of the one that the label alone predicts.
    """
    if scale == 1:
        return denoiser

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        none = torch.full_like(labels, -1)
        if scale == 0:
            return denoiser(x, t, none)
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([none, labels]))
        without, conditional = both.chunk(2)
        eps = (1 - scale) * without + scale * conditional
        if not rescale:
            return eps
        clean, wanted = (process.predict_clean(x, t, each, level) for each in (eps, conditional))
        ratio = _std(wanted) / _std(clean)
        return process.predict_noise(x, t, (1 - rescale + rescale * ratio) * clean, level)

    return predict


def threshold(x0: Tensor, quantile: float, limit: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, *Imagen*): a contrast above the range is scaled into it.

    Args:
        x0: predicted clean images (B, C, h, w).
        quantile: 0 to 1, of the sizes of an image's pixels, which is scaled to ``limit`` where it is above that; what
            is beyond it is clipped.
        limit: of the pixel range, 2^k at level k.
    """
    extent = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=limit)[:, None, None, None]
    return x0.clamp(-extent, extent) * (limit / extent)


def _std(images: Tensor) -> Tensor:
    return images.std(dim=(1, 2, 3), keepdim=True)
