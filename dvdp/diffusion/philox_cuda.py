"""The CUDA kernel of :func:`dvdp.diffusion.philox.normal`, in Triton, which only machines with a GPU import."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Blocks of a program, for radii and for angles each.
BLOCKS = 128


def normal(keys: Tensor, draw: int, size: int) -> Tensor:
    """See :func:`dvdp.diffusion.philox.normal`."""
    out = torch.empty((len(keys), size), dtype=torch.float32, device=keys.device)
    programs = (len(keys), triton.cdiv(size, 16 * BLOCKS))
    # Triton launches on the current device.
    with torch.cuda.device_of(out):
        if out.numel():
            # A CPU rounds between products and sums.
            normal_kernel[programs](out, keys, draw, size // 2, BLOCKS, enable_fp_fusion=False)
    return out


@triton.jit(do_not_specialize=["draw"])
def normal_kernel(out, keys, draw, half, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (i, j) makes the numbers of blocks ``j BLOCKS .. (j + 1) BLOCKS - 1`` in both halves of row i."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + row).to(tl.uint64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    radius = tl.sqrt_rn(-2 * tl.log(tl.abs(_uniform(key, draw, block)) + 2**-32))
    angle = _uniform(key, draw, block + half // 8) * math.pi
    column = tl.program_id(1) * BLOCKS * 8 + tl.arange(0, BLOCKS * 8)
    out += row * 2 * half
    tl.store(out + column, tl.sin(angle) * radius, mask=column < half)
    tl.store(out + half + column, tl.cos(angle) * radius, mask=column < half)


@triton.jit
def _uniform(key, draw, block):  # type: ignore[no-untyped-def]
    """(8 n,) float32 of -1 to 1, of n blocks."""
    zero = tl.full(block.shape, 0, tl.uint64)
    c0, c1, c2, c3 = (block + 1).to(tl.uint64), zero + draw.to(tl.uint64), zero, zero
    k0, k1 = key, key ^ key
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, zero + 0xD2E7470EE14C6C93), c0 * 0xD2E7470EE14C6C93
        high2, low2 = tl.umulhi(c2, zero + 0xCA5A826395121157), c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    numbers = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32))
    return tl.reshape(numbers, (8 * block.shape[0],)).to(tl.float32) * 2**-31
