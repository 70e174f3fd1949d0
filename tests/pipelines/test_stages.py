"""Steps of the pipeline that need no server and no cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dvdp.config import Run, parse_params
from dvdp.models.export import load_model, save_model
from dvdp.models.unet import build_network
from pipelines.stages import sample_shard


def a_run() -> Run:
    tree = {
        "dataset": {"resolution": 16},
        "settings": [{"name": "small", "process": "dvdp", "turning_points": [500]}],
        "model": {"channels": 4, "multipliers": [1, 2], "attention": [2], "head_channels": 8},
        "sampling": {"count": 8, "steps": 4},
        "evaluation": {"samples": 4, "kid_subset": 2},
        "training": {"preview_steps": 2},
    }
    return parse_params(tree).runs()[0]


def test_samples_are_drawn_as_the_params_say_now_not_as_they_said_when_the_model_was_trained(tmp_path: Path) -> None:
    run = a_run()
    torch.manual_seed(0)
    network = build_network(run.model, 1)
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[union-attr]
    weights = tmp_path / "weights.safetensors"
    save_model(weights, network.state_dict(), {"run": run.describe(), "band_deviations": [0.2, 0.9]})
    for name, changed in {
        "same": run.sampling,
        "steps": replace(run.sampling, steps=6),
        "rule": replace(run.sampling, rule="ddim"),
        "lift": replace(run.sampling, lift="data"),
        "spacing": replace(run.sampling, spacing="quadratic"),
    }.items():
        sample_shard(str(weights), str(tmp_path / name), 2, 3, changed, parse_params({}).cluster)
        found = np.load(tmp_path / name / "00000002.npy")
        expected = load_model(weights, sampling=changed).sample(3, first=2).numpy()
        np.testing.assert_array_equal(found, expected)
        assert (name == "same") == np.array_equal(found, np.load(tmp_path / "same" / "00000002.npy"))
