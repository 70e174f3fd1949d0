"""Features of the real images, made once for each data set and extractor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dvdp import tensors
from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor, Images, file_sha256
from dvdp.evaluation.published import Statistics, write_statistics
from dvdp.files import write_atomically

#: Real images on either side of an anchor, at most: each costs another pass through the extractor.
ANCHOR_IMAGES = 5_000
#: Precision and recall look at the third neighbour beside the image itself.
FEWEST = 4
#: Changes whenever the file of features does.
KIND = "dvdp reference 1"
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
    anchors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores to read others by: {"halves" | "blurred" | "noised": {"samples", "references", "metrics"}}."""
    warnings: list[str] = field(default_factory=list)
    sha256: str = ""
    """Of the file of features, whose header holds all that they depend on."""

    def identity(self) -> dict[str, Any]:
        """All that the features depend on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("anchors", "sha256", "warnings")}


class RealFeatures(NamedTuple):
    """Of real images."""

    rows: Tensor
    """(n, f)"""
    statistics: Statistics
    """Of these rows."""


def make_reference(
    images: Images, digest: str, extractor: Extractor, out: Path, kid_subset: int = 100, gpu: bool = False
) -> Reference:
    """Write features and statistics of the real images, ``features.safetensors``, and then ``reference.json``.

    The anchors say how to read scores. They compare two disjoint halves of the real images, of at most 5000 each:
    as they are (the noise floor), and with the first half blurred or noised.

    Args:
        digest: of the data set.
        out: their folder.

    Raises:
        UserError: too few images, or images of another resolution than the extractor's.
    """
    from dvdp.evaluation.fidelity import LIBRARY

    if len(images) < 2 * FEWEST:
        raise UserError(
            f"dataset: found {len(images)} images, expected at least {2 * FEWEST} for a reference; add images."
        )
    out, real = Path(out), _Pictures(images)
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
    rows, statistics = _real_features(real, extractor, gpu, "reference")
    anchors = _anchors(real, digest, extractor, kid_subset, gpu)
    frechet, floor = next(iter(anchors["halves"]["metrics"].items()))
    remarks = [
        f"{frechet} of {title} real images is {anchors[title]['metrics'][frechet]:.3g}, no more than {floor:.3g} of"
        " untouched ones: this extractor does not see that, or the images are too few."
        for title in ("blurred", "noised")
        if anchors[title]["metrics"][frechet] <= floor
    ]
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)

    arrays = {"mu": torch.from_numpy(statistics.mu), "sigma": torch.from_numpy(statistics.sigma)}
    content = tensors.pack(KIND, reference.identity(), {"features": rows, **arrays})
    digest = hashlib.sha256(content).hexdigest()
    reference = dataclasses.replace(reference, anchors=anchors, warnings=remarks, sha256=digest)
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
    path = Path(folder) / FILE
    about, arrays = tensors.read(path, KIND, "reference", AGAIN)
    if about != reference.identity():
        raise _changed(path)
    return RealFeatures(arrays["features"], Statistics(arrays["mu"].numpy(), arrays["sigma"].numpy()))


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

    return compare(features_of(samples, extractor, gpu, title), *real, extractor.name, kid_subset)


def _real_features(images: Dataset, extractor: Extractor, gpu: bool, title: str) -> RealFeatures:
    from dvdp.evaluation.fidelity import features_of, statistics_of

    rows = features_of(images, extractor, gpu, title).pooled
    return RealFeatures(rows, statistics_of(rows))


def _anchors(real: Dataset, digest: str, extractor: Extractor, kid_subset: int, gpu: bool) -> dict[str, dict[str, Any]]:
    count = len(real)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=generator("anchors", digest)).tolist()
    half = min(count // 2, ANCHOR_IMAGES)
    first, second = Subset(real, order[:half]), Subset(real, order[half : 2 * half])
    against = _real_features(second, extractor, gpu, "second half")
    anchors = {}
    for title, change in (("halves", None), ("blurred", _blurred), ("noised", _noised)):
        images = _Altered(first, change) if change else first
        metrics = measure(images, against, extractor, min(kid_subset, half), gpu, title)
        anchors[title] = {"samples": half, "references": half, "metrics": metrics}
    return anchors


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
