"""Seconds of a training step and of sampling, per level and setting, beside DDPM and diffusers' same network.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.steps --out benchmarks/results/steps.json

One process for all; at each size everything takes turns, so that a busy machine slows all alike. Medians, and the
ratios that a regression shows in: ``--baseline FILE`` compares them with an earlier result and fails where one fell.
``python -m benchmarks.steps_report`` makes table and plot of the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import peers
from benchmarks.baseline import compare, read_ratios
from benchmarks.machine import machine
from benchmarks.timing import peak_memory, peak_tflops, take_turns
from dvdp.config import ModelParams, ProcessName, ProcessParams, Run, SamplingParams, TrainingParams
from dvdp.data.loading import ArrayImages
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.grids import share_steps
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.models.unet import ResidualBlock, build_network
from dvdp.sampling import Progress, sample
from dvdp.training.budget import level_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

TURNING_POINTS = (300, 600)
PRECISIONS = ("fp32", "bf16")
#: Side -> images a step and network: sized so that arithmetic, not calls, fills a step on a CPU. Ten images, or a
#: multiple, give each level its exact share.
SIZES = {
    32: (20, ModelParams(channels=64, multipliers=(1, 2, 2), attention=(4,))),
    64: (20, ModelParams(channels=64, multipliers=(1, 2, 2), attention=(4,))),
    128: (10, ModelParams(channels=32, multipliers=(1, 1, 2, 2), attention=(8,))),
    256: (10, ModelParams(channels=16, multipliers=(1, 1, 2, 4, 4), attention=(16,))),
}
#: For tests: seconds in all.
TOY = {16: (10, ModelParams(channels=8, multipliers=(1, 2), attention=(2,), head_channels=8))}
#: Of sampling: few, but with the levels' shares exact.
STEPS = 10


def main() -> int:
    """Measure, write the results, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", choices=[*SIZES, *TOY], default=list(SIZES))
    parser.add_argument("--batch", type=int, help="images a step, in place of each size's own")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--turns", type=int, default=3, help="of training steps; sampling has one less, at least one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--baseline", type=Path, help="an earlier result whose ratios must still be met")
    parser.add_argument("--tolerance", type=float, default=0.07, help="share by which a ratio may fall")
    options = parser.parse_args()
    try:
        run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """What :func:`main` was asked for; each size is written as soon as it is measured."""
    # Before the work, and before --out, which may be the same file.
    baseline = read_ratios(options.baseline) if options.baseline else None
    if not peers.available():
        print(peers.MISSING, file=sys.stderr)
    device = torch.device("cpu")
    peaks: dict[str, dict[str, float]] = {precision: {} for precision in options.precisions}
    sizes = {**SIZES, **TOY}
    result: dict[str, Any] = {"machine": machine(), "turning_points": TURNING_POINTS, "peak_tflops": peaks}
    result |= {"cases": [], "ratios": {}}
    for side in options.sides:
        # Before each size, the best kept: other work may be in the way of one.
        for precision, best in peaks.items():
            for name, value in peak_tflops(precision, device).items():
                best[name] = max(value, best.get(name, 0.0))
        batch, model = sizes[side]
        case = measure(side, options.batch or batch, model, options.precisions, options.turns, device)
        result["cases"].append(case)
        result["ratios"] |= ratios(case)
        if options.out:
            write_atomically(options.out, json.dumps(result, indent=2) + "\n")
        for name, value in ratios(case).items():
            print(f"{name}: {value:.2f}", flush=True)
    if baseline is not None:
        print(compare(baseline, result["ratios"], options.tolerance))


def make_run(turning_points: tuple[int, ...], side: int, model: ModelParams, training: TrainingParams) -> Run:
    """DVDP, or DDPM without turning points: a run without a params file, which would need pydantic."""
    kind: ProcessName = "dvdp" if turning_points else "ddpm"
    return Run(kind, 0, kind, turning_points, side, ProcessParams(), model, training, SamplingParams(), model)


