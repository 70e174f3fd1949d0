"""A trained model as one file: EMA weights in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvdp import tensors
from dvdp.config import MOST_BATCH_PIXELS, Run, SamplingParams
from dvdp.diffusion.process import Process
from dvdp.diffusion.sampling import Progress, images_together, sample
from dvdp.diffusion.spans import level_spans
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.classes import Classes
from dvdp.models.compilation import compile_network, explained
from dvdp.models.compute import Computing, arrange, precision_of
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.pixels import to_uint8
from dvdp.models.unet import ResidualBlock, UNet, build_network
from dvdp.out_of_memory import in_batches

if TYPE_CHECKING:
    from dvdp.models.given import Given

KIND = "dvdp model 1"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A denoiser with its process, its classes and the defaults of its run."""

    run: Run
    description: Mapping[str, Any]
    """All that was stored with the weights: the run, data set digest, training hash and so on (JSON)."""
    denoiser: NetworkDenoiser
    classes: Classes | None
    """None for an unconditional model."""
    device: torch.device
    refresh: Callable[[], None]
    """Draw with what the network's weights have become."""

    @staticmethod
    def of(run: Run, description: Mapping[str, Any], network: nn.Module, device: torch.device) -> TrainedModel:
        """From a network and what is known of the data it was trained on.

        It draws in the precision that it was trained in (see :func:`dvdp.models.compute.precision_of`), and compiled if
        it was trained so.

        Args:
            network: on the device, in evaluation mode; it keeps the weights.
            description: has ``band_std`` where ``sampling.lift`` is "data" and ``label_counts`` where the network is
                class-conditional; see :meth:`dvdp.data.store.StoreMetadata.model_metadata`.

        Raises:
            UserError: one of them is missing, or ``sampling.guidance_scale`` does not fit the network.
        """
        if run.sampling.lift == "data" and "band_std" not in description:
            raise UserError(
                "sampling.lift: found 'data' and no band std with the model, expected those that `dvdp prepare`"
                " measures; prepare the data set and train with them, or use 'noise'."
            )
        run.check_guidance(run.sampling, "sampling.")
        process = Process(run.build_schedule(), description["band_std"] if run.sampling.lift == "data" else None)
        classes = Classes.of(run.model.num_classes, description)
        computing = Computing(network, precision_of(run.training.precision, device))
        if run.training.compile:
            compile_network(computing.network)
        denoiser = NetworkDenoiser(computing.network, process, run.resolution, run.model.prediction_type)
        return TrainedModel(run, description, denoiser, classes, device, computing.refresh)

    @property
    def process(self) -> Process:
        """Of the run; its lifts are those of ``sampling.lift``."""
        return self.denoiser.process

    @property
    def resolution(self) -> int:
        """Of the images, in pixels."""
        return self.run.resolution

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
        guidance: float | Sequence[float] | None = None,
        given: Given | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Draw images number ``first`` .. ``first + count - 1``, as uint8 (count, 3, H, W).

        Whatever is None is as the run's ``sampling`` section says; see :func:`dvdp.diffusion.sampling.sample`. Where
        memory runs out, batches are halved.

        Args:
            label: name of the class of all images, for a class-conditional model; by default classes are drawn, as
                frequent as in the data.
            guidance: in place of ``sampling.guidance_scale``.
            given: an image, and what of it is known of all images.

        Raises:
            UserError: an argument is out of range, or there is no such class.
            OutOfMemory: there is no memory for one image at a time.
        """
        if label is not None and self.classes is None:
            raise UserError(f"label: found '{label}', expected none, as this model is unconditional; leave it out.")
        if count * self.resolution**2 > MOST_BATCH_PIXELS:
            raise UserError(
                f"count: found {count}, expected at most {MOST_BATCH_PIXELS // self.resolution**2:,} images of"
                f" {self.resolution} px at a time; draw the others from another 'first' on."
            )
        asked = None if label is None or self.classes is None else self.classes.label(str(label))
        sampling = self.run.sampling
        if guidance is not None:
            scale: Any = guidance  # What it may be is for the section to say.
            try:
                sampling = replace(sampling, guidance_scale=scale)
                self.run.check_guidance(sampling)
            except UserError as error:
                raise UserError(f"{str(error).replace('guidance_scale', 'guidance', 1).rstrip('.')}.") from None
        asked_for = {"seed": seed, "solver": solver, "eta": eta, "variance": variance, "clip": clip}
        chosen = {name: value for name, value in asked_for.items() if value is not None}
        options = {**sampling.options(steps), **chosen}
        options["batch"] = batch or self.run.sampling.batch
        size = images_together(self.process.levels, options["batch"])

        def draw(start: int, size: int) -> Tensor:
            return self.draw(size, start, options, asked, callback, given).cpu()

        parts = [part for _, part in in_batches(draw, first, first + count, size, self.device, "sampling.batch")]
        return torch.cat(parts) if parts else torch.empty((0, 3, self.resolution, self.resolution), dtype=torch.uint8)

    def draw(
        self,
        count: int,
        first: int = 0,
        options: Mapping[str, Any] | None = None,
        label: int | None = None,
        callback: Callable[[Progress], None] | None = None,
        given: Given | None = None,
    ) -> Tensor:
        """Draw images, as uint8 (count, 3, H, W) on the model's device, which may still be at work on them.

        At level 0 ``sampling.batch`` of them go through the network at once, and 4^k times as many at level k.

        Args:
            first: number of the first image.
            options: of :func:`dvdp.diffusion.sampling.sample`, in place of those of the run's ``sampling`` section.
            label: of all images, for a class-conditional model; by default classes are drawn.
            given: see :meth:`sample`.
        """
        options = self.run.sampling.options() if options is None else options
        labels = self.labels(options["seed"], first, count) if label is None else torch.full((count,), label)
        shape = (count, 3, self.resolution, self.resolution)
        known = given.options(self.process, count, options["seed"], first, self.device) if given else {}
        with explained() if self.run.training.compile else contextlib.nullcontext():
            images = sample(
                self.process,
                self.denoiser,
                shape,
                first=first,
                device=self.device,
                callback=callback,
                labels=labels,
                **{"batch": self.run.sampling.batch, **options, **known},
            )
        return to_uint8(images)

    def labels(self, seed: int, first: int, count: int) -> Tensor | None:
        """:meth:`dvdp.models.classes.Classes.draw`; None for an unconditional model."""
        return None if self.classes is None else self.classes.draw(seed, first, count)


def save_model(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write the model file atomically. ``description["run"]`` is :meth:`dvdp.config.Run.describe`'s."""
    write_atomically(path, tensors.pack(KIND, description, weights))


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    sampling: SamplingParams | None = None,
    turning_points: tuple[int, ...] | None = None,
) -> TrainedModel:
    """Read the model file.

    Args:
        sampling: in place of the one that the params had when the model was trained.
        turning_points: in place of those of the run, if its levels were trained at all timesteps (``training.span``).

    Raises:
        UserError: the file is missing, is no model file of ours, or lacks what ``sampling.lift`` needs, or was not
            trained for the turning points.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model: found no file '{path}', expected the weights.safetensors of a finished run.")
    description, weights = tensors.read(path, KIND, "model", "give the weights.safetensors of a finished run")
    run = Run.from_description(description["run"])
    if sampling is not None:
        run = replace(run, sampling=sampling)
    if turning_points is not None and turning_points != run.turning_points:
        if not run.at_all_timesteps or len(turning_points) != len(run.turning_points):
            raise UserError(
                f"turning_points: found {list(turning_points)} for weights of {list(run.turning_points)} in '{path}',"
                " expected these, or as many of weights with training.span 'all'; train for them."
            )
        run = replace(run, turning_points=turning_points)
        level_spans(run.turning_points, run.schedule.timesteps)
    network = build_network(run.model, len(run.turning_points))
    network.load_state_dict(renamed(weights, network))
    device = torch.device(device)
    return TrainedModel.of(run, description, arrange(network, device).eval().requires_grad_(False), device)


def renamed(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights by their names now: earlier releases had a block's modulation in the block."""
    now = {}
    for name, unet in network.named_modules():
        if isinstance(unet, UNet):
            start = f"{name}." if name else ""
            blocks = [block for block, module in unet.named_modules() if isinstance(module, ResidualBlock)]
            for place, block in enumerate(blocks):
                for part in ("weight", "bias"):
                    now[f"{start}{block}.modulation.{part}"] = f"{start}modulations.{place}.{part}"
    return {now.get(name, name): weight for name, weight in weights.items()}
