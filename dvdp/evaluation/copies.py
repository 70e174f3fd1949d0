"""Which generated images are copies of training images.

The *closeness* of an image is the distance to the nearest training image over that to the :data:`NEIGHBOURS`-th
nearest (after Carlini et al. 2023, section 5.1, who divide by a mean): about as large for every new image, however
plain it is, and near zero for a copy. It is measured twice: in pixels of thumbnails, which noise and compression
hardly change, and in the features of the extractor. How close real images are to each other is known: each is left
out in turn. A sample is taken for a copy where it is closer than all but :data:`FALSE_ALARMS` of those, in either
measure. Where a data set has many images twice, real images are close, and only what is closer still is found.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor
from torch.utils.data import Dataset

from dvdp.diffusion.randomness import generator
from dvdp.evaluation.records import ScoreRecord

#: An image's distances are divided by that to the training image of this rank; fewer where there are few images.
NEIGHBOURS = 50
#: Pixels of a thumbnail's side.
SIDE = 16
#: Share of new images that each of the two measures takes for copies.
FALSE_ALARMS = 0.0025
#: Real images that are left out in turn, at most.
_LEFT_OUT = 4000
#: Chance that the false alarms among the images of one model are taken for copies.
_SIGNIFICANCE = 0.01
_ROWS = 500
#: In place of a threshold of zero, where the data set has images twice.
_LEAST = 1e-6
#: Of :meth:`Copies.table`. Images are numbered from 0, training images as the prepared data set has them.
HEADINGS = "sample,nearest in pixels,closeness in pixels,nearest in features,closeness in features,copy"


class Pair(NamedTuple):
    """A generated image and the nearest training images, of a line of the table."""

    sample: int
    in_pixels: int
    closeness_in_pixels: float
    in_features: int
    closeness_in_features: float
    copy: bool


#: Of squared lengths: what rounding may leave of the squared distance of equal images.
_ROUNDING = 1e-5


class Nearest(NamedTuple):
    """The nearest training image of each of n images."""

    places: Tensor
    """(n,) among the training images."""
    closeness: Tensor
    """(n,) 0 for an equal image, at most 1."""
    threshold: float
    """At and below it an image is taken for a copy."""

    @property
    def copies(self) -> Tensor:
        """(n,) bool."""
        return self.closeness <= self.threshold


@dataclass(frozen=True)
class Copies:
    """What two measures say of n generated images."""

    pixels: Nearest
    features: Nearest

    @property
    def found(self) -> Tensor:
        """(n,) bool: the images taken for copies."""
        return self.pixels.copies | self.features.copies

    def table(self) -> str:
        """One line for each image, closest first, as CSV; closeness as a share of each measure's threshold."""
        shares = [each.closeness / max(each.threshold, _LEAST) for each in (self.pixels, self.features)]
        places = [each.places.tolist() for each in (self.pixels, self.features)]
        found = self.found.tolist()
        lines = [
            f"{i},{places[0][i]},{shares[0][i]:.4g},{places[1][i]},{shares[1][i]:.4g},{int(found[i])}"
            for i in torch.minimum(*shares).argsort(stable=True).tolist()
        ]
        return "\n".join([HEADINGS, *lines]) + "\n"


def read_pairs(table: Path, count: int) -> list[Pair]:
    """The closest ``count`` of a written table."""
    with table.open(newline="") as lines:
        rows = [*itertools.islice(csv.reader(lines), 1, count + 1)]
    return [Pair(int(a), int(b), float(c), int(d), float(e), f == "1") for a, b, c, d, e, f in rows]


