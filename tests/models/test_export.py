"""How many images a model draws at once, and what its file may be."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvdp.config import parse_params
from dvdp.diffusion.sampling import images_together
from dvdp.models.export import TrainedModel, load_model, save_model
from dvdp.models.unet import build_network


@pytest.fixture
def model() -> TrainedModel:
    """Untrained, with weights that are not 0; full-size batches have 2 images."""
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [300, 600]}},
        "model": {
            "model_channels": 4, "channel_mult": [1], "attention_factors": [], "num_head_channels": 4, "num_classes": 2,
        },
        "sampling": {"batch": 2, "steps": 6},
    }  # fmt: skip
    (run,) = parse_params(tree).runs()
    network = build_network(run.model, len(run.turning_points)).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=source) / max(1, weight[0].numel()) ** 0.5)
    return TrainedModel.of(run, {"label_counts": [1, 1, 1]}, network, torch.device("cpu"))


@pytest.fixture
def calls(model: TrainedModel) -> list[tuple[int, int]]:
    """Pixels of a side and images of each call of the network."""
    seen = []

    def note(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append((arguments[0].shape[-1], len(arguments[0])))

    model.denoiser.network.register_forward_pre_hook(note)
    return seen


def test_a_draw_has_the_pixels_of_a_batch_at_once_at_every_level(
    model: TrainedModel, calls: list[tuple[int, int]]
) -> None:
    images = model.draw(11, 3)
    assert calls == [(4, 11)] * 2 + [(8, 8)] * 2 + [(8, 3)] * 2 + [(16, 2)] * 10 + [(16, 1)] * 2
    alone = torch.cat([model.draw(1, 3 + i) for i in range(11)])
    assert images.double().std() > 10
    assert (images.int() - alone.int()).abs().max() <= 1


def test_samples_come_in_draws_of_several_batches_and_do_not_depend_on_the_batch(
    model: TrainedModel, calls: list[tuple[int, int]]
) -> None:
    images = model.sample(40)
    assert [count for side, count in calls if side == 4] == [32] * 2 + [8] * 2
    assert max(count for side, count in calls if side == 16) == 2
    for batch in (1, 5, 40):
        assert (model.sample(40, batch=batch).int() - images.int()).abs().max() <= 1
    assert model.sample(0).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("points", "expected"), [((), 3), ((300,), 12), ((300, 600), 48), ((200, 400, 600), 48)])
def test_at_most_sixteen_batches_are_drawn_together(points: tuple[int, ...], expected: int) -> None:
    assert images_together(len(points), 3) == expected


def test_a_file_of_an_earlier_release_whose_blocks_had_their_modulations_still_loads(tmp_path: Path) -> None:
    model = {
        "model_channels": 4, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_factors": [2],
        "num_head_channels": 4, "num_classes": 0, "networks": "per_level",
    }  # fmt: skip
    settings = {"small": {"process": "subspace", "turning_points": [300]}}
    (run,) = parse_params({"dataset": {"resolution": 8}, "settings": settings, "model": model}).runs()
    network = build_network(run.model, 1)
    blocks = ["encoder.0.0", "encoder.1.0", "encoder.2.0", "middle.0", "middle.2"]
    blocks += ["decoder.0.0", "decoder.1.0", "decoder.1.2", "decoder.2.0", "decoder.3.0"]
    old = network.state_dict()
    for part, level, (place, block) in product(("weight", "bias"), (0, 1), enumerate(blocks)):
        old[f"networks.{level}.{block}.modulation.{part}"] = old.pop(f"networks.{level}.modulations.{place}.{part}")
    assert not [name for name in old if "modulations" in name]
    save_model(tmp_path / "weights.safetensors", old, {"run": run.describe()})
    loaded = load_model(tmp_path / "weights.safetensors")
    for name, weight in loaded.denoiser.network.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])
