"""One setting with one seed as a job: the names and folders of everything that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dvdp.config import Params, Run
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.identity import evaluation_hash, sampling_hash, training_hash
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.starts import started


@dataclass(frozen=True)
class Sampled(ABC):
    """What images are drawn from and scored, with the places of all that is made: a job, or a registered model."""

    params: Params
    run: Run

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def trained(self) -> str:
        """Names the weights."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Of weights, samples and scores."""

    @property
    def weights(self) -> Path:
        """The trained model."""
        return self.folder / "weights.safetensors"

    @property
    def sampling_hash(self) -> str:
        """Names the samples."""
        return sampling_hash(self.run, self.trained)

    @property
    def samples(self) -> Path:
        """Folder of the samples, ``<first image>.npy``."""
        return self.folder / "samples" / self.sampling_hash

    def score_path(self, reference: str) -> Path:
        """The score record against a reference, by its name."""
        name = evaluation_hash(self.params.evaluation, self.sampling_hash, reference)
        return self.folder / "scores" / f"{name}.json"


@dataclass(frozen=True)
class Job(Sampled):
    """One setting and seed on one data set, with the names of all it makes."""

    dataset_digest: str

    @cached_property
    def training_hash(self) -> str:
        """Names the run; see :mod:`dvdp.identity`."""
        return training_hash(self.run, self.dataset_digest, self.params.dataset.flip)

    @property
    def trained(self) -> str:
        """The training hash."""
        return self.training_hash

    @property
    def name(self) -> str:
        """The setting, and the seed where there are several."""
        return self.run.setting if len(self.params.seeds) == 1 else f"{self.run.setting}-seed{self.run.seed}"

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.params.cluster.storage / self.training_hash


def prepared_store(params: Params) -> ImageStore:
    """The prepared data set of the params.

    Raises:
        UserError: it is not prepared, or was prepared with another resolution.
    """
    store = ImageStore(DataPaths.of(params).store)
    if store.metadata.resolution != params.dataset.resolution:
        raise UserError(
            f"dataset.resolution: found {params.dataset.resolution}, expected {store.metadata.resolution} as in"
            f" {store.path}; prepare the data set again."
        )
    return store


def jobs(params: Params) -> list[Job]:
    """Every setting with every seed, on the prepared data set.

    Args:
        params: their turning points are numbers, and what they start from files; see
            :func:`pipelines.turning_points.resolve` and
            :func:`pipelines.starts.fetch_starts`.

    Raises:
        UserError: the data set is not prepared, or was prepared with another resolution; a batch does not divide
            over groups of images, or these not over the ranks; there are no such weights to start from.
    """
    store = prepared_store(params)
    runs, ranks, classes = params.runs(), params.cluster.num_workers, len(store.metadata.labels)
    for run in runs:
        if run.model.num_classes not in (0, classes):
            known = f"0, or {classes} as in" if classes else "0, as there are no labels in"
            raise UserError(
                f"model.num_classes: found {run.model.num_classes} for {run.setting}, expected {known}"
                f" {DataPaths.of(params).store}; change it."
            )
        try:
            run.training.groups_on(ranks)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}, in setting '{run.setting}'.") from None
    return [Job(params, started(params, run), store.metadata.digest) for run in runs]
