"""Weights that training starts from: those of a network of the same architecture, whatever its turning points.

A level starts as that level of the other network whose images have its resolution, or the nearest. So one DDPM is the
start of every setting: its weights are those of all levels, with its one embedding of a level for each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvdp import tensors
from dvdp.config import Run, Start
from dvdp.errors import UserError
from dvdp.models.export import KIND, renamed
from dvdp.models.flops import training_flops, training_images
from dvdp.models.unet import build_network

#: Fields of the model that its weights depend on, and what they mean.
ARCHITECTURE = (
    "prediction_type", "model_channels", "channel_mult", "num_res_blocks", "attention_factors", "num_head_channels",
    "num_classes",
)  # fmt: skip
WHAT, REMEDY = "training.start", "give the weights.safetensors of a finished run, or a registered model"


def with_start(run: Run) -> Run:
    """The run with what ``training.start`` holds now, which its training hash covers; one without is returned as it is.

    Raises:
        UserError: the file is missing, none of ours, or of a network that cannot be the start of the run's.
    """
    if run.training.start is None:
        return run
    path = Path(run.training.start)
    digest = _digest(path)
    about, shapes = tensors.read_shapes(path, KIND, WHAT, REMEDY)
    other = Run.from_description(about["run"])
    _adapted(shapes, other, run, path)
    images, flops = about.get("images", training_images(other)), training_flops(other)
    if other.start is not None:
        images, flops = _sum(images, other.start.images), _sum(flops, other.start.flops)
    start = Start(digest, other.setting, about.get("training_hash", ""), images, None if images is None else flops)
    return dataclasses.replace(run, start=start)


def starting_weights(run: Run, path: Path) -> dict[str, Tensor]:
    """Weights of the run's network, by its names, from the file that named the run.

    Raises:
        UserError: the file is missing, or is another by now.
    """
    run.check_start()
    digest = _digest(path)
    if run.start is None or digest != run.start.sha256:
        expected = run.start.sha256[:12] if run.start else "none"
        raise UserError(
            f"{WHAT}: found SHA-256 {digest[:12]} of '{path}', expected {expected} as when the run was named; run the"
            " command again to train from the file as it is now, or put the other back."
        )
    about, weights = tensors.read(path, KIND, WHAT, REMEDY)
    return _adapted(weights, Run.from_description(about["run"]), run, path)


def _digest(path: Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"{WHAT}: found no file '{path}', expected a weights.safetensors; {REMEDY}.")
        state = path.stat()
        return _digest_of(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"{WHAT}: cannot read '{path}' ({error.strerror}), expected a readable file; {REMEDY}."
        ) from None


@lru_cache(maxsize=64)
def _digest_of(path: Path, *_state: int) -> str:
    """SHA-256 of a file, read once for all settings that start from it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(own: Any, before: Any) -> Any:
    return None if own is None or before is None else own + before


def _adapted(weights: Mapping[str, Tensor], other: Run, run: Run, path: Path) -> dict[str, Tensor]:
    """Weights of another run's network, as those of the run's; they may be without numbers.

    Raises:
        UserError: the architectures differ, or the weights are not those that the other run describes.
    """
    for field in ARCHITECTURE:
        found, expected = (_plain(field, getattr(each.model, field)) for each in (other, run))
        if found != expected:
            raise _differs(f"model.{field}", found, expected, run, path)
    per_level = other.model.networks == "per_level"
    if per_level and other.turning_points and run.model.networks == "shared":
        raise _differs("model.networks", "per_level", "shared", run, path)
    with torch.device("meta"):
        weights = renamed(weights, build_network(other.model, len(other.turning_points)))
        wanted = build_network(run.model, len(run.turning_points)).state_dict()

    levels = range(len(run.turning_points) + 1)
    networks = [("", levels)] if run.model.networks == "shared" else [(f"networks.{k}.", (k,)) for k in levels]
    adapted = {}
    for name, of_levels in networks:
        nearest = [_nearest(run.resolution >> level, other) for level in of_levels]
        start = f"networks.{nearest[0]}." if per_level else ""
        for key, tensor in weights.items():
            if key.startswith(start):
                rest = key.removeprefix(start)
                rows = [0 if per_level else level for level in nearest]
                adapted[name + rest] = tensor[rows] if rest == "level.weight" else tensor
    for name in sorted(wanted.keys() | adapted.keys()):
        found, expected = (list(each[name].shape) if name in each else "none" for each in (adapted, wanted))
        if found != expected:
            raise _differs(f"weights '{name}' of shape", found, expected, run, path)
    return adapted


def _nearest(side: int, other: Run) -> int:
    """The level of another run whose images are nearest in size, the finer of two."""
    levels = range(len(other.turning_points) + 1)
    return min(levels, key=lambda level: abs(math.log2((other.resolution >> level) / side)))


def _plain(field: str, value: Any) -> Any:
    """For people, and for comparing: attention factors have no order."""
    if field == "attention_factors":
        return sorted(set(value))
    return list(value) if isinstance(value, tuple) else value


def _differs(what: str, found: Any, expected: Any, run: Run, path: Path) -> UserError:
    return UserError(
        f"{WHAT}: found {what} {found} in '{path}', expected {expected} as in setting '{run.setting}'; start from"
        " weights of the same architecture, or change the setting's."
    )
