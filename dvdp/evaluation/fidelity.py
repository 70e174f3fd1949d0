"""The only module that knows torch-fidelity: images in, named metrics out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from tqdm import tqdm

from dvdp.evaluation.extractors import Extractor, load_network

LIBRARY = f"torch-fidelity {torch_fidelity.__version__}"

#: Neighbours that make the balls of precision and recall (Kynkaanniemi et al. 2019).
NEIGHBOURS = 3
#: Fixed: convolutions of other batches differ in bits.
BATCH = 64

_OWN = "dvdp-convnet"
_INCEPTION = "inception-v3-compat"


class OwnFeatures(torch_fidelity.FeatureExtractorBase):
    """The feature network of :mod:`dvdp.evaluation.extractors`, as torch-fidelity wants it."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.network, _info = load_network(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 (n, 3, side, side) -> (float64 (n, 64),); float64 so that means and distances are exact."""
        return (self.network.features(images).double(),)


if _OWN not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor(_OWN, OwnFeatures)


class _NeverRead(Dataset):
    """Stands for images whose features are in the cache."""

    def __len__(self) -> int:
        raise RuntimeError("the cached features were not found")

    def __getitem__(self, index: int) -> Tensor:
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
    """torch-fidelity's keys -> our names: ``fid`` and ``kid`` for Inception alone, else named for the task."""
    frechet, kernel, suffix = ("fid", "kid", "") if extractor == "inception" else ("fd", "kd", f"_{extractor}")
    return {
        torch_fidelity.KEY_METRIC_FID: frechet + suffix,
        torch_fidelity.KEY_METRIC_KID_MEAN: kernel + suffix,
        torch_fidelity.KEY_METRIC_KID_STD: f"{kernel}{suffix}_std",
        torch_fidelity.KEY_METRIC_PRECISION: "precision" + suffix,
        torch_fidelity.KEY_METRIC_RECALL: "recall" + suffix,
    }


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
    # The distance of the set to itself: the second time its features come from the cache.
    _calculate(references, extractor, gpu, title, cache, input1_cache_name=cache[1], fid=True)


def measure(
    samples: Dataset,
    cache: tuple[Path, str],
    extractor: Extractor,
    kid_subset: int,
    gpu: bool = False,
    title: str = "score",
) -> dict[str, float]:
    """Frechet distance (at least 0), KID (mean and standard deviation over subsets), precision and recall.

    Args:
        samples: generated images, uint8 (3, side, side) tensors.
        cache: (folder, name) of the references, as :func:`remember` was given it.
        kid_subset: images in each of 100 random subsets; at most as many as in the smaller set.
        title: of the progress bar.
    """
    # The order decides which is precision and which is recall: the first set is generated, the second is real.
    found = _calculate(
        samples,
        extractor,
        gpu,
        title,
        cache,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=kid_subset,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=2000,
    )
    names = metric_names(extractor.name)
    result = {ours: float(found[theirs]) for theirs, ours in names.items()}
    distance = names[torch_fidelity.KEY_METRIC_FID]
    # The distance of a set to itself may come out as -4e-15.
    return {**result, distance: max(0.0, result[distance])}


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between the normal distributions that fit two sets of features, (n, f) and (m, f)."""
    statistics = [fid_features_to_statistics(features) for features in (a, b)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[torch_fidelity.KEY_METRIC_FID])


def _calculate(
    images: Dataset,
    extractor: Extractor,
    gpu: bool,
    title: str,
    cache: tuple[Path, str],
    **metrics: Any,
) -> dict[str, float]:
    folder, name = cache
    # Deterministic, and no TF32: a score repeats, and hardly depends on the device.
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with tqdm(total=len(images), desc=title, unit="image", disable=None) as bar, exact:  # type: ignore[arg-type]
        return torch_fidelity.calculate_metrics(
            input1=_Shown(images, bar),
            input2=_NeverRead(),
            input2_cache_name=name,
            cache_root=str(folder),
            feature_extractor=_INCEPTION if extractor.name == "inception" else _OWN,
            feature_extractor_weights_path=str(extractor.path),
            batch_size=BATCH,
            # Reads in this process: the workers it would start otherwise are forks of a threaded program.
            save_cpu_ram=True,
            cuda=gpu,
            verbose=False,
            **metrics,
        )
