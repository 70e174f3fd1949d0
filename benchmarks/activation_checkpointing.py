"""What `training.activation_checkpointing` costs and saves: seconds and memory of a step of DDPM, without and with it.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.activation_checkpointing --out benchmarks/results/activation_checkpointing.json

The networks are those of benchmarks/steps.py; both ways take turns.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.steps import SIZES, TOY, make_run, start, step
from benchmarks.timing import peak_memory, take_turns, warn_of_allocator
from dvdp.config import TrainingParams
from dvdp.files import write_atomically


def main() -> None:
    """Measure each resolution and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=[*SIZES, *TOY], default=[64, 128, 256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warn_of_allocator(torch.device("cpu"))
    cases = []
    for resolution in options.resolutions:
        case = measure(resolution, options.turns)
        cases.append(case)
        print(f"{resolution} px: {case['time_ratio']:.2f} times the time, {case['memory_ratio']:.2f} times the memory")
    result = {"machine": machine(), "cases": cases, "ratios": ratios(cases)}
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")


def measure(resolution: int, turns: int) -> dict[str, Any]:
    """Steps of one resolution: activations kept, then computed again."""
    batch, model = {**SIZES, **TOY}[resolution]
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
    images, device = torch.from_numpy(pixels), torch.device("cpu")
    ways = [
        start(
            make_run(
                (),
                resolution,
                model,
                TrainingParams(batch=batch, activation_checkpointing=again, optimizer="adamw", precision="fp32"),
            ),
            pixels,
            device,
        )
        for again in (False, True)
    ]
    works = [partial(step, way, images, [batch]) for way in ways]
    for way in ways:
        step(way, images[:1], [1])  # The optimiser's moments are there before memory is measured.
    memory = [peak_memory(work, device) / 2**30 for work in works]
    seconds = take_turns(works, turns, device, f"{resolution} px")
    return {
        "resolution": resolution,
        "batch": batch,
        "seconds": seconds,
        "memory_gib": memory,
        "time_ratio": seconds[1] / seconds[0],
        "memory_ratio": memory[1] / memory[0],
    }


def ratios(cases: list[dict[str, Any]]) -> dict[str, float]:
    """What must not fall, by name; the larger the better."""
    return {
        f"{case['resolution']} px, {what}, kept over computed again": 1 / case[key]
        for case in cases
        for what, key in (("seconds", "time_ratio"), ("memory", "memory_ratio"))
    }


if __name__ == "__main__":
    main()
