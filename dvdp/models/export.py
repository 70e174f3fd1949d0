"""A trained model as one file: EMA weights in safetensors, everything else as JSON in its header."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvdp import tensors
from dvdp.config import Run, SamplingParams
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import image_labels
from dvdp.diffusion.sampling import Progress, sample
from dvdp.errors import UserError, did_you_mean
from dvdp.files import write_atomically
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.pixels import to_uint8
from dvdp.models.unet import build_network

KIND = "dvdp model 1"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A denoiser with its process and the defaults of its run."""

    run: Run
    description: dict[str, Any]
    """All that was stored with the weights: the run, data set digest, training hash and so on (JSON)."""
    process: Process
    denoiser: NetworkDenoiser
    device: torch.device

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.run.resolution

    @property
    def lift_std(self) -> list[float] | None:
        """What the run's ``sampling.lift`` asks of :func:`dvdp.diffusion.sampling.sample`."""
        return lift_std(self.run, self.description)

    @property
    def label_counts(self) -> list[int] | None:
        """Of the data it was trained on, for :func:`dvdp.diffusion.randomness.image_labels`; None if it is told no classes."""
        return label_counts(self.run, self.description)

    def sample(
        self,
        count: int,
        *,
        seed: int | None = None,
        first: int = 0,
        solver: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        variance: str | None = None,
        clip: bool | None = None,
        batch: int | None = None,
        label: str | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Draw images number ``first`` .. ``first + count - 1``, as uint8 (count, 3, H, W).

        Whatever is None is as the run's ``sampling`` section says; see :func:`dvdp.diffusion.sampling.sample`.

        Args:
            label: name of the class of all images, for a model that is told classes; without it classes are drawn, as
                frequent as in the data.

        Raises:
            UserError: an argument is out of range, or there is no such class.
        """
        asked = None if label is None else self._class(str(label))
        given = {"seed": seed, "solver": solver, "eta": eta, "variance": variance, "clip": clip}
        chosen = {name: value for name, value in given.items() if value is not None}
        options = {**self.run.sampling.options(steps), **chosen}
        size = batch or self.run.sampling.batch
        parts = [
            self.draw(min(size, count - start), first + start, options, asked, callback).cpu()
            for start in range(0, count, size)
        ]
        return torch.cat(parts) if parts else torch.empty((0, 3, self.resolution, self.resolution), dtype=torch.uint8)

    def draw(
        self,
        count: int,
        first: int = 0,
        options: Mapping[str, Any] | None = None,
        asked: int | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Draw one batch, as uint8 (count, 3, H, W) on the model's device, which may still be at work on it.

        Args:
            first: number of the first image.
            options: of :func:`dvdp.diffusion.sampling.sample`, in place of those of the run's ``sampling`` section.
            asked: number of the class of all images, for a model that is told classes; without it classes are drawn.
        """
        options = self.run.sampling.options() if options is None else options
        images = sample(
            self.process,
            self.denoiser,
            (count, 3, self.resolution, self.resolution),
            first=first,
            device=self.device,
            callback=callback,
            lift_std=self.lift_std,
            labels=torch.full((count,), asked)
            if asked is not None
            else image_labels(self.label_counts, options["seed"], first, count),
            **options,
        )
        return to_uint8(images)

    def _class(self, label: str) -> int:
        """The number of a class."""
        if not self.run.model.num_classes:
            raise UserError(f"label: found '{label}', expected none, as this model is told no classes; leave it out.")
        counted = zip(self.description.get("labels", []), self.label_counts or [], strict=False)
        names = [name for name, count in counted if count]
        if label not in names:
            known = f"one of {', '.join(names)}" if names else "none, as the model does not name its classes"
            raise UserError(f"label: found '{label}'{did_you_mean(label, names)}, expected {known}.")
        return list(self.description["labels"]).index(label)


def lift_std(run: Run, description: Mapping[str, Any]) -> list[float] | None:
    """The data's band std where the run lifts with them, else None.

    Raises:
        UserError: they are needed, and the description has none.
    """
    if run.sampling.lift == "noise":
        return None
    if "band_std" not in description:
        raise UserError(
            "sampling.lift: found 'data' and no band std with the model, expected those that `dvdp prepare`"
            " measures; prepare the data set and train with them, or use 'noise'."
        )
    return [float(value) for value in description["band_std"]]


def label_counts(run: Run, description: Mapping[str, Any]) -> list[int] | None:
    """The data's images of each class, then those without one, where the network is told classes, else None.

    Raises:
        UserError: they are needed, and the description has none, or of another number of classes.
    """
    if not run.model.num_classes:
        return None
    counts = [int(count) for count in description.get("label_counts", [])]
    if len(counts) != run.model.num_classes + 1 or not any(counts):
        raise UserError(
            f"model.num_classes: found {run.model.num_classes} and label counts {counts} with the model, expected one for each"
            " class, then that of images without one, as `dvdp prepare` counts them; give them, or use 0 classes."
        )
    return counts


def save_model(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write the model file atomically. ``description["run"]`` is :meth:`dvdp.config.Run.describe`'s."""
    write_atomically(path, tensors.pack(KIND, description, weights))


def load_model(
    path: Path | str, device: torch.device | str = "cpu", sampling: SamplingParams | None = None
) -> TrainedModel:
    """Read the model file.

    Args:
        sampling: in place of the one that the params had when the model was trained.

    Raises:
        UserError: the file is missing or is no model file of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model: found no file '{path}', expected the weights.safetensors of a finished run.")
    description, weights = tensors.read(path, KIND, "model", "give the weights.safetensors of a finished run")
    run = Run.from_description(description["run"])
    if sampling is not None:
        run = replace(run, sampling=sampling)
    process = Process(run.build_schedule())
    network = build_network(run.model, process.levels)
    network.load_state_dict(weights)
    network.to(device).eval()
    return TrainedModel(
        run=run,
        description=description,
        process=process,
        denoiser=NetworkDenoiser(network, process, run.resolution, run.model.prediction_type),
        device=torch.device(device),
    )
