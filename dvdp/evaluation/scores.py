"""Scores of generated images against a reference, and the record of all that they depend on.

``make_reference`` runs once per data set and extractor; ``score`` compares samples with it, ``score_published`` with
statistics that others publish. All figures are torch-fidelity's, which is imported when the first score is made, or
equal to them (:mod:`dvdp.evaluation.coverage`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor, Images, file_sha256
from dvdp.evaluation.extrapolation import counts_for, extrapolate
from dvdp.evaluation.published import Published, Statistics, write_statistics
from dvdp.files import write_atomically
from dvdp.randomness import generator

#: Below this many samples a ``fid`` does not compare with published ones.
INCEPTION_SAMPLES = 10_000
#: Real images on either side of an anchor, at most: each costs another pass through the extractor.
ANCHOR_IMAGES = 5_000
#: Precision and recall look at the third neighbour beside the image itself.
FEWEST = 4

#: What records from before these could be chosen were made with.
_EARLIER = {"spacing": "uniform", "share": "length", "lift": "noise", "classes": 0}
#: What a sampling mapping says that two comparable scores may differ in.
_INCIDENTAL = ("seed", "batch", "count", "first")


def write_shard(path: Path, images: Tensor) -> None:
    """Write generated images, uint8 (n, 3, side, side), as a file of :class:`SampleShards`, atomically."""
    content = io.BytesIO()
    np.save(content, images.cpu().numpy())
    write_atomically(path, content.getvalue())


class SampleShards(Dataset):
    """Generated images in files ``<first image, 8 digits>.npy``, uint8 (n, 3, side, side), in image order.

    The files are mapped, not read: what is in memory is the images asked for.

    Args:
        shards: their folder, or the files.

    Raises:
        UserError: there are none, one is no such array, or they leave a gap or overlap.
    """

    def __init__(self, shards: Path | Sequence[Path]) -> None:
        paths = sorted(Path(shards).glob("*.npy")) if isinstance(shards, Path) else sorted(shards)
        if not paths:
            raise UserError(f"samples: found no .npy files in '{shards}', expected generated images; sample first.")
        self._arrays = [_open_shard(path) for path in paths]
        starts = np.cumsum([0, *(len(array) for array in self._arrays)])
        for path, start in zip(paths, starts, strict=False):
            if path.stem != f"{start:08d}":
                raise UserError(
                    f"samples: found '{path}' where image {start} should follow, expected a file"
                    f" '{start:08d}.npy'; sample the missing images again."
                )
        sides = {array.shape[-1] for array in self._arrays}
        if len(sides) > 1:
            raise UserError(
                f"samples: found sides {sorted(sides)} px in '{paths[0].parent}', expected one;"
                " remove the files of another run."
            )
        self._starts = starts
        self.side: int = sides.pop()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (3, side, side)."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return torch.from_numpy(np.array(self._arrays[shard][index - self._starts[shard]]))


@dataclass(frozen=True)
class ScoreRecord:
    """A score, with all that it depends on."""

    metrics: dict[str, float]
    """E.g. ``fd_labels``, ``kd_labels``, ``kd_labels_std``, ``precision_labels``, ``recall_labels``, ``is_labels``,
    ``fd_labels_infinity``."""
    extractor: str
    extractor_sha256: str
    samples: int
    references: int
    """Real images; 0 where a file of statistics does not say."""
    reference_digest: str
    """Of the data set that the references were made from; ``npz <SHA-256>`` for a file of statistics."""
    preprocessing: str
    side: int
    """Of samples and references, in pixels."""
    kid_subset: int
    """0 where there is no KID."""
    library: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """Where the samples come from: EMA profile, rule, steps, seed, ..."""
    warnings: list[str] = field(default_factory=list)
    counts: list[dict[str, float]] = field(default_factory=list)
    """What ``.._infinity`` is extrapolated from: ``{"samples", "distance"}`` each, the headline's last."""

    @property
    def headline(self) -> str:
        """The metric that ranks, lower is better: the Frechet distance (``fid``, ``fd_labels``, ``fd_rotation``)."""
        distances = [name for name in self.metrics if name == "fid" or name.startswith("fd_")]
        return next(name for name in distances if "_infinity" not in name)

    def to_json(self) -> str:
        """The record as text; :meth:`from_json` gives back an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "score") -> ScoreRecord:
        """A record from its text.

        Args:
            source: names the text in errors, e.g. its path.

        Raises:
            UserError: the text is no record.
        """
        try:
            return ScoreRecord(**json.loads(text))
        except (json.JSONDecodeError, TypeError):
            raise UserError(
                f"{source}: found something else than a score record, expected the JSON that"
                " `dvdp evaluate` writes; evaluate again."
            ) from None


def comparable(a: ScoreRecord, b: ScoreRecord) -> list[str]:
    """The fields in which two records disagree in what matters; empty if their scores may be compared."""
    # Everything a score depends on, but where the samples come from, which is looked at key by key.
    outcome = ("metrics", "sampling", "warnings", "counts")
    names = [entry.name for entry in dataclasses.fields(a) if entry.name not in outcome]
    different = [name for name in names if getattr(a, name) != getattr(b, name)]
    # Records of other releases may hold more or fewer metrics beside the one that ranks.
    if a.headline != b.headline:
        different.append("metrics")
    keys = sorted((a.sampling.keys() | b.sampling.keys()) - set(_INCIDENTAL))
    first, second = ({**_EARLIER, **record.sampling} if record.sampling else {} for record in (a, b))
    return different + [f"sampling.{key}" for key in keys if first.get(key) != second.get(key)]


@dataclass(frozen=True)
class Reference:
    """What the features of the real images depend on, and what they say about scores."""

    extractor: str
    extractor_sha256: str
    features: int
    data_digest: str
    count: int
    """Real images."""
    side: int
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
        return f"{self.extractor}-{self.count}x{self.side}px-{digest[:32]}"


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
        UserError: too few images, or images of another side than the extractor's.
    """
    from dvdp.evaluation.fidelity import LIBRARY, remember

    if len(images) < 2 * FEWEST:
        raise UserError(
            f"dataset: found {len(images)} images, expected at least {2 * FEWEST} for a reference; add images."
        )
    out, real = Path(out), _Pictures(images)
    side = real[0].shape[-1]
    if extractor.side not in (None, side):
        raise UserError(
            f"extractor: found one trained on {extractor.side} px images for a data set of {side} px, expected the"
            " same side; run `dvdp extractor` again."
        )
    reference = Reference(
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        features=extractor.features,
        data_digest=digest,
        count=len(images),
        side=side,
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


def score(
    samples: Path | Sequence[Path],
    reference: Path,
    extractor: Extractor,
    count: int | None = None,
    kid_subset: int = 100,
    sampling: Mapping[str, Any] | None = None,
    gpu: bool = False,
) -> ScoreRecord:
    """Score the first ``count`` generated images against a reference. It repeats to the bit.

    With samples enough, the record also has the Frechet distance of infinitely many, see
    :mod:`dvdp.evaluation.extrapolation`.

    Args:
        samples: as :class:`SampleShards` takes them.
        reference: the folder that :func:`make_reference` wrote; nothing in it is changed.
        extractor: the one the reference was made with.
        count: all of them by default.
        sampling: EMA profile, rule, steps, seed, ...: kept in the record.

    Raises:
        UserError: fewer images than asked for, a KID subset larger than either set, images of another side than the
            reference's, a reference that is missing, damaged or made with another extractor.
    """
    from dvdp.evaluation.fidelity import LIBRARY, compare, features_of, statistics

    real = read_reference(reference)
    made_with = (real.extractor, real.extractor_sha256, real.library)
    wanted = (extractor.name, extractor.sha256, LIBRARY)
    if made_with != wanted:
        raise UserError(
            f"reference: found '{reference}' made with {' '.join(made_with)}, expected {' '.join(wanted)};"
            " run `dvdp reference` again."
        )
    images = _first(SampleShards(samples), count, real.side, f"'{reference}'")
    if kid_subset > min(len(images), real.count):
        raise UserError(
            f"evaluation.kid_subset: found {kid_subset}, expected at most {min(len(images), real.count)}, the smaller"
            f" of {len(images)} samples and {real.count} references; take smaller subsets or more images."
        )
    cache = (Path(reference), real.cache_name)
    features = features_of(images, extractor, gpu)
    record = ScoreRecord(
        metrics=compare(features, cache, extractor, kid_subset),
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        samples=len(images),
        references=real.count,
        reference_digest=real.data_digest,
        preprocessing=extractor.preprocessing,
        side=real.side,
        kid_subset=kid_subset,
        library=LIBRARY,
        sampling=_plain(sampling),
        warnings=_remarks(extractor, len(images), real.count),
    )
    return _extrapolated(record, features, statistics(cache, extractor.name), extractor)


def score_published(
    samples: Path | Sequence[Path],
    published: Published,
    extractor: Extractor,
    count: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    gpu: bool = False,
) -> ScoreRecord:
    """The Frechet distance alone, to statistics that others publish; see :func:`score` for the arguments.

    Args:
        published: from :func:`dvdp.evaluation.published.read_statistics`. How its images were prepared cannot be
            checked: the record says so, and names the file, so that it compares with no score against another.

    Raises:
        UserError: fewer images than asked for, or of a side that the extractor does not take.
    """
    from dvdp.evaluation.fidelity import LIBRARY, distance, features_of, frechet_name

    shards = SampleShards(samples)
    images = _first(shards, count, extractor.side or shards.side, "the extractor's training images")
    features = features_of(images, extractor, gpu)
    record = ScoreRecord(
        metrics={frechet_name(extractor.name): distance(features, published.statistics, extractor)},
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        samples=len(images),
        references=0,
        reference_digest=published.digest,
        preprocessing=extractor.preprocessing,
        side=shards.side,
        kid_subset=0,
        library=LIBRARY,
        sampling=_plain(sampling),
        warnings=[*_remarks(extractor, len(images)), published.warning],
    )
    return _extrapolated(record, features, published.statistics, extractor)


def export_statistics(reference: Path, out: Path) -> None:
    """Write a reference's mean and covariance as the ``.npz`` file that others read.

    Raises:
        UserError: the reference is missing or damaged, or ``out`` does not end in .npz.
    """
    from dvdp.evaluation.fidelity import statistics

    real = read_reference(reference)
    write_statistics(out, statistics((Path(reference), real.cache_name), real.extractor))


def _first(shards: SampleShards, count: int | None, side: int, where: str) -> Subset:
    """The images to score, checked."""
    count = len(shards) if count is None else count
    if shards.side != side:
        raise UserError(
            f"samples: found images of {shards.side} px, expected {side} px as in {where};"
            " score them against a reference of their own data set."
        )
    if count > len(shards):
        raise UserError(
            f"evaluation.samples: found {count}, expected at most {len(shards)}, the number of images sampled;"
            " sample more or score fewer."
        )
    if count < FEWEST:
        raise UserError(f"evaluation.samples: found {count}, expected at least {FEWEST}; score more images.")
    return Subset(shards, range(count))


def _extrapolated(
    record: ScoreRecord, features: dict[str, Tensor], real: Statistics, extractor: Extractor
) -> ScoreRecord:
    """The record with the distance of infinitely many samples, if there are enough to tell; says its warnings."""
    from dvdp.evaluation.fidelity import distances

    for remark in record.warnings:
        warnings.warn(remark, stacklevel=3)
    counts = counts_for(record.samples, extractor.features)
    if not counts:
        return record
    name = record.headline
    found = {**distances(features, real, extractor, counts[:-1]), record.samples: record.metrics[name]}
    line = extrapolate(found)
    return dataclasses.replace(
        record,
        metrics={**record.metrics, f"{name}_infinity": line.infinity, f"{name}_infinity_error": line.error},
        counts=[{"samples": count, "distance": value} for count, value in found.items()],
    )


def _plain(sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(sampling or {})))
    return found


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


def _remarks(extractor: Extractor, samples: int, references: int | None = None) -> list[str]:
    found = []
    for what, number in (("samples", samples), ("references", references)):
        if number is not None and number < extractor.features:
            found.append(
                f"{number} {what} are fewer than the extractor's {extractor.features} features:"
                " the Frechet distance says little."
            )
    if extractor.name == "inception" and samples < INCEPTION_SAMPLES:
        found.append(f"fid of {samples} samples, fewer than {INCEPTION_SAMPLES}, compares with no published one.")
    return found


def _open_shard(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"samples: found '{path}', which is no whole .npy file, expected one; sample again.") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3 or array.shape[2] != array.shape[3]:
        raise UserError(
            f"samples: found {array.dtype} {array.shape} in '{path}', expected uint8 (n, 3, side, side); sample again."
        )
    return array


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
