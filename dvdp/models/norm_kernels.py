"""Group norm, scale and shift, and SiLU of channels-last images as one Triton kernel each way. Needs Triton.

A program has whole groups of one image: it reads them for their mean and deviation, and again for the result. In the
backward pass it reads them, and the gradient, for two sums a channel, and again for the gradient of the input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Channels that a program has at least, where there are so many: neighbours in memory, which are read together.
CHANNELS = 32
#: Numbers in registers at a time.
TILE = 4096
#: Channels of a program that adds up the gradients of weights.
PART = 64


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, modulation_ptr, mean_ptr, rstd_ptr, pixels, channels, stride, eps,
    SIZE: tl.constexpr, TAKEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """``y``, and mean and 1 / deviation of every channel's group."""
    image, channel, inside = _own(channels, TAKEN, WIDTH)
    # A value of the channel is taken off first, so that squares stay small where the mean is far from 0.
    first = tl.load(x_ptr + image * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32)
    sums, squares = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, pixels, ROWS):
        place, mask = _tile(start, pixels, image, channel, channels, inside, ROWS)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, x - first[None, :], 0.0)
        sums += off
        squares += off * off
    total, square = tl.sum(sums, 0), tl.sum(squares, 0)
    own_mean, own_square = first + total / pixels, square - total * total / pixels
    group = tl.arange(0, WIDTH) // SIZE
    same = (group[:, None] == group[None, :]) & inside[None, :]
    mean = tl.sum(tl.where(same, own_mean[None, :], 0.0), 1) / SIZE
    off = own_mean[None, :] - mean[:, None]
    variance = tl.sum(tl.where(same, own_square[None, :] + pixels * off * off, 0.0), 1) / (pixels * SIZE)
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_ptr + image * channels + channel, mean, mask=inside)
    tl.store(rstd_ptr + image * channels + channel, rstd, mask=inside)
    gain, offset = _affine(weight_ptr, bias_ptr, modulation_ptr, image, channel, channels, stride, inside, MODULATED)
    for start in range(0, pixels, ROWS):
        place, mask = _tile(start, pixels, image, channel, channels, inside, ROWS)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * rstd[None, :] * gain[None, :] + offset[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, bias_ptr, modulation_ptr, mean_ptr, rstd_ptr, sum_ptr, product_ptr,
    pixels, channels, stride,
    SIZE: tl.constexpr, TAKEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """``dx``; with dz what comes to the result before SiLU, the sums over pixels of dz and of dz times the norm."""
    image, channel, inside = _own(channels, TAKEN, WIDTH)
    mean = tl.load(mean_ptr + image * channels + channel, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + image * channels + channel, mask=inside, other=0.0)
    gain, offset = _affine(weight_ptr, bias_ptr, modulation_ptr, image, channel, channels, stride, inside, MODULATED)
    sums, products = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, pixels, ROWS):
        place, mask = _tile(start, pixels, image, channel, channels, inside, ROWS)
        normal, dz = _before_silu(x_ptr, dy_ptr, place, mask, mean, rstd, gain, offset, SILU)
        sums += dz
        products += dz * normal
    total, product = tl.sum(sums, 0), tl.sum(products, 0)
    tl.store(sum_ptr + image * channels + channel, total, mask=inside)
    tl.store(product_ptr + image * channels + channel, product, mask=inside)
    group = tl.arange(0, WIDTH) // SIZE
    same = (group[:, None] == group[None, :]) & inside[None, :]
    of_mean = tl.sum(tl.where(same, (gain * total)[None, :], 0.0), 1) / (pixels * SIZE)
    of_deviation = tl.sum(tl.where(same, (gain * product)[None, :], 0.0), 1) / (pixels * SIZE)
    for start in range(0, pixels, ROWS):
        place, mask = _tile(start, pixels, image, channel, channels, inside, ROWS)
        normal, dz = _before_silu(x_ptr, dy_ptr, place, mask, mean, rstd, gain, offset, SILU)
        dx = rstd[None, :] * (gain[None, :] * dz - of_mean[None, :] - normal * of_deviation[None, :])
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weights_kernel(
    sum_ptr, product_ptr, weight_ptr, bias_ptr, modulation_ptr, dweight_ptr, dbias_ptr, dmodulation_ptr,
    images, channels, stride, PART: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """Gradients of weight, bias, scale and shift, from the sums over pixels of each image."""
    channel = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = channel < channels
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    dweight, dbias = tl.zeros([PART], tl.float32), tl.zeros([PART], tl.float32)
    for image in range(images):
        total = tl.load(sum_ptr + image * channels + channel, mask=inside, other=0.0)
        product = tl.load(product_ptr + image * channels + channel, mask=inside, other=0.0)
        if MODULATED:
            place = image * 2 * channels + channel
            kind = dmodulation_ptr.dtype.element_ty
            scale = tl.load(modulation_ptr + image * stride + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(dmodulation_ptr + place, (weight * product + bias * total).to(kind), mask=inside)
            tl.store(dmodulation_ptr + place + channels, total.to(kind), mask=inside)
            dweight += (1 + scale) * product
            dbias += (1 + scale) * total
        else:
            dweight += product
            dbias += total
    tl.store(dweight_ptr + channel, dweight, mask=inside)
    tl.store(dbias_ptr + channel, dbias, mask=inside)


@triton.jit
def _own(channels, TAKEN: tl.constexpr, WIDTH: tl.constexpr):
    """The image and the channels of a program, and which of these there are."""
    lane = tl.arange(0, WIDTH)
    channel = tl.program_id(1) * TAKEN + lane
    return tl.program_id(0).to(tl.int64), channel, (lane < TAKEN) & (channel < channels)


@triton.jit
def _tile(start, pixels, image, channel, channels, inside, ROWS: tl.constexpr):
    """Places of the next pixels in memory, and which of them there are."""
    row = start + tl.arange(0, ROWS)
    place = (image * pixels + row)[:, None] * channels + channel[None, :]
    return place, (row < pixels)[:, None] & inside[None, :]


@triton.jit
def _affine(
    weight_ptr, bias_ptr, modulation_ptr, image, channel, channels, stride, inside, MODULATED: tl.constexpr
):  # fmt: skip
    """What the normalised channels are multiplied by, and what is added."""
    gain = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    offset = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if MODULATED:
        place = image * stride + channel
        scale = 1 + tl.load(modulation_ptr + place, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(modulation_ptr + place + channels, mask=inside, other=0.0).to(tl.float32)
        return gain * scale, offset * scale + shift
    return gain, offset


@triton.jit
def _before_silu(
    x_ptr, dy_ptr, place, mask, mean, rstd, gain, offset, SILU: tl.constexpr
):  # fmt: skip
    """The norm of a tile, and the gradient of what goes into SiLU."""
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * rstd[None, :]
    if SILU:
        z = normal * gain[None, :] + offset[None, :]
        half = tl.sigmoid(z)
        dz = dz * half * (1 + z * (1 - half))
    return normal, dz


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and (B, C) mean and 1 / deviation; x is channels last."""
    b, channels, h, w = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((b, channels), device=x.device) for _ in range(2))
    grid, sizes = _launch(b, channels, groups, modulation, silu)
    pointers = x, y, weight, bias, modulation if modulation is not None else weight, mean, rstd
    forward_kernel[grid](*pointers, h * w, channels, _rows_apart(modulation), eps, **sizes)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and modulation (empty without); dy and x are channels last."""
    b, channels, h, w = x.shape
    dx, sums, products = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    grid, sizes = _launch(b, channels, groups, modulation, silu)
    modulating = modulation if modulation is not None else weight
    pointers = dy, x, dx, weight, bias, modulating, mean, rstd, sums, products
    backward_kernel[grid](*pointers, h * w, channels, _rows_apart(modulation), **sizes)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dmodulation = x.new_empty((0,) if modulation is None else modulation.shape)
    weights_kernel[(triton.cdiv(channels, PART),)](
        sums, products, weight, bias, modulating, dweight, dbias, dmodulation, b, channels, _rows_apart(modulation),
        PART=PART, MODULATED=modulation is not None,
    )  # fmt: skip
    return dx, dweight, dbias, dmodulation


def _rows_apart(modulation: Tensor | None) -> int:
    return 0 if modulation is None else modulation.stride(0)


def _launch(
    images: int, channels: int, groups: int, modulation: Tensor | None, silu: bool
) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """Programs, and how much each of them has."""
    size = channels // groups
    taken = min(groups, max(1, CHANNELS // size)) * size
    width = triton.next_power_of_2(taken)
    sizes = {"SIZE": size, "TAKEN": taken, "WIDTH": width, "ROWS": max(1, TILE // width)}
    return (images, triton.cdiv(channels, taken)), {**sizes, "MODULATED": modulation is not None, "SILU": silu}
