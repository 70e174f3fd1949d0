"""Several ranks train one run, go on to the bit, and on another number of ranks as if nothing had changed."""

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


def small_run(images: int = 360, log_images: int = 84) -> Run:
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
        "training": {
            "images": images,
            "groups": 12,
            "budget": "images",
            "batch": 12,
            "accumulation": 6,
            "warmup_images": 0,
        },
    }
    tree["training"] |= {"checkpoint_images": 120, "keep_checkpoints": 9, "log_images": log_images, "preview_images": 0}
    tree["training"] |= {"optimizer": "adamw", "learning_rate": 0.001, "cooldown": 0.0, "precision": "fp32"}
    return parse_params(tree).runs()[0]


def rank(number: int, world_size: int, folder: Path, *of_run: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=number, world_size=world_size)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    train(small_run(*of_run), ArrayImages(pixels), folder, "abc")
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


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks_as_one_rank_would_have(tmp_path: Path) -> None:
    changing, alone = tmp_path / "changing", tmp_path / "alone"
    for world_size, images in ((4, 120), (2, 240), (1, 360)):
        mp.spawn(rank, (world_size, changing, images, 60), nprocs=world_size)
        if images < 360:
            (changing / "weights.safetensors").unlink()
            (tmp_path / "changing.meet").unlink()
    mp.spawn(rank, (1, alone, 360, 60), nprocs=1)
    losses = [[e.metrics["loss"] for e in ledger.read(f / "metrics.jsonl")] for f in (changing, alone)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (load_file(folder / "weights.safetensors") for folder in (changing, alone))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-4)
