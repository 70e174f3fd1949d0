"""Seconds of a training step and of sampling: DDPM over DVDP {300, 600}, beside what the FLOPs allow.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.steps --out benchmarks/results/steps.json

One network, one process; the two take turns, so that a busy machine slows both alike. Medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine
from dvdp.config import parse_params
from dvdp.data.loading import ArrayImages
from dvdp.files import write_atomically
from dvdp.grids import share_steps
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.sampling import sample
from dvdp.training.budget import level_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

#: Of sampling: few, but with the levels' shares exact.
STEPS = 20


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.side, options.channels, options.batch, options.turns, options.precision)
    text = json.dumps({"machine": machine(), **result}, indent=2) + "\n"
    print(text)
    if options.out:
        write_atomically(options.out, text)


def measure(side: int, channels: int, batch: int, turns: int, precision: str) -> dict[str, object]:
    """Ratios of DDPM to DVDP {300, 600} with the same network."""
    runs = parse_params(
        {
            "dataset": {"resolution": side},
            "settings": [
                {"name": "ddpm", "process": "ddpm"},
                {"name": "dvdp", "process": "dvdp", "turning_points": [300, 600]},
            ],
            "model": {"channels": channels, "multipliers": [1, 2, 2], "blocks": 1, "attention": [4]},
            "training": {"batch": batch, "precision": precision},
        }
    ).runs()
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8)
    images = ArrayImages(pixels)
    trainings = [Training(run, images, Path(), "benchmark", False, torch.device("cpu"), None, print) for run in runs]
    uint8 = torch.from_numpy(pixels)
    schedule = trainings[1].process.schedule
    shares, spread = schedule.shares(), level_counts(schedule, "all", 0, 0, batch)
    steps = [spread, *([batch if k == level else 0 for k in range(3)] for level in range(3))]
    every, *one = take_turns([partial(step, trainings[1], uint8, counts) for counts in steps], turns)
    # Of which level 0 is what DDPM does in every step.
    whole = sum(seconds * share for seconds, share in zip(one, shares, strict=True))
    sample_seconds = take_turns([partial(draw, training, batch) for training in trainings], turns)

    flops = level_flops(runs[1])
    calls = [calls / STEPS for calls in share_steps(schedule, STEPS)]
    return {
        "network": {"side": side, "channels": channels, "batch": batch, "precision": precision},
        "turning_points": [300, 600],
        "images_per_level": spread,
        "training_seconds": {"ddpm": one[0], "dvdp, all levels a step": every, "dvdp, one level a step": whole},
        "training_ratio": {"all levels a step": one[0] / every, "one level a step": one[0] / whole},
        "training_bound": bound(flops, shares),
        "sampling_steps": STEPS,
        "sampling_seconds": {"ddpm": sample_seconds[0], "dvdp": sample_seconds[1]},
        "sampling_ratio": sample_seconds[0] / sample_seconds[1],
        "sampling_bound": bound(flops, calls),
    }


def bound(costs: list[int], shares: list[float]) -> float:
    """Cost of level 0 over the mean cost."""
    return costs[0] / sum(cost * share for cost, share in zip(costs, shares, strict=True))


def step(training: Training, images: torch.Tensor, counts: list[int]) -> None:
    """A training step with its average, as the loop makes it."""
    training.update(images, counts)
    training.ema.update(100_000, len(images))


def draw(training: Training, batch: int) -> None:
    """Whole samples, lifts included, from the averaged network."""
    side = training.run.side
    denoiser = NetworkDenoiser(training.ema.network, training.process, side, "noise")
    sample(training.process, denoiser, (batch, 3, side, side), steps=STEPS)


def take_turns(works: Sequence[Callable[[], None]], turns: int) -> list[float]:
    """Median seconds of each, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(turns + 1):
        for work, times in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


if __name__ == "__main__":
    main()
