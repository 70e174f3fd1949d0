"""Checkpoints: one safetensors file each, written aside, fsynced, renamed, and pruned to the last few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dvdp import tensors
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.training.ranks import share_like

KIND = "dvdp checkpoint 1"


class Checkpoint(NamedTuple):
    """State after a number of images. Tensors are named ``model.*``, ``ema.*``, ``optimizer.*``, ``window.*``.

    Tensors are whole, on whatever number of ranks. Random states are no part of it: a step draws from its own seeds.
    """

    images: int
    tensors: dict[str, Tensor]


def write(folder: Path, checkpoint: Checkpoint, training_hash: str, keep: int) -> Path:
    """Write ``<images>.safetensors`` and delete all but the newest ``keep``."""
    for stranded in folder.glob(".*.part"):  # by a kill in the middle of writing
        stranded.unlink()
    file = path(folder, checkpoint.images)
    about = {"images": checkpoint.images, "hash": training_hash}
    write_atomically(file, tensors.pack(KIND, about, checkpoint.tensors))
    for old in find(folder)[:-keep]:
        old.unlink()
    return file


def path(folder: Path, images: int) -> Path:
    """Where the checkpoint after so many images lies."""
    return folder / f"{images:012d}.safetensors"


def find(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def read(file: Path, training_hash: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: it is damaged, foreign, or of another configuration.
    """
    about, state = tensors.read(file, KIND, "checkpoint", "delete it to go on from the one before")
    if about["hash"] != training_hash:
        raise UserError(
            f"checkpoint: '{file}' belongs to configuration {about['hash']}, expected {training_hash};"
            " resume with the params it was made with, or start in another folder."
        )
    return Checkpoint(about["images"], state)


def pack(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's weights as ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def unpack(prefix: str, module: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`pack`, from whole tensors."""
    start = prefix + "."
    load(module, {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)})


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole tensors into a module, which may have shares of them."""
    state = module.state_dict()
    module.load_state_dict({name: share_like(tensor, state[name]) for name, tensor in weights.items()})
