"""Seconds of a training iteration and of a sample at the paper's protocol, DDPM beside DVDP.

    python3 -m benchmarks.throughput --resolution 256 --mode compiled --out throughput_256.json
    python3 -m benchmarks.throughput --resolution 32 --iterations 100 --batches 1 --steps 100 --out throughput_32.json

The protocol: means over 4,000 iterations, of 128 images at 32 px and 24 at 256 px, and over 100 batches of samples, of
256 and 64 images, in 1,000 steps. Whatever is less, as asked for or because the run was cut short, is marked in the
record, which is written turn by turn, and in the table. An iteration is what the training loop does with images in
memory: the copy to the device, the step, the average. DDPM and DVDP take turns. On a CPU, seconds are of processor time
by thread, as other work may keep it busy.

Runs from a bare checkout with torch, numpy, ruamel.yaml, safetensors and tqdm, on a GPU where there is one. ``--toy``
takes a network that is tiny, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.steps import MODES, PAPER
from benchmarks.machine import machine
from benchmarks.steps import TOY, draw, make_run, start, step
from benchmarks.timing import DTYPES, in_turns, peak_tflops, seconds, spreads, warn_of_allocator
from dvdp.config import TrainingParams
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.flops import mean_flops, sample_flops
from dvdp.training.levels import BLOCK, level_counts
from dvdp.training.loop import Training

PROTOCOL = {"iterations": 4000, "batches": 100, "steps": 1000}


def main() -> int:
    """Measure, write the record, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, choices=list(PAPER), default=256)
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--levels", choices=["one", "all"], default="one", help="of an iteration; one, as in presets/")
    parser.add_argument("--iterations", type=int, default=PROTOCOL["iterations"])
    parser.add_argument("--batches", type=int, default=PROTOCOL["batches"], help="of samples")
    parser.add_argument("--steps", type=int, default=PROTOCOL["steps"], help="of a sample")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    try:
        print(table(measure(parser.parse_args())))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record; written whenever both settings had a turn."""
    for name in PROTOCOL:
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: found {getattr(options, name)}, expected at least 1.")
    # Divides blocks, in which levels have their exact shares, and the iterations.
    turn = math.gcd(options.iterations, BLOCK)
    if options.levels == "one" and turn != BLOCK:
        raise UserError(
            f"--iterations: found {options.iterations}, expected a multiple of {BLOCK}, over which each level has its"
            " share; change it, or take --levels all."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warn_of_allocator(device)
    torch.backends.cudnn.benchmark = True
    resolution, (train_batch, sample_batch, turning_points, model) = options.resolution, PAPER[options.resolution]
    if options.toy:
        (resolution, (train_batch, model)), sample_batch = next(iter(TOY.items())), 2
    settings = TrainingParams(
        batch=train_batch,
        optimizer="adamw",
        precision=options.precision,
        levels=options.levels,
        compile=options.mode == "compiled",
    )
    runs = {name: make_run(at, resolution, model, settings) for name, at in (("ddpm", ()), ("dvdp", turning_points))}
    pixels = np.random.default_rng(0).integers(0, 256, (train_batch, 3, resolution, resolution), dtype=np.uint8)
    trainings = [start(run, pixels, device) for run in runs.values()]

    record: dict[str, Any] = {
        "machine": machine(),
        "resolution": resolution,
        "network": asdict(model),
        "turning_points": turning_points,
        "precision": options.precision,
        "mode": options.mode,
        "levels_of_an_iteration": options.levels,
        "training_batch": train_batch,
        "sampling_batch": sample_batch,
        "seconds_of": "wall-clock time" if device.type == "cuda" else "processor time",
        "peak_tflops": peak_tflops(options.precision, device),
        "protocol": PROTOCOL,
        "done": {"iterations": 0, "batches": 0, "steps": options.steps},
        "ratios": {},
        "spreads": {},
    }

    about = f"{resolution} px, {options.precision}, {options.mode}, levels: {options.levels}, "

    def keep(kind: str, unit: str, size: int, times: list[tuple[float, ...]], teraflops: list[float]) -> None:
        means = [sum(each) / len(times) / size for each in zip(*times, strict=True)]
        speeds = [work / mean for work, mean in zip(teraflops, means, strict=True)]
        peak = max(record["peak_tflops"].values())
        record["shortened"] = options.toy or any(record["done"][name] < whole for name, whole in PROTOCOL.items())
        record[kind] = {
            name: {f"seconds_per_{unit}": mean, "tflops_per_second": speed, "share_of_peak": speed / peak}
            for name, mean, speed in zip(runs, means, speeds, strict=True)
        }
        record[kind]["ddpm_over_dvdp"] = means[0] / means[1]
        name = f"{about}{kind}, DDPM over DVDP"
        record["ratios"][name] = means[0] / means[1]
        record["spreads"] |= spreads([{name: ddpm / dvdp} for ddpm, dvdp in times])
        write_atomically(options.out, json.dumps(record, indent=2) + "\n")

    # Of an iteration, forward and backward, and of a sample.
    teraflops = [3 * train_batch * mean_flops(run) / 1e12 for run in runs.values()]
    sampled = [replace(run, sampling=replace(run.sampling, steps=options.steps)) for run in runs.values()]
    sample_teraflops = [sample_flops(run) / 1e12 for run in sampled]
    images = torch.from_numpy(pixels)
    for training in trainings:
        warm_up(training, images, turn, sample_batch)
    works = [partial(iterate, training, images, count(), turn) for training in trainings]
    for times in times_so_far(works, options.iterations // turn, "training", device):
        record["done"]["iterations"] = len(times) * turn
        keep("training", "iteration", turn, times, teraflops)

    works = [partial(draw, training, sample_batch, steps=options.steps) for training in trainings]
    for times in times_so_far(works, options.batches, "sampling", device):
        record["done"]["batches"] = len(times)
        keep("sampling", "sample", sample_batch, times, sample_teraflops)
    return record


def warm_up(training: Training, images: torch.Tensor, turn: int, sample_batch: int) -> None:
    """One step, and one call of sampling, of every shape that will come."""
    schedule, levels = training.process.schedule, training.run.training.levels
    splits = {tuple(level_counts(schedule, levels, training.run.seed, n, len(images))) for n in range(turn)}
    for split in sorted(splits):
        step(training, images, list(split))
    draw(training, sample_batch, steps=schedule.levels + 1)


def iterate(training: Training, images: torch.Tensor, steps: Iterator[int], number: int) -> None:
    """The next iterations of the training loop, on the same images."""
    for n in islice(steps, number):
        training.step(n, images)
        training.ema.update((n + 1) * len(images), len(images))


def times_so_far(
    works: Sequence[Callable[[], None]], turns: int, title: str, device: torch.device
) -> Iterator[list[tuple[float, ...]]]:
    """After each turn: the seconds of each work in all turns until then."""
    found = []
    for times in in_turns([partial(seconds, work, device) for work in works], turns, title, warm_up=0):
        found.append(times)
        yield found


def table(record: dict[str, Any]) -> str:
    """Markdown, and below it what was measured and what is missing."""
    kinds = {"training": "seconds_per_iteration", "sampling": "seconds_per_sample"}
    lines = [
        "| | seconds an iteration | TFLOP/s | of the peak |"
        f" seconds a sample, {record['done']['steps']:,} steps | TFLOP/s | of the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("ddpm", "dvdp"):
        cells = [name if name == "ddpm" else f"{name} {list(record['turning_points'])}"]
        for kind, unit in kinds.items():
            found = record[kind][name]
            cells += [f"{found[unit]:.3g}", f"{found['tflops_per_second']:.3g}", f"{found['share_of_peak']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    over = [f"{record[kind]['ddpm_over_dvdp']:.2f}x" for kind in kinds]
    lines.append(f"| ddpm over dvdp | {over[0]} | | | {over[1]} | | |")
    done = ", ".join(f"{record['done'][name]:,} of {whole:,} {name}" for name, whole in PROTOCOL.items())
    host = record["machine"]
    about = [
        f"{record['resolution']} px",
        f"batch {record['training_batch']} to train (levels: {record['levels_of_an_iteration']})",
        f"{record['sampling_batch']} to sample",
        record["precision"],
        record["mode"],
        f"seconds of {record['seconds_of']}",
        f"{host['cpu']}, {host['threads']} threads, GPU: {host['gpu']}",
        f"torch {host['torch']}",
    ]
    mark = "**Shortened, not the protocol**" if record["shortened"] else "The whole protocol"
    return "\n".join([*lines, "", f"{mark}: {done}. {'; '.join(about)}."])


if __name__ == "__main__":
    sys.exit(main())
