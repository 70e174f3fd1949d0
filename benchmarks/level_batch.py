"""Seconds an image of a training step with ``levels: one``, where lower levels take more images a step.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.level_batch --out benchmarks/results/level_batch.json

The networks and batches of :mod:`benchmarks.steps` at the full-size level; below it, so many times as many images.
Everything takes turns. The ratio to DDPM is what would follow with each level's share of the images as it is, so with
fewer steps of the lower levels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import TURNS
from benchmarks.machine import machine
from benchmarks.steps import PRECISIONS, SIZES, TOY, TURNING_POINTS, bound, make_run, start, step
from benchmarks.timing import spreads, times_in_turns, warn_of_allocator
from dvdp.config import TrainingParams
from dvdp.files import write_atomically
from dvdp.training.budget import level_flops

#: Each level takes so many times the images of the level above it.
GROWTH = (1, 2, 4)


def main() -> int:
    """Measure each side and precision, write what was found, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", choices=[*SIZES, *TOY], default=[32, 64])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warn_of_allocator(torch.device("cpu"))
    result: dict[str, Any] = {"machine": machine(), "seconds_of": "processor time", "turns": options.turns}
    result |= {"cases": [], "ratios": {}, "spreads": {}}
    for side in options.sides:
        for precision in PRECISIONS:
            case, between_turns = measure(side, precision, options.turns)
            result["cases"].append(case)
            result["ratios"] |= ratios(case)
            result["spreads"] |= between_turns
            write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


def measure(side: int, precision: str, turns: int) -> tuple[dict[str, Any], dict[str, float]]:
    """One side and precision: seconds an image by level and growth; and the spreads of the ratios."""
    batch, model = {**SIZES, **TOY}[side]
    device = torch.device("cpu")
    settings = TrainingParams(batch=batch, precision=precision, levels="one")  # type: ignore[arg-type]
    levels = len(TURNING_POINTS) + 1
    largest = batch * GROWTH[-1] ** (levels - 1)
    pixels = np.random.default_rng(0).integers(0, 256, (largest, 3, side, side), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    ddpm, dvdp = (start(make_run(points, side, model, settings), pixels, device) for points in ((), TURNING_POINTS))
    works, sizes = {"ddpm": partial(step, ddpm, images[:batch], [batch])}, {"ddpm": batch}
    for level in range(levels):
        for growth in GROWTH if level else GROWTH[:1]:
            name, size = f"level {level}, x{growth**level}", batch * growth**level
            counts = [size if k == level else 0 for k in range(levels)]
            works[name], sizes[name] = partial(step, dvdp, images[:size], counts), size
    times = times_in_turns(list(works.values()), turns, device, f"{side} px, {precision}")

    def each(turns: list[tuple[float, ...]]) -> dict[str, float]:
        medians = map(statistics.median, zip(*turns, strict=True))
        return {name: seconds / sizes[name] for name, seconds in zip(works, medians, strict=True)}

    shares = dvdp.process.schedule.shares()
    case = {"side": side, "precision": precision, "batch": batch, "shares": shares, "seconds_an_image": each(times)}
    case["bound"] = bound(level_flops(dvdp.run), shares)
    return case, spreads([ratios(case | {"seconds_an_image": each([turn])}) for turn in times])


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """DDPM over DVDP, an image; what must not fall, by name."""
    seconds, found = case["seconds_an_image"], {}
    for growth in GROWTH:
        mean = sum(share * seconds[f"level {level}, x{growth**level}"] for level, share in enumerate(case["shares"]))
        batches = " and ".join(f"x{growth**level}" for level in range(1, len(case["shares"])))
        name = (
            f"{case['side']} px, {case['precision']}, training, DDPM over DVDP, one level a step, lower ones {batches}"
        )
        found[name] = seconds["ddpm"] / mean
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: DDPM over DVDP, by the batches of the lower levels."""
    first = ratios(result["cases"][0])
    lines = [
        f"| px | | {' | '.join(name.rsplit(', ', 1)[1] for name in first)} | bound |",
        "|---|---|" + "---|" * (len(first) + 1),
    ]
    for case in result["cases"]:
        speedups = [f"{value:.2f}x" for value in (*ratios(case).values(), case["bound"])]
        lines.append(f"| {case['side']} | {case['precision']} | {' | '.join(speedups)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
