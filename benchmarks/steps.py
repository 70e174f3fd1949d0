"""Seconds of a training step and of sampling, per level and setting, beside DDPM and diffusers' same network.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.steps --out benchmarks/results/steps.json

One process for all; at each size everything takes turns, so that a busy machine slows all alike. Medians, and the
ratios that a regression shows in: ``--baseline FILE`` compares them with an earlier result and fails where one fell
(:mod:`benchmarks.baseline`). Seconds are of processor time, as other work may keep the machine busy.
``python -m benchmarks.steps_report`` makes table and plot of the result.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import conv2d

from benchmarks import peers
from benchmarks.baseline import TURNS, compare, read_result
from benchmarks.machine import machine
from benchmarks.timing import DTYPES, busy_clock, peak_memory, peak_tflops, spreads, times_in_turns, warn_of_allocator
from dvdp.config import ModelParams, ProcessName, Run, SamplingParams, ScheduleParams, TrainingParams
from dvdp.data.loading import ArrayImages
from dvdp.diffusion.sampling import Progress, sample
from dvdp.diffusion.timesteps import share_steps
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.flops import level_flops
from dvdp.models.unet import ResidualBlock, build_network
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

TURNING_POINTS = (300, 600)
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
#: Side -> images a step and network: sized so that arithmetic, not calls, fills a step on a CPU. Ten images, or a
#: multiple, give each level its exact share. Noise is predicted, as by diffusers' step and in the paper.
SIZES = {
    32: (20, ModelParams("epsilon", 64, (1, 2, 2), attention_factors=(4,), num_classes=0)),
    64: (20, ModelParams("epsilon", 64, (1, 2, 2), attention_factors=(4,), num_classes=0)),
    128: (10, ModelParams("epsilon", 32, (1, 1, 2, 2), attention_factors=(8,), num_classes=0)),
    256: (10, ModelParams("epsilon", 16, (1, 1, 2, 4, 4), attention_factors=(16,), num_classes=0)),
}
#: For tests: seconds in all.
TOY = {16: (10, ModelParams("epsilon", 8, (1, 2), attention_factors=(2,), num_classes=0, num_head_channels=8))}
#: Of sampling: few, but with the levels' shares exact.
STEPS = 10


def main() -> int:
    """Measure, write the results, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=[*SIZES, *TOY], default=list(SIZES))
    parser.add_argument("--batch", type=int, help="images a step, in place of each size's own")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--baseline", type=Path, help="an earlier result whose ratios must still be met")
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
    baseline = read_result(options.baseline) if options.baseline else None
    if baseline is not None and options.turns < TURNS:
        raise UserError(f"--turns: found {options.turns}, expected at least {TURNS} to compare with a baseline.")
    device = torch.device("cpu")
    warn_of_allocator(device)
    peaks: dict[str, dict[str, float]] = {precision: {} for precision in options.precisions}
    sizes = {**SIZES, **TOY}
    left_out = {
        f"{resolution} px, ": "not in --resolutions" for resolution in sizes if resolution not in options.resolutions
    }
    left_out |= {precision: "not in --precisions" for precision in PRECISIONS if precision not in options.precisions}
    if not peers.available():
        print(peers.MISSING, file=sys.stderr)
        left_out["diffusers"] = "diffusers is not installed"
    result: dict[str, Any] = {"machine": machine(), "seconds_of": "processor time", "turns": options.turns}
    result |= {"turning_points": TURNING_POINTS, "peak_tflops": peaks}
    result |= {"cases": [], "ratios": {}, "spreads": {}, "left_out": left_out}
    for resolution in options.resolutions:
        # Before each size, the best kept: other work may be in the way of one.
        for precision, best in peaks.items():
            for name, value in peak_tflops(precision, device).items():
                best[name] = max(value, best.get(name, 0.0))
        batch, model = sizes[resolution]
        case, between_turns = measure(
            resolution, options.batch or batch, model, options.precisions, options.turns, device
        )
        result["cases"].append(case)
        result["ratios"] |= ratios(case)
        result["spreads"] |= between_turns
        if options.out:
            write_atomically(options.out, json.dumps(result, indent=2) + "\n")
        for name, value in ratios(case).items():
            print(f"{name}: {value:.3f}, turns {between_turns[name]:.1%} apart", flush=True)
    if baseline is not None:
        print(compare(result, baseline))


def make_run(turning_points: tuple[int, ...], resolution: int, model: ModelParams, training: TrainingParams) -> Run:
    """DVDP, or DDPM without turning points: a run without a params file."""
    kind: ProcessName = "dvdp" if turning_points else "ddpm"
    return Run(kind, 0, kind, turning_points, resolution, ScheduleParams(), model, training, SamplingParams(), model)


def start(run: Run, pixels: NDArray[np.uint8], device: torch.device) -> Training:
    """The state of a training before its first step."""
    return Training(run, ArrayImages(pixels), Path(), "benchmark", False, device, None)


