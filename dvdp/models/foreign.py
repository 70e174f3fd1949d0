"""Weights of other libraries' UNets as ours, where the architecture is the same: what their layouts have in common.

Both count timesteps from 0 and we from 1, so that theirs see ``t - 1``. That is a rotation of the sinusoids of t, which
the first linear layer takes over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvdp.config import ModelParams, Run, parse_params
from dvdp.errors import UserError
from dvdp.models.export import save_model
from dvdp.models.layout import Attention, Block, attention_heads, norm_groups, unet_layout
from dvdp.models.unet import UNet

#: Groups of all group norms of both.
GROUPS = 32
CHANNELS = 3


@dataclass(frozen=True)
class Foreign:
    """A UNet of another library."""

    model: Mapping[str, Any]
    """Section ``model`` of our params."""
    schedule: Mapping[str, Any]
    resolution: int
    state: Mapping[str, Tensor]
    """By its own names."""
    stages: list[list[str]]
    """Names of its layers, stage by stage, in the order of :func:`dvdp.models.layout.unet_layout`."""
    block: Mapping[str, str]
    """Parts of a residual block, ours -> theirs; ``modulation`` is one."""
    attention: Mapping[str, str]
    """The same of attention, of which q, k and v may be three."""
    ends: Mapping[str, str]
    """The same of what lies around the stages."""
    classes: str
    """Name of the embedding of classes."""
    heads_first: bool = False
    """The rows of its qkv are ordered by head before q, k and v."""
    sines_first: bool = False
    """In the sinusoids of t."""


def import_unet(foreign: Foreign, out: Path, source: str) -> Run:
    """Write another library's UNet as a model file of ours; what it also predicts beside the image is left out.

    Args:
        source: where it lies, for errors.

    Returns:
        The run that the file describes: DDPM, trained on an unknown number of images.

    Raises:
        UserError: the architectures differ; it names the first difference.
    """
    params = parse_params(
        {
            "dataset": {"resolution": foreign.resolution},
            "settings": {"imported": {"process": "ddpm"}},
            "model": dict(foreign.model),
            "schedule": dict(foreign.schedule),
            "training": {"precision": "fp32", "preview_steps": 1},
            # As many as any process has.
            "sampling": {"steps": 1},
        },
        source,
    )
    run = params.runs()[0]
    run = replace(run, sampling=replace(run.sampling, steps=min(50, run.schedule.timesteps)))
    weights = convert(foreign, run.model, source)
    classes = run.model.num_classes
    about = {
        "run": run.describe(),
        "training_hash": "",
        "images": None,
        "labels": [str(number) for number in range(classes)],
        "label_counts": [1] * classes + [0],
    }
    save_model(out, weights, about)
    return run


def convert(foreign: Foreign, model: ModelParams, source: str) -> dict[str, Tensor]:
    """Weights by our names, of a network without turning points.

    Raises:
        UserError: see :func:`import_unet`.
    """
    layout = unet_layout(model)
    blocks = [layer for layer in layout.layers if isinstance(layer, Block)]
    for width in sorted({width for block in blocks for width in (block.inputs, block.width)}):
        if norm_groups(width) != GROUPS:
            raise differs(
                source, f"group norms of {GROUPS} groups over {width} channels", f"{norm_groups(width)} groups"
            )
    with torch.device("meta"):
        wanted = UNet(model, 0, CHANNELS).state_dict()
    state, found = dict(foreign.state), {}

    def take(theirs: str, ours: str) -> Tensor:
        if theirs not in state:
            raise differs(source, f"no weights '{theirs}'", f"them of shape {list(wanted[ours].shape)}")
        return state.pop(theirs).float()

    def put(ours: str, theirs: str, tensor: Tensor) -> None:
        shape = wanted[ours].shape
        # Convolutions of one pixel may be over pixels in a row, or linear layers.
        tensor = tensor.reshape(*tensor.shape, *(1,) * (len(shape) - tensor.dim()))
        if tensor.shape != shape:
            raise differs(source, f"weights '{theirs}' of shape {list(tensor.shape)}", f"{list(shape)}")
        found[ours] = tensor.contiguous()

    for ours, theirs in foreign.ends.items():
        for name in (f"{ours}.weight", f"{ours}.bias"):
            other = name.replace(ours, theirs)
            tensor = take(other, name)
            # Behind the image may come what it predicts of the variance.
            put(name, other, tensor[:CHANNELS] if ours == "head.2" and len(tensor) == 2 * CHANNELS else tensor)
    found["time.0.weight"] = _one_later(found["time.0.weight"], foreign.sines_first)
    found["level.weight"] = torch.zeros(wanted["level.weight"].shape)
    if model.num_classes:
        rows = take(foreign.classes, "classes.weight")
        # It knows none for images without a label.
        put("classes.weight", foreign.classes, torch.cat([rows, torch.zeros(1, rows.shape[1])]))

    places = [f"encoder.{i}" for i in range(len(layout.encoder))]
    places += ["middle", *(f"decoder.{i}" for i in range(len(layout.decoder)))]
    number = 0
    for place, stage, names in zip(places, layout.stages, foreign.stages, strict=True):
        for i, (layer, name) in enumerate(zip(stage, names, strict=True)):
            for part, theirs in (foreign.block if isinstance(layer, Block) else foreign.attention).items():
                ours = f"modulations.{number}" if part == "modulation" else f"{place}.{i}.{part}"
                if part == "skip" and f"{ours}.weight" not in wanted:
                    continue
                for kind in ("weight", "bias"):
                    each = [f"{name}.{one}.{kind}" for one in theirs.split(",")]
                    tensor = torch.cat([take(one, f"{ours}.{kind}") for one in each])
                    if part == "qkv" and foreign.heads_first and isinstance(layer, Attention):
                        heads = attention_heads(layer.width, model.num_head_channels)
                        tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                    put(f"{ours}.{kind}", each[0], tensor)
            number += isinstance(layer, Block)
    if state:
        raise differs(source, f"weights '{min(state)}'", "none of this name")
    return found


def differs(source: str, found: str, expected: str) -> UserError:
    """Of two architectures."""
    return UserError(
        f"import: found {found} in '{source}', expected {expected}, as our UNet has it; only networks of the same"
        " architecture can be imported."
    )


def head_channels(widths: Mapping[str, int], heads: int, source: str) -> int:
    """Channels of a head, of attention that has so many heads at each width.

    Raises:
        UserError: they differ from one width to another, and heads are several.
    """
    channels = sorted({width // heads for width in widths.values()})
    if heads == 1:
        return channels[-1]
    if len(channels) > 1:
        raise differs(source, f"heads of {channels[0]} and of {channels[-1]} channels (num_heads {heads})", "one size")
    return channels[0]


def _one_later(weight: Tensor, sines_first: bool) -> Tensor:
    """Weights of sinusoids of t - 1 as those of cosines and sines of t: ``cos(a - f) = cos a cos f + sin a sin f``."""
    half = weight.shape[1] // 2
    first, second = weight.double().split(half, dim=1)
    cosines, sines = (second, first) if sines_first else (first, second)
    f = torch.exp(-math.log(10_000) / half * torch.arange(half)).double()
    return torch.cat([cosines * f.cos() - sines * f.sin(), cosines * f.sin() + sines * f.cos()], dim=1).float()
