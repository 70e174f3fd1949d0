"""Levels that are trained at all timesteps: one training for every choice of turning points."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvdp import Schedule
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.diffusion.sampling import sample
from dvdp.errors import UserError
from dvdp.identity import sampling_hash, training_hash
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.export import load_model, save_model
from dvdp.models.flops import level_flops, mean_flops, training_images
from dvdp.models.unet import build_network
from dvdp.training.levels import BLOCK, AllTimesteps, draw, level_counts
from dvdp.training.loop import Training, train
from dvdp.training.memory import worker_memory

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
IMAGES = ArrayImages(PICTURES)


def make(process: str = "subspace", points: tuple[int, ...] = (300,), span: str = "all", **training: Any) -> Run:
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"s": {"process": process, "turning_points": list(points)}},
        "model": {
            "model_channels": 4,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 4,
            "num_classes": 0,
            "networks": "per_level",
        },
        "training": {
            "images": 64, "batch": 8, "warmup_images": 0, "preview_images": 0, "log_images": 8, "preview_steps": 4,
            "precision": "fp32", "checkpoint_images": 32, "span": span, **training,
        },
        "sampling": {"steps": 6},
    }  # fmt: skip
    return parse_params(tree).runs()[0]


def trained(run: Run) -> str:
    return training_hash(run, "digest", flip=False)


def test_settings_with_other_turning_points_have_one_training_and_samples_of_their_own() -> None:
    runs = [make(points=points) for points in ((300,), (600,))]
    assert trained(runs[0]) == trained(runs[1])
    assert sampling_hash(runs[0], "t") != sampling_hash(runs[1], "t")
    assert training_images(runs[0]) == training_images(runs[1])
    assert trained(make(points=(300, 600))) != trained(runs[0]), "another number of networks"
    apart = [make(points=points, span="level") for points in ((300,), (600,))]
    assert len({trained(run) for run in (*apart, runs[0])}) == 3
    assert sampling_hash(apart[0], "t") == sampling_hash(apart[1], "t"), "as ever"
    assert trained(make("ddpm", ())) == trained(make("ddpm", (), span="level")), "one level has all timesteps anyhow"


def test_both_settings_train_to_the_same_bits(tmp_path: Path) -> None:
    found = []
    for points in ((300,), (600,)):
        train(make(points=points), IMAGES, tmp_path / str(points), "hash")
        found.append(load_file(tmp_path / str(points) / "weights.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("levels", ["all", "one"])
def test_every_level_has_an_equal_share_and_all_timesteps(levels: Any) -> None:
    spans, seen, counted = AllTimesteps(2, 1000), [Counter[int]() for _ in range(3)], torch.zeros(3)
    for step in range(3 * BLOCK):
        counts = level_counts(spans, levels, 0, step, 7)
        counted += torch.tensor(counts)
        drawn = draw(spans, counts, 16, torch.device("cpu"), seed=0, step=step)
        for level, times in enumerate(drawn.t.split(counts)):
            seen[level].update(times.tolist())
    assert (counted / counted.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    for times in seen:
        assert min(times) <= 20
        assert max(times) >= 980
        assert max(times) <= 1000
        assert sum(t * n for t, n in times.items()) / times.total() == pytest.approx(500.5, abs=25)


def test_a_training_step_shows_each_level_timesteps_beyond_its_own() -> None:
    training = Training(make(), IMAGES, Path(), "hash", False, torch.device("cpu"), None)
    shown: dict[int, list[int]] = {0: [], 1: []}
    training.live.register_forward_pre_hook(lambda _, given: shown[given[2]].extend(given[1].tolist()))
    for step in range(20):
        training.step(step, torch.from_numpy(PICTURES))
    assert [len(times) for times in shown.values()] == [80, 80]
    assert max(shown[0]) > 900
    assert min(shown[1]) < 100


def test_costs_do_not_depend_on_the_turning_points() -> None:
    one, other = make(points=(300,)), make(points=(600,))
    assert mean_flops(one) == mean_flops(other) == sum(level_flops(one)) / 2
    assert worker_memory(one, 1, gpu=False) == worker_memory(other, 1, gpu=False)


def test_a_model_draws_with_the_turning_points_that_it_is_given(tmp_path: Path) -> None:
    run, path = make(), tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    network = build_network(run.model, 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(path, network.state_dict(), {"run": run.describe()})
    for points in ((300,), (600,)):
        model = load_model(path, turning_points=points)
        process = model.process
        assert process.schedule.turning_points == points
        expected = sample(
            process,
            NetworkDenoiser(network.eval(), process, 16, "v_prediction"),
            (2, 3, 16, 16),
            **run.sampling.options(),
        )
        found = model.sample(2).float() / 127.5 - 1
        assert (found - expected.clamp(-1, 1)).abs().max() <= 1 / 127
    assert not torch.equal(load_model(path).sample(2), load_model(path, turning_points=(600,)).sample(2))


def test_weights_of_other_levels_or_spans_are_refused_for_other_turning_points(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for run in (make(), make(span="level")):
        save_model(path, build_network(run.model, 1).state_dict(), {"run": run.describe()})
        points = (300, 600) if run.at_all_timesteps else (600,)
        with pytest.raises(UserError, match=r"^turning_points: found .* for weights of \[300\]"):
            load_model(path, turning_points=points)
    save_model(path, build_network(make().model, 1).state_dict(), {"run": make().describe()})
    with pytest.raises(UserError, match=r"^turning_points: found \[1000\]"):
        load_model(path, turning_points=(1000,))


def test_dvdp_cannot_be_trained_so() -> None:
    with pytest.raises(UserError, match=r"training.span: found 'all' for process dvdp, .*, in setting 's'\.$"):
        make("dvdp")


def test_states_of_any_level_at_any_timestep_are_those_of_the_subspace() -> None:
    """Of bands that are all attenuated alike, so no turning point is in them."""
    early, late = (Schedule.subspace([point]) for point in (300, 600))
    assert torch.equal(early.signal, late.signal)
    assert torch.equal(early.noise, late.noise)
