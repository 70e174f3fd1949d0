"""``dvdp import``: weights of other libraries as a model file of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvdp.errors import UserError
from dvdp.models.diffusers_unet import read_folder
from dvdp.models.foreign import import_unet
from dvdp.models.guided_diffusion import read_checkpoint
from dvdp.yaml_files import read_yaml


def import_weights(source: Path, arguments: Path | None, out: Path) -> str:
    """Write the model file; what it is, for people.

    Args:
        source: a folder is diffusers', a file guided-diffusion's.
        arguments: a YAML file; see :func:`dvdp.models.guided_diffusion.read_checkpoint` and
            :func:`dvdp.models.diffusers_unet.read_folder`.

    Raises:
        UserError: a file is missing or damaged, or the architecture differs.
    """
    given: Any = {}
    if arguments is not None:
        if not arguments.is_file():
            raise UserError(f"--arguments: found no file '{arguments}', expected YAML, such as 'image_size: 256'.")
        given = read_yaml(arguments) or {}
    if not isinstance(given, dict):
        raise UserError(f"--arguments: found no keys in '{arguments}', expected YAML, such as 'image_size: 256'.")
    read = read_folder if source.is_dir() else read_checkpoint
    run = import_unet(read(source, given), out, str(source))
    classes = f"{run.model.num_classes} classes" if run.model.num_classes else "unconditional"
    return (
        f"{out}: {run.resolution} px, {classes}, {run.model.prediction_type}, T = {run.schedule.timesteps},"
        f" {run.schedule.base}; `dvdp draw {out}` draws from it, and `training.start: {out}` trains on."
    )
