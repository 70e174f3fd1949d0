"""Normal numbers by counter: any of them can be had without those before it, and alike on a CPU and on every GPU.

Block b of a draw is Philox 4x64-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011) of the key
``(key, 0)`` and the counter ``(b + 1, draw, 0, 0)``, lowest word first: what ``numpy.random.Philox`` gives. Each block
has eight 32-bit numbers, low halves of its words before high ones. A draw of 2 m normal numbers takes the first m of
these for radii and the next m for angles (Box and Muller): numbers i and m + i are the sine and the cosine of the i-th
angle, times the i-th radius.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Radii and angles are whole blocks, so that a kernel needs no part of one.
MULTIPLE = 16


def normal(keys: Tensor, draw: int, size: int) -> Tensor:
    """(n, size) standard normal float32 on the device of the keys; a row depends on its key, the draw and the size.

    CUDA with Triton makes all rows in one launch. Any other device, and CUDA without Triton, gets a copy of what the
    CPU makes. The two agree up to the last bits of logarithm, sine and cosine.

    Args:
        keys: (n,) int64, from 0 on.
        draw: its number, 0 to 2^31 - 1.
        size: a multiple of :data:`MULTIPLE`.
    """
    return torch.ops.dvdp.normal(keys, draw, size)


def _on_cpu(keys: Tensor, draw: int, size: int) -> Tensor:
    x = _uniform(keys.tolist(), draw, size)
    radius, angle = x.chunk(2, dim=1)
    # Of 2^-32 to 1, so that the logarithm is finite.
    radius.abs_().add_(2**-32).log_().mul_(-2).sqrt_()
    sine = angle.mul_(math.pi).sin()
    angle.cos_().mul_(radius)
    radius.mul_(sine)
    return x.to(keys.device)


def _on_cuda(keys: Tensor, draw: int, size: int) -> Tensor:
    try:
        from dvdp.diffusion import philox_cuda
    except ImportError:
        return _on_cpu(keys, draw, size)
    return philox_cuda.normal(keys, draw, size)


def _without_numbers(keys: Tensor, draw: int, size: int) -> Tensor:
    return keys.new_empty((len(keys), size), dtype=torch.float32)


def _uniform(keys: Sequence[int], draw: int, size: int) -> Tensor:
    """(len(keys), size) float32 of -1 to 1: the 32-bit numbers in their order, as signed ones."""
    source = np.random.Philox(0)
    # It reads tuples faster than arrays, and takes a new state in a tenth of the time that another Philox takes.
    state: Any = {**source.state, "buffer": (0,) * 4}
    words = np.empty((len(keys), size // 2), dtype=np.uint64)
    for row, key in enumerate(keys):
        state["state"] = {"counter": (0, draw, 0, 0), "key": (key, 0)}
        source.state = state
        words[row] = source.random_raw(size // 2)
    # As the machine stores a word, its low half comes first.
    return torch.from_numpy(words.view(np.int32)).to(torch.float32).mul_(2**-31)


torch.library.define("dvdp::normal", "(Tensor keys, int draw, int size) -> Tensor")
torch.library.impl("dvdp::normal", "default", _on_cpu)
torch.library.impl("dvdp::normal", "cuda", _on_cuda)
torch.library.register_fake("dvdp::normal", _without_numbers)
