"""Named tensors and what they are, in one safetensors file. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dvdp.errors import UserError


def pack(kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file; equal content for equal input.

    Args:
        kind: what the file is, with its version, e.g. ``"dvdp model 1"``; :func:`read` asks for the same.
        about: anything that JSON holds.
    """
    # One key: safetensors writes several in any order, and equal tensors should be equal files.
    header = {kind: json.dumps(dict(about), sort_keys=True)}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)


def read(path: Path, kind: str, what: str, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`pack` was given, tensors on the CPU.

    Args:
        what: names the file in errors, e.g. "model".
        remedy: what to do about a file that is not as it should be.

    Raises:
        UserError: the file is damaged, or of another kind or version.
    """
    with _opened(path, kind, what, remedy) as (about, file):
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_shapes(path: Path, kind: str, what: str, remedy: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As :func:`read`, the tensors without their numbers, on the device ``meta``."""
    with _opened(path, kind, what, remedy) as (about, file):
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return about, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_about(path: Path, kind: str, what: str, remedy: str) -> dict[str, Any]:
    """As :func:`read`, without the tensors, which stay on disk."""
    with _opened(path, kind, what, remedy) as (about, _):
        return about


@contextlib.contextmanager
def _opened(path: Path, kind: str, what: str, remedy: str) -> Iterator[tuple[dict[str, Any], Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(kind)
            if header is None:
                raise UserError(
                    f"{what}: '{path}' is a safetensors file of another kind or version, expected '{kind}'; {remedy}."
                )
            yield json.loads(header), file
    except SafetensorError as error:
        raise UserError(f"{what}: '{path}' is no whole safetensors file ({error}); {remedy}.") from None