class Seen(Dataset):
    """Images, uint8 (3, h, h), whose thumbnails, area means of up to :data:`SIDE` pixels, are kept when read."""

    def __init__(self, images: Dataset) -> None:
        self.images = images
        #: uint8 (n, 3, s, s), whole once all images were read.
        self.thumbnails = torch.empty(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        side = min(SIDE, image.shape[-1])
        if not len(self.thumbnails):
            self.thumbnails = torch.empty(len(self), 3, side, side, dtype=torch.uint8)
        self.thumbnails[index] = F.adaptive_avg_pool2d(image.float(), side).round().to(torch.uint8)
        return image


def find_copies(small: Tensor, features: Tensor, real_small: Tensor, real_features: Tensor) -> Copies:
    """Look for the nearest training images of generated ones.

    Training images count mirrored too where pixels are compared, as most are trained on both ways.

    Args:
        small: thumbnails of the generated images, (n, 3, s, s); see :class:`Seen`.
        features: theirs, (n, f).
        real_small: thumbnails of the training images, (m, 3, s, s), m >= 3.
        real_features: theirs, (m, f).
    """
    both = [[images.flatten(1), images.flip(-1).flatten(1)] for images in (small, real_small)]
    return Copies(
        pixels=_nearest(both[0], both[1]),
        features=_nearest([features], [real_features]),
    )


def false_alarms(real: int) -> float:
    """The share of new images that are taken for copies of so many real ones, at most."""
    chosen = min(real, _LEFT_OUT)
    return min(1.0, 2 * _rank(chosen) / (chosen + 1))


def surely_copies(record: ScoreRecord) -> bool:
    """Whether more samples are taken for copies than false alarms explain; False where nobody has looked."""
    found = round(record.metrics.get("copies", 0) * record.samples)
    return bool(binom.sf(found - 1, record.samples, false_alarms(record.references)) < _SIGNIFICANCE)


def copies_sentence(record: ScoreRecord) -> str:
    """What was found, for people."""
    if "copies" not in record.metrics:
        return "Nobody has looked whether some of its images are copies of training images."
    found = round(record.metrics["copies"] * record.samples)
    said = (
        f"{found:,} of {record.samples:,} samples are taken for copies of training images, where false alarms are up to"
        f" {100 * false_alarms(record.references):.1f} %."
    )
    return said if surely_copies(record) else f"No sign of copies: {said}"


def _rank(chosen: int) -> int:
    """Of the real image that is the threshold among those left out, closest first."""
    return max(1, math.floor(FALSE_ALARMS * (chosen + 1)))


def _nearest(points: Sequence[Tensor], real: Sequence[Tensor]) -> Nearest:
    """Of images in one measure, each given in all forms in which it may have been copied."""
    count = len(real[0])
    chosen = torch.randperm(count, generator=generator("left out", count))[:_LEFT_OUT]
    _, known = _closeness([form[chosen] for form in real], real[0], chosen)
    places, closeness = _closeness(points, real[0])
    return Nearest(places, closeness, float(known.kthvalue(_rank(len(chosen))).values))


def _closeness(forms: Sequence[Tensor], real: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places of the nearest images and closeness.

    Args:
        own: the place of each point among the real images, which is passed over.
    """
    # Around the mean the squares are small, and little of a difference is lost to rounding.
    mean = real.float().mean(0)
    real = real.float() - mean
    squares = real.square().sum(1)
    rank = max(2, min(NEIGHBOURS, len(real) // 4))
    places, closeness = [], []
    for first in range(0, len(forms[0]), _ROWS):
        distances = torch.stack([_squared(form[first : first + _ROWS].float() - mean, real, squares) for form in forms])
        squared = distances.amin(0)
        if own is not None:
            squared[torch.arange(len(squared)), own[first : first + _ROWS]] = math.inf
        found = squared.topk(rank, largest=False)
        nearest = found.values.sqrt()
        places.append(found.indices[:, 0])
        # Where all distances are zero, nothing can be told from them.
        closeness.append(torch.where(nearest[:, -1] > 0, nearest[:, 0] / nearest[:, -1].clamp(min=1e-12), 1.0))
    return torch.cat(places), torch.cat(closeness)


def _squared(points: Tensor, real: Tensor, squares: Tensor) -> Tensor:
    """(n, m) squared distances; zero for equal images."""
    lengths = squares + points.square().sum(1, keepdim=True)
    found = torch.addmm(lengths, points, real.T, alpha=-2)
    return found.masked_fill_(found <= _ROUNDING * lengths, 0)
