"""`dvdp draw` and a model's own sampling refuse more images than a machine holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvdp.config import parse_params
from dvdp.errors import UserError
from dvdp.models.export import load_model, save_model
from dvdp.models.unet import UNet
from pipelines.commands.runs import draw


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tree = {
        "dataset": {"resolution": 8},
        "model": {"model_channels": 4, "channel_mult": [1], "attention_factors": [], "num_classes": 0},
    }
    run = parse_params(tree).runs()[1]
    save_model(tmp_path / "weights.safetensors", UNet(run.model, 1).state_dict(), {"run": run.describe()})
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("count", [10_001, 10**12, 10**40])
def test_a_picture_holds_so_many_images(weights: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"--count: found {count}, expected at most 10,000 at 8 px"):
        draw(str(weights), count, "cpu", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_model_draws_so_many_images_at_a_time(weights: Path) -> None:
    with pytest.raises(UserError, match=f"count: found {10**9}, expected at most 16,777,216 images of 8 px"):
        load_model(weights).sample(10**9)
    assert load_model(weights).sample(2, steps=3).shape == (2, 3, 8, 8)
