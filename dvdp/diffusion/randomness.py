"""Random numbers as a function of what they are for.

No stream is ever continued: every draw starts from a seed derived from its purpose (the run's seed, the step, the
level, the image). So nothing depends on batching, on the number of workers or on an interruption.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dvdp.diffusion import philox


def derive_seed(*purpose: int | str) -> int:
    """A 63-bit seed from words and numbers, e.g. ``derive_seed(run_seed, "levels", block)``."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose."""
    return torch.Generator(device).manual_seed(derive_seed(*purpose))


class ImageNoise:
    """Standard normal noise for images number ``first`` .. ``first + count - 1`` of a seed, draw by draw.

    Every number is a function of the seed, the image, the draw, its place and the shape: the same in any batch, and on
    a CPU and any GPU up to the last bits of a logarithm, a sine and a cosine; see :mod:`dvdp.diffusion.philox`.
    (Training is not: it draws millions of numbers a step from torch's generators, which differ between a CPU and a GPU,
    and no two of its runs on different devices round alike anyway.)
    """

    def __init__(self, seed: int, first: int, count: int, device: torch.device | str = "cpu") -> None:
        keys = [derive_seed(seed, "image", first + i) for i in range(count)]
        # A GPU that is at work need not be waited for.
        self._keys = torch.tensor(keys, dtype=torch.int64).to(device, non_blocking=True)
        #: Number of the next draw.
        self.draw = 0

    def split(self, size: int) -> list[ImageNoise]:
        """The noise of at most ``size`` of these images each, from the next draw on."""
        parts = []
        for keys in self._keys.split(size):
            part = copy.copy(self)
            part._keys = keys
            parts.append(part)
        return parts

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(count, *shape): the next draw of every image."""
        size = math.prod(shape)
        numbers = philox.normal(self._keys, self.draw, math.ceil(size / philox.MULTIPLE) * philox.MULTIPLE)
        self.draw += 1
        return numbers[:, :size].reshape(len(numbers), *shape).to(dtype)
