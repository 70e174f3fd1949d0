"""Group norm with what follows it as operators of torch, for GPUs: torch's own has no kernel for channels last.

Torch runs them by :mod:`dvdp.models.norm_kernels`; autograd, ``torch.compile`` and tensors without numbers know them by
their shapes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dvdp.errors import UserError

#: Arguments of the operators.
SCHEMA = "(Tensor x, Tensor weight, Tensor bias, Tensor? modulation, int groups, float eps, bool silu)"
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? modulation, Tensor mean, Tensor rstd, int groups,"
    " bool silu)"
)


@torch.library.custom_op("dvdp::group_norm_silu", mutates_args=(), schema=f"{SCHEMA} -> (Tensor, Tensor, Tensor)")
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``silu(norm(x) (1 + scale) + shift)`` of (B, C, h, w) in channels last, and (B, C) mean and 1 / deviation.

    Args:
        weight, bias: (C,) of the norm, in fp32.
        modulation: (B, 2 C), scale and shift; rows may lie apart.
        silu: or without it.
    """
    return _kernels().forward(_channels_last(x), weight, bias, modulation, groups, eps, silu)


@torch.library.custom_op(
    "dvdp::group_norm_silu_backward", mutates_args=(), schema=f"{BACKWARD_SCHEMA} -> (Tensor, Tensor, Tensor, Tensor)"
)
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and modulation, which is empty where there is none."""
    return _kernels().backward(
        _channels_last(dy), _channels_last(x), weight, bias, modulation, mean, rstd, groups, silu
    )


def _kernels() -> ModuleType:
    try:
        from dvdp.models import norm_kernels
    except ModuleNotFoundError:
        raise UserError(
            "cluster.gpu: found a GPU and no Triton, expected the one that torch for Linux comes with; install it"
            " (`pip install triton`), or set cluster.gpu to false."
        ) from None
    return norm_kernels


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@group_norm_silu.register_fake
def _(x: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@group_norm_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, *_rest: Any) -> Any:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dmodulation = x.new_empty((0,) if modulation is None else modulation.shape)
    return dx, torch.empty_like(weight), torch.empty_like(bias), dmodulation


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, modulation, ctx.groups, _, ctx.silu = inputs
    # Mean and deviation have no gradients, which would be made of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, modulation, *output[1:])


def _backward(ctx: Any, dy: Tensor, *_statistics: Any) -> tuple[Any, ...]:
    x, weight, bias, modulation, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dmodulation = group_norm_silu_backward(
        dy, x, weight, bias, modulation, mean, rstd, ctx.groups, ctx.silu
    )
    return dx, dweight, dbias, None if modulation is None else dmodulation, None, None, None


group_norm_silu.register_autograd(_backward, setup_context=_save)