def start(run: Run, pixels: NDArray[np.uint8], device: torch.device) -> Training:
    """The state of a training before its first step."""
    return Training(run, ArrayImages(pixels), Path(), "benchmark", False, device, None, print)


def measure(
    side: int, batch: int, model: ModelParams, precisions: list[str], turns: int, device: torch.device
) -> dict[str, Any]:
    """One size: seconds, memory, FLOPs of everything, in both precisions."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    steps: dict[str, Callable[[], None]] = {}
    samples: dict[str, Callable[[], None]] = {}
    level_seconds: dict[str, list[list[float]]] = {}
    counts: list[int] = []
    for precision in precisions:
        training = TrainingParams(batch=batch, precision=precision)  # type: ignore[arg-type]
        runs = [
            make_run((), side, model, training),
            make_run(TURNING_POINTS, side, model, training),
        ]
        ddpm, dvdp = (start(run, pixels, device) for run in runs)
        for small in (ddpm, dvdp):
            # The optimiser's moments are there before memory is measured.
            step(small, images[:1], [1, *[0] * small.process.levels])
        counts = level_counts(dvdp.process.schedule, "all", 0, 0, batch)
        levels = range(dvdp.process.levels + 1)
        steps[f"{precision} ddpm"] = partial(step, ddpm, images, [batch])
        for level in levels:
            alone = [batch if k == level else 0 for k in levels]
            steps[f"{precision} level {level}"] = partial(step, dvdp, images, alone)
        steps[f"{precision} all levels"] = partial(step, dvdp, images, counts)
        level_seconds[precision] = [[] for _ in levels]
        samples[f"{precision} ddpm"] = partial(draw, ddpm, batch // 2)
        samples[f"{precision} dvdp"] = partial(draw, dvdp, batch // 2, level_seconds[precision])
        if peers.available():
            peer = peers.Peer(runs[0], device)
            peer.step(images[:1])
            steps[f"{precision} diffusers"] = partial(peer.step, images)
            samples[f"{precision} diffusers"] = partial(peer.sample, batch // 2, STEPS)
    # This warms up, too.
    memory = {name: peak_memory(work, device) / 2**30 for name, work in steps.items()}
    # Measuring memory gave it back; the first to take it again would be slower.
    next(iter(steps.values()))()
    step_seconds = take_turns(list(steps.values()), turns, device, f"{side} px, training", warm_up=0)
    sample_seconds = take_turns(list(samples.values()), max(1, turns - 1), device, f"{side} px, sampling", warm_up=0)

    schedule = runs[1].schedule()
    flops = level_flops(runs[1])
    case: dict[str, Any] = {
        "side": side,
        "batch": batch,
        "network": {"channels": model.channels, "multipliers": model.multipliers, "attention": model.attention},
        "images_per_level": counts,
        "shares": schedule.shares(),
        "forward_flops": {"levels": flops, "levels, every convolution as written": as_written(runs[1], flops)},
        "parameters": {"ours": parameters(build_network(model, 0))},
        "training_seconds": dict(zip(steps, step_seconds, strict=True)),
        "training_memory_gib": memory,
        "sampling_batch": batch // 2,
        "sampling_steps": STEPS,
        "sampling_seconds": dict(zip(samples, sample_seconds, strict=True)),
        "sampling_seconds_per_call": {
            precision: [sum(times) / len(times) for times in levels] for precision, levels in level_seconds.items()
        },
        "bounds": {
            "training": bound(flops, schedule.shares()),
            "sampling": bound(flops, [calls / STEPS for calls in share_steps(schedule, STEPS)]),
        },
    }
    if peers.available():
        case["forward_flops"]["diffusers"] = peers.forward_flops(runs[0])
        case["parameters"]["diffusers"] = parameters(peers.build(runs[0]))
    case["training_tflops_per_second"] = {
        name: 3 * batch * flops_of(name, case) / seconds / 1e12 for name, seconds in case["training_seconds"].items()
    }
    return case


def flops_of(name: str, case: dict[str, Any]) -> float:
    """Forward FLOPs of one image of a training step."""
    levels: list[int] = case["forward_flops"]["levels"]
    if name.endswith("diffusers"):
        return float(case["forward_flops"]["diffusers"])
    if name.endswith("all levels"):
        return sum(n * cost for n, cost in zip(case["images_per_level"], levels, strict=True)) / case["batch"]
    return float(levels[int(name.rsplit(" ", 1)[1])] if " level " in name else levels[0])


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """What must not fall, by name; the larger the better."""
    training, sampling = case["training_seconds"], case["sampling_seconds"]
    found = {}
    for precision in [name.split()[0] for name in training if name.endswith("ddpm")]:
        ddpm, about = training[f"{precision} ddpm"], f"{case['side']} px, {precision}, "
        one = sum(s * training[f"{precision} level {level}"] for level, s in enumerate(case["shares"]))
        found[about + "training, DDPM over DVDP, all levels a step"] = ddpm / training[f"{precision} all levels"]
        found[about + "training, DDPM over DVDP, one level a step"] = training[f"{precision} level 0"] / one
        found[about + "sampling, DDPM over DVDP"] = sampling[f"{precision} ddpm"] / sampling[f"{precision} dvdp"]
        if f"{precision} diffusers" in training:
            found[about + "training, diffusers over ours"] = training[f"{precision} diffusers"] / ddpm
            theirs = sampling[f"{precision} diffusers"]
            found[about + "sampling, diffusers over ours"] = theirs / sampling[f"{precision} ddpm"]
        if precision == "bf16" and "fp32 diffusers" in training:
            found[about + "training, diffusers in fp32 over ours"] = training["fp32 diffusers"] / ddpm
    return found


def bound(costs: list[int], shares: list[float]) -> float:
    """Cost of level 0 over the mean cost."""
    return costs[0] / sum(cost * share for cost, share in zip(costs, shares, strict=True))


def parameters(network: nn.Module) -> int:
    """Of all its layers."""
    return sum(p.numel() for p in network.parameters())


def as_written(run: Run, flops: list[int]) -> list[int]:
    """FLOPs of each level if a convolution after an enlargement were done at the larger side, as others do it."""
    with torch.device("meta"):
        network, x, t = build_network(run.model, 0), torch.empty(1, 3, run.side, run.side), torch.empty(1)
    saved = 0

    def count(block: ResidualBlock, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal saved
        pixels = arguments[0].shape[-1] * arguments[0].shape[-2]
        # 9 multiply-adds at each of the 4 pixels that one becomes, against 16 at the one.
        saved += 2 * (4 * 9 - 16) * math.prod(block.conv1.weight.shape[:2]) * pixels

    for module in network.modules():
        if isinstance(module, ResidualBlock) and module.resample == "up":
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        network(x, t, 0)
    return [cost + saved // 4**level for level, cost in enumerate(flops)]


def step(training: Training, images: torch.Tensor, counts: list[int]) -> None:
    """A training step with its average, as the loop makes it."""
    training.update(images, counts)
    training.ema.update(100_000, len(images))


def draw(training: Training, batch: int, level_seconds: list[list[float]] | None = None, steps: int = STEPS) -> None:
    """Whole samples, lifts included, from the averaged network; notes the seconds of each call by its level."""
    run, last = training.run, time.perf_counter()

    def note(progress: Progress) -> None:
        nonlocal last
        now = time.perf_counter()
        if level_seconds is not None:
            level_seconds[progress.level].append(now - last)
        last = now

    denoiser = NetworkDenoiser(training.ema.network, training.process, run.side, run.model.predicts)
    shape = (batch, 3, run.side, run.side)
    with torch.autocast(training.device.type, torch.bfloat16, enabled=run.training.precision == "bf16"):
        sample(training.process, denoiser, shape, steps=steps, device=training.device, callback=note)


if __name__ == "__main__":
    sys.exit(main())
