"""A tiny run and its images, for tests on a fake GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.fake import FakeGpu
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.export import save_model
from dvdp.models.unet import build_network
from dvdp.training.loop import Training

GPU = torch.device("cuda:0")
_random = np.random.default_rng(0)
IMAGES = ArrayImages(_random.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), _random.integers(0, 3, 40))
ABOUT = {"label_counts": [20, 10, 10, 0], "labels": ["a", "b", "c"], "band_std": [0.1, 0.2]}
#: Without a second stage, and so without resampling: for what is not about the network.
SMALL: dict[str, Any] = {"channel_mult": [1], "attention_factors": []}


def tiny_run(model: dict[str, Any] | None = None, **training: object) -> Run:
    """8 px, two levels, three classes, dropout and attention, 48 images in steps of 8."""
    tree = {
        "dataset": {"resolution": 8},
        "settings": {"tiny": {"process": "dvdp", "turning_points": [500]}},
        "model": {
            "model_channels": 4,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 3,
            "dropout": 0.1,
            **(model or {}),
        },
        "training": {
            "images": 48,
            "budget": "images",
            "batch": 8,
            "warmup_images": 8,
            "checkpoint_images": 16,
            "log_images": 8,
            "preview_images": 24,
            "preview_count": 2,
            "preview_steps": 4,
            **training,
        },
        "sampling": {"count": 4, "steps": 4, "batch": 2, "lift": "data"},
        "evaluation": {"samples": 4, "kid_subset": 2},
    }
    # Whether a GPU is there when the params are read says nothing here.
    (run,) = parse_params(tree).runs()
    precision: Any = training.get("precision", "fp32")
    return replace(run, training=replace(run.training, precision=precision))


def start(run: Run) -> Training:
    """Its state before the first step, on the GPU."""
    return Training(run, IMAGES, Path(), "hash", False, GPU, None, ABOUT)


def batch() -> tuple[Tensor, Tensor]:
    """Images and labels of a step as the loop gives them: on the GPU, and on the host."""
    return torch.zeros(8, 3, 8, 8, dtype=torch.uint8).to(GPU), torch.arange(8) % 3


def take_steps(training: Training, gpu: FakeGpu, number: int = 2) -> None:
    """Steps with their average; only the last is noted, when tables and moments are there."""
    images, labels = batch()
    labels = labels.pin_memory()
    for step in range(number):
        gpu.reset()
        training.step(step, images, labels)
        training.ema.update(8 * (step + 1), 8)


def trained(run: Run, weights: Path) -> Path:
    """A model file of untrained weights."""
    network = build_network(run.model, len(run.turning_points))
    save_model(weights, network.state_dict(), {"run": run.describe(), **ABOUT})
    return weights
