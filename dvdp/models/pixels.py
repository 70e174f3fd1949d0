"""Between stored images and those that networks see."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0 .. 255, rounded; what lies outside is clipped. The inverse of :func:`to_float`."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
