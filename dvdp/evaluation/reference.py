"""Features of the real images, made once for each data set and extractor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor, Images, file_sha256
from dvdp.evaluation.published import write_statistics
from dvdp.files import write_atomically

#: Real images on either side of an anchor, at most: each costs another pass through the extractor.
ANCHOR_IMAGES = 5_000
#: Precision and recall look at the third neighbour beside the image itself.
FEWEST = 4


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
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the cached features and statistics."""

    @property
    def cache_name(self) -> str:
        """Holds everything the features depend on: torch-fidelity looks its cache up by nothing else."""
        identity = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("anchors", "files", "warnings")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.extractor}-{self.count}x{self.resolution}px-{digest[:32]}"


def make_reference(
    images: Images, digest: str, extractor: Extractor, out: Path, kid_subset: int = 100, gpu: bool = False
) -> Reference:
    """Features and statistics of the real images in torch-fidelity's cache, and ``reference.json``, written last.

    The anchors say how to read scores. They compare two disjoint halves of the real images, of at most 5000 each:
    as they are (the noise floor), and with the first half blurred or noised.

    Args:
        digest: of the data set.
        out: the folder of the cache and of ``reference.json``; what other references left there is removed.

    Raises:
        UserError: too few images, or images of another resolution than the extractor's.
    """
    from dvdp.evaluation.fidelity import LIBRARY, remember

    if len(images) < 2 * FEWEST:
        raise UserError(
            f"dataset: found {len(images)} images, expected at least {2 * FEWEST} for a reference; add images."
        )
    out, real = Path(out), _Pictures(images)
    resolution = real[0].shape[-1]
    if extractor.resolution not in (None, resolution):
        raise UserError(
            f"extractor: found one trained on {extractor.resolution} px images for a data set of {resolution} px, expected the"
            " same resolution; run `dvdp extractor` again."
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
    name = reference.cache_name

    remember(real, extractor, (out, name), gpu)
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

    files = {path.name: file_sha256(path) for path in sorted(out.glob(f"{name}-*.pt"))}
    reference = dataclasses.replace(reference, anchors=anchors, files=files, warnings=remarks)
    write_atomically(out / "reference.json", json.dumps(dataclasses.asdict(reference), indent=2) + "\n")
    for path in out.glob("*.pt"):
        if path.name not in files:
            path.unlink()
    return reference


def read_reference(folder: Path) -> Reference:
    """The reference that :func:`make_reference` wrote into ``folder``.

    Raises:
        UserError: it is missing, damaged or none of ours.
    """
    path = Path(folder) / "reference.json"
    again = "run `dvdp reference` again."
    if not path.is_file():
        raise UserError(f"reference: found no file '{path}', expected the description of a reference; {again}")
    try:
        reference = Reference(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"reference: found '{path}', which describes none, expected one of ours; {again}") from None
    # torch-fidelity unpickles these files: only those that make_reference wrote may get there.
    found = {file.name: file_sha256(file) for file in path.parent.glob(f"{reference.cache_name}-*.pt")}
    if not found or found != reference.files:
        raise UserError(
            f"reference: found features in '{folder}' that are missing or changed, expected those that"
            f" '{path.name}' describes; {again}"
        )
    return reference


def export_statistics(reference: Path, out: Path) -> None:
    """Write a reference's mean and covariance as the ``.npz`` file that others read.

    Raises:
        UserError: the reference is missing or damaged, or ``out`` does not end in .npz.
    """
    from dvdp.evaluation.fidelity import statistics

    real = read_reference(reference)
    write_statistics(out, statistics((Path(reference), real.cache_name), real.extractor))


def _anchors(real: Dataset, digest: str, extractor: Extractor, kid_subset: int, gpu: bool) -> dict[str, dict[str, Any]]:
    from dvdp.evaluation.fidelity import measure, remember

    count = len(real)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=generator("anchors", digest)).tolist()
    half = min(count // 2, ANCHOR_IMAGES)
    first, second = Subset(real, order[:half]), Subset(real, order[half : 2 * half])
    anchors = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = (Path(folder), "second half")
        remember(second, extractor, cache, gpu, "second half")
        for title, change in (("halves", None), ("blurred", _blurred), ("noised", _noised)):
            images = _Altered(first, change) if change else first
            metrics = measure(images, cache, extractor, min(kid_subset, half), gpu, title)
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
