"""Training steps and samples at the paper's protocol on one GPU: DDPM and DVDP, eager and compiled, bf16.

    python3 -m benchmarks.gpu.steps --side 256 --mode eager channels_last --out steps_256_eager.json
    python3 -m benchmarks.gpu.steps --side 256 --mode compiled --out steps_256_compiled.json
    python3 -m benchmarks.gpu.steps --side 32 --mode eager channels_last compiled --out steps_32.json

Modes: *eager*; *channels_last*, eager with weights in that layout; *compiled*, with that layout, by torch.compile.
There steps with all levels are left out, as each part of a batch would be compiled for itself.

Runs from a bare checkout with torch, numpy, pyyaml, safetensors and tqdm. Batches are the paper's: 128 images to train
and 256 to sample at 32 px, 24 and 64 at 256 px. What is measured is written at once, so that a run cut short keeps it.
With ``--toy`` it runs in seconds on a CPU, to see that it does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.steps import TOY, bound, draw, make_run, start, step
from benchmarks.timing import peak_memory, peak_tflops, take_turns
from dvdp.config import ModelParams, TrainingParams
from dvdp.files import write_atomically
from dvdp.grids import share_steps
from dvdp.training.budget import level_flops
from dvdp.training.compilation import compile_network
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

#: Side -> images a training step, images a sampling call, turning points, network: those of presets/.
PAPER = {
    32: (
        128,
        256,
        (600,),
        ModelParams("noise", 128, (1, 2, 2, 2), blocks=3, attention=(2, 4), head_channels=64, dropout=0.3),
    ),
    256: (
        24,
        64,
        (300, 600),
        ModelParams("noise", 128, (1, 1, 2, 2, 4, 4), blocks=2, attention=(8, 16, 32), head_channels=64),
    ),
}
MODES = ("eager", "channels_last", "compiled")
#: In one piece of work that is timed.
REPEATS = 5
SAMPLE_STEPS = 10


def main() -> None:
    """Measure each mode and write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, choices=list(PAPER), default=256)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_batch, sample_batch, turning_points, model = PAPER[options.side]
    side, repeats = options.side, REPEATS
    if options.toy:
        (side, (train_batch, model)), repeats, sample_batch = next(iter(TOY.items())), 1, 2
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {
        "machine": machine(),
        "peak_tflops": peak_tflops("bf16", device),
        "side": side,
        "turning_points": turning_points,
        "training_batch": train_batch,
        "sampling_batch": sample_batch,
        "modes": {},
    }
    pixels = np.random.default_rng(0).integers(0, 256, (train_batch, 3, side, side), dtype=np.uint8)
    for mode in options.mode:
        settings = TrainingParams(batch=train_batch, precision="bf16")
        ddpm, dvdp = (start(make_run(points, side, model, settings), pixels, device) for points in ((), turning_points))
        for training in (ddpm, dvdp):
            arrange(training, mode)
        images, together = torch.from_numpy(pixels).to(device), mode != "compiled"
        result["modes"][mode] = measure_training(ddpm, dvdp, images, repeats, options.turns, together)
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
        result["modes"][mode] |= measure_sampling(ddpm, dvdp, sample_batch, options.turns)
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def arrange(training: Training, mode: str) -> None:
    """Make its networks run in a mode."""
    for network in (training.network, training.ema.network):
        if mode != "eager":
            network.to(memory_format=torch.channels_last)
        if mode == "compiled":
            compile_network(network)


def measure_training(
    ddpm: Training, dvdp: Training, images: torch.Tensor, repeats: int, turns: int, together: bool
) -> dict[str, Any]:
    """Seconds of a step of each kind, its memory, TFLOP/s and the ratios.

    Args:
        together: measure steps with all levels too.
    """
    batch, schedule, device = len(images), dvdp.process.schedule, ddpm.device
    levels, flops = range(schedule.levels + 1), level_flops(dvdp.run)
    spread = level_counts(schedule, "all", 0, 0, batch)
    counts = {f"level {level}": [batch if k == level else 0 for k in levels] for level in levels}
    works: dict[str, Callable[[], None]] = {"ddpm": partial(step, ddpm, images, [batch])}
    works |= {name: partial(step, dvdp, images, each) for name, each in counts.items()}
    costs = [float(flops[0]), *map(float, flops)]
    if together:
        works["all levels"] = partial(step, dvdp, images, spread)
        costs.append(sum(n * cost for n, cost in zip(spread, flops, strict=True)) / batch)

    def often(work: Callable[[], None]) -> None:
        for _ in range(repeats):
            work()

    found = take_turns([partial(often, work) for work in works.values()], turns, device, "training", warm_up=2)
    seconds = {name: s / repeats for name, s in zip(works, found, strict=True)}
    one = sum(share * seconds[f"level {level}"] for level, share in enumerate(schedule.shares()))
    return {
        "training_seconds": {**seconds, "dvdp, one level a step": one},
        "training_tflops_per_second": {
            name: 3 * batch * cost / seconds[name] / 1e12 for name, cost in zip(works, costs, strict=True)
        },
        "training_ratio": {
            **({"all levels a step": seconds["ddpm"] / seconds["all levels"]} if together else {}),
            "one level a step": seconds["ddpm"] / one,
            "bound": bound(flops, schedule.shares()),
        },
        "training_memory_gib": {name: peak_memory(work, device) / 2**30 for name, work in works.items()},
    }


def measure_sampling(ddpm: Training, dvdp: Training, batch: int, turns: int) -> dict[str, Any]:
    """Seconds of whole samples in a few steps, and what a sample of 1000 steps would take."""
    schedule, flops = dvdp.process.schedule, level_flops(dvdp.run)
    calls = share_steps(schedule, SAMPLE_STEPS)
    works = [partial(draw, training, batch) for training in (ddpm, dvdp)]
    ddpm_seconds, dvdp_seconds = take_turns(works, max(1, turns // 2), ddpm.device, "sampling")
    work = batch * sum(n * cost for n, cost in zip(calls, flops, strict=True))
    return {
        "sampling_seconds_per_call": {"ddpm": ddpm_seconds / SAMPLE_STEPS, "dvdp": dvdp_seconds / SAMPLE_STEPS},
        "sampling_seconds_per_image_of_1000_steps": {
            "ddpm": 1000 * ddpm_seconds / SAMPLE_STEPS / batch,
            "dvdp": 1000 * dvdp_seconds / SAMPLE_STEPS / batch,
        },
        "sampling_tflops_per_second": {
            "ddpm": batch * SAMPLE_STEPS * flops[0] / ddpm_seconds / 1e12,
            "dvdp": work / dvdp_seconds / 1e12,
        },
        "sampling_ratio": ddpm_seconds / dvdp_seconds,
        "sampling_bound": bound(flops, [n / SAMPLE_STEPS for n in calls]),
    }


if __name__ == "__main__":
    main()
