"""The only module that knows torch-fidelity: images in, named metrics out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import (
    cache_lookup_group_recompute_all_on_any_miss,
    cache_lookup_one_recompute_on_miss,
    create_feature_extractor,
    get_featuresdict_from_dataset,
    resolve_feature_layer_for_metric,
)
from tqdm import tqdm

from dvdp.diffusion.randomness import generator
from dvdp.evaluation.coverage import precision_recall
from dvdp.evaluation.extractors import Extractor, load_network
from dvdp.evaluation.published import Statistics

LIBRARY = f"torch-fidelity {torch_fidelity.__version__}"

#: Fixed: convolutions of other batches differ in bits.
BATCH = 64
#: Parts of the samples that an inception score is the mean of (Salimans et al. 2016).
SPLITS = 10

_OWN = "dvdp-convnet"
_INCEPTION = "inception-v3-compat"


class OwnFeatures(torch_fidelity.FeatureExtractorBase):
    """The feature network of :mod:`dvdp.evaluation.extractors`, as torch-fidelity wants it."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.network, _info = load_network(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (n, 3, side, side) -> what was asked for of float64 (n, 64) features and (n, classes) logits.

        In float64, means and distances are exact.
        """
        features = self.network.features(images)
        found = {"pooled": features, "logits": self.network.head(features)}
        return tuple(found[name].double() for name in self.features_list)


if _OWN not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor(_OWN, OwnFeatures)


class _NeverRead(Dataset):
    """Stands for images whose features are in the cache."""

    def __len__(self) -> int:
        _missing()

    def __getitem__(self, index: int) -> Tensor:
        _missing()


def _missing() -> NoReturn:
    raise RuntimeError("the cached features were not found")


class _Shown(Dataset):
    """A data set that moves a progress bar as it is read in order."""

    def __init__(self, images: Dataset, bar: tqdm) -> None:
        self.images = images
        self.bar = bar

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bar.n:
            self.bar.update()
        return self.images[index]


def metric_names(extractor: str) -> dict[str, str]:
    """torch-fidelity's keys -> our names: ``fid``, ``kid`` and ``is`` for Inception alone, else named for the task.

    The inception score is that of a classifier: the quarter turns of ``rotation`` are no classes of images.
    """
    plain = extractor == "inception"
    frechet, kernel, suffix = ("fid", "kid", "") if plain else ("fd", "kd", f"_{extractor}")
    names = {
        torch_fidelity.KEY_METRIC_FID: frechet + suffix,
        torch_fidelity.KEY_METRIC_KID_MEAN: kernel + suffix,
        torch_fidelity.KEY_METRIC_KID_STD: f"{kernel}{suffix}_std",
        torch_fidelity.KEY_METRIC_PRECISION: "precision" + suffix,
        torch_fidelity.KEY_METRIC_RECALL: "recall" + suffix,
    }
    if extractor != "rotation":
        names |= {
            torch_fidelity.KEY_METRIC_ISC_MEAN: "is" + suffix,
            torch_fidelity.KEY_METRIC_ISC_STD: f"is{suffix}_std",
        }
    return names


def frechet_name(extractor: str) -> str:
    """Our name of the Frechet distance in an extractor's features."""
    return metric_names(extractor)[torch_fidelity.KEY_METRIC_FID]


def remember(
    references: Dataset, extractor: Extractor, cache: tuple[Path, str], gpu: bool = False, title: str = "reference"
) -> None:
    """Put the references' features and statistics into torch-fidelity's cache.

    Args:
        references: real images, uint8 (3, side, side) tensors.
        cache: (folder, name). torch-fidelity looks up nothing but the name: it must hold everything that the
            features depend on.
        title: of the progress bar.
    """
    folder, name = cache
    with _progress(references, title) as shown:
        # The distance of the set to itself: the second time its features come from the cache.
        torch_fidelity.calculate_metrics(
            input1=shown,
            input1_cache_name=name,
            input2=_NeverRead(),
            input2_cache_name=name,
            cache_root=str(folder),
            feature_extractor=_registered(extractor.name),
            feature_extractor_weights_path=str(extractor.path),
            batch_size=BATCH,
            # Reads in this process: the workers it would start otherwise are forks of a threaded program.
            save_cpu_ram=True,
            cuda=gpu,
            verbose=False,
            fid=True,
        )


def features_of(images: Dataset, extractor: Extractor, gpu: bool = False, title: str = "score") -> dict[str, Tensor]:
    """The features (n, f) of images that all metrics need, by torch-fidelity's names of layers; images are read once.

    Args:
        images: uint8 (3, side, side) tensors.
        title: of the progress bar.
    """
    layers = list(dict.fromkeys(_layer(extractor.name, metric) for metric in ("fid", "kid", "prc", "isc")))
    network = create_feature_extractor(
        _registered(extractor.name),
        layers,
        cuda=gpu,
        feature_extractor_weights_path=str(extractor.path),
        verbose=False,
    )
    with _progress(images, title) as shown:
        # Reads in this process, as above.
        return get_featuresdict_from_dataset(shown, network, BATCH, gpu, save_cpu_ram=True, verbose=False)


