"""Several ranks train one run, and go on to the bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.training import ledger
from dvdp.training.loop import train


def small_run() -> Run:
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [400]}},
        "model": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 2,
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 0,
        },
        "training": {"images": 360, "budget": "images", "batch": 12, "accumulation": 6, "warmup_images": 0},
    }
    tree["training"] |= {"checkpoint_images": 120, "keep_checkpoints": 9, "log_images": 84, "preview_images": 0}
    tree["training"] |= {"optimizer": "adamw", "learning_rate": 0.001, "cooldown": 0.0, "precision": "fp32"}
    return parse_params(tree).runs()[0]


def rank(number: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=number, world_size=world_size)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    train(small_run(), ArrayImages(pixels), folder, "abc")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_of_several_ranks_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, world_size: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    mp.spawn(rank, (world_size, whole), nprocs=world_size)
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / f"{120:012d}.safetensors", resumed / "checkpoints")
    shutil.copy(whole / "metrics.jsonl", resumed)
    mp.spawn(rank, (world_size, resumed), nprocs=world_size)

    one, two = (load_file(folder / "weights.safetensors") for folder in (whole, resumed))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    losses = [[(e.images, e.metrics["loss"]) for e in ledger.read(f / "metrics.jsonl")] for f in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [images for images, _ in losses[0]] == [84, 168, 252, 336, 360]
