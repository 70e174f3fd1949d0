"""Features of the real images, made once for each data set and extractor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dvdp import tensors
from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.copies import Seen
from dvdp.evaluation.extractors import Extractor, Images, file_sha256
from dvdp.evaluation.published import Statistics, write_statistics
from dvdp.files import write_atomically

if TYPE_CHECKING:
    from dvdp.evaluation.fidelity import Features

#: Real images that are blurred and noised, at most: each costs two more passes through the extractor.
ALTERED_IMAGES = 5_000
#: Of real images that are held out, for the mean and the spread of their scores.
DRAWS = 5
#: Precision and recall look at the third neighbour beside the image itself.
FEWEST = 4
#: Changes whenever the file of features does.
KIND = "dvdp reference 3"
FILE = "features.safetensors"
AGAIN = "run `dvdp reference` again"


@dataclass(frozen=True)
class Reference:
    """What the features of the real images depend on, and what they say about scores."""

    extractor: str
    extractor_sha256: str
    features: int
    data_digest: str
    count: int
    """Real images."""
    resolution: int
    preprocessing: str
    library: str
    warnings: list[str] = field(default_factory=list)
    sha256: str = ""
    """Of the file of features, whose header holds all that they depend on."""

    def identity(self) -> dict[str, Any]:
        """All that the features depend on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("sha256", "warnings")}


class RealFeatures(NamedTuple):
    """Of real images."""

    rows: Tensor
    """(n, f)"""
    statistics: Statistics
    """Of these rows."""
    thumbnails: Tensor
    """(n, 3, s, s), see :class:`dvdp.evaluation.copies.Seen`."""


@dataclass(frozen=True)
class Anchor:
    """What real images score: a mark to read other scores by."""

    samples: int
    """That play the generated ones, in each draw."""
    references: int
    """All other real images of the data set, which they are compared with."""
    draws: int
    metrics: dict[str, float]
    """Means over draws."""
    spreads: dict[str, float]
    """Standard deviations over draws; none for one."""


