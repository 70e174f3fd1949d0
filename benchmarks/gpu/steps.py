"""Training steps and samples at the paper's protocol on one GPU: DDPM and DVDP, eager and compiled, bf16.

    python3 -m benchmarks.gpu.steps --resolution 256 --mode channels_last eager --out steps_256.json
    python3 -m benchmarks.gpu.steps --resolution 256 --mode compiled --seconds 540 --out steps_256_compiled.json
    python3 -m benchmarks.gpu.steps --resolution 32 --mode channels_last eager compiled --out steps_32.json

Modes: *eager*; *channels_last*, eager with weights in that layout; *compiled*, with that layout, by torch.compile, for
each level and number of images by itself: ``first_seconds`` says how long that takes. Of ``training.levels: all``, what
is measured is the first step; others may have an image of a level more or less.

Runs from a bare checkout with torch, numpy, pillow, ruamel.yaml, safetensors and tqdm. Batches are the paper's: 128
images to train, 256 to sample at 32 px, 24 and 64 at 256 px. Each measurement is written at once, and ``--seconds``
ends the run wherever it is, so that a run cut short keeps what it has. With ``--toy`` it runs in seconds on a CPU, to
see that it does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.steps import TOY, bound, draw, make_run, start, step
from benchmarks.timing import peak_memory, peak_tflops, seconds, take_turns
from dvdp.config import ModelParams, TrainingParams
from dvdp.diffusion.timesteps import share_steps
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.compilation import compile_network, explained
from dvdp.models.flops import level_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

#: Side -> images a training step, images a sampling call, turning points, network: those of presets/.
PAPER = {
    32: (
        128,
        256,
        (600,),
        ModelParams(
            prediction_type="epsilon",
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=3,
            attention_factors=(2, 4),
            num_head_channels=64,
            dropout=0.3,
            num_classes=0,
        ),
    ),
    256: (
        24,
        64,
        (300, 600),
        ModelParams(
            prediction_type="epsilon",
            model_channels=128,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_factors=(8, 16, 32),
            num_head_channels=64,
            num_classes=0,
        ),
    ),
}
MODES = ("eager", "channels_last", "compiled")
#: Steps in one piece of work that is timed.
REPEATS = 5
SAMPLE_STEPS = 10
#: At 256 px on one H200, of what :func:`summary` says of a mode.
GOALS = {
    "seconds of an iteration": ("at most", 0.06),
    "TFLOP/s at level 0": ("at least", 300.0),
    "training, ddpm over dvdp, one level a step": ("at least", 2.4),
}


class TimeIsUp(BaseException):
    """``--seconds`` are over; like an interrupt from the keyboard, for nobody on the way to catch."""


class Work(NamedTuple):
    """A training step, or samples."""

    do: Callable[[], None]
    teraflops: float
    repeats: int
    """In one piece that is timed."""


def main() -> int:
    """Measure each mode, write and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, choices=list(PAPER), default=256)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"], help="in this order")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything; what does not fit is left out")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"--mode: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """What :func:`main` was asked for."""
    end = time.perf_counter() + options.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_batch, sample_batch, turning_points, model = PAPER[options.resolution]
    resolution, repeats = options.resolution, REPEATS
    if options.toy:
        (resolution, (train_batch, model)), repeats, sample_batch = next(iter(TOY.items())), 1, 2
    torch.backends.cudnn.benchmark = True
    settings = TrainingParams(batch=train_batch, optimizer="adamw", precision="bf16")
    runs = [make_run(points, resolution, model, settings) for points in ((), turning_points)]
    schedule, flops = runs[1].build_schedule(), level_flops(runs[1])
    result: dict[str, Any] = {
        "machine": machine(),
        "peak_tflops": peak_tflops("bf16", device),
        "resolution": resolution,
        "turning_points": turning_points,
        "training_batch": train_batch,
        "sampling_batch": sample_batch,
        "images_per_level_of_a_step_with_all": level_counts(schedule, "all", 0, 0, train_batch),
        "bounds": {
            "training": bound(flops, schedule.shares()),
            "sampling": bound(flops, [calls / SAMPLE_STEPS for calls in share_steps(schedule, SAMPLE_STEPS)]),
        },
        "modes": {mode: {"measured": {}} for mode in options.mode},
        "complete": False,
    }
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    peak = max(result["peak_tflops"].values())
    pixels = np.random.default_rng(0).integers(0, 256, (train_batch, 3, resolution, resolution), dtype=np.uint8)
    try:
        for mode, about in result["modes"].items():
            with limited(end - time.perf_counter()):
                ddpm, dvdp = (start(run, pixels, device) for run in runs)
                arrange(ddpm, mode)
                arrange(dvdp, mode)
                works = list_works(ddpm, dvdp, torch.from_numpy(pixels).to(device), sample_batch, repeats)
            for name, work in works.items():
                with limited(end - time.perf_counter()), explained():
                    found = measure(work, f"{mode}, {name}", options.turns, peak, device)
                about["measured"][name] = found
                about["summary"] = summary(about["measured"], schedule.shares(), sample_batch)
                if resolution == 256:
                    about["goals"] = goals(about["summary"])
                write_atomically(options.out, json.dumps(result, indent=2) + "\n")
                print(
                    f"{mode}, {name}: {found['seconds']:.4g} s, {found['tflops_per_second']:.3g} TFLOP/s,"
                    f" {found['share_of_peak']:.0%} of the peak; the first took {found['first_seconds']:.3g} s",
                    flush=True,
                )
        result["complete"] = True
    except TimeIsUp:
        print(f"--seconds: {options.seconds:g} are over; '{options.out}' holds what was measured.", flush=True)
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    for mode, about in result["modes"].items():
        for name, goal in about.get("goals", {}).items():
            met = "met" if goal["met"] else "not met"
            print(f"{mode}, {name}: {goal['found']:.3g}, goal {goal['goal']}: {met}")


@contextlib.contextmanager
def limited(time_left: float) -> Iterator[None]:
    """Within it, TimeIsUp is raised after so many seconds, also amid a compilation; at once if there are none."""

    def stop(*_: object) -> NoReturn:
        raise TimeIsUp

    if time_left <= 0:
        raise TimeIsUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, time_left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def arrange(training: Training, mode: str) -> None:
    """Make its networks run in a mode."""
    for network in (training.network, training.ema.network):
        if mode != "eager":
            network.to(memory_format=torch.channels_last)
        if mode == "compiled":
            compile_network(network)


def list_works(
    ddpm: Training, dvdp: Training, images: torch.Tensor, sample_batch: int, repeats: int
) -> dict[str, Work]:
    """What is measured, by name, in this order: a run cut short has the parts of the ratios first.

    Args:
        images: of a training step, uint8 (b, 3, side, side), on the device.
        repeats: training steps in one piece of work that is timed.
    """
    batch, schedule, flops = len(images), dvdp.process.schedule, level_flops(dvdp.run)
    levels = range(schedule.levels + 1)
    spreads = {f"level {level}": [batch if k == level else 0 for k in levels] for level in levels}
    spreads["all levels"] = level_counts(schedule, "all", 0, 0, batch)

    def teraflops(counts: Sequence[int]) -> float:
        return sum(n * cost for n, cost in zip(counts, flops, strict=True)) / 1e12

    works = {"training, ddpm": Work(partial(step, ddpm, images, [batch]), 3 * teraflops(spreads["level 0"]), repeats)}
    for name, counts in spreads.items():
        works[f"training, {name}"] = Work(partial(step, dvdp, images, counts), 3 * teraflops(counts), repeats)
    for name, training in (("ddpm", ddpm), ("dvdp", dvdp)):
        calls = share_steps(training.process.schedule, SAMPLE_STEPS)
        cost = sum(n * each for n, each in zip(calls, level_flops(training.run), strict=True)) * sample_batch / 1e12
        works[f"sampling, {name}"] = Work(partial(draw, training, sample_batch, steps=SAMPLE_STEPS), cost, 1)
    return works


def measure(work: Work, title: str, turns: int, peak: float, device: torch.device) -> dict[str, float]:
    """Seconds of a step, or of samples in :data:`SAMPLE_STEPS` steps, and what follows from them.

    Args:
        peak: TFLOP/s that the machine shows.
    """

    def often() -> None:
        for _ in range(work.repeats):
            work.do()

    first = seconds(work.do, device)
    (median,) = take_turns([often], turns, device, title)
    speed = work.teraflops * work.repeats / median
    return {
        "seconds": median / work.repeats,
        "first_seconds": first,
        "tflops_per_second": speed,
        "share_of_peak": speed / peak,
        "memory_gib": peak_memory(work.do, device) / 2**30,
    }


def summary(
    measured: Mapping[str, Mapping[str, float]], shares: Sequence[float], sample_batch: int
) -> dict[str, float]:
    """What a mode's measurements amount to, as far as its parts are there.

    An iteration is DVDP's at the paper's protocol: one level a step, the mean over the levels' shares.
    """
    took = {name: found["seconds"] for name, found in measured.items()}
    levels = [f"training, level {level}" for level in range(len(shares))]
    found = {}
    if "training, level 0" in measured:
        found["TFLOP/s at level 0"] = measured["training, level 0"]["tflops_per_second"]
    if took.keys() >= {"training, ddpm", *levels}:
        one = sum(share * took[level] for share, level in zip(shares, levels, strict=True))
        found["seconds of an iteration"] = one
        found["training, ddpm over dvdp, one level a step"] = took["training, ddpm"] / one
    if took.keys() >= {"training, ddpm", "training, all levels"}:
        found["training, ddpm over dvdp, all levels a step"] = took["training, ddpm"] / took["training, all levels"]
    for name in ("ddpm", "dvdp"):
        if f"sampling, {name}" in took:
            each = took[f"sampling, {name}"] / SAMPLE_STEPS / sample_batch
            found[f"seconds of an image of 1,000 steps, {name}"] = 1000 * each
    if took.keys() >= {"sampling, ddpm", "sampling, dvdp"}:
        found["sampling, ddpm over dvdp"] = took["sampling, ddpm"] / took["sampling, dvdp"]
    return found


def goals(found: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Of :data:`GOALS`, those that were measured: the goal, what was found, and whether it is met."""
    return {
        name: {
            "goal": f"{resolution} {value:g}",
            "found": found[name],
            "met": found[name] <= value if resolution == "at most" else found[name] >= value,
        }
        for name, (resolution, value) in GOALS.items()
        if name in found
    }


if __name__ == "__main__":
    sys.exit(main())
