"""What is counted of memory and disk is what training takes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.unet import build_network
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
        "settings": [{"name": "x", "process": "dvdp" if points else "ddpm", "turning_points": points or []}],
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "model", "training"),
    [
        ([], {}, {}),
        ([300, 600], {}, {}),
        ([], {}, {"precision": "bf16"}),
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

    run = run_of(points, model, **training)
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


def test_parameters_and_moments_are_those_of_the_network() -> None:
    run = run_of([300, 600])
    count = sum(p.numel() for p in build_network(run.model, 2).parameters())
    assert parameter_count(run) == count
    adamw = dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer="adamw"))
    assert optimizer_bytes(adamw) == 8 * count
    assert 4 * count < optimizer_bytes(run) < 8 * count, "Muon keeps one moment of most of them"


def test_activations_are_those_that_autograd_saves_on_a_cpu() -> None:
    run, saved = run_of(), {}
    network = build_network(run.model, 0)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(16, 3, 32, 32), torch.zeros(16), 0, torch.zeros(16, dtype=torch.long))
    assert activation_bytes(run, 0, False) == pytest.approx(sum(size for size, _ in saved.values()) / 16, rel=0.03)
    low, again = (run_of(**change) for change in ({"precision": "bf16"}, {"activation_checkpointing": True}))
    assert activation_bytes(low, 0, False) == pytest.approx(activation_bytes(run, 0, False) / 2, rel=0.03)
    assert activation_bytes(low, 0, True) > activation_bytes(low, 0, False), "CUDA normalises in fp32"
    assert activation_bytes(again, 0, False) < activation_bytes(run, 0, False) / 3


def test_memory_falls_with_accumulation_ranks_and_levels() -> None:
    whole = worker_memory(run_of(batch=64), 1, False)
    assert worker_memory(run_of(batch=64, accumulation=4), 1, False) < whole
    assert worker_memory(run_of(batch=64), 4, False) == worker_memory(run_of(batch=16), 1, False)
    assert worker_memory(run_of([300, 600], batch=64), 1, False) < whole
    assert worker_memory(run_of([300, 600], batch=64, levels="one"), 1, False) >= whole
