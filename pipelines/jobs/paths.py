"""Where things lie, relative to the project folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dvdp.config import Params


@dataclass(frozen=True)
class DataPaths:
    """Folders of a data set: outputs of the DVC stages prepare, extractor and reference."""

    data: Path

    @staticmethod
    def of(params: Params) -> DataPaths:
        """By the data set's name."""
        return DataPaths(Path("data") / params.dataset.name)

    @property
    def store(self) -> Path:
        """LMDB of prepared images."""
        return self.data / "store"

    @property
    def extractor(self) -> Path:
        """The feature network that scores are made with, unless Inception is."""
        return self.data / "extractor"

    @property
    def reference(self) -> Path:
        """Features of the real images."""
        return self.data / "reference"