def measure(
    resolution: int, batch: int, model: ModelParams, precisions: list[str], turns: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, float]]:
    """One size: seconds, memory, FLOPs of everything, in both precisions; and the spreads of its ratios."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    case = exact(resolution, batch, model)
    steps: dict[str, Callable[[], None]] = {}
    samples: dict[str, Callable[[], None]] = {}
    level_seconds: dict[str, list[list[float]]] = {}
    for precision in precisions:
        training = TrainingParams(batch=batch, optimizer="adamw", precision=precision)  # type: ignore[arg-type]
        runs = [
            make_run((), resolution, model, training),
            make_run(TURNING_POINTS, resolution, model, training),
        ]
        ddpm, dvdp = (start(run, pixels, device) for run in runs)
        for small in (ddpm, dvdp):
            # The optimiser's moments are there before memory is measured.
            step(small, images[:1], [1, *[0] * small.process.levels])
        levels = range(dvdp.process.levels + 1)
        steps[f"{precision} ddpm"] = partial(step, ddpm, images, [batch])
        for level in levels:
            alone = [batch if k == level else 0 for k in levels]
            steps[f"{precision} level {level}"] = partial(step, dvdp, images, alone)
        steps[f"{precision} all levels"] = partial(step, dvdp, images, case["images_per_level"])
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
    timed = {
        **steps,
        **{f"{precision} convolution": convolution(resolution, batch, model, precision) for precision in precisions},
    }
    step_times = times_in_turns(list(timed.values()), turns, device, f"{resolution} px, training", warm_up=0)
    sample_times = times_in_turns(list(samples.values()), turns, device, f"{resolution} px, sampling", warm_up=0)

    def seconds_of(training: list[tuple[float, ...]], sampling: list[tuple[float, ...]]) -> dict[str, dict[str, float]]:
        """Medians of some turns, by name."""
        return {
            kind: dict(zip(works, map(statistics.median, zip(*times, strict=True)), strict=True))
            for kind, works, times in (("training_seconds", timed, training), ("sampling_seconds", samples, sampling))
        }

    case |= seconds_of(step_times, sample_times)
    case |= {
        "training_memory_gib": memory,
        "sampling_batch": batch // 2,
        "sampling_seconds_per_call": {
            precision: [sum(times) / len(times) for times in levels] for precision, levels in level_seconds.items()
        },
    }
    case["training_tflops_per_second"] = {
        name: 3 * batch * flops_of(name, case) / case["training_seconds"][name] / 1e12 for name in steps
    }
    single = [ratios(case | seconds_of([step], [draw])) for step, draw in zip(step_times, sample_times, strict=True)]
    return case, spreads(single)


def convolution(resolution: int, batch: int, model: ModelParams, precision: str) -> Callable[[], object]:
    """A 3x3 convolution of the first stage's size, forward and backward, by nothing but torch."""
    width, dtype = model.model_channels, DTYPES[precision]
    x, upstream = (torch.randn(batch, width, resolution, resolution, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(width, width, 3, 3, dtype=dtype, requires_grad=True)
    return lambda: torch.autograd.grad(conv2d(x, weight, padding=1), (x, weight), upstream)


def exact(resolution: int, batch: int, model: ModelParams) -> dict[str, Any]:
    """What of one size is counted and not measured: the same on every machine."""
    training = TrainingParams(batch=batch, precision="fp32")
    ddpm, dvdp = (make_run(points, resolution, model, training) for points in ((), TURNING_POINTS))
    schedule, flops = dvdp.build_schedule(), level_flops(dvdp)
    case: dict[str, Any] = {
        "resolution": resolution,
        "batch": batch,
        "network": asdict(model),
        "images_per_level": level_counts(schedule, "all", 0, 0, batch),
        "shares": schedule.shares(),
        "forward_flops": {"levels": flops, "levels, every convolution as written": as_written(dvdp, flops)},
        "parameters": {"ours": parameters(build_network(model, 0))},
        "sampling_steps": STEPS,
        "bounds": {
            "training": bound(flops, schedule.shares()),
            "sampling": bound(flops, [calls / STEPS for calls in share_steps(schedule, STEPS)]),
        },
    }
    if peers.available():
        case["forward_flops"]["diffusers"] = peers.forward_flops(ddpm)
        case["parameters"]["diffusers"] = parameters(peers.build(ddpm))
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
    """What must not fall, by name; the larger the better. DDPM's seconds are those of its own step throughout."""
    training, sampling = case["training_seconds"], case["sampling_seconds"]
    found = {}
    for precision in [name.split()[0] for name in training if name.endswith("ddpm")]:
        ddpm, about = training[f"{precision} ddpm"], f"{case['resolution']} px, {precision}, "
        one = sum(s * training[f"{precision} level {level}"] for level, s in enumerate(case["shares"]))
        found[about + "training, DDPM over DVDP, all levels a step"] = ddpm / training[f"{precision} all levels"]
        found[about + "training, DDPM over DVDP, one level a step"] = ddpm / one
        found[about + "sampling, DDPM over DVDP"] = sampling[f"{precision} ddpm"] / sampling[f"{precision} dvdp"]
        # What slows DDPM and DVDP alike shows beside plain torch, which is always there.
        if convolution := training.get(f"{precision} convolution"):
            found[about + "training, a convolution over DDPM"] = convolution / ddpm
            found[about + "sampling, a convolution over DDPM"] = convolution / sampling[f"{precision} ddpm"]
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
    """FLOPs of each level if a convolution after an enlargement were done at the larger resolution, as others do it."""
    with torch.device("meta"):
        network, x, t = build_network(run.model, 0), torch.empty(1, 3, run.resolution, run.resolution), torch.empty(1)
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


def draw(training: Training, batch: int, level_seconds: Sequence[list[float]] = (), steps: int = STEPS) -> None:
    """Whole samples, lifts included, from the averaged network; notes the seconds of each call by its level."""
    run, last = training.run, busy_clock(training.device)

    def note(progress: Progress) -> None:
        nonlocal last
        now = busy_clock(training.device)
        level_seconds[progress.level].append(now - last)
        last = now

    shape = (batch, 3, run.resolution, run.resolution)
    callback = note if level_seconds else None
    sample(training.process, training.model.denoiser, shape, steps=steps, device=training.device, callback=callback)


if __name__ == "__main__":
    sys.exit(main())
