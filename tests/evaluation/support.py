"""Images in memory, and samples on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch_fidelity
from PIL import Image
from torch import Tensor

from dvdp.evaluation.extractors import Extractor, load_network


@dataclass(frozen=True)
class Arrays:
    """Labelled images in memory."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], int(self.labels[index])

    def part(self, part: slice | np.ndarray) -> Arrays:
        return Arrays(self.pixels[part], self.labels[part])


@dataclass(frozen=True)
class Scoring:
    """A data set, its extractor and its reference."""

    images: Arrays
    extractor: Extractor
    reference: Path


def write_shards(folder: Path, pixels: np.ndarray, shard: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pixels), shard):
        np.save(folder / f"{first:08d}.npy", pixels[first : first + shard])
    return folder


def write_pngs(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
    return folder


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
        features = self.network.features(images)
        found = {"pooled": features, "logits": self.network.head(features)}
        return tuple(found[name].double() for name in self.features_list)


torch_fidelity.register_feature_extractor("dvdp-convnet", OwnFeatures)