def compare(
    features: dict[str, Tensor], cache: tuple[Path, str], extractor: Extractor, kid_subset: int
) -> dict[str, float]:
    """Frechet distance (at least 0), KID (mean and standard deviation over subsets), precision and recall.

    And the inception score, where the extractor has classes and there is an image for each of its parts.

    Args:
        features: of generated images, from :func:`features_of`.
        cache: (folder, name) of the references, as :func:`remember` was given it.
        kid_subset: images in each of 100 random subsets; at most as many as in the smaller set.
    """
    folder, name = cache
    fid, kid, prc, isc = (_layer(extractor.name, metric) for metric in ("fid", "kid", "prc", "isc"))
    known = cache_lookup_group_recompute_all_on_any_miss(
        f"{name}-{_registered(extractor.name)}-features-",
        list(dict.fromkeys((fid, kid, prc))),
        _missing,
        cache_root=str(folder),
        verbose=False,
    )
    found = {torch_fidelity.KEY_METRIC_FID: distance(features, statistics(cache, extractor.name), extractor)}
    found |= kid_features_to_metric(features[kid], known[kid], kid_subset_size=kid_subset, verbose=False)
    precision, recall = precision_recall(features[prc], known[prc])
    found |= {torch_fidelity.KEY_METRIC_PRECISION: precision, torch_fidelity.KEY_METRIC_RECALL: recall}
    if len(features[isc]) >= SPLITS:
        found |= isc_features_to_metric(features[isc], SPLITS)
    return {ours: float(found[theirs]) for theirs, ours in metric_names(extractor.name).items() if theirs in found}


def measure(
    samples: Dataset,
    cache: tuple[Path, str],
    extractor: Extractor,
    kid_subset: int,
    gpu: bool = False,
    title: str = "score",
) -> dict[str, float]:
    """What :func:`compare` says of the features of these images."""
    return compare(features_of(samples, extractor, gpu, title), cache, extractor, kid_subset)


def statistics(cache: tuple[Path, str], extractor: str) -> Statistics:
    """Mean and covariance of the references that :func:`remember` was given, by the extractor's name."""
    folder, name = cache
    entry = f"{name}-{_registered(extractor)}-stat-fid-{_layer(extractor, 'fid')}"
    found = cache_lookup_one_recompute_on_miss(entry, _missing, cache_root=str(folder), verbose=False)
    return Statistics(found["mu"], found["sigma"])


def distance(features: dict[str, Tensor], real: Statistics, extractor: Extractor, count: int | None = None) -> float:
    """Frechet distance, at least 0, of generated images to real ones.

    Args:
        features: of the generated ones, from :func:`features_of`.
        count: of as many of them, drawn at random by a seed; all of them by default.
    """
    rows = features[_layer(extractor.name, "fid")]
    if count is not None:
        rows = rows[torch.randperm(len(rows), generator=generator("subset", count))[:count]]
    found = fid_features_to_statistics(rows)
    # torch-fidelity wants one type, and leaves means of float32 features in float32.
    own = {"mu": found["mu"].astype(real.mu.dtype), "sigma": found["sigma"]}
    return _clamped(fid_statistics_to_metric(own, {"mu": real.mu, "sigma": real.sigma}, verbose=False))


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between the normal distributions that fit two sets of features, (n, f) and (m, f)."""
    return _clamped(fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False))


def distances(
    features: dict[str, Tensor], real: Statistics, extractor: Extractor, counts: Sequence[int]
) -> dict[int, float]:
    """Frechet distances of so many of the generated images, by count; each count is drawn for itself."""
    shown = tqdm(counts, desc="Frechet distances", unit="count", disable=None, leave=False)
    return {count: distance(features, real, extractor, count) for count in shown}


def _clamped(found: dict[str, float]) -> float:
    # The distance of a set to itself may come out as -4e-15.
    return max(0.0, found[torch_fidelity.KEY_METRIC_FID])


def _registered(extractor: str) -> str:
    """What torch-fidelity knows an extractor as."""
    return _INCEPTION if extractor == "inception" else _OWN


def _layer(extractor: str, metric: str) -> str:
    return resolve_feature_layer_for_metric(metric, feature_extractor=_registered(extractor))


@contextlib.contextmanager
def _progress(images: Dataset, title: str) -> Iterator[Dataset]:
    """The images, shown as they are read, while convolutions are exact.

    Deterministic, and no TF32: a score repeats, and hardly depends on the device.
    """
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with tqdm(total=len(images), desc=title, unit="image", disable=None) as bar, exact:  # type: ignore[arg-type]
        yield _Shown(images, bar)
