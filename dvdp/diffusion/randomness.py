"""Random numbers as a function of what they are for.

No stream is ever continued: every draw starts from a seed derived from its purpose (the run's seed, the step, the
rank, the image). So nothing depends on batching, on the number of workers or on an interruption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*purpose: int | str) -> int:
    """A 63-bit seed from words and numbers, e.g. ``derive_seed(run_seed, "levels", block)``."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose."""
    return torch.Generator(device).manual_seed(derive_seed(*purpose))


#: Numbers that a GPU draws at once for an image, as filling fewer would take a launch for every image and step.
AHEAD = 2**18


class ImageNoise:
    """Standard normal noise for images number ``first`` .. ``first + count - 1`` of a seed.

    Image i draws from (seed, i) alone, so it is the same in any batch and on any worker of one kind: a CPU and
    a GPU draw differently.

    Args:
        ahead: numbers of an image that are drawn at once, at least those of one draw; by default :data:`AHEAD` on a GPU
            and 0 on a CPU, which gains nothing by it.
    """

    def __init__(
        self, seed: int, first: int, count: int, device: torch.device | str = "cpu", ahead: int | None = None
    ) -> None:
        self._generators = [generator(seed, "image", first + i, device=device) for i in range(count)]
        self._device = torch.device(device)
        self._ahead = (0 if self._device.type == "cpu" else AHEAD) if ahead is None else ahead
        self._drawn: list[Tensor] = []

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(count, *shape): the next draw of every image; what was drawn ahead in another shape or type is dropped."""
        if not self._drawn or self._drawn[-1].shape[1:] != torch.Size(shape) or self._drawn[-1].dtype != dtype:
            # Before the next block, so that there are never two.
            self._drawn = []
            draws = max(1, self._ahead // math.prod(shape))
            block = torch.empty((len(self._generators), draws, *shape), dtype=dtype, device=self._device)
            for row, source in zip(block, self._generators, strict=True):
                row.normal_(generator=source)
            self._drawn = list(reversed(block.unbind(1)))
        return self._drawn.pop()
