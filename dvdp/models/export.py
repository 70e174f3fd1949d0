"""A trained model as one file: EMA weights in safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dvdp.config import Run
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.unet import UNet
from dvdp.pixels import to_uint8
from dvdp.process import Process
from dvdp.sampling import Progress, sample

FORMAT = "dvdp model"
VERSION = 1


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
    def side(self) -> int:
        """Side of the images, in pixels."""
        return self.run.side

    def sample(
        self,
        count: int,
        *,
        seed: int | None = None,
        first: int = 0,
        rule: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        variance: str | None = None,
        clip: bool | None = None,
        batch: int | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Draw images number ``first`` .. ``first + count - 1``, as uint8 (count, 3, H, W).

        Whatever is None is as the run's ``sampling`` section says; see :func:`dvdp.sampling.sample`.
        """
        given = {"seed": seed, "rule": rule, "steps": steps, "eta": eta, "variance": variance, "clip": clip}
        defaults = self.run.sampling
        options: dict[str, Any] = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
        size = batch or defaults.batch
        parts = [
            to_uint8(
                sample(
                    self.process,
                    self.denoiser,
                    (min(size, count - start), 3, self.side, self.side),
                    first=first + start,
                    device=self.device,
                    callback=callback,
                    **options,
                )
            ).cpu()
            for start in range(0, count, size)
        ]
        return torch.cat(parts) if parts else torch.empty((0, 3, self.side, self.side), dtype=torch.uint8)


def save_model(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write the model file atomically. ``description["run"]`` is :meth:`dvdp.config.Run.describe`'s."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # One key: safetensors writes several in any order, and equal models should be equal files.
    header = {FORMAT: json.dumps({"version": VERSION, "description": dict(description)}, sort_keys=True)}
    write_atomically(path, save(tensors, header))


def load_model(path: Path | str, device: torch.device | str = "cpu") -> TrainedModel:
    """Read a model file.

    Raises:
        UserError: the file is missing or is no model file of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model: found no file '{path}', expected the weights.safetensors of a finished run.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"model: '{path}' is no whole safetensors file ({error}); train or download it again."
        ) from None
    about = json.loads(header.get(FORMAT, "{}"))
    if about.get("version") != VERSION:
        raise UserError(
            f"model: '{path}' is a safetensors file of another kind or version, expected '{FORMAT}' version {VERSION};"
            " give the weights.safetensors of a run."
        )
    description = about["description"]
    run = Run.from_description(description["run"])
    process = Process(run.schedule())
    network = UNet(run.model, process.levels)
    network.load_state_dict(weights)
    network.to(device).eval()
    return TrainedModel(
        run=run,
        description=description,
        process=process,
        denoiser=NetworkDenoiser(network, process, run.side, run.model.predicts),
        device=torch.device(device),
    )
