"""Folders of diffusers' ``UNet2DModel``: ``config.json`` and ``diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvdp.errors import UserError, did_you_mean
from dvdp.models.foreign import Foreign, differs, head_channels
from dvdp.models.guided_diffusion import read_state

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: What the folder does not say, and what it is by default.
DEFAULTS: dict[str, Any] = {"prediction_type": "epsilon", "timesteps": 1000, "base": "linear"}
#: Values of its config that our UNet has: those of the key, and those that diffusers takes where it is left out.
NEEDED: dict[str, tuple[Any, Any]] = {
    "_class_name": ("UNet2DModel", "UNet2DModel"),
    "in_channels": (3, 3),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (0, 0),
    "mid_block_scale_factor": (1, 1),
    "act_fn": ("silu", "silu"),
    "norm_num_groups": (32, 32),
    "attn_norm_num_groups": (32, None),
    "norm_eps": (1e-5, 1e-5),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
}
BLOCK = {
    "norm1": "norm1", "conv1": "conv1", "modulation": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "qkv": "to_q,to_k,to_v", "out": "to_out.0"}
#: The same in files of its early releases.
EARLY_ATTENTION = {"norm": "group_norm", "qkv": "query,key,value", "out": "proj_attn"}
ENDS = {
    "time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2", "stem": "conv_in",
    "head.0": "conv_norm_out", "head.2": "conv_out",
}  # fmt: skip


def read_folder(folder: Path, arguments: Mapping[str, Any]) -> Foreign:
    """A folder as a UNet to import.

    Args:
        arguments: what the folder does not say, see :data:`DEFAULTS`; and ``sample_size`` where its config has none.

    Raises:
        UserError: a file is missing or damaged, an argument is unknown, or the architecture differs.
    """
    source = str(folder)
    for name in arguments:
        if name not in {*DEFAULTS, "sample_size"}:
            known = [*DEFAULTS, "sample_size"]
            raise UserError(f"--arguments: found '{name}'{did_you_mean(name, known)}, expected {', '.join(known)}.")
    config = {**_config(folder / "config.json"), **{k: v for k, v in arguments.items() if k == "sample_size"}}
    for name, (needed, default) in NEEDED.items():
        if config.get(name, default) != needed:
            raise differs(source, f"{name} {config.get(name, default)}", str(needed))
    try:
        widths = [int(width) for width in config["block_out_channels"]]
        down, up = list(config["down_block_types"]), list(config["up_block_types"])
        blocks, size = int(config.get("layers_per_block", 2)), int(config["sample_size"])
        if not len(widths) == len(down) == len(up) > 0 or min(*widths, blocks, size) < 1:
            raise ValueError("sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"import: found no usable {error} in '{folder / 'config.json'}', expected block_out_channels,"
            " down_block_types, up_block_types and sample_size; give sample_size with --arguments."
        ) from None
    last = len(widths) - 1
    attended = _attended(config, down, up, source)
    factors = [2**i for i in range(len(widths)) if attended[i]]
    if uneven := [width for width in widths if width % widths[0]]:
        raise differs(source, f"block_out_channels {widths}", f"multiples of the first, not {uneven[0]}")
    head = config.get("attention_head_dim", 8)
    of_heads = {str(2**i): width for i, width in enumerate(widths) if attended[i] or i == last}
    state = read_state(folder / WEIGHTS)
    early = "mid_block.attentions.0.query.weight" in state
    classes = config.get("num_class_embeds") or 0
    sines_first = not config.get("flip_sin_to_cos", True)
    return Foreign(
        model={
            "prediction_type": arguments.get("prediction_type", DEFAULTS["prediction_type"]),
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": blocks,
            "attention_factors": factors,
            "num_head_channels": head_channels(of_heads, 1, source) if head is None else head,
            "num_classes": classes,
        },
        schedule={name: arguments.get(name, DEFAULTS[name]) for name in ("timesteps", "base")},
        resolution=size,
        state=state,
        stages=_stages(attended, blocks),
        block=BLOCK,
        attention=EARLY_ATTENTION if early else ATTENTION,
        ends=ENDS,
        classes="class_embedding.weight",
        heads_first=False,
        sines_first=sines_first,
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"import: found no file '{path}', expected the folder of a UNet2DModel, with {WEIGHTS} beside it."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"import: '{path}' is no JSON ({error}), expected the config of a UNet2DModel.") from None
    if not isinstance(config, dict):
        raise UserError(f"import: '{path}' holds no object, expected the config of a UNet2DModel.")
    return config


def _attended(config: Mapping[str, Any], down: list[str], up: list[str], source: str) -> list[bool]:
    """Whether each stage has attention, the first at full size; all of them resample in residual blocks."""
    last, attended = len(down) - 1, []
    for i, name in enumerate(down):
        # The last stage down, and the last one up, do not resample.
        kinds = ("AttnDownBlock2D", "ResnetDownsampleBlock2D", *(("DownBlock2D",) if i == last else ()))
        if name not in kinds:
            raise differs(source, f"down_block_types[{i}] {name}", " or ".join(kinds))
        if name == "AttnDownBlock2D" and i < last and config.get("downsample_type", "conv") != "resnet":
            raise differs(source, f"downsample_type {config.get('downsample_type', 'conv')}", "resnet")
        attended.append(name.startswith("Attn"))
    for i, (name, attention) in enumerate(zip(up, reversed(attended), strict=False)):
        plain = ("ResnetUpsampleBlock2D", *(("UpBlock2D",) if i == last else ()))
        kinds = ("AttnUpBlock2D",) if attention else plain
        if name not in kinds:
            raise differs(source, f"up_block_types[{i}] {name}", " or ".join(kinds))
        if attention and i < last and config.get("upsample_type", "conv") != "resnet":
            raise differs(source, f"upsample_type {config.get('upsample_type', 'conv')}", "resnet")
    return attended


def _stages(attended: list[bool], blocks: int) -> list[list[str]]:
    """Names of the layers of its UNet, in the order of ours."""
    last, stages = len(attended) - 1, []

    def layers(place: str, j: int, attention: bool) -> list[str]:
        return [f"{place}.resnets.{j}", *([f"{place}.attentions.{j}"] if attention else [])]

    for i, attention in enumerate(attended):
        stages += [layers(f"down_blocks.{i}", j, attention) for j in range(blocks)]
        stages += [[f"down_blocks.{i}.downsamplers.0"]] if i < last else []
    stages.append(["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"])
    for i, attention in enumerate(reversed(attended)):
        stages += [layers(f"up_blocks.{i}", j, attention) for j in range(blocks + 1)]
        if i < last:
            stages[-1].append(f"up_blocks.{i}.upsamplers.0")
    return stages
