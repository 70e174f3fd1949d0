"""Operations of the network, in the way that is fastest where they run; see docs/performance.md for what each saves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvdp.models import norms
from dvdp.models.layout import FEW_PIXELS


def convolve_doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(F.interpolate(x, scale_factor=2))`` of a padded 3x3 convolution, in 4/9 of the arithmetic.

    An output pixel sees 2x2 different inputs, not 3x3: those of a transposed convolution of stride 2.
    """
    # Every tap of the mirrored kernel falls on 2x2 pixels: sums of neighbours, 4x4 of them.
    weight = F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, weight.transpose(0, 1), conv.bias, stride=2, padding=1)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm(x)`` of (B, C, h, w), in the type of x; the norm's weights are in fp32."""
    return _on_gpu(x, norm, None, silu=False) if x.is_cuda else norm(x)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, modulation: Tensor | None = None) -> Tensor:
    """``silu(norm(x) * (1 + scale) + shift)`` of (B, C, h, w), in the type of x.

    Args:
        modulation: (B, 2 C), scale and shift; None for none.
    """
    if x.is_cuda:
        return _on_gpu(x, norm, modulation, silu=True)
    h = norm(x)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h)


def _on_gpu(x: Tensor, norm: nn.GroupNorm, modulation: Tensor | None, silu: bool) -> Tensor:
    return norms.group_norm_silu(x, norm.weight, norm.bias, modulation, norm.num_groups, norm.eps, silu)[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dot-product attention of (B, heads, channels, pixels) each -> the same shape."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] <= FEW_PIXELS:
        # In this precision the CPU's fused kernel takes two to three times as long, most of it backward.
        weights = ((q * q.shape[-2] ** -0.5).mT @ k).softmax(dim=-1)
        return v @ weights.mT
    # Fused kernels want the channels of a head side by side, as they are in channels last.
    q, k, v = (part.mT if part.stride(-2) == 1 else part.mT.contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).mT