def make_reference(images: Images, digest: str, extractor: Extractor, out: Path, gpu: bool = False) -> Reference:
    """Write features and statistics of the real images, ``features.safetensors``, and then ``reference.json``.

    Beside them stand thumbnails of all images, to find copies, and the features of some of the images blurred and
    noised, for :func:`anchors`.

    Args:
        digest: of the data set.
        out: their folder.

    Raises:
        UserError: too few images, or images of another resolution than the extractor's.
    """
    from dvdp.evaluation.fidelity import LIBRARY, features_of, statistics_of

    if len(images) < 2 * FEWEST:
        raise UserError(
            f"dataset: found {len(images)} images, expected at least {2 * FEWEST} for a reference; add images."
        )
    out, real = Path(out), Seen(_Pictures(images))
    resolution = real[0].shape[-1]
    if extractor.resolution not in (None, resolution):
        raise UserError(
            f"extractor: found one trained on {extractor.resolution} px images for a data set of {resolution} px,"
            " expected the same resolution; run `dvdp extractor` again."
        )
    reference = Reference(
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        features=extractor.features,
        data_digest=digest,
        count=len(images),
        resolution=resolution,
        preprocessing=extractor.preprocessing,
        library=LIBRARY,
    )
    found = features_of(real, extractor, gpu, "reference")
    altered = _order(reference)[: min(len(images) // 2, ALTERED_IMAGES)]
    arrays = {"features": found.pooled, "logits": found.logits, "thumbnails": real.thumbnails, "altered": altered}
    for title, change in (("blurred", _blurred), ("noised", _noised)):
        changed = features_of(_Altered(Subset(real, altered.tolist()), change), extractor, gpu, title)
        arrays |= {title: changed.pooled, f"{title} logits": changed.logits}
    remarks = list(_unseen(arrays, extractor.name))
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)

    own = statistics_of(found.pooled)
    arrays |= {"mu": torch.from_numpy(own.mu), "sigma": torch.from_numpy(own.sigma)}
    content = tensors.pack(KIND, reference.identity(), arrays)
    digest = hashlib.sha256(content).hexdigest()
    reference = dataclasses.replace(reference, warnings=remarks, sha256=digest)
    write_atomically(out / FILE, content)
    write_atomically(out / "reference.json", json.dumps(dataclasses.asdict(reference), indent=2) + "\n")
    return reference


def read_reference(folder: Path) -> Reference:
    """The reference that :func:`make_reference` wrote into ``folder``.

    Raises:
        UserError: it is missing, damaged or none of ours.
    """
    path = Path(folder) / "reference.json"
    if not path.is_file():
        raise UserError(f"reference: found no file '{path}', expected the description of a reference; {AGAIN}.")
    try:
        reference = Reference(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"reference: found '{path}', which describes none, expected one of ours; {AGAIN}.") from None
    features = path.with_name(FILE)
    if not features.is_file() or file_sha256(features) != reference.sha256:
        raise _changed(features)
    return reference


def read_features(folder: Path, reference: Reference) -> RealFeatures:
    """The features that :func:`make_reference` wrote into ``folder``.

    Raises:
        UserError: they are not those that ``reference`` describes.
    """
    arrays = _arrays(folder, reference)
    own = Statistics(arrays["mu"].numpy(), arrays["sigma"].numpy())
    return RealFeatures(arrays["features"], own, arrays["thumbnails"])


def anchors(folder: Path, samples: int, kid_subset: int) -> dict[str, Anchor]:
    """What so many real images score, held out of the others: as they are ("real"), "blurred" and "noised".

    No generated images can be expected to score better than real ones of their number. Where the data set has too few,
    half of it is held out; of blurred and noised ones there are at most 5000, and one draw.

    Args:
        folder: the reference's.
        samples: of the scores that are to be read by them.
        kid_subset: as for the scores, but at most as many as are held out.

    Raises:
        UserError: the reference is missing or damaged.
    """
    from dvdp.evaluation.fidelity import Features

    reference = read_reference(folder)
    arrays = _arrays(folder, reference)
    count, altered = min(samples, reference.count // 2), arrays["altered"]
    real = Features(arrays["features"], arrays["logits"])

    def anchor(draws: Iterable[tuple[Features, Tensor]]) -> Anchor:
        return _anchor(real.pooled, draws, reference.extractor, kid_subset)

    orders = [_order(reference, draw)[:count] for draw in range(DRAWS)]
    found = {"real": anchor((Features(real.pooled[order], real.logits[order]), order) for order in orders)}
    for title in ("blurred", "noised"):
        changed = Features(arrays[title][:count], arrays[f"{title} logits"][:count])
        found[title] = anchor([(changed, altered[:count])])
    return found


def _anchor(rows: Tensor, draws: Iterable[tuple[Features, Tensor]], extractor: str, kid_subset: int) -> Anchor:
    """Of features of real images, altered or not, and their places among all ``rows``, draw by draw."""
    from dvdp.evaluation.fidelity import compare, statistics_of

    found = []
    for held_out, places in draws:
        others = _without(rows, places)
        size = min(kid_subset, len(places))
        found.append(compare(held_out, others, statistics_of(others), extractor, size))
    values = {name: [metrics[name] for metrics in found] for name in found[0]}
    return Anchor(
        samples=len(places),
        references=len(others),
        draws=len(found),
        metrics={name: statistics.mean(each) for name, each in values.items()},
        spreads={name: statistics.stdev(each) for name, each in values.items() if len(each) > 1},
    )


def _unseen(arrays: dict[str, Tensor], extractor: str) -> Iterable[str]:
    """A remark on each change of the images that the extractor does not see."""
    from dvdp.evaluation.fidelity import distance, frechet_name, statistics_of

    rows, altered = arrays["features"], arrays["altered"]
    others = statistics_of(_without(rows, altered))
    floor = distance(rows[altered], others)
    for title in ("blurred", "noised"):
        found = distance(arrays[title], others)
        if found <= floor:
            yield (
                f"{frechet_name(extractor)} of {title} real images is {found:.3g}, no more than {floor:.3g} of"
                " untouched ones: this extractor does not see that, or the images are too few."
            )


def _order(reference: Reference, draw: int = 0) -> Tensor:
    """All images in an order of the draw's own; the first are held out."""
    return torch.randperm(reference.count, generator=generator("anchors", reference.data_digest, draw))


def _without(rows: Tensor, places: Tensor) -> Tensor:
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[places] = False
    return rows[kept]


def _arrays(folder: Path, reference: Reference) -> dict[str, Tensor]:
    """The content of the features' file."""
    path = Path(folder) / FILE
    about, arrays = tensors.read(path, KIND, "reference", AGAIN)
    if about != reference.identity():
        raise _changed(path)
    return arrays


def _changed(path: Path) -> UserError:
    return UserError(
        f"reference: found '{path}' missing or changed, expected the features that 'reference.json' beside it"
        f" describes; {AGAIN}."
    )


def export_statistics(folder: Path, out: Path) -> None:
    """Write the mean and covariance of the reference in ``folder`` as the ``.npz`` file that others read.

    Raises:
        UserError: the reference is missing or damaged, or ``out`` does not end in .npz.
    """
    write_statistics(out, read_features(folder, read_reference(folder)).statistics)


def measure(
    samples: Dataset, real: RealFeatures, extractor: Extractor, kid_subset: int, gpu: bool = False, title: str = "score"
) -> dict[str, float]:
    """What :func:`dvdp.evaluation.fidelity.compare` says of the features of these images."""
    from dvdp.evaluation.fidelity import compare, features_of

    return compare(features_of(samples, extractor, gpu, title), real.rows, real.statistics, extractor.name, kid_subset)


class _Pictures(Dataset):
    """The images of a data set without their labels, as uint8 tensors."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index][0]))


class _Altered(Dataset):
    def __init__(self, images: Subset, change: Callable[[Tensor, int], Tensor]) -> None:
        self.images = images
        self.change = change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        changed = self.change(self.images[index].float(), index)
        return changed.round().clamp(0, 255).to(torch.uint8)


def _blurred(image: Tensor, index: int) -> Tensor:
    """Mean of 3 x 3 pixels."""
    return F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)


def _noised(image: Tensor, index: int) -> Tensor:
    """With white noise, a tenth of the pixel range in standard deviation."""
    return image + 25.5 * torch.randn(image.shape, generator=generator("anchor noise", index))
