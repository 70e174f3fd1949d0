"""The only module that knows torch-fidelity: images in, named metrics out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from dvdp.diffusion.randomness import generator
from dvdp.evaluation.coverage import NEIGHBOURS, precision_recall, recall
from dvdp.evaluation.extractors import Extractor, inception_extractor, load_network
from dvdp.evaluation.intervals import PARTS, parts_error, share_error
from dvdp.evaluation.published import Statistics
from dvdp.out_of_memory import in_batches

LIBRARY = f"torch-fidelity {torch_fidelity.__version__}"

#: Fixed, as long as there is memory for it: convolutions of other batches differ in bits.
BATCH = 64
#: Parts of the samples that an inception score is the mean of (Salimans et al. 2016).
SPLITS = 10


class Features(NamedTuple):
    """What an extractor makes of n images."""

    pooled: Tensor
    """(n, f), for the Frechet distance, KID, precision and recall."""
    logits: Tensor
    """(n, classes), for the inception score."""


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


def features_of(images: Dataset, extractor: Extractor, gpu: bool = False, title: str = "score") -> Features:
    """The features that all metrics need; images are read once, or again where memory runs out and batches are halved.

    Args:
        images: uint8 (3, h, h) tensors.
        title: of the progress bar.
    """
    network = _network(extractor, gpu)
    count = len(images)  # type: ignore[arg-type]
    found = []

    def features(first: int, size: int) -> list[Tensor]:
        batch = torch.stack([images[i] for i in range(first, first + size)])
        return [layer.cpu() for layer in network(batch.cuda() if gpu else batch)]

    device = torch.device("cuda" if gpu else "cpu")
    with tqdm(total=count, desc=title, unit="image", disable=None) as bar, _exact(), torch.no_grad():
        for _, layers in in_batches(features, 0, count, BATCH, device, f"{title}, features by {extractor.name}"):
            found.append(layers)
            bar.update(len(layers[0]))
    pooled, logits = map(torch.cat, zip(*found, strict=True))
    return Features(pooled, logits)


#: Held by the thread that has changed cuDNN's flags, which are the whole process's.
_FLAGS = threading.Lock()


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Deterministic convolutions, and no TF32: a score repeats, and hardly depends on the device.

    One thread is in it at a time: the first of two to leave would take the flags from the other.
    """
    with _FLAGS, torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load refuse all but tensors, whatever it is asked for: torch-fidelity would unpickle anything."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _FLAGS:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _network(extractor: Extractor, gpu: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """uint8 images -> their features and logits."""
    if extractor.name == "inception":
        inception_extractor(extractor.path)  # It may be another file by now.
        with _weights_only():
            network: Callable[[Tensor], tuple[Tensor, ...]] = create_feature_extractor(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                cuda=gpu,
                feature_extractor_weights_path=str(extractor.path),
                verbose=False,
            )
        return network
    own, _ = load_network(extractor.path)
    own = own.cuda() if gpu else own

    def features_and_logits(images: Tensor) -> tuple[Tensor, ...]:
        features = own.features(images)
        # In float64, means and distances are exact.
        return features.double(), own.head(features).double()

    return features_and_logits


def compare(
    generated: Features, real: Tensor, statistics: Statistics, extractor: str, kid_subset: int
) -> dict[str, float]:
    """Frechet distance (at least 0), KID (mean and standard deviation over subsets), precision and recall.

    And the inception score, where the extractor has classes and there is an image for each of its parts.

    Args:
        real: features (m, f).
        statistics: of these.
        extractor: its name.
        kid_subset: images in each of 100 random subsets; at most as many as in the smaller set.
    """
    precision, recall = precision_recall(generated.pooled, real)
    found = {
        torch_fidelity.KEY_METRIC_FID: distance(generated.pooled, statistics),
        torch_fidelity.KEY_METRIC_PRECISION: precision,
        torch_fidelity.KEY_METRIC_RECALL: recall,
        **kid_features_to_metric(generated.pooled, real, kid_subset_size=kid_subset, verbose=False),
    }
    if len(generated.logits) >= SPLITS:
        found |= isc_features_to_metric(generated.logits, SPLITS)
    return {ours: float(found[theirs]) for theirs, ours in metric_names(extractor).items() if theirs in found}


def errors(generated: Tensor, real: Tensor, extractor: str, kid_subset: int, precision: float) -> dict[str, float]:
    """Standard errors over draws of the samples, as ``.._error``: of precision, and of enough samples recall and KID.

    Args:
        generated: features (n, f).
        real: features (m, f).
        precision: as :func:`compare` has it.
    """
    names = metric_names(extractor)
    found = {torch_fidelity.KEY_METRIC_PRECISION: share_error(precision, len(generated))}
    parts = generated.tensor_split(PARTS)
    if len(parts[-1]) > NEIGHBOURS:
        size = min(kid_subset, len(parts[-1]))
        kids = [kid_features_to_metric(part, real, kid_subset_size=size, verbose=False) for part in parts]
        found[torch_fidelity.KEY_METRIC_RECALL] = parts_error([recall(part, real) for part in parts])
        found[torch_fidelity.KEY_METRIC_KID_MEAN] = parts_error(
            [kid[torch_fidelity.KEY_METRIC_KID_MEAN] for kid in kids]
        )
    return {f"{names[theirs]}_error": value for theirs, value in found.items()}


def statistics_of(features: Tensor) -> Statistics:
    """Mean and covariance of features (n, f)."""
    return Statistics(**fid_features_to_statistics(features))


def distance(features: Tensor, real: Statistics, count: int | None = None) -> float:
    """Frechet distance, at least 0, of generated images to real ones.

    Args:
        features: (n, f), of the generated ones.
        count: of as many of them, drawn at random by a seed; all of them by default.
    """
    if count is not None:
        features = features[torch.randperm(len(features), generator=generator("subset", count))[:count]]
    own = statistics_of(features)
    # torch-fidelity wants one type, and leaves means of float32 features in float32.
    pair = {"mu": own.mu.astype(real.mu.dtype), "sigma": own.sigma}, {"mu": real.mu, "sigma": real.sigma}
    # The distance of a set to itself may come out as -4e-15.
    return max(0.0, fid_statistics_to_metric(*pair, verbose=False)[torch_fidelity.KEY_METRIC_FID])


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between the normal distributions that fit two sets of features, (n, f) and (m, f)."""
    return distance(a, statistics_of(b))


def distances(features: Tensor, real: Statistics, counts: Sequence[int]) -> dict[int, float]:
    """Frechet distances of so many of the generated images, by count; each count is drawn for itself."""
    shown = tqdm(counts, desc="Frechet distances", unit="count", disable=None, leave=False)
    return {count: distance(features, real, count) for count in shown}
