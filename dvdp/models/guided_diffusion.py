"""Checkpoints of openai/guided-diffusion: state dicts of its ``UNetModel``, which do not say how it was built.

So its arguments are given, by the names and with the defaults of its scripts.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvdp.errors import UserError, did_you_mean
from dvdp.models.foreign import Foreign, differs, head_channels

#: Its arguments that shape a network or its process, and their defaults.
DEFAULTS: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "class_cond": False,
    "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False, "diffusion_steps": 1000,
    "noise_schedule": "linear", "predict_xstart": False, "rescale_timesteps": False,
}  # fmt: skip
#: Others that may stand beside them.
IGNORED = {
    "dropout", "learn_sigma", "use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas",
}  # fmt: skip
CHANNEL_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}
BLOCK = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "modulation": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
ENDS = {
    "time.0": "time_embed.0", "time.2": "time_embed.2", "stem": "input_blocks.0.0", "head.0": "out.0",
    "head.2": "out.2",
}  # fmt: skip


def read_checkpoint(path: Path, arguments: Mapping[str, Any]) -> Foreign:
    """A checkpoint as a UNet to import.

    Args:
        path: a state dict, by ``torch.save`` or as safetensors; nothing else is unpickled.
        arguments: of its scripts, such as ``{"image_size": 256, "resblock_updown": True}``.

    Raises:
        UserError: an argument is unknown or of another form, the file is no state dict, or the architecture differs.
    """
    for name in arguments:
        if name not in {*DEFAULTS, *IGNORED}:
            hint = did_you_mean(name, [*DEFAULTS, *IGNORED])
            raise UserError(f"--arguments: found '{name}'{hint}, expected arguments of guided-diffusion: {_names()}.")
    of, source = {**DEFAULTS, **arguments}, str(path)
    state = read_state(path)
    for name, default in DEFAULTS.items():
        if isinstance(default, bool) and not isinstance(of[name], bool):
            raise UserError(f"--arguments: {name}: found {of[name]!r}, expected true or false.")
    for name, needed in (("use_scale_shift_norm", True), ("resblock_updown", True), ("rescale_timesteps", False)):
        if of[name] is not needed and not (name == "rescale_timesteps" and of["diffusion_steps"] == 1000):
            raise differs(source, f"{name} {of[name]}", str(needed))
    size, width, blocks = (_whole(of, name) for name in ("image_size", "num_channels", "num_res_blocks"))
    mult = _list(of, "channel_mult", CHANNEL_MULT.get(size, ""))
    asked = {size // resolution for resolution in _list(of, "attention_resolutions")}
    # It passes over resolutions that no stage has.
    factors = [2**i for i in range(len(mult)) if 2**i in asked]
    stages = _stages(len(mult), blocks, factors)
    heads = of["num_head_channels"]
    if heads == -1:
        if of["num_heads_upsample"] not in (-1, of["num_heads"]):
            raise differs(source, f"num_heads_upsample {of['num_heads_upsample']}", f"{of['num_heads']}, num_heads")
        own = {f"{2**i}": width * m for i, m in enumerate(mult) if 2**i in factors or i == len(mult) - 1}
        heads = head_channels(own, _whole(of, "num_heads"), source)
    classes = state.get("label_emb.weight") if of["class_cond"] else None
    if of["class_cond"] and classes is None:
        raise differs(source, "class_cond True and no weights 'label_emb.weight'", "both or neither")
    return Foreign(
        model={
            "prediction_type": "sample" if of["predict_xstart"] else "epsilon",
            "model_channels": width,
            "channel_mult": mult,
            "num_res_blocks": blocks,
            "attention_factors": factors,
            "num_head_channels": heads,
            "num_classes": 0 if classes is None else len(classes),
        },
        schedule={"timesteps": of["diffusion_steps"], "base": of["noise_schedule"]},
        resolution=size,
        state=state,
        stages=stages,
        block=BLOCK,
        attention=ATTENTION,
        ends=ENDS,
        classes="label_emb.weight",
        heads_first=not of["use_new_attention_order"],
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Named tensors of a file; of pickles, ``torch.load(weights_only=True)`` makes nothing but tensors.

    Raises:
        UserError: it is missing, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"import: found no file '{path}', expected a checkpoint (.pt or .safetensors).")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"import: '{path}' is no whole safetensors file ({error}); fetch it again.") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(
            f"import: '{path}' is no file of tensors alone ({reason}), expected a state dict; save it as safetensors."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(
            f"import: '{path}' holds other things than named tensors, expected a state dict of weights alone."
        )
    return state


def _stages(levels: int, blocks: int, factors: list[int]) -> list[list[str]]:
    """Names of the layers of its UNet, in the order of ours."""
    encoder, decoder = [], []
    for i in range(levels):
        layers = 2 if 2**i in factors else 1
        encoder += [layers] * blocks + [1] * (i < levels - 1)
    for i in reversed(range(levels)):
        layers = 2 if 2**i in factors else 1
        decoder += [layers] * blocks + [layers + (i > 0)]
    stages = [[f"input_blocks.{i}.{j}" for j in range(layers)] for i, layers in enumerate(encoder, 1)]
    stages.append([f"middle_block.{j}" for j in range(3)])
    return stages + [[f"output_blocks.{i}.{j}" for j in range(layers)] for i, layers in enumerate(decoder)]


def _names() -> str:
    return ", ".join(DEFAULTS)


def _whole(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments[name]
    if type(value) is not int or value < 1:
        raise UserError(f"--arguments: {name}: found {value!r}, expected a whole number above 0.")
    return value


def _list(arguments: Mapping[str, Any], name: str, default: str = "") -> list[int]:
    value = arguments[name] or default
    items = value if isinstance(value, list) else str(value).split(",")
    try:
        numbers = [int(str(item)) for item in items]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--arguments: {name}: found {value!r}, expected whole numbers above 0, such as '1,2,3,4'.")
    return numbers
