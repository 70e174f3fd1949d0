"""The classes that a model is conditional on."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dvdp.diffusion.randomness import derive_seed
from dvdp.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; a label is the number of one, -1 for none."""

    counts: Sequence[int]
    """Images of each class, then those without one."""
    names: Sequence[str] = ()

    @staticmethod
    def of(num_classes: int, description: Mapping[str, Any]) -> Classes | None:
        """From what is stored with a model; None for an unconditional one, of ``num_classes`` 0.

        Raises:
            UserError: the description has no counts, or those of another number of classes.
        """
        if not num_classes:
            return None
        counts = [int(count) for count in description.get("label_counts", [])]
        if len(counts) != num_classes + 1 or not any(counts):
            raise UserError(
                f"model.num_classes: found {num_classes} and label counts {counts} with the model, expected one for"
                " each class, then that of images without one, as `dvdp prepare` counts them; give them, or use 0"
                " classes."
            )
        return Classes(counts, description.get("labels", []))

    def draw(self, seed: int, first: int, count: int) -> Tensor:
        """Labels (count,) of images number ``first`` .. ``first + count - 1`` of a seed, as frequent as in the data.

        Image i draws from (seed, i) alone, like its noise.
        """
        bounds = list(accumulate(self.counts))
        drawn = [bisect(bounds, derive_seed(seed, "label", first + i) % bounds[-1]) for i in range(count)]
        return torch.tensor([-1 if label == len(bounds) - 1 else label for label in drawn], dtype=torch.long)

    def label(self, name: str) -> int:
        """The label of a class that the data set has images of; UserError if there is none of this name."""
        known = [known for known, count in zip(self.names, self.counts, strict=False) if count]
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none, as the model does not name its classes"
            raise UserError(f"label: found '{name}'{did_you_mean(name, known)}, expected {expected}.")
        return list(self.names).index(name)
