"""What is counted of memory and disk is what training takes."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.gpu.fake import fake_gpu
from dvdp.config import ModelParams, Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.compute import Computing, arrange
from dvdp.models.unet import UNet, build_network
from dvdp.precision import BF16_INSTRUCTIONS, cpu_instructions
from dvdp.training import checkpoints
from dvdp.training.loop import train
from dvdp.training.memory import (
    RAY,
    activation_bytes,
    checkpoint_bytes,
    optimizer_bytes,
    parameter_count,
    run_bytes,
    worker_memory,
)
from dvdp.training.optimizer import matrices

TRAIN = """
import sys, json, tempfile
import numpy as np, torch
from pathlib import Path
from dvdp.config import Run
from dvdp.data.loading import ArrayImages
from dvdp.training.estimate import peak_memory
from dvdp.training.loop import train
import dvdp.evaluation.figures

torch.set_num_threads(1)
run = Run.from_description(json.loads(sys.stdin.read()))
images = ArrayImages(np.zeros((64, 3, run.resolution, run.resolution), np.uint8), np.zeros(64, int))
with tempfile.TemporaryDirectory() as folder:
    train(run, images, Path(folder), "abc", description={"label_counts": [1] * run.model.num_classes + [0]})
print(peak_memory(torch.device("cpu")))
"""


def run_of(points: list[int] | None = None, model: dict[str, Any] | None = None, **training: Any) -> Run:
    tree = {
        "settings": {"x": {"process": "dvdp" if points else "ddpm", "turning_points": points or []}},
        "model": model or {},
        "training": {
            "budget": "images",
            "images": 4 * training.get("batch", 32),
            "preview_images": 0,
            "precision": "fp32",
            **training,
        },
    }
    return parse_params(tree).runs()[0]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("points", "model", "training"),
    [
        ([], {}, {}),
        ([300, 600], {}, {}),
        ([], {}, {"precision": "bf16"}),
        ([300, 600], {}, {"precision": "bf16"}),
        ([], {}, {"batch": 64, "accumulation": 4}),
        ([600], {}, {"levels": "one", "batch": 16}),
        ([], {}, {"batch": 64, "activation_checkpointing": True}),
        ([], {"model_channels": 32}, {"batch": 16, "optimizer": "adamw"}),
    ],
)
def test_the_counted_memory_is_within_a_tenth_of_what_a_process_takes(
    points: list[int], model: dict[str, Any], training: dict[str, Any]
) -> None:
    from pipelines.jobs.cluster import WORKER_ENVIRONMENT

    if training.get("precision") == "bf16" and not cpu_instructions() & BF16_INSTRUCTIONS:
        pytest.skip("this CPU has no instructions for bf16, and no kernels with them")
    # Long enough for every number of images that a level may have.
    run = run_of(points, model, **{"images": 12 * training.get("batch", 32), **training})
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        input=json.dumps(run.describe()),
        capture_output=True,
        text=True,
        env={**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert worker_memory(run, ranks=1, gpu=False) - RAY == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_the_counted_disk_is_what_a_run_leaves(tmp_path: Path, optimizer: str, networks: str) -> None:
    run = run_of([600], {"num_classes": 0, "networks": networks}, optimizer=optimizer, batch=4, checkpoint_images=4)
    run = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, count=10))
    train(run, ArrayImages(np.zeros((8, 3, 32, 32), np.uint8)), tmp_path, "abc")
    kept = checkpoints.find(tmp_path / "checkpoints")
    assert len(kept) == run.training.keep_checkpoints
    assert checkpoint_bytes(run) == pytest.approx(kept[0].stat().st_size, rel=0.05)
    files = [*kept, tmp_path / "weights.safetensors"]
    assert run_bytes(run) == pytest.approx(sum(file.stat().st_size for file in files) + 10 * 3 * 32**2, rel=0.05)
    said = json.loads((tmp_path / "estimate.json").read_text())
    assert (said["disk_bytes"], said["memory_bytes"]) == (run_bytes(run), worker_memory(run, 1, False))


MODELS: list[tuple[dict[str, Any], int]] = [
    ({}, 32),
    ({"model_channels": 8, "channel_mult": [3], "attention_factors": [], "num_classes": 0}, 4),
    ({"model_channels": 8, "channel_mult": [1, 1], "attention_factors": [1, 2], "num_res_blocks": 3}, 16),
    ({"channel_mult": [4, 2, 1], "num_head_channels": 16, "networks": "per_level", "dropout": 0.3}, 16),
    ({"model_channels": 64, "channel_mult": [1, 1, 2, 3], "attention_factors": [2, 8], "num_res_blocks": 2}, 32),
    ({"model_channels": 12, "channel_mult": [2, 1, 5], "num_head_channels": 4, "dropout": 0.1}, 20),
    ({"model_channels": 8, "attention_factors": [1], "num_head_channels": 4}, 20),
]


@pytest.mark.parametrize("points", [[], [300, 600]])
@pytest.mark.parametrize(("model", "resolution"), MODELS)
def test_parameters_and_moments_are_those_of_the_network(
    points: list[int], model: dict[str, Any], resolution: int
) -> None:
    run = run_of(points, model)
    network = build_network(run.model, len(points))
    count, muon = (sum(p.numel() for p in found) for found in (network.parameters(), matrices(network)))
    assert parameter_count(run) == count
    adamw = dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer="adamw"))
    assert optimizer_bytes(adamw) == 8 * count
    assert optimizer_bytes(run) == 8 * count - 4 * muon, "Muon keeps one moment of its matrices"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("model", "resolution"), MODELS)
def test_activations_are_those_that_autograd_saves(
    model: dict[str, Any], resolution: int, gpu: bool, precision: str
) -> None:
    run = dataclasses.replace(run_of(model=model, precision=precision), resolution=resolution)
    few, more = (_saved(run.model, resolution, precision == "bf16", gpu, images) for images in (2, 4))
    # So that what does not grow with the images, such as weights, does not count.
    total, inputs, *stages = ((b - a) / 2 for a, b in zip(few, more, strict=True))
    # A GPU's kernels round sizes up, which shows in maps of few pixels.
    close = 0.03 if gpu else 0.01
    assert activation_bytes(run, 0, gpu) == pytest.approx(total, rel=close)
    again = dataclasses.replace(run, training=dataclasses.replace(run.training, activation_checkpointing=True))
    assert activation_bytes(again, 0, gpu) == pytest.approx(inputs + max(stages), rel=close)


def _saved(model: ModelParams, resolution: int, low: bool, gpu: bool, images: int) -> list[int]:
    """Bytes that a forward pass saves: all of them, the inputs of stages, and those within each stage.

    Of a GPU nothing runs: its tensors have shapes and no numbers.
    """
    inputs: dict[int, int] = {}
    stages: list[dict[int, int]] = [{}]  # And what lies between them.
    everything: dict[int, int] = {}
    alive = []  # An address must not be used again.

    def note(tensor: torch.Tensor, *into: dict[int, int]) -> torch.Tensor:
        alive.append(tensor.untyped_storage())
        for sizes in into:
            sizes[alive[-1]._cdata] = alive[-1].nbytes()
        return tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return note(tensor, everything, stages[-1])

    class Staged(UNet):
        def _stage(self, layers: nn.Module, modulations: Iterator[torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
            for part in parts:
                note(part, inputs)
            stages.append({})
            out = super()._stage(layers, modulations, *parts)
            stages.append({})
            return out

    with fake_gpu() if gpu else contextlib.nullcontext():
        device = torch.device("cuda" if gpu else "cpu")
        network = Computing(arrange(Staged(model), device), "bf16" if low else "fp32").network
        x, t = torch.zeros(images, 3, resolution, resolution).to(device), torch.zeros(images).to(device)
        labels = torch.zeros(images, dtype=torch.long).to(device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(x, t, 0, labels)
    return [sum(sizes.values()) for sizes in (everything, inputs, *stages[1::2])]


def test_bf16_halves_activations_and_computing_them_again_leaves_a_third() -> None:
    run = run_of()
    low, again = (run_of(**change) for change in ({"precision": "bf16"}, {"activation_checkpointing": True}))
    assert activation_bytes(low, 0, False) == pytest.approx(activation_bytes(run, 0, False) / 2, rel=0.03)
    assert activation_bytes(low, 0, True) < 0.7 * activation_bytes(low, 0, False), "norm and SiLU keep one input there"
    assert activation_bytes(again, 0, False) < activation_bytes(run, 0, False) / 3


def test_memory_falls_with_accumulation_ranks_and_levels() -> None:
    whole = worker_memory(run_of(batch=64), 1, False)
    assert worker_memory(run_of(batch=64, accumulation=4), 1, False) < whole
    assert worker_memory(run_of(batch=64), 4, False) == worker_memory(run_of(batch=16), 1, False)
    assert worker_memory(run_of([300, 600], batch=64), 1, False) < whole
    wide = run_of(model={"model_channels": 256, "channel_mult": [1, 1, 2, 2, 4]}, batch=8)
    state = 12 * parameter_count(wide) + optimizer_bytes(wide)
    saved = worker_memory(wide, 8, True) - worker_memory(wide, 8, True, sharded=True)
    assert 0.6 * state < saved < 7 / 8 * state
    assert worker_memory(run_of([300, 600], batch=64, levels="one"), 1, False) >= whole
